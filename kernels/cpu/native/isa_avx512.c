/* AVX-512 with F, BW, DQ, VL, VNNI, BF16: Cooper Lake, Zen 4 and later. */
#define OV_AVX512 1
#define OV_ISA_NAME "avx512"
#define OV_ISA_KERNELS ov_kernels_avx512
#include "isa_body.h"
