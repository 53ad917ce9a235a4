/* Drawing a token from a row of logits, without sorting the vocabulary and without a copy of it.
 *
 * A draw is the arg max of temperature-scaled logits plus Gumbel noise over the tokens that min-p, top-k and top-p
 * keep. The noise is a hash of (seed, position, token), the one of model/random.py, so a draw depends on nothing else.
 * Written in the compiler's own vectors, as wide as the instruction set has them.
 */
#ifndef OCTAVO_SAMPLING_IMPL_H
#define OCTAVO_SAMPLING_IMPL_H

#include <math.h>
#include <string.h>

#include "octavo_cpu.h"
#include "sampling.h"

#ifdef __AVX512F__
#define OV_LANES 16
#else
#define OV_LANES 8
#endif

typedef float OvFloats __attribute__((vector_size(4 * OV_LANES)));
typedef int32_t OvInts __attribute__((vector_size(4 * OV_LANES)));
typedef uint32_t OvUints __attribute__((vector_size(4 * OV_LANES)));

static inline OvFloats ov_splat(float x) { return (OvFloats){0} + x; }

static inline OvFloats ov_select(OvInts mask, OvFloats yes, OvFloats no) {
    return (OvFloats)((mask & (OvInts)yes) | (~mask & (OvInts)no));
}

static inline int ov_any(OvInts mask) {
    uint64_t words[OV_LANES / 2], any = 0;
    memcpy(words, &mask, sizeof words);
    for (int word = 0; word < OV_LANES / 2; word++) any |= words[word];
    return any != 0;
}

/* Natural logarithm of positive normal numbers; Cephes' logf (Moshier). */
static inline OvFloats ov_log(OvFloats x) {
    OvInts bits = (OvInts)x;
    OvInts exponent = ((bits >> 23) & 0xFF) - 126;
    OvFloats m = (OvFloats)((bits & 0x007FFFFF) | 0x3F000000); /* [0.5, 1) */
    OvInts low = m < 0.70710678f;
    exponent += low; /* a true lane is -1 */
    m = m + ov_select(low, m, ov_splat(0.0f)) - 1.0f;
    OvFloats e = __builtin_convertvector(exponent, OvFloats), z = m * m;
    OvFloats y = ov_splat(7.0376836292e-2f);
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
    return m + y + e * 0.693359375f;
}

/* e to the x; 0 from -87 down, finite from 88 up. Cephes' expf. NaN for NaN. */
static inline OvFloats ov_exp(OvFloats x) {
    OvInts tiny = x < -87.0f, nan = x != x;
    OvFloats bounded = ov_select(tiny | nan, ov_splat(0.0f), ov_select(x > 88.0f, ov_splat(88.0f), x));
    OvFloats t = bounded * 1.44269504088896341f;
    OvInts n = __builtin_convertvector(t + ov_select(t < 0.0f, ov_splat(-0.5f), ov_splat(0.5f)), OvInts);
    OvFloats whole = __builtin_convertvector(n, OvFloats);
    OvFloats r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    OvFloats y = ov_splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    OvFloats result = y * (OvFloats)((n + 127) << 23);
    return ov_select(nan, x, ov_select(tiny, ov_splat(0.0f), result));
}

/* Never less than the lesser of 1 and e to the x, and up to 1.07 times it: the line between powers of two, through the
 * bits of a float (Schraudolph 1999). */
static inline OvFloats ov_exp_bound(OvFloats x) {
    x = ov_select(x < 0.0f, x, ov_splat(0.0f));
    OvFloats t = ov_select(x > -80.0f, x, ov_splat(-80.0f)) * (float)(0x1p23 * 1.44269504088896341);
    return (OvFloats)(__builtin_convertvector(t, OvInts) + (127 << 23)) * 1.0001f;
}

static inline uint64_t ov_splitmix64(uint64_t value) { /* Steele, Lea and Flood 2014 */
    value += 0x9E3779B97F4A7C15u;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

/* Uniform variates in (0, 1) of the tokens from `first` on: what model/random.py takes the logarithms of. */
static inline OvFloats ov_uniform(uint64_t key, uint32_t first) {
    OvUints x;
    for (uint32_t lane = 0; lane < OV_LANES; lane++) x[lane] = first + lane;
    x = (x ^ (x >> 16)) * 0x7FEB352Du; /* lowbias32 (Wellons) of the token */
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    x = (x ^ (uint32_t)key) * 0x7FEB352Du;
    x ^= x >> 16;
    x = (x ^ (uint32_t)(key >> 32)) * 0x846CA68Bu;
    x ^= x >> 16;
    OvFloats bits = __builtin_convertvector((OvInts)(x & 0x7FFFFFFFu), OvFloats);
    /* The last factor keeps this below 1 where the bits round up to 2**31. */
    return (bits + 0.5f) * (float)(0x1p-31 * (1 - 0x1p-24));
}

/* Standard Gumbel variates of uniform ones: -log(-log(1 - u)). */
static inline OvFloats ov_gumbel(OvFloats u) {
    OvFloats w = 1.0f - u;
    OvInts same = w == 1.0f;
    /* Kahan: the rounding of 1 - u cancels. */
    OvFloats log1p = ov_select(same, -u, ov_log(w) * (-u / ov_select(same, ov_splat(1.0f), w - 1.0f)));
    return -ov_log(-log1p);
}

/* A vector of logits from `first` on, -inf beyond the vocabulary. */
static inline OvFloats ov_logits(const float *row, int64_t first, int64_t vocab) {
    OvFloats x;
    if (first + OV_LANES <= vocab) {
        memcpy(&x, row + first, sizeof x);
        return x;
    }
    x = ov_splat(-INFINITY);
    memcpy(&x, row + first, (size_t)(vocab - first) * sizeof(float));
    return x;
}

/* The largest logit; NaN if the row holds one. */
static float ov_row_maximum(const float *row, int64_t vocab) {
    OvFloats best = ov_splat(-INFINITY);
    OvInts nan = {0};
    for (int64_t first = 0; first < vocab; first += OV_LANES) {
        OvFloats x = ov_logits(row, first, vocab);
        nan |= x != x;
        best = ov_select(x > best, x, best);
    }
    if (ov_any(nan)) return NAN;
    float maximum = best[0];
    for (int lane = 1; lane < OV_LANES; lane++) maximum = best[lane] > maximum ? best[lane] : maximum;
    return maximum;
}

static int64_t ov_first_equal(const float *row, int64_t vocab, float value) {
    for (int64_t token = 0; token < vocab; token++)
        if (row[token] == value) return token;
    return 0;
}

/* fp32 to integers in the same order, and back. */
static inline uint32_t ov_key(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline float ov_from_key(uint32_t key) {
    uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Logits, and what has been found out about which of them stay. */
typedef struct {
    const float *logits;
    int64_t count;
    float temperature;
    float maximum; /* of the scaled ones */
    float lowest;  /* scaled logits below it are gone */
} OvKept;

static inline OvFloats ov_scaled(const OvKept *row, int64_t first) {
    OvFloats x = ov_logits(row->logits, first, row->count);
    return row->temperature == 1.0f ? x : x / row->temperature;
}

#define OV_BIN_BITS 11
#define OV_BINS (1 << OV_BIN_BITS)
#define OV_CANDIDATES 16384
#define OV_NEAR 10.0f /* candidates are so many nats below the maximum at most */

typedef struct {
    double bins[OV_BINS];
    float candidates[OV_CANDIDATES];
} OvDrawScratch;

/* Adds the weight of every kept token whose distance from the maximum (in ordered integers) begins with `prefix` to the
 * bin of its next bits. Weight: exp(scaled - maximum), or 1. In the order of the tokens, so a row's sums are its own. */
static void ov_fill_bins(const OvKept *row, int by_mass, int shift, uint64_t prefix, double *bins) {
    uint32_t top = ov_key(row->maximum);
    memset(bins, 0, OV_BINS * sizeof *bins);
    for (int64_t first = 0; first < row->count; first += OV_LANES) {
        OvFloats scaled = ov_scaled(row, first);
        if (!ov_any(scaled >= row->lowest)) continue;
        OvFloats weights = by_mass ? ov_exp(scaled - row->maximum) : ov_splat(1.0f);
        int count = row->count - first < OV_LANES ? (int)(row->count - first) : OV_LANES;
        for (int lane = 0; lane < count; lane++) {
            uint64_t distance = top - ov_key(scaled[lane]);
            if (scaled[lane] >= row->lowest && distance >> (shift + OV_BIN_BITS) == prefix)
                bins[distance >> shift & (OV_BINS - 1)] += weights[lane];
        }
    }
}

static double ov_kept_mass(const OvKept *row) {
    double lanes[OV_LANES] = {0}, mass = 0.0; /* lanes beyond the end weigh exp(-inf) */
    for (int64_t first = 0; first < row->count; first += OV_LANES) {
        OvFloats scaled = ov_scaled(row, first);
        OvFloats weights = ov_select(scaled >= row->lowest, ov_exp(scaled - row->maximum), ov_splat(0.0f));
        for (int lane = 0; lane < OV_LANES; lane++) lanes[lane] += weights[lane];
    }
    for (int lane = 0; lane < OV_LANES; lane++) mass += lanes[lane];
    return mass;
}

/* The least kept value above which there is less than `limit`: tokens, or mass. Three passes pin down all its bits;
 * equal logits stay or go together. */
static float ov_search(const OvKept *row, int by_mass, double limit, double *bins) {
    uint64_t prefix = 0;
    for (int shift = 2 * OV_BIN_BITS; shift >= 0; shift -= OV_BIN_BITS) {
        ov_fill_bins(row, by_mass, shift, prefix, bins);
        int bin = 0;
        while (bin < OV_BINS && bins[bin] < limit) limit -= bins[bin++];
        if (bin == OV_BINS) return row->lowest; /* all that is kept falls short */
        prefix = prefix << OV_BIN_BITS | (uint64_t)bin;
    }
    return ov_from_key(ov_key(row->maximum) - (uint32_t)prefix);
}

/* The kept logits near the maximum, scaled; what is searched for nearly always lies among them. No count where there
 * are too many. */
static OvKept ov_near(const OvKept *row, float *candidates) {
    OvKept near = {candidates, 0, 1.0f, row->maximum, row->maximum - OV_NEAR};
    if (near.lowest < row->lowest) near.lowest = row->lowest;
    for (int64_t first = 0; first < row->count; first += OV_LANES) {
        OvFloats scaled = ov_scaled(row, first);
        if (!ov_any(scaled >= near.lowest)) continue;
        if (near.count + OV_LANES >= OV_CANDIDATES) {
            near.count = 0;
            return near;
        }
        for (int lane = 0; lane < OV_LANES; lane++) {
            candidates[near.count] = scaled[lane];
            near.count += scaled[lane] >= near.lowest;
        }
    }
    return near;
}

/* The least scaled logit that stays: min-p, then top-k, then top-p of what these two keep. */
static float ov_threshold(OvKept row, const OvDraw *draw, int64_t index, OvDrawScratch *scratch) {
    float min_p = draw->min_ps[index], top_p = draw->top_ps[index];
    int32_t top_k = draw->top_ks[index];
    int cuts_count = top_k > 0 && top_k < row.count;
    row.lowest = min_p > 0.0f ? row.maximum + logf(min_p) : -INFINITY;
    if (cuts_count || top_p < 1.0f) {
        OvKept near = ov_near(&row, scratch->candidates);
        if (cuts_count) {
            const OvKept *among = near.count >= top_k ? &near : &row;
            row.lowest = ov_search(among, 0, top_k, scratch->bins);
            if (near.lowest < row.lowest) near.lowest = row.lowest;
        }
        if (top_p < 1.0f) {
            double near_mass = near.count ? ov_kept_mass(&near) : 0.0;
            double limit = top_p * (near.count && near.lowest == row.lowest ? near_mass : ov_kept_mass(&row));
            row.lowest = ov_search(near_mass >= limit ? &near : &row, 1, limit, scratch->bins);
        }
    }
    return row.lowest < row.maximum ? row.lowest : row.maximum;
}

/* The arg max of scaled logits plus noise. */
static int64_t ov_draw_noisy(const OvKept *row, uint64_t key) {
    float best = -INFINITY;
    int64_t best_token = 0;
    for (int64_t first = 0; first < row->count; first += OV_LANES) {
        OvFloats scaled = ov_scaled(row, first);
        OvFloats u = ov_uniform(key, (uint32_t)first);
        /* Noise is never above -log(u), so few tokens come near the best so far; the others need no logarithm. */
        if (best > -INFINITY && !ov_any(u < ov_exp_bound(scaled - best))) continue;
        OvFloats scores = scaled + ov_gumbel(u);
        int count = row->count - first < OV_LANES ? (int)(row->count - first) : OV_LANES;
        for (int lane = 0; lane < count; lane++) {
            if (scaled[lane] >= row->lowest && scores[lane] > best) {
                best = scores[lane];
                best_token = first + lane;
            }
        }
    }
    return best_token;
}

static int64_t ov_draw_row(const float *logits, int64_t vocab, const OvDraw *draw, int64_t index,
                           OvDrawScratch *scratch) {
    float maximum = ov_row_maximum(logits, vocab), temperature = draw->temperatures[index];
    if (maximum != maximum) return -1;
    if (temperature <= 0.0f) return ov_first_equal(logits, vocab, maximum);
    OvKept row = {logits, vocab, temperature, maximum / temperature, -INFINITY};
    row.lowest = ov_threshold(row, draw, index, scratch);
    uint64_t seed = (uint64_t)draw->seeds[index], position = (uint64_t)draw->positions[index];
    return ov_draw_noisy(&row, ov_splitmix64(ov_splitmix64(seed) ^ position));
}

/* OV_DRAW: one row is one thread's. */
static void ov_draw_phase(const OvOp *op, const OvStep *step, OvWorker *worker) {
    OvDrawScratch scratch;
    int64_t num_rows = ov_num_rows(op, step), index;
    while ((index = ov_take(worker, num_rows, 1)) >= 0)
        ((int64_t *)op->out)[index] =
            ov_draw_row((const float *)op->a + index * op->stride_a, op->n[0], op->weight, index, &scratch);
}

#endif
