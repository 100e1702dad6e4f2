"""`compress` is the definition: exact ids with ties to the lowest, float32 log-probabilities of the
full softmax, an accurate tail."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.targets import bucketed
from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits import (
    CompressedLogits,
    Head,
    TargetSpec,
    compress,
    compress_hidden,
    concatenate,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_logits(
    num_tokens: int, vocab_size: int, *, seed: int, step: float = 0.0, scale: float = 4.0
) -> torch.Tensor:
    """Normal logits; rounded to multiples of `step`, which makes ties, unless it is 0."""
    logits = scale * torch.randn(
        num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)
    )
    return (logits / step).round() * step if step else logits


def assert_is_the_target_of(
    c: CompressedLogits, logits: torch.Tensor, *, k: int, temperature: float = 1.0
) -> None:
    """Against a stable sort, a log-softmax and a log-sum-exp over everything not kept, all in
    float64."""
    exact = logits.double()
    ids = exact.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(c.token_ids_TK.long(), ids)
    logprobs = (exact / temperature).log_softmax(dim=1)
    torch.testing.assert_close(
        c.logprobs_TK.double(), logprobs.gather(1, ids), rtol=2e-6, atol=2e-6
    )
    tail = logprobs.scatter(1, ids, -math.inf).logsumexp(dim=1)
    torch.testing.assert_close(c.tail_logmass_T.double(), tail, rtol=2e-6, atol=4e-6)
    assert (c.tail_logmass_T <= 0).all()
    assert (c.logprobs_TK <= 0).all()


def assert_equal(a: CompressedLogits, b: CompressedLogits) -> None:
    for name in ("token_ids_TK", "logprobs_TK", "tail_logmass_T", "tail_ids_TN"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.vocab_size, a.temperature) == (b.vocab_size, b.temperature)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_ids_logprobs_and_tail_are_those_of_a_stable_sort_in_float64(data: st.DataObject) -> None:
    num_tokens, vocab_size = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 150))
    k = data.draw(st.integers(0, vocab_size))
    logits = random_logits(
        num_tokens,
        vocab_size,
        seed=data.draw(st.integers(0, 10**6)),
        step=data.draw(st.sampled_from([0.0, 0.5, 8.0])),
    )
    excluded = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k)) < data.draw(
        st.sampled_from([0.0, 0.5])
    )
    excluded[:, vocab_size // 2] = False
    logits = logits.masked_fill(excluded, -math.inf).to(data.draw(st.sampled_from(DTYPES)))
    temperature = data.draw(st.sampled_from([1.0, 0.7, 3.0]))
    c = bucketed(logits, k, temperature=temperature)
    assert_is_the_target_of(c, logits, k=k, temperature=temperature)
    assert (c.token_ids_TK.dtype, c.logprobs_TK.dtype, c.tail_logmass_T.dtype) == (
        torch.int32,
        torch.float32,
        torch.float32,
    )
    assert (c.num_draws, c.tail_ids_TN.shape, c.tail_ids_TN.dtype) == (
        0,
        (num_tokens, 0),
        torch.int32,
    )
    assert (c.vocab_size, c.temperature) == (vocab_size, temperature)


@pytest.mark.parametrize("k", [1, 7, 64, 1000, 1001])
def test_a_constant_row_keeps_its_lowest_ids(k: int) -> None:
    c = compress(torch.full((3, 1001), 2.5), TargetSpec(1001, k))
    assert torch.equal(c.token_ids_TK, torch.arange(k, dtype=torch.int32).expand(3, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sorted_tied_and_clustered_rows_keep_the_right_ids(dtype: torch.dtype) -> None:
    ramp = torch.arange(500.0) / 8
    one_block = torch.where((torch.arange(500) >= 128) & (torch.arange(500) < 192), 9.0, -9.0)
    signed_zeros = torch.where(torch.arange(500) % 2 == 0, -0.0, 0.0)
    two_levels = torch.where(torch.arange(500) % 50 == 49, 1.0, 0.0)
    logits = torch.stack(
        [ramp, -ramp, one_block, signed_zeros, two_levels, ramp.flip(0).round()]
    ).to(dtype)
    for k in (1, 8, 10, 63, 64, 65, 499):
        assert_is_the_target_of(compress(logits, TargetSpec(logits.shape[1], k)), logits, k=k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_vocabulary_and_more_rows_than_one_block_stay_exact(dtype: torch.dtype) -> None:
    logits = random_logits(9, 151_937, seed=1).to(dtype)
    assert_is_the_target_of(compress(logits, TargetSpec(logits.shape[1], 64)), logits, k=64)


@pytest.mark.parametrize("offset", [-3e4, 0.0, 3e4])
def test_the_log_sum_exp_is_within_two_millionths(offset: float) -> None:
    logits = random_logits(4, 50_000, seed=2, scale=8.0) + offset
    c = compress(logits, TargetSpec(logits.shape[1], 1))
    lse = logits.double().amax(dim=1) - c.logprobs_TK[:, 0].double()
    error = (lse - logits.double().logsumexp(dim=1)).abs()
    assert (error <= 2e-6 * lse.abs().clamp(min=1.0)).all()


def test_keeping_everything_leaves_a_tail_of_exactly_nothing() -> None:
    c = compress(random_logits(4, 33, seed=3), TargetSpec(33, 33))
    assert (c.tail_logmass_T == -math.inf).all()
    torch.testing.assert_close(
        c.logprobs_TK.double().exp().sum(dim=1), torch.ones(4, dtype=torch.float64)
    )


def test_keeping_nothing_leaves_the_whole_mass_to_the_tail() -> None:
    c = bucketed(random_logits(4, 33, seed=3), 0)
    assert c.token_ids_TK.shape == c.logprobs_TK.shape == (4, 0)
    assert (c.tail_logmass_T == 0).all()


def test_no_tokens_give_an_empty_target() -> None:
    assert compress(torch.empty(0, 33), TargetSpec(33, 5)).token_ids_TK.shape == (0, 5)
    assert compress_hidden(
        torch.empty(0, 4), Head(torch.ones(33, 4)), spec=TargetSpec(33, 5)
    ).token_ids_TK.shape == (
        0,
        5,
    )


def test_a_tiny_tail_keeps_its_digits() -> None:
    logits = torch.zeros(1, 1001)
    logits[0, 500] = 100.0
    assert compress(logits, TargetSpec(logits.shape[1], 1)).tail_logmass_T.item() == pytest.approx(
        math.log(1000) - 100, abs=1e-5
    )


def test_a_tiny_kept_mass_keeps_its_digits() -> None:
    c = compress(torch.zeros(1, 151_936), TargetSpec(151_936, 2))
    assert c.tail_logmass_T.item() == pytest.approx(math.log1p(-2 / 151_936), rel=1e-5)


def test_strides_do_not_matter() -> None:
    logits = random_logits(6, 200, seed=4, step=0.5)
    wanted = compress(logits, TargetSpec(logits.shape[1], 9))
    wide = torch.full((12, 400), 99.0)
    wide[::2, ::2] = logits
    assert_equal(compress(logits.T.contiguous().T, TargetSpec(logits.shape[1], 9)), wanted)
    assert_equal(compress(wide[::2, ::2], TargetSpec(logits.shape[1], 9)), wanted)


def test_the_logits_are_left_as_they_were() -> None:
    logits = random_logits(3, 50, seed=5).requires_grad_()
    before = logits.detach().clone()
    c = compress(logits, TargetSpec(logits.shape[1], 4))
    assert torch.equal(logits, before)
    assert not c.logprobs_TK.requires_grad


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (math.nan, "1 NaN and 0 \\+inf"),
        (math.inf, "0 NaN and 1 \\+inf"),
        (-math.inf, "no logit above -inf"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_no_distribution_is_refused_by_its_position(
    value: float, complaint: str, dtype: torch.dtype
) -> None:
    logits = random_logits(8, 300_001, seed=6, scale=1.0).to(dtype)
    if value == -math.inf:
        logits[6] = value
    else:
        logits[6, 11] = value
    with pytest.raises(TeacherError, match=f"token 6 .*{complaint}"):
        compress(logits, TargetSpec(logits.shape[1], 3))


def test_a_temperature_that_overflows_the_logits_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"token 0 .*temperature"):
        compress(torch.full((1, 4), 3e38), TargetSpec(4, 1, temperature=0.1))


def test_logits_of_another_vocabulary_than_the_specs_are_refused() -> None:
    complaint = "rows of 64 logits meet a spec of 33 ids.*slice a padded head"
    with pytest.raises(ConfigError, match=complaint):
        compress(torch.zeros(2, 64), TargetSpec(33, 4))
    with pytest.raises(ConfigError, match=complaint):
        compress_hidden(torch.zeros(2, 4), Head(torch.zeros(64, 4)), spec=TargetSpec(33, 4))


@pytest.mark.parametrize("block_tokens", [1, 4, 5, 9, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_give_the_target_of_their_logits(
    block_tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(9, 16, generator=generator)
    head = Head(torch.randn(120, 16, generator=generator).to(dtype), scale=2.0, softcap=5.0)
    spec = TargetSpec(120, 10, temperature=1.5)
    blocks = [compress(head.logits(rows), spec) for rows in hidden.split(block_tokens)]
    assert_equal(
        compress_hidden(hidden, head, spec=spec, block_tokens=block_tokens),
        concatenate(blocks),
    )


class RecordingHead:
    """A head that records the number of tokens of each call."""

    vocab_size, weight_VH = 20, torch.zeros(20, 3)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        self.asked.append(hidden_TH.shape[0])
        return hidden_TH[:, :1] + torch.arange(20.0)


def test_no_more_than_a_block_of_logits_exists_at_once() -> None:
    head: Any = RecordingHead()
    compress_hidden(torch.zeros(10, 3), head, spec=TargetSpec(head.vocab_size, 2), block_tokens=4)
    assert head.asked == [4, 4, 2]


def test_a_bad_token_is_named_by_its_place_among_all_the_hidden_states() -> None:
    hidden = torch.zeros(10, 3)
    hidden[9] = math.nan
    with pytest.raises(TeacherError, match="token 9 "):
        compress_hidden(hidden, Head(torch.ones(20, 3)), spec=TargetSpec(20, 2), block_tokens=4)


def test_hidden_states_and_a_head_on_different_devices_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"hidden states are on meta, the head's weight on cpu; move one"
    ):
        compress_hidden(
            torch.zeros(2, 4, device="meta"), Head(torch.zeros(20, 4)), spec=TargetSpec(20, 2)
        )
