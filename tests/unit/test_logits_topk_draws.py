"""Draws are of the tail, without bias, by a seed for each token: the same again on any machine, in
any batch and any block."""

import math
from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.targets import bucketed
from stillhouse.errors import ConfigError
from stillhouse.logits import (
    Head,
    TargetSpec,
    compress,
    compress_hidden,
    compress_reference,
    decode,
    densify,
    encode,
    token_seeds,
)
from stillhouse.logits.topk import blockmax_cpu, blockmax_torch
from stillhouse.logits.topk.draws import draw, draw_in_blocks, draw_rest, or_lowest

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """The published output function, on Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def stepped(x: int, index: int) -> int:
    """The index-th number, from 1, of the splitmix64 stream that x starts."""
    return splitmix64((x + 0x9E3779B97F4A7C15 * index) & MASK)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def seeds(num_tokens: int, *, seed: int = 7) -> torch.Tensor:
    return token_seeds(seed, torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens))


def random_logits(
    num_tokens: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0
) -> torch.Tensor:
    return scale * torch.randn(
        num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)
    )


def test_a_seed_is_a_hash_of_the_recipe_the_sequence_and_the_column() -> None:
    places = [(0, 0), (0, 1), (1, 0), (3, 2047), (123_456_789_012, 17)]
    sequences, columns = torch.tensor(places).T
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        wanted = [
            signed(stepped(stepped(seed & MASK, sequence + 1), column + 1))
            for sequence, column in places
        ]
        assert token_seeds(seed, sequences, columns).tolist() == wanted


def test_no_two_places_of_a_corpus_share_a_seed() -> None:
    sequences, columns = torch.meshgrid(torch.arange(500), torch.arange(500), indexing="ij")
    every = torch.cat(
        [token_seeds(seed, sequences.flatten(), columns.flatten()) for seed in (0, 1)]
    )
    assert every.unique().numel() == 500_000


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_each_draw_is_where_its_number_falls_in_the_sums_of_whole_masses(
    data: st.DataObject,
) -> None:
    vocab_size, num_draws = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    levels = st.one_of(st.floats(-30, 30, width=32), st.just(-math.inf))
    logits = torch.tensor([data.draw(st.lists(levels, min_size=vocab_size, max_size=vocab_size))])
    logits[0, data.draw(st.integers(0, vocab_size - 1))] = 1.0
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    masses = [int(mass) for mass in (logits - logits.max()).exp()[0].double() * 2.0**40]
    uniforms = [(stepped(seed & MASK, index + 1) >> 11) * 2.0**-53 for index in range(num_draws)]
    places = [
        int((index + uniform) / num_draws * sum(masses)) for index, uniform in enumerate(uniforms)
    ]
    wanted = [bisect_right(list(accumulate(masses)), place) for place in places]
    found = draw(logits, torch.tensor([seed]), num_draws=num_draws)
    assert (found.dtype, found[0].tolist()) == (torch.int32, wanted)
    assert all(logits[0, i] > -math.inf for i in wanted)


SPLITS = ["torch", "torch, at once", *(["c"] if blockmax_cpu.compiled().split_rows else [])]


@pytest.mark.parametrize("backend", ["reference", *SPLITS])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_backend_draws_the_id_in_whose_share_of_the_tail_the_number_falls(
    backend: str, data: st.DataObject
) -> None:
    """Sums in float32 may move a border between two ids by a few millionths of the tail, and
    nothing else."""
    vocab_size, num_draws = (
        data.draw(st.sampled_from([128, 129, 255, 256, 700, 1300])),
        data.draw(st.integers(1, 30)),
    )
    k = data.draw(st.one_of(st.integers(0, 20), st.integers(0, vocab_size - 1)))
    temperature = data.draw(st.sampled_from([1.0, 0.6, 2.5]))
    logits = random_logits(
        3,
        vocab_size,
        seed=data.draw(st.integers(0, 10**6)),
        scale=data.draw(st.sampled_from([0.1, 2.0, 8.0])),
    )
    logits[
        torch.rand(logits.shape, generator=torch.Generator().manual_seed(k))
        < data.draw(st.sampled_from([0.0, 0.9]))
    ] = -math.inf
    logits[:, vocab_size // 2] = data.draw(st.sampled_from([0.0, 60.0]))
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))

    kept = bucketed(logits, k, by=compress_reference).token_ids_TK.long()
    tail = (logits.double() / temperature).scatter(1, kept, -math.inf)
    has_tail = tail.amax(dim=1) > -math.inf
    borders = torch.cat([torch.zeros(3, 1), tail.softmax(dim=1).cumsum(dim=1)], dim=1)
    numbers = [
        [stepped(seed & MASK, index + 1) >> 11 for index in range(num_draws)]
        for seed in seeds(3).tolist()
    ]
    places = (
        torch.arange(num_draws) + torch.tensor(numbers, dtype=torch.float64) * 2.0**-53
    ) / num_draws

    ids = by_backend(backend, logits, k=k, num_draws=num_draws, temperature=temperature).long()
    assert (ids[:, 1:] >= ids[:, :-1]).all()
    assert not (ids[:, :, None] == kept[:, None, :]).any()
    assert (logits.gather(1, ids) > -math.inf)[has_tail].all()
    assert (borders.gather(1, ids) - 3e-6 <= places)[has_tail].all()
    assert (places <= borders.gather(1, ids + 1) + 3e-6)[has_tail].all()


def by_backend(
    backend: str, logits: torch.Tensor, *, k: int, num_draws: int, temperature: float
) -> torch.Tensor:
    """The draws of `seeds` by one backend, whichever `compress` would take."""
    if backend == "reference":
        return compress_reference(
            logits,
            TargetSpec(logits.shape[1], k, num_draws=num_draws, temperature=temperature),
            seeds_T=seeds(len(logits)),
        ).tail_ids_TN
    split_rows = blockmax_cpu.compiled().split_rows
    if backend == "c" and split_rows:
        raw = blockmax_cpu.split(split_rows, logits, k=k, temperature=temperature)
    else:
        raw = blockmax_torch.split(logits, k=k, temperature=temperature)
    if backend.endswith("at once"):
        return draw_rest(
            logits, raw, seeds(len(logits)), num_draws=num_draws, temperature=temperature
        )
    draws = draw_in_blocks(
        logits, raw, seeds(len(logits)), num_draws=num_draws, temperature=temperature
    )
    return or_lowest(draws, raw.token_ids_TK, vocab_size=logits.shape[1])


def test_the_greatest_random_number_still_draws_an_id_with_mass() -> None:
    """A fraction of 1 - 2^-53 on top of a whole share would round up to all of the mass."""

    def unmixed(x: int) -> int:
        """The inverse of splitmix64's output function."""
        x ^= (x >> 31) ^ (x >> 62)
        x = (x * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK
        x ^= (x >> 27) ^ (x >> 54)
        x = (x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK
        return x ^ (x >> 30) ^ (x >> 60)

    num_draws = 3
    seed = (unmixed(MASK) - 0x9E3779B97F4A7C15 * num_draws) & MASK
    assert stepped(seed, num_draws) == MASK
    logits = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf, 50.0, -math.inf]])
    found = draw(logits, torch.tensor([signed(seed)] * 2), num_draws=num_draws)
    assert found[:, -1].tolist() == [1, 1]


def chi_square(counts: torch.Tensor, shares: torch.Tensor) -> float:
    expected = shares * counts.sum()
    return float(((counts - expected).square() / expected).sum())


@pytest.mark.parametrize("k", [0, 3])
def test_draws_follow_the_tail_of_the_teacher(k: int) -> None:
    """Of 31 - k ids, each expected 20 times or more among 60,000 draws: 66 is the chi-square's
    99.99th percentile at 30 degrees."""
    logits = random_logits(1, 31, scale=1.5)
    c = compress(logits.expand(60_000, 31), TargetSpec(31, k, num_draws=1), seeds_T=seeds(60_000))
    tail = logits[0].double().softmax(0)
    tail[c.token_ids_TK[0].long()] = 0
    tail /= tail.sum()
    counts = torch.bincount(c.tail_ids_TN.flatten(), minlength=31).double()
    assert (counts[tail == 0] == 0).all()
    assert tail[tail > 0].min() * 60_000 > 20
    assert chi_square(counts[tail > 0], tail[tail > 0]) < 66


def test_several_draws_mean_the_tail_and_vary_less_than_independent_ones() -> None:
    num_tokens, num_draws = 20_000, 8
    logits = random_logits(1, 25, scale=1.5)
    c = compress(
        logits.expand(num_tokens, 25),
        TargetSpec(25, 2, num_draws=num_draws),
        seeds_T=seeds(num_tokens),
    )
    tail = logits[0].double().softmax(0)
    tail[c.token_ids_TK[0].long()] = 0
    tail /= tail.sum()
    counts_TV = torch.zeros(num_tokens, 25, dtype=torch.float64).scatter_add_(
        1, c.tail_ids_TN.long(), torch.ones(num_tokens, num_draws, dtype=torch.float64)
    )
    deviation = counts_TV.mean(0) - num_draws * tail
    assert (deviation.abs() <= 5 * counts_TV.std(0) / math.sqrt(num_tokens) + 1e-9).all()
    independent = num_draws * tail * (1 - tail)
    assert (counts_TV.var(0) <= 1.05 * independent).all()
    assert counts_TV.var(0).sum() < 0.7 * independent.sum()
    assert (
        ((counts_TV - num_draws * tail).abs() < 2) | (tail == 0)
    ).all()  # an id's share touches two equal shares in part


def test_draws_of_one_token_and_of_neighbours_are_not_correlated() -> None:
    """Where the draws fall within their shares: 4 of each token, 4 of the next one, and 4 of the
    same column in the next sequence."""
    flat, columns = torch.zeros(2000, 4096), torch.arange(2000)
    places = [
        draw(
            flat, token_seeds(3, torch.full_like(columns, sequence), columns), num_draws=4
        ).double()
        % 1024
        for sequence in (0, 1)
    ]
    features = torch.cat([places[0][:-1], places[0][1:], places[1][:-1]], dim=1)
    correlations = torch.corrcoef(features.T) - torch.eye(12, dtype=torch.float64)
    assert correlations.abs().max() < 5 / math.sqrt(2000)


def test_a_flat_vocabulary_of_a_real_size_is_drawn_evenly_to_its_end() -> None:
    vocab_size, num_draws = 151_936, 1000
    (ids,) = draw(torch.zeros(1, vocab_size), seeds(1), num_draws=num_draws).double()
    share = vocab_size / num_draws
    assert ((ids / share).floor() - torch.arange(num_draws)).abs().max() <= 1
    assert ((ids % share) / share).mean() == pytest.approx(0.5, abs=5 / math.sqrt(12 * num_draws))


def test_many_ids_too_small_for_a_float32_sum_are_drawn_for_what_they_are_together() -> None:
    logits = torch.full((1, 151_936), -17.0)
    logits[0, 0] = 0.0
    share = 151_935 * math.exp(-17) / (1 + 151_935 * math.exp(-17))
    (ids,) = draw(logits, seeds(1), num_draws=4000)
    # 25 of them; each alone would vanish beside the first
    assert abs(int((ids > 0).sum()) - 4000 * share) < 1
    assert ids[ids > 0].double().mean() == pytest.approx(151_936 / 2, rel=0.02)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_draws_ascend_and_are_never_kept_and_never_impossible(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(2, 60))
    k, num_draws = data.draw(st.integers(0, vocab_size - 1)), data.draw(st.integers(1, 20))
    logits = random_logits(4, vocab_size, seed=data.draw(st.integers(0, 10**6))).round()
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(k)) < 0.6] = -math.inf
    logits[:, vocab_size // 2] = 0.0
    c = compress(
        logits,
        TargetSpec(
            logits.shape[1],
            k,
            num_draws=num_draws,
            temperature=data.draw(st.sampled_from([0.5, 1.0, 3.0])),
        ),
        seeds_T=seeds(4),
    )
    ids = c.tail_ids_TN.long()
    assert (ids[:, 1:] >= ids[:, :-1]).all()
    assert not (ids[:, :, None] == c.token_ids_TK.long()[:, None, :]).any()
    has_tail = c.tail_logmass_T > -math.inf
    assert (logits.gather(1, ids) > -math.inf)[has_tail].all()
    lowest = [min(set(range(vocab_size)) - set(kept)) for kept in c.token_ids_TK.tolist()]
    assert (ids == torch.tensor(lowest)[:, None])[~has_tail].all()


def test_a_tail_far_below_the_kept_entries_is_drawn_as_finely_as_any() -> None:
    tail = random_logits(1, 40)
    logits = torch.cat([tail - 80.0, torch.tensor([[30.0]])], dim=1)
    found = compress(
        logits, TargetSpec(logits.shape[1], 1, num_draws=50), seeds_T=seeds(1)
    ).tail_ids_TN
    assert torch.equal(
        found, compress(tail - 80.0, TargetSpec(40, 0, num_draws=50), seeds_T=seeds(1)).tail_ids_TN
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_made_again_has_the_same_draws_whatever_comes_with_it(dtype: torch.dtype) -> None:
    logits = random_logits(40, 3001).to(dtype)
    spec = TargetSpec(3001, 5, num_draws=9, temperature=1.3)
    whole = compress(logits, spec, seeds_T=seeds(40)).tail_ids_TN
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        compress(logits[order], spec, seeds_T=seeds(40)[order]).tail_ids_TN, whole[order]
    )
    for size in (1, 3, 17):
        parts = zip(logits.split(size), seeds(40).split(size), strict=True)
        assert torch.equal(
            torch.cat(
                [compress(rows, spec, seeds_T=of_rows).tail_ids_TN for rows, of_rows in parts]
            ),
            whole,
        )
    assert not torch.equal(compress(logits, spec, seeds_T=seeds(40, seed=8)).tail_ids_TN, whole)


@pytest.mark.parametrize("block_tokens", [1, 4, 9, 1024])
def test_blocks_of_hidden_states_have_the_draws_of_their_logits(block_tokens: int) -> None:
    hidden, weight = random_logits(9, 6), random_logits(120, 6, seed=1)
    head = Head(weight.round())
    hidden = hidden.round()  # so that every matrix product is exact, however it is cut
    spec = TargetSpec(120, 4, num_draws=7)
    found = compress_hidden(hidden, head, spec=spec, seeds_T=seeds(9), block_tokens=block_tokens)
    assert torch.equal(
        found.tail_ids_TN,
        compress(head.logits(hidden), spec, seeds_T=seeds(9)).tail_ids_TN,
    )


def test_these_draws_are_the_same_in_every_version() -> None:
    logits = torch.linspace(4, -4, 1000).repeat(2, 1)
    c = compress(
        logits,
        TargetSpec(logits.shape[1], 2, num_draws=6, temperature=2.0),
        seeds_T=token_seeds(42, torch.tensor([5, 5]), torch.tensor([0, 1])),
    )
    assert c.tail_ids_TN.tolist() == [[22, 81, 115, 228, 327, 478], [8, 70, 124, 196, 326, 669]]


@pytest.mark.parametrize(("k", "num_draws", "most_bytes"), [(12, 12, 66), (0, 50, 90)])
def test_draws_at_a_real_vocabulary_come_back_from_few_bytes(
    k: int, num_draws: int, most_bytes: int
) -> None:
    spec = TargetSpec(151_936, k, num_draws=num_draws)
    assert spec.bytes_per_token <= most_bytes
    c = compress(random_logits(3, 151_936), spec, seeds_T=seeds(3))
    back = decode(encode(c, spec), spec)
    assert torch.equal(back.tail_ids_TN, c.tail_ids_TN)
    assert torch.equal(back.token_ids_TK, c.token_ids_TK)
    torch.testing.assert_close(densify(back).exp().sum(1), torch.ones(3), rtol=0, atol=1e-3)


def test_nothing_is_drawn_unless_asked_for() -> None:
    assert compress(random_logits(3, 20), TargetSpec(20, 4)).tail_ids_TN.shape == (3, 0)
    assert compress(
        torch.empty(0, 20), TargetSpec(20, 4, num_draws=5), seeds_T=seeds(0)
    ).tail_ids_TN.shape == (
        0,
        5,
    )


@pytest.mark.parametrize(
    ("seeds_T", "complaint"),
    [
        (None, "3 draws are asked for with no seeds for 2 tokens; pass one for each"),
        (seeds(3), r"with seeds of shape \[3\] for 2 tokens"),
    ],
    ids=["no seeds", "other seeds"],
)
def test_draws_without_a_seed_for_each_token_are_refused(
    seeds_T: torch.Tensor | None, complaint: str
) -> None:
    spec = TargetSpec(20, 4, num_draws=3)
    with pytest.raises(ConfigError, match=complaint):
        compress(torch.zeros(2, 20), spec, seeds_T=seeds_T)
    with pytest.raises(ConfigError, match=complaint):
        compress_hidden(torch.zeros(2, 4), Head(torch.zeros(20, 4)), spec=spec, seeds_T=seeds_T)
