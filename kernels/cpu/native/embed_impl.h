/* OV_EMBED: rows of a matrix. A whole tile is turned into numbers for the sake of one row of it, which costs sixteen
 * times what it must and still is nothing beside a layer; every encoding is served. */

/* One row, times `factor`, in the matrix's working type. An id that no row has gives NaN, which samplers report. */
static void embed_row(const OvMatrix *matrix, OvType type, int64_t id, float factor, void *room, void *out,
                      int64_t out_at) {
    const OvSegment *segment = matrix->segments;
    const bool known = id >= 0 && id < matrix->num_outputs;
    while (known && id >= segment->first_output + segment->num_outputs) segment++;
    const int64_t row = known ? id - segment->first_output : 0;
    const uint8_t *panel = ov_panel(segment, row / OV_PANEL);
    const OvTileReader read = OV_READERS[segment->encoding][type];
    const bool narrow = read == NULL && type == OV_BF16; /* bf16 in natural order */
    OvAhead ahead;
    ahead.step = OV_NO_STEP;
    for (int64_t step = 0; step < matrix->num_steps; step++) {
        const uint8_t *tile = panel + segment->codes_at + step * segment->code_bytes;
        if (read != NULL) {
            read(segment, panel, step, &ahead, room);
            tile = room;
        }
        float values[OV_STEP];
        for (int half = 0; half < 2; half++) {
            const int64_t at = row % OV_PANEL * OV_STEP + 16 * half;
            V16 part = narrow ? v16_get(tile, at, 16, true) : v16_get(tile, at, 16, false);
            if (!known) part = v16_set(__builtin_nanf(""));
            v16_store(values + 16 * half, v16_mul(part, v16_set(factor)));
        }
        const int64_t count = ov_min(OV_STEP, matrix->num_inputs - step * OV_STEP);
        for (int64_t i = 0; i < count; i++, out_at++) {
            float value = narrow ? values[i] : values[i / 2 + i % 2 * (OV_STEP / 2)];
            if (type == OV_F32) ((float *)out)[out_at] = value;
            else ((uint16_t *)out)[out_at] = ov_bf16_of_float(value);
        }
    }
}

static void embed_rows(const OvOp *op, const OvStep *step, OvWorker *w) {
    const int64_t num_rows = ov_num_rows(op, step);
    for (int64_t row; (row = ov_take(w, num_rows, 1)) >= 0;)
        embed_row(op->weight, w->type, step->token_ids[row], op->f[0], w->scratch, op->out, row * op->stride_out);
}
