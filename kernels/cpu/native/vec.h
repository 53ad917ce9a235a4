/* Small vector helpers that several operators share. Included by the isa_*.c only. */
#ifndef OCTAVO_VEC_H
#define OCTAVO_VEC_H

#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#include "octavo_cpu.h"

/* A function that must vanish into its caller, so that its constant arguments become constants. */
#define OV_INLINE static inline __attribute__((always_inline))

/* Before a loop of at most 16 turns over registers, which only exist as such once the loop is gone. */
#define OV_UNROLL _Pragma("GCC unroll 16")

OV_INLINE int64_t ov_min(int64_t a, int64_t b) { return a < b ? a : b; }
OV_INLINE int64_t ov_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

OV_INLINE float ov_float_of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* To nearest, ties to even; a NaN stays one. */
OV_INLINE uint16_t ov_bf16_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef OV_AMX
/* Tile registers. Written as assembly with a memory clobber: compilers' own intrinsics (GCC's up to 13) do not say
   that a tile load reads memory, and stores to the tile's source may then move behind it. */
#define OV_TILE_LOAD(tile, base, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base), "r"((int64_t)(stride)) : "memory")
#define OV_TILE_STORE(tile, base, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"((int64_t)(stride)) : "memory")
#define OV_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
/* dst [16][16] fp32 += a [16][32] bf16 . b [16 pairs][16][2] bf16 */
#define OV_TILE_DOT(dst, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #dst ::)
/* dst [16][16] int32 += a [16][32] int8 . b [8 fours][16][4] bytes, signed or not */
#define OV_TILE_DOT_SIGNED(dst, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #dst ::)
#define OV_TILE_DOT_UNSIGNED(dst, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #dst ::)

/* Rows and bytes per row of the eight tiles, as the processor wants them. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) OvTileShapes;

static inline void ov_tiles_configure(const OvTileShapes *shapes) {
    __asm__ volatile("ldtilecfg (%0)" ::"r"(shapes) : "memory");
}

/* All tiles 16 rows of 64 bytes: what every operator finds, and leaves. */
static void tiles_enter(void) {
    OvTileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = 16;
    }
    ov_tiles_configure(&shapes);
}

static void tiles_leave(void) { __asm__ volatile("tilerelease"); }
#endif

#endif
