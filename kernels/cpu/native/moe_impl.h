/* OV_MOE: mixture of experts (Shazeer et al. 2017). A pair is a token and one of the experts that it chose.
 *
 *     choices     token 0: 5 2    token 1: 2 0    token 2: 5 0        [num_tokens][chosen]
 *     sorted      0: tokens 1 2   2: tokens 0 1   5: tokens 0 2       one slice for each expert that has any
 *     summed      by token, in the order of its own choices
 *
 * In phases: route, group, gather rows by expert, products of each slice (linear_impl.h, as an OV_LINEAR of its own),
 * gate, products, sum. Threads walk through the slices without waiting for one another between them.
 *
 * A token's choice and its sum look at that token alone, and products of a row do not depend on the other rows: so
 * neither does the result. */
#include "matrix.h"

enum {
    MOE_ROUTE,
    MOE_GROUP,
    MOE_GATHER,
    MOE_ARRANGE_GATE_UP,
    MOE_MULTIPLY_GATE_UP,
    MOE_GATE,
    MOE_ARRANGE_DOWN,
    MOE_MULTIPLY_DOWN,
    MOE_SUM,
    MOE_NUM_PHASES,
    MOE_FEW_TOKENS = 8, /* up to so many are routed by the thread that groups: cheaper than a phase */
};

typedef enum { MOE_IN = 0, MOE_OUT = 1 } MoeSide; /* the product hidden → 2 * inner, and inner → hidden */

/* An expert's share of the pairs: places [first, first + count). */
typedef struct {
    _Alignas(64) int64_t expert;
    int64_t first, count;
    int64_t arranged_at[2]; /* of each side, in bytes from `arranged` on */
    unsigned skipped[2];    /* phases of the product that it does not need */
    _Atomic int64_t next[2][2]; /* [side][arrange, multiply]: the next item that nobody has taken */
} MoeSlice;

/* What lies in the memory of all threads. */
typedef struct {
    int64_t num_tokens, chosen, num_pairs, hidden, inner, element_bytes;
    int64_t *num_slices;
    MoeSlice *slices;
    float *weights;   /* [num_tokens][chosen] */
    int32_t *choices; /* [num_tokens][chosen] experts, the likeliest first */
    int32_t *tokens;  /* [num_pairs] by place */
    int32_t *places;  /* [num_tokens][chosen] */
    uint8_t *rows;    /* [num_pairs][hidden] by place: the tokens' rows, then what their experts make of them */
    uint8_t *inside;  /* [num_pairs][2 * inner] by place; gated in place */
    uint8_t *arranged;
} MoeRoom;

static uint8_t *moe_take(uint8_t *base, int64_t *offset, int64_t bytes) {
    uint8_t *at = base + *offset;
    *offset += (bytes + 63) / 64 * 64;
    return at;
}

static int64_t moe_max_slices(const OvExperts *experts, int64_t num_pairs) {
    return ov_min(experts->num_experts, num_pairs);
}

/* An expert's product as an operator and a step of its own, but for where its rows are. */
static OvOp moe_linear(const OvExperts *experts, int64_t expert, MoeSide side) {
    return (OvOp){.kind = OV_LINEAR, .rows = OV_TOKENS,
                  .weight = side == MOE_IN ? experts->gate_up[expert] : experts->down[expert]};
}

static OvPlan moe_linear_plan(const OvExperts *experts, int64_t expert, MoeSide side, int64_t num_rows, OvType type,
                              int num_threads) {
    const OvOp op = moe_linear(experts, expert, side);
    const OvStep step = {.num_tokens = num_rows};
    OvPlan plan = {0};
    linear_plan(&op, &step, type, num_threads, &plan);
    return plan;
}

/* Bytes that the arranged rows of all slices take at most; slices of more than a tile are rounded up to whole ones. */
static int64_t moe_arranged_bytes(const OvOp *op, const OvStep *step, OvType type) {
    const OvExperts *experts = op->weight;
    const int64_t pairs = step->num_tokens * op->n[0], slices = moe_max_slices(experts, pairs);
    int64_t most = 0;
    for (int side = MOE_IN; side <= MOE_OUT; side++) {
        /* An expert gets a token once at most, and what num_tokens rows need no room for, fewer do not either. */
        if (moe_linear_plan(experts, 0, side, step->num_tokens, type, 1).shared_bytes == 0) continue;
        const OvMatrix *matrix = side == MOE_IN ? experts->gate_up[0] : experts->down[0];
        int64_t bytes = arranged_bytes(matrix, type, pairs + slices * OV_TILE_ROWS) + slices * 64;
        if (bytes > most) most = bytes;
    }
    return most;
}

/* Where everything is from `base` on; returns how many bytes that takes. */
static int64_t moe_room(const OvOp *op, const OvStep *step, OvType type, void *base, MoeRoom *room) {
    const OvExperts *experts = op->weight;
    const int64_t pairs = step->num_tokens * op->n[0];
    int64_t end = 0;
    room->num_tokens = step->num_tokens;
    room->chosen = op->n[0];
    room->num_pairs = pairs;
    room->hidden = experts->down[0]->num_outputs;
    room->inner = experts->down[0]->num_inputs;
    room->element_bytes = type == OV_BF16 ? 2 : 4;
    room->num_slices = (int64_t *)moe_take(base, &end, 64);
    room->slices = (MoeSlice *)moe_take(base, &end, moe_max_slices(experts, pairs) * (int64_t)sizeof(MoeSlice));
    room->weights = (float *)moe_take(base, &end, pairs * 4);
    room->choices = (int32_t *)moe_take(base, &end, pairs * 4);
    room->tokens = (int32_t *)moe_take(base, &end, pairs * 4);
    room->places = (int32_t *)moe_take(base, &end, pairs * 4);
    room->rows = moe_take(base, &end, pairs * room->hidden * room->element_bytes);
    room->inside = moe_take(base, &end, pairs * 2 * room->inner * room->element_bytes);
    room->arranged = moe_take(base, &end, moe_arranged_bytes(op, step, type));
    return end;
}

static MoeRoom moe_room_of(const OvOp *op, const OvStep *step, OvWorker *w) {
    MoeRoom room;
    moe_room(op, step, w->type, w->shared, &room);
    return room;
}

/* Experts of a layer have one shape, so expert 0 speaks for all. */
static void moe_plan(const OvOp *op, const OvStep *step, OvType type, int num_threads, OvPlan *plan) {
    const OvExperts *experts = op->weight;
    MoeRoom room;
    uint8_t nowhere[1]; /* only distances from it are used */
    if (step->num_tokens == 0) {
        plan->skipped = (1u << MOE_NUM_PHASES) - 1;
        return;
    }
    plan->shared_bytes = (size_t)moe_room(op, step, type, nowhere, &room);
    plan->scratch_bytes = (size_t)(experts->num_experts + OV_PANEL) * 8;
    if (step->num_tokens <= MOE_FEW_TOKENS) plan->skipped |= 1u << MOE_ROUTE;
    for (int side = MOE_IN; side <= MOE_OUT; side++) {
        /* The most rows that a thread arranges for itself, and the most that a slice can have. */
        const int64_t rows[2] = {ov_min(step->num_tokens, OV_OWN_ROWS), step->num_tokens};
        for (int i = 0; i < 2; i++) {
            OvPlan product = moe_linear_plan(experts, 0, side, rows[i], type, num_threads);
            if (product.scratch_bytes > plan->scratch_bytes) plan->scratch_bytes = product.scratch_bytes;
            if (i == 1 && (product.skipped & 1u))
                plan->skipped |= 1u << (side == MOE_IN ? MOE_ARRANGE_GATE_UP : MOE_ARRANGE_DOWN);
        }
    }
}

/* ----------------------------------------------------------------------------------------------------------- routing */

/* p = softmax(logits), all in fp32. p has room for whole vectors. */
OV_INLINE void moe_softmax(const void *logits, int64_t at, int64_t count, float *p, int bf16) {
    const V16 least = v16_set(-__builtin_inff());
    V16 top = least, sums = v16_zero();
    for (int64_t i = 0; i < count; i += 16) {
        int n = (int)ov_min(16, count - i);
        top = v16_max(top, v16_keep(v16_get(logits, at + i, n, bf16), least, 0, n));
    }
    top = v16_set(v16_largest(top));
    for (int64_t i = 0; i < count; i += 16) {
        int n = (int)ov_min(16, count - i);
        V16 e = v16_keep(v16_exp(v16_sub(v16_get(logits, at + i, n, bf16), top)), v16_zero(), 0, n);
        v16_store(p + i, e);
        sums = v16_add(sums, e);
    }
    const V16 total = v16_set(v16_sum(sums));
    for (int64_t i = 0; i < count; i += 16) v16_store(p + i, v16_div(v16_load(p + i), total));
}

/* The likeliest expert not yet marked by -1; of equal ones the first. NaN, which is never likelier, is taken too. */
static int64_t moe_likeliest(const float *p, int64_t count) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; e++)
        if (p[e] != -1.0f && (best < 0 || p[e] > p[best])) best = e;
    return best;
}

static void moe_route(const OvOp *op, const MoeRoom *room, OvWorker *w, int64_t token) {
    const OvExperts *experts = op->weight;
    float *p = w->scratch, *weights = room->weights + token * room->chosen, total = 0.0f;
    const int64_t at = token * op->stride_b;
    if (w->type == OV_BF16) moe_softmax(op->b, at, experts->num_experts, p, 1);
    else moe_softmax(op->b, at, experts->num_experts, p, 0);
    for (int64_t k = 0; k < room->chosen; k++) {
        const int64_t best = moe_likeliest(p, experts->num_experts);
        room->choices[token * room->chosen + k] = (int32_t)best;
        weights[k] = p[best];
        total += p[best];
        p[best] = -1.0f;
    }
    if (op->n[2])
        for (int64_t k = 0; k < room->chosen; k++) weights[k] /= total;
}

static void moe_route_tokens(const OvOp *op, const OvStep *step, OvWorker *w) {
    const MoeRoom room = moe_room_of(op, step, w);
    for (int64_t token; (token = ov_take(w, room.num_tokens, 1)) >= 0;) moe_route(op, &room, w, token);
}

/* The slices of experts with `counts` pairs each; counts become the places at which they begin. */
static void moe_make_slices(const OvOp *op, const MoeRoom *room, OvWorker *w, int64_t *counts) {
    const OvExperts *experts = op->weight;
    int64_t first = 0, num_slices = 0, arranged[2] = {0, 0};
    for (int64_t expert = 0; expert < experts->num_experts; expert++) {
        const int64_t count = counts[expert];
        counts[expert] = first;
        if (count == 0) continue;
        MoeSlice *slice = &room->slices[num_slices++];
        *slice = (MoeSlice){.expert = expert, .first = first, .count = count};
        for (int side = MOE_IN; side <= MOE_OUT; side++) {
            OvPlan plan = moe_linear_plan(experts, expert, side, count, w->type, w->count);
            slice->skipped[side] = plan.skipped;
            slice->arranged_at[side] = arranged[side];
            arranged[side] += (int64_t)(plan.shared_bytes + 63) / 64 * 64;
        }
        first += count;
    }
    *room->num_slices = num_slices;
}

/* One thread's work: pairs by expert, tokens in order within each. */
static void moe_group(const OvOp *op, const OvStep *step, OvWorker *w) {
    const OvExperts *experts = op->weight;
    if (ov_take(w, 1, 1) < 0) return;
    const MoeRoom room = moe_room_of(op, step, w);
    if (room.num_tokens <= MOE_FEW_TOKENS)
        for (int64_t token = 0; token < room.num_tokens; token++) moe_route(op, &room, w, token);
    int64_t *counts = w->scratch;
    memset(counts, 0, (size_t)experts->num_experts * sizeof *counts);
    for (int64_t pair = 0; pair < room.num_pairs; pair++) counts[room.choices[pair]]++;
    moe_make_slices(op, &room, w, counts);
    for (int64_t pair = 0; pair < room.num_pairs; pair++) {
        const int64_t place = counts[room.choices[pair]]++;
        room.places[pair] = (int32_t)place;
        room.tokens[place] = (int32_t)(pair / room.chosen);
    }
}

static void moe_gather(const OvOp *op, const OvStep *step, OvWorker *w) {
    const MoeRoom room = moe_room_of(op, step, w);
    const int64_t bytes = room.hidden * room.element_bytes, grain = ov_grain(w, room.num_pairs, 16);
    for (int64_t first; (first = ov_take(w, room.num_pairs, grain)) >= 0;)
        for (int64_t place = first; place < ov_min(first + grain, room.num_pairs); place++) {
            const uint8_t *row = (const uint8_t *)op->a + room.tokens[place] * op->stride_a * room.element_bytes;
            memcpy(room.rows + place * bytes, row, (size_t)bytes);
        }
}

/* ---------------------------------------------------------------------------------------------------------- products */

/* Phase 0 (arrange) or 1 (multiply) of every slice's product. The phase ends for a thread when it has found all items
   of all slices taken. */
static void moe_products(const OvOp *op, const OvStep *step, OvWorker *w, MoeSide side, int phase) {
    const MoeRoom room = moe_room_of(op, step, w);
    for (int64_t i = 0; i < *room.num_slices; i++) {
        MoeSlice *slice = &room.slices[i];
        if (slice->skipped[side] >> phase & 1) continue;
        OvOp product = moe_linear(op->weight, slice->expert, side);
        uint8_t *rows = room.rows + slice->first * room.hidden * room.element_bytes;
        uint8_t *inside = room.inside + slice->first * 2 * room.inner * room.element_bytes;
        product.a = side == MOE_IN ? rows : inside;
        product.out = side == MOE_IN ? inside : rows;
        product.stride_a = side == MOE_IN ? room.hidden : 2 * room.inner;
        product.stride_out = side == MOE_IN ? 2 * room.inner : room.hidden;
        const OvStep rows_of_slice = {.num_tokens = slice->count};
        OvWorker worker = *w;
        worker.next = &slice->next[side][phase];
        worker.shared = room.arranged + slice->arranged_at[side];
        if (phase == 0) linear_arrange(&product, &rows_of_slice, &worker);
        else linear_multiply(&product, &rows_of_slice, &worker);
    }
}

static void moe_arrange_gate_up(const OvOp *op, const OvStep *step, OvWorker *w) {
    moe_products(op, step, w, MOE_IN, 0);
}
static void moe_multiply_gate_up(const OvOp *op, const OvStep *step, OvWorker *w) {
    moe_products(op, step, w, MOE_IN, 1);
}
static void moe_arrange_down(const OvOp *op, const OvStep *step, OvWorker *w) {
    moe_products(op, step, w, MOE_OUT, 0);
}
static void moe_multiply_down(const OvOp *op, const OvStep *step, OvWorker *w) {
    moe_products(op, step, w, MOE_OUT, 1);
}

static void moe_gate(const OvOp *op, const OvStep *step, OvWorker *w) {
    const MoeRoom room = moe_room_of(op, step, w);
    const OvStep pairs = {.num_tokens = room.num_pairs};
    OvOp gated = {.kind = OV_GATED, .rows = OV_TOKENS, .a = room.inside, .out = room.inside};
    gated.stride_a = gated.stride_out = 2 * room.inner;
    gated.n[0] = room.inner;
    gated.n[1] = op->n[1];
    ov_gated(&gated, &pairs, w);
}

/* ------------------------------------------------------------------------------------------------------------ the sum */

OV_INLINE void moe_sum_span(const OvOp *op, const MoeRoom *room, int64_t token, int64_t first, int64_t last, int bf16) {
    const float *weights = room->weights + token * room->chosen;
    const int32_t *places = room->places + token * room->chosen;
    for (int64_t i = first; i < last; i += 16) {
        const int n = (int)ov_min(16, last - i);
        V16 sum = v16_zero();
        for (int64_t k = 0; k < room->chosen; k++)
            sum = v16_fma(v16_set(weights[k]), v16_get(room->rows, places[k] * room->hidden + i, n, bf16), sum);
        v16_put(op->out, token * op->stride_out + i, sum, n, bf16);
    }
}

static void moe_sum(const OvOp *op, const OvStep *step, OvWorker *w) {
    const MoeRoom room = moe_room_of(op, step, w);
    const int64_t spans = ov_ceil_div(room.hidden, OV_SPAN);
    for (int64_t item; (item = ov_take(w, room.num_tokens * spans, 1)) >= 0;) {
        const int64_t first = item % spans * OV_SPAN, last = ov_min(first + OV_SPAN, room.hidden);
        if (w->type == OV_BF16) moe_sum_span(op, &room, item / spans, first, last, 1);
        else moe_sum_span(op, &room, item / spans, first, last, 0);
    }
}
