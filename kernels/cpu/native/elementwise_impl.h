/* Norms, sums, gated activations and the choice of rows: everything that looks at one row at a time.
 *
 * Computed in fp32 and rounded to the working type once, where a result is stored. (Layers that round in between, as
 * transformers' Llama does before the norm's weight and after silu, lie further from the exact result.)
 */
#ifndef OCTAVO_ELEMENTWISE_IMPL_H
#define OCTAVO_ELEMENTWISE_IMPL_H

#include <math.h>

#include "octavo_cpu.h"
#include "vec_math.h"

OV_INLINE char *ov_at(const void *base, int64_t element, int bf16) {
    return (char *)base + element * (bf16 ? 2 : 4);
}

/* Items taken at once: few enough that all threads get several turns. */
OV_INLINE int64_t ov_grain(const OvWorker *w, int64_t total, int64_t most) {
    int64_t grain = ov_min(most, total / (4 * w->count));
    return grain > 1 ? grain : 1;
}

/* Calls row(op, step, r, bf16) for the rows of an operator, shared among the team. */
#define OV_FOR_ROWS(op, step, w, row)                                                                     \
    do {                                                                                                  \
        int64_t total_ = ov_num_rows(op, step), grain_ = ov_grain(w, total_, 16), first_;                 \
        while ((first_ = ov_take(w, total_, grain_)) >= 0)                                                \
            for (int64_t r_ = first_; r_ < ov_min(first_ + grain_, total_); r_++)                         \
                if ((w)->type == OV_BF16) row(op, step, r_, 1);                                           \
                else row(op, step, r_, 0);                                                                \
    } while (0)

/* The sum of squares: four sums of every fourth vector, then a tree. With b, x becomes scale * a + b as it
 * is stored. */
OV_INLINE float ov_sum_squares(const void *a, float scale, const void *b, void *sum, int64_t width, int bf16) {
    V16 sums[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    for (int64_t start = 0; start < width; start += 64) {
        for (int k = 0; k < 4; k++) {
            int64_t i = start + 16 * k, n = ov_min(16, width - i);
            if (n <= 0) break;
            V16 x = v16_get(a, i, (int)n, bf16);
            if (b) {
                x = v16_rounded(v16_fma(x, v16_set(scale), v16_get(b, i, (int)n, bf16)), bf16);
                v16_put(sum, i, x, (int)n, bf16);
            }
            sums[k] = v16_fma(x, x, sums[k]);
        }
    }
    return v16_sum(v16_add(v16_add(sums[0], sums[1]), v16_add(sums[2], sums[3])));
}

/* Root mean square norm (Zhang & Sennrich 2019): out = x / sqrt(mean(x^2) + eps) * weight. */
OV_INLINE void ov_norm_row(const void *x, float squares, const float *weight, void *out, int64_t width, float eps,
                           int bf16) {
    V16 inverse = v16_set(1.0f / sqrtf(squares / (float)width + eps));
    for (int64_t i = 0; i < width; i += 16) {
        int n = (int)ov_min(16, width - i);
        V16 w = n == 16 ? v16_load(weight + i) : v16_load_part(weight + i, n);
        v16_put(out, i, v16_mul(v16_mul(v16_get(x, i, n, bf16), inverse), w), n, bf16);
    }
}

OV_INLINE void ov_rms_norm_row(const OvOp *op, const OvStep *step, int64_t r, int bf16) {
    (void)step;
    int64_t width = op->n[0];
    for (int64_t k = 0; k < op->n[1]; k++) {
        const void *x = ov_at(op->a, r * op->stride_a + k * width, bf16);
        void *out = ov_at(op->out, r * op->stride_out + k * width, bf16);
        float squares = ov_sum_squares(x, 1.0f, NULL, NULL, width, bf16);
        ov_norm_row(x, squares, (const float *)op->weight, out, width, op->f[0], bf16);
    }
}

OV_INLINE void ov_add_rms_norm_row(const OvOp *op, const OvStep *step, int64_t r, int bf16) {
    (void)step;
    int64_t width = op->n[0];
    for (int64_t k = 0; k < op->n[1]; k++) {
        const void *a = ov_at(op->a, r * op->stride_a + k * width, bf16);
        const void *b = ov_at(op->b, r * op->stride_b + k * width, bf16);
        void *sum = ov_at(op->out2, r * op->stride_out2 + k * width, bf16);
        void *out = ov_at(op->out, r * op->stride_out + k * width, bf16);
        float squares = ov_sum_squares(a, op->f[1], b, sum, width, bf16);
        ov_norm_row(sum, squares, (const float *)op->weight, out, width, op->f[0], bf16);
    }
}

OV_INLINE void ov_add_row(const OvOp *op, const OvStep *step, int64_t r, int bf16) {
    (void)step;
    const void *a = ov_at(op->a, r * op->stride_a, bf16), *b = ov_at(op->b, r * op->stride_b, bf16);
    void *out = ov_at(op->out, r * op->stride_out, bf16);
    for (int64_t i = 0; i < op->n[0]; i += 16) {
        int n = (int)ov_min(16, op->n[0] - i);
        V16 x = v16_fma(v16_get(a, i, n, bf16), v16_set(op->f[0]), v16_get(b, i, n, bf16));
        v16_put(out, i, x, n, bf16);
    }
}

OV_INLINE void ov_select_row(const OvOp *op, const OvStep *step, int64_t r, int bf16) {
    const void *from = ov_at(op->a, step->logits_indices[r] * op->stride_a, bf16);
    memcpy(ov_at(op->out, r * op->stride_out, bf16), from, (size_t)op->n[0] * (bf16 ? 2 : 4));
}

OV_INLINE V16 ov_silu(V16 x) {
    V16 e = v16_exp(v16_sub(v16_zero(), x)); /* infinite for very negative x, and x / inf is 0 */
    return v16_div(x, v16_add(v16_set(1.0f), e));
}

OV_INLINE V16 ov_gelu(V16 x) {
    V16 half = v16_mul(x, v16_set(0.5f));
    return v16_fma(half, v16_erf(v16_mul(x, v16_set(0.70710678f))), half);
}

OV_INLINE V16 ov_gelu_tanh(V16 x) {
    V16 half = v16_mul(x, v16_set(0.5f)), square = v16_mul(x, x);
    V16 inner = v16_mul(x, v16_fma(square, v16_set(0.79788456f * 0.044715f), v16_set(0.79788456f)));
    return v16_fma(half, v16_tanh(inner), half);
}

#define OV_SPAN 512 /* columns of an item: a single row is shared among threads too */

OV_INLINE void ov_gated_span(const void *gate, const void *up, void *out, int64_t width, int activation, int bf16) {
    for (int64_t i = 0; i < width; i += 16) {
        int n = (int)ov_min(16, width - i);
        V16 x = v16_get(gate, i, n, bf16), y;
        if (activation == OV_SILU) y = ov_silu(x);
        else if (activation == OV_GELU) y = ov_gelu(x);
        else y = ov_gelu_tanh(x);
        v16_put(out, i, v16_mul(y, v16_get(up, i, n, bf16)), n, bf16);
    }
}

OV_INLINE void ov_gated_items(const OvOp *op, const OvStep *step, OvWorker *w, int activation, int bf16) {
    int64_t width = op->n[0], spans = ov_ceil_div(width, OV_SPAN);
    int64_t total = ov_num_rows(op, step) * spans, grain = ov_grain(w, total, 16), first;
    while ((first = ov_take(w, total, grain)) >= 0) {
        for (int64_t item = first; item < ov_min(first + grain, total); item++) {
            int64_t r = item / spans, column = item % spans * OV_SPAN;
            const void *gate = ov_at(op->a, r * op->stride_a + column, bf16);
            ov_gated_span(gate, ov_at(gate, width, bf16), ov_at(op->out, r * op->stride_out + column, bf16),
                          ov_min(OV_SPAN, width - column), activation, bf16);
        }
    }
}

static void ov_rms_norm(const OvOp *op, const OvStep *step, OvWorker *w) { OV_FOR_ROWS(op, step, w, ov_rms_norm_row); }
static void ov_add_rms_norm(const OvOp *op, const OvStep *step, OvWorker *w) {
    OV_FOR_ROWS(op, step, w, ov_add_rms_norm_row);
}
static void ov_add(const OvOp *op, const OvStep *step, OvWorker *w) { OV_FOR_ROWS(op, step, w, ov_add_row); }
static void ov_select_rows(const OvOp *op, const OvStep *step, OvWorker *w) {
    OV_FOR_ROWS(op, step, w, ov_select_row);
}

static void ov_gated(const OvOp *op, const OvStep *step, OvWorker *w) {
    int bf16 = w->type == OV_BF16;
    int64_t kind = op->n[1];
    if (kind == OV_SILU) bf16 ? ov_gated_items(op, step, w, OV_SILU, 1) : ov_gated_items(op, step, w, OV_SILU, 0);
    else if (kind == OV_GELU) bf16 ? ov_gated_items(op, step, w, OV_GELU, 1) : ov_gated_items(op, step, w, OV_GELU, 0);
    else bf16 ? ov_gated_items(op, step, w, OV_GELU_TANH, 1) : ov_gated_items(op, step, w, OV_GELU_TANH, 0);
}

OV_INLINE void ov_cap_span(const float *from, float *to, int64_t width, float scale, float cap) {
    for (int64_t i = 0; i < width; i += 16) {
        int n = (int)ov_min(16, width - i);
        V16 x = v16_mul(v16_get(from, i, n, 0), v16_set(scale));
        if (cap != 0.0f) x = v16_mul(v16_tanh(v16_div(x, v16_set(cap))), v16_set(cap));
        v16_put(to, i, x, n, 0);
    }
}

static void ov_cap(const OvOp *op, const OvStep *step, OvWorker *w) {
    int64_t width = op->n[0], spans = ov_ceil_div(width, OV_SPAN), total = ov_num_rows(op, step) * spans;
    for (int64_t item; (item = ov_take(w, total, 1)) >= 0;) {
        int64_t r = item / spans, column = item % spans * OV_SPAN;
        ov_cap_span((const float *)op->a + r * op->stride_a + column, (float *)op->out + r * op->stride_out + column,
                    ov_min(OV_SPAN, width - column), op->f[0], op->f[1]);
    }
}

#endif
