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
#ifdef OV_AVX512
    OV_ROWS_AT_ONCE = 8,    /* share the work of taking codes apart, and fit registers */
#else
    OV_ROWS_AT_ONCE = 2,
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

/* A panel's exact sums as they grow: a lane for each output. */
#ifdef OV_AVX512
typedef __m512i Exact;
OV_INLINE Exact exact_zero(void) { return _mm512_setzero_si512(); }
/* four: numbers of four inputs */
OV_INLINE Exact exact_add(OvCoding form, Exact sums, const OvLine *codes, int32_t four) {
    (void)form;
    return _mm512_dpbusd_epi32(sums, (__m512i)*codes, _mm512_set1_epi32(four));
}
OV_INLINE V16 exact_value(OvCoding form, Exact sums, int32_t sum_of_row) {
    if (form.zero != 0) sums = _mm512_sub_epi32(sums, _mm512_set1_epi32(form.zero * sum_of_row));
    return _mm512_cvtepi32_ps(sums);
}
#else
typedef struct {
    __m256i low, high;
} Exact;
OV_INLINE Exact exact_zero(void) { return (Exact){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
/* Pairs of products in 16 bits, which saturate where codes have more than 7: those are taken in two parts. */
OV_INLINE __m256i fours_of(OvCoding form, __m256i codes, __m256i numbers) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (form.low_bits < 8) return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, numbers), ones);
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), numbers);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), numbers);
    return _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
OV_INLINE Exact exact_add(OvCoding form, Exact sums, const OvLine *codes, int32_t four) {
    const __m256i *half = (const __m256i *)codes, numbers = _mm256_set1_epi32(four);
    return (Exact){_mm256_add_epi32(sums.low, fours_of(form, half[0], numbers)),
                   _mm256_add_epi32(sums.high, fours_of(form, half[1], numbers))};
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

/* One group of inputs of a step, times `count` rows, onto their sums. */
OV_INLINE void add_group(OvCoding form, const uint8_t *codes, int group, V16 scale, V16 offset, const Rows *rows,
                         uint8_t *record, int count, V16 sums[OV_ROWS_AT_ONCE]) {
    const int lines = form.group / 4, which = form.group == OV_STEP ? OV_WHOLE : OV_HALF + group;
    const int64_t width = rows->shape.rows;
    const uint8_t *numbers = record + rows->shape.numbers_at + rows->first * OV_STEP;
    Exact exact[OV_ROWS_AT_ONCE];
    OV_UNROLL
    for (int r = 0; r < count; r++) exact[r] = exact_zero();
    OV_UNROLL
    for (int j = group * lines; j < (group + 1) * lines; j++) {
        OvLine line;
        read_line(form, codes, j, &line);
        OV_UNROLL
        for (int r = 0; r < count; r++) {
            int32_t four;
            memcpy(&four, numbers + r * OV_STEP + 4 * j, 4);
            exact[r] = exact_add(form, exact[r], &line, four);
        }
    }
    OV_UNROLL
    for (int r = 0; r < count; r++) {
        const int64_t row = rows->first + r;
        const V16 value = exact_value(form, exact[r], *record_sum(record, width, which, row));
        sums[r] = add_scaled(form, sums[r], value, scale, offset, record, width, which, row);
    }
}

/* A panel times `count` rows, a constant. */
OV_INLINE void integer_rows_of(OvCoding form, const Product *product, const OvSegment *segment, int64_t panel,
                               const Rows *rows, int count, Fetch *fetch) {
    const uint8_t *from = ov_panel(segment, panel);
    uint8_t *record = rows->record;
    V16 sums[OV_ROWS_AT_ONCE];
    OV_UNROLL
    for (int r = 0; r < count; r++) sums[r] = v16_zero();
    for (int64_t step = 0; step < product->matrix->num_steps; step++, record += rows->shape.bytes) {
        fetch_step(fetch);
        const uint8_t *codes = step_codes(form, segment, from, step);
        V16 scale, offset;
        read_group(form, segment, from, step, 0, &scale, &offset);
        add_group(form, codes, 0, scale, offset, rows, record, count, sums);
        if (form.group == OV_STEP) continue;
        read_group(form, segment, from, step, 1, &scale, &offset);
        add_group(form, codes, 1, scale, offset, rows, record, count, sums);
    }
    OV_UNROLL
    for (int r = 0; r < count; r++) finish_row(product, segment, panel, rows->row + r, sums[r]);
}

#ifdef OV_AMX
#include "linear_integer_amx_impl.h"
#endif

/* A panel times rows [row, last), the first of which starts a record. */
OV_INLINE void integer_panel_of(OvCoding form, const Product *product, const OvSegment *segment, int64_t panel,
                                int64_t row, int64_t last, Fetch *fetch) {
    Rows rows = {.shape = record_shape(product->num_rows)};
    const int64_t record_bytes = product->matrix->num_steps * rows.shape.bytes;
    Fetch none = {0};
    for (int64_t count; row < last; row += count, fetch = &none) {
        rows.record = (uint8_t *)product->records + row / rows.shape.rows * record_bytes;
        rows.first = row % rows.shape.rows;
        rows.row = row;
#ifdef OV_AMX
        count = ov_min(OV_RECORD_ROWS, last - row);
        if (rows.first == 0 && count > OV_FEW_ROWS) {
            const bool unpacked = fetch == &none, along = !unpacked && last - row <= OV_UNPACKED_ALONG;
            if (!unpacked && !along) unpack_steps(form, product, segment, panel, product->matrix->num_steps);
            if (along) integer_tiles(form, product, segment, panel, &rows, count, true, fetch);
            else integer_tiles(form, product, segment, panel, &rows, count, false, fetch);
            continue;
        }
#endif
        count = ov_min(OV_ROWS_AT_ONCE, last - row);
#define OV_ROWS_CASE(n) \
    case n: integer_rows_of(form, product, segment, panel, &rows, n, fetch); break;
        switch (count) {
            OV_ROWS_CASE(1)
            OV_ROWS_CASE(2)
#ifdef OV_AVX512
            OV_ROWS_CASE(3)
            OV_ROWS_CASE(4)
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

typedef void (*IntegerPanel)(const Product *, const OvSegment *, int64_t panel, int64_t row, int64_t last, Fetch *);

/* By encoding, apart so that each has its own registers. */
#define OV_INTEGER_PANEL(name) \
    static __attribute__((noinline)) void name##_panel(const Product *product, const OvSegment *segment, \
                                                       int64_t panel, int64_t row, int64_t last, Fetch *fetch) { \
        integer_panel_of(OV_CODINGS[OV_ENC_##name], product, segment, panel, row, last, fetch); \
    }
OV_INTEGER_PANEL(Q4_0)
OV_INTEGER_PANEL(Q4_1)
OV_INTEGER_PANEL(Q5_0)
OV_INTEGER_PANEL(Q5_1)
OV_INTEGER_PANEL(Q8_0)
OV_INTEGER_PANEL(Q2_K)
OV_INTEGER_PANEL(Q3_K)
OV_INTEGER_PANEL(Q4_K)
OV_INTEGER_PANEL(Q5_K)
OV_INTEGER_PANEL(Q6_K)

/* NULL for dense encodings. */
static const IntegerPanel OV_INTEGER_PANELS[OV_NUM_ENCODINGS] = {
    [OV_ENC_Q4_0] = Q4_0_panel, [OV_ENC_Q4_1] = Q4_1_panel, [OV_ENC_Q5_0] = Q5_0_panel, [OV_ENC_Q5_1] = Q5_1_panel,
    [OV_ENC_Q8_0] = Q8_0_panel, [OV_ENC_Q2_K] = Q2_K_panel, [OV_ENC_Q3_K] = Q3_K_panel, [OV_ENC_Q4_K] = Q4_K_panel,
    [OV_ENC_Q5_K] = Q5_K_panel, [OV_ENC_Q6_K] = Q6_K_panel,
};
