"""Selection keeps or drops each sample, by what is recorded and by the rule alone. Every drop has
one reason, and does not depend on the order in which shards arrive."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.config.graders import AcceptSection
from stillhouse.sequences.selection import (
    Fingerprints,
    Samples,
    Selection,
    fingerprints_of,
    joined,
    select,
)


def samples_of(
    prompts: list[int],
    numbers: list[int],
    *,
    scores: Mapping[str, list[float]] | None = None,
    finish: list[int] | None = None,
    told: list[bool] | None = None,
    ids: list[list[int]] | None = None,
    contaminated: list[bool] | None = None,
) -> Samples:
    """Samples; each has ids of its own unless they are given."""
    num = len(prompts)
    ids = ids or [[prompt, number] for prompt, number in zip(prompts, numbers, strict=True)]
    return Samples(
        prompts_S=np.array(prompts, np.int64),
        numbers_S=np.array(numbers, np.int64),
        finish_S=np.array(finish or [0] * num, np.uint8),
        has_logprobs_S=np.array(told or [False] * num, bool),
        scores={name: np.array(each, float) for name, each in (scores or {}).items()},
        fingerprints=fingerprints_of([np.array(each, np.int32) for each in ids]),
        contaminated_S=np.array(contaminated or [False] * num, bool),
    )


@st.composite
def recorded(draw: st.DrawFn) -> Samples:
    """Any samples: few prompts, scores and texts, so that there are ties and repeats."""
    names = draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 4)), unique=True, min_size=1, max_size=15
        )
    )

    def each(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=len(names), max_size=len(names)))

    return samples_of(
        [prompt for prompt, _ in names],
        [number for _, number in names],
        scores={name: each(st.sampled_from([0.0, 0.5, 1.0])) for name in ("a", "b")},
        finish=each(st.integers(0, 2)),
        told=each(st.booleans()),
        ids=each(st.lists(st.integers(0, 2), max_size=7)),
        contaminated=each(st.booleans()),
    )


RULES = st.builds(
    AcceptSection,
    min_score=st.dictionaries(
        st.sampled_from(["a", "b"]), st.sampled_from([0.0, 0.5, 1.0]), min_size=1
    ),
    keep_unfinished=st.booleans(),
    with_logprobs=st.booleans(),
    best_of=st.none() | st.integers(1, 4),
    most_a_prompt=st.none() | st.integers(1, 3),
    keep_repeats=st.booleans(),
    similarity=st.none() | st.sampled_from([0.5, 0.8]),
)


def named(samples: Samples, selection: Selection) -> list[tuple[int, int]]:
    kept = selection.kept_K
    return [*zip(samples.prompts_S[kept].tolist(), samples.numbers_S[kept].tolist(), strict=True)]


@settings(max_examples=30, deadline=None)
@given(recorded(), RULES)
def test_each_sample_is_kept_or_dropped_for_one_reason(
    samples: Samples, rule: AcceptSection
) -> None:
    found = select(samples, rule)
    num = len(samples.prompts_S)
    assert len(found.kept_K) + sum(found.drops.values()) == num
    assert sorted(found.kept_K.tolist()) == np.flatnonzero(found.reasons_S == -1).tolist()
    names = [*found.drops]
    counts = Counter(names[number] for number in found.reasons_S[found.reasons_S >= 0])
    assert counts == Counter({name: count for name, count in found.drops.items() if count})


@settings(max_examples=30, deadline=None)
@given(recorded(), RULES, st.randoms(use_true_random=False))
def test_the_order_in_which_shards_arrive_changes_nothing(
    samples: Samples, rule: AcceptSection, rng: Any
) -> None:
    order = [*range(len(samples.prompts_S))]
    rng.shuffle(order)
    arrived = joined([shard_of(samples, place) for place in order])
    one, other = select(samples, rule), select(arrived, rule)
    assert named(samples, one) == named(arrived, other)
    assert [*one.drops.items()] == [*other.drops.items()]
    assert one.reasons_S[order].tolist() == other.reasons_S.tolist()
    assert one.rejection_P.tolist() == other.rejection_P.tolist()


def shard_of(samples: Samples, place: int) -> Samples:
    """A shard with one of the samples."""
    one, prints = slice(place, place + 1), samples.fingerprints
    return Samples(
        prompts_S=samples.prompts_S[one],
        numbers_S=samples.numbers_S[one],
        finish_S=samples.finish_S[one],
        has_logprobs_S=samples.has_logprobs_S[one],
        scores={name: each[one] for name, each in samples.scores.items()},
        fingerprints=Fingerprints(prints.digests_S[one], prints.signatures_SH[one]),
        contaminated_S=samples.contaminated_S[one],
    )


@settings(max_examples=30, deadline=None)
@given(recorded(), RULES, st.data())
def test_a_grader_that_the_rule_does_not_name_changes_nothing(
    samples: Samples, rule: AcceptSection, data: st.DataObject
) -> None:
    num = len(samples.prompts_S)
    scores = data.draw(st.lists(st.floats(0, 1), min_size=num, max_size=num))
    more = replace(samples, scores={"another": np.array(scores), **samples.scores})
    one, other = select(samples, rule), select(more, rule)
    assert one.reasons_S.tolist() == other.reasons_S.tolist()
    assert one.kept_K.tolist() == other.kept_K.tolist()
    assert one.drops == other.drops


@settings(max_examples=30, deadline=None)
@given(recorded(), RULES)
def test_what_is_kept_is_what_the_rule_allows(samples: Samples, rule: AcceptSection) -> None:
    found = select(samples, rule)
    kept = found.kept_K
    assert not samples.contaminated_S[kept].any()
    assert set(samples.finish_S[kept].tolist()) <= ({0, 1} if rule.keep_unfinished else {0})
    assert samples.has_logprobs_S[kept].all() or not rule.with_logprobs
    for name, least in rule.min_score.items():
        assert (samples.scores[name][kept] >= least).all()
    if not rule.keep_repeats:
        assert len(set(samples.fingerprints.digests_S[kept].tolist())) == len(kept)
    if rule.kept_a_prompt is not None:
        counts = Counter(samples.prompts_S[kept].tolist())
        assert max(counts.values(), default=0) <= rule.kept_a_prompt


def test_every_reason_is_counted_in_its_order_and_the_first_one_counts() -> None:
    samples = samples_of(
        [1] * 11,
        [*range(11)],
        scores={"maths": [1, 1, 0, *[1] * 8], "judge": [1, 0, 0, 0, *[1] * 7]},
        finish=[2, 1, 1, *[0] * 8],
        told=[False] * 5 + [True] * 6,
        ids=[*([n] for n in range(6)), [7] * 50, [7] * 50, [7] * 51, [8], [9]],
        contaminated=[True] * 6 + [False] * 5,
    )
    rule = AcceptSection(
        min_score={"maths": 0.5, "judge": 0.5},
        with_logprobs=True,
        best_of=10,
        most_a_prompt=1,
        similarity=0.9,
    )
    found = select(samples, rule)
    assert named(samples, found) == [(1, 6)]
    assert found.drops == {
        "set aside by its writer": 1,
        "cut at the longest length": 2,
        "below the least score of judge": 1,
        "below the least score of maths": 0,
        "without log-probabilities of its writer": 1,
        "a passage of a test set": 1,
        "beyond the first best_of": 1,
        "the tokens of another": 1,
        "much like another": 1,
        "more than are kept of a prompt": 1,
    }
    assert (found.prompts_P.tolist(), found.rejection_P.tolist()) == ([1], [4 / 11])


def test_the_best_of_a_prompts_first_samples_is_kept() -> None:
    scores = {"a": [0.2, 0.9, 0.9, 1.0, 0.4, 0.1], "b": [0.2, 0.5, 0.5, 1.0, 0.0, 0.2]}
    samples = samples_of([1, 1, 1, 1, 2, 2], [0, 1, 2, 3, 0, 1], scores=scores)

    def kept(**rule: Any) -> list[tuple[int, int]]:
        least = rule.pop("min_score", {"a": 0.0, "b": 0.0})
        section = AcceptSection(min_score=least, **rule)
        return named(samples, select(samples, section))

    assert kept(best_of=3) == [(1, 1), (2, 0)]  # of equals the lower number
    assert kept(best_of=4) == [(1, 3), (2, 0)]
    assert kept(best_of=4, most_a_prompt=2) == [(1, 3), (1, 1), (2, 0), (2, 1)]
    assert kept(best_of=2, min_score={"b": 0.0}) == [(1, 1), (2, 1)]
    assert kept(best_of=2, min_score={"b": 0.3}) == [(1, 1)]
    assert kept(most_a_prompt=1) == [(1, 0), (2, 0)]


def test_the_rejection_rate_of_each_prompt_is_told() -> None:
    samples = samples_of([5, 3, 5, 3, 3], [0, 0, 1, 1, 2], scores={"a": [1, 0, 0, 0, 0]})
    found = select(samples, AcceptSection(min_score={"a": 1.0}))
    assert found.prompts_P.tolist() == [3, 5]
    assert found.rejection_P.tolist() == [1.0, 0.5]
    nothing = select(samples_of([], []), AcceptSection())
    assert (nothing.kept_K.tolist(), nothing.prompts_P.tolist()) == ([], [])


@pytest.mark.parametrize(("num_changed", "is_near"), [(1, True), (3, True), (60, False)])
def test_near_repeats_are_found_wherever_they_differ(num_changed: int, is_near: bool) -> None:
    rng = np.random.default_rng(0)
    ids, wrong = rng.integers(0, 50_000, (60, 200)), []
    copies = ids.copy()
    for copy in copies:
        copy[rng.choice(200, num_changed, replace=False)] = 50_000
    rows = [[*map(int, row)] for row in (*ids, *copies)]
    samples = samples_of([*range(120)], [0] * 120, ids=rows)
    found = select(samples, AcceptSection(similarity=0.75))
    wrong = [place for place in range(60, 120) if (found.reasons_S[place] >= 0) != is_near]
    assert wrong == []
    assert (found.reasons_S[:60] == -1).all()


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), max_size=12))
def test_the_shortest_sequences_have_fingerprints(ids: list[int]) -> None:
    prints = fingerprints_of([np.array(ids, np.int64), np.array([*ids, 9], np.int32)])
    assert prints.digests_S[0] != prints.digests_S[1]
    assert prints.signatures_SH.shape == (2, 64)


def test_fingerprints_are_the_same_on_every_machine() -> None:
    prints = fingerprints_of([np.arange(length, dtype=np.int32) * 7 for length in (3, 40, 3000)])
    data = prints.digests_S.astype("<u8").tobytes() + prints.signatures_SH.astype("<u4").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "2d46cbc9847f0042"
