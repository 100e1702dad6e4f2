"""The Triton kernels equal the reference, or doubt the row: ids bit for bit, sums to the rounding
of float32.

They run in Triton's interpreter, which is slow, so shapes are small.
"""

import errno
import math
import subprocess
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compiling import Kernel, machine_code
from helpers.targets import bucketed
from stillhouse.logits import (
    Backend,
    Head,
    TargetSpec,
    backend_for,
    compress_reference,
    token_seeds,
)
from stillhouse.logits.head import Curve
from stillhouse.logits.topk import blockmax_torch, blockmax_triton
from stillhouse.logits.topk.blockmax_triton import compress_block
from stillhouse.logits.topk.dispatch import Tokens, compress_in_blocks
from stillhouse.logits.topk.draws import draw_in_blocks
from stillhouse.logits.topk.found import RawTopK, normalise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_logits(
    num_tokens: int, vocab_size: int, *, seed: int, step: float = 0.0, scale: float = 4.0
) -> torch.Tensor:
    logits = scale * torch.randn(
        num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)
    )
    return (logits / step).round() * step if step else logits


def assert_equals_the_reference_or_doubts(
    logits: torch.Tensor, *, k: int, temperature: float = 1.0, width: int | None = None
) -> list[bool]:
    """The rows that are to be done again."""
    raw, again = blockmax_triton.launch(logits, k=k, temperature=temperature, width=width)
    target, lse = normalise(raw, vocab_size=logits.shape[1], temperature=temperature)
    wanted = bucketed(logits, k, temperature=temperature, by=compress_reference)
    sure = ~again
    assert torch.equal(target.token_ids_TK[sure], wanted.token_ids_TK[sure])
    assert torch.equal(
        raw.logits_TK[sure], logits.float().gather(1, wanted.token_ids_TK.long())[sure]
    )
    exact = (logits.double() / temperature).logsumexp(dim=1)
    assert ((lse - exact).abs() <= 2e-6 * exact.abs().clamp(min=1))[sure].all()
    torch.testing.assert_close(
        target.tail_logmass_T[sure], wanted.tail_logmass_T[sure], rtol=2e-6, atol=4e-6
    )
    return again.tolist()


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_every_shape_dtype_tie_and_layout_equals_the_reference(data: st.DataObject) -> None:
    k = data.draw(st.integers(0, 9))
    vocab_size = data.draw(st.sampled_from([400, 511, 512, 513, 1003]))
    width = data.draw(st.sampled_from([None, 16])) if k else None
    logits = random_logits(
        2,
        vocab_size,
        seed=data.draw(st.integers(0, 10**6)),
        step=data.draw(st.sampled_from([0.0, 1.0])),
    )
    excluded = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k)) < data.draw(
        st.sampled_from([0.0, 0.5])
    )
    excluded[:, vocab_size // 2] = False
    logits = logits.masked_fill(excluded, -math.inf).to(data.draw(st.sampled_from(DTYPES)))
    logits = logits.T.contiguous().T if data.draw(st.booleans()) else logits
    again = assert_equals_the_reference_or_doubts(
        logits, k=k, temperature=data.draw(st.sampled_from([1.0, 0.7, 3.0])), width=width
    )
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
    assert (
        assert_equals_the_reference_or_doubts(torch.stack([flat, ascending, faint]), k=4)
        == [True] * 3
    )


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered"
)  # the interpreter's NumPy says what a GPU does not
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf])
def test_what_is_no_distribution_has_no_finite_log_sum_exp(wrong: float) -> None:
    logits = random_logits(3, 500, seed=5)
    logits[1, 77] = wrong
    for k in (0, 5):
        raw, _ = blockmax_triton.launch(logits, k=k, temperature=1.0)
        assert normalise(raw, vocab_size=500, temperature=1.0)[1].isfinite().tolist() == [
            True,
            False,
            True,
        ]


def test_a_row_of_nothing_has_no_finite_log_sum_exp() -> None:
    raw, again = blockmax_triton.launch(torch.full((1, 500), -math.inf), k=3, temperature=1.0)
    assert again.all() or not normalise(raw, vocab_size=500, temperature=1.0)[1].isfinite().any()


def test_draws_from_the_kernels_sums_are_the_references() -> None:
    logits = random_logits(6, 900, seed=3)
    seeds = token_seeds(1, torch.zeros(6), torch.arange(6))
    raw, again = blockmax_triton.launch(logits, k=5, temperature=1.5)
    assert not again.any()
    found = draw_in_blocks(logits, raw, seeds, num_draws=8, temperature=1.5)
    assert torch.equal(
        found,
        compress_reference(
            logits, TargetSpec(logits.shape[1], 5, num_draws=8, temperature=1.5), seeds_T=seeds
        ).tail_ids_TN,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "num_draws", "curve", "temperature"),
    [
        (5, 11, Curve(), 1.0),
        (0, 9, Curve(scale=0.25), 0.7),
        (6, 0, Curve(scale=2.0, softcap=9.0), 1.0),
        (3, 17, Curve(softcap=5.0), 3.0),
        (4, 8, Curve(scale=-1.0), 1.0),
    ],
)
def test_targets_of_products_in_padded_rows_are_the_references_of_their_logits(
    k: int, num_draws: int, curve: Curve, temperature: float, dtype: torch.dtype
) -> None:
    """Whatever lies between two rows."""
    products = torch.full((3, 1024), math.nan, dtype=dtype)[:, :1003]
    products.copy_(random_logits(3, 1003, seed=k))
    spec = TargetSpec(1003, k, num_draws=num_draws, temperature=temperature)
    seeds = token_seeds(2, torch.zeros(3), torch.arange(3))
    found, doubtful = compress_block(products, curve, spec, seeds_T=seeds, labels_T=seeds)
    wanted = compress_reference(curve.logits(products.float()), spec, seeds_T=seeds)
    assert not doubtful.any()
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    assert torch.equal(found.tail_ids_TN, wanted.tail_ids_TN)
    for ours, theirs in (
        (found.logprobs_TK, wanted.logprobs_TK),
        (found.tail_logmass_T, wanted.tail_logmass_T),
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=4e-6)


class Counting(TorchDispatchMode):
    """Counts kernels, which it does not launch, and what torch launches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: list[str] = []

    def run(self, kernel: Any, *_: object, **__: object) -> None:
        self.launched.append(kernel.fn.__name__)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if not func.is_view and "empty" not in func.name():
            self.launched.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [False, True])
def test_a_block_of_any_target_takes_few_launches(more: bool) -> None:
    """With the head's matrix product, at most twelve."""
    products, seeds = torch.zeros(4, 1500), torch.zeros(4, dtype=torch.int64)
    names = ("weighted", "label_logprob", "tail_entropy")
    spec = TargetSpec(1500, 8, num_draws=40, **dict.fromkeys(names, more))
    curve = Curve(2.0, 30.0)
    with Counting() as counting:
        compress_block(products, curve, spec, seeds_T=seeds, labels_T=seeds, run=counting.run)
    counts, looks = (["aten::zero_"], ["look_up", "look_up"]) if more else ([], [])
    wanted = ["read", "pick", "gather", *counts, "finish", "draw", *looks]
    assert counting.launched == wanted


CPU = torch.device("cpu")
TRIED = {"vocab_size": 2000, "k": 8, "dtype": torch.float32, "row_stride": 2000}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.bfloat16, "row_stride": 2001},
        {"vocab_size": 1003, "row_stride": 1024, "k": 0},
        {"k": 30},
    ],
)
def test_the_self_test_passes_here_for_logits_of_any_kind(change: dict[str, Any]) -> None:
    assert blockmax_triton.self_test_failure(CPU, **(TRIED | change)) is None


def test_what_is_tried_is_what_will_be_read() -> None:
    seen: list[tuple[Any, ...]] = []

    def launch(logits: torch.Tensor, *, k: int, temperature: float) -> tuple[RawTopK, torch.Tensor]:
        seen.append((logits.shape[1], logits.stride(), logits.dtype, k))
        return blockmax_torch.split(logits, k=k, temperature=temperature), torch.zeros(
            len(logits), dtype=torch.bool
        )

    assert (
        blockmax_triton.self_test_failure(
            CPU, vocab_size=151_669, k=512, dtype=torch.bfloat16, row_stride=151_680, launch=launch
        )
        is None
    )
    assert seen == [(151_669, (151_680, 1), torch.bfloat16, 512)]


class FailingOnce:
    """A launch that fails at its first call, and is right from then on."""

    def __init__(self, failure: Exception) -> None:
        self.failure, self.num_calls = failure, 0

    def __call__(
        self, logits: torch.Tensor, *, k: int, temperature: float
    ) -> tuple[RawTopK, torch.Tensor]:
        self.num_calls += 1
        if self.num_calls == 1:
            raise self.failure
        return blockmax_torch.split(logits, k=k, temperature=temperature), torch.zeros(
            len(logits), dtype=torch.bool
        )


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        subprocess.CalledProcessError(-9, ["gcc"]),
        subprocess.TimeoutExpired(["ptxas"], 60),
    ],
    ids=repr,
)
def test_a_failure_that_may_pass_is_told_and_the_next_call_tries_again(failure: Exception) -> None:
    launch = FailingOnce(failure)
    with pytest.raises(type(failure)):
        blockmax_triton.self_test_failure(CPU, **TRIED, launch=launch)
    assert blockmax_triton.self_test_failure(CPU, **TRIED, launch=launch) is None
    assert launch.num_calls == 2


@pytest.mark.parametrize(
    "failure",
    [
        subprocess.CalledProcessError(1, ["gcc"]),
        RuntimeError("out of resource: shared memory"),
        FileNotFoundError(errno.ENOENT, "no such file", "gcc"),
        PermissionError(errno.EACCES, "read-only", "~/.triton"),
    ],
    ids=repr,
)
def test_a_failure_that_lasts_is_a_reason_which_is_remembered(failure: Exception) -> None:
    launch = FailingOnce(failure)
    reasons = [blockmax_triton.self_test_failure(CPU, **TRIED, launch=launch) for _ in range(2)]
    assert reasons[0] == reasons[1]
    assert f"fails on cpu: {type(failure).__name__}: {failure}" in str(reasons[0])
    assert launch.num_calls == 1


def test_kernels_that_answer_wrongly_or_doubt_every_row_are_refused() -> None:
    def wrong(logits: torch.Tensor, *, k: int, temperature: float) -> tuple[RawTopK, torch.Tensor]:
        raw = blockmax_torch.split(logits, k=k, temperature=temperature)
        return replace(raw, token_ids_TK=raw.token_ids_TK.flip(1)), torch.zeros(
            len(logits), dtype=torch.bool
        )

    def doubtful(
        logits: torch.Tensor, *, k: int, temperature: float
    ) -> tuple[RawTopK, torch.Tensor]:
        return blockmax_torch.split(logits, k=k, temperature=temperature), torch.ones(
            len(logits), dtype=torch.bool
        )

    for launch in (wrong, doubtful):
        assert "answers wrongly on cpu" in str(
            blockmax_triton.self_test_failure(CPU, **TRIED, launch=launch)
        )


def on_a_gpu(vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Fake logits on a GPU, for which no GPU is needed."""
    with FakeTensorMode():
        return torch.empty((8, vocab_size), dtype=dtype, device="cuda")


@pytest.mark.parametrize("k", [513, 1024, 4096])
def test_more_entries_than_the_kernels_compile_for_take_the_references_way_and_say_so(
    k: int,
) -> None:
    backend = backend_for(on_a_gpu(151_936), k=k)
    assert (backend.name, backend.reason) == (
        "reference",
        f"k is {k}, and the kernels are for 512 entries at most",
    )


def test_a_small_vocabulary_on_a_gpu_takes_torchs_filter_and_says_so() -> None:
    backend = backend_for(on_a_gpu(300), k=20)
    assert (backend.name, backend.reason) == (
        "blockmax",
        "300 logits are too few blocks to filter for 20",
    )


def test_hidden_states_take_the_kernels_and_rows_in_doubt_a_block_at_a_time() -> None:
    """Flat rows have more candidates than room; the kernels compress the others."""
    asked: list[int] = []

    class Recording(Head):
        def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
            asked.append(len(hidden_TH))
            return super().logits(hidden_TH)

    hidden = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
    hidden[[0, 2, 3, 4, 7, 8, 9, 11, 12]] = 0.0
    head = Recording(torch.randn(600, 8, generator=torch.Generator().manual_seed(1)))
    found = compress_in_blocks(
        lambda rows: head.logits(hidden[rows]),
        TargetSpec(600, 3),
        Tokens.of(*torch.zeros(2, 13, dtype=torch.int64)),
        block_tokens=4,
        choose_backend=lambda *_, **__: Backend("triton", "the interpreter's"),
    )
    assert asked == [4, 4, 4, 1, 4, 4, 1]
    wanted = compress_reference(hidden @ head.weight_VH.T, TargetSpec(600, 3))
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    torch.testing.assert_close(found.logprobs_TK, wanted.logprobs_TK, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize(
    ("vocab_size", "k", "width"),
    [(151_936, 64, 64), (151_936, 512, 32), (151_936, 8, 128), (262_144, 64, 64), (32_000, 0, 128)],
)
def test_a_block_is_about_as_wide_as_the_square_root_of_ids_an_entry(
    vocab_size: int, k: int, width: int
) -> None:
    assert blockmax_triton.block_width(vocab_size, k) == width
    assert blockmax_triton.too_small(vocab_size, k) is None


def test_a_small_vocabulary_is_no_work_for_blocks() -> None:
    assert blockmax_triton.too_small(300, 20) == "300 logits are too few blocks to filter for 20"


def over_an_odd_vocabulary(
    name: str, *, k: int = 8, dtype: str = "bf16", softcap: bool = False, more: bool = False
) -> Kernel:
    """A kernel as it runs over 151,669 ids, in rows of whole cache lines; for the default target,
    or for one that holds more."""
    # types
    floats = "maxima sums moments rest_sums tops values_out values_in logprobs_out tails_out"
    wholes = ("found", "least", "counts", "ids_out", "ids_in", "draws_out")
    types = (
        dict.fromkeys(floats.split(), "*fp32:16")
        | dict.fromkeys(wholes, "*i32:16")
        | dict.fromkeys(("keys", "seeds"), "*i64:16")
        | dict.fromkeys(("rests", "log_sums"), "*fp64:16")
        | {"num_kept": "*i16:16", "doubtful": "*i1:16", "products": f"*{dtype}:16"}
        | dict.fromkeys(("inverse", "inverse_low", "scale", "softcap"), "fp32")
        | dict.fromkeys(("vocab_size", "num_blocks", "num_draws", "num_ids"), "i32")
        | dict.fromkeys(("row_stride", "readable"), "i32:16")
    )

    # constants
    width = blockmax_triton.block_width(151_669, k)
    padded = 1 << (-(-151_669 // width) - 1).bit_length()
    capped: dict[str, object] = {"HAS_SOFTCAP": softcap}
    entropy: dict[str, object] = {"HAS_ENTROPY": more}
    weighted: dict[str, object] = {"WEIGHTED": more}
    found = {"K": k, "C": 4 * k, "B": width, "CHUNK": min(k, 2048 // width)} | capped
    bits = 16 if dtype == "bf16" else 32
    constants: dict[str, dict[str, object]] = {
        "read": {"B": width, "TILE": 4096 // width} | capped | entropy,
        "pick": {"K": k, "M": padded, "BITS": bits} | entropy,
        "gather": found,
        "finish": found | entropy | weighted,
        "draw": {"K": k, "B": width, "M": padded, "D": 16} | capped | weighted,
        "look_up": {"X": 32} | capped,
    }
    warps = {"pick": padded // 256, "draw": padded // 256}
    module = f"blockmax_{'draw' if name in ('draw', 'look_up') else 'kernels'}_triton"
    return Kernel(
        f"stillhouse.logits.topk.{module}", name, types, constants[name], warps.get(name, 4)
    )


def test_kernels_compile_within_a_gpus_registers_and_read_16_bytes_at_a_time(
    tmp_path: FilePath,
) -> None:
    most_registers = {"read": 64, "pick": 96, "gather": 64, "finish": 64, "draw": 80}
    more_registers = {"read": 64, "pick": 96, "finish": 64, "draw": 112, "look_up": 32}
    default = [over_an_odd_vocabulary(name, dtype="fp32") for name in most_registers]
    more = [over_an_odd_vocabulary(name, dtype="fp32", more=True) for name in more_registers]
    others = [
        over_an_odd_vocabulary("read"),
        over_an_odd_vocabulary("read", softcap=True, more=True),
        over_an_odd_vocabulary("pick", k=64),
    ]
    codes = machine_code([*default, *more, *others], cache=tmp_path)
    assert [code.stack_bytes for code in codes] == [0] * len(codes)
    limits = [*most_registers.values(), *more_registers.values(), 64, 64, 96]
    assert all(code.registers <= most for code, most in zip(codes, limits, strict=True)), codes
    of_read = [(codes[i].num_wide_loads, codes[i].num_narrow_loads) for i in (0, 5, 10, 11)]
    assert of_read == [(8, 0), (8, 0), (4, 0), (4, 0)]
