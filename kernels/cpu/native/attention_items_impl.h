/* How a step's attention is cut into items for the team. Only who computes what is decided here, never how: whatever
 * these functions choose, each row's result is the same to the last bit.
 *
 * An item is some tiles of rows of one sequence and K/V head, over all their chunks; or, where one sequence has more
 * chunks than a fair share of the work and few rows, its rows over a single chunk. The partial results of the latter
 * are merged in a second phase.
 */
#ifndef OCTAVO_ATTENTION_ITEMS_IMPL_H
#define OCTAVO_ATTENTION_ITEMS_IMPL_H

#include "attention.h"
#include "vec.h"

/* One sequence of a step, as attention sees it. A row is a query and one of the heads that share a K/V head, in this
 * order: row i is query i / group. */
typedef struct {
    int64_t num_queries, kv_len, group, num_rows, num_tiles;
    int64_t first_chunk, num_chunks; /* that any of its rows sees */
    int64_t window;
} OvSequence;

typedef struct {
    int64_t begin, end;
} OvRange;

/* Keys that row i sees. */
static inline OvRange ov_seen_keys(const OvSequence *s, int64_t i) {
    int64_t end = s->kv_len - s->num_queries + i / s->group + 1;
    int64_t begin = s->window > 0 && s->window < end ? end - s->window : 0;
    return (OvRange){begin, end};
}

static inline OvSequence ov_sequence(const OvAttention *spec, const OvStep *step, int64_t row) {
    OvSequence s = {0};
    s.num_queries = step->query_starts[row + 1] - step->query_starts[row];
    s.kv_len = step->kv_lens[row];
    s.group = spec->num_heads / spec->num_kv_heads;
    s.window = spec->window;
    s.num_rows = s.num_queries * s.group;
    s.num_tiles = (s.num_rows + OV_TILE - 1) / OV_TILE;
    if (s.num_queries <= 0 || s.kv_len <= 0) return s;
    s.first_chunk = ov_seen_keys(&s, 0).begin / OV_CHUNK;
    s.num_chunks = (s.kv_len + OV_CHUNK - 1) / OV_CHUNK - s.first_chunk;
    return s;
}

/* A walk over the items of a step, forward only. */
typedef struct {
    const OvAttention *spec;
    const OvStep *step;
    int64_t share;          /* tiles times chunks that one item may have */
    int64_t most_tiles;     /* rows of an item must fit the scratch */
    int merging;            /* items are those of the second phase */
    int num_threads;
    int64_t row;            /* the sequence that the walk is at */
    OvSequence sequence;
    int split;
    int64_t item_tiles;     /* tiles of an item */
    int64_t first, count;   /* its items */
    int64_t partial;        /* where its partial results begin, in bytes */
    int64_t partial_end;
} OvWalk;

/* A decode row with many heads to its group may take several tiles. */
static inline int64_t ov_most_split_rows(const OvSequence *s) { return s->group > OV_TILE ? s->group : OV_TILE; }

static inline void ov_walk_enter(OvWalk *walk, int64_t row) {
    OvSequence s = ov_sequence(walk->spec, walk->step, row);
    int64_t heads = walk->spec->num_kv_heads, chunks = s.num_chunks > 0 ? s.num_chunks : 1;
    int64_t bytes = heads * s.num_chunks * ov_partial_bytes(walk->spec, s.num_rows);
    walk->row = row;
    walk->partial = walk->partial_end;
    walk->split = walk->num_threads > 1 && s.num_chunks > 1 && s.num_rows <= ov_most_split_rows(&s) &&
                  s.num_tiles <= walk->most_tiles && s.num_tiles * s.num_chunks > walk->share &&
                  walk->partial_end + bytes <= OV_MAX_SPLIT_BYTES;
    if (walk->split) walk->partial_end += bytes;
    walk->item_tiles = ov_min(walk->share / chunks, walk->most_tiles);
    if (walk->item_tiles < 1) walk->item_tiles = 1;
    if (walk->merging) walk->count = walk->split ? heads : 0;
    else if (walk->split) walk->count = heads * s.num_chunks;
    else walk->count = heads * ov_ceil_div(s.num_tiles, walk->item_tiles);
    walk->sequence = s;
}

static inline OvWalk ov_walk(const OvAttention *spec, const OvStep *step, int num_threads, int merging) {
    OvWalk walk = {.spec = spec, .step = step, .num_threads = num_threads, .merging = merging};
    int64_t total = 0;
    for (int64_t row = 0; row < step->num_rows; row++) {
        OvSequence s = ov_sequence(spec, step, row);
        total += s.num_tiles * s.num_chunks;
    }
    walk.share = total * spec->num_kv_heads / (OV_SPLIT_SHARES * num_threads);
    walk.most_tiles = ov_min(4, OV_MAX_HEAD_DIM / spec->head_dim);
    if (step->num_rows > 0) ov_walk_enter(&walk, 0);
    return walk;
}

/* Moves on to the sequence of `item`; 0 if there is no such item. */
static inline int ov_walk_to(OvWalk *walk, int64_t item) {
    while (item >= walk->first + walk->count) {
        if (walk->row + 1 >= walk->step->num_rows) return 0;
        walk->first += walk->count;
        ov_walk_enter(walk, walk->row + 1);
    }
    return 1;
}

/* All items; the walk is at its end afterwards. */
static inline int64_t ov_walk_total(OvWalk walk) {
    if (walk.step->num_rows <= 0) return 0;
    ov_walk_to(&walk, INT64_MAX);
    return walk.first + walk.count;
}

#endif
