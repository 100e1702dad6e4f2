"""Selection: which of the samples that a model wrote are trained on, as a view of what is recorded.

A view is a function of the recorded values and the rule alone: it does not depend on the order in
which shards arrive, on who asks, or on graders that the rule does not name.

Letters of shapes: S samples, H hashes of a signature, G runs of five tokens, K kept samples,
P prompts; L samples that are left at a step, B bands of hashes, R hashes of a band.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from stillhouse.config.graders import AcceptSection
from stillhouse.seeded import GOLDEN, splitmix64
from stillhouse.store.rollouts import CUT, SET_ASIDE

NUM_HASHES = 64
RUN_TOKENS = 5

SET_ASIDE_REASON = "set aside by its writer"
UNFINISHED = "cut at the longest length"
LOW_SCORE = "below the least score of {}"
WITHOUT_LOGPROBS = "without log-probabilities of its writer"
CONTAMINATED = "a passage of a test set"
REPEAT = "the tokens of another"
NEAR_REPEAT = "much like another"
BEYOND_BEST_OF = "beyond the first best_of"
ENOUGH = "more than are kept of a prompt"

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ODD = np.uint64(0xC2B2AE3D27D4EB4F)
# odd; of splitmix64, so that every version of NumPy has the same
_FACTORS_H = (splitmix64(np.arange(1, NUM_HASHES + 1) * GOLDEN) >> 32).astype(
    np.uint32
) | np.uint32(1)
_LIKELY = 0.999  # chance at which a pair of just the least similarity is compared
_COMPARED = 1024  # runs of tokens that are hashed at one time


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """By which repeats are found: made of a shard's token ids, so that these need not stay in
    memory."""

    digests_S: np.ndarray  # uint64: XXH3 of all ids
    signatures_SH: np.ndarray  # uint32: MinHash of the runs of five ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What is recorded of samples, in any order; a prompt and a number name each of them."""

    prompts_S: np.ndarray  # int64
    numbers_S: np.ndarray  # int64: of the sample among those of its prompt
    finish_S: np.ndarray  # uint8: 0 ended itself, 1 cut, 2 set aside
    has_logprobs_S: np.ndarray  # bool: whether it has log-probabilities
    scores: Mapping[str, np.ndarray]  # float64 [S] by the name of a grader
    fingerprints: Fingerprints
    contaminated_S: np.ndarray  # bool; see decontaminate.py


@dataclass(frozen=True, slots=True)
class Selection:
    """Which samples are kept, and why the others are not."""

    kept_K: np.ndarray  # int64: places among the samples, by prompt and then by rank within it
    reasons_S: np.ndarray  # int64: place in `drops` of the reason; -1 for what is kept
    drops: Mapping[str, int]  # samples by reason, in the order in which reasons are looked for
    prompts_P: np.ndarray  # int64, ascending
    rejection_P: np.ndarray  # float64: share of a prompt's samples dropped for finish or score


def joined(shards: Sequence[Samples]) -> Samples:
    """The samples of one or more shards, which have scores by the same graders."""
    prints = [shard.fingerprints for shard in shards]
    return Samples(
        prompts_S=np.concatenate([shard.prompts_S for shard in shards]),
        numbers_S=np.concatenate([shard.numbers_S for shard in shards]),
        finish_S=np.concatenate([shard.finish_S for shard in shards]),
        has_logprobs_S=np.concatenate([shard.has_logprobs_S for shard in shards]),
        scores={
            name: np.concatenate([shard.scores[name] for shard in shards])
            for name in shards[0].scores
        },
        fingerprints=Fingerprints(
            np.concatenate([each.digests_S for each in prints]),
            np.concatenate([each.signatures_SH for each in prints]),
        ),
        contaminated_S=np.concatenate([shard.contaminated_S for shard in shards]),
    )


def fingerprints_of(sequences: Sequence[np.ndarray]) -> Fingerprints:
    """Of sequences of token ids, prompts included."""
    signatures_SH = np.empty((len(sequences), NUM_HASHES), np.uint32)
    for signature_H, each in zip(signatures_SH, sequences, strict=True):
        signature_H[:] = _signature(np.ascontiguousarray(each, "<i4"))
    return Fingerprints(digests_of(sequences), signatures_SH)


def digests_of(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 [S]: by which exact repeats alone are found, in a hundredth of the time."""
    ids = [np.ascontiguousarray(sequence, "<i4") for sequence in sequences]
    return np.array([xxhash.xxh3_64_intdigest(each.tobytes()) for each in ids], np.uint64)


def select(samples: Samples, rule: AcceptSection) -> Selection:
    """What the rule keeps. A grader that it names must have a score of each sample."""
    order_S = _ranked(samples, rule)
    reasons, wrong = _looked_for(samples, rule)

    # the first reason of each sample that lies in itself
    reasons_S = np.full(len(order_S), -1, np.int64)
    for number, dropped_S in reversed([*enumerate(wrong)]):
        reasons_S[dropped_S] = number
    num_rejections = 2 + len(rule.min_score)  # finish and scores
    is_rejected_S = (reasons_S >= 0) & (reasons_S < num_rejections)

    # those that lie in others before it
    repeat, near, enough = (reasons.index(each) for each in (REPEAT, NEAR_REPEAT, ENOUGH))
    if not rule.keep_repeats:
        _drop_repeats(reasons_S, order_S, samples.fingerprints, reason=repeat)
    if rule.similarity is not None:
        _drop_near(
            reasons_S, order_S, samples.fingerprints, reason=near, similarity=rule.similarity
        )
    if rule.kept_a_prompt is not None:
        most = rule.kept_a_prompt
        _drop_beyond(reasons_S, order_S, samples.prompts_S, reason=enough, most=most)

    # counts
    counts = np.bincount(reasons_S[reasons_S >= 0], minlength=len(reasons))
    prompts_P, of_prompt_S = np.unique(samples.prompts_S, return_inverse=True)
    num_P = np.bincount(of_prompt_S, minlength=len(prompts_P))
    rejected_P = np.bincount(of_prompt_S[is_rejected_S], minlength=len(prompts_P))
    return Selection(
        order_S[reasons_S[order_S] == -1],
        reasons_S,
        dict(zip(reasons, counts.tolist(), strict=True)),
        prompts_P,
        rejected_P / num_P,
    )


def _ranked(samples: Samples, rule: AcceptSection) -> np.ndarray:
    """Places of the samples by prompt; within a prompt the best first where the best is wanted, and
    else by number."""
    keys = [samples.numbers_S, samples.prompts_S]  # the last one counts most
    if rule.best_of is not None:
        mean_S = np.mean([samples.scores[name] for name in sorted(rule.min_score)], axis=0)
        keys.insert(1, -mean_S)
    return np.lexsort(keys)


def _looked_for(samples: Samples, rule: AcceptSection) -> tuple[list[str], list[np.ndarray]]:
    """The reasons in order, and for those that lie in a sample itself which samples they drop."""
    names = sorted(rule.min_score)
    alone = {
        SET_ASIDE_REASON: samples.finish_S == SET_ASIDE,
        UNFINISHED: (samples.finish_S == CUT) & (not rule.keep_unfinished),
        **{LOW_SCORE.format(name): samples.scores[name] < rule.min_score[name] for name in names},
        WITHOUT_LOGPROBS: ~samples.has_logprobs_S & rule.with_logprobs,
        CONTAMINATED: samples.contaminated_S,
        BEYOND_BEST_OF: samples.numbers_S >= (np.inf if rule.best_of is None else rule.best_of),
    }
    return [*alone, REPEAT, NEAR_REPEAT, ENOUGH], [*alone.values()]


def _drop_repeats(
    reasons_S: np.ndarray, order_S: np.ndarray, fingerprints: Fingerprints, *, reason: int
) -> None:
    """Of those with the same ids, all but the first."""
    left_L = order_S[reasons_S[order_S] == -1]
    _, first = np.unique(fingerprints.digests_S[left_L], return_index=True)
    is_repeat_L = np.ones(len(left_L), bool)
    is_repeat_L[first] = False
    reasons_S[left_L[is_repeat_L]] = reason


def _drop_near(
    reasons_S: np.ndarray,
    order_S: np.ndarray,
    fingerprints: Fingerprints,
    *,
    reason: int,
    similarity: float,
) -> None:
    """Each that is as similar as this to an earlier one which is kept, by the share of equal
    hashes: an estimate of the share of common runs of tokens (Broder 1997), off by 0.05 or so.

    Only such pairs are compared as have a band of hashes in common.
    """
    left_L = order_S[reasons_S[order_S] == -1]
    signatures_LH = fingerprints.signatures_SH[left_L]
    groups_LB = _common_bands(signatures_LH, num_rows=_rows_of_a_band(similarity))
    kept = defaultdict[tuple[int, int], list[int]](list)  # by band and group
    for place in np.flatnonzero((groups_LB >= 0).any(axis=1)).tolist():
        groups = [each for each in enumerate(groups_LB[place].tolist()) if each[1] >= 0]
        others = sorted({other for group in groups for other in kept[group]})
        equal = signatures_LH[others] == signatures_LH[place]
        if others and equal.mean(axis=1).max() >= similarity:
            reasons_S[left_L[place]] = reason
            continue
        for group in groups:
            kept[group].append(place)


def _common_bands(signatures_LH: np.ndarray, *, num_rows: int) -> np.ndarray:
    """int64 [L, B]: for each band of so many hashes a number that those share which have the same
    hashes there; -1 where no other has them."""
    groups_LB = np.empty((len(signatures_LH), NUM_HASHES // num_rows), np.int64)
    for band in range(groups_LB.shape[1]):
        rows_LR = np.ascontiguousarray(signatures_LH[:, band * num_rows : (band + 1) * num_rows])
        _, of_group_L, num = np.unique(
            rows_LR.view(f"V{4 * num_rows}")[:, 0], return_inverse=True, return_counts=True
        )
        groups_LB[:, band] = np.where(num[of_group_L] > 1, of_group_L, -1)
    return groups_LB


def _drop_beyond(
    reasons_S: np.ndarray, order_S: np.ndarray, prompts_S: np.ndarray, *, reason: int, most: int
) -> None:
    """Of each prompt, those that come after the first `most`."""
    left_L = order_S[reasons_S[order_S] == -1]  # by prompt
    _, start, num = np.unique(prompts_S[left_L], return_index=True, return_counts=True)
    rank_L = np.arange(len(left_L)) - np.repeat(start, num)
    reasons_S[left_L[rank_L >= most]] = reason


def _rows_of_a_band(similarity: float) -> int:
    """The most hashes a band for which a pair of this similarity nearly always shares a band."""
    return next(
        rows
        for rows in (8, 4, 2, 1)
        if 1 - (1 - similarity**rows) ** (NUM_HASHES // rows) >= _LIKELY
    )


def _signature(ids: np.ndarray) -> np.ndarray:
    """MinHash: of each of H hash functions, its least value over all runs of five ids. A shorter
    sequence is one run."""
    length = min(RUN_TOKENS, len(ids))
    hashes_G = np.zeros(len(ids) - length + 1, np.uint64)
    wide = ids.astype(np.uint64)
    for offset in range(length):
        hashes_G = hashes_G * _GOLDEN ^ wide[offset : offset + len(hashes_G)] * _ODD
    mixed_G = ((hashes_G ^ hashes_G >> np.uint64(29)) * _GOLDEN >> np.uint64(32)).astype(np.uint32)
    least_H = np.full(NUM_HASHES, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(mixed_G), _COMPARED):
        hashes_HG = np.multiply.outer(_FACTORS_H, mixed_G[start : start + _COMPARED])
        np.minimum(least_H, hashes_HG.min(axis=1), out=least_H)
    return least_H
