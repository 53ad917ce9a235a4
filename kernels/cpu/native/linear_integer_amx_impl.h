/* Integer products of many rows in AMX tiles: 16 rows times 16 outputs of one group of inputs are one product, whose
 * exact sums go through memory to be scaled. They are the sums that vectors make (linear_integer_impl.h), and scaled in
 * the same order: so are the results.
 *
 * Making sums and scaling them do not overlap: 13 and 15 ns for 16 rows apart, 30 together (measured on a Sapphire
 * Rapids core). That is why a few rows are better off without tiles. */

enum {
    /* Unpacked, a group of a step's inputs is its codes (zeros for inputs of the other group), scales and offsets. */
    OV_LINES_BYTES = 8 * 64,
    OV_UNPACKED_BYTES = OV_LINES_BYTES + 2 * 16 * 4,
    /* Up to so many rows a panel is unpacked, so many steps ahead, while its first 16 rows are multiplied: that hides
     * the waiting for codes. For more rows it is unpacked before. */
    OV_UNPACKED_ALONG = 32,
    OV_STEPS_AHEAD = 2,
};

/* 4: rows [16][32]; 5, 6: codes [8 lines]; 0, 1: sums. */
static void tiles_for_integers(void) {
    OvTileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = i == 4 ? OV_STEP : 64;
        shapes.rows[i] = i == 5 || i == 6 ? 8 : 16;
    }
    ov_tiles_configure(&shapes);
}

/* A step's codes, signed if zero is not their lowest, and scales. */
OV_INLINE void unpack_step(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step, uint8_t *to) {
    const int num_groups = OV_STEP / form.group, lines = 8 / num_groups;
    const uint8_t *codes = step_codes(form, segment, panel, step);
    to += step * num_groups * OV_UNPACKED_BYTES;
    for (int group = 0; group < num_groups; group++, to += OV_UNPACKED_BYTES) {
        OV_UNROLL
        for (int j = 0; j < 8; j++) {
            const __m512i zero = _mm512_set1_epi8((char)form.zero);
            __m512i values = _mm512_sub_epi8((__m512i)read_line(form, codes, j), zero);
            if (j / lines != group) values = _mm512_setzero_si512();
            _mm512_store_si512(to + 64 * j, values);
        }
        V16 scale, offset;
        read_group(form, segment, panel, step, group, &scale, &offset);
        v16_store((float *)(to + OV_LINES_BYTES), scale);
        v16_store((float *)(to + OV_LINES_BYTES) + 16, offset);
    }
}

OV_INLINE void unpack_steps(OvCoding form, const Product *product, const OvSegment *segment, int64_t panel,
                            int64_t count) {
    for (int64_t step = 0; step < count; step++)
        unpack_step(form, segment, ov_panel(segment, panel), step, product->tiles);
}

/* The exact sums of a group, of 16 rows. */
OV_INLINE void multiply_group(OvCoding form, const uint8_t *numbers, const uint8_t *codes, int odd, int32_t *sums) {
    OV_TILE_LOAD(4, numbers, OV_STEP);
    if (odd) {
        OV_TILE_ZERO(1);
        OV_TILE_LOAD(6, codes, 64);
        if (form.zero != 0) OV_TILE_DOT_SIGNED(1, 4, 6);
        else OV_TILE_DOT_UNSIGNED(1, 4, 6);
        OV_TILE_STORE(1, sums, 64);
    } else {
        OV_TILE_ZERO(0);
        OV_TILE_LOAD(5, codes, 64);
        if (form.zero != 0) OV_TILE_DOT_SIGNED(0, 4, 5);
        else OV_TILE_DOT_UNSIGNED(0, 4, 5);
        OV_TILE_STORE(0, sums, 64);
    }
}

/* A panel times one whole group of rows, of which `count` are some. The sums of one group of inputs are scaled while
   those of the next are made. unpack: whether the panel is yet to be unpacked. */
OV_INLINE void integer_tiles(OvCoding form, const Product *product, const OvSegment *segment, int64_t panel,
                             const Rows *rows, int64_t count, bool unpack, Fetch *fetch) {
    const int num_groups = OV_STEP / form.group;
    const int64_t num_steps = product->matrix->num_steps, total = num_steps * num_groups;
    const uint8_t *codes = product->tiles;
    int32_t exact[2][256] __attribute__((aligned(64)));
    V16 sums[OV_RECORD_ROWS];
    OV_UNROLL
    for (int r = 0; r < OV_RECORD_ROWS; r++) sums[r] = v16_zero();
    if (unpack) unpack_steps(form, product, segment, panel, ov_min(OV_STEPS_AHEAD, num_steps));
    for (int64_t i = 0; i <= total; i++, codes += OV_UNPACKED_BYTES) {
        const uint8_t *numbers = rows->record + i / num_groups * rows->shape.bytes + rows->shape.numbers_at;
        if (i % num_groups == 0) {
            const int64_t ahead = i / num_groups + OV_STEPS_AHEAD;
            fetch_step(fetch);
            if (unpack && ahead < num_steps) unpack_step(form, segment, ov_panel(segment, panel), ahead, product->tiles);
        }
        if (i < total) multiply_group(form, numbers, codes, (int)(i & 1), exact[i & 1]);
        if (i == 0) continue;
        const int group = (int)((i - 1) % num_groups), which = num_groups == 1 ? OV_WHOLE : OV_HALF + group;
        uint8_t *record = rows->record + (i - 1) / num_groups * rows->shape.bytes;
        const float *scales = (const float *)(codes - OV_UNPACKED_BYTES + OV_LINES_BYTES);
        const V16 scale = v16_load(scales), offset = v16_load(scales + 16);
        OV_UNROLL
        for (int r = 0; r < OV_RECORD_ROWS; r++)
            sums[r] = add_scaled(form, sums[r], _mm512_cvtepi32_ps(_mm512_load_si512(exact[(i - 1) & 1] + 16 * r)), scale,
                                 offset, record, OV_RECORD_ROWS, which, r);
    }
    float done[OV_RECORD_ROWS][16] __attribute__((aligned(64))); /* registers have no index */
    OV_UNROLL
    for (int r = 0; r < OV_RECORD_ROWS; r++) v16_store(done[r], sums[r]);
    for (int64_t r = 0; r < count; r++) finish_row(product, segment, panel, rows->row + r, v16_load(done[r]));
}
