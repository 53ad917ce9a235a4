/* exp2, exp, tanh and erf over sixteen lanes, each lane by the same code: a value never depends on its lane.
 *
 * Errors are about 1 ulp (exp2, exp), 2 ulp (tanh) and 3 ulp (erf) of fp32. NaN gives NaN.
 */
#ifndef OCTAVO_VEC_MATH_H
#define OCTAVO_VEC_MATH_H

#include "vec16.h"

/* 2^x for x <= 64, what a softmax needs. Below 2^-126 the result is 0: no denormal ever arises, since making one takes
 * processors a hundred cycles. Polynomial of 2^r on [-1/2, 1/2] as in Cephes (S. Moshier), exp2f.c. */
OV_INLINE V16 v16_exp2(V16 x) {
    const V16 least = v16_set(-126.0f);
    V16 bounded = v16_max(least, x); /* the bound first, so that a NaN passes through */
    V16 n = v16_round(bounded), r = v16_sub(bounded, n);
    V16 p = v16_set(1.535336188319500e-4f);
    p = v16_fma(p, r, v16_set(1.339887440266574e-3f));
    p = v16_fma(p, r, v16_set(9.618437357674640e-3f));
    p = v16_fma(p, r, v16_set(5.550332471162809e-2f));
    p = v16_fma(p, r, v16_set(2.402264791363012e-1f));
    p = v16_fma(p, r, v16_set(6.931472028550421e-1f));
    p = v16_fma(p, r, v16_set(1.0f));
    return v16_if_less(x, least, v16_zero(), v16_scale(p, n));
}

/* e^x: the product with log2(e) in two parts, so that large x lose nothing. */
OV_INLINE V16 v16_exp(V16 x) {
    /* The bounds come first so that a NaN in x passes through. */
    V16 bounded = v16_max(v16_set(-87.3f), v16_min(v16_set(89.0f), x));
    V16 n = v16_round(v16_mul(bounded, v16_set(1.44269504f)));
    V16 r = v16_fma(n, v16_set(-0.693359375f), bounded);
    r = v16_fma(n, v16_set(2.12194440e-4f), r);
    /* Cephes expf.c. */
    V16 p = v16_set(1.9875691500e-4f);
    p = v16_fma(p, r, v16_set(1.3981999507e-3f));
    p = v16_fma(p, r, v16_set(8.3334519073e-3f));
    p = v16_fma(p, r, v16_set(4.1665795894e-2f));
    p = v16_fma(p, r, v16_set(1.6666665459e-1f));
    p = v16_fma(p, r, v16_set(5.0000001201e-1f));
    p = v16_add(v16_fma(v16_mul(r, r), p, r), v16_set(1.0f));
    /* 2^128 is no fp32 number: the last doubling is a product. */
    V16 top = v16_if_less(v16_set(127.0f), n, v16_set(2.0f), v16_set(1.0f));
    V16 y = v16_mul(v16_scale(p, v16_min(v16_set(127.0f), n)), top);
    return v16_if_less(x, v16_set(-87.3f), v16_zero(), y);
}

/* Cephes tanhf.c: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel. */
OV_INLINE V16 v16_tanh(V16 x) {
    V16 size = v16_abs(x), square = v16_mul(x, x);
    V16 p = v16_set(-5.70498872745e-3f);
    p = v16_fma(p, square, v16_set(2.06390887954e-2f));
    p = v16_fma(p, square, v16_set(-5.37397155531e-2f));
    p = v16_fma(p, square, v16_set(1.33314422036e-1f));
    p = v16_fma(p, square, v16_set(-3.33332819422e-1f));
    V16 near = v16_fma(v16_mul(p, square), x, x);
    V16 e = v16_exp(v16_add(size, size));
    V16 far = v16_sub(v16_set(1.0f), v16_div(v16_set(2.0f), v16_add(e, v16_set(1.0f))));
    return v16_if_less(size, v16_set(0.625f), near, v16_with_sign(far, x));
}

/* x P(x^2) / Q(x^2) on [-4, 4], as Eigen's erf for floats had it. */
OV_INLINE V16 v16_erf(V16 x) {
    V16 z = v16_max(v16_set(-4.0f), v16_min(v16_set(4.0f), x)), s = v16_mul(z, z);
    V16 p = v16_set(-2.72614225801306e-10f);
    p = v16_fma(p, s, v16_set(2.77068142495902e-08f));
    p = v16_fma(p, s, v16_set(-2.10102402082508e-06f));
    p = v16_fma(p, s, v16_set(-5.69250639462346e-05f));
    p = v16_fma(p, s, v16_set(-7.34990630326855e-04f));
    p = v16_fma(p, s, v16_set(-2.95459980854025e-03f));
    p = v16_fma(p, s, v16_set(-1.60960333262415e-02f));
    V16 q = v16_set(-1.45660718464996e-05f);
    q = v16_fma(q, s, v16_set(-2.13374055278905e-04f));
    q = v16_fma(q, s, v16_set(-1.68282697438203e-03f));
    q = v16_fma(q, s, v16_set(-7.37332916720468e-03f));
    q = v16_fma(q, s, v16_set(-1.42647390514189e-02f));
    return v16_div(v16_mul(z, p), q);
}

#endif
