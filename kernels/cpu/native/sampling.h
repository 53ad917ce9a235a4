/* What the rows of a draw ask for. */
#ifndef OCTAVO_SAMPLING_H
#define OCTAVO_SAMPLING_H

#include <stdint.h>

/* Arrays of one entry per row. */
typedef struct {
    const float *temperatures; /* 0: greedy */
    const int32_t *top_ks;     /* 0: all */
    const float *top_ps;
    const float *min_ps;
    const int64_t *seeds;      /* the bits of the unsigned seed */
    const int64_t *positions;  /* of the token to draw in its sequence */
} OvDraw;

#endif
