/* Products of dense bf16 weights with AMX: tiles of weights [16 outputs][32 inputs], as they lie in memory, times tiles of
 * rows [16 pairs of inputs][rows][2].
 *
 * The processor sums each output of each row over the inputs in order, in fp32; rows are columns of a tile and do not
 * touch one another, however many there are. With fewer than 16 rows the tiles are made as narrow as that: a single
 * row's tile then is the row itself. */

enum { OV_TILE_BYTES = OV_PANEL * OV_STEP * 2 };

/* 6, 7: rows; 0-3: sums. Their second dimension is the number of rows. */
static void tiles_for_rows(int num_rows) {
    OvTileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * num_rows);
        shapes.rows[i] = 16;
    }
    ov_tiles_configure(&shapes);
}

/* 16 x 16 elements of 32 bits: four rounds, each of which exchanges blocks of twice the size. */
OV_INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* One tile of rows: [steps][16 pairs][width][2]; width is 16, or the number of rows where that is smaller. */
static void arrange_tiles(const OvOp *op, const OvMatrix *matrix, int64_t num_rows, int64_t first, int64_t last,
                          uint8_t *to) {
    const int64_t width = ov_min(num_rows, OV_TILE_ROWS);
    const __mmask16 columns = (__mmask16)((1u << width) - 1);
    to += first * matrix->num_steps * OV_STEP * 2;
    for (int64_t at = 0; at < matrix->num_inputs; at += OV_STEP) {
        int64_t count = ov_min(OV_STEP, matrix->num_inputs - at);
        __mmask32 inputs = (__mmask32)(count == 32 ? 0xffffffffu : (1u << count) - 1);
        __m512i block[16];
        for (int i = 0; i < 16; i++) {
            const uint16_t *row = (const uint16_t *)op->a + (first + i) * op->stride_a + at;
            block[i] = first + i < last ? _mm512_maskz_loadu_epi16(inputs, row) : _mm512_setzero_si512();
        }
        transpose16(block);
        for (int i = 0; i < 16; i++, to += 4 * width) _mm512_mask_storeu_epi32(to, columns, block[i]);
    }
}

/* Sums of `panels` panels and `groups` tiles of rows, all over the inputs, left in tiles 0-3 (panel p, group g in
   2p + g). */
OV_INLINE void tile_block(int panels, int groups, const uint8_t *const weights[2], const uint8_t *x, int64_t width,
                          int64_t num_steps, Fetch *fetch) {
    const int64_t row_stride = 4 * width, step_bytes = 16 * row_stride, group_bytes = num_steps * step_bytes;
    OV_TILE_ZERO(0);
    if (groups == 2) OV_TILE_ZERO(1);
    if (panels == 2) OV_TILE_ZERO(2);
    if (panels == 2 && groups == 2) OV_TILE_ZERO(3);
    for (int64_t step = 0; step < num_steps; step++, x += step_bytes) {
        for (int p = 0; p < panels; p++) fetch_step(fetch);
        OV_TILE_LOAD(6, x, row_stride);
        if (groups == 2) OV_TILE_LOAD(7, x + group_bytes, row_stride);
        OV_TILE_LOAD(4, weights[0] + step * OV_TILE_BYTES, 64);
        OV_TILE_DOT(0, 4, 6);
        if (groups == 2) OV_TILE_DOT(1, 4, 7);
        if (panels == 1) continue;
        OV_TILE_LOAD(5, weights[1] + step * OV_TILE_BYTES, 64);
        OV_TILE_DOT(2, 5, 6);
        if (groups == 2) OV_TILE_DOT(3, 5, 7);
    }
}

/* Columns 4c .. 4c + 3 of [16 outputs][16 rows], each as a register of its outputs. Quarters of registers are brought
   together while they are loaded, so that half of a transposition's shuffles remain. */
OV_INLINE void four_rows(const float *sums, int c, __m512 row[4]) {
    __m512 part[4], pair[4];
    OV_UNROLL
    for (int i = 0; i < 4; i++) {
        const float *at = sums + 16 * i + 4 * c; /* outputs i, i + 4, i + 8, i + 12 */
        part[i] = _mm512_castps128_ps512(_mm_load_ps(at));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x00f0, _mm_load_ps(at + 64));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x0f00, _mm_load_ps(at + 128));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0xf000, _mm_load_ps(at + 192));
    }
    for (int i = 0; i < 4; i += 2) {
        pair[i] = _mm512_unpacklo_ps(part[i], part[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps(part[i], part[i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        __m512d low = _mm512_castps_pd(pair[i]), high = _mm512_castps_pd(pair[2 + i]);
        row[2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        row[2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
}

/* Sums [16 outputs][rows] of one tile to the rows' outputs. */
static void finish_tile(const Product *product, const OvSegment *segment, int64_t panel, int64_t row, int64_t count,
                        const float *sums) {
    const OvOp *op = product->op;
    const int64_t output = segment->first_output + panel * OV_PANEL;
    const bool whole = count == OV_TILE_ROWS && segment->num_outputs - panel * OV_PANEL >= OV_PANEL;
    if (product->num_rows == 1) {
        finish_row(product, segment, panel, row, v16_load(sums));
    } else if (whole && op->b == NULL && op->n[0] != 1) { /* the same without a question for each row */
        uint16_t *out = (uint16_t *)op->out + row * op->stride_out + output;
        OV_UNROLL
        for (int c = 0; c < 4; c++) {
            __m512 rows[4];
            four_rows(sums, c, rows);
            for (int i = 0; i < 4; i++, out += op->stride_out)
                _mm256_storeu_si256((__m256i *)out, v16_to_bf16(rows[i]));
        }
    } else {
        for (int c = 0; 4 * c < count; c++) {
            __m512 rows[4];
            four_rows(sums, c, rows);
            for (int i = 0; i < 4 && 4 * c + i < count; i++)
                finish_row(product, segment, panel, row + 4 * c + i, rows[i]);
        }
    }
}

/* Panels times rows [row, last), 32 of these at most. */
OV_INLINE void tile_rows(int panels, int groups, const Product *product, Panels which, int64_t row, int64_t last,
                         Fetch *fetch) {
    float sums[4][256] __attribute__((aligned(64)));
    const int64_t num_steps = product->matrix->num_steps;
    const int64_t width = ov_min(product->num_rows, OV_TILE_ROWS);
    const int64_t stride = product->num_rows == 1 ? 4 : 64;
    const uint8_t *weights[2] = {NULL, NULL};
    for (int p = 0; p < panels; p++) weights[p] = ov_panel(which.segment, which.panel + p) + which.segment->codes_at;
    tile_block(panels, groups, weights, product->rows + row * num_steps * OV_STEP * 2, width, num_steps, fetch);
    OV_TILE_STORE(0, sums[0], stride);
    if (groups == 2) OV_TILE_STORE(1, sums[1], stride);
    if (panels == 2) OV_TILE_STORE(2, sums[2], stride);
    if (panels == 2 && groups == 2) OV_TILE_STORE(3, sums[3], stride);
    for (int p = 0; p < panels; p++)
        for (int g = 0; g < groups; g++) {
            int64_t start = row + g * OV_TILE_ROWS;
            finish_tile(product, which.segment, which.panel + p, start, ov_min(OV_TILE_ROWS, last - start),
                        sums[2 * p + g]);
        }
}

/* One or two panels times rows [first, last). The first rows' pass asks for what comes next. */
static void tile_panels(const Product *product, Panels which, int64_t first, int64_t last, Fetch *fetch) {
    Fetch none = {0};
    for (int64_t row = first; row < last; row += 2 * OV_TILE_ROWS, fetch = &none) {
        const int64_t end = ov_min(row + 2 * OV_TILE_ROWS, last);
        const bool two = end - row > OV_TILE_ROWS;
        if (which.count == 2 && two) tile_rows(2, 2, product, which, row, end, fetch);
        else if (which.count == 2) tile_rows(2, 1, product, which, row, end, fetch);
        else if (two) tile_rows(1, 2, product, which, row, end, fetch);
        else tile_rows(1, 1, product, which, row, end, fetch);
    }
}
