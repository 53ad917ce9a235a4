/* Tiles of a matrix as numbers: [16 outputs][32 inputs], of what the products multiply with (OvElement):
 *
 *     bf16, in natural order, where there is AVX-512 and the working type is bf16
 *     fp32, the 16 even inputs first, then the 16 odd ones, otherwise; for the working type bf16 they are rounded to it
 *
 * Values are computed in fp32 and rounded once: the numbers that dequantising the file to the working type gives.
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

/* `form` is a constant here and below. */
OV_INLINE void read_scales(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step, OvScales *to) {
    const int num_groups = OV_STEP / form.group, kinds = form.offsets ? 2 : 1;
    const uint8_t *scales = panel + segment->scales_at + step * (OV_PANEL * kinds * (form.units ? num_groups : 2));
    const uint8_t *units = panel + step / (OV_UNIT / OV_STEP) * (OV_PANEL * 2 * kinds);
    for (int group = 0; group < num_groups; group++) {
        V16 scale, offset;
        if (form.units) scale = v16_mul(v16_from_int8(scales + group * OV_PANEL), v16_from_halves(units));
        else scale = v16_from_halves(scales);
        if (!form.offsets) offset = v16_mul(scale, v16_set((float)-form.zero));
        else if (!form.units) offset = v16_from_halves(scales + 2 * OV_PANEL);
        else
            offset = v16_mul(v16_from_int8(scales + (num_groups + group) * OV_PANEL),
                             v16_from_halves(units + 2 * OV_PANEL));
        v16_store(to->scale[group], scale);
        v16_store(to->offset[group], offset);
    }
    /* Broadcasts from memory cost no shuffle. Compilers see through the store and shuffle, unless told not to. */
    __asm__ volatile("" : "+m"(*to));
}

/* ----------------------------------------------------------------------------------------- fp32, even and odd apart */

#ifdef OV_AVX512
typedef __m512i I16;
#define I16_MAP(f, ...) _mm512_##f(__VA_ARGS__)
OV_INLINE I16 i16_load(const void *p) { return _mm512_loadu_si512(p); }
OV_INLINE I16 i16_set(int x) { return _mm512_set1_epi32(x); }
OV_INLINE I16 i16_and(I16 a, I16 b) { return _mm512_and_si512(a, b); }
OV_INLINE I16 i16_or(I16 a, I16 b) { return _mm512_or_si512(a, b); }
OV_INLINE I16 i16_right(I16 a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_right_each(I16 a, I16 n) { return _mm512_srlv_epi32(a, n); }
OV_INLINE I16 i16_left(I16 a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_right_signed(I16 a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_from_words(const void *p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
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
OV_INLINE I16 i16_or(I16 a, I16 b) { return I16_MAP2(or_si256, a, b); }
OV_INLINE I16 i16_right(I16 a, int n) { return I16_MAP(srl_epi32, a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_right_each(I16 a, I16 n) { return I16_MAP2(srlv_epi32, a, n); }
OV_INLINE I16 i16_left(I16 a, int n) { return I16_MAP(sll_epi32, a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_right_signed(I16 a, int n) { return I16_MAP(sra_epi32, a, _mm_cvtsi32_si128(n)); }
OV_INLINE I16 i16_from_words(const void *p) {
    const __m128i *from = p;
    return (I16){_mm256_cvtepi16_epi32(_mm_loadu_si128(from)), _mm256_cvtepi16_epi32(_mm_loadu_si128(from + 1))};
}
OV_INLINE V16 i16_to_float(I16 a) { return (V16){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
OV_INLINE V16 i16_as_float(I16 a) { return (V16){_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
OV_INLINE V16 v16_halves(float a, float b) { return (V16){_mm256_set1_ps(a), _mm256_set1_ps(b)}; }
#endif

/* The codes of an output's even and odd inputs, as 32-bit integers. */
OV_INLINE void read_codes_even_odd(OvCoding form, const uint8_t *codes, int output, I16 *even, I16 *odd) {
    if (form.low_bits == 8) {
        I16 words = i16_from_words(codes + output * OV_STEP);
        *even = i16_right_signed(i16_left(words, 24), 24);
        *odd = i16_right_signed(words, 8);
        return;
    }
    const int per_word = 16 / form.low_bits;
    const int shift = output % per_word * form.low_bits;
    const I16 mask = i16_set((1 << form.low_bits) - 1);
    I16 words = i16_load(codes + output / per_word * 64);
    *even = i16_and(i16_right(words, shift), mask);
    *odd = i16_and(i16_right(words, 16 + shift), mask);
    if (form.high_bits == 0) return;
    const uint8_t *high = codes + OV_PANEL * OV_STEP * form.low_bits / 8;
    I16 even_high, odd_high;
    if (form.high_bits == 1) {
        const uint32_t places[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
        uint32_t bits;
        memcpy(&bits, high + 4 * output, 4);
        even_high = i16_and(i16_right_each(i16_set((int)bits), i16_load(places)), i16_set(1));
        odd_high = i16_and(i16_right_each(i16_set((int)(bits >> 1)), i16_load(places)), i16_set(1));
    } else {
        words = i16_load(high + output / 8 * 64);
        even_high = i16_and(i16_right(words, output % 8 * 2), i16_set(3));
        odd_high = i16_and(i16_right(words, 16 + output % 8 * 2), i16_set(3));
    }
    *even = i16_or(*even, i16_left(even_high, form.low_bits));
    *odd = i16_or(*odd, i16_left(odd_high, form.low_bits));
}

OV_INLINE void quantised_tile_f32(OvCoding form, int bf16, const OvSegment *segment, const uint8_t *panel, int64_t step,
                                  float *to) {
    OvScales scales;
    read_scales(form, segment, panel, step, &scales);
    const uint8_t *codes =
        panel + segment->codes_at + step * (OV_PANEL * OV_STEP * (form.low_bits + form.high_bits) / 8);
    const int last = OV_STEP / form.group - 1; /* the group of the upper lanes */
    for (int output = 0; output < OV_PANEL; output++, to += OV_STEP) {
        V16 scale = v16_halves(scales.scale[0][output], scales.scale[last][output]);
        V16 offset = v16_halves(scales.offset[0][output], scales.offset[last][output]);
        I16 even, odd;
        read_codes_even_odd(form, codes, output, &even, &odd);
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

#ifdef OV_AVX512
#include "dequant_bf16_impl.h"
#endif

/* ----------------------------------------------------------------------------------------------------- by encoding */

/* Writes one tile. `to` is 64-byte aligned. */
typedef void (*OvTileReader)(const OvSegment *, const uint8_t *panel, int64_t step, void *to);

#ifdef OV_AVX512
#define OV_BF16_TILE(name) quantised_tile_bf16(OV_CODINGS[OV_ENC_##name], segment, panel, step, to)
#else
#define OV_BF16_TILE(name) quantised_tile_f32(OV_CODINGS[OV_ENC_##name], true, segment, panel, step, to)
#endif
#define OV_TILE_READERS(name) \
    static void name##_to_f32(const OvSegment *segment, const uint8_t *panel, int64_t step, void *to) { \
        quantised_tile_f32(OV_CODINGS[OV_ENC_##name], false, segment, panel, step, to); \
    } \
    static void name##_to_bf16(const OvSegment *segment, const uint8_t *panel, int64_t step, void *to) { \
        OV_BF16_TILE(name); \
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

static void F16_to_f32(const OvSegment *segment, const uint8_t *panel, int64_t step, void *to) {
    f16_tile_f32(panel + segment->codes_at + step * 2 * OV_PANEL * OV_STEP, to);
}
static void BF16_to_f32(const OvSegment *segment, const uint8_t *panel, int64_t step, void *to) {
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
