/* Matrices laid out for the products, from the bytes of files. See matrix.h for the layout. */
#include "pack.h"

#include <stdlib.h>
#include <string.h>

static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static void lay_out(OvSegment *segment, int64_t num_steps) {
    const OvCoding *form = &OV_CODINGS[segment->encoding];
    int64_t num_groups = form->group != 0 ? OV_STEP / form->group : 0;
    int64_t kinds = form->offsets ? 2 : 1; /* scales, offsets */
    int64_t num_units = form->units ? (num_steps * OV_STEP + OV_UNIT - 1) / OV_UNIT : 0;
    segment->scale_bytes = num_groups == 0 ? 0 : OV_PANEL * kinds * (form->units ? num_groups : 2);
    segment->code_bytes = (int64_t)OV_PANEL * OV_STEP * (form->low_bits + form->high_bits) / 8;
    segment->scales_at = rounded(num_units * kinds * OV_PANEL * 2);
    segment->codes_at = segment->scales_at + rounded(num_steps * segment->scale_bytes);
    segment->panel_bytes = segment->codes_at + rounded(num_steps * segment->code_bytes);
    segment->num_panels = (segment->num_outputs + OV_PANEL - 1) / OV_PANEL;
}

int64_t ov_packed_bytes(int type, int64_t encoding, int64_t num_outputs, int64_t num_inputs) {
    OvSegment segment = {.encoding = (OvEncoding)encoding, .num_outputs = num_outputs};
    if (type == OV_BF16 && OV_CODINGS[encoding].group == 0) segment.encoding = OV_ENC_BF16;
    lay_out(&segment, (num_inputs + OV_STEP - 1) / OV_STEP);
    return segment.num_panels * segment.panel_bytes;
}

int ov_matrix_create(OvContext *context, int64_t num_inputs, const OvPart *parts, int64_t num_parts,
                     OvMatrix **out) {
    OvInfo info;
    ov_info(context, &info);
    *out = NULL;
    if (num_parts < 1 || num_parts > OV_MAX_SEGMENTS || num_inputs < 1) return OV_BAD_ARGUMENT;
    OvMatrix matrix = {.num_inputs = num_inputs, .num_segments = num_parts};
    matrix.num_steps = (num_inputs + OV_STEP - 1) / OV_STEP;
    for (int64_t i = 0; i < num_parts; i++) {
        OvSegment *segment = &matrix.segments[i];
        if (parts[i].encoding < 0 || parts[i].encoding >= OV_NUM_ENCODINGS || parts[i].num_outputs < 1)
            return OV_BAD_ARGUMENT;
        segment->file_encoding = segment->encoding = (OvEncoding)parts[i].encoding;
        if (num_inputs % OV_CODINGS[segment->encoding].file_values != 0) return OV_BAD_ARGUMENT;
        if (info.type == OV_BF16 && OV_CODINGS[segment->encoding].group == 0) segment->encoding = OV_ENC_BF16;
        segment->num_outputs = parts[i].num_outputs;
        segment->first_output = matrix.num_outputs;
        lay_out(segment, matrix.num_steps);
        matrix.num_outputs += segment->num_outputs;
        matrix.num_bytes += segment->num_panels * segment->panel_bytes;
    }
    OvMatrix *made = malloc(sizeof *made);
    if (made == NULL) return OV_NO_MEMORY;
    ov_context_lock(context);
    uint8_t *memory = ov_region_take(ov_context_region(context), (size_t)matrix.num_bytes, &matrix.region);
    ov_context_unlock(context);
    if (memory == NULL) {
        free(made);
        return OV_NO_MEMORY;
    }
    *made = matrix;
    for (int64_t i = 0, at = 0; i < num_parts; i++) {
        made->segments[i].panels = memory + at;
        at += made->segments[i].num_panels * made->segments[i].panel_bytes;
    }
    *out = made;
    return OV_OK;
}

void ov_matrix_destroy(OvMatrix *matrix) {
    if (matrix == NULL) return;
    ov_region_release(matrix->region);
    free(matrix);
}

int64_t ov_matrix_bytes(const OvMatrix *matrix) { return matrix->num_bytes; }

/* ------------------------------------------------------------------------------------------------- quantised tiles */

static void put_scales(const OvCoding *form, uint8_t *scales, int output, const OvCodes *codes) {
    uint16_t *halves = (uint16_t *)scales;
    int num_groups = OV_STEP / form->group;
    if (!form->units) {
        halves[output] = codes->scale;
        if (form->offsets) halves[OV_PANEL + output] = codes->offset;
        return;
    }
    for (int group = 0; group < num_groups; group++) {
        scales[group * OV_PANEL + output] = codes->scales[group];
        if (form->offsets) scales[(num_groups + group) * OV_PANEL + output] = codes->minimums[group];
    }
}

/* One field of `bits` bits of each of 32 inputs, into lines of an output. */
static void put_lines(const uint8_t *codes, int bits, int shift, int output, uint8_t *lines) {
    unsigned mask = (1u << bits) - 1;
    for (int input = 0; input < OV_STEP; input++) {
        int j = input / 4;
        lines[j % bits * 64 + 4 * output + input % 4] |= (uint8_t)((codes[input] >> shift & mask) << j / bits * bits);
    }
}

static void put_codes(const OvCoding *form, const uint8_t *codes, int output, uint8_t *to) {
    put_lines(codes, form->low_bits, 0, output, to);
    if (form->high_bits != 0) put_lines(codes, form->high_bits, form->low_bits, output, to + 64 * form->low_bits);
}

static void pack_quantised(const OvSegment *segment, int64_t num_steps, const uint8_t *row, int output,
                           uint8_t *panel) {
    const OvCoding *form = &OV_CODINGS[segment->encoding];
    OvCodes codes;
    for (int64_t step = 0; step < num_steps; step++) {
        ov_read_codes(segment->encoding, row, step, &codes);
        put_scales(form, panel + segment->scales_at + step * segment->scale_bytes, output, &codes);
        put_codes(form, codes.codes, output, panel + segment->codes_at + step * segment->code_bytes);
        if (!form->units || step % (OV_UNIT / OV_STEP) != 0) continue;
        uint16_t *units = (uint16_t *)panel + step / (OV_UNIT / OV_STEP) * OV_PANEL * (form->offsets ? 2 : 1);
        units[output] = codes.scale_unit;
        if (form->offsets) units[OV_PANEL + output] = codes.offset_unit;
    }
}

/* ----------------------------------------------------------------------------------------------------- dense tiles */

static float float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
    memcpy(&value, &bits, 4);
    return value;
}

static uint16_t bf16_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Elements [first, last) of a row become BF16 in their order; the file has F32, F16 or BF16. */
static void to_bf16(OvEncoding from, const uint8_t *row, int64_t first, int64_t last, uint16_t *to) {
    for (int64_t i = first; i < last; i++) {
        float wide;
        uint16_t half;
        if (from == OV_ENC_F32) memcpy(&wide, row + 4 * i, 4);
        else memcpy(&half, row + 2 * i, 2);
        if (from == OV_ENC_F16) wide = float_of_half(half);
        to[i - first] = from == OV_ENC_BF16 ? half : bf16_of_float(wide);
    }
}

/* Elements [first, last) as they are, even ones first. */
static void split_even_odd(int64_t size, const uint8_t *row, int64_t first, int64_t last, uint8_t *to) {
    for (int64_t i = first; i < last; i++) {
        int64_t place = (i - first) / 2 + (i - first) % 2 * (OV_STEP / 2);
        memcpy(to + place * size, row + i * size, (size_t)size);
    }
}

static void pack_dense(const OvSegment *segment, int64_t num_inputs, const uint8_t *row, int output, uint8_t *panel) {
    int64_t size = OV_CODINGS[segment->encoding].low_bits / 8;
    uint8_t *to = panel + segment->codes_at + output * OV_STEP * size;
    for (int64_t first = 0; first < num_inputs; first += OV_STEP, to += segment->code_bytes) {
        int64_t last = first + OV_STEP < num_inputs ? first + OV_STEP : num_inputs;
        if (segment->encoding == OV_ENC_BF16) to_bf16(segment->file_encoding, row, first, last, (uint16_t *)to);
        else split_even_odd(size, row, first, last, to);
    }
}

/* ------------------------------------------------------------------------------------------------------------ jobs */

typedef struct {
    OvJob job;
    const OvMatrix *matrix;
    const OvSegment *segment;
    const uint8_t *rows;
} FillJob;

static void fill(OvJob *job, OvWorker *worker) {
    const FillJob *this = (const FillJob *)job;
    const OvSegment *segment = this->segment;
    const OvCoding *form = &OV_CODINGS[segment->file_encoding];
    int64_t row_bytes = this->matrix->num_inputs / form->file_values * form->file_bytes;
    for (int64_t panel; (panel = ov_take(worker, segment->num_panels, 1)) >= 0;) {
        uint8_t *to = segment->panels + panel * segment->panel_bytes;
        memset(to, 0, (size_t)segment->panel_bytes); /* codes are or-ed in, and a part may be filled again */
        for (int output = 0; output < OV_PANEL && panel * OV_PANEL + output < segment->num_outputs; output++) {
            const uint8_t *row = this->rows + (panel * OV_PANEL + output) * row_bytes;
            if (form->group == 0) pack_dense(segment, this->matrix->num_inputs, row, output, to);
            else pack_quantised(segment, this->matrix->num_steps, row, output, to);
        }
    }
}

static bool no_more(OvJob *job) {
    (void)job;
    return false;
}

int ov_matrix_fill(OvContext *context, OvMatrix *matrix, int64_t index, const void *rows) {
    if (index < 0 || index >= matrix->num_segments || rows == NULL) return OV_BAD_ARGUMENT;
    FillJob this = {{fill, no_more}, matrix, &matrix->segments[index], rows};
    ov_context_lock(context);
    ov_team_run(ov_context_team(context), &this.job);
    ov_context_unlock(context);
    return OV_OK;
}
