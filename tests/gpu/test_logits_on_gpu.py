"""On a GPU, `compress` takes the kernels by itself and answers as the reference does on the CPU,
whatever the logits."""

import math

import pytest
import torch

from stillhouse.errors import TeacherError
from stillhouse.logits import (
    CompressedLogits,
    Head,
    TargetSpec,
    backend_for,
    compress,
    compress_hidden,
    compress_reference,
    token_seeds,
)
from stillhouse.logits.topk import blockmax_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (151_936, 64),
    (151_936, 512),
    (128_256, 16),
    (32_000, 128),
    (262_144, 64),
    (151_665, 1),
    (151_936, 0),
    (4_097, 16),
]


def random_logits(num_tokens: int, vocab_size: int, *, step: float = 0.0) -> torch.Tensor:
    logits = 4 * torch.randn(
        num_tokens, vocab_size, generator=torch.Generator().manual_seed(vocab_size)
    )
    return (logits / step).round() * step if step else logits


def seeds(num_tokens: int) -> torch.Tensor:
    return token_seeds(0, torch.zeros(num_tokens), torch.arange(num_tokens))


def whole_spec(vocab_size: int, k: int) -> TargetSpec:
    """A target that holds everything a target may hold."""
    return TargetSpec(
        vocab_size, k, num_draws=24, weighted=True, label_logprob=True, tail_entropy=True
    )


def assert_same(found: CompressedLogits, wanted: CompressedLogits) -> None:
    assert torch.equal(found.token_ids_TK.cpu(), wanted.token_ids_TK)
    torch.testing.assert_close(found.logprobs_TK.cpu(), wanted.logprobs_TK, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(
        found.tail_logmass_T.cpu(), wanted.tail_logmass_T, rtol=2e-6, atol=4e-6
    )


@pytest.mark.parametrize("row_stride", [151_669, 151_680])
def test_the_kernels_pass_their_own_test(gpu: torch.device, row_stride: int) -> None:
    assert (
        blockmax_triton.self_test_failure(
            gpu, vocab_size=151_669, k=64, dtype=torch.bfloat16, row_stride=row_stride
        )
        is None
    )


def test_more_entries_than_the_kernels_are_for_equal_the_reference(gpu: torch.device) -> None:
    logits = random_logits(7, 20_000)
    assert backend_for(logits.to(gpu), k=1024).name == "reference"
    assert_same(
        compress(logits.to(gpu), TargetSpec(logits.shape[1], 1024)),
        compress_reference(logits, TargetSpec(logits.shape[1], 1024)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "k"), SHAPES)
def test_real_shapes_take_the_kernels_and_equal_the_reference(
    gpu: torch.device, vocab_size: int, k: int, dtype: torch.dtype
) -> None:
    logits = random_logits(37, vocab_size).to(dtype)
    assert backend_for(logits.to(gpu), k=k).name == "triton"
    for temperature in (1.0, 0.7):
        assert_same(
            compress(logits.to(gpu), TargetSpec(logits.shape[1], k, temperature=temperature)),
            compress_reference(logits, TargetSpec(logits.shape[1], k, temperature=temperature)),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_sorted_rows_and_rows_of_one_value_equal_the_reference(
    gpu: torch.device, dtype: torch.dtype
) -> None:
    place = torch.arange(20_000)
    faint = torch.zeros(20_000)
    faint[7] = 90.0
    rows = [
        torch.zeros(20_000),
        place / 500,
        -place / 500,
        torch.where(place % 130 == 129, 1.0, 0.0),
        torch.where(place == 77, 3.0, -math.inf),
    ]
    logits = torch.stack([*rows, faint, random_logits(1, 20_000, step=2.0)[0]]).to(dtype)
    for k in (1, 8, 64):
        assert_same(
            compress(logits.to(gpu), TargetSpec(logits.shape[1], k)),
            compress_reference(logits, TargetSpec(logits.shape[1], k)),
        )


def test_strided_and_transposed_logits_equal_the_reference(gpu: torch.device) -> None:
    logits = random_logits(16, 30_000)
    for view in (logits.T.contiguous().T, logits[::2], logits[:, 1:29_001]):
        assert_same(
            compress(view.to(gpu), TargetSpec(view.shape[1], 32)),
            compress_reference(view, TargetSpec(view.shape[1], 32)),
        )


def test_no_tokens_and_bad_tokens(gpu: torch.device) -> None:
    assert compress(torch.empty(0, 30_000, device=gpu), TargetSpec(30_000, 4)).num_tokens == 0
    logits = random_logits(9, 30_000).to(gpu)
    for wrong in (math.nan, math.inf):
        logits[7, 29_999] = wrong
        with pytest.raises(TeacherError, match="token 7 "):
            compress(logits, TargetSpec(logits.shape[1], 4))


def test_draws_are_those_of_the_cpu_but_for_the_rounding_of_borders(gpu: torch.device) -> None:
    logits, seeds = random_logits(200, 30_000), token_seeds(0, torch.zeros(200), torch.arange(200))
    found = compress(
        logits.to(gpu), TargetSpec(logits.shape[1], 12, num_draws=12), seeds_T=seeds
    ).tail_ids_TN.cpu()
    wanted = compress_reference(
        logits, TargetSpec(logits.shape[1], 12, num_draws=12), seeds_T=seeds
    ).tail_ids_TN
    assert (found == wanted).float().mean() > 0.99


def test_exact_logits_are_float32_sums_and_blocks_change_nothing(gpu: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(30_000, 256, generator=random) / 4).bfloat16()
    hidden = torch.randn(300, 256, generator=random).bfloat16()
    wanted = compress_reference(hidden.float() @ weight.float().T, TargetSpec(len(weight), 32))
    head = Head(weight.to(gpu), float32_logits=True)
    for block_tokens in (64, 1024):
        found = compress_hidden(
            hidden.to(gpu), head, spec=TargetSpec(head.vocab_size, 32), block_tokens=block_tokens
        )
        assert (
            found.token_ids_TK.cpu() == wanted.token_ids_TK
        ).float().mean() > 0.999  # products are summed in another order
        torch.testing.assert_close(found.logprobs_TK.cpu(), wanted.logprobs_TK, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "k"), [(151_669, 8), (128_256, 64), (32_000, 0)])
def test_weighted_draws_labels_and_entropies_are_the_references(
    gpu: torch.device, vocab_size: int, k: int, dtype: torch.dtype
) -> None:
    logits, seeds_T = random_logits(37, vocab_size).to(dtype), seeds(37)
    labels_T = torch.arange(37) * 800
    labels_T[:9] = logits[:9].float().argmax(dim=1)
    spec = whole_spec(vocab_size, k)
    found = compress(logits.to(gpu), spec, seeds_T=seeds_T, labels_T=labels_T)
    wanted = compress_reference(logits, spec, seeds_T=seeds_T, labels_T=labels_T)
    assert_same(found, wanted)
    same_TN = found.tail_ids_TN.cpu() == wanted.tail_ids_TN
    assert same_TN.float().mean() > 0.99
    for name in ("draw_logprobs_TN", "label_logprob_T", "tail_entropy_T"):
        ours, theirs = found.tensors[name].cpu(), wanted.tensors[name]
        ours = ours.where(same_TN, theirs) if name == "draw_logprobs_TN" else ours
        torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("block_tokens", [64, 256])
def test_two_streams_give_the_targets_of_one_bit_for_bit(
    gpu: torch.device, block_tokens: int
) -> None:
    """Again and again, since a race would be lost now and then."""
    random = torch.Generator().manual_seed(0)
    head = Head((torch.randn(151_669, 512, generator=random) / 6).bfloat16().to(gpu), softcap=30.0)
    hidden = torch.randn(1000, 512, generator=random).bfloat16().to(gpu)
    hidden[300] = 0.0  # all logits tie: a row in doubt
    spec, seeds_T, labels_T = whole_spec(head.vocab_size, 8), seeds(1000), torch.arange(1000)
    alone, *others = (
        compress_hidden(
            hidden,
            head,
            spec=spec,
            seeds_T=seeds_T,
            labels_T=labels_T,
            block_tokens=block_tokens,
            overlap=overlap,
        )
        for overlap in (False, *(5 * [True]))
    )
    for other in others:
        for name, value in alone.tensors.items():
            assert torch.equal(other.tensors[name], value)


def test_rows_in_doubt_are_capped_in_float32_as_all_others_are(gpu: torch.device) -> None:
    """In bfloat16 the cap would make a tie: 20.625 and 20.75 would both become 17.875."""
    weight = torch.tensor([20.625, 20.75]).repeat(10_000)[:, None].bfloat16()
    head = Head(weight.to(gpu), softcap=30.0)
    hidden = torch.ones(2, 1, dtype=torch.bfloat16, device=gpu)
    found = compress_hidden(hidden, head, spec=TargetSpec(head.vocab_size, 8))
    assert found.token_ids_TK.tolist() == 2 * [list(range(1, 16, 2))]
