/* Quantised tiles to bf16 with AVX-512: [16 outputs][32 inputs] in natural order.
 *
 * With 16 or 32 possible codes it is cheaper to compute each group's possible values, 16 at a time, and look the codes
 * up (vpermw: 32 look-ups into 32 values), than to convert code by code. */

/* What to look up for each input of an output. Only the five lowest bits count. */
OV_INLINE __m512i indices_of(OvCoding form, __m512i words, const uint8_t *high, int output) {
    const int shift = output % (16 / form.low_bits) * form.low_bits, bits = form.low_bits + form.high_bits;
    /* A shift to the right, as the upper half of a product: shifts have one port, which look-ups need too. */
    __m512i indices = shift != 0 ? _mm512_srli_epi16(words, (unsigned)shift) : words;
    if (bits == 4 && form.group == 32) return indices; /* the table does not care for the fifth bit */
    const __m512i mask = _mm512_set1_epi16((short)((1 << form.low_bits) - 1));
    /* Groups of 16 have a half of the table each: words 16-31 look into the upper one. */
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    if (form.group == 16 && bits <= 4) indices = _mm512_ternarylogic_epi32(indices, mask, half, 0xEA); /* a & b | c */
    else indices = _mm512_and_si512(indices, mask);
    if (form.high_bits == 1) {
        uint32_t set;
        memcpy(&set, high + 4 * output, 4);
        indices = _mm512_mask_add_epi16(indices, set, indices, _mm512_set1_epi16((short)(1 << form.low_bits)));
    } else if (form.high_bits == 2) {
        __m512i upper = _mm512_load_si512(high + output / 8 * 64);
        if (output % 8 != 0) upper = _mm512_srli_epi16(upper, (unsigned)(output % 8 * 2));
        upper = _mm512_and_si512(upper, _mm512_set1_epi16(3));
        indices = _mm512_or_si512(indices, _mm512_slli_epi16(upper, 4));
    }
    return indices;
}

OV_INLINE __m512i bf16_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

OV_INLINE __m512 scaled(__m512 codes, const OvScales *scales, int group, int output) {
    return _mm512_fmadd_ps(
        codes, _mm512_set1_ps(scales->scale[group][output]), _mm512_set1_ps(scales->offset[group][output]));
}

/* What the codes of an output stand for, where they have 5 bits or its groups are of 16. */
OV_INLINE __m512i table_of(OvCoding form, const OvScales *scales, int output) {
    const __m512 lane = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const bool fifth_bit = form.group == 32;
    const __m512 upper = fifth_bit ? _mm512_add_ps(lane, _mm512_set1_ps(16.0f)) : lane;
    return bf16_pair(scaled(lane, scales, 0, output), scaled(upper, scales, fifth_bit ? 0 : 1, output));
}

/* Tables of 16 values for all outputs, made two at a time. Read from memory, a table fills both halves of a register
   at the cost of the load, and the fifth bit of an index may be anything. */
OV_INLINE void small_tables(const OvScales *scales, __m256i tables[OV_PANEL]) {
    const __m512 lane = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    OV_UNROLL
    for (int output = 0; output < OV_PANEL; output += 2)
        _mm512_store_si512(
            tables + output, bf16_pair(scaled(lane, scales, 0, output), scaled(lane, scales, 0, output + 1)));
    __asm__ volatile("" : "+m"(*(__m256i(*)[OV_PANEL])tables));
}

/* The same without a table: for codes of 6 bits. */
OV_INLINE __m512i converted(__m512i codes, const OvScales *scales, int output) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1)));
    return bf16_pair(scaled(low, scales, 0, output), scaled(high, scales, 1, output));
}

OV_INLINE __m512i values_of_bytes(const uint8_t *codes, float scale) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes + 1)));
    return bf16_pair(_mm512_mul_ps(low, _mm512_set1_ps(scale)), _mm512_mul_ps(high, _mm512_set1_ps(scale)));
}

OV_INLINE void quantised_tile_bf16(OvCoding form, const OvSegment *segment, const uint8_t *panel, int64_t step,
                                   void *to) {
    OvScales scales;
    __m512i *out = to;
    read_scales(form, segment, panel, step, &scales);
    const uint8_t *codes =
        panel + segment->codes_at + step * (OV_PANEL * OV_STEP * (form.low_bits + form.high_bits) / 8);
    const uint8_t *high = codes + OV_PANEL * OV_STEP * form.low_bits / 8;
    if (form.low_bits == 8) {
        OV_UNROLL
        for (int output = 0; output < OV_PANEL; output++)
            _mm512_store_si512(out + output, values_of_bytes(codes + output * OV_STEP, scales.scale[0][output]));
        return;
    }
    const int per_word = 16 / form.low_bits;
    const bool small = form.group == 32 && form.low_bits + form.high_bits == 4;
    __m256i tables[OV_PANEL] __attribute__((aligned(64)));
    if (small) small_tables(&scales, tables);
    OV_UNROLL
    for (int output = 0; output < OV_PANEL; output++) {
        __m512i words = _mm512_load_si512(codes + output / per_word * 64), values;
        __m512i indices = indices_of(form, words, high, output);
        if (form.high_bits == 2) values = converted(indices, &scales, output);
        else if (!small) values = _mm512_permutexvar_epi16(indices, table_of(form, &scales, output));
        else values = _mm512_permutexvar_epi16(indices, _mm512_broadcast_i64x4(tables[output]));
        _mm512_store_si512(out + output, values);
    }
}
