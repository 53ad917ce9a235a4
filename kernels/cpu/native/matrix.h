/* A weight matrix as the products read it.
 *
 * Outputs lie in panels of 16, inputs in steps of 32; the crossing of the two is a tile. A panel is one run of bytes:
 *
 *     units     of each 256 inputs:  fp16 [16] of the scales, fp16 [16] of the offsets        (K-quants)
 *     scales    of each step:        fp16 [16], fp16 [16] offsets                             (the simpler encodings)
 *                                    or int8 [groups][16], uint8 [groups][16] minimums        (K-quants)
 *     codes     of each step:        low bits, then high bits
 *
 * every part of it padded to 64 bytes. Codes of b bits lie in b lines of 64 bytes (an AVX-512 register, a row of an AMX
 * tile). Byte 4 o + i of a line is about output o; inputs 4 j + i, for j of 0 to 7, share the lines so that one shift of
 * a whole register gives four inputs of all 16 outputs, as products of bytes want them:
 *
 *     4 bits    line l: | j = l | j = l + 4 |                     lowest bits first
 *     2 bits    line l: | j = l | l + 2 | l + 4 | l + 6 |
 *     1 bit     bit j
 *     8 bits    line j
 *
 * A value is (code - zero) * scale + offset, exact in fp32 but for the last sum; the bits in memory are those of the
 * file, give or take scales of 6 bits that lie in 8, and a sign that is an offset of 128. Dense tiles are [16
 * outputs][32 inputs], of BF16 in natural order (what AMX loads as it is), of F16 and F32 with the 16 even inputs first,
 * then the 16 odd ones.
 *
 * What lies beyond the last output or input is zero. */
#ifndef OCTAVO_MATRIX_H
#define OCTAVO_MATRIX_H

#include <stdbool.h>

#include "arena.h"
#include "octavo_cpu.h"

enum { OV_PANEL = 16, OV_STEP = 32, OV_UNIT = 256, OV_MAX_SEGMENTS = 16 };

typedef enum {
    OV_ENC_F32 = 0,
    OV_ENC_F16,
    OV_ENC_BF16,
    OV_ENC_Q4_0,
    OV_ENC_Q4_1,
    OV_ENC_Q5_0,
    OV_ENC_Q5_1,
    OV_ENC_Q8_0,
    OV_ENC_Q2_K,
    OV_ENC_Q3_K,
    OV_ENC_Q4_K,
    OV_ENC_Q5_K,
    OV_ENC_Q6_K,
    OV_NUM_ENCODINGS
} OvEncoding;

typedef struct {
    int low_bits;  /* of a code; of a value where dense (16, 32) */
    int high_bits; /* 0, 1, 2: above the low ones */
    int group;     /* inputs that share a scale: 16, 32; 0 where dense */
    int zero;      /* the code of the value `offset` */
    bool offsets;
    bool units;    /* K-quant */
    int file_values, file_bytes; /* of a block in the file */
} OvCoding;

static const OvCoding OV_CODINGS[OV_NUM_ENCODINGS] = {
    [OV_ENC_F32] = {32, 0, 0, 0, false, false, 1, 4},
    [OV_ENC_F16] = {16, 0, 0, 0, false, false, 1, 2},
    [OV_ENC_BF16] = {16, 0, 0, 0, false, false, 1, 2},
    [OV_ENC_Q4_0] = {4, 0, 32, 8, false, false, 32, 18},
    [OV_ENC_Q4_1] = {4, 0, 32, 0, true, false, 32, 20},
    [OV_ENC_Q5_0] = {4, 1, 32, 16, false, false, 32, 22},
    [OV_ENC_Q5_1] = {4, 1, 32, 0, true, false, 32, 24},
    [OV_ENC_Q8_0] = {8, 0, 32, 128, false, false, 32, 34},
    [OV_ENC_Q2_K] = {2, 0, 16, 0, true, true, 256, 84},
    [OV_ENC_Q3_K] = {2, 1, 16, 4, false, true, 256, 110},
    [OV_ENC_Q4_K] = {4, 0, 32, 0, true, true, 256, 144},
    [OV_ENC_Q5_K] = {4, 1, 32, 0, true, true, 256, 176},
    [OV_ENC_Q6_K] = {4, 2, 16, 32, false, true, 256, 210},
};

/* Outputs of one encoding: one part of a merged matrix. */
typedef struct {
    OvEncoding encoding; /* as it lies here: F32 and F16 files become BF16 for that working type */
    OvEncoding file_encoding;
    int64_t num_outputs, first_output;
    int64_t num_panels;
    int64_t panel_bytes, scales_at, codes_at; /* of a panel; units are at 0 */
    int64_t scale_bytes, code_bytes;          /* of a step */
    uint8_t *panels;
} OvSegment;

typedef struct {
    int64_t num_inputs, num_outputs, num_steps, num_bytes;
    int64_t num_segments;
    OvRegion *region; /* where the panels lie */
    OvSegment segments[OV_MAX_SEGMENTS];
} OvMatrix;

/* The experts of a layer, all of one shape. */
typedef struct {
    int64_t num_experts;
    const OvMatrix *const *gate_up; /* [2 * inner outputs, hidden inputs] each, gate first */
    const OvMatrix *const *down;    /* [hidden outputs, inner inputs] each */
} OvExperts;

typedef struct {
    int64_t encoding; /* OvEncoding, of the file */
    int64_t num_outputs;
} OvPart;

static inline const uint8_t *ov_panel(const OvSegment *segment, int64_t panel) {
    return segment->panels + panel * segment->panel_bytes;
}

#endif
