/* Tiles of a matrix as fp32: [16 outputs][32 inputs], the 16 even inputs first, then the 16 odd ones.
 *
 * Values are computed in fp32 and rounded once, to the working type: the numbers that dequantising the file to it gives.
 * Even and odd apart, because that is how one gets 32-bit lanes out of 16-bit ones without moving any across. */
#include "matrix.h"
#include "vec16.h"

/* Scale and offset of each output, by group. A group of 32 uses the first. */
typedef struct {
    float scale[2][16], offset[2][16];
} __attribute__((aligned(64))) OvScales;

OV_INLINE V16 v16_from_halves(const uint8_t *p) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)p);
#ifdef OV_AVX512
    return _mm512_cvtph_ps(bits);
#else
    return (V16){_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
#endif
}

OV_INLINE V16 v16_from_int8(const uint8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
#ifdef OV_AVX512
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
    return (V16){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                 _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
#endif
}

/* Scales and offsets of a step's group, by output. `form` is a constant here and below. */
OV_INLINE void read_group(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step, int group,
                          V16 *scale, V16 *offset) {
    const int num_groups = OV_STEP / form.group, kinds = form.offsets ? 2 : 1;
    const uint8_t *scales = panel + segment->scales_at + step * (OV_PANEL * kinds * (form.units ? num_groups : 2));
    const uint8_t *units = panel + step / (OV_UNIT / OV_STEP) * (OV_PANEL * 2 * kinds);
    if (form.units) *scale = v16_mul(v16_from_int8(scales + group * OV_PANEL), v16_from_halves(units));
    else *scale = v16_from_halves(scales);
    if (!form.offsets) *offset = v16_mul(*scale, v16_set((float)-form.zero));
    else if (!form.units) *offset = v16_from_halves(scales + 2 * OV_PANEL);
    else
        *offset = v16_mul(v16_from_int8(scales + (num_groups + group) * OV_PANEL),
                          v16_from_halves(units + 2 * OV_PANEL));
}

OV_INLINE void read_scales(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step, OvScales *to) {
    for (int group = 0; group < OV_STEP / form.group; group++) {
        V16 scale, offset;
        read_group(form, segment, panel, step, group, &scale, &offset);
        v16_store(to->scale[group], scale);
        v16_store(to->offset[group], offset);
    }
    /* Broadcasts from memory cost no shuffle. Compilers see through the store and shuffle, unless told not to. */
    __asm__ volatile("" : "+m"(*to));
}

/* Scales on their way: those of the next step are read before this one's are used, because what is stored can be
   broadcast only a while later, and processors do not look far enough ahead to fill that while. */
typedef struct {
    OvScales scales[2]; /* of even and odd steps */
    int64_t step;       /* which is there already; OV_NO_STEP at the start of a panel */
} OvAhead;

enum { OV_NO_STEP = -1 };

/* Behind the last step's scales lie its codes: what is read there means nothing, and is not used. */
OV_INLINE const OvScales *scales_of(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step,
                                    OvAhead *ahead) {
    if (ahead->step != step) read_scales(form, segment, panel, step, &ahead->scales[step & 1]);
    read_scales(form, segment, panel, step + 1, &ahead->scales[(step + 1) & 1]);
    ahead->step = step + 1;
    return &ahead->scales[step & 1];
}

/* --------------------------------------------------------------------------------------------------------- codes */

/* A line of codes (matrix.h). */
#ifdef OV_AVX512
typedef uint32_t OvLine __attribute__((vector_size(64)));
OV_INLINE OvLine line_load(const uint8_t *p) {
    OvLine line;
    memcpy(&line, p, sizeof line);
    return line;
}
OV_INLINE OvLine line_right(OvLine line, int n) { return line >> n; }
OV_INLINE OvLine line_left(OvLine line, int n) { return line << n; }
OV_INLINE OvLine line_and(OvLine line, uint32_t mask) { return line & mask; }
OV_INLINE OvLine line_or(OvLine a, OvLine b) { return a | b; }
#else /* by hand: GCC takes vectors of 64 bytes through memory, eight bytes at a time */
typedef struct {
    __m256i half[2];
} OvLine;
OV_INLINE OvLine line_load(const uint8_t *p) {
    return (OvLine){{_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)}};
}
OV_INLINE OvLine line_right(OvLine a, int n) {
    return (OvLine){{_mm256_srli_epi32(a.half[0], n), _mm256_srli_epi32(a.half[1], n)}};
}
OV_INLINE OvLine line_left(OvLine a, int n) {
    return (OvLine){{_mm256_slli_epi32(a.half[0], n), _mm256_slli_epi32(a.half[1], n)}};
}
OV_INLINE OvLine line_and(OvLine a, uint32_t mask) {
    const __m256i kept = _mm256_set1_epi32((int)mask);
    return (OvLine){{_mm256_and_si256(a.half[0], kept), _mm256_and_si256(a.half[1], kept)}};
}
OV_INLINE OvLine line_or(OvLine a, OvLine b) {
    return (OvLine){{_mm256_or_si256(a.half[0], b.half[0]), _mm256_or_si256(a.half[1], b.half[1])}};
}
#endif

/* Codes of inputs 4 j to 4 j + 3 of all outputs, a byte each. */
OV_INLINE OvLine read_line(OvCoding form, const uint8_t *codes, int j) {
    const uint32_t mask = ((1u << form.low_bits) - 1) * 0x01010101u;
    OvLine line = line_load(codes + 64 * (j % form.low_bits));
    if (form.low_bits != 8) line = line_and(line_right(line, j / form.low_bits * form.low_bits), mask);
    if (form.high_bits != 0) {
        const uint32_t high_mask = ((1u << form.high_bits) - 1) * 0x01010101u << form.low_bits;
        const int up = form.low_bits - j / form.high_bits * form.high_bits;
        const OvLine high = line_load(codes + 64 * (form.low_bits + j % form.high_bits));
        line = line_or(line, line_and(up > 0 ? line_left(high, up) : line_right(high, -up), high_mask));
    }
    return line;
}

OV_INLINE const uint8_t *step_codes(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step) {
    return panel + segment->codes_at + step * (OV_PANEL * OV_STEP * (form.low_bits + form.high_bits) / 8);
}

/* ----------------------------------------------------------------------------------------- fp32, even and odd apart */

#ifdef OV_AVX512
typedef __m512i I16;
OV_INLINE I16 i16_load(const void *p) { return _mm512_loadu_si512(p); }
OV_INLINE I16 i16_set(int x) { return _mm512_set1_epi32(x); }
OV_INLINE I16 i16_and(I16 a, I16 b) { return _mm512_and_si512(a, b); }
OV_INLINE I16 i16_right(I16 a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_left(I16 a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_from_words(__m256i words) { return _mm512_cvtepu16_epi32(words); }
OV_INLINE V16 i16_to_float(I16 a) { return _mm512_cvtepi32_ps(a); }
OV_INLINE V16 i16_as_float(I16 a) { return _mm512_castsi512_ps(a); }
/* a in lanes 0-7, b in lanes 8-15 */
OV_INLINE V16 v16_halves(float a, float b) { return _mm512_mask_mov_ps(_mm512_set1_ps(a), 0xff00, _mm512_set1_ps(b)); }
#else
typedef struct {
    __m256i low, high;
} I16;
#define I16_MAP(f, a, ...) ((I16){_mm256_##f((a).low, __VA_ARGS__), _mm256_##f((a).high, __VA_ARGS__)})
#define I16_MAP2(f, a, b) ((I16){_mm256_##f((a).low, (b).low), _mm256_##f((a).high, (b).high)})
OV_INLINE I16 i16_load(const void *p) {
    return (I16){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
OV_INLINE I16 i16_set(int x) { return (I16){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OV_INLINE I16 i16_and(I16 a, I16 b) { return I16_MAP2(and_si256, a, b); }
OV_INLINE I16 i16_right(I16 a, int n) { return I16_MAP(srl_epi32, a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_left(I16 a, int n) { return I16_MAP(sll_epi32, a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_from_words(__m256i words) {
    return (I16){_mm256_cvtepu16_epi32(_mm256_castsi256_si128(words)),
                 _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1))};
}
OV_INLINE V16 i16_to_float(I16 a) { return (V16){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
OV_INLINE V16 i16_as_float(I16 a) { return (V16){_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
OV_INLINE V16 v16_halves(float a, float b) { return (V16){_mm256_set1_ps(a), _mm256_set1_ps(b)}; }
#endif

/* The codes of an output's even and odd inputs, as 32-bit integers. bytes: a step's codes, [8][16 outputs][4 inputs]. */
OV_INLINE void read_codes_even_odd(const OvLine bytes[8], int output, I16 *even, I16 *odd) {
    const __m256i lines = _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112);
    I16 pairs = i16_from_words(_mm256_i32gather_epi32((const int *)bytes + output, lines, 4));
    *even = i16_and(pairs, i16_set(0xff));
    *odd = i16_right(pairs, 8);
}

OV_INLINE void quantised_tile_f32(OvCoding form, int bf16, const OvSegment *segment, const uint8_t *panel, int64_t step,
                                  OvAhead *ahead, float *to) {
    const OvScales *scales = scales_of(form, segment, panel, step, ahead);
    const uint8_t *codes = step_codes(form, segment, panel, step);
    OvLine bytes[8];
    OV_UNROLL
    for (int j = 0; j < 8; j++) bytes[j] = read_line(form, codes, j);
    const int last = OV_STEP / form.group - 1; /* the group of the upper lanes */
    for (int output = 0; output < OV_PANEL; output++, to += OV_STEP) {
        V16 scale = v16_halves(scales->scale[0][output], scales->scale[last][output]);
        V16 offset = v16_halves(scales->offset[0][output], scales->offset[last][output]);
        I16 even, odd;
        read_codes_even_odd(bytes, output, &even, &odd);
        v16_store(to, v16_rounded(v16_fma(i16_to_float(even), scale, offset), bf16));
        v16_store(to + 16, v16_rounded(v16_fma(i16_to_float(odd), scale, offset), bf16));
    }
}

OV_INLINE void bf16_tile_f32(const uint8_t *from, float *to) {
    for (int output = 0; output < OV_PANEL; output++, from += 64, to += OV_STEP) {
        I16 pairs = i16_load(from);
        v16_store(to, i16_as_float(i16_left(pairs, 16)));
        v16_store(to + 16, i16_as_float(i16_and(pairs, i16_set((int)0xffff0000u))));
    }
}

OV_INLINE void f16_tile_f32(const uint8_t *from, float *to) {
    for (int i = 0; i < 2 * OV_PANEL; i++) v16_store(to + 16 * i, v16_from_halves(from + 32 * i));
}

/* ----------------------------------------------------------------------------------------------------- by encoding */

/* Writes one tile. `to` is 64-byte aligned; `ahead` belongs to one panel, whose steps are best read in order. */
typedef void (*OvTileReader)(const OvSegment *, const uint8_t *panel, int64_t step, OvAhead *ahead, void *to);

#define OV_TILE_READERS(name) \
    static void name##_to_f32(const OvSegment *segment, const uint8_t *panel, int64_t step, OvAhead *ahead, \
                             void *to) { \
        quantised_tile_f32(OV_CODINGS[OV_ENC_##name], false, segment, panel, step, ahead, to); \
    } \
    static void name##_to_bf16(const OvSegment *segment, const uint8_t *panel, int64_t step, OvAhead *ahead, \
                             void *to) { \
        quantised_tile_f32(OV_CODINGS[OV_ENC_##name], true, segment, panel, step, ahead, to); \
    }

OV_TILE_READERS(Q4_0)
OV_TILE_READERS(Q4_1)
OV_TILE_READERS(Q5_0)
OV_TILE_READERS(Q5_1)
OV_TILE_READERS(Q8_0)
OV_TILE_READERS(Q2_K)
OV_TILE_READERS(Q3_K)
OV_TILE_READERS(Q4_K)
OV_TILE_READERS(Q5_K)
OV_TILE_READERS(Q6_K)

static void F16_to_f32(const OvSegment *segment, const uint8_t *panel, int64_t step, OvAhead *ahead, void *to) {
    (void)ahead;
    f16_tile_f32(panel + segment->codes_at + step * 2 * OV_PANEL * OV_STEP, to);
}
static void BF16_to_f32(const OvSegment *segment, const uint8_t *panel, int64_t step, OvAhead *ahead, void *to) {
    (void)ahead;
    bf16_tile_f32(panel + segment->codes_at + step * 2 * OV_PANEL * OV_STEP, to);
}

/* [encoding][OvType]; NULL where the tile lies in memory as the products want it. */
static const OvTileReader OV_READERS[OV_NUM_ENCODINGS][2] = {
#ifdef OV_AVX512
    [OV_ENC_BF16] = {BF16_to_f32, NULL},
#else
    [OV_ENC_BF16] = {BF16_to_f32, BF16_to_f32},
#endif
    [OV_ENC_F16] = {F16_to_f32, NULL}, /* never in a bf16 context, nor is F32 */
    [OV_ENC_F32] = {NULL, NULL},
    [OV_ENC_Q4_0] = {Q4_0_to_f32, Q4_0_to_bf16},
    [OV_ENC_Q4_1] = {Q4_1_to_f32, Q4_1_to_bf16},
    [OV_ENC_Q5_0] = {Q5_0_to_f32, Q5_0_to_bf16},
    [OV_ENC_Q5_1] = {Q5_1_to_f32, Q5_1_to_bf16},
    [OV_ENC_Q8_0] = {Q8_0_to_f32, Q8_0_to_bf16},
    [OV_ENC_Q2_K] = {Q2_K_to_f32, Q2_K_to_bf16},
    [OV_ENC_Q3_K] = {Q3_K_to_f32, Q3_K_to_bf16},
    [OV_ENC_Q4_K] = {Q4_K_to_f32, Q4_K_to_bf16},
    [OV_ENC_Q5_K] = {Q5_K_to_f32, Q5_K_to_bf16},
    [OV_ENC_Q6_K] = {Q6_K_to_f32, Q6_K_to_bf16},
};
