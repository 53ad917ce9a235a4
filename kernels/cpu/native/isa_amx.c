/* AVX-512 as in isa_avx512.c, and AMX tiles for bf16: Sapphire Rapids and later. */
#define OV_AVX512 1
#define OV_AMX 1
#define OV_ISA_NAME "amx"
#define OV_ISA_KERNELS ov_kernels_amx
#include "isa_body.h"
