/* Block-max filter: an exact top-k of rows of logits, each row read once from memory.

   1. Cut a row into blocks of 128 ids. One pass gives each block's maximum and sum of
      exp((z - maximum) / T).
   2. Keep the k blocks with the greatest maxima, equal ones in the order of their ids, in a heap.
   3. The k greatest entries of these blocks are the row's: no kept entry is below the k-th maximum,
      and of the entries that equal it, the first blocks hold the lowest ids (Gaihre et al. 2021,
      "Dr. Top-k", for the filter).
   4. Take the sums of these blocks again without the kept entries.

   The sort key of an entry is 64 bits: its value in order-preserving bits above the complement of
   its id. So keys are distinct, and descending keys are by value descending, ties by id ascending;
   -0 counts as +0. NaN and infinities follow IEEE 754: do not compile with -ffast-math. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, VECTORS = 8, BLOCK = LANES * VECTORS };
enum { LINE = 64, AHEAD = 4096 }; /* bytes: of a cache line, and of the distance of the prefetch */

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

typedef union {
    Floats all;
    Eight eight[2];
    Four four[4];
    float one[LANES];
} Lanes;

typedef struct {
    const void *logits;
    int is_bfloat16;
    int64_t vocab_size, num_blocks;
    float exponent; /* 1 / (T ln 2), since exp is computed as a power of two */
} Row;

typedef struct {
    float max, sum; /* of a block; sum is of exp((z - max) / T) */
} Partial;

typedef struct {
    int64_t size, capacity;
    uint64_t *keys; /* the greatest ones that were offered, the least of them at the root */
} Heap;

/* Blocks --------------------------------------------------------------------------------------- */

/* The greater of each pair, b where one of them is NaN. C has no ?: on vectors. */
#define GREATER(Vector, a, b) SELECT(Vector, __typeof__((a) > (b)), (a) > (b), (a), (b))
#define SELECT(Vector, Mask, mask, yes, no) \
    ((Vector)(((mask) & (Mask)(yes)) | (~(mask) & (Mask)(no))))

/* 2^t for t <= 0, within 1e-7 relative; NaN for NaN. Below -126 it is 2^-126, which does not change
   a sum that has a term of 1. */
static inline Floats power_of_two(Floats t) {
    /* 1.5 * 2^23 leaves an integer in the low bits; 127 is the exponent's bias */
    const float to_integer = 12582912.0f + 127;
    t = GREATER(Floats, -126.0f + (Floats){0}, t);
    Floats shifted = t + to_integer, f = t - (shifted - to_integer);
    /* minimax polynomial of 2^f on [-1/2, 1/2], of relative error, exactly 1 at 0 */
    Floats p = f * 1.535336196e-4f + 1.339887502e-3f;
    p = p * f + 9.618436918e-3f;
    p = p * f + 5.550332367e-2f;
    p = p * f + 2.402264774e-1f;
    p = p * f + 6.931471825e-1f;
    p = p * f + 1.0f;
    return p * (Floats)((Ints)shifted << 23);
}

static inline float greatest(Floats x) {
    Lanes lanes = {x};
    lanes.eight[0] = GREATER(Eight, lanes.eight[0], lanes.eight[1]);
    lanes.four[0] = GREATER(Four, lanes.four[0], lanes.four[1]);
    float max = lanes.one[0];
    for (int i = 1; i < 4; i++) max = lanes.one[i] > max ? lanes.one[i] : max;
    return max;
}

static inline float total(Floats x) {
    Lanes lanes = {x};
    lanes.eight[0] += lanes.eight[1];
    lanes.four[0] += lanes.four[1];
    return (lanes.one[0] + lanes.one[1]) + (lanes.one[2] + lanes.one[3]);
}

static inline Partial partial_of(const Floats z[VECTORS], float exponent) {
    Floats max = z[0], sum = {0};
    for (int v = 1; v < VECTORS; v++) max = GREATER(Floats, z[v], max);
    float top = greatest(max), from = top == -INFINITY ? 0 : top;
    for (int v = 0; v < VECTORS; v++) sum += power_of_two((z[v] - from) * exponent);
    /* 0 times NaN is NaN, which must not be lost */
    return (Partial){top, top == -INFINITY ? 0 * total(sum) : total(sum)};
}

/* One vector at a time: compilers copy a whole block in narrower pieces, and the wider reads that
   follow wait for them. */
static inline void read_float32(Floats z[VECTORS], const float *from) {
    for (int v = 0; v < VECTORS; v++) {
        Floats vector;
        memcpy(&vector, from + v * LANES, sizeof vector);
        z[v] = vector;
    }
}

static inline void read_bfloat16(Floats z[VECTORS], const uint16_t *from) {
    for (int v = 0; v < VECTORS; v++) {
        Halves vector;
        memcpy(&vector, from + v * LANES, sizeof vector);
        z[v] = (Floats)(__builtin_convertvector(vector, Ints) << 16);
    }
}

/* A block of the row, with -inf after the row's end. */
static inline void read_block(Floats z[VECTORS], const Row *row, int64_t block) {
    int64_t first = block * BLOCK, rest = row->vocab_size - first;
    if (row->is_bfloat16) {
        const uint16_t *from = (const uint16_t *)row->logits + first;
        uint16_t padded[BLOCK];
        if (rest < BLOCK) {
            for (int i = 0; i < BLOCK; i++) padded[i] = i < rest ? from[i] : 0xFF80;
            from = padded;
        }
        read_bfloat16(z, from);
    } else {
        const float *from = (const float *)row->logits + first;
        float padded[BLOCK];
        if (rest < BLOCK) {
            for (int i = 0; i < BLOCK; i++) padded[i] = i < rest ? from[i] : -INFINITY;
            from = padded;
        }
        read_float32(z, from);
    }
}

/* Prefetch the block that the pass comes to 4 KiB later: otherwise a third of the time is waiting
   for memory. */
static inline void prefetch(const Row *row, int64_t block) {
    int64_t size = row->is_bfloat16 ? 2 : 4;
    uintptr_t from = (uintptr_t)row->logits + block * BLOCK * size + AHEAD;
    for (int64_t at = 0; at < BLOCK * size; at += LINE)
        __builtin_prefetch((const void *)(from + at));
}

/* `max`: the greatest maximum; -inf where no logit is above -inf.
   `sums`: each block's sum of exp((z - max) / T); 0 there. */
static void share_base(float *sums, const Partial *partials, const Row *row, float *max) {
    *max = -INFINITY;
    for (int64_t b = 0; b < row->num_blocks; b++)
        *max = partials[b].max > *max ? partials[b].max : *max;
    float from = *max == -INFINITY ? 0 : *max;
    for (int64_t b = 0; b < row->num_blocks; b += LANES) {
        Lanes t = {{0}};
        int64_t num = row->num_blocks - b < LANES ? row->num_blocks - b : LANES;
        for (int64_t i = 0; i < num; i++) t.one[i] = (partials[b + i].max - from) * row->exponent;
        t.all = power_of_two(t.all);
        for (int64_t i = 0; i < num; i++) sums[b + i] = t.one[i] * partials[b + i].sum;
    }
}

/* Keys ----------------------------------------------------------------------------------------- */

static inline uint64_t key_of(float z, int64_t id) {
    int32_t bits;
    z += 0.0f;
    memcpy(&bits, &z, 4);
    bits ^= (bits >> 31) & 0x7FFFFFFF;
    return (uint64_t)((uint32_t)bits ^ 0x80000000u) << 32 | (uint32_t)~(uint32_t)id;
}

static inline int64_t id_of(uint64_t key) { return (uint32_t)~(uint32_t)key; }

static inline float value_of(uint64_t key) {
    int32_t bits = (int32_t)((uint32_t)(key >> 32) ^ 0x80000000u);
    float z;
    bits ^= (bits >> 31) & 0x7FFFFFFF;
    memcpy(&z, &bits, 4);
    return z;
}

static void sift_down(uint64_t *keys, int64_t size) {
    uint64_t moving = keys[0];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && keys[child + 1] < keys[child]) child++;
        if (moving <= keys[child]) break;
        keys[at] = keys[child];
    }
    keys[at] = moving;
}

static inline void offer(Heap *heap, uint64_t key) {
    uint64_t *keys = heap->keys;
    if (heap->size < heap->capacity) {
        int64_t at = heap->size++;
        for (; at && key < keys[(at - 1) / 2]; at = (at - 1) / 2) keys[at] = keys[(at - 1) / 2];
        keys[at] = key;
    } else if (heap->capacity && key > keys[0]) {
        keys[0] = key;
        sift_down(keys, heap->size);
    }
}

static void sort_descending(Heap *heap) {
    for (int64_t last = heap->size - 1; last > 0; last--) {
        uint64_t least = heap->keys[0];
        heap->keys[0] = heap->keys[last];
        heap->keys[last] = least;
        sift_down(heap->keys, last);
    }
}

/* Rows ----------------------------------------------------------------------------------------- */

/* The row's k greatest entries, descending, from the blocks that hold them. NaN is never kept. */
static void keep(Heap *kept, const Heap *blocks, const Row *row) {
    /* the k-th maximum, where there are k blocks: no kept entry is below it */
    int is_full = blocks->size && blocks->size == blocks->capacity;
    float least = is_full ? value_of(blocks->keys[0]) : -INFINITY;
    kept->size = 0;
    for (int64_t i = 0; i < blocks->size; i++) {
        Floats z[VECTORS];
        float values[BLOCK];
        int64_t first = id_of(blocks->keys[i]) * BLOCK, rest = row->vocab_size - first;
        read_block(z, row, first / BLOCK);
        memcpy(values, z, sizeof values);
        for (int64_t j = 0; j < BLOCK && j < rest; j++)
            if (values[j] >= least) offer(kept, key_of(values[j], first + j));
    }
    sort_descending(kept);
}

/* Recompute the partials of the found blocks without the kept entries, whose last key is `last`. */
static void remove_kept(Partial *partials, const Heap *blocks, uint64_t last, const Row *row) {
    float least = value_of(last);
    for (int64_t i = 0; i < blocks->size; i++) {
        Floats z[VECTORS];
        float values[BLOCK];
        int64_t block = id_of(blocks->keys[i]), last_here = id_of(last) - block * BLOCK;
        int32_t up_to = last_here < BLOCK ? (int32_t)last_here : BLOCK;
        read_block(z, row, block);
        memcpy(values, z, sizeof values);
        for (int32_t j = 0; j < BLOCK; j++) {
            int is_kept = (values[j] > least) | ((values[j] == least) & (j <= up_to));
            values[j] = is_kept ? -INFINITY : values[j];
        }
        read_float32(z, values);
        partials[block] = partial_of(z, row->exponent);
    }
}

static void split_row(const Row *row, Partial *partials, Heap *blocks, Heap *kept, int32_t *ids,
                      float *values, float *rest_base, float *rest_sums) {
    /* the pass over all logits */
    blocks->size = 0;
    for (int64_t b = 0; b < row->num_blocks; b++) {
        Floats z[VECTORS];
        prefetch(row, b);
        read_block(z, row, b);
        partials[b] = partial_of(z, row->exponent);
        offer(blocks, key_of(partials[b].max, b));
    }

    /* the kept entries; fewer than k only if the row has NaN, which rest_sums will show */
    keep(kept, blocks, row);
    for (int64_t i = 0; i < kept->size; i++) {
        ids[i] = (int32_t)id_of(kept->keys[i]);
        values[i] = value_of(kept->keys[i]);
    }
    for (int64_t i = kept->size; i < kept->capacity; i++) {
        ids[i] = 0;
        values[i] = NAN;
    }

    /* the sums of all other entries */
    if (kept->size) remove_kept(partials, blocks, kept->keys[kept->size - 1], row);
    share_base(rest_sums, partials, row, rest_base);
}

/* The top-k of num_rows rows, and the sums of exponentials of their other ids.

   logits      rows `stride` entries apart, of bfloat16 or else float32, 1 to 2^31 - 1 logits each
   ids, values [num_rows, k]: the k greatest, by value descending, ties by id ascending
   rest_base   [num_rows]: the greatest logit of the other ids; -inf where they have no mass
   rest_sums   [num_rows, ceil(vocab_size / 128)]: each block's sum of exp((z - rest_base) / T) over
               the other ids; 0 where they have no mass

   A row with NaN has NaN among its outputs. Returns 0, or -1 if out of memory. */
int32_t split_rows(const void *logits, int32_t is_bfloat16, int64_t stride, int64_t num_rows,
                   int64_t vocab_size, int64_t k, double temperature, int32_t *ids, float *values,
                   float *rest_base, float *rest_sums) {
    int64_t num_blocks = (vocab_size + BLOCK - 1) / BLOCK;
    float exponent = (float)(1.4426950408889634 / temperature);
    Row row = {logits, is_bfloat16, vocab_size, num_blocks, exponent};
    Partial *partials = malloc(num_blocks * sizeof *partials);
    uint64_t *keys = malloc((2 * k + 1) * sizeof *keys);
    int has_memory = partials && keys;
    if (has_memory) {
        Heap blocks = {0, k, keys}, kept = {0, k, keys + k};
        for (int64_t i = 0; i < num_rows; i++) {
            row.logits = (const char *)logits + i * stride * (is_bfloat16 ? 2 : 4);
            split_row(&row, partials, &blocks, &kept, ids + i * k, values + i * k, rest_base + i,
                      rest_sums + i * num_blocks);
        }
    }
    free(partials);
    free(keys);
    return has_memory ? 0 : -1;
}
