/* Paged causal attention: scores, softmax and values of one chunk of 256 positions at a time.
 *
 * A row of the computation is one query and one head of those that share a K/V head; up to 16 rows make a tile and
 * share every load of K and V. What is computed for a row does not depend on the rows beside it:
 *
 *   - chunks begin at multiples of 256 positions, steps of the products at multiples of 32 within them;
 *   - a key that a row does not see has a weight of exactly 0, and adding 0 times a finite number changes nothing, so
 *     it makes no difference whether the tile has to look at that key for another row's sake;
 *   - chunks are merged in order, by the same code, whether one thread did all of them or several did one each;
 *   - V is not always finite. Where rows of a tile see different keys and one of those has a V that is not, the rows
 *     are computed one by one. Slots that no row of the tile sees are masked, so what lies there never matters.
 */
#ifndef OCTAVO_ATTENTION_IMPL_H
#define OCTAVO_ATTENTION_IMPL_H

#include "attention_amx_impl.h"
#include "attention_dot_impl.h"
#include "attention_items_impl.h"
#include "elementwise_impl.h"
#include "fetch_impl.h"

#define OV_CHUNK_KEYS (OV_CHUNK / OV_KEYS)
#define OV_ITEM_ROWS (4 * OV_TILE)
#define OV_ITEM_FLOATS (OV_TILE * OV_MAX_HEAD_DIM) /* rows of an item times head_dim, at most */

/* What a thread needs for an item. */
typedef struct {
    float q[OV_ITEM_FLOATS + OV_TILE * 32];    /* bf16 pairs or fp32; heads padded to steps of 32 dimensions */
    float scores[OV_TILE * OV_CHUNK];          /* then weights, in place */
    float part[OV_TILE * OV_MAX_HEAD_DIM];     /* values of one chunk */
    float values[OV_ITEM_FLOATS];              /* values of all chunks so far */
    uint16_t copy[16 * 64 * 2];                /* V that must be masked or joined */
    uint16_t last[4 * 16 * 32];                /* the last half step of K, see ov_amx_scores */
    float max[OV_ITEM_ROWS], sum[OV_ITEM_ROWS];
    float part_max[OV_TILE], part_sum[OV_TILE];
} OvAttentionScratch;

_Static_assert(OV_CHUNK_KEYS <= OV_MOST_STRETCHES, "more blocks of a chunk than stretches");
_Static_assert(sizeof(OvAttentionScratch) <= OV_ATTENTION_SCRATCH, "more scratch than ov_attention_workspace says");

/* An item under way. */
typedef struct OvItem {
    const OvOp *op;
    const OvAttention *spec;
    OvAttentionScratch *scratch;
    const OvSequence *sequence;
    const int64_t *table;                      /* the sequence's blocks */
    int64_t first_token, head, width;
    int64_t first_row, num_rows;               /* of the sequence */
    int64_t first_chunk, num_chunks;
    int64_t q_stride;                          /* elements */
    OvRange seen[OV_ITEM_ROWS];                /* keys that each row sees */
    int64_t chunk;
    /* K and V of every sixteen keys of the chunk; NULL where nobody looks. */
    const void *keys[OV_CHUNK_KEYS], *values[OV_CHUNK_KEYS];
    OvFetch *values_to_come, *keys_to_come;    /* to ask for while K, and while V, are computed with */
    const struct OvItem *next;                 /* of this thread, or NULL */
} OvItem;

OV_INLINE OvRowState ov_row_state(const OvItem *item, int64_t row) {
    OvAttentionScratch *s = item->scratch;
    return (OvRowState){s->values + row * item->width, &s->max[row], &s->sum[row]};
}

/* The token and first element of row `row` of the item, in q and in the output. */
OV_INLINE int64_t ov_row_offset(const OvItem *item, int64_t row, int64_t stride) {
    int64_t i = item->first_row + row, group = item->sequence->group;
    return (item->first_token + i / group) * stride + (item->head * group + i % group) * item->width;
}

/* Rows of q where the products find them, the last of their 16 rows of tiles whatever was there. */
OV_INLINE void ov_fetch_queries(OvItem *item, OvForm form) {
    int64_t width = item->width;
    item->q_stride = form == OV_PAIRS ? (width + 31) / 32 * 32 : width;
    for (int64_t r = 0; r < item->num_rows; r++) {
        int64_t from = ov_row_offset(item, r, item->op->stride_a), to = r * item->q_stride;
        if (form != OV_PAIRS) {
            for (int64_t d = 0; d < width; d += 16)
                v16_store(item->scratch->q + to + d, v16_get(item->op->a, from + d, 16, form == OV_WIDE));
            continue;
        }
        uint16_t *q = (uint16_t *)item->scratch->q + to;
        memcpy(q, (const uint16_t *)item->op->a + from, (size_t)width * 2);
        memset(q + width, 0, (size_t)(item->q_stride - width) * 2);
    }
}

/* K of sixteen keys. */
OV_INLINE const char *ov_keys_at(const OvItem *item, int64_t position, int bf16) {
    const OvAttention *spec = item->spec;
    int64_t index = position / spec->block_size, offset = position - index * spec->block_size;
    int64_t element = ov_kv_offset(spec, item->table[index], 0, item->head) + offset * item->width;
    return ov_at(item->op->out2, element, bf16);
}

/* Where K and V of keys [begin, end) of the item's chunk lie. */
OV_INLINE void ov_find_keys(OvItem *item, int64_t begin, int64_t end, int bf16) {
    /* V of a block and head comes so long after K of it: */
    int64_t to_values = ov_kv_offset(item->spec, 0, 1, 0) * (bf16 ? 2 : 4), base = item->chunk * OV_CHUNK;
    memset(item->keys, 0, sizeof item->keys);
    memset(item->values, 0, sizeof item->values);
    for (int64_t g = begin / OV_KEYS; g < ov_ceil_div(end, OV_KEYS); g++) {
        const char *keys = ov_keys_at(item, base + g * OV_KEYS, bf16);
        item->keys[g] = keys;
        item->values[g] = keys + to_values;
    }
}

/* K (which = 0) or V (1) of the blocks of a chunk that the item's rows look at, to be asked for: V while K of the chunk
 * is computed with, K of the next one while V is. */
OV_INLINE OvFetch ov_chunk_to_come(const OvItem *item, int64_t chunk, int which, int bf16) {
    const int64_t base = chunk * OV_CHUNK, last = item->first_row + item->num_rows - 1, size = item->spec->block_size;
    const int64_t begin = ov_seen_keys(item->sequence, item->first_row).begin;
    const int64_t end = ov_min(ov_seen_keys(item->sequence, last).end, base + OV_CHUNK);
    OvFetch fetch = {.bytes = size * item->width * (bf16 ? 2 : 4)};
    for (int64_t block = (begin > base ? begin : base) / size; block * size < end; block++)
        fetch.stretches[fetch.count++] =
            ov_at(item->op->out2, ov_kv_offset(item->spec, item->table[block], which, item->head), bf16);
    fetch.together = ov_min(fetch.count, ov_memory_streams() == 1 ? 1 : OV_MOST_STRETCHES);
    return fetch;
}

/* K of what comes after the item's chunk: its next one, or the next item's first. */
OV_INLINE OvFetch ov_keys_to_come(const OvItem *item, int bf16) {
    if (item->chunk + 1 < item->first_chunk + item->num_chunks)
        return ov_chunk_to_come(item, item->chunk + 1, 0, bf16);
    return item->next == NULL ? (OvFetch){0} : ov_chunk_to_come(item->next, item->next->first_chunk, 0, bf16);
}

/* Keys of the item's chunk that row `row` of the item sees. */
OV_INLINE OvRange ov_chunk_keys(const OvItem *item, int64_t row) {
    int64_t base = item->chunk * OV_CHUNK;
    OvRange keys = {item->seen[row].begin - base, ov_min(item->seen[row].end - base, OV_CHUNK)};
    if (keys.begin < 0) keys.begin = 0;
    return keys;
}

/* Whether V of keys [begin, end) of the chunk holds an infinity or a NaN; of bf16, the other of each pair is looked at
 * too. */
OV_INLINE int ov_any_infinite(const OvItem *item, int64_t begin, int64_t end, int bf16) {
    int64_t width = item->width;
    V16 all = v16_zero(); /* times 0: NaN for what is not finite */
    for (int64_t key = bf16 ? begin & ~1 : begin; key < end; key += bf16 ? 2 : 1) {
        const void *values = item->values[key / OV_KEYS];
        int64_t at = key % OV_KEYS * width, count = bf16 ? 2 * width : width;
        for (int64_t i = 0; i < count; i += 16) all = v16_fma(v16_get(values, at + i, 16, bf16), v16_zero(), all);
    }
    float sum = v16_sum(all);
    return sum != sum;
}

OV_INLINE void ov_chunk_scores(const OvItem *item, int64_t row, int rows, OvRange keys, OvForm form) {
    OvAttentionScratch *s = item->scratch;
    const char *q = (const char *)s->q + row * item->q_stride * (form == OV_PAIRS ? 2 : 4);
    int64_t first = keys.begin / OV_KEYS, last = ov_ceil_div(keys.end, OV_KEYS);
#ifdef OV_AMX
    if (form == OV_PAIRS) {
        for (int64_t g = first / 4 * 4; g < last; g += 4)
            ov_amx_scores((const uint16_t *)q, item->q_stride, item->keys + g, item->values_to_come, item->width,
                          s->scores + g * OV_KEYS, s->last);
        return;
    }
#endif
    const OvDot dot = {q, item->q_stride * (form == OV_PAIRS ? 2 : 4), item->values_to_come};
    const OvScores scores = {dot, item->keys, first, last, item->width, s->scores};
    ov_score_keys(&scores, rows, form);
}

OV_INLINE void ov_chunk_values(const OvItem *item, int rows, OvRange keys, OvForm form) {
    OvAttentionScratch *s = item->scratch;
#ifdef OV_AMX
    if (form == OV_PAIRS) {
        OvAmxValues v = {(const uint16_t *)s->scores, item->values, item->keys_to_come, keys.begin, keys.end,
                         item->width, s->copy};
        ov_amx_values(&v, s->part);
        return;
    }
#endif
    const OvDot dot = {(const char *)s->scores, 4 * OV_CHUNK, item->keys_to_come};
    const OvValues values = {dot, item->values, keys.begin, keys.end, item->width, s->part};
    ov_sum_values(&values, rows, form);
}

/* Scores of `rows` rows from row `row` of the item become weights. A row that sees no key of the chunk has the sum 0. */
OV_INLINE void ov_chunk_softmax(const OvItem *item, int64_t row, int rows, OvRange keys, OvForm form) {
    OvAttentionScratch *s = item->scratch;
    int64_t first = keys.begin / OV_STEP, last = ov_ceil_div(keys.end, OV_STEP);
    float factor = ov_log2_factor(item->spec);
    /* All maxima first: one row's waits for nobody else's. */
    for (int r = 0; r < rows; r++) {
        OvRange seen = ov_chunk_keys(item, row + r);
        if (seen.begin < seen.end)
            s->part_max[r] = ov_largest_score(s->scores + r * OV_CHUNK, seen.begin, seen.end, item->spec);
    }
    for (int r = 0; r < rows; r++) {
        OvRange seen = ov_chunk_keys(item, row + r);
        float *scores = s->scores + r * OV_CHUNK;
        s->part_sum[r] = 0.0f;
        if (seen.begin < seen.end)
            s->part_sum[r] =
                ov_weigh_row(scores, seen.begin, seen.end, first, last, factor, s->part_max[r], form);
        else
            ov_no_weights(scores, first, last, form);
    }
}

/* Rows [row, row + rows) of the item, at most a tile, over its chunk: taken into their states. */
OV_INLINE void ov_attend_rows_in(const OvItem *item, int64_t row, int rows, OvForm form) {
    OvAttentionScratch *s = item->scratch;
    OvRange keys = {ov_chunk_keys(item, row).begin, ov_chunk_keys(item, row + rows - 1).end};
    if (keys.begin >= keys.end) return;
    ov_chunk_scores(item, row, rows, keys, form);
    ov_chunk_softmax(item, row, rows, keys, form);
    ov_chunk_values(item, rows, keys, form);
    for (int r = 0; r < rows; r++)
        ov_merge_row(ov_row_state(item, row + r), s->part + r * item->width, s->part_max[r], s->part_sum[r],
                     item->width);
}

static __attribute__((noinline)) void ov_attend_rows_f32(const OvItem *item, int64_t row, int rows) {
    ov_attend_rows_in(item, row, rows, OV_FLOATS);
}
static __attribute__((noinline)) void ov_attend_rows_bf16(const OvItem *item, int64_t row, int rows) {
    ov_attend_rows_in(item, row, rows, OV_BF16_FORM);
}
OV_INLINE void ov_attend_rows(const OvItem *item, int64_t row, int rows, OvForm form) {
    if (form == OV_FLOATS) ov_attend_rows_f32(item, row, rows);
    else ov_attend_rows_bf16(item, row, rows);
}

/* A tile over the item's chunk. Rows see keys that begin and end later from row to row. */
OV_INLINE void ov_attend_tile(const OvItem *item, int64_t row, int rows, OvForm form) {
    OvRange first = ov_chunk_keys(item, row), last = ov_chunk_keys(item, row + rows - 1);
    if (first.begin >= last.end) return;
    int bf16 = form != OV_FLOATS;
    int64_t ahead = first.end > first.begin ? first.end : first.begin; /* keys before it: seen by the first */
    int alone = first.begin < last.begin && ov_any_infinite(item, first.begin, ov_min(last.begin, last.end), bf16);
    if (!alone && ahead < last.end) alone = ov_any_infinite(item, ahead, last.end, bf16);
    if (!alone || rows == 1) {
        ov_attend_rows(item, row, rows, form);
        return;
    }
    for (int r = 0; r < rows; r++) ov_attend_rows(item, row + r, 1, form);
}

/* All of an item's chunks, into its rows' states. */
OV_INLINE void ov_attend_chunks(OvItem *item, OvForm form) {
    ov_fetch_queries(item, form);
    for (int64_t r = 0; r < item->num_rows; r++) {
        item->scratch->sum[r] = 0.0f;
        item->seen[r] = ov_seen_keys(item->sequence, item->first_row + r);
    }
    for (int64_t c = 0; c < item->num_chunks; c++) {
        item->chunk = item->first_chunk + c;
        int64_t begin = ov_chunk_keys(item, 0).begin, end = ov_chunk_keys(item, item->num_rows - 1).end;
        if (begin >= end) continue;
        ov_find_keys(item, begin, end, form != OV_FLOATS);
        OvFetch values = ov_chunk_to_come(item, item->chunk, 1, form != OV_FLOATS);
        OvFetch keys = ov_keys_to_come(item, form != OV_FLOATS);
        item->values_to_come = &values;
        item->keys_to_come = &keys;
        for (int64_t row = 0; row < item->num_rows; row += OV_TILE)
            ov_attend_tile(item, row, (int)ov_min(OV_TILE, item->num_rows - row), form);
    }
}

OV_INLINE void ov_finish_item(const OvItem *item, int bf16) {
    for (int64_t r = 0; r < item->num_rows; r++) {
        int64_t at = ov_row_offset(item, r, item->op->stride_out);
        ov_finish_row(ov_row_state(item, r), ov_at(item->op->out, at, bf16), item->width, bf16);
    }
}

/* Where the partial result of the item's row over chunk number `chunk` lies. */
OV_INLINE float *ov_partial(const OvItem *item, const OvWalk *walk, void *shared, int64_t chunk, int64_t row) {
    int64_t index = (item->head * walk->sequence.num_chunks + chunk) * item->num_rows + row;
    return (float *)((char *)shared + walk->partial) + index * ov_partial_floats(item->spec);
}

/* All rows of the walk's sequence, for one K/V head. */
OV_INLINE void ov_begin_item(OvItem *item, const OvOp *op, const OvStep *step, const OvWalk *walk, void *scratch,
                             int64_t head) {
    item->op = op;
    item->spec = op->spec;
    item->scratch = (OvAttentionScratch *)scratch;
    item->sequence = &walk->sequence;
    item->table = ov_block_table(&step->groups[op->n[1]], walk->row);
    item->first_token = step->query_starts[walk->row];
    item->head = head;
    item->width = op->spec->head_dim;
    item->first_row = 0;
    item->num_rows = walk->sequence.num_rows;
    item->next = NULL;
}

/* Item `index` of the walk's sequence: tiles over all chunks, the last tiles (which see most) first; or one chunk. */
OV_INLINE void ov_place_item(OvItem *item, const OvWalk *walk, int64_t index) {
    const OvSequence *s = &walk->sequence;
    if (walk->split) {
        item->first_chunk = s->first_chunk + index % s->num_chunks;
        item->num_chunks = 1;
        return;
    }
    const int64_t rows = walk->item_tiles * OV_TILE, parts = walk->count / item->spec->num_kv_heads;
    item->first_row = (parts - 1 - index % parts) * rows;
    item->num_rows = ov_min(rows, s->num_rows - item->first_row);
    item->first_chunk = ov_seen_keys(s, item->first_row).begin / OV_CHUNK;
    item->num_chunks = s->first_chunk + s->num_chunks - item->first_chunk;
}

OV_INLINE void ov_attend_item(OvItem *item, const OvWalk *walk, OvWorker *w, OvForm form) {
    const OvSequence *s = &walk->sequence;
    ov_attend_chunks(item, form);
    if (!walk->split) {
        ov_finish_item(item, form != OV_FLOATS);
        return;
    }
    for (int64_t r = 0; r < item->num_rows; r++) {
        float *partial = ov_partial(item, walk, w->shared, item->first_chunk - s->first_chunk, r);
        OvRowState state = ov_row_state(item, r);
        if (*state.sum != 0.0f) memcpy(partial, state.values, (size_t)item->width * 4);
        partial[item->width] = *state.max;
        partial[item->width + 1] = *state.sum;
    }
}

/* Item `number` of the step, with a walk that has not come past it. */
OV_INLINE void ov_find_item(OvItem *item, const OvOp *op, const OvStep *step, OvWalk *walk, OvWorker *w,
                            int64_t number) {
    ov_walk_to(walk, number);
    const int64_t index = number - walk->first;
    ov_begin_item(item, op, step, walk, w->scratch, index / (walk->count / op->spec->num_kv_heads));
    ov_place_item(item, walk, index);
}

/* Items are taken and found one ahead, so that the next one's keys can be asked for. */
OV_INLINE void ov_attend_items(const OvOp *op, const OvStep *step, OvWorker *w, OvForm form) {
    OvWalk walks[2];
    OvItem items[2];
    walks[0] = walks[1] = ov_walk(op->spec, step, w->count, 0);
    int64_t total = ov_walk_total(walks[0]), number = ov_take(w, total, 1);
    if (number < 0) return;
    memset(((OvAttentionScratch *)w->scratch)->last, 0, sizeof ((OvAttentionScratch *)w->scratch)->last);
    ov_find_item(&items[0], op, step, &walks[0], w, number);
    for (int this = 0; number >= 0; this = 1 - this) {
        number = ov_take(w, total, 1);
        if (number >= 0) {
            ov_find_item(&items[1 - this], op, step, &walks[1 - this], w, number);
            items[this].next = &items[1 - this];
        }
        ov_attend_item(&items[this], &walks[this], w, form);
    }
}

static void ov_attention(const OvOp *op, const OvStep *step, OvWorker *w) {
    if (w->type == OV_BF16) ov_attend_items(op, step, w, OV_BF16_FORM);
    else ov_attend_items(op, step, w, OV_FLOATS);
}

/* The second phase: split sequences' chunks in order. */
static void ov_attention_merge(const OvOp *op, const OvStep *step, OvWorker *w) {
    OvWalk walk = ov_walk(op->spec, step, w->count, 1);
    int64_t total = ov_walk_total(walk), number, width = op->spec->head_dim;
    while ((number = ov_take(w, total, 1)) >= 0) {
        ov_walk_to(&walk, number);
        OvItem item;
        ov_begin_item(&item, op, step, &walk, w->scratch, number - walk.first);
        for (int64_t r = 0; r < item.num_rows; r++) {
            OvRowState state = ov_row_state(&item, r);
            *state.sum = 0.0f;
            for (int64_t c = 0; c < walk.sequence.num_chunks; c++) {
                const float *partial = ov_partial(&item, &walk, w->shared, c, r);
                ov_merge_row(state, partial, partial[width], partial[width + 1], width);
            }
        }
        ov_finish_item(&item, w->type == OV_BF16);
    }
}

static void ov_attention_plan(const OvOp *op, const OvStep *step, OvType type, int num_threads, OvPlan *plan) {
    (void)type;
    OvWalk walk = ov_walk(op->spec, step, num_threads, 1);
    ov_walk_to(&walk, INT64_MAX);
    plan->scratch_bytes = sizeof(OvAttentionScratch);
    plan->shared_bytes = (size_t)walk.partial_end;
    plan->skipped = walk.partial_end == 0 ? 2 : 0;
}

#endif
