/* AVX2, FMA, F16C: x86-64 from 2013 on. */
#define OV_ISA_NAME "avx2"
#define OV_ISA_KERNELS ov_kernels_avx2
#include "isa_body.h"
