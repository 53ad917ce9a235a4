/* Products in vector lanes: 16 partial sums for each output and row, over the inputs in order, added up at the end.
 *
 *     bf16 with AVX-512:  lane l sums the products of inputs 2l and 2l + 1 of every 32 (vdpbf16ps)
 *     otherwise fp32:     lane l sums those of input 2l, then 2l + 1, of every 32 (fused multiply-add)
 */

/* The sums of one row for 16 outputs, and what is left to do with them. */
OV_INLINE void finish_row(const Product *product, const OvSegment *segment, int64_t panel, int64_t row, V16 sums) {
    const OvOp *op = product->op;
    const int count = (int)ov_min(OV_PANEL, segment->num_outputs - panel * OV_PANEL);
    const int64_t output = segment->first_output + panel * OV_PANEL;
    if (op->b != NULL) sums = v16_add(sums, v16_get(op->b, output, count, false));
    const int64_t at = row * op->stride_out + output;
    if (product->type == OV_F32 || op->n[0] == 1) v16_put(op->out, at, sums, count, false);
    else v16_put(op->out, at, sums, count, true);
}

#ifdef OV_AVX512
OV_INLINE V16 dot_bf16(V16 sum, const uint8_t *w, const uint8_t *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
}
#else
OV_INLINE V16 dot_bf16(V16 sum, const uint8_t *w, const uint8_t *x) {
    (void)w, (void)x;
    return sum;
}
#endif

OV_INLINE V16 dot_f32(V16 sum, const uint8_t *w, const uint8_t *x) {
    sum = v16_fma(v16_load((const float *)w), v16_load((const float *)x), sum);
    return v16_fma(v16_load((const float *)w + 16), v16_load((const float *)x + 16), sum);
}

/* `outputs` outputs from `w` on (of the first tile) times `rows` rows; all four counts are constants. */
OV_INLINE void lane_block(int element_bytes, int outputs, int rows, const uint8_t *w, const uint8_t *x,
                          int64_t row_bytes, int64_t num_steps, float sums[][OV_PANEL]) {
    const int step_bytes = OV_STEP * element_bytes;
    V16 partial[8][4];
    OV_UNROLL
    for (int o = 0; o < outputs; o++) {
        OV_UNROLL
        for (int r = 0; r < rows; r++) partial[o][r] = v16_zero();
    }
    for (int64_t step = 0; step < num_steps; step++, w += OV_PANEL * step_bytes, x += step_bytes) {
        OV_UNROLL
        for (int o = 0; o < outputs; o++) {
            OV_UNROLL
            for (int r = 0; r < rows; r++) {
                const uint8_t *input = x + r * row_bytes;
                if (element_bytes == 2) partial[o][r] = dot_bf16(partial[o][r], w + o * step_bytes, input);
                else partial[o][r] = dot_f32(partial[o][r], w + o * step_bytes, input);
            }
        }
    }
    OV_UNROLL
    for (int o = 0; o < outputs; o++) {
        OV_UNROLL
        for (int r = 0; r < rows; r++) sums[r][o] = v16_sum(partial[o][r]);
    }
}

/* All 16 outputs for `rows` rows from `row` on. */
OV_INLINE void lane_rows(const Product *product, const OvSegment *segment, int64_t panel, const uint8_t *tiles,
                         int element_bytes, int outputs, int rows, int64_t row) {
    float sums[4][OV_PANEL] __attribute__((aligned(64)));
    const uint8_t *x = product->rows + row * product->row_bytes;
    for (int o = 0; o < OV_PANEL; o += outputs)
        lane_block(element_bytes, outputs, rows, tiles + o * OV_STEP * element_bytes, x, product->row_bytes,
                   product->matrix->num_steps, (float(*)[OV_PANEL])&sums[0][o]);
    for (int r = 0; r < rows; r++) finish_row(product, segment, panel, row + r, v16_load(sums[r]));
}

#ifdef OV_AVX512
enum { OV_LANE_ROWS = 4, OV_LANE_OUTPUTS = 4 };
#else
enum { OV_LANE_ROWS = 2, OV_LANE_OUTPUTS = 2 };
#endif

OV_INLINE void lane_panel_of(const Product *product, const OvSegment *segment, int64_t panel, const uint8_t *tiles,
                             int element_bytes, int64_t first, int64_t last) {
    int64_t row = first;
    for (; row + OV_LANE_ROWS <= last; row += OV_LANE_ROWS)
        lane_rows(product, segment, panel, tiles, element_bytes, OV_LANE_OUTPUTS, OV_LANE_ROWS, row);
    for (; row < last; row++)
        lane_rows(product, segment, panel, tiles, element_bytes, 2 * OV_LANE_OUTPUTS, 1, row);
}

static void lane_panel(const Product *product, const OvSegment *segment, int64_t panel, int64_t first, int64_t last) {
    const OvTileReader read = OV_READERS[segment->encoding][product->type];
    const uint8_t *from = ov_panel(segment, panel), *tiles = from + segment->codes_at;
    if (read != NULL) {
        const int64_t tile_bytes = OV_PANEL * OV_STEP * OV_ELEMENT_BYTES(product->type);
        for (int64_t step = 0; step < product->matrix->num_steps; step++)
            read(segment, from, step, product->tiles + step * tile_bytes);
        tiles = product->tiles;
    }
#ifdef OV_AVX512
    if (product->type == OV_BF16) {
        lane_panel_of(product, segment, panel, tiles, 2, first, last);
        return;
    }
#endif
    lane_panel_of(product, segment, panel, tiles, 4, first, last);
}
