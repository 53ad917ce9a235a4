/* Rows rounded to 8 bits, into records (linear_integer_impl.h). With AVX-512 sixteen steps are rounded at once, of one
 * row or of several; they get the numbers that one step at a time gets. */

#include <math.h>

/* Below this a step counts as zeros: dividing by it would overflow. */
#define OV_SMALLEST 1e-30f

/* Rows [first, first + count) of a matrix product's input, and their group's record of the first step. */
typedef struct {
    const uint16_t *from; /* bf16, the first row */
    int64_t stride, count, num_steps;
    uint8_t *records;
    RecordShape shape;
} Rounding;

/* 16 numbers to bytes, and their sum. */
OV_INLINE int32_t put_numbers(int8_t *to, V16 rounded) {
#ifdef OV_AVX512
    __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(rounded));
#else
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(rounded.low), _mm256_cvtps_epi32(rounded.high));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#endif
    _mm_storeu_si128((__m128i *)to, bytes);
    /* Bytes of either sign are added as if 128 more. */
    __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8((char)0x80)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - 16 * 128;
}

/* One step of one row. A NaN or an infinity makes the scale, and so all that the row is multiplied to, a NaN. */
OV_INLINE void round_step(const Rounding *rounding, int64_t row, int64_t step) {
    const uint16_t *from = rounding->from + row * rounding->stride + step * OV_STEP;
    uint8_t *record = rounding->records + step * rounding->shape.bytes;
    const V16 half[2] = {v16_get(from, 0, 16, true), v16_get(from, 16, 16, true)};
    const float poison = v16_sum(v16_fma(half[0], v16_zero(), v16_mul(half[1], v16_zero()))); /* 0, or a NaN */
    const float largest = v16_largest(v16_max(v16_abs(half[0]), v16_abs(half[1])));
    const bool some = largest > OV_SMALLEST;
    const float scale = (some ? largest / OV_ROW_LARGEST : 0.0f) + poison;
    const V16 inverse = v16_set(some ? OV_ROW_LARGEST / largest : 0.0f);
    int8_t *numbers = (int8_t *)record + rounding->shape.numbers_at + row * OV_STEP;
    int32_t sums[OV_NUM_SUMS];
    for (int i = 0; i < 2; i++) sums[OV_HALF + i] = put_numbers(numbers + 16 * i, v16_mul(half[i], inverse));
    sums[OV_WHOLE] = sums[OV_HALF] + sums[OV_HALF + 1];
    *record_scale(record, row) = scale;
    for (int i = 0; i < OV_NUM_SUMS; i++) {
        *record_scaled_sum(record, rounding->shape.rows, i, row) = (float)sums[i] * scale;
        *record_sum(record, rounding->shape.rows, i, row) = sums[i];
    }
}

#ifdef OV_AVX512
/* Sixteen steps: `times` steps of each of the rows, which lie as | rows of the first step | rows of the next | ... */
typedef struct {
    const uint16_t *from[16]; /* those beyond are any */
    int64_t times, step;
} Sixteen;

/* Largest size of each, as an fp32 number: sizes of bf16 numbers are in the order of their bits. */
OV_INLINE __m512i largest_of(const __m512i x[16]) {
    const __m512i size = _mm512_set1_epi16(0x7fff);
    __m512i eight[8], four[4], two[2];
    OV_UNROLL
    for (int i = 0; i < 8; i++) {
        const __m512i a = _mm512_and_si512(x[2 * i], size), b = _mm512_and_si512(x[2 * i + 1], size);
        eight[i] = _mm512_max_epu16(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    OV_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512 a = _mm512_castsi512_ps(eight[2 * i]), b = _mm512_castsi512_ps(eight[2 * i + 1]);
        four[i] = _mm512_max_epu16(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                                   _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
    }
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_max_epu16(_mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0x88),
                                  _mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0xdd));
    const __m512i one = _mm512_max_epu16(_mm512_shuffle_i32x4(two[0], two[1], 0x88),
                                         _mm512_shuffle_i32x4(two[0], two[1], 0xdd));
    return _mm512_slli_epi32(_mm512_max_epu16(one, _mm512_srli_epi32(one, 16)), 16);
}

/* Two steps' bytes, the first one's in the lower half. */
OV_INLINE __m512i bytes_of(const __m512i x[2], const float inverse[2]) {
    __m512i words[2];
    OV_UNROLL
    for (int i = 0; i < 2; i++) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(x[i], 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(x[i], _mm512_set1_epi32((int)0xffff0000)));
        const __m512 factor = _mm512_set1_ps(inverse[i]);
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(even, factor));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(odd, factor));
        words[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
    }
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_permutexvar_epi64(order, _mm512_packs_epi16(words[0], words[1]));
}

/* Sums of the bytes' halves, from pairs of steps as bytes_of gives them. */
OV_INLINE void sums_of(const __m512i bytes[8], __m512i sums[OV_NUM_SUMS]) {
    __m512i four[4], two[2];
    OV_UNROLL
    for (int i = 0; i < 4; i++) {
        __m512i eighths[2]; /* of four steps, as if each byte were 128 more */
        for (int k = 0; k < 2; k++)
            eighths[k] = _mm512_sad_epu8(_mm512_xor_si512(bytes[2 * i + k], _mm512_set1_epi8((char)0x80)),
                                         _mm512_setzero_si512());
        four[i] = _mm512_add_epi64(_mm512_unpacklo_epi64(eighths[0], eighths[1]),
                                   _mm512_unpackhi_epi64(eighths[0], eighths[1]));
    }
    for (int i = 0; i < 2; i++) two[i] = _mm512_or_si512(four[2 * i], _mm512_slli_epi64(four[2 * i + 1], 32));
    /* Four pairs of steps lie in each of `two`: in every four lanes pairs 0, 2, 1, 3, first the halves of the pairs'
     * first steps, then those of their second steps. */
    const __m512i first = _mm512_setr_epi32(0, 8, 2, 10, 1, 9, 3, 11, 16, 24, 18, 26, 17, 25, 19, 27);
    const __m512i more = _mm512_set1_epi32(16 * 128), second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
    sums[OV_HALF] = _mm512_sub_epi32(_mm512_permutex2var_epi32(two[0], first, two[1]), more);
    sums[OV_HALF + 1] = _mm512_sub_epi32(_mm512_permutex2var_epi32(two[0], second, two[1]), more);
    sums[OV_WHOLE] = _mm512_add_epi32(sums[OV_HALF], sums[OV_HALF + 1]);
}

/* What a record holds beside numbers, in its order, of all sixteen, to the records of the steps that they are of. */
OV_INLINE void put_fields(const Rounding *rounding, const Sixteen *sixteen, const __m512i fields[OV_NUM_FIELDS]) {
    const int64_t count = rounding->count, width = 4 * rounding->shape.rows;
    const uint32_t lanes = (1u << count) - 1;
    uint8_t *to = rounding->records + sixteen->step * rounding->shape.bytes;
    for (int64_t i = 0; i < sixteen->times; i++, to += rounding->shape.bytes)
        OV_UNROLL
        for (int field = 0; field < OV_NUM_FIELDS; field++) {
            if (count == 1) /* the same, sooner */
                memcpy(to + field * width, (const int32_t *)(fields + field) + i, 4);
            else
                _mm512_mask_storeu_epi32(to + field * width, (__mmask16)lanes,
                                         _mm512_maskz_compress_epi32((__mmask16)(lanes << i * count), fields[field]));
        }
}

OV_INLINE void round_sixteen(const Rounding *rounding, const Sixteen *sixteen) {
    __m512i x[16], bytes[8], fields[OV_NUM_FIELDS];
    float inverses[16] __attribute__((aligned(64)));
    const int64_t count = rounding->count, used = sixteen->times * count;
    OV_UNROLL
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(sixteen->from[i] + sixteen->step * OV_STEP);
    const __m512 largest = _mm512_castsi512_ps(largest_of(x));
    const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(OV_SMALLEST), _CMP_GT_OQ);
    const __m512 zero = _mm512_setzero_ps();
    const __mmask16 bad = _mm512_cmp_ps_mask(_mm512_mul_ps(largest, zero), zero, _CMP_UNORD_Q);
    const __m512 most = _mm512_set1_ps(OV_ROW_LARGEST);
    __m512 scale = _mm512_maskz_div_ps(some, largest, most);
    scale = _mm512_mask_mov_ps(scale, bad, _mm512_set1_ps(NAN));
    _mm512_store_ps(inverses, _mm512_maskz_div_ps(some, most, largest));
    OV_UNROLL
    for (int i = 0; i < 8; i++) bytes[i] = bytes_of(x + 2 * i, inverses + 2 * i);
    for (int64_t i = 0, row = 0, step = sixteen->step; i < used; i++) {
        int8_t *to = (int8_t *)rounding->records + step * rounding->shape.bytes + rounding->shape.numbers_at;
        _mm256_storeu_si256((__m256i *)(to + row * OV_STEP), ((const __m256i *)bytes)[i]);
        if (++row == count) row = 0, step++;
    }
    sums_of(bytes, fields + 1 + OV_NUM_SUMS);
    fields[0] = _mm512_castps_si512(scale);
    for (int i = 0; i < OV_NUM_SUMS; i++)
        fields[1 + i] =
            _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(fields[1 + OV_NUM_SUMS + i]), scale));
    put_fields(rounding, sixteen, fields);
}

/* As many steps as fill sixteens; returns how many. */
static int64_t round_sixteens(const Rounding *rounding) {
    Sixteen sixteen = {.times = 16 / rounding->count};
    for (int64_t i = 0; i < 16; i++) {
        const int64_t at = i < sixteen.times * rounding->count ? i : 0;
        sixteen.from[i] = rounding->from + at % rounding->count * rounding->stride + at / rounding->count * OV_STEP;
    }
    for (; sixteen.step + sixteen.times <= rounding->num_steps; sixteen.step += sixteen.times)
        round_sixteen(rounding, &sixteen);
    return sixteen.step;
}
#endif

/* Rows [first, last) of num_rows to their records; `first` starts a group. What is missing of a group stays as it is. */
static void arrange_integers(const OvOp *op, const OvMatrix *matrix, int64_t num_rows, int64_t first, int64_t last,
                             uint8_t *to) {
    Rounding rounding = {.stride = op->stride_a, .num_steps = matrix->num_steps, .shape = record_shape(num_rows)};
    for (; first < last; first += rounding.count) {
        rounding.count = ov_min(rounding.shape.rows, last - first);
        rounding.from = (const uint16_t *)op->a + first * op->stride_a;
        rounding.records = to + first / rounding.shape.rows * matrix->num_steps * rounding.shape.bytes;
        int64_t step = 0;
#ifdef OV_AVX512
        step = round_sixteens(&rounding);
#endif
        for (; step < matrix->num_steps; step++)
            for (int64_t row = 0; row < rounding.count; row++) round_step(&rounding, row, step);
    }
}
