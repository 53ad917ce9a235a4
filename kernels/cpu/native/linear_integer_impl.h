/* The product of one row with a quantised matrix in integers: codes as they are, and the row rounded to 16 bits, of
 * which every 32 inputs have a scale of their own. Nothing is dequantised, which is cheaper for a single row; with more
 * rows dequantising pays for itself. It rounds otherwise than the other products do, so it serves only where it was
 * asked for (n[1] of OV_LINEAR).
 *
 * Sums of a step are exact; they are scaled and added up in fp32, the inputs in order, in a fixed number of lanes. */

/* Below this a step counts as zeros: dividing by it would overflow. */
#define OV_SMALLEST 1e-30f

static IntegerRow integer_row_at(const OvMatrix *matrix, uint8_t *room) {
    float *scales = (float *)(room + matrix->num_steps * 2 * OV_STEP);
    return (IntegerRow){(int16_t *)room, scales, scales + matrix->num_steps};
}

OV_INLINE void put_words(int16_t *to, V16 whole) {
#ifdef OV_AVX512
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(whole)));
#else
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(whole.low), _mm256_cvtps_epi32(whole.high));
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(words, 0xD8));
#endif
}

static void round_row(const OvOp *op, const OvMatrix *matrix, OvType type, IntegerRow row) {
    const int bf16 = type == OV_BF16;
    for (int64_t step = 0; step < matrix->num_steps; step++) {
        const int count = (int)ov_min(OV_STEP, matrix->num_inputs - step * OV_STEP);
        V16 half[2] = {v16_zero(), v16_zero()};
        for (int i = 0; i < 2; i++) {
            const int part = (int)ov_min(16, count - 16 * i);
            if (part > 0) half[i] = v16_get(op->a, step * OV_STEP + 16 * i, part, bf16);
        }
        /* 0, or a NaN where an input is not finite: comparing would lose it. */
        const float poison = v16_sum(v16_mul(v16_add(v16_abs(half[0]), v16_abs(half[1])), v16_zero()));
        const float largest = v16_largest(v16_max(v16_abs(half[0]), v16_abs(half[1])));
        const bool some = largest > OV_SMALLEST;
        const float scale = (some ? largest / 32767.0f : 0.0f) + poison;
        for (int i = 0; i < 2; i++) {
            V16 whole = v16_round(v16_mul(half[i], v16_set(some ? 32767.0f / largest : 0.0f)));
            put_words(row.codes + step * OV_STEP + 16 * i, whole);
            row.sums[2 * step + i] = v16_sum(whole) * scale;
        }
        row.scales[step] = scale;
    }
}

#ifdef OV_AVX512
enum { OV_INTEGER_OUTPUTS = 16 }; /* whose sums fit into registers */
typedef __m512i Words; /* of 32 inputs */
typedef __m512 Sums;
OV_INLINE Sums sums_zero(void) { return _mm512_setzero_ps(); }
OV_INLINE Words load_words(const void *p) { return _mm512_loadu_si512(p); }

/* Codes of one output. */
OV_INLINE Words words_of(OvCoding form, const uint8_t *codes, const uint8_t *high, int output) {
    if (form.low_bits == 8) return _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i *)(codes + output * OV_STEP)));
    const int per_word = 16 / form.low_bits, shift = output % per_word * form.low_bits;
    Words words = load_words(codes + output / per_word * 64);
    /* See indices_of. */
    if (shift != 0) words = _mm512_mulhi_epu16(words, _mm512_set1_epi16((short)(1 << (16 - shift))));
    words = _mm512_and_si512(words, _mm512_set1_epi16((short)((1 << form.low_bits) - 1)));
    if (form.high_bits == 1) {
        uint32_t set;
        memcpy(&set, high + 4 * output, 4);
        words = _mm512_mask_add_epi16(words, set, words, _mm512_set1_epi16((short)(1 << form.low_bits)));
    } else if (form.high_bits == 2) {
        Words upper = _mm512_srli_epi16(load_words(high + output / 8 * 64), (unsigned)(output % 8 * 2));
        words = _mm512_or_si512(words, _mm512_slli_epi16(_mm512_and_si512(upper, _mm512_set1_epi16(3)), 4));
    }
    return words;
}

OV_INLINE Sums add_scaled(OvCoding form, Sums sums, Words words, Words row, const OvScales *scales, int output) {
    const __m512 products = _mm512_cvtepi32_ps(_mm512_madd_epi16(words, row));
    __m512 scale = _mm512_set1_ps(scales->scale[0][output]);
    if (form.group == 16) scale = _mm512_mask_broadcastss_ps(scale, 0xff00, _mm_load_ss(&scales->scale[1][output]));
    return _mm512_fmadd_ps(products, scale, sums);
}

/* The sums of each of the 16 outputs' lanes. */
OV_INLINE void join_lanes(const Sums sums[16], float to[16]) {
    __m512 four[4];
    OV_UNROLL
    for (int i = 0; i < 4; i++) {
        const Sums *s = sums + 4 * i;
        __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
        __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
        __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    for (int i = 0; i < 4; i += 2) /* quarters 0 and 2 to 1 and 3 */
        four[i / 2] = _mm512_add_ps(_mm512_shuffle_f32x4(four[i], four[i + 1], 0x88),
                                    _mm512_shuffle_f32x4(four[i], four[i + 1], 0xdd));
    v16_store(to, _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                                _mm512_shuffle_f32x4(four[0], four[1], 0xdd)));
}
#else
enum { OV_INTEGER_OUTPUTS = 8 };
typedef struct {
    __m256i half[2];
} Words;
typedef __m256 Sums;
OV_INLINE Sums sums_zero(void) { return _mm256_setzero_ps(); }
OV_INLINE Words load_words(const void *p) {
    return (Words){{_mm256_loadu_si256(p), _mm256_loadu_si256((const __m256i *)p + 1)}};
}

OV_INLINE Words words_of(OvCoding form, const uint8_t *codes, const uint8_t *high, int output) {
    Words words;
    if (form.low_bits == 8) {
        const __m128i *bytes = (const __m128i *)(codes + output * OV_STEP);
        for (int i = 0; i < 2; i++) words.half[i] = _mm256_cvtepi8_epi16(_mm_load_si128(bytes + i));
        return words;
    }
    const int per_word = 16 / form.low_bits, shift = output % per_word * form.low_bits;
    const __m256i mask = _mm256_set1_epi16((short)((1 << form.low_bits) - 1));
    words = load_words(codes + output / per_word * 64);
    for (int i = 0; i < 2; i++) {
        words.half[i] = _mm256_and_si256(_mm256_srli_epi16(words.half[i], shift), mask);
        if (form.high_bits == 1) {
            uint16_t bits;
            memcpy(&bits, high + 4 * output + 2 * i, 2);
            const __m256i place = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
                                                    16384, (short)32768);
            __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16((short)bits), place), place);
            set = _mm256_and_si256(set, _mm256_set1_epi16((short)(1 << form.low_bits)));
            words.half[i] = _mm256_or_si256(words.half[i], set);
        } else if (form.high_bits == 2) {
            __m256i upper = _mm256_load_si256((const __m256i *)(high + output / 8 * 64) + i);
            upper = _mm256_and_si256(_mm256_srli_epi16(upper, output % 8 * 2), _mm256_set1_epi16(3));
            words.half[i] = _mm256_or_si256(words.half[i], _mm256_slli_epi16(upper, 4));
        }
    }
    return words;
}

OV_INLINE Sums add_scaled(OvCoding form, Sums sums, Words words, Words row, const OvScales *scales, int output) {
    __m256i low = _mm256_madd_epi16(words.half[0], row.half[0]), high = _mm256_madd_epi16(words.half[1], row.half[1]);
    const __m256 scale = _mm256_set1_ps(scales->scale[0][output]);
    if (form.group == 32) return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)), scale, sums);
    sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), scale, sums);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(scales->scale[1][output]), sums);
}

OV_INLINE void join_lanes(const Sums sums[8], float to[8]) {
    __m256 four[2];
    OV_UNROLL
    for (int i = 0; i < 2; i++) {
        const Sums *s = sums + 4 * i;
        four[i] = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    }
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                                       _mm256_permute2f128_ps(four[0], four[1], 0x31)));
}
#endif

/* Scales of a step times the row's, and what its offsets add to each output. Where it runs ahead of the last step, the
   row's last scale stands in for one that there is not. */
OV_INLINE V16 read_integer_scales(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step,
                                  const IntegerRow *row, int64_t last, OvScales *to) {
    V16 added = v16_zero();
    const int64_t at = ov_min(step, last);
    read_scales(form, segment, panel, step, to);
    for (int group = 0; group < OV_STEP / form.group; group++) {
        float sum = row->sums[2 * at + group];
        if (form.group == 32) sum += row->sums[2 * at + 1];
        if (form.offsets || form.zero != 0) added = v16_fma(v16_load(to->offset[group]), v16_set(sum), added);
        v16_store(to->scale[group], v16_mul(v16_load(to->scale[group]), v16_set(row->scales[at])));
    }
    __asm__ volatile("" : "+m"(*to));
    return added;
}

OV_INLINE void integer_panel_of(OvCoding form, const Product *product, const OvSegment *segment, int64_t panel,
                                const IntegerRow *row, const uint8_t *fetch, int64_t fetch_bytes) {
    const uint8_t *from = ov_panel(segment, panel);
    const int64_t num_steps = product->matrix->num_steps, last = num_steps - 1;
    const int64_t code_bytes = OV_PANEL * OV_STEP * (form.low_bits + form.high_bits) / 8;
    float joined[OV_PANEL] __attribute__((aligned(64)));
    V16 offsets = v16_zero();
    for (int first = 0; first < OV_PANEL; first += OV_INTEGER_OUTPUTS) {
        OvScales scales[2];
        Sums sums[OV_INTEGER_OUTPUTS];
        OV_UNROLL
        for (int i = 0; i < OV_INTEGER_OUTPUTS; i++) sums[i] = sums_zero();
        V16 added = read_integer_scales(form, segment, from, 0, row, last, &scales[0]), next;
        const uint8_t *codes = from + segment->codes_at;
        for (int64_t step = 0; step < num_steps; step++, codes += code_bytes, added = next) {
            for (int64_t i = 0; i < fetch_bytes; i += 64) _mm_prefetch((const char *)fetch + i, _MM_HINT_T0);
            fetch += fetch_bytes;
            next = read_integer_scales(form, segment, from, step + 1, row, last, &scales[(step + 1) & 1]);
            if (first == 0) offsets = v16_add(offsets, added);
            const Words x = load_words(row->codes + step * OV_STEP);
            const uint8_t *high = codes + OV_PANEL * OV_STEP * form.low_bits / 8;
            OV_UNROLL
            for (int i = 0; i < OV_INTEGER_OUTPUTS; i++)
                sums[i] = add_scaled(form, sums[i], words_of(form, codes, high, first + i), x, &scales[step & 1],
                                     first + i);
        }
        join_lanes(sums, joined + first);
        fetch_bytes = 0;
    }
    finish_row(product, segment, panel, 0, v16_add(v16_load(joined), offsets));
}

static void integer_panel(const Product *product, const OvSegment *segment, int64_t panel, const IntegerRow *row,
                          const uint8_t *fetch, int64_t fetch_bytes) {
#define OV_INTEGER_CASE(name) \
    case OV_ENC_##name: \
        integer_panel_of(OV_CODINGS[OV_ENC_##name], product, segment, panel, row, fetch, fetch_bytes); \
        break;
    switch (segment->encoding) {
        OV_INTEGER_CASE(Q4_0)
        OV_INTEGER_CASE(Q4_1)
        OV_INTEGER_CASE(Q5_0)
        OV_INTEGER_CASE(Q5_1)
        OV_INTEGER_CASE(Q8_0)
        OV_INTEGER_CASE(Q2_K)
        OV_INTEGER_CASE(Q3_K)
        OV_INTEGER_CASE(Q4_K)
        OV_INTEGER_CASE(Q5_K)
        OV_INTEGER_CASE(Q6_K)
    default: break; /* integers_serve refuses matrices that are not quantised */
    }
#undef OV_INTEGER_CASE
}
