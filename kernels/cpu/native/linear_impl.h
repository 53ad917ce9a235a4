/* OV_LINEAR: out[r] = weight . a[r] + bias, in two phases.
 *
 *     arrange     the step's rows into the order that the products read (few rows: each thread does it for itself)
 *     multiply    items of one or two panels of outputs, and a block of rows that stays in the second-level cache
 *
 * How one output of one row is summed depends on nothing but the instruction set and the working type: its inputs in
 * order, 32 at a time, into one accumulator (of a tile, or of 16 lanes that are added at the end). Neither the number
 * of rows nor who computes which panel plays a part. */
#include "dequant_impl.h"

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
    bool two_panels;     /* items are pairs of panels */
    uint8_t *tiles;      /* room for two panels as numbers */
} Product;

/* One or two neighbouring panels. */
typedef struct {
    const OvSegment *segment;
    int64_t panel;
    int count;
} Panels;

/* Rows that are read where they are. */
static bool rows_are_ready(const OvOp *op, const OvMatrix *matrix, OvType type, int64_t num_rows) {
    if (OV_ELEMENT_BYTES(type) != 2 || matrix->num_inputs % OV_STEP != 0) return false;
    return !OV_USES_TILES(type) || num_rows == 1;
}

static int64_t arranged_bytes(const OvMatrix *matrix, OvType type, int64_t num_rows) {
    if (OV_USES_TILES(type) && num_rows > OV_TILE_ROWS)
        num_rows = ov_ceil_div(num_rows, OV_TILE_ROWS) * OV_TILE_ROWS;
    return num_rows * matrix->num_steps * OV_STEP * OV_ELEMENT_BYTES(type);
}

static int64_t panel_room(const OvMatrix *matrix, OvType type) {
    return matrix->num_steps * OV_PANEL * OV_STEP * OV_ELEMENT_BYTES(type);
}

static void linear_plan(const OvOp *op, const OvStep *step, OvType type, int num_threads, OvPlan *plan) {
    (void)num_threads;
    const OvMatrix *matrix = op->weight;
    int64_t num_rows = ov_num_rows(op, step), bytes = arranged_bytes(matrix, type, num_rows);
    bool ready = rows_are_ready(op, matrix, type, num_rows), own = num_rows <= OV_OWN_ROWS;
    plan->scratch_bytes = (size_t)(2 * panel_room(matrix, type) + (own ? bytes : 0) + 64);
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

/* Arranges rows [first, last); with tiles, `first` starts one. */
static void arrange_rows(const OvOp *op, OvType type, int64_t num_rows, int64_t first, int64_t last, void *to) {
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

static void linear_arrange(const OvOp *op, const OvStep *step, OvWorker *w) {
    int64_t num_rows = ov_num_rows(op, step);
    for (int64_t i; (i = ov_take(w, num_rows, OV_TILE_ROWS)) >= 0;)
        arrange_rows(op, w->type, num_rows, i, ov_min(i + OV_TILE_ROWS, num_rows), w->shared);
}

/* ------------------------------------------------------------------------------------------------------------ items */

static int64_t items_of(const OvSegment *segment, bool two_panels) {
    return two_panels ? ov_ceil_div(segment->num_panels, 2) : segment->num_panels;
}

static int64_t num_items(const OvMatrix *matrix, bool two_panels) {
    int64_t items = 0;
    for (int64_t i = 0; i < matrix->num_segments; i++) items += items_of(&matrix->segments[i], two_panels);
    return items;
}

static Panels panels_of(const OvMatrix *matrix, bool two_panels, int64_t item) {
    const OvSegment *segment = matrix->segments;
    for (; item >= items_of(segment, two_panels); segment++) item -= items_of(segment, two_panels);
    if (!two_panels) return (Panels){segment, item, 1};
    return (Panels){segment, 2 * item, 2 * item + 1 < segment->num_panels ? 2 : 1};
}

static void multiply_panels(const Product *product, Panels panels, Panels next, int64_t first, int64_t last) {
#ifdef OV_AMX
    if (OV_USES_TILES(product->type)) {
        tile_panels(product, panels, next, first, last);
        return;
    }
#endif
    (void)next;
    for (int i = 0; i < panels.count; i++) lane_panel(product, panels.segment, panels.panel + i, first, last);
}

static Product product_of(const OvOp *op, const OvStep *step, OvWorker *w) {
    const OvMatrix *matrix = op->weight;
    const int64_t num_rows = ov_num_rows(op, step);
    Product product = {.op = op, .matrix = matrix, .type = w->type, .num_rows = num_rows, .tiles = w->scratch};
    product.row_bytes = matrix->num_steps * OV_STEP * OV_ELEMENT_BYTES(w->type);
    if (rows_are_ready(op, matrix, w->type, num_rows)) {
        product.rows = op->a;
        product.row_bytes = op->stride_a * OV_ELEMENT_BYTES(w->type);
    } else if (num_rows <= OV_OWN_ROWS) {
        uint8_t *own = (uint8_t *)w->scratch + 2 * panel_room(matrix, w->type);
        arrange_rows(op, w->type, num_rows, 0, num_rows, own);
        product.rows = own;
    } else {
        product.rows = w->shared;
    }
    /* Two at a time hide the latency of sums; one at a time divides better where there are few. */
    product.two_panels = num_items(matrix, false) >= 8 * (int64_t)w->count;
    return product;
}

static void linear_multiply(const OvOp *op, const OvStep *step, OvWorker *w) {
    const Product product = product_of(op, step, w);
    const int64_t tile_bytes = OV_TILE_ROWS * product.matrix->num_steps * OV_STEP * OV_ELEMENT_BYTES(w->type);
    const int64_t block = ov_ceil_div(OV_BLOCK_BYTES, 2 * tile_bytes) * 2 * OV_TILE_ROWS;
    const int64_t items = num_items(product.matrix, product.two_panels);
    const int64_t total = items * ov_ceil_div(product.num_rows, block);
#ifdef OV_AMX
    const bool narrow = OV_USES_TILES(w->type) && product.num_rows < OV_TILE_ROWS;
    if (narrow) tiles_for_rows((int)product.num_rows);
#endif
    /* The next item is taken before this one is done, so that its weights can be fetched meanwhile. */
    for (int64_t item = ov_take(w, total, 1), next; item >= 0; item = next) {
        next = ov_take(w, total, 1);
        int64_t first = item / items * block;
        Panels panels = panels_of(product.matrix, product.two_panels, item % items);
        Panels fetched = next < 0 ? (Panels){0} : panels_of(product.matrix, product.two_panels, next % items);
        multiply_panels(&product, panels, fetched, first, ov_min(first + block, product.num_rows));
    }
#ifdef OV_AMX
    if (narrow) tiles_enter();
#endif
}
