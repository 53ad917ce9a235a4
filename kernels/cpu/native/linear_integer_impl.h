/* Products of rows with quantised matrices in integers: codes as they are stored, and rows rounded to 8 bits, every 32
 * inputs with a scale of their own (as llama.cpp does with its Q8_1). Nothing is dequantised. Serves the working type
 * bf16.
 *
 * The sum of a group of inputs (32 of them, or 16 where the encoding has a scale for so many) is exact, so it does not
 * matter in which order or by which instruction it is made. Sums of groups are scaled and added in fp32, in the order of
 * the inputs, each output in its own lane. */

enum {
    OV_RECORD_ROWS = 16,    /* of a record, at most */
    OV_FEW_ROWS = 10,       /* up to so many are better off without tiles */
    OV_ROW_LARGEST = 127,
    /* Rows share the work of taking codes apart, panels that of reading numbers; more of either was no faster, for want
     * of registers. */
#ifdef OV_AMX
    OV_ROWS_AT_ONCE = 8,
    OV_PANELS_AT_ONCE = 1,
#elif defined(OV_AVX512)
    OV_ROWS_AT_ONCE = 4,
    OV_PANELS_AT_ONCE = 2,
#else
#ifdef __AVXVNNI__
    OV_ROWS_AT_ONCE = 4,
#else
    OV_ROWS_AT_ONCE = 2,
#endif
    OV_PANELS_AT_ONCE = 1,
#endif
};

/* Which inputs of a step a sum is of. */
enum { OV_WHOLE = 0, OV_HALF = 1, OV_NUM_SUMS = 3, OV_NUM_FIELDS = 1 + 2 * OV_NUM_SUMS };

/* Rows in integers lie in groups of up to 16; of each group and step a record:
 *
 *     fp32  scale [rows]
 *     fp32  sum   [OV_NUM_SUMS][rows]   of its numbers, scaled: for offsets of the encoding
 *     int32 sum   [OV_NUM_SUMS][rows]   of its numbers: for codes that do not begin at 0
 *     int8  numbers [rows][32]          from the next multiple of 64 bytes on
 */
typedef struct {
    int64_t rows, numbers_at, bytes;
} RecordShape;

static RecordShape record_shape(int64_t num_rows) {
    const int64_t rows = num_rows > OV_FEW_ROWS ? OV_RECORD_ROWS : num_rows;
    const int64_t numbers_at = ov_ceil_div(OV_NUM_FIELDS * 4 * rows, 64) * 64;
    return (RecordShape){rows, numbers_at, ov_ceil_div(numbers_at + rows * OV_STEP, 64) * 64};
}

/* Bytes of so many rows. */
static int64_t records_bytes(const OvMatrix *matrix, int64_t num_rows) {
    const RecordShape shape = record_shape(num_rows);
    return num_rows == 0 ? 0 : ov_ceil_div(num_rows, shape.rows) * matrix->num_steps * shape.bytes;
}

OV_INLINE float *record_scale(uint8_t *record, int64_t row) { return (float *)record + row; }
OV_INLINE float *record_scaled_sum(uint8_t *record, int64_t rows, int which, int64_t row) {
    return (float *)record + (1 + which) * rows + row;
}
OV_INLINE int32_t *record_sum(uint8_t *record, int64_t rows, int which, int64_t row) {
    return (int32_t *)record + (1 + OV_NUM_SUMS + which) * rows + row;
}

static bool in_integers(const OvSegment *segment, OvType type) {
    return type == OV_BF16 && OV_CODINGS[segment->encoding].group != 0;
}

#include "linear_rounding_impl.h"

/* --------------------------------------------------------------------------------------------------------- products */

/* A panel's exact sums as they grow: a lane for each output. They are made of parts, each of the products of a few lines
 * of codes. `four`: numbers of the four inputs that a line is about. */
#ifdef OV_AVX512
typedef __m512i Exact;
typedef __m512i Part;
OV_INLINE int lines_of_part(OvCoding form) { return form.group / 4; }
OV_INLINE Part part_zero(void) { return _mm512_setzero_si512(); }
OV_INLINE Part part_add(OvCoding form, Part sums, OvLine codes, int32_t four) {
    (void)form;
    return _mm512_dpbusd_epi32(sums, (__m512i)codes, _mm512_set1_epi32(four));
}
OV_INLINE Exact exact_of(OvCoding form, Part part) {
    (void)form;
    return part;
}
OV_INLINE Exact exact_add(Exact a, Exact b) { return _mm512_add_epi32(a, b); }
OV_INLINE V16 exact_value(OvCoding form, Exact sums, int32_t sum_of_row) {
    if (form.zero != 0) sums = _mm512_sub_epi32(sums, _mm512_set1_epi32(form.zero * sum_of_row));
    return _mm512_cvtepi32_ps(sums);
}
#else
typedef struct {
    __m256i low, high;
} Exact;
#ifdef __AVXVNNI__
typedef Exact Part;
OV_INLINE int lines_of_part(OvCoding form) { return form.group / 4; }
OV_INLINE Part part_zero(void) { return (Part){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
OV_INLINE Part part_add(OvCoding form, Part sums, OvLine codes, int32_t four) {
    (void)form;
    const __m256i numbers = _mm256_set1_epi32(four);
    return (Part){_mm256_dpbusd_avx_epi32(sums.low, codes.half[0], numbers),
                  _mm256_dpbusd_avx_epi32(sums.high, codes.half[1], numbers)};
}
OV_INLINE Exact exact_of(OvCoding form, Part part) {
    (void)form;
    return part;
}
#else
/* Sums of pairs in 16 bits, of as many lines as cannot overflow them: a number has up to 127, so a pair of codes with
 * all bits set takes 254 times as much. Codes of 8 bits are taken in two parts of 4. */
typedef struct {
    __m256i pairs[2], upper[2]; /* of outputs 0-7 and 8-15; of the upper four bits of 8 */
} Part;
OV_INLINE int lines_of_part(OvCoding form) {
    const int bits = form.low_bits == 8 ? 4 : form.low_bits + form.high_bits;
    return (int)ov_min(form.group / 4, bits <= 4 ? 8 : bits == 5 ? 4 : 2);
}
OV_INLINE Part part_zero(void) {
    const __m256i zero = _mm256_setzero_si256();
    return (Part){{zero, zero}, {zero, zero}};
}
OV_INLINE Part part_add(OvCoding form, Part part, OvLine codes, int32_t four) {
    const __m256i numbers = _mm256_set1_epi32(four), nibble = _mm256_set1_epi8(15);
    OV_UNROLL
    for (int i = 0; i < 2; i++) {
        __m256i low = codes.half[i];
        if (form.low_bits == 8) {
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble);
            part.upper[i] = _mm256_add_epi16(part.upper[i], _mm256_maddubs_epi16(high, numbers));
            low = _mm256_and_si256(low, nibble);
        }
        part.pairs[i] = _mm256_add_epi16(part.pairs[i], _mm256_maddubs_epi16(low, numbers));
    }
    return part;
}
OV_INLINE __m256i fours_of(OvCoding form, Part part, int i) {
    const __m256i fours = _mm256_madd_epi16(part.pairs[i], _mm256_set1_epi16(1));
    if (form.low_bits < 8) return fours;
    return _mm256_add_epi32(fours, _mm256_madd_epi16(part.upper[i], _mm256_set1_epi16(16)));
}
OV_INLINE Exact exact_of(OvCoding form, Part part) { return (Exact){fours_of(form, part, 0), fours_of(form, part, 1)}; }
#endif
OV_INLINE Exact exact_add(Exact a, Exact b) {
    return (Exact){_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
OV_INLINE V16 exact_value(OvCoding form, Exact sums, int32_t sum_of_row) {
    const __m256i below = _mm256_set1_epi32(form.zero * sum_of_row);
    return (V16){_mm256_cvtepi32_ps(_mm256_sub_epi32(sums.low, below)),
                 _mm256_cvtepi32_ps(_mm256_sub_epi32(sums.high, below))};
}
#endif

/* A row's sums of 16 outputs go on by one group of inputs, whose exact sums are `value`. */
OV_INLINE V16 add_scaled(OvCoding form, V16 sums, V16 value, V16 scale, V16 offset, uint8_t *record, int64_t width,
                         int which, int64_t row) {
    sums = v16_fma(value, v16_mul(scale, v16_set(*record_scale(record, row))), sums);
    if (form.offsets) sums = v16_fma(offset, v16_set(*record_scaled_sum(record, width, which, row)), sums);
    return sums;
}

/* Some rows of a group in integers. */
typedef struct {
    uint8_t *record; /* of the first step */
    RecordShape shape;
    int64_t first; /* of the rows, in their group */
    int64_t row;   /* the same, in the step */
} Rows;

/* Some panels at a step, and their number, a constant. */
typedef struct {
    const OvSegment *segment;
    int count;
    int64_t step;
    const uint8_t *panel[OV_PANELS_AT_ONCE], *codes[OV_PANELS_AT_ONCE]; /* of the step */
} Place;

/* The products of `num_lines` lines of codes from `first` on, and `count` rows. */
OV_INLINE void make_parts(OvCoding form, const Place *place, int first, int num_lines, const uint8_t *numbers, int count,
                          Part parts[OV_PANELS_AT_ONCE][OV_ROWS_AT_ONCE]) {
    OV_UNROLL
    for (int p = 0; p < place->count; p++) {
        OV_UNROLL
        for (int r = 0; r < count; r++) parts[p][r] = part_zero();
    }
    OV_UNROLL
    for (int j = first; j < first + num_lines; j++) {
        OvLine line[OV_PANELS_AT_ONCE];
        OV_UNROLL
        for (int p = 0; p < place->count; p++) line[p] = read_line(form, place->codes[p], j);
        OV_UNROLL
        for (int r = 0; r < count; r++) {
            int32_t four;
            memcpy(&four, numbers + r * OV_STEP + 4 * j, 4);
            OV_UNROLL
            for (int p = 0; p < place->count; p++) parts[p][r] = part_add(form, parts[p][r], line[p], four);
        }
    }
}

/* One group of inputs of a step, times `count` rows, onto their sums. */
OV_INLINE void add_group(OvCoding form, const Place *place, int group, const Rows *rows, uint8_t *record, int count,
                         V16 sums[OV_PANELS_AT_ONCE][OV_ROWS_AT_ONCE]) {
    const int lines = form.group / 4, which = form.group == OV_STEP ? OV_WHOLE : OV_HALF + group;
    const int64_t width = rows->shape.rows;
    const uint8_t *numbers = record + rows->shape.numbers_at + rows->first * OV_STEP;
    Exact exact[OV_PANELS_AT_ONCE][OV_ROWS_AT_ONCE];
    OV_UNROLL
    for (int at = 0; at < lines; at += lines_of_part(form)) {
        Part parts[OV_PANELS_AT_ONCE][OV_ROWS_AT_ONCE];
        make_parts(form, place, group * lines + at, lines_of_part(form), numbers, count, parts);
        OV_UNROLL
        for (int p = 0; p < place->count; p++) {
            OV_UNROLL
            for (int r = 0; r < count; r++) {
                const Exact part = exact_of(form, parts[p][r]);
                exact[p][r] = at == 0 ? part : exact_add(exact[p][r], part);
            }
        }
    }
    OV_UNROLL
    for (int p = 0; p < place->count; p++) {
        V16 scale, offset;
        read_group(form, place->segment, place->panel[p], place->step, group, &scale, &offset);
        OV_UNROLL
        for (int r = 0; r < count; r++) {
            const int64_t row = rows->first + r;
            const V16 value = exact_value(form, exact[p][r], *record_sum(record, width, which, row));
            sums[p][r] = add_scaled(form, sums[p][r], value, scale, offset, record, width, which, row);
        }
    }
}

/* Some panels times `count` rows; both counts are constants. */
OV_INLINE void integer_rows_of(OvCoding form, const Product *product, Panels panels, const Rows *rows, int count,
                               Fetch *fetch) {
    Place place = {.segment = panels.segment, .count = panels.count};
    uint8_t *record = rows->record;
    V16 sums[OV_PANELS_AT_ONCE][OV_ROWS_AT_ONCE];
    OV_UNROLL
    for (int p = 0; p < panels.count; p++) {
        place.panel[p] = ov_panel(panels.segment, panels.panel + p);
        place.codes[p] = step_codes(form, panels.segment, place.panel[p], 0);
        OV_UNROLL
        for (int r = 0; r < count; r++) {
            sums[p][r] = v16_zero();
            fetch_output(product, panels.segment, panels.panel + p, rows->row + r);
        }
    }
    for (; place.step < product->matrix->num_steps; place.step++, record += rows->shape.bytes) {
        fetch_step(fetch);
        OV_UNROLL
        for (int group = 0; group < OV_STEP / form.group; group++)
            add_group(form, &place, group, rows, record, count, sums);
        OV_UNROLL
        for (int p = 0; p < panels.count; p++)
            place.codes[p] += OV_PANEL * OV_STEP * (form.low_bits + form.high_bits) / 8;
    }
    OV_UNROLL
    for (int p = 0; p < panels.count; p++) {
        OV_UNROLL
        for (int r = 0; r < count; r++) finish_row(product, panels.segment, panels.panel + p, rows->row + r, sums[p][r]);
    }
}

#ifdef OV_AMX
#include "linear_integer_amx_impl.h"
#endif

/* How often so many rows pass a panel while what comes next is asked for. */
static int64_t fetching_passes(int64_t num_rows) {
#ifdef OV_AMX
    (void)num_rows;
    return 1;
#else
    return ov_ceil_div(num_rows, OV_ROWS_AT_ONCE);
#endif
}

/* Some panels times rows [row, last), the first of which starts a record. */
OV_INLINE void integer_panels_of(OvCoding form, const Product *product, Panels panels, int64_t row, int64_t last,
                                 Fetch *fetch) {
    Rows rows = {.shape = record_shape(product->num_rows)};
    const int64_t record_bytes = product->matrix->num_steps * rows.shape.bytes;
    int64_t passes = fetching_passes(last - row);
    Fetch none = {0};
    for (int64_t count; row < last; row += count, fetch = --passes > 0 ? fetch : &none) {
        rows.record = (uint8_t *)product->records + row / rows.shape.rows * record_bytes;
        rows.first = row % rows.shape.rows;
        rows.row = row;
#ifdef OV_AMX
        count = ov_min(OV_RECORD_ROWS, last - row);
        if (rows.first == 0 && count > OV_FEW_ROWS) {
            const bool unpacked = fetch == &none, along = !unpacked && last - row <= OV_UNPACKED_ALONG;
            if (!unpacked && !along) unpack_steps(form, product, panels.segment, panels.panel, product->matrix->num_steps);
            if (along) integer_tiles(form, product, panels.segment, panels.panel, &rows, count, true, fetch);
            else integer_tiles(form, product, panels.segment, panels.panel, &rows, count, false, fetch);
            continue;
        }
#endif
        count = ov_min(OV_ROWS_AT_ONCE, last - row);
#define OV_ROWS_CASE(n) \
    case n: integer_rows_of(form, product, panels, &rows, n, fetch); break;
        switch (count) {
            OV_ROWS_CASE(1)
            OV_ROWS_CASE(2)
#if defined(OV_AVX512) || defined(__AVXVNNI__)
            OV_ROWS_CASE(3)
            OV_ROWS_CASE(4)
#endif
#ifdef OV_AMX
            OV_ROWS_CASE(5)
            OV_ROWS_CASE(6)
            OV_ROWS_CASE(7)
            OV_ROWS_CASE(8)
#endif
        default: break;
        }
#undef OV_ROWS_CASE
    }
}

typedef void (*IntegerPanels)(const Product *, Panels, int64_t row, int64_t last, Fetch *);

/* By encoding, apart so that each has its own registers. Panels are one or OV_PANELS_AT_ONCE. */
#define OV_INTEGER_PANELS_OF(name) \
    static __attribute__((noinline)) void name##_panels(const Product *product, Panels panels, int64_t row, \
                                                        int64_t last, Fetch *fetch) { \
        const OvCoding form = OV_CODINGS[OV_ENC_##name]; \
        const Panels one = {panels.segment, panels.panel, 1}, all = {panels.segment, panels.panel, OV_PANELS_AT_ONCE}; \
        if (OV_PANELS_AT_ONCE == 1 || panels.count == 1) integer_panels_of(form, product, one, row, last, fetch); \
        else integer_panels_of(form, product, all, row, last, fetch); \
    }
OV_INTEGER_PANELS_OF(Q4_0)
OV_INTEGER_PANELS_OF(Q4_1)
OV_INTEGER_PANELS_OF(Q5_0)
OV_INTEGER_PANELS_OF(Q5_1)
OV_INTEGER_PANELS_OF(Q8_0)
OV_INTEGER_PANELS_OF(Q2_K)
OV_INTEGER_PANELS_OF(Q3_K)
OV_INTEGER_PANELS_OF(Q4_K)
OV_INTEGER_PANELS_OF(Q5_K)
OV_INTEGER_PANELS_OF(Q6_K)

/* NULL for dense encodings. */
static const IntegerPanels OV_INTEGER_PANELS[OV_NUM_ENCODINGS] = {
    [OV_ENC_Q4_0] = Q4_0_panels, [OV_ENC_Q4_1] = Q4_1_panels, [OV_ENC_Q5_0] = Q5_0_panels,
    [OV_ENC_Q5_1] = Q5_1_panels, [OV_ENC_Q8_0] = Q8_0_panels, [OV_ENC_Q2_K] = Q2_K_panels,
    [OV_ENC_Q3_K] = Q3_K_panels, [OV_ENC_Q4_K] = Q4_K_panels, [OV_ENC_Q5_K] = Q5_K_panels,
    [OV_ENC_Q6_K] = Q6_K_panels,
};
