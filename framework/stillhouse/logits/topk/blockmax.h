/* A row of logits in blocks, and what the filter of `blockmax.c` finds of it. */

#ifndef STILLHOUSE_BLOCKMAX_H
#define STILLHOUSE_BLOCKMAX_H

#include "vectors.h"

enum { BLOCK = 128, VECTORS = BLOCK / LANES };

typedef struct {
    const void *logits;
    int is_bfloat16;
    int64_t vocab_size, num_blocks;
    float exponent; /* 1 / (T ln 2), since exp is computed as a power of two */
} Row;

static inline Row row_of(const void *logits, int is_bfloat16, int64_t vocab_size,
                         double temperature) {
    float exponent = (float)(1.4426950408889634 / temperature);
    return (Row){logits, is_bfloat16, vocab_size, (vocab_size + BLOCK - 1) / BLOCK, exponent};
}

typedef struct {
    int64_t num;     /* the kept entries: k, or fewer where the row has NaN */
    uint64_t *keys;  /* [num] by value descending, ties by id ascending; see `value_of`, `id_of` */
    float rest_base; /* the greatest logit of the other ids; -inf where they have no mass */
    float *rest_sums;    /* [num_blocks]: sums of 2^t = exp((z - rest_base) / T) over the others */
    float *rest_moments; /* [num_blocks]: sums of t 2^t over them; NULL where not wanted */
    float *rest_maxima;  /* [num_blocks]: their greatest logits */
} Split;

/* Room for the work on one row of so many blocks, of which k entries are kept. */
typedef struct {
    float *maxima, *sums, *moments; /* [num_blocks up to a multiple of LANES]; moments or NULL */
    uint32_t *levels;               /* of the maxima, then of the entries that may be kept */
    int32_t *found, *ids, *places;
    uint64_t *keys, *spare_keys;
    void *memory;
} Scratch;

/* 0 if out of memory */
int scratch_for(Scratch *scratch, int64_t num_blocks, int64_t k, int with_moments);
Split split_row(const Row *row, int64_t k, const Scratch *scratch);

/* Keys: an entry's value in order-preserving bits (its level) above the complement of its id. So
   they are distinct, and descending keys are by value descending, ties by id ascending; -0 counts
   as +0. */
static inline uint32_t level_of(float z) {
    int32_t bits;
    z += 0.0f;
    memcpy(&bits, &z, 4);
    return (uint32_t)(bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ 0x80000000u;
}

static inline float value_of(uint64_t key) {
    int32_t bits = (int32_t)((uint32_t)(key >> 32) ^ 0x80000000u);
    float z;
    bits ^= (bits >> 31) & 0x7FFFFFFF;
    memcpy(&z, &bits, 4);
    return z;
}

static inline int64_t id_of(uint64_t key) { return (uint32_t)~(uint32_t)key; }

typedef union {
    float float32[BLOCK];
    uint16_t bfloat16[BLOCK];
} Padded;

/* Where a block's logits are: in the row, or for the row's last ids in `padded`, before -inf. */
static inline const void *block_at(const Row *row, int64_t block, Padded *padded) {
    int64_t size = row->is_bfloat16 ? 2 : 4, rest = row->vocab_size - block * BLOCK;
    const char *from = (const char *)row->logits + block * BLOCK * size;
    if (rest >= BLOCK) return from;
    for (int i = 0; i < BLOCK; i++)
        if (row->is_bfloat16)
            padded->bfloat16[i] = 0xFF80;
        else
            padded->float32[i] = -INFINITY;
    memcpy(padded, from, rest * size);
    return padded;
}

/* A block's logits in the order of their ids. One vector at a time: compilers copy a whole block in
   narrower pieces, and the wider reads that follow wait for them. */
static inline void read_block(Floats z[VECTORS], const Row *row, int64_t block) {
    Padded padded;
    const char *from = block_at(row, block, &padded);
    for (int v = 0; v < VECTORS; v++) {
        Halves halves;
        if (row->is_bfloat16) {
            memcpy(&halves, from + v * sizeof halves, sizeof halves);
            z[v] = (Floats)(__builtin_convertvector(halves, Ints) << 16);
        } else
            z[v] = load((const float *)from + v * LANES);
    }
}

/* The ids of a block's first vector. */
static inline Ints first_ids(int64_t block) {
    Ints ids;
    for (int i = 0; i < LANES; i++) ids[i] = (int32_t)(block * BLOCK) + i;
    return ids;
}

/* Which entries are kept: those before or at the last key, in its order. */
static inline Ints are_kept(Floats z, Ints ids, uint64_t last) {
    float least = value_of(last);
    return (z > least) | ((z == least) & (ids <= (int32_t)id_of(last)));
}

/* The same as `read_block` with -inf for what is kept. */
static inline void read_rest(Floats z[VECTORS], const Row *row, int64_t block, uint64_t last) {
    Ints ids = first_ids(block);
    read_block(z, row, block);
    for (int v = 0; v < VECTORS; v++) {
        z[v] = choose(are_kept(z[v], ids, last), -INFINITY + (Floats){0}, z[v]);
        ids += LANES;
    }
}

static inline Floats greatest_of(const Floats z[VECTORS]) {
    Floats max = -INFINITY + (Floats){0};
    for (int v = 0; v < VECTORS; v++) max = greater(z[v], max);
    return max;
}

#endif
