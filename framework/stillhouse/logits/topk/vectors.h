/* Vectors of as many float32 as a register of the machine holds, for `blockmax.c` and `targets.c`.
   GCC's and clang's vector extensions, and an intrinsic where these have no operator. */

#ifndef STILLHOUSE_VECTORS_H
#define STILLHOUSE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define GREATER(a, b) _mm512_max_ps((__m512)(a), (__m512)(b))
#define REACHING(z, least) _mm512_cmp_ps_mask((__m512)(z), _mm512_set1_ps(least), _CMP_GE_OQ)
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define LANES 8
#define GREATER(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#define REACHING(z, least) _mm256_movemask_ps((__m256)((z) >= (least)))
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LANES 4
#ifdef __SSE2__
#define GREATER(a, b) _mm_max_ps((__m128)(a), (__m128)(b))
#define REACHING(z, least) _mm_movemask_ps((__m128)((z) >= (least)))
#else
#define GREATER(a, b) choose((a) > (b), a, b)
#define REACHING(z, least) \
    (((z)[0] >= (least)) | ((z)[1] >= (least)) << 1 | ((z)[2] >= (least)) << 2 | \
     ((z)[3] >= (least)) << 3)
#endif
#define EVENS 0, 2, 4, 6
#define ODDS 1, 3, 5, 7
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

/* Which of each pair, by a mask of all bits or none; C has no ?: on vectors. */
static inline Floats choose(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

/* The greater of each pair, b where one of them is NaN. */
static inline Floats greater(Floats a, Floats b) { return (Floats)GREATER(a, b); }

/* Bit i says whether z[i] >= least. */
static inline uint32_t reaching(Floats z, float least) { return (uint32_t)REACHING(z, least); }

/* Exponents that `power_of_two` takes: t, or -126 where t is less, since 2^-126 does not change a
   sum that has a term of 1. NaN stays NaN. */
static inline Floats floored(Floats t) { return greater(-126.0f + (Floats){0}, t); }

/* 2^t for t in [-126, 0], within 2e-7 relative; NaN for NaN. */
static inline Floats power_of_two(Floats t) {
    /* 1.5 * 2^23 leaves an integer in the low bits; 127 is the exponent's bias */
    const float to_integer = 12582912.0f + 127;
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
#define EVEN_LANES(a, b) __builtin_shufflevector(a, b, EVENS)
#define ODD_LANES(a, b) __builtin_shufflevector(a, b, ODDS)
#else
#define EVEN_LANES(a, b) __builtin_shuffle(a, b, (Ints){EVENS})
#define ODD_LANES(a, b) __builtin_shuffle(a, b, (Ints){ODDS})
#endif

/* The greatest lane of each of LANES vectors, which are overwritten: neighbouring lanes are joined
   until one is left of each, which costs less than the vectors one by one. */
static inline Floats greatest_lanes(Floats of[LANES]) {
    for (int num = LANES / 2; num; num /= 2)
        for (int i = 0; i < num; i++) {
            Floats even = EVEN_LANES(of[2 * i], of[2 * i + 1]);
            of[i] = greater(ODD_LANES(of[2 * i], of[2 * i + 1]), even);
        }
    return of[0];
}

/* The sum of the lanes of each of LANES vectors, which are overwritten. */
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
