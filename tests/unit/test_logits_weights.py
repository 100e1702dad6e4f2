"""Weighted draws estimate any sum over the tail without bias, and what a target may hold besides
(log p of draws and label, the tail's entropy) is the same from every backend."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits import (
    Backend,
    CompressedLogits,
    Head,
    TargetSpec,
    compress,
    compress_hidden,
    compress_reference,
    densify,
    draw_log_weights,
    token_seeds,
)
from stillhouse.logits.topk import blockmax_cpu
from stillhouse.logits.topk.dispatch import Tokens, compress_in_blocks

BACKENDS: list[str] = ["reference", "blockmax"]
BACKENDS += ["native"] if blockmax_cpu.compiled().split_rows else []


def seeds(num_tokens: int, *, seed: int = 7) -> torch.Tensor:
    return token_seeds(seed, torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens))


def random_logits(
    num_tokens: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0
) -> torch.Tensor:
    return scale * torch.randn(
        num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)
    )


def whole_spec(
    vocab_size: int, k: int, *, num_draws: int = 0, temperature: float = 1.0
) -> TargetSpec:
    """A target that holds everything a target may hold."""
    return TargetSpec(
        vocab_size,
        k,
        num_draws=num_draws,
        temperature=temperature,
        weighted=True,
        label_logprob=True,
        tail_entropy=True,
    )


def by_backend(
    backend: str, logits: torch.Tensor, spec: TargetSpec, *, labels: torch.Tensor
) -> CompressedLogits:
    """The targets by one backend, whichever `compress` would take."""
    return compress_in_blocks(
        lambda rows: logits[rows],
        spec,
        Tokens.of(seeds(len(logits)), labels),
        block_tokens=len(logits),
        choose_backend=lambda *_, **__: Backend(backend, "it is asked for"),
    )


def tail_of(logits: torch.Tensor, kept_ids_TK: torch.Tensor, temperature: float) -> torch.Tensor:
    """log p of every id that is not kept, float64 [T, V]; -inf for the others."""
    logprobs = (logits.double() / temperature).log_softmax(dim=1)
    return logprobs.scatter(1, kept_ids_TK.long(), -math.inf)


def proposal_of(tail: torch.Tensor, kept_ids_TK: torch.Tensor) -> torch.Tensor:
    """Half the tail, half uniform over the ids that are not kept, float64 [T, V]."""
    others = torch.ones_like(tail).scatter_(1, kept_ids_TK.long(), 0.0)
    return (tail.softmax(dim=1) + others / others.sum(dim=1, keepdim=True)) / 2


@pytest.mark.parametrize("k", [0, 3])
def test_draws_and_their_weights_are_unbiased(k: int) -> None:
    """Over 100,000 records: how often each id is drawn, and the mass that its draws stand for."""
    num_tokens, num_draws, vocab_size = 100_000, 3, 20
    logits = random_logits(1, vocab_size, scale=2.0)
    logits[0, 4] = -math.inf
    c = compress(
        logits.expand(num_tokens, vocab_size),
        TargetSpec(vocab_size, k, num_draws=num_draws, weighted=True),
        seeds_T=seeds(num_tokens),
    )
    tail = tail_of(logits, c.token_ids_TK[:1], 1.0)
    nothing = torch.zeros(num_tokens, vocab_size, dtype=torch.float64)
    ids = c.tail_ids_TN.long()
    for each, wanted in (
        (torch.ones(ids.shape), num_draws * proposal_of(tail, c.token_ids_TK[:1])[0]),
        (draw_log_weights(c).exp(), tail.exp()[0]),
    ):
        found = nothing.scatter_add(1, ids, each.double())
        deviation = found.mean(dim=0) - wanted
        assert (deviation.abs() <= 3 * found.std(dim=0) / math.sqrt(num_tokens) + 1e-9).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_backend_holds_the_same_beside_the_entries(backend: str, data: st.DataObject) -> None:
    """Sums in float32 may move a border between two ids by a few millionths, and nothing else."""
    # logits with ties, ruled out ids and faint tails
    vocab_size = data.draw(st.sampled_from([2, 5, 129, 256, 700, 1300]))
    k = data.draw(st.integers(0, min(20, vocab_size - 1)))
    num_draws = data.draw(st.sampled_from([1, 3, 30]))
    temperature = data.draw(st.sampled_from([1.0, 0.6, 2.5]))
    seed, scale = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.1, 2.0, 8.0]))
    logits = random_logits(3, vocab_size, seed=seed, scale=scale)
    logits = logits.round() if data.draw(st.booleans()) else logits
    ruled_out = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k))
    logits[ruled_out < data.draw(st.sampled_from([0.0, 0.9]))] = -math.inf
    logits[:, vocab_size // 2] = data.draw(st.sampled_from([0.0, 60.0]))
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    labels = torch.randint(vocab_size, (3,), generator=torch.Generator().manual_seed(seed))
    spec = whole_spec(vocab_size, k, num_draws=num_draws, temperature=temperature)
    c = by_backend(backend, logits, spec, labels=labels)
    assert c.draw_logprobs_TN is not None
    assert c.label_logprob_T is not None
    assert c.tail_entropy_T is not None

    # log-probabilities and the entropy
    ids, kept = c.tail_ids_TN.long(), c.token_ids_TK.long()
    wanted = (logits.double() / temperature).log_softmax(dim=1)
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 4e-6, "check_dtype": False}
    torch.testing.assert_close(c.draw_logprobs_TN, wanted.gather(1, ids), **close)
    torch.testing.assert_close(c.label_logprob_T, wanted.gather(1, labels[:, None])[:, 0], **close)
    tail = tail_of(logits, kept, temperature)
    has_tail = tail.amax(dim=1) > -math.inf
    within = tail.softmax(dim=1)
    entropy = -torch.special.xlogy(within, within).sum(dim=1).where(has_tail, 0.0)
    torch.testing.assert_close(c.tail_entropy_T, entropy, rtol=1e-5, atol=1e-5, check_dtype=False)

    # places of the draws
    assert (ids[:, 1:] >= ids[:, :-1]).all()
    assert not (ids[:, :, None] == kept[:, None, :]).any()
    borders = torch.cat([torch.zeros(3, 1), proposal_of(tail, kept).cumsum(dim=1)], dim=1)
    shares = torch.arange(num_draws + 1) / num_draws
    assert (borders.gather(1, ids) - 3e-6 <= shares[1:])[has_tail].all()
    assert (shares[:-1] <= borders.gather(1, ids + 1) + 3e-6)[has_tail].all()
    theirs = by_backend("reference", logits, spec, labels=labels).tail_ids_TN.long()
    assert (borders.gather(1, ids) <= borders.gather(1, theirs + 1) + 3e-6)[has_tail].all()
    assert (borders.gather(1, theirs) <= borders.gather(1, ids + 1) + 3e-6)[has_tail].all()


def test_draws_found_by_blocks_are_those_of_the_reference() -> None:
    """All but those within float32 rounding of the border between two ids."""
    logits, labels = random_logits(50, 4000), torch.arange(50)
    spec = whole_spec(4000, 8, num_draws=15)
    wanted = by_backend("reference", logits, spec, labels=labels).tail_ids_TN
    for backend in BACKENDS[1:]:
        found = by_backend(backend, logits, spec, labels=labels).tail_ids_TN
        assert (found != wanted).sum() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_no_distribution_is_refused_by_its_number(backend: str) -> None:
    logits = random_logits(3, 700)
    logits[2] = math.nan
    with pytest.raises(TeacherError, match="token 2 are no distribution: 700 NaN"):
        by_backend(backend, logits, whole_spec(700, 4, num_draws=1), labels=torch.arange(3))


def test_a_tail_without_mass_is_its_lowest_id_of_no_weight() -> None:
    logits = torch.full((2, 300), -math.inf)
    logits[:, 0], logits[:, 7] = 1.0, 2.0
    for backend in BACKENDS:
        c = by_backend(
            backend, logits, whole_spec(300, 2, num_draws=1), labels=torch.tensor([0, 9])
        )
        assert c.tail_ids_TN.tolist() == [[1], [1]]
        assert c.draw_logprobs_TN is not None
        assert c.draw_logprobs_TN.tolist() == [[-math.inf], [-math.inf]]
        assert c.tail_entropy_T is not None
        assert c.tail_entropy_T.tolist() == [0.0, 0.0]
        assert c.label_logprob_T is not None
        assert c.label_logprob_T.tolist() == pytest.approx([-math.log(1 + math.e), -math.inf])
        assert draw_log_weights(c).isfinite().all()
        assert draw_log_weights(c).exp().tolist() == [[0.0], [0.0]]
        torch.testing.assert_close(densify(c).exp().sum(dim=1), torch.ones(2))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_weights_of_any_stored_values_are_finite_and_bounded(data: st.DataObject) -> None:
    stored = st.floats(-200, 0, width=32) | st.just(-math.inf)
    logprobs = torch.tensor([data.draw(st.lists(stored, min_size=1, max_size=5))])
    tail = torch.tensor([data.draw(stored)])
    vocab_size = data.draw(st.integers(3, 200_000))
    num_draws = logprobs.shape[1]
    c = CompressedLogits(
        torch.zeros(1, 2, dtype=torch.int32),
        torch.zeros(1, 2),
        tail,
        torch.zeros(1, num_draws, dtype=torch.int32),
        vocab_size,
        draw_logprobs_TN=logprobs,
    )
    found = draw_log_weights(c)
    assert (found.dtype, found.shape) == (torch.float32, logprobs.shape)
    assert found.isfinite().all()
    p, tail_mass = logprobs.double().exp(), tail.double().exp()[:, None]
    assert (found.double().exp() <= 2 * tail_mass / num_draws * (1 + 1e-4) + 1e-37).all()
    assert (found.double().exp() <= 2 * p * (vocab_size - 2) / num_draws * (1 + 1e-4) + 1e-37).all()


def test_blind_draws_weigh_an_equal_share_of_the_tail() -> None:
    c = compress(random_logits(3, 40), TargetSpec(40, 4, num_draws=5), seeds_T=seeds(3))
    wanted = (c.tail_logmass_T.exp() / 5)[:, None].expand(3, 5)
    torch.testing.assert_close(draw_log_weights(c).exp(), wanted)


def test_dense_targets_share_the_tail_by_the_draws_weights() -> None:
    num_tokens = 20_000
    logits = random_logits(1, 12)
    spec = TargetSpec(12, 2, num_draws=9, weighted=True)
    dense = densify(compress(logits.expand(num_tokens, 12), spec, seeds_T=seeds(num_tokens))).exp()
    torch.testing.assert_close(dense.sum(dim=1), torch.ones(num_tokens))
    torch.testing.assert_close(dense.mean(dim=0), logits[0].softmax(dim=0), rtol=0.05, atol=1e-4)


def test_a_token_made_again_has_the_same_weighted_draws_whatever_comes_with_it() -> None:
    logits, spec = random_logits(20, 3001), whole_spec(3001, 5, num_draws=9, temperature=1.3)
    labels = torch.arange(20)
    whole = compress(logits, spec, seeds_T=seeds(20), labels_T=labels).tensors
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    again = compress(logits[order], spec, seeds_T=seeds(20)[order], labels_T=labels[order]).tensors
    alone = compress(logits[3:4], spec, seeds_T=seeds(20)[3:4], labels_T=labels[3:4]).tensors
    assert list(whole) == list(again) == list(alone)
    for name, value in whole.items():
        assert torch.equal(again[name], value[order])
        assert torch.equal(alone[name], value[3:4])


def test_these_weighted_draws_are_the_same_in_every_version() -> None:
    logits = torch.linspace(4, -4, 1000).repeat(2, 1)
    c = compress(
        logits,
        TargetSpec(1000, 2, num_draws=6, temperature=2.0, weighted=True),
        seeds_T=token_seeds(42, torch.tensor([5, 5]), torch.tensor([0, 1])),
    )
    assert c.tail_ids_TN.tolist() == [[34, 134, 196, 402, 571, 765], [12, 116, 211, 344, 569, 905]]


def test_rows_in_doubt_hold_what_the_others_hold() -> None:
    """A flat row has more candidates than the kernels' room, and is made by the reference."""
    logits = random_logits(3, 600)
    logits[1] = 0.0
    spec, labels = whole_spec(600, 3, num_draws=4), torch.tensor([5, 6, 7])
    found = by_backend("triton", logits, spec, labels=labels).tensors
    wanted = compress_reference(logits, spec, seeds_T=seeds(3), labels_T=labels).tensors
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize(
    ("labels_T", "complaint"),
    [
        (None, "label_logprob is asked for with no labels for 2 tokens; pass one for each"),
        (torch.tensor([1, 2, 3]), r"with labels of shape \[3\] for 2 tokens"),
        (torch.tensor([1, 20]), "a label is 20, wanted ids from 0 to 19"),
        (torch.tensor([-100, 0]), "a label is -100, wanted ids from 0 to 19"),
    ],
    ids=["no labels", "other labels", "too great", "ignored"],
)
def test_a_label_that_is_no_id_is_refused(labels_T: torch.Tensor | None, complaint: str) -> None:
    spec = TargetSpec(20, 4, label_logprob=True)
    with pytest.raises(ConfigError, match=complaint):
        compress(torch.zeros(2, 20), spec, labels_T=labels_T)
    with pytest.raises(ConfigError, match=complaint):
        compress_hidden(torch.zeros(2, 4), Head(torch.zeros(20, 4)), spec=spec, labels_T=labels_T)


def test_labels_of_which_nothing_is_kept_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels are given for a spec without label_logprob"):
        compress(torch.zeros(2, 20), TargetSpec(20, 4), labels_T=torch.tensor([1, 2]))


def test_hidden_states_have_the_labels_of_their_logits() -> None:
    hidden, weight = random_logits(7, 6).round(), random_logits(120, 6, seed=1).round()
    head, labels, spec = Head(weight), torch.arange(7), whole_spec(120, 4, num_draws=3)
    found = compress_hidden(
        hidden, head, spec=spec, seeds_T=seeds(7), labels_T=labels, block_tokens=3
    )
    wanted = compress(head.logits(hidden), spec, seeds_T=seeds(7), labels_T=labels)
    for name, value in wanted.tensors.items():
        assert torch.equal(found.tensors[name], value)
