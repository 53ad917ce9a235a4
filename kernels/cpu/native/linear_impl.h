/* OV_LINEAR: out[r] = weight . a[r] + bias, in two phases.
 *
 *     arrange     the step's rows into the order that the products read (few rows: each thread does it for itself)
 *     multiply    items of some panels of outputs, and a block of rows that stays in the second-level cache
 *
 * How one output of one row is summed depends on nothing but the encoding, the instruction set and the working type: its
 * inputs in order, 32 at a time, into one accumulator (of a tile, of a lane, or of 16 lanes that are added at the end).
 * Neither the number of rows nor who computes which panel plays a part.
 *
 *     bf16, quantised    integers                                (linear_integer_impl.h)
 *     bf16, dense        tiles of bf16, or pairs of it in lanes  (linear_amx_impl.h, linear_lanes_impl.h)
 *     everything else    lanes of fp32                           (linear_lanes_impl.h)
 */
#include "dequant_impl.h"
#include "fetch_impl.h"

#if defined(OV_AVX512)
#define OV_ELEMENT_BYTES(type) ((type) == OV_BF16 ? 2 : 4)
#else
#define OV_ELEMENT_BYTES(type) 4 /* bf16 is widened before it is multiplied */
#endif
#ifdef OV_AMX
#define OV_USES_TILES(type) ((type) == OV_BF16)
#else
#define OV_USES_TILES(type) false
#endif

enum {
    OV_TILE_ROWS = 16,
    OV_MOST_ITEM_PANELS = 8,
    OV_THREAD_ITEMS = 6,      /* at least, where there are enough panels */
    OV_OWN_ROWS = 8,          /* up to so many rows every thread arranges its own copy: cheaper than a phase */
    OV_BLOCK_BYTES = 1 << 20, /* of arranged rows that are multiplied with a panel before the next panel's turn */
};

/* One operator in one step, as a thread sees it. */
typedef struct {
    const OvOp *op;
    const OvMatrix *matrix;
    OvType type;
    int64_t num_rows;
    const uint8_t *rows; /* arranged, or the operator's own */
    int64_t row_bytes;   /* from row to row; with tiles: of a row's share of a tile of rows */
    const uint8_t *records; /* the rows in integers */
    int64_t item_panels; /* panels of an item, but for the last of a segment */
    uint8_t *tiles;      /* room for a panel as the products read it */
} Product;

/* An item's panels while those before it are multiplied. */
typedef struct {
    OvFetch lines;
    int64_t step_bytes; /* to ask for in every step */
} Fetch;

static Fetch fetch_of(const uint8_t *at, int64_t num_bytes, int64_t num_steps) {
    const int64_t streams = ov_memory_streams(), bytes = ov_ceil_div(num_bytes, 64 * streams) * 64;
    Fetch fetch = {{.count = streams, .together = streams, .bytes = bytes}, ov_ceil_div(streams * bytes, num_steps)};
    for (int64_t i = 0; i < streams; i++) fetch.lines.stretches[i] = (const char *)at + i * bytes;
    return fetch;
}

OV_INLINE void fetch_step(Fetch *fetch) { ov_fetch(&fetch->lines, fetch->step_bytes); }

/* Neighbouring panels. */
typedef struct {
    const OvSegment *segment;
    int64_t panel;
    int count;
} Panels;

OV_INLINE void finish_row(const Product *, const OvSegment *, int64_t panel, int64_t row, V16 sums);

/* Asks for the line that finish_row will write. Writes become visible in their order, so one that has to wait for its
 * line holds up those behind it: a step of 32 rows took 1.08 times as long without (Zen 5). */
OV_INLINE void fetch_output(const Product *product, const OvSegment *segment, int64_t panel, int64_t row) {
    const OvOp *op = product->op;
    const int64_t at = row * op->stride_out + segment->first_output + panel * OV_PANEL;
    _m_prefetchw((char *)op->out + at * (product->type == OV_F32 || op->n[0] == 1 ? 4 : 2));
}

#include "linear_integer_impl.h"

/* Which forms of the rows a matrix is multiplied with. */
typedef struct {
    bool numbers, integers;
} RowForms;

static RowForms forms_of(const OvMatrix *matrix, OvType type) {
    RowForms forms = {false, false};
    for (int64_t i = 0; i < matrix->num_segments; i++) {
        if (in_integers(&matrix->segments[i], type)) forms.integers = true;
        else forms.numbers = true;
    }
    return forms;
}

/* Whether rows are read where they are. */
static bool rows_are_ready(const OvOp *op, OvType type, int64_t num_rows) {
    const OvMatrix *matrix = op->weight;
    if (OV_ELEMENT_BYTES(type) != 2 || matrix->num_inputs % OV_STEP != 0) return false;
    return !forms_of(matrix, type).integers && (!OV_USES_TILES(type) || num_rows == 1);
}

/* Of the rows as numbers; those in integers lie behind them. */
static int64_t numbers_bytes(const OvMatrix *matrix, OvType type, int64_t num_rows) {
    if (!forms_of(matrix, type).numbers) return 0;
    if (OV_USES_TILES(type) && num_rows > OV_TILE_ROWS)
        num_rows = ov_ceil_div(num_rows, OV_TILE_ROWS) * OV_TILE_ROWS;
    return ov_ceil_div(num_rows * matrix->num_steps * OV_STEP * OV_ELEMENT_BYTES(type), 64) * 64;
}

static int64_t arranged_bytes(const OvMatrix *matrix, OvType type, int64_t num_rows) {
    const int64_t integers = forms_of(matrix, type).integers ? records_bytes(matrix, num_rows) : 0;
    return numbers_bytes(matrix, type, num_rows) + integers;
}

/* For a panel as numbers, or (with AMX) as bytes; a multiple of 64. */
static int64_t panel_room(const OvMatrix *matrix, OvType type) {
#ifdef OV_AMX
    if (type == OV_BF16) return matrix->num_steps * 2 * OV_UNPACKED_BYTES;
#endif
    return OV_ELEMENT_BYTES(type) == 2 ? 0 : matrix->num_steps * OV_PANEL * OV_STEP * 4;
}

static void linear_plan(const OvOp *op, const OvStep *step, OvType type, int num_threads, OvPlan *plan) {
    (void)num_threads;
    const OvMatrix *matrix = op->weight;
    int64_t num_rows = ov_num_rows(op, step), bytes = arranged_bytes(matrix, type, num_rows);
    bool ready = rows_are_ready(op, type, num_rows), own = num_rows <= OV_OWN_ROWS;
    plan->scratch_bytes = (size_t)(panel_room(matrix, type) + (own ? bytes : 0) + 64);
    plan->shared_bytes = ready || own ? 0 : (size_t)bytes;
    plan->skipped = ready || own ? 1u : 0u;
    if (num_rows == 0) plan->skipped = 3u;
}

/* ---------------------------------------------------------------------------------------------------- arranged rows */

/* Rows [first, last) as fp32, of every 32 the even ones first; zeros up to a whole step. */
static void arrange_f32(const OvOp *op, const OvMatrix *matrix, OvType type, int64_t first, int64_t last, float *to) {
    const int64_t width = matrix->num_steps * OV_STEP, inputs = matrix->num_inputs;
    to += first * width;
    for (int64_t row = first; row < last; row++) {
        const uint16_t *halves = (const uint16_t *)op->a + row * op->stride_a;
        const float *floats = (const float *)op->a + row * op->stride_a;
        for (int64_t at = 0; at < width; at += OV_STEP, to += OV_STEP) {
            float step[OV_STEP] = {0};
            int64_t count = ov_min(OV_STEP, inputs - at);
            if (type == OV_F32) memcpy(step, floats + at, (size_t)count * 4);
            else
                for (int64_t i = 0; i < count; i++) step[i] = ov_float_of_bf16(halves[at + i]);
            for (int i = 0; i < OV_STEP / 2; i++) {
                to[i] = step[2 * i];
                to[OV_STEP / 2 + i] = step[2 * i + 1];
            }
        }
    }
}

#ifdef OV_AVX512
static void arrange_bf16(const OvOp *op, const OvMatrix *matrix, int64_t first, int64_t last, uint16_t *to) {
    const int64_t width = matrix->num_steps * OV_STEP, inputs = matrix->num_inputs;
    for (int64_t row = first; row < last; row++) {
        memcpy(to + row * width, (const uint16_t *)op->a + row * op->stride_a, (size_t)inputs * 2);
        memset(to + row * width + inputs, 0, (size_t)(width - inputs) * 2);
    }
}
#endif

#ifdef OV_AMX
#include "linear_amx_impl.h"
#endif
#include "linear_lanes_impl.h"

/* Rows [first, last) as numbers; with tiles, `first` starts one. */
static void arrange_numbers(const OvOp *op, OvType type, int64_t num_rows, int64_t first, int64_t last, void *to) {
    const OvMatrix *matrix = op->weight;
#ifdef OV_AMX
    if (OV_USES_TILES(type)) {
        arrange_tiles(op, matrix, num_rows, first, last, to);
        return;
    }
#endif
    (void)num_rows;
#ifdef OV_AVX512
    if (type == OV_BF16) {
        arrange_bf16(op, matrix, first, last, to);
        return;
    }
#endif
    arrange_f32(op, matrix, type, first, last, to);
}

/* Arranges rows [first, last), of which the first starts a tile, in all forms that the matrix takes. */
static void arrange_rows(const OvOp *op, OvType type, int64_t num_rows, int64_t first, int64_t last, uint8_t *to) {
    const OvMatrix *matrix = op->weight;
    const RowForms forms = forms_of(matrix, type);
    if (forms.numbers) arrange_numbers(op, type, num_rows, first, last, to);
    if (forms.integers)
        arrange_integers(op, matrix, num_rows, first, last, to + numbers_bytes(matrix, type, num_rows));
}

static void linear_arrange(const OvOp *op, const OvStep *step, OvWorker *w) {
    int64_t num_rows = ov_num_rows(op, step);
    for (int64_t i; (i = ov_take(w, num_rows, OV_TILE_ROWS)) >= 0;)
        arrange_rows(op, w->type, num_rows, i, ov_min(i + OV_TILE_ROWS, num_rows), w->shared);
}

/* ------------------------------------------------------------------------------------------------------------ items */

/* A power of two, so that there are some items for each thread. */
static int64_t item_panels_of(const OvMatrix *matrix, int num_threads) {
    int64_t panels = 0, count = OV_MOST_ITEM_PANELS;
    for (int64_t i = 0; i < matrix->num_segments; i++) panels += matrix->segments[i].num_panels;
    while (count > 1 && count * OV_THREAD_ITEMS * num_threads > panels) count /= 2;
    return count;
}

static int64_t items_of(const Product *product, const OvSegment *segment) {
    return ov_ceil_div(segment->num_panels, product->item_panels);
}

static int64_t num_items(const Product *product) {
    int64_t items = 0;
    for (int64_t i = 0; i < product->matrix->num_segments; i++) items += items_of(product, &product->matrix->segments[i]);
    return items;
}

static Panels panels_of(const Product *product, int64_t item) {
    const OvSegment *segment = product->matrix->segments;
    for (; item >= items_of(product, segment); segment++) item -= items_of(product, segment);
    const int64_t first = item * product->item_panels;
    return (Panels){segment, first, (int)ov_min(product->item_panels, segment->num_panels - first)};
}

static void multiply_panels(const Product *product, Panels panels, Panels next, int64_t first, int64_t last) {
    const OvSegment *segment = panels.segment;
    const bool integers = in_integers(segment, product->type);
    const int64_t at_once = integers ? OV_PANELS_AT_ONCE : 1, passes = integers ? fetching_passes(last - first) : 1;
    Fetch fetch = {0};
    if (next.count != 0)
        fetch = fetch_of(ov_panel(next.segment, next.panel), next.count * next.segment->panel_bytes,
                         ov_ceil_div(panels.count, at_once) * passes * product->matrix->num_steps);
    if (integers) {
#ifdef OV_AMX
        const bool tiles = last - first > OV_FEW_ROWS;
        if (tiles) tiles_for_integers();
#endif
        for (int count, i = 0; i < panels.count; i += count) {
            count = panels.count - i < OV_PANELS_AT_ONCE ? 1 : OV_PANELS_AT_ONCE;
            OV_INTEGER_PANELS[segment->encoding](product, (Panels){segment, panels.panel + i, count}, first, last, &fetch);
        }
#ifdef OV_AMX
        if (tiles) tiles_enter();
#endif
        return;
    }
#ifdef OV_AMX
    if (OV_USES_TILES(product->type)) {
        const bool narrow = product->num_rows < OV_TILE_ROWS;
        if (narrow) tiles_for_rows((int)product->num_rows);
        for (int i = 0; i < panels.count; i += 2)
            tile_panels(product, (Panels){segment, panels.panel + i, (int)ov_min(2, panels.count - i)}, first, last,
                        &fetch);
        if (narrow) tiles_enter();
        return;
    }
#endif
    for (int i = 0; i < panels.count; i++) lane_panel(product, segment, panels.panel + i, first, last);
}

static Product product_of(const OvOp *op, const OvStep *step, OvWorker *w) {
    const OvMatrix *matrix = op->weight;
    const int64_t num_rows = ov_num_rows(op, step);
    Product product = {.op = op, .matrix = matrix, .type = w->type, .num_rows = num_rows, .tiles = w->scratch};
    product.row_bytes = matrix->num_steps * OV_STEP * OV_ELEMENT_BYTES(w->type);
    if (rows_are_ready(op, w->type, num_rows)) {
        product.rows = op->a;
        product.row_bytes = op->stride_a * OV_ELEMENT_BYTES(w->type);
    } else if (num_rows <= OV_OWN_ROWS) {
        uint8_t *own = (uint8_t *)w->scratch + panel_room(matrix, w->type);
        arrange_rows(op, w->type, num_rows, 0, num_rows, own);
        product.rows = own;
    } else {
        product.rows = w->shared;
    }
    product.records = product.rows + numbers_bytes(matrix, w->type, num_rows);
    product.item_panels = item_panels_of(matrix, w->count);
    return product;
}

/* Where this thread is likely to begin with the next product. What lies between is short, so it is asked for before. */
static Panels panels_ahead(const OvWorker *w) {
    if (w->ahead == NULL) return (Panels){0};
    const OvMatrix *matrix = w->ahead->weight;
    const Product product = {.matrix = matrix, .item_panels = item_panels_of(matrix, w->count)};
    const int64_t items = num_items(&product), place = ov_min(w->index / 2, items - 1);
    return panels_of(&product, w->index % 2 != 0 ? items - 1 - place : place);
}

static void linear_multiply(const OvOp *op, const OvStep *step, OvWorker *w) {
    const Product product = product_of(op, step, w);
    const int64_t tile_bytes = OV_TILE_ROWS * product.matrix->num_steps * OV_STEP * OV_ELEMENT_BYTES(w->type);
    const int64_t block = ov_ceil_div(OV_BLOCK_BYTES, 2 * tile_bytes) * 2 * OV_TILE_ROWS;
    const int64_t items = num_items(&product);
    const int64_t total = items * ov_ceil_div(product.num_rows, block);
    /* The next item is taken before this one is done, so that its weights can be fetched meanwhile. */
    for (int64_t item = ov_take_inwards(w, total), next; item >= 0; item = next) {
        next = ov_take_inwards(w, total);
        int64_t first = item / items * block;
        Panels panels = panels_of(&product, item % items);
        Panels fetched = next < 0 ? panels_ahead(w) : panels_of(&product, next % items);
        multiply_panels(&product, panels, fetched, first, ov_min(first + block, product.num_rows));
    }
}
