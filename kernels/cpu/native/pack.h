/* Making matrices from a file's bytes. */
#ifndef OCTAVO_PACK_H
#define OCTAVO_PACK_H

#include "matrix.h"
#include "run.h"

/* Bytes that a matrix of a known encoding will take for a working type. */
OV_EXPORT int64_t ov_packed_bytes(int type, int64_t encoding, int64_t num_outputs, int64_t num_inputs);

/* Room for a matrix of these parts, one below the other; its values are rubbish until filled. */
OV_EXPORT int ov_matrix_create(OvContext *, int64_t num_inputs, const OvPart *parts, int64_t num_parts,
                               OvMatrix **out);
OV_EXPORT void ov_matrix_destroy(OvMatrix *);
OV_EXPORT int64_t ov_matrix_bytes(const OvMatrix *);

/* Fills part `index` from whole rows as the file has them: [num_outputs, bytes per row]. On the context's team. */
OV_EXPORT int ov_matrix_fill(OvContext *, OvMatrix *, int64_t index, const void *rows);

/* pack_blocks.c. The 32 inputs from 32 * step on of one row of a quantised matrix. */
typedef struct {
    uint8_t codes[32];
    uint16_t scale, offset;         /* fp16, without units */
    uint8_t scales[2], minimums[2]; /* with units: of each group */
    uint16_t scale_unit, offset_unit; /* fp16; the offset is minus the minimum times its unit, so this one is negated */
} OvCodes;

void ov_read_codes(OvEncoding, const uint8_t *row, int64_t step, OvCodes *out);

#endif
