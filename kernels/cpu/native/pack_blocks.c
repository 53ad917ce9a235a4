/* GGML's blocks taken apart (layouts: ggml-common.h, ggml-quants.c), 32 inputs at a time. */
#include <string.h>

#include "pack.h"

static uint16_t half_at(const uint8_t *bytes) {
    uint16_t value;
    memcpy(&value, bytes, 2);
    return value;
}

static void nibbles(const uint8_t *from, uint8_t *codes) {
    for (int j = 0; j < 16; j++) {
        codes[j] = from[j] & 15;
        codes[16 + j] = from[j] >> 4;
    }
}

static void fifth_bits(const uint8_t *from, uint8_t *codes) {
    for (int j = 0; j < 32; j++) codes[j] |= (uint8_t)((from[j / 8] >> (j % 8) & 1) << 4);
}

/* Two bits of each of 32 bytes, `shift` places up, onto the codes. */
static void bits_of_bytes(const uint8_t *from, int shift, uint8_t mask, int up, uint8_t *codes) {
    for (int j = 0; j < 32; j++) codes[j] |= (uint8_t)((from[j] >> shift & mask) << up);
}

/* Scale and minimum number `group` of the 6-bit ones of Q4_K and Q5_K. */
static void six_bit_scales(const uint8_t *from, int group, OvCodes *out) {
    if (group < 4) {
        out->scales[0] = from[group] & 63;
        out->minimums[0] = from[group + 4] & 63;
    } else {
        out->scales[0] = (uint8_t)((from[group + 4] & 15) | (from[group - 4] >> 6) << 4);
        out->minimums[0] = (uint8_t)((from[group + 4] >> 4) | (from[group] >> 6) << 4);
    }
}

static void read_simple(OvEncoding encoding, const uint8_t *block, OvCodes *out) {
    out->scale = half_at(block);
    const uint8_t *rest = block + 2;
    if (OV_CODINGS[encoding].offsets) {
        out->offset = half_at(rest);
        rest += 2;
    }
    if (encoding == OV_ENC_Q8_0) {
        for (int j = 0; j < 32; j++) out->codes[j] = rest[j] ^ 0x80; /* -128 is code 0 */
    } else if (OV_CODINGS[encoding].high_bits == 1) {
        nibbles(rest + 4, out->codes);
        fifth_bits(rest, out->codes);
    } else {
        nibbles(rest, out->codes);
    }
}

static void read_q2_k(const uint8_t *block, int part, OvCodes *out) {
    for (int g = 0; g < 2; g++) {
        out->scales[g] = block[2 * part + g] & 15;
        out->minimums[g] = block[2 * part + g] >> 4;
    }
    bits_of_bytes(block + 16 + 32 * (part / 4), 2 * (part % 4), 3, 0, out->codes);
    out->scale_unit = half_at(block + 80);
    out->offset_unit = half_at(block + 82) ^ 0x8000;
}

static void read_q3_k(const uint8_t *block, int part, OvCodes *out) {
    const uint8_t *scales = block + 96;
    for (int g = 0; g < 2; g++) {
        int i = 2 * part + g;
        int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
        int high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
        out->scales[g] = (uint8_t)((low | high << 4) - 32);
    }
    bits_of_bytes(block + 32 + 32 * (part / 4), 2 * (part % 4), 3, 0, out->codes);
    bits_of_bytes(block, part, 1, 2, out->codes);
    out->scale_unit = half_at(block + 108);
}

static void read_q4_k(const uint8_t *block, int part, OvCodes *out, const uint8_t *quants) {
    six_bit_scales(block + 4, part, out);
    bits_of_bytes(quants + 32 * (part / 2), 4 * (part % 2), 15, 0, out->codes);
    out->scale_unit = half_at(block);
    out->offset_unit = half_at(block + 2) ^ 0x8000;
}

static void read_q6_k(const uint8_t *block, int part, OvCodes *out) {
    int quarter = part % 4;
    bits_of_bytes(block + 64 * (part / 4) + 32 * (quarter % 2), 4 * (quarter / 2), 15, 0, out->codes);
    bits_of_bytes(block + 128 + 32 * (part / 4), 2 * quarter, 3, 4, out->codes);
    memcpy(out->scales, block + 192 + 2 * part, 2);
    out->scale_unit = half_at(block + 208);
}

void ov_read_codes(OvEncoding encoding, const uint8_t *row, int64_t step, OvCodes *out) {
    const OvCoding *form = &OV_CODINGS[encoding];
    memset(out, 0, sizeof *out);
    if (!form->units) {
        read_simple(encoding, row + step * form->file_bytes, out);
        return;
    }
    const uint8_t *block = row + step / 8 * form->file_bytes;
    int part = (int)(step % 8); /* of the block's 256 inputs */
    switch (encoding) {
    case OV_ENC_Q2_K: read_q2_k(block, part, out); break;
    case OV_ENC_Q3_K: read_q3_k(block, part, out); break;
    case OV_ENC_Q4_K: read_q4_k(block, part, out, block + 16); break;
    case OV_ENC_Q5_K:
        read_q4_k(block, part, out, block + 48);
        bits_of_bytes(block + 16, part, 1, 4, out->codes);
        break;
    default: read_q6_k(block, part, out);
    }
}
