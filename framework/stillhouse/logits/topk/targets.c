/* Targets of rows of logits: what the filter of `blockmax.c` finds, normalised; draws from the tail,
   log p of these and of a label; the entropy of the tail. The same arithmetic as in `found.py` and
   as `draws.draw_in_blocks`, by row. */

#include "blockmax.h"

#include <stdlib.h>

static const double LOG_2 = 0.6931471805599453;
/* The double before 1: a number times it, rounded, is still less than that number. */
static const double BELOW_ONE = 1.0 - 0x1p-53;

/* What a token's target is written to; the last three may be NULL, where they are not wanted. */
typedef struct {
    int32_t *ids;
    float *logprobs, *tail_logmass, *log_sum_exp;
    int32_t *draws;
    float *draw_logprobs, *label_logprob, *tail_entropy;
} Target;

/* Log-probabilities ---------------------------------------------------------------------------- */

/* A row's greatest logit, and the log of all mass relative to it: so neither a tail of e^-90 nor a
   kept mass of 1e-6 loses digits. */
typedef struct {
    double top, log_sum, temperature;
} Normal;

static double logprob_of(double z, Normal normal) {
    return (z - normal.top) / normal.temperature - normal.log_sum;
}

/* Writes the kept entries, the tail's mass and the log-sum-exp. `rest_sum`: of all blocks. */
static Normal normalise(const Target *to, const Split *split, int64_t k, double rest_sum,
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
    Normal normal = {top, split->num < k ? NAN : most + log(sum), temperature};
    for (int64_t i = 0; i < k; i++) {
        to->ids[i] = i < split->num ? (int32_t)id_of(split->keys[i]) : 0;
        to->logprobs[i] =
            (float)(i < split->num ? logprob_of(value_of(split->keys[i]), normal) : NAN);
    }
    *to->tail_logmass = (float)(rest - normal.log_sum);
    *to->log_sum_exp = (float)(top / temperature + normal.log_sum);
    return normal;
}

/* Draws ---------------------------------------------------------------------------------------- */

/* A random number in [0, 1) of 53 bits: splitmix64 of the seed, as `draws._uniforms` has it. */
static double uniform(uint64_t seed, int64_t index) {
    uint64_t x = seed + UINT64_C(0x9E3779B97F4A7C15) * (uint64_t)(index + 1);
    x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
    x ^= x >> 31;
    return (double)(x >> 11) * 0x1p-53;
}

/* What draws are made from: the tail, or half of it and half the uniform distribution over the
   num_others ids that are not kept. */
typedef struct {
    int is_mixed;
    double rest_sum, num_others;
    double *masses, *up_to; /* [num_blocks]: of each block, and of all blocks up to its end */
} Proposal;

/* Fill in what the blocks have of the tail, and all of it. */
static void lay_out_rest(Proposal *proposal, const Row *row, const Split *split) {
    double sum = 0;
    for (int64_t b = 0; b < row->num_blocks; b++) {
        proposal->masses[b] = split->rest_sums[b];
        proposal->up_to[b] = sum += proposal->masses[b];
    }
    proposal->rest_sum = sum;
}

/* Make these masses their shares of the tail, and add the blocks' shares of the num_others ids. */
static void lay_out_mixed(Proposal *proposal, const Row *row, const Split *split) {
    double *masses = proposal->masses, sum = 0;
    for (int64_t b = 0; b < row->num_blocks; b++) masses[b] = BLOCK;
    masses[row->num_blocks - 1] -= row->num_blocks * BLOCK - row->vocab_size;
    for (int64_t i = 0; i < split->num; i++) masses[id_of(split->keys[i]) / BLOCK] -= 1;
    for (int64_t b = 0; b < row->num_blocks; b++)
        masses[b] = split->rest_sums[b] / proposal->rest_sum + masses[b] / proposal->num_others;
    for (int64_t b = 0; b < row->num_blocks; b++) proposal->up_to[b] = sum += masses[b];
}

/* 2^t = exp((z - peak) / T) and t of a block's ids that are not kept, whose peak is the greatest; 0
   and -126 for kept ones and for -inf. */
static void weigh(float weights[BLOCK], float exponents[BLOCK], const Row *row, const Split *split,
                  int64_t block) {
    Floats z[VECTORS];
    if (split->num)
        read_rest(z, row, block, split->keys[split->num - 1]);
    else
        read_block(z, row, block);
    float peak = greatest_lane(greatest_of(z)), from = peak == -INFINITY ? 0 : peak;
    for (int v = 0; v < VECTORS; v++) {
        Floats t = floored((z[v] - from) * row->exponent);
        store(exponents + v * LANES, t);
        store(weights + v * LANES, choose(t > -126.0f, power_of_two(t), (Floats){0}));
    }
}

/* Add the uniform half to the weights of the rest: 1 for each id that is not kept. */
static void mix_in_uniform(float weights[BLOCK], const Proposal *proposal, const Row *row,
                           const Split *split, int64_t block) {
    /* what makes the weights of the rest the block's share of it, beside these ones */
    double sum = 0, share = split->rest_sums[block] / proposal->rest_sum;
    for (int i = 0; i < BLOCK; i++) sum += weights[i];
    float scale = (float)(share * proposal->num_others / (sum > 1 ? sum : 1));

    Floats z[VECTORS];
    Ints ids = first_ids(block);
    read_block(z, row, block);
    for (int v = 0; v < VECTORS; v++) {
        Ints is_other = ids < (int32_t)row->vocab_size;
        if (split->num) is_other &= ~are_kept(z[v], ids, split->keys[split->num - 1]);
        Floats mixed = load(weights + v * LANES) * scale + 1.0f;
        store(weights + v * LANES, choose(is_other, mixed, (Floats){0}));
        ids += LANES;
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

/* Stratified draws from the proposal, ascending; vocab_size, which is no id, where it has no
   mass. */
static void draw(int32_t *draws, const Proposal *proposal, const Row *row, const Split *split,
                 int64_t num_draws, uint64_t seed) {
    const double *up_to = proposal->up_to;
    float weights[BLOCK], exponents[BLOCK];
    int64_t block = 0, weighed = -1;
    for (int64_t i = 0; i < num_draws; i++) {
        /* the block, and the fraction of its mass before the draw */
        double share = (i + uniform(seed, i)) / num_draws;
        double place = (share < BELOW_ONE ? share : BELOW_ONE) * up_to[row->num_blocks - 1];
        while (block < row->num_blocks && !(up_to[block] > place)) block++;
        if (block == row->num_blocks) {
            draws[i] = (int32_t)row->vocab_size;
            continue;
        }
        double fraction = 1.0 - (up_to[block] - place) / proposal->masses[block];
        fraction = fraction < 0 ? 0 : fraction < BELOW_ONE ? fraction : BELOW_ONE;

        /* the id at the same fraction of the block's weights */
        if (block != weighed) {
            weigh(weights, exponents, row, split, weighed = block);
            if (proposal->is_mixed) mix_in_uniform(weights, proposal, row, split, block);
        }
        draws[i] = (int32_t)(block * BLOCK + find(weights, fraction));
    }
}

/* Entropy -------------------------------------------------------------------------------------- */

/* The entropy in nats of the distribution over the ids that are not kept, 0 where these have no
   mass: log(sum) - log(2) moment / sum, over all of them. The block of the greatest logit is taken
   anew in double precision and without the 1 of this logit: where the sum is near 1, all of the
   entropy is in what is beyond 1. */
static double entropy_of(const Row *row, const Split *split) {
    /* the first block of the greatest logit; NaN may leave none */
    int64_t peak = 0;
    while (peak < row->num_blocks && split->rest_maxima[peak] != split->rest_base) peak++;
    if (peak == row->num_blocks) return NAN;

    /* the other blocks */
    double sum = 0, moment = 0;
    for (int64_t b = 0; b < row->num_blocks; b++) {
        sum += b == peak ? 0 : split->rest_sums[b];
        moment += b == peak ? 0 : split->rest_moments[b];
    }

    /* this block, without the greatest */
    float weights[BLOCK], exponents[BLOCK];
    int greatest = 0;
    weigh(weights, exponents, row, split, peak);
    while (greatest < BLOCK - 1 && weights[greatest] != 1) greatest++;
    weights[greatest] = 0;
    for (int i = 0; i < BLOCK; i++) {
        sum += weights[i];
        moment += (double)weights[i] * exponents[i];
    }
    return log1p(sum) - LOG_2 * moment / (1 + sum);
}

/* Targets -------------------------------------------------------------------------------------- */

static double logit_at(const Row *row, int64_t id) {
    if (!row->is_bfloat16) return ((const float *)row->logits)[id];
    uint32_t bits = (uint32_t)((const uint16_t *)row->logits)[id] << 16;
    float z;
    memcpy(&z, &bits, 4);
    return z;
}

static void make_target(const Target *to, const Row *row, const Scratch *scratch,
                        Proposal *proposal, int64_t k, double temperature, int64_t num_draws,
                        uint64_t seed, int64_t label) {
    Split split = split_row(row, k, scratch);
    lay_out_rest(proposal, row, &split);
    Normal normal = normalise(to, &split, k, proposal->rest_sum, temperature);
    if (proposal->is_mixed && proposal->rest_sum != 0) lay_out_mixed(proposal, row, &split);
    draw(to->draws, proposal, row, &split, num_draws, seed);
    for (int64_t i = 0; to->draw_logprobs && i < num_draws; i++) {
        double z = to->draws[i] < row->vocab_size ? logit_at(row, to->draws[i]) : -INFINITY;
        to->draw_logprobs[i] = (float)logprob_of(z, normal);
    }
    if (to->label_logprob) *to->label_logprob = (float)logprob_of(logit_at(row, label), normal);
    if (to->tail_entropy) *to->tail_entropy = (float)entropy_of(row, &split);
}

/* The targets of num_rows rows.

   logits         as for `split_rows`
   seeds, labels  [num_rows]: of the draws, and ids of the vocabulary
   ids, logprobs  [num_rows, k]: the k greatest, by value descending, ties by id ascending
   tail_logmass   [num_rows]: log of the mass of the other ids
   log_sum_exp    [num_rows]: of logits / T; not finite where a row is no distribution
   draws          [num_rows, num_draws]: ascending; vocab_size where the other ids have no mass
   draw_logprobs  [num_rows, num_draws] of weighted draws, or NULL for blind ones
   label_logprobs [num_rows], or NULL where none are wanted
   tail_entropy   [num_rows], in nats, or NULL where none is wanted

   Returns 0, or -1 if out of memory. */
int32_t make_targets(const void *logits, int32_t is_bfloat16, int64_t stride, int64_t num_rows,
                     int64_t vocab_size, int64_t k, double temperature, int64_t num_draws,
                     const int64_t *seeds, const int64_t *labels, int32_t *ids, float *logprobs,
                     float *tail_logmass, float *log_sum_exp, int32_t *draws, float *draw_logprobs,
                     float *label_logprobs, float *tail_entropy) {
    Row row = row_of(logits, is_bfloat16, vocab_size, temperature);
    double *masses = malloc(2 * row.num_blocks * sizeof *masses);
    Proposal proposal = {draw_logprobs != NULL, 0, (double)(vocab_size - k), masses,
                         masses + row.num_blocks};
    Scratch scratch = {0};
    int has_memory = masses && scratch_for(&scratch, row.num_blocks, k, tail_entropy != NULL);
    for (int64_t i = 0; has_memory && i < num_rows; i++) {
        row.logits = (const char *)logits + i * stride * (is_bfloat16 ? 2 : 4);
        Target to = {ids + i * k,
                     logprobs + i * k,
                     tail_logmass + i,
                     log_sum_exp + i,
                     draws + i * num_draws,
                     draw_logprobs ? draw_logprobs + i * num_draws : NULL,
                     label_logprobs ? label_logprobs + i : NULL,
                     tail_entropy ? tail_entropy + i : NULL};
        make_target(&to, &row, &scratch, &proposal, k, temperature, num_draws, (uint64_t)seeds[i],
                    labels[i]);
    }
    free(masses);
    free(scratch.memory);
    return has_memory ? 0 : -1;
}
