/* Sixteen fp32 lanes, the same on every instruction set: one AVX-512 register, or two of AVX2.
 *
 * Code written with these types adds in one order wherever it runs. Partial loads give zeros in the lanes they leave
 * out, and neither partial loads nor partial stores touch memory beyond their count.
 */
#ifndef OCTAVO_VEC16_H
#define OCTAVO_VEC16_H

#include "vec.h"

#ifdef __AVX512F__

typedef __m512 V16;

OV_INLINE V16 v16_set(float x) { return _mm512_set1_ps(x); }
OV_INLINE V16 v16_zero(void) { return _mm512_setzero_ps(); }
OV_INLINE V16 v16_add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
OV_INLINE V16 v16_sub(V16 a, V16 b) { return _mm512_sub_ps(a, b); }
OV_INLINE V16 v16_mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
OV_INLINE V16 v16_div(V16 a, V16 b) { return _mm512_div_ps(a, b); }
OV_INLINE V16 v16_fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
/* Where a or b is a NaN the result is b, here and in v16_min. */
OV_INLINE V16 v16_max(V16 a, V16 b) { return _mm512_max_ps(a, b); }
OV_INLINE V16 v16_min(V16 a, V16 b) { return _mm512_min_ps(a, b); }
OV_INLINE V16 v16_abs(V16 a) { return _mm512_abs_ps(a); }
OV_INLINE V16 v16_round(V16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a < b ? yes : no; a NaN chooses no. */
OV_INLINE V16 v16_if_less(V16 a, V16 b, V16 yes, V16 no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}
/* Lanes [begin, end) of x, the others of fill; 0 <= begin, end <= 16. */
OV_INLINE V16 v16_keep(V16 x, V16 fill, int begin, int end) {
    uint32_t mask = begin < end ? ((1u << end) - 1) & ~((1u << begin) - 1) : 0;
    return _mm512_mask_mov_ps(fill, (__mmask16)mask, x);
}
/* a with the sign of s. */
OV_INLINE V16 v16_with_sign(V16 a, V16 s) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(s), _mm512_castps_si512(a), 0xCA));
}
/* a * 2^n for an integral n of [-126, 127]; other n may give anything but must not trap. */
OV_INLINE V16 v16_scale(V16 a, V16 n) { return _mm512_scalef_ps(a, n); }
OV_INLINE V16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
OV_INLINE V16 v16_load_part(const float *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
OV_INLINE void v16_store(float *p, V16 a) { _mm512_storeu_ps(p, a); }
OV_INLINE void v16_store_part(float *p, V16 a, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
}
OV_INLINE __m256 v16_low(V16 a) { return _mm512_castps512_ps256(a); }
OV_INLINE __m256 v16_high(V16 a) { return _mm512_extractf32x8_ps(a, 1); }
OV_INLINE V16 v16_from_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
/* Rounded to nearest even; the instruction takes denormals for zero. */
OV_INLINE __m256i v16_to_bf16(V16 a) { return (__m256i)_mm512_cvtneps_pbh(a); }

#else

typedef struct {
    __m256 low, high;
} V16;

#define V16_MAP1(f, a) ((V16){f((a).low), f((a).high)})
#define V16_MAP2(f, a, b) ((V16){f((a).low, (b).low), f((a).high, (b).high)})

OV_INLINE V16 v16_set(float x) { return (V16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OV_INLINE V16 v16_zero(void) { return v16_set(0.0f); }
OV_INLINE V16 v16_add(V16 a, V16 b) { return V16_MAP2(_mm256_add_ps, a, b); }
OV_INLINE V16 v16_sub(V16 a, V16 b) { return V16_MAP2(_mm256_sub_ps, a, b); }
OV_INLINE V16 v16_mul(V16 a, V16 b) { return V16_MAP2(_mm256_mul_ps, a, b); }
OV_INLINE V16 v16_div(V16 a, V16 b) { return V16_MAP2(_mm256_div_ps, a, b); }
OV_INLINE V16 v16_fma(V16 a, V16 b, V16 c) {
    return (V16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
OV_INLINE V16 v16_max(V16 a, V16 b) { return V16_MAP2(_mm256_max_ps, a, b); }
OV_INLINE V16 v16_min(V16 a, V16 b) { return V16_MAP2(_mm256_min_ps, a, b); }
OV_INLINE __m256 ov_round8(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
OV_INLINE __m256 ov_abs8(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
OV_INLINE V16 v16_abs(V16 a) { return V16_MAP1(ov_abs8, a); }
OV_INLINE V16 v16_round(V16 a) { return V16_MAP1(ov_round8, a); }
OV_INLINE __m256 ov_if_less8(__m256 a, __m256 b, __m256 yes, __m256 no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
OV_INLINE V16 v16_if_less(V16 a, V16 b, V16 yes, V16 no) {
    return (V16){ov_if_less8(a.low, b.low, yes.low, no.low), ov_if_less8(a.high, b.high, yes.high, no.high)};
}
/* All ones in lanes [begin, end) of eight. */
OV_INLINE __m256i ov_lanes8(int begin, int end) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane), below);
}
OV_INLINE V16 v16_keep(V16 x, V16 fill, int begin, int end) {
    return (V16){_mm256_blendv_ps(fill.low, x.low, _mm256_castsi256_ps(ov_lanes8(begin, end))),
                 _mm256_blendv_ps(fill.high, x.high, _mm256_castsi256_ps(ov_lanes8(begin - 8, end - 8)))};
}
OV_INLINE __m256 ov_with_sign8(__m256 a, __m256 s) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_and_ps(sign, s), _mm256_andnot_ps(sign, a));
}
OV_INLINE V16 v16_with_sign(V16 a, V16 s) { return V16_MAP2(ov_with_sign8, a, s); }
OV_INLINE __m256 ov_scale8(__m256 a, __m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
OV_INLINE V16 v16_scale(V16 a, V16 n) { return V16_MAP2(ov_scale8, a, n); }
OV_INLINE V16 v16_load(const float *p) { return (V16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OV_INLINE V16 v16_load_part(const float *p, int n) {
    return (V16){_mm256_maskload_ps(p, ov_lanes8(0, n)), _mm256_maskload_ps(p + 8, ov_lanes8(0, n - 8))};
}
OV_INLINE void v16_store(float *p, V16 a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
OV_INLINE void v16_store_part(float *p, V16 a, int n) {
    _mm256_maskstore_ps(p, ov_lanes8(0, n), a.low);
    _mm256_maskstore_ps(p + 8, ov_lanes8(0, n - 8), a.high);
}
OV_INLINE __m256 v16_low(V16 a) { return a.low; }
OV_INLINE __m256 v16_high(V16 a) { return a.high; }
OV_INLINE __m256 ov_from_bf16_8(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
OV_INLINE V16 v16_from_bf16(__m256i bits) {
    return (V16){ov_from_bf16_8(_mm256_castsi256_si128(bits)), ov_from_bf16_8(_mm256_extracti128_si256(bits, 1))};
}
/* The upper half of each lane, rounded to nearest even; a NaN stays one. */
OV_INLINE __m256i ov_to_bf16_8(__m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
OV_INLINE __m256i v16_to_bf16(V16 a) {
    __m256i packed = _mm256_packus_epi32(ov_to_bf16_8(a.low), ov_to_bf16_8(a.high));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}

#endif

/* Both of these add and compare in one fixed tree. */
OV_INLINE float v16_sum(V16 a) {
    __m256 x = _mm256_add_ps(v16_low(a), v16_high(a));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
OV_INLINE float v16_largest(V16 a) {
    __m256 x = _mm256_max_ps(v16_low(a), v16_high(a));
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
OV_INLINE float v16_first(V16 a) { return _mm_cvtss_f32(_mm256_castps256_ps128(v16_low(a))); }

/* Elements [i, i + n) of a vector of the working type, 0 < n <= 16. `bf16` is a constant wherever this is used. */
OV_INLINE V16 v16_get(const void *p, int64_t i, int n, int bf16) {
    if (!bf16) return n == 16 ? v16_load((const float *)p + i) : v16_load_part((const float *)p + i, n);
    const uint16_t *from = (const uint16_t *)p + i;
    if (n == 16) return v16_from_bf16(_mm256_loadu_si256((const __m256i *)from));
    uint16_t part[16] = {0};
    memcpy(part, from, (size_t)n * sizeof *part);
    return v16_from_bf16(_mm256_loadu_si256((const __m256i *)part));
}
/* Rounds to the working type. */
OV_INLINE void v16_put(void *p, int64_t i, V16 a, int n, int bf16) {
    if (!bf16) {
        if (n == 16) v16_store((float *)p + i, a);
        else v16_store_part((float *)p + i, a, n);
        return;
    }
    uint16_t *to = (uint16_t *)p + i;
    if (n == 16) {
        _mm256_storeu_si256((__m256i *)to, v16_to_bf16(a));
        return;
    }
    uint16_t part[16];
    _mm256_storeu_si256((__m256i *)part, v16_to_bf16(a));
    memcpy(to, part, (size_t)n * sizeof *part);
}
/* What v16_put would leave, as fp32. */
OV_INLINE V16 v16_rounded(V16 a, int bf16) { return bf16 ? v16_from_bf16(v16_to_bf16(a)) : a; }

#endif
