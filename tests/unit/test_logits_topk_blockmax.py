"""The block-max filter, in C and in torch, is the reference: the same ids bit for bit, values as
near to float64 as the reference's."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from platform import machine
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.targets import bucketed
from stillhouse.errors import TeacherError
from stillhouse.logits import (
    CompressedLogits,
    Head,
    TargetSpec,
    backend_for,
    compress,
    compress_hidden,
    compress_reference,
)
from stillhouse.logits.topk import blockmax_cpu, blockmax_torch, reference
from stillhouse.logits.topk.draws import draw_in_blocks, draw_rest, or_lowest
from stillhouse.logits.topk.found import RawTopK, normalise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_torch(logits: torch.Tensor, *, k: int, temperature: float = 1.0) -> RawTopK:
    return blockmax_torch.split(logits, k=k, temperature=temperature)


def by_c(logits: torch.Tensor, *, k: int, temperature: float = 1.0) -> RawTopK:
    split_rows = blockmax_cpu.compiled().split_rows
    assert split_rows is not None
    return blockmax_cpu.split(split_rows, logits, k=k, temperature=temperature)


SPLITS = [by_torch, by_c] if blockmax_cpu.compiled().split_rows else [by_torch]
either_way = pytest.mark.parametrize("split", SPLITS)
Split = Callable[..., RawTopK]


def random_logits(
    num_tokens: int, vocab_size: int, *, seed: int, step: float = 0.0, scale: float = 4.0
) -> torch.Tensor:
    logits = scale * torch.randn(
        num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)
    )
    return (logits / step).round() * step if step else logits


def strided(logits: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers otherwise laid out in memory."""
    num_tokens, vocab_size = logits.shape
    if layout == "transposed":
        return logits.T.contiguous().T
    wide = torch.full((2 * num_tokens, 2 * vocab_size + 3), math.nan, dtype=logits.dtype)
    view = (
        wide[::2, 3 : 3 + vocab_size]
        if layout == "rows apart"
        else wide[::2, 3 : 3 + 2 * vocab_size : 2]
    )
    view.copy_(logits)
    return logits if layout == "plain" else view


def assert_equals_the_reference(
    split: Split, logits: torch.Tensor, *, k: int, temperature: float = 1.0
) -> None:
    """Ids and kept logits exactly; log-probabilities and tail within 1e-6 of how near to float64
    the reference comes."""
    raw = split(logits, k=k, temperature=temperature)
    target, lse = normalise(raw, vocab_size=logits.shape[1], temperature=temperature)
    wanted = bucketed(logits, k, temperature=temperature, by=compress_reference)
    assert torch.equal(target.token_ids_TK, wanted.token_ids_TK)
    ids = wanted.token_ids_TK.long()
    assert torch.equal(raw.logits_TK, logits.float().gather(1, ids))
    scaled = logits.double() / temperature
    logprobs = scaled.log_softmax(dim=1)
    assert_as_near(target.logprobs_TK, wanted.logprobs_TK, logprobs.gather(1, ids))
    assert_as_near(
        target.tail_logmass_T,
        wanted.tail_logmass_T,
        logprobs.scatter(1, ids, -math.inf).logsumexp(dim=1),
    )
    exact = scaled.logsumexp(dim=1)
    assert ((lse - exact).abs() <= 2e-6 * exact.abs().clamp(min=1)).all()
    assert (target.logprobs_TK <= 0).all()
    assert (target.tail_logmass_T <= 0).all()


def assert_as_near(ours: torch.Tensor, references: torch.Tensor, exact: torch.Tensor) -> None:
    ours_off, references_off = (
        (found.double() - exact).abs().where(found.double() != exact, 0.0)
        for found in (ours, references)
    )
    assert (ours_off <= references_off + 1e-6 * (1 + exact.abs())).all()


@either_way
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_shape_dtype_tie_and_layout_equals_the_reference(
    split: Split, data: st.DataObject
) -> None:
    num_tokens = data.draw(st.integers(1, 5))
    vocab_size = data.draw(
        st.one_of(st.integers(1, 150), st.sampled_from([255, 256, 257, 383, 640, 1500, 4097]))
    )
    k = data.draw(st.one_of(st.integers(0, min(vocab_size, 20)), st.integers(0, vocab_size)))
    step, scale = (
        data.draw(st.sampled_from([0.0, 0.5, 8.0])),
        data.draw(st.sampled_from([0.1, 4.0, 30.0])),
    )
    logits = random_logits(
        num_tokens, vocab_size, seed=data.draw(st.integers(0, 10**6)), step=step, scale=scale
    )
    excluded = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k)) < data.draw(
        st.sampled_from([0.0, 0.5, 0.99])
    )
    excluded[:, vocab_size // 2] = False
    logits = logits.masked_fill(excluded, -math.inf).to(data.draw(st.sampled_from(DTYPES)))
    logits = strided(
        logits, data.draw(st.sampled_from(["plain", "transposed", "rows apart", "both apart"]))
    )
    assert_equals_the_reference(
        split, logits, k=k, temperature=data.draw(st.sampled_from([1.0, 0.7, 3.0]))
    )


@either_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "k"), [(151_936, 64), (151_665, 512), (32_000, 300)])
def test_real_vocabularies_equal_the_reference(
    split: Split, dtype: torch.dtype, vocab_size: int, k: int
) -> None:
    assert_equals_the_reference(split, random_logits(3, vocab_size, seed=1).to(dtype), k=k)


@either_way
@pytest.mark.parametrize("dtype", DTYPES)
def test_massive_ties_sorted_rows_and_single_blocks_equal_the_reference(
    split: Split, dtype: torch.dtype
) -> None:
    place = torch.arange(5000)
    rows = [
        torch.full((5000,), 2.5),
        place / 500,
        -place / 500,
        torch.where((place >= 128) & (place < 256), 9.0, -9.0),
        torch.where(place % 2 == 0, -0.0, 0.0),
        torch.where(place % 130 == 129, 1.0, 0.0),
        torch.where(place > 4990, 1.0, -math.inf),
        torch.where(place == 77, 3.0, -math.inf),
    ]
    logits = torch.stack(rows).to(dtype)
    for k in (0, 1, 8, 64, 127, 128, 129, 1000, 4999, 5000):
        assert_equals_the_reference(split, logits, k=k)


@either_way
def test_a_tail_below_what_float32_can_hold_keeps_its_digits(split: Split) -> None:
    logits = torch.zeros(2, 1001)
    logits[0, 500], logits[1, 3] = 100.0, 250.0
    target, _ = normalise(split(logits, k=1), vocab_size=1001, temperature=1.0)
    assert target.tail_logmass_T.tolist() == pytest.approx(
        [math.log(1000) - 100, math.log(1000) - 250], rel=1e-6
    )


@either_way
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000 - 2**32, 0x7FFFFFFF, 0x7F800001, -1])
@pytest.mark.parametrize("place", [0, 127, 640, 700])
def test_no_kind_of_nan_gets_through(split: Split, bits: int, place: int) -> None:
    logits = random_logits(3, 701, seed=5)
    logits[:, 650:] = -math.inf
    logits[1, place] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for k in (0, 1, 5, 701):
        _, lse = normalise(split(logits, k=k), vocab_size=701, temperature=1.0)
        assert lse.isfinite().tolist() == [True, False, True]


@either_way
@pytest.mark.parametrize(
    "logits",
    [
        torch.full((1, 300), -math.inf),
        torch.tensor([[0.0] * 200 + [math.inf]]),
        torch.full((1, 5), 3e38),
    ],
)
def test_what_is_no_distribution_has_no_finite_log_sum_exp(
    split: Split, logits: torch.Tensor
) -> None:
    for k in (0, 1, 5):
        _, lse = normalise(
            split(logits, k=k, temperature=0.1), vocab_size=logits.shape[1], temperature=0.1
        )
        assert not lse.isfinite().any()


@either_way
@pytest.mark.parametrize("vocab_size", [5, 100, 1000])
def test_the_logits_are_left_as_they_were(split: Split, vocab_size: int) -> None:
    logits = random_logits(3, vocab_size, seed=5)
    before = logits.clone()
    split(logits, k=4)
    assert torch.equal(logits, before)


def targets(
    logits: torch.Tensor, spec: TargetSpec, seeds: torch.Tensor
) -> tuple[CompressedLogits, torch.Tensor]:
    """In C, or without a compiler as elsewhere."""
    make_targets = blockmax_cpu.compiled().make_targets
    if make_targets:
        labels = torch.zeros_like(seeds)
        return blockmax_cpu.targets(make_targets, logits, spec=spec, seeds_T=seeds, labels_T=labels)
    raw, at = by_torch(logits, k=spec.k, temperature=spec.temperature), spec.temperature
    target, lse = normalise(raw, vocab_size=spec.vocab_size, temperature=at)
    drawn = draw_rest(
        logits, raw, seeds, num_draws=spec.num_draws, temperature=at, weighted=spec.weighted
    )
    return replace(target, tail_ids_TN=drawn), lse.float()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_targets_made_in_c_are_the_filters_normalised_and_drawn_from(
    data: st.DataObject,
) -> None:
    """Draws are equal but for those that fall within float32 rounding of a border of ids."""
    vocab_size = data.draw(st.sampled_from([128, 129, 700, 2304, 11_000]))
    k = data.draw(st.one_of(st.integers(0, 20), st.integers(0, vocab_size - 1)))
    num_draws = data.draw(st.integers(0 if k else 1, 30))
    weighted = num_draws > 0 and data.draw(st.booleans())
    temperature = data.draw(st.sampled_from([1.0, 0.6]))
    step, scale = data.draw(st.sampled_from([0.0, 0.5])), data.draw(st.sampled_from([0.1, 4.0]))
    logits = random_logits(
        3, vocab_size, seed=data.draw(st.integers(0, 10**6)), step=step, scale=scale
    )
    excluded = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k))
    logits.masked_fill_(excluded < data.draw(st.sampled_from([0.0, 0.9])), -math.inf)
    logits[:, vocab_size // 2] = 60.0
    logits = logits.to(data.draw(st.sampled_from(DTYPES)))
    spec = TargetSpec(
        vocab_size, k, num_draws=num_draws, temperature=temperature, weighted=weighted
    )
    seeds = torch.arange(6)[::2]

    raw = SPLITS[-1](logits, k=k, temperature=temperature)
    wanted, wanted_lse = normalise(raw, vocab_size=vocab_size, temperature=temperature)
    target, lse = targets(logits, spec, seeds)
    assert torch.equal(target.token_ids_TK, wanted.token_ids_TK)
    assert torch.equal(target.tail_logmass_T.isinf(), wanted.tail_logmass_T.isinf())
    found = target.logprobs_TK, target.tail_logmass_T, lse
    torch.testing.assert_close(
        found,
        (wanted.logprobs_TK, wanted.tail_logmass_T, wanted_lse.float()),
        rtol=3e-7,
        atol=1e-12,
    )
    drawn = draw_in_blocks(
        logits, raw, seeds, num_draws=num_draws, temperature=temperature, weighted=weighted
    )
    drawn = or_lowest(drawn, raw.token_ids_TK, vocab_size=vocab_size)
    tail = (logits.double() / temperature).scatter(1, wanted.token_ids_TK.long(), -math.inf)
    others = torch.ones_like(tail).scatter_(1, wanted.token_ids_TK.long(), 0.0)
    half_uniform = (tail.softmax(dim=1) + others / others.sum(dim=1, keepdim=True)) / 2
    up_to = (half_uniform if weighted else tail.softmax(dim=1)).cumsum(dim=1)
    first, last = torch.stack([drawn, target.tail_ids_TN]).long().aminmax(dim=0)
    between = up_to.gather(1, (last - 1).clamp(min=0)) - up_to.gather(1, first)
    assert ((first == last) | (between <= 3e-6)).all()


def test_a_row_that_is_no_distribution_has_no_finite_log_sum_exp_in_its_target() -> None:
    logits = random_logits(5, 1001, seed=3)
    logits[0, 1000], logits[1, 5], logits[2], logits[3] = math.nan, math.inf, -math.inf, 3e38
    for k, num_draws in ((0, 3), (8, 3), (1001, 0)):
        spec = TargetSpec(1001, k, num_draws=num_draws, temperature=0.1)
        _, lse = targets(logits, spec, torch.zeros(5, dtype=torch.int64))
        assert lse.isfinite().tolist() == [False, False, False, False, True]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@either_way
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 37])
def test_two_threads_give_what_one_gives(split: Split, dtype: torch.dtype, num_tokens: int) -> None:
    logits = random_logits(num_tokens, 30_000, seed=6).to(dtype)
    assert_equals_the_reference(split, logits, k=16)


class Reads(TorchDispatchMode):
    """Counts the passes over logits: a maximum is taken of each."""

    num = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.num += function is torch.ops.aten.amax.out
        return function(*args, **(kwargs or {}))


def test_a_gpu_reads_many_rows_at_once_and_a_cpu_as_many_as_its_cache_holds() -> None:
    vocab_size = 40_000
    rows_read, _ = blockmax_torch.rows_at_once(torch.device("cpu"), vocab_size)
    with Reads() as reads:  # type: ignore[no-untyped-call]
        by_torch(random_logits(10, vocab_size, seed=0), k=4)
    assert (rows_read, reads.num) == (3, 4)
    rows_read, rows_selected = blockmax_torch.rows_at_once(torch.device("cuda", 1), 151_936)
    assert rows_read == rows_selected >= 100
    assert reference.rows_at_once(torch.device("cuda", 1), 151_936) >= 100


def test_rows_in_doubt_are_asked_for_a_block_at_a_time() -> None:
    asked: list[int] = []

    class Recording(Head):
        def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
            asked.append(len(hidden_TH))
            return super().logits(hidden_TH)

    hidden = torch.full((24, 3), math.nan)
    with pytest.raises(TeacherError, match=r"token 0 .*20 NaN"):
        compress_hidden(
            hidden, Recording(torch.ones(20, 3)), spec=TargetSpec(20, 2), block_tokens=4
        )
    assert asked == [4] * 7


def executable(path: FilePath, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "echo no target for these instructions >&2; exit 1",
            "does not compile blockmax.c: no target for these instructions",
        ),
        ("exit 3", "does not compile blockmax.c: exit status 3"),
        ('for last; do :; done; echo junk > "$last"', "makes nothing that can be loaded"),
        ("exit 0", "makes nothing that can be loaded"),
    ],
)
def test_a_broken_compiler_is_a_reason_and_not_an_error(
    tmp_path: FilePath, script: str, why: str
) -> None:
    found = blockmax_cpu.compile_with(executable(tmp_path / "cc", script))
    assert found.split_rows is None
    assert why in found.reason


def test_a_missing_compiler_is_a_reason(tmp_path: FilePath) -> None:
    assert "no C compiler" in blockmax_cpu.compile_with(None).reason
    assert (
        "makes nothing that can be loaded"
        in blockmax_cpu.compile_with(str(tmp_path / "gone")).reason
    )


def test_a_compiler_that_computes_wrongly_is_found_out(tmp_path: FilePath) -> None:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := find(name))), None)
    if compiler is None:
        assert blockmax_cpu.compiled().split_rows is None
        return
    wrong = "int split_rows(void) { return 0; }\nint make_targets(void) { return 0; }\n"
    (tmp_path / "wrong.c").write_text(wrong)
    script = f'for last; do :; done; {compiler} -shared -fPIC {tmp_path / "wrong.c"} -o "$last"'
    assert (
        "answers wrongly" in blockmax_cpu.compile_with(executable(tmp_path / "cc", script)).reason
    )


@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_of_other_machines_give_the_same(tmp_path: FilePath, without: str) -> None:
    if machine() != "x86_64" or blockmax_cpu.compiled().split_rows is None:
        return  # neither option is known there
    script = f'exec {find("cc") or find("gcc") or find("clang")} "$@" {without}'
    split_rows = blockmax_cpu.compile_with(executable(tmp_path / "cc", script)).split_rows
    assert split_rows is not None

    def split(logits: torch.Tensor, *, k: int, temperature: float = 1.0) -> RawTopK:
        return blockmax_cpu.split(split_rows, logits, k=k, temperature=temperature)

    for dtype in DTYPES:
        for k in (0, 5, 300):
            assert_equals_the_reference(split, random_logits(3, 701, seed=k).to(dtype), k=k)


def find(name: str) -> str | None:
    return next(
        (str(path) for part in os.get_exec_path() if (path := FilePath(part) / name).exists()), None
    )


def test_the_path_says_which_and_why() -> None:
    logits = torch.zeros(2, 9)
    assert backend_for(logits, k=3).name == (
        "native" if blockmax_cpu.compiled().split_rows else "blockmax"
    )
    assert backend_for(logits, k=3).reason == blockmax_cpu.compiled().reason
    assert backend_for(logits[:0], k=3).reason == "there are no logits"
    assert backend_for(logits, k=3, temperature=1e-35).name == "reference"
    assert backend_for(logits.to("meta"), k=3).reason == "there are no kernels for meta"


def test_an_extreme_temperature_is_the_references_affair() -> None:
    logits = torch.tensor([[0.0, -1e-36, 2e-36]])
    for way in (compress, compress_reference):
        c: CompressedLogits = way(logits, TargetSpec(3, 2, temperature=1e-36))
        assert c.token_ids_TK.tolist() == [[2, 0]]
        assert c.logprobs_TK[0].tolist() == pytest.approx([-0.1698, -2.1698], abs=1e-3)


def test_a_bad_row_in_a_later_block_of_rows_is_named() -> None:
    logits = torch.zeros(70, 131_073, dtype=torch.bfloat16)
    logits[69, 131_072] = math.nan
    with pytest.raises(TeacherError, match=r"token 69 .*1 NaN and 0"):
        compress(logits, TargetSpec(logits.shape[1], 3))
