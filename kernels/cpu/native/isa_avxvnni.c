/* AVX2 as in isa_avx2.c, and byte products summed in fours: Alder Lake and later, with or without AVX-512. */
#define OV_ISA_NAME "avxvnni"
#define OV_ISA_KERNELS ov_kernels_avxvnni
#include "isa_body.h"
