/* What crosses between Python and the native library, and between its parts.
 *
 * A step of the model is a list of operators (OvOp) run by one team of threads over one set of rows (OvStep). Python
 * records the list once; every step then is one call, whatever its number of rows. An operator run on its own is a
 * list of one.
 *
 * One arithmetic: what an operator computes for a row depends on that row alone, never on how many others there are,
 * on who computes them, or on the number of threads. Everything below keeps to that.
 *
 * Plain C11 and raw pointers; no Python and no torch headers. Matrices are row-major, strides count elements.
 */
#ifndef OCTAVO_CPU_H
#define OCTAVO_CPU_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define OV_EXPORT __attribute__((visibility("default")))

typedef enum { OV_F32 = 0, OV_BF16 = 1 } OvType;

typedef enum {
    OV_EMBED = 0,     /* out[r] = table row of token_ids[r], times f[0] (rounded to the working type once).
                         weight: OvMatrix; n[0] width */
    OV_RMS_NORM,      /* out[r] = norm(a[r]) * weight; statistics in fp32. weight: fp32 [n[0]]; n[0] width,
                         n[1] rows of this width within one row of the step (1, or heads); f[0] eps */
    OV_ADD_RMS_NORM,  /* out2[r] = f[1] * a[r] + b[r] (rounded once), out[r] = norm(out2[r]) * weight; out2 may be b.
                         As above */
    OV_ADD,           /* out[r] = f[0] * a[r] + b[r]; n[0] width */
    OV_LINEAR,        /* out[r] = weight . a[r] + b; weight: OvMatrix; b: fp32 [num_outputs] or NULL;
                         n[0]: 1 if out is fp32 whatever the working type */
    OV_GATED,         /* out[r][i] = act(a[r][i]) * a[r][n[0] + i]; n[0] width of out; n[1] OvActivation */
    OV_ROPE_WRITE,    /* rotates q and k of a = qkv [.., (heads + 2 kv_heads) * head_dim], writes k and v to their
                         slots of the layer, leaves q in out [.., heads * head_dim]. spec: OvAttention; out2: K/V layer;
                         weight: rope table fp32 [.., rotary_dim], cosines in the first half, sines in the second;
                         n[0] rotary_dim; n[1] the layer's group */
    OV_ATTENTION,     /* out[r] = attention of q a[r] over its sequence's K/V. spec: OvAttention; out2: K/V layer;
                         n[1] the layer's group */
    OV_SELECT_ROWS,   /* out[i] = a[logits_indices[i]]; n[0] width; always num_logits rows */
    OV_DRAW,          /* out[i] (int64) = the token drawn from logits a[i], fp32 [n[0]]; weight: OvDraw (sampling.h) */
    OV_CAP,           /* out[r] = f[1] * tanh(f[0] * a[r] / f[1]), or f[0] * a[r] if f[1] is 0; fp32 whatever the working
                         type; n[0] width; out may be a */
    OV_MOE,           /* out[r] = the weighted sum of what the experts chosen by the router's logits b[r] make of a[r]
                         (moe_impl.h). weight: OvExperts (matrix.h); n[0] experts per token; n[1] OvActivation; n[2]: 1 if
                         the weights of the chosen are made to sum to 1 */
    OV_NUM_KINDS
} OvKind;

typedef enum { OV_SILU = 0, OV_GELU = 1, OV_GELU_TANH = 2 } OvActivation;
typedef enum { OV_TOKENS = 0, OV_LOGITS = 1 } OvRows; /* how many rows an operator has: num_tokens or num_logits */

/* One attention layer's shape. */
typedef struct {
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    int64_t window;  /* keys a query sees at most, itself included; 0: all */
    float scale, soft_cap; /* soft_cap 0: none */
    const void *q_norm, *k_norm; /* fp32 [head_dim] or NULL: RMSNorm of each head before rotation */
    float norm_eps;
} OvAttention;

typedef struct {
    int32_t kind;  /* OvKind */
    int32_t rows;  /* OvRows */
    const void *a, *b;
    void *out, *out2;
    const void *weight;
    const OvAttention *spec;
    int64_t stride_a, stride_b, stride_out, stride_out2;
    int64_t n[3];
    float f[2];
} OvOp;

/* Where the layers of one group keep K/V in a step. */
typedef struct {
    const int64_t *slots;        /* [num_tokens] block id * block_size + offset; negative: written nowhere */
    const int64_t *block_tables; /* [tables, table_stride] */
    int64_t table_stride;
    const int64_t *table_rows;   /* [num_rows] where in block_tables each row's table is; NULL: row after row */
} OvGroup;

static inline const int64_t *ov_block_table(const OvGroup *group, int64_t row) {
    int64_t place = group->table_rows != NULL ? group->table_rows[row] : row;
    return group->block_tables + place * group->table_stride;
}

/* One step's rows. All arrays are the host's; sequences are ordered decode-first, as kernels/backend.py says. */
typedef struct {
    int64_t num_tokens, num_logits, num_rows, num_decode_rows;
    const int64_t *token_ids;      /* [num_tokens] */
    const int64_t *positions;      /* [num_tokens] */
    const int64_t *query_starts;   /* [num_rows + 1] */
    const int64_t *kv_lens;        /* [num_rows], this step's tokens included */
    const OvGroup *groups;         /* as many as the operators name */
    const int64_t *logits_indices; /* [num_logits] */
} OvStep;

/* ------------------------------------------------------------------------------------------------ inside the library */

/* A thread of the team while it works on one phase of one operator. */
typedef struct {
    int index, count;               /* this thread, threads in all */
    _Atomic int64_t *next;          /* the next item of this phase that nobody has taken */
    void *scratch;                  /* of this thread alone, 64-byte aligned */
    size_t scratch_bytes;
    void *shared;                   /* of all threads, as large as the operator's plan asked; kept between its phases */
    OvType type;                    /* the working type: activations and K/V */
    const OvOp *ahead;              /* the next OV_LINEAR of the list, for one that is at work; or NULL */
} OvWorker;

/* Takes up to `grain` items of `total`: the first taken, or -1 when none is left. Who takes which never matters.
   A phase returns only when it got -1 (or has no items at all): that is how the team knows that all are taken. */
static inline int64_t ov_take(OvWorker *w, int64_t total, int64_t grain) {
    int64_t first = atomic_load_explicit(w->next, memory_order_relaxed);
    if (first >= total) return -1;
    if (w->count == 1) atomic_store_explicit(w->next, first + grain, memory_order_relaxed); /* nobody else: no lock */
    else first = atomic_fetch_add_explicit(w->next, grain, memory_order_relaxed);
    return first < total ? first : -1;
}

/* Takes the next item from the beginning (threads with an even index) or from the end (the others), so that a thread can
   tell where it will go on. -1 when none is left. */
static inline int64_t ov_take_inwards(OvWorker *w, int64_t total) {
    const bool from_end = w->index % 2 != 0;
    const int64_t one = from_end ? (int64_t)1 << 32 : 1; /* the low half counts items taken from the beginning */
    int64_t taken = atomic_load_explicit(w->next, memory_order_relaxed);
    if ((taken & UINT32_MAX) + (taken >> 32) >= total) return -1;
    if (w->count == 1) atomic_store_explicit(w->next, taken + one, memory_order_relaxed);
    else taken = atomic_fetch_add_explicit(w->next, one, memory_order_relaxed);
    const int64_t first = taken & UINT32_MAX, last = total - 1 - (taken >> 32);
    if (first > last) return -1;
    return from_end ? last : first;
}

typedef void (*OvPhase)(const OvOp *, const OvStep *, OvWorker *);

/* What an operator needs in a step. All zero: nothing beyond the table's own scratch, every phase. */
typedef struct {
    size_t scratch_bytes; /* of every thread */
    size_t shared_bytes;  /* of all threads together */
    unsigned skipped;     /* bit p: phase p has nothing to do in this step, so no thread enters it */
} OvPlan;

typedef void (*OvPlanner)(const OvOp *, const OvStep *, OvType, int num_threads, OvPlan *);

#define OV_MAX_PHASES 9

/* What one instruction set offers. A phase starts when all threads have left the one before. */
typedef struct {
    const char *name; /* "avx2" | "avxvnni" | "avx512" | "amx" */
    OvPhase phases[OV_NUM_KINDS][OV_MAX_PHASES]; /* NULL from the first unused one on */
    OvPlanner plans[OV_NUM_KINDS]; /* NULL: a plan of zeros */
    void (*thread_enter)(void);    /* in every thread before its first phase (the caller: of every run). amx: all eight
                                      tiles are 16 rows of 64 bytes; an operator that changes that sets it back */
    void (*thread_leave)(void);    /* in the caller after every run, so that others find its tiles free; or NULL */
    size_t scratch_bytes;          /* for every thread, at least */
} OvKernels;

/* In how many streams memory is best asked for (fetch_impl.h); cpu_features.c. */
int64_t ov_memory_streams(void);

static inline int64_t ov_num_rows(const OvOp *op, const OvStep *step) {
    return op->rows == OV_LOGITS ? step->num_logits : step->num_tokens;
}

#endif
