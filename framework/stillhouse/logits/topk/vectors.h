/* Vectors of 16 float32, for `blockmax.c` and `targets.c`: one register with AVX-512, several
   otherwise. GCC's and clang's vector extensions, and intrinsics where both compile them badly. */

#ifndef STILLHOUSE_VECTORS_H
#define STILLHOUSE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16 };

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

/* Which of each pair, by a mask of all bits or none; C has no ?: on vectors. */
static inline Floats choose(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

/* The greater of each pair, b where one of them is NaN. */
static inline Floats greater(Floats a, Floats b) {
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

/* Bit i says whether z[i] >= least. */
static inline uint32_t reaching(Floats z, float least) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)(z[i] >= least) << i;
    return bits;
#endif
}

/* 2^t for t <= 0, within 2e-7 relative; NaN for NaN. Below -126 it is 2^-126, which does not change
   a sum that has a term of 1. */
static inline Floats power_of_two(Floats t) {
    /* 1.5 * 2^23 leaves an integer in the low bits; 127 is the exponent's bias */
    const float to_integer = 12582912.0f + 127;
    t = greater(-126.0f + (Floats){0}, t);
    Floats shifted = t + to_integer, f = t - (shifted - to_integer);
    /* minimax polynomial of 2^f on [-1/2, 1/2], of relative error 9.1e-8, exactly 1 at 0 */
    Floats p = f * 1.3264715e-3f + 9.671513e-3f;
    p = p * f + 5.550734e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.93147e-1f;
    p = p * f + 1.0f;
    return p * (Floats)((Ints)shifted << 23);
}

/* Lanes 0, 2, 4... of a and then of b, and lanes 1, 3, 5... */
#ifdef __clang__
#define EVEN_LANES(a, b) \
    __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD_LANES(a, b) \
    __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#else
#define EVEN_LANES(a, b) \
    __builtin_shuffle(a, b, (Ints){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30})
#define ODD_LANES(a, b) \
    __builtin_shuffle(a, b, (Ints){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31})
#endif

/* The greatest lane of each of 16 vectors, which are overwritten: neighbouring lanes are joined
   until one is left of each, at a quarter of the cost of 16 vectors one by one. */
static inline Floats greatest_lanes(Floats of[LANES]) {
    for (int num = LANES / 2; num; num /= 2)
        for (int i = 0; i < num; i++) {
            Floats even = EVEN_LANES(of[2 * i], of[2 * i + 1]);
            of[i] = greater(ODD_LANES(of[2 * i], of[2 * i + 1]), even);
        }
    return of[0];
}

/* The sum of the lanes of each of 16 vectors, which are overwritten. */
static inline Floats sums_of_lanes(Floats of[LANES]) {
    for (int num = LANES / 2; num; num /= 2)
        for (int i = 0; i < num; i++) {
            Floats even = EVEN_LANES(of[2 * i], of[2 * i + 1]);
            of[i] = ODD_LANES(of[2 * i], of[2 * i + 1]) + even;
        }
    return of[0];
}

static inline float greatest_lane(Floats x) {
    float max = x[0];
    for (int i = 1; i < LANES; i++) max = x[i] > max ? x[i] : max;
    return max;
}

static inline Floats load(const float *from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }

#endif
