/* Block-max filter: an exact top-k of rows of logits, each row read once from memory.

   1. Cut a row into blocks of 128 ids. One pass gives each block's maximum and sum of
      2^t = exp((z - maximum) / T); for the entropy also its moment, the sum of t 2^t.
   2. Pick the k blocks with the greatest maxima, equal ones in the order of their ids.
   3. The k greatest entries of these blocks are the row's: no kept entry is below the k-th maximum,
      and of the entries that equal it, the first blocks hold the lowest ids (Gaihre et al. 2021,
      "Dr. Top-k", for the filter).
   4. Take the sums and moments of these blocks again without the kept entries.

   NaN and infinities follow IEEE 754: do not compile with -ffast-math. */

#include "blockmax.h"

#include <stdlib.h>

enum { LINE = 64, AHEAD = 16384 }; /* bytes: of a cache line, and of the distance of the prefetch */

/* Blocks --------------------------------------------------------------------------------------- */

/* A block's logits, in any order that is the same at each call: bfloat16 are widened two from one
   load, those at even places and those at odd ones. */
static inline void read_quickly(Floats z[VECTORS], const char *from, int is_bfloat16) {
    for (int v = 0; v < VECTORS; v++) {
        if (!is_bfloat16)
            z[v] = load((const float *)from + v * LANES);
        else {
            Ints two = (Ints)load((const float *)from + v / 2 * LANES);
            z[v] = (Floats)(v % 2 ? two & (int32_t)0xFFFF0000 : two << 16);
        }
    }
}

/* The sum of a block, and its moment unless `moment` is NULL. */
static inline Floats sum_of(const Floats z[VECTORS], float max, float exponent, Floats *moment) {
    float from = max == -INFINITY ? 0 : max;
    Floats sum = {0}, of_t = {0};
    for (int v = 0; v < VECTORS; v++) {
        Floats t = floored((z[v] - from) * exponent), power = power_of_two(t);
        sum += power;
        of_t += t * power;
    }
    if (moment) *moment = of_t;
    /* 0 times NaN is NaN, which must not be lost */
    return max == -INFINITY ? 0 * sum : sum;
}

/* The pass over all logits, a strip of LANES blocks at a time: their maxima together, then their
   sums together, from the cache. While these are taken, the logits of a later strip are fetched;
   otherwise a third of the time is waiting for memory. */
static inline __attribute__((always_inline)) void pass(const Row *row, const Scratch *scratch,
                                                       int is_bfloat16, int with_moments) {
    float *maxima = scratch->maxima, *sums = scratch->sums, *moments = scratch->moments;
    int64_t block_bytes = BLOCK * (is_bfloat16 ? 2 : 4);
    for (int64_t first = 0; first < row->num_blocks; first += LANES) {
        int64_t rest = row->num_blocks - first, num = rest < LANES ? rest : LANES;
        Padded padded;
        const char *from[LANES];
        Floats z[VECTORS], of[LANES], moments_of[LANES];

        /* maxima */
        for (int i = 0; i < LANES; i++) of[i] = -INFINITY + (Floats){0};
        for (int i = 0; i < num; i++) {
            from[i] = block_at(row, first + i, &padded);
            read_quickly(z, from[i], is_bfloat16);
            of[i] = greatest_of(z);
        }
        store(maxima + first, greatest_lanes(of));

        /* sums */
        for (int i = 0; i < LANES; i++) of[i] = moments_of[i] = (Floats){0};
        for (int i = 0; i < num; i++) {
            uintptr_t later = (uintptr_t)from[i] + AHEAD;
            for (int64_t at = 0; at < block_bytes; at += LINE)
                __builtin_prefetch((const void *)(later + at), 0, 3);
            read_quickly(z, from[i], is_bfloat16);
            Floats *moment = with_moments ? &moments_of[i] : NULL;
            of[i] = sum_of(z, maxima[first + i], row->exponent, moment);
        }
        store(sums + first, sums_of_lanes(of));
        if (with_moments) store(moments + first, sums_of_lanes(moments_of));
    }
}

/* Each kind of pass as a function of its own: together in one, they are 4 % slower. */
#define PASS(name, is_bfloat16, with_moments) \
    static __attribute__((noinline)) void name(const Row *row, const Scratch *to) { \
        pass(row, to, is_bfloat16, with_moments); \
    }
PASS(pass_float32, 0, 0)
PASS(pass_float32_moments, 0, 1)
PASS(pass_bfloat16, 1, 0)
PASS(pass_bfloat16_moments, 1, 1)

/* Take the maxima, sums and moments of the found blocks again without the kept entries. */
static void remove_kept(const Row *row, const Scratch *scratch, int64_t num_found, uint64_t last) {
    for (int64_t first = 0; first < num_found; first += LANES) {
        int64_t rest = num_found - first, num = rest < LANES ? rest : LANES;
        Floats z[VECTORS], sums[LANES] = {{0}}, moments[LANES] = {{0}};
        for (int i = 0; i < num; i++) {
            int32_t block = scratch->found[first + i];
            read_rest(z, row, block, last);
            scratch->maxima[block] = greatest_lane(greatest_of(z));
            Floats *of_t = scratch->moments ? &moments[i] : NULL;
            sums[i] = sum_of(z, scratch->maxima[block], row->exponent, of_t);
        }
        Floats sum = sums_of_lanes(sums), moment = sums_of_lanes(moments);
        for (int i = 0; i < num; i++) {
            scratch->sums[scratch->found[first + i]] = sum[i];
            if (scratch->moments) scratch->moments[scratch->found[first + i]] = moment[i];
        }
    }
}

/* Make the sums and moments relative to the greatest maximum, which is returned; 0 where it is
   -inf. */
static float share_base(const Row *row, const Scratch *scratch) {
    Floats max = -INFINITY + (Floats){0};
    for (int64_t b = 0; b < row->num_blocks; b += LANES)
        max = greater(load(scratch->maxima + b), max);
    float base = greatest_lane(max), from = base == -INFINITY ? 0 : base;
    for (int64_t b = 0; b < row->num_blocks; b += LANES) {
        Floats t = floored((load(scratch->maxima + b) - from) * row->exponent);
        Floats power = power_of_two(t), sum = load(scratch->sums + b);
        store(scratch->sums + b, sum * power);
        if (scratch->moments)
            store(scratch->moments + b, (load(scratch->moments + b) + t * sum) * power);
    }
    return base;
}

/* Selection ------------------------------------------------------------------------------------ */

/* A level that at least k of num levels reach, 0 < k <= num, while fewer than k are above it, or
   exactly k reach it: found bit by bit from the top. */
static uint32_t threshold(const uint32_t *levels, int64_t num, int64_t k) {
    uint32_t found = 0;
    for (int bit = 31; bit >= 0; bit--) {
        uint32_t next = found | 1u << bit;
        int32_t num_reaching = 0;
        for (int64_t i = 0; i < num; i++) num_reaching += levels[i] >= next;
        if (num_reaching >= k) found = next;
        if (num_reaching == k) break;
    }
    return found;
}

/* Places of the k greatest levels, ascending; equal ones are taken in the order of their places. */
static void pick(int32_t *places, const uint32_t *levels, int64_t num, int64_t k) {
    if (k == 0) return;
    uint32_t least = k < num ? threshold(levels, num, k) : 0;
    int64_t num_above = 0, num_picked = 0;
    for (int64_t i = 0; i < num; i++) num_above += levels[i] > least;
    int64_t room = k - (num_above < k ? num_above : k); /* for those that equal the least */
    for (int64_t i = 0; i < num && num_picked < k; i++)
        if (levels[i] >= least && (levels[i] > least || room-- > 0))
            places[num_picked++] = (int32_t)i;
}

/* Merge sort: by twos, fours and so on, between `keys` and `spare`. Returns the sorted one. */
static uint64_t *sort_descending(uint64_t *keys, uint64_t *spare, int64_t num) {
    for (int64_t width = 1; width < num; width *= 2) {
        for (int64_t start = 0; start < num; start += 2 * width) {
            int64_t middle = start + width < num ? start + width : num;
            int64_t end = middle + width < num ? middle + width : num;
            int64_t left = start, right = middle;
            for (int64_t i = start; i < end; i++) {
                int takes_left = left < middle && (right == end || keys[left] > keys[right]);
                spare[i] = keys[takes_left ? left : right];
                left += takes_left;
                right += !takes_left;
            }
        }
        uint64_t *sorted = spare;
        spare = keys;
        keys = sorted;
    }
    return keys;
}

/* Rows ----------------------------------------------------------------------------------------- */

/* Find the blocks of the k greatest maxima, ascending. Returns how many there are. */
static int64_t find_blocks(const Row *row, int64_t k, const Scratch *scratch) {
    int64_t num_found = k < row->num_blocks ? k : row->num_blocks;
    for (int64_t b = 0; b < row->num_blocks; b++)
        scratch->levels[b] = level_of(scratch->maxima[b]);
    pick(scratch->found, scratch->levels, row->num_blocks, num_found);
    return num_found;
}

/* The k greatest entries of the found blocks, into `keys`. NaN is never kept. */
static Split keep(const Row *row, int64_t k, const Scratch *scratch, int64_t num_found) {
    /* no kept entry is below the k-th maximum, where there are k blocks */
    float least = num_found && num_found == k ? INFINITY : -INFINITY;
    for (int64_t i = 0; i < num_found && num_found == k; i++) {
        float max = scratch->maxima[scratch->found[i]];
        least = max < least ? max : least;
    }

    /* all entries that reach it, by id */
    int64_t num = 0;
    for (int64_t i = 0; i < num_found; i++) {
        Floats z[VECTORS];
        int64_t first = (int64_t)scratch->found[i] * BLOCK, rest = row->vocab_size - first;
        read_block(z, row, scratch->found[i]);
        for (int v = 0; v < VECTORS; v++)
            for (uint32_t bits = reaching(z[v], least); bits; bits &= bits - 1) {
                int place = v * LANES + __builtin_ctz(bits);
                if (place >= rest) break;
                scratch->levels[num] = level_of(z[v][place % LANES]);
                scratch->ids[num++] = (int32_t)(first + place);
            }
    }

    /* the k greatest of them, by value */
    Split split = {.num = num < k ? num : k,
                   .keys = scratch->keys,
                   .rest_base = -INFINITY,
                   .rest_sums = scratch->sums,
                   .rest_moments = scratch->moments,
                   .rest_maxima = scratch->maxima};
    pick(scratch->places, scratch->levels, num, split.num);
    for (int64_t i = 0; i < split.num; i++) {
        int32_t place = scratch->places[i];
        split.keys[i] = (uint64_t)scratch->levels[place] << 32 | (uint32_t)~scratch->ids[place];
    }
    split.keys = sort_descending(split.keys, scratch->spare_keys, split.num);
    return split;
}

/* The top-k of a row, and the sums of its other ids, in the scratch's memory. */
Split split_row(const Row *row, int64_t k, const Scratch *scratch) {
    if (row->is_bfloat16)
        (scratch->moments ? pass_bfloat16_moments : pass_bfloat16)(row, scratch);
    else
        (scratch->moments ? pass_float32_moments : pass_float32)(row, scratch);
    int64_t num_found = find_blocks(row, k, scratch);
    Split split = keep(row, k, scratch, num_found);
    if (split.num) remove_kept(row, scratch, num_found, split.keys[split.num - 1]);
    split.rest_base = share_base(row, scratch);
    return split;
}

int scratch_for(Scratch *scratch, int64_t num_blocks, int64_t k, int with_moments) {
    int64_t padded = (num_blocks + LANES - 1) / LANES * LANES;
    int64_t num_found = k < num_blocks ? k : num_blocks, most = num_found * BLOCK;
    int64_t num_levels = most > num_blocks ? most : num_blocks;
    int64_t num_floats = (with_moments ? 3 : 2) * padded;
    char *memory = malloc(16 * k + 4 * (num_floats + num_levels + num_found + most + k) + 1);
    scratch->memory = memory;
    scratch->keys = (uint64_t *)memory;
    scratch->spare_keys = scratch->keys + k;
    scratch->maxima = (float *)(scratch->spare_keys + k);
    scratch->sums = scratch->maxima + padded;
    scratch->moments = with_moments ? scratch->sums + padded : NULL;
    scratch->levels = (uint32_t *)(scratch->maxima + num_floats);
    scratch->found = (int32_t *)(scratch->levels + num_levels);
    scratch->ids = scratch->found + num_found;
    scratch->places = scratch->ids + most;
    return memory != NULL;
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
    Row row = row_of(logits, is_bfloat16, vocab_size, temperature);
    int64_t num_blocks = row.num_blocks;
    Scratch scratch;
    if (!scratch_for(&scratch, num_blocks, k, 0)) return -1;
    for (int64_t i = 0; i < num_rows; i++) {
        row.logits = (const char *)logits + i * stride * (is_bfloat16 ? 2 : 4);
        Split split = split_row(&row, k, &scratch);
        for (int64_t j = 0; j < k; j++) {
            ids[i * k + j] = j < split.num ? (int32_t)id_of(split.keys[j]) : 0;
            values[i * k + j] = j < split.num ? value_of(split.keys[j]) : NAN;
        }
        rest_base[i] = split.rest_base;
        memcpy(rest_sums + i * num_blocks, split.rest_sums, num_blocks * sizeof *rest_sums);
    }
    free(scratch.memory);
    return 0;
}
