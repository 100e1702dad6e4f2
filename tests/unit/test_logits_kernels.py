"""The kernels, in Triton's interpreter: the reference's ids bit for bit, sums to the rounding of float32, or doubt.

The interpreter is slow, its sorts slower still: so shapes are small here.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.compiling import Kernel, machine_code_sizes
from stillhouse.logits import compress_reference, kernels, token_seeds
from stillhouse.logits.draws import draw_in_blocks
from stillhouse.logits.rawtopk import normalise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_logits(num_tokens: int, vocab_size: int, *, seed: int, step: float = 0.0, scale: float = 4.0) -> torch.Tensor:
    logits = scale * torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed))
    return (logits / step).round() * step if step else logits


def assert_equals_the_reference_or_doubts(
    logits: torch.Tensor, *, k: int, temperature: float = 1.0, width: int | None = None
) -> list[bool]:
    """The rows that are to be done again."""
    raw, again = kernels.launch(logits, k=k, temperature=temperature, width=width)
    target, lse = normalise(raw, vocab_size=logits.shape[1], temperature=temperature)
    wanted = compress_reference(logits, k=k, temperature=temperature)
    sure = ~again
    assert torch.equal(target.token_ids_TK[sure], wanted.token_ids_TK[sure])
    assert torch.equal(raw.logits_TK[sure], logits.float().gather(1, wanted.token_ids_TK.long())[sure])
    exact = (logits.double() / temperature).logsumexp(dim=1)
    assert ((lse - exact).abs() <= 2e-6 * exact.abs().clamp(min=1))[sure].all()
    torch.testing.assert_close(target.tail_logmass_T[sure], wanted.tail_logmass_T[sure], rtol=2e-6, atol=4e-6)
    return again.tolist()


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_every_shape_dtype_tie_and_layout_equals_the_reference(data: st.DataObject) -> None:
    k = data.draw(st.integers(0, 9))
    vocab_size = data.draw(st.sampled_from([400, 511, 512, 513, 1003]))
    width = data.draw(st.sampled_from([None, 16])) if k else None
    logits = random_logits(2, vocab_size, seed=data.draw(st.integers(0, 10**6)), step=data.draw(st.sampled_from([0.0, 1.0])))
    excluded = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k)) < data.draw(st.sampled_from([0.0, 0.5]))
    excluded[:, vocab_size // 2] = False
    logits = logits.masked_fill(excluded, -math.inf).to(data.draw(st.sampled_from(DTYPES)))
    logits = logits.T.contiguous().T if data.draw(st.booleans()) else logits
    again = assert_equals_the_reference_or_doubts(logits, k=k, temperature=data.draw(st.sampled_from([1.0, 0.7, 3.0])), width=width)
    assert not any(again) or logits.unique().numel() < 100  # only where many entries tie


def test_single_blocks_steps_and_signed_zeros_equal_the_reference() -> None:
    place = torch.arange(1500)
    rows = [
        torch.where((place >= 128) & (place < 144), 9.0 + place / 100, -9.0 - place % 97),
        torch.where(place % 97 == 0, torch.where(place % 2 == 0, -0.0, 0.0), -1.0 - place % 89),
        -((place * 7) % 1499) / 50,
    ]
    assert assert_equals_the_reference_or_doubts(torch.stack(rows), k=6) == [False] * 3


def test_rows_with_more_entries_than_room_and_with_faint_tails_are_to_be_done_again() -> None:
    flat, ascending, faint = torch.zeros(1500), torch.arange(1500) / 100, torch.zeros(1500)
    faint[700] = 90.0
    assert assert_equals_the_reference_or_doubts(torch.stack([flat, ascending, faint]), k=4) == [True] * 3


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's NumPy says what a GPU does not
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf])
def test_what_is_no_distribution_has_no_finite_log_sum_exp(wrong: float) -> None:
    logits = random_logits(3, 500, seed=5)
    logits[1, 77] = wrong
    for k in (0, 5):
        raw, _ = kernels.launch(logits, k=k, temperature=1.0)
        assert normalise(raw, vocab_size=500, temperature=1.0)[1].isfinite().tolist() == [True, False, True]


def test_a_row_of_nothing_has_no_finite_log_sum_exp() -> None:
    raw, again = kernels.launch(torch.full((1, 500), -math.inf), k=3, temperature=1.0)
    assert again.all() or not normalise(raw, vocab_size=500, temperature=1.0)[1].isfinite().any()


def test_draws_from_the_kernels_sums_are_the_references() -> None:
    logits = random_logits(6, 900, seed=3)
    seeds = token_seeds(1, torch.zeros(6), torch.arange(6))
    raw, again = kernels.launch(logits, k=5, temperature=1.5)
    assert not again.any()
    found = draw_in_blocks(logits, raw, seeds, num_draws=8, temperature=1.5)
    assert torch.equal(found, compress_reference(logits, k=5, tail_draws=8, temperature=1.5, seeds_T=seeds).tail_ids_TN)


def test_the_self_test_passes_here() -> None:
    assert kernels.defect(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("vocab_size", "k", "width"), [(151_936, 64, 64), (151_936, 512, 32), (151_936, 8, 128), (262_144, 64, 64), (32_000, 0, 128)]
)
def test_a_block_is_about_as_wide_as_the_square_root_of_ids_an_entry(vocab_size: int, k: int, width: int) -> None:
    assert kernels.block_width(vocab_size, k) == width
    assert kernels.too_small(vocab_size, k) is None


def test_a_small_vocabulary_is_no_work_for_blocks() -> None:
    assert kernels.too_small(300, 20) == "300 logits are too few blocks to filter for 20"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_gpu(tmp_path: Path, dtype: str) -> None:
    """At the shapes of K = 64 over 151,936 ids."""
    floats = dict.fromkeys(("maxima", "sums", "rest_sums", "tops", "values_out"), "*fp32")
    wholes = dict.fromkeys(("found", "least", "counts", "ids_out"), "*i32") | {"keys": "*i64"}
    types = floats | wholes | {"logits": f"*{dtype}", "inverse": "fp32"} | dict.fromkeys(("row_stride", "vocab_size", "num_blocks"), "i32")
    width, chunk = kernels.block_width(151_936, 64), {"K": 64, "C": 256, "B": 64, "CHUNK": 32}
    constants = {"_read": {"B": width, "TILE": 64}, "_pick": {"K": 64, "M": 4096}, "_gather": chunk, "_rank": chunk}
    wanted = [Kernel("stillhouse.logits.kernels", name, types, constants[name]) for name in constants]
    assert all(size > 0 for size in machine_code_sizes(wanted, cache=tmp_path))
