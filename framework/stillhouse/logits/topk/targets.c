/* Targets of rows of logits: what the filter of `blockmax.c` finds, normalised, and blind draws
   from the tail. The same arithmetic as `found.normalise` and `draws.draw_in_blocks`, by row. */

#include "blockmax.h"

#include <stdlib.h>

/* The double before 1: a number times it, rounded, is still less than that number. */
static const double BELOW_ONE = 1.0 - 0x1p-53;

/* What a token's target is written to. */
typedef struct {
    float *logprobs, *tail_logmass, *log_sum_exp;
    int32_t *draws;
} Target;

/* Log-probabilities and log-sum-exp, relative to the greatest logit, so that neither a tail of
   e^-90 nor a kept mass of 1e-6 loses digits. */
static void normalise(const Target *to, const Split *split, int64_t k, double rest_sum,
                      double temperature) {
    /* logs of the masses of the first kept entry and of the rest, and the greater of the two */
    double base = split->rest_base, best = split->num ? value_of(split->keys[0]) : base;
    double top = best > base ? best : base;
    double first = (best - top) / temperature;
    double rest = (base - top) / temperature + log(rest_sum), most = rest > first ? rest : first;

    /* log of all mass, and the shares in it */
    double sum = exp(rest - most);
    for (int64_t i = 0; i < split->num; i++)
        sum += exp((value_of(split->keys[i]) - top) / temperature - most);
    double log_sum = split->num < k ? NAN : most + log(sum);
    for (int64_t i = 0; i < k; i++) {
        double kept = i < split->num ? (value_of(split->keys[i]) - top) / temperature : NAN;
        to->logprobs[i] = (float)(kept - log_sum);
    }
    *to->tail_logmass = (float)(rest - log_sum);
    *to->log_sum_exp = (float)(top / temperature + log_sum);
}

/* A random number in [0, 1) of 53 bits: splitmix64 of the seed, as `draws._uniforms` has it. */
static double uniform(uint64_t seed, int64_t index) {
    uint64_t x = seed + UINT64_C(0x9E3779B97F4A7C15) * (uint64_t)(index + 1);
    x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
    x ^= x >> 31;
    return (double)(x >> 11) * 0x1p-53;
}

/* exp((z - peak) / T) of a block's ids that are not kept, whose peak is the greatest; 0 for kept
   ones and for -inf. */
static void weigh(float weights[BLOCK], const Row *row, const Split *split, int64_t block) {
    Floats z[VECTORS];
    if (split->num)
        read_rest(z, row, block, split->keys[split->num - 1]);
    else
        read_block(z, row, block);
    float peak = greatest_lane(greatest_of(z)), from = peak == -INFINITY ? 0 : peak;
    for (int v = 0; v < VECTORS; v++) {
        Floats t = (z[v] - from) * row->exponent;
        store(weights + v * LANES, choose(t > -126.0f, power_of_two(t), (Floats){0}));
    }
}

/* The place in a block before which there is this fraction of its weight, or a little less. */
static int find(const float weights[BLOCK], double fraction) {
    /* the vector, by the sums of all */
    double sums[VECTORS] = {0}, total = 0, before = 0;
    for (int lane = 0; lane < LANES; lane++)
        for (int v = 0; v < VECTORS; v++) sums[v] += weights[v * LANES + lane];
    for (int v = 0; v < VECTORS; v++) total += sums[v];
    double place = fraction * total;
    int v = 0;
    for (; v < VECTORS - 1 && before + sums[v] <= place; v++) before += sums[v];

    /* the id within it; the last one with weight where rounding leaves none */
    int found = v * LANES;
    for (int i = v * LANES; i < (v + 1) * LANES && before <= place; i++) {
        if (weights[i] > 0) found = i;
        before += weights[i];
    }
    return found;
}

/* Stratified draws from the ids that are not kept, ascending; vocab_size, which is no id, where
   these have no mass. `up_to`: for each block, the sum of the rest up to its end. */
static void draw(int32_t *draws, const Row *row, const Split *split, const double *up_to,
                 int64_t num_draws, uint64_t seed) {
    float weights[BLOCK];
    int64_t block = 0, weighed = -1;
    for (int64_t i = 0; i < num_draws; i++) {
        double share = (i + uniform(seed, i)) / num_draws;
        double place = (share < BELOW_ONE ? share : BELOW_ONE) * up_to[row->num_blocks - 1];
        while (block < row->num_blocks && !(up_to[block] > place)) block++;
        if (block == row->num_blocks) {
            draws[i] = (int32_t)row->vocab_size;
            continue;
        }
        if (block != weighed) weigh(weights, row, split, weighed = block);
        double fraction = 1.0 - (up_to[block] - place) / split->rest_sums[block];
        fraction = fraction < 0 ? 0 : fraction < BELOW_ONE ? fraction : BELOW_ONE;
        draws[i] = (int32_t)(block * BLOCK + find(weights, fraction));
    }
}

/* The targets of num_rows rows.

   logits        as for `split_rows`
   seeds         [num_rows], of the draws
   ids, logprobs [num_rows, k]: the k greatest, by value descending, ties by id ascending
   tail_logmass  [num_rows]: log of the mass of the other ids
   log_sum_exp   [num_rows]: of logits / T; not finite where a row is no distribution
   draws         [num_rows, num_draws]: ascending; vocab_size where the other ids have no mass

   Returns 0, or -1 if out of memory. */
int32_t make_targets(const void *logits, int32_t is_bfloat16, int64_t stride, int64_t num_rows,
                     int64_t vocab_size, int64_t k, double temperature, int64_t num_draws,
                     const int64_t *seeds, int32_t *ids, float *logprobs, float *tail_logmass,
                     float *log_sum_exp, int32_t *draws) {
    Row row = row_of(logits, is_bfloat16, vocab_size, temperature);
    double *up_to = malloc(row.num_blocks * sizeof *up_to);
    Scratch scratch = {0};
    int has_memory = up_to != NULL && scratch_for(&scratch, row.num_blocks, k);
    for (int64_t i = 0; has_memory && i < num_rows; i++) {
        row.logits = (const char *)logits + i * stride * (is_bfloat16 ? 2 : 4);
        Target to = {logprobs + i * k, tail_logmass + i, log_sum_exp + i, draws + i * num_draws};
        Split split = split_row(&row, k, &scratch);
        for (int64_t j = 0; j < k; j++)
            ids[i * k + j] = j < split.num ? (int32_t)id_of(split.keys[j]) : 0;
        double sum = 0;
        for (int64_t b = 0; b < row.num_blocks; b++) up_to[b] = sum += split.rest_sums[b];
        normalise(&to, &split, k, sum, temperature);
        draw(to.draws, &row, &split, up_to, num_draws, (uint64_t)seeds[i]);
    }
    free(up_to);
    free(scratch.memory);
    return has_memory ? 0 : -1;
}
