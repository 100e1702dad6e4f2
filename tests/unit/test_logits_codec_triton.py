"""The codec's kernels write the processor's records, byte for byte, read its targets from them, and
refuse what it refuses.

They run in Triton's interpreter, which is slow, so rows are few. NumPy's codec is the reference:
its own tests compare it with the layout.
"""

import errno
import math
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compiling import Kernel, machine_code
from stillhouse.errors import ChunkError
from stillhouse.logits import CompressedLogits, TargetSpec, codec, codec_numpy, codec_triton

Arrays = dict[str, np.ndarray]

# of a language model's vocabulary, odd and even; then what is small, whole or as large as it can be
SPECS = [
    TargetSpec(151_669, 8, num_draws=40),
    TargetSpec(151_936, 8, num_draws=25, weighted=True, label_logprob=True, tail_entropy=True),
    TargetSpec(151_936, 64, value_bits=6),
    TargetSpec(151_669, 128, num_draws=12, label_logprob=True),
    TargetSpec(262_145, 0, num_draws=50, weighted=True, label_logprob=True),
    TargetSpec(50_257, 1, num_draws=12, weighted=True, tail_entropy=True),
    TargetSpec(2**31 - 1, 5, num_draws=3, weighted=True),
    TargetSpec(40, 30, value_bits=6, tail_entropy=True),
    TargetSpec(5, 2, num_draws=21, weighted=True, value_bits=6),
    TargetSpec(3, 3, label_logprob=True),
    TargetSpec(2, 1, num_draws=1, value_bits=6, weighted=True, tail_entropy=True),
    TargetSpec(1, 1),
    TargetSpec(1, 0, num_draws=1),
]


def num_rows(spec: TargetSpec) -> int:
    """More than one program has, where that is few."""
    of_one_program: int = codec_triton.options_for(spec)["R"]
    return min(of_one_program + 1, 10)


def arrays_of(spec: TargetSpec, num_tokens: int, random: np.random.Generator) -> Arrays:
    """Targets with all that is possible: entries in any order, ties, drops of nothing and of more
    than 40 nats, impossible entries, tails and labels, the first and the last id, repeated draws.
    """
    # entries
    ids = np.array([ids_in(spec, random) for _ in range(num_tokens)], np.int32)
    drops = np.abs(random.normal(0, 1, ids.shape)) * random.choice([0, 0.01, 5, 30], (len(ids), 1))
    rounded = random.random((len(ids), 1)) < 0.3
    drops = np.where(rounded, drops.round(), drops)
    drops[random.random(ids.shape) < random.choice([0.0, 0.5], (len(ids), 1))] = math.inf
    drops[:, :1] = 0.0
    logprobs = (random.choice([0.0, -1e-6, -0.3, -9.0], (len(ids), 1)) - drops).astype(np.float32)
    order = random.permuted(np.tile(np.arange(spec.k), (len(ids), 1)), axis=1)
    logprobs = np.take_along_axis(logprobs, order, 1)
    whole = spec.k == spec.vocab_size
    tails = [-math.inf] if whole else [-math.inf, 0.0, 5e-4, -1e-9, -0.7, -0.6, -4.4, -30.0, -1e6]

    # draws, one log-probability for each id
    draws = random.integers(spec.vocab_size, size=(len(ids), spec.num_draws), dtype=np.int32)
    draws[random.random(draws.shape) < 0.2] = spec.vocab_size - 1
    draws.sort(axis=1)
    least = logprobs.min(axis=1, initial=0.0, where=np.isfinite(logprobs))[:, None]
    below = random.choice([0.0, 0.01, 3.0], (len(ids), 1)) * (draws % 23)
    weights = np.where(draws % 7 == 6, -math.inf, least - below)
    labels, entropies = [-math.inf, 0.0, 1e-4, -2.3, -1e5], [0.0, -0.0, 1.7, 65504.0, 1e-7]
    return {
        "token_ids_TK": ids,
        "logprobs_TK": logprobs,
        "tail_logmass_T": random.choice(tails, len(ids)).astype(np.float32),
        "tail_ids_TN": draws,
        "draw_logprobs_TN": weights.astype(np.float32),
        "label_logprob_T": random.choice(labels, len(ids)).astype(np.float32),
        "tail_entropy_T": random.choice(entropies, len(ids)).astype(np.float32),
    }


def ids_in(spec: TargetSpec, random: np.random.Generator) -> np.ndarray:
    """Distinct ids, among them often the last one."""
    bounds = np.arange(spec.k + 1) * spec.vocab_size // max(1, spec.k)
    ids = random.integers(bounds[:-1], bounds[1:])
    if spec.k and random.random() < 0.5:
        ids[-1] = spec.vocab_size - 1
    return random.permutation(ids)


NONSENSE: dict[str, list[float]] = {
    "token_ids_TK": [-1, 0, 5, 100, 2**31 - 1, -(2**31)],
    "logprobs_TK": [math.nan, math.inf, -math.inf],
    "tail_logmass_T": [math.nan, math.inf, 0.5, -1.0],
    "tail_ids_TN": [-1, 0, 8, 100, 2**31 - 1],
    "draw_logprobs_TN": [math.nan, 0.5, -0.123],
    "label_logprob_T": [math.nan, math.inf, 0.5],
    "tail_entropy_T": [math.nan, -1e-9, 65505.0, math.inf],
}


def target_of(arrays: Arrays, spec: TargetSpec) -> CompressedLogits:
    held = {
        "draw_logprobs_TN": spec.weighted,
        "label_logprob_T": spec.label_logprob,
        "tail_entropy_T": spec.tail_entropy,
    }
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array) for name, array in arrays.items() if held.get(name, True)
    }
    return CompressedLogits(**tensors, vocab_size=spec.vocab_size, temperature=spec.temperature)


def by_rows(wanted: Any, rows: list[Any], spec: TargetSpec) -> list[Any]:
    """What NumPy's codec makes of each row alone, None where it refuses."""

    def of(row: Any) -> Any:
        try:
            return wanted(row, spec)
        except ChunkError:
            return None

    return [of(row) for row in rows]


def assert_rows_are_numpys(c: CompressedLogits, spec: TargetSpec) -> None:
    """Bytes, and what is refused."""
    records_TB, wrong_T = codec_triton.launch_encode(c, spec)
    rows = [c.map(itemgetter(slice(row, row + 1))) for row in range(c.num_tokens)]
    for row, wanted in enumerate(by_rows(codec_numpy.encode, rows, spec)):
        assert bool(wrong_T[row]) == (wanted is None), row
        if wanted is not None:
            assert torch.equal(records_TB[row], wanted[0]), row


def assert_records_are_numpys(records_TB: torch.Tensor, spec: TargetSpec) -> None:
    """Targets, and what is refused."""
    found, wrong_T = codec_triton.launch_decode(records_TB, spec)
    rows = list(records_TB.split(1))
    for row, wanted in enumerate(by_rows(codec_numpy.decode, rows, spec)):
        assert bool(wrong_T[row]) == (wanted is None), row
        if wanted is not None:
            assert_same(found.map(itemgetter(slice(row, row + 1))), wanted)


def assert_same(found: CompressedLogits, wanted: CompressedLogits) -> None:
    """Bit for bit, but for numbers that come from exponentials: to a bit of float32."""
    assert found.tensors.keys() == wanted.tensors.keys()
    assert (found.vocab_size, found.temperature) == (wanted.vocab_size, wanted.temperature)
    for name, theirs in wanted.tensors.items():
        ours = found.tensors[name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        if name in ("logprobs_TK", "draw_logprobs_TN"):
            bit = 2 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(ours, theirs, rtol=bit, atol=1e-14)
        else:
            assert torch.equal(ours, theirs), name


def assert_all_is_numpys(spec: TargetSpec, num_tokens: int, seed: int) -> None:
    """Targets, and their records, some of them damaged."""
    random = np.random.default_rng(seed)
    c = target_of(arrays_of(spec, num_tokens, random), spec)
    assert_rows_are_numpys(c, spec)
    records = codec_numpy.encode(c, spec).numpy()
    damaged = records[: num_tokens // 2].copy()
    for record in damaged:
        record[random.integers(len(record))] ^= random.integers(1, 256)
    assert_records_are_numpys(torch.from_numpy(np.concatenate([records, damaged])), spec)


# NumPy, which interprets, says of numbers that will be refused what a GPU does not
of_nonsense = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@of_nonsense
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_records_targets_and_refusals_are_the_processors(spec: TargetSpec) -> None:
    assert_all_is_numpys(spec, num_rows(spec), seed=spec.bytes_per_token)


@st.composite
def small_specs(draw: st.DrawFn) -> TargetSpec:
    vocab_size = draw(st.integers(1, 70))
    k = draw(st.integers(0, min(vocab_size, 8)))
    num_draws = draw(st.integers(0 if k else 1, 16)) if k < vocab_size else 0
    return TargetSpec(
        vocab_size,
        k,
        num_draws=num_draws if k else max(1, num_draws),
        value_bits=draw(st.sampled_from([6, 8])),
        temperature=draw(st.sampled_from([1.0, 2.5])),
        weighted=num_draws > 0 and draw(st.booleans()),
        label_logprob=draw(st.booleans()),
        tail_entropy=k < vocab_size and draw(st.booleans()),
    )


@of_nonsense
@given(spec=small_specs(), seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_targets_of_any_small_form_are_the_processors(spec: TargetSpec, seed: int) -> None:
    assert_all_is_numpys(spec, 6, seed)


EVERYTHING = TargetSpec(
    100, 3, num_draws=3, value_bits=6, weighted=True, label_logprob=True, tail_entropy=True
)


def one_of_everything() -> Arrays:
    """Entries and draws that differ in one bit, the last id, and a draw that is repeated."""
    return arrays_of(EVERYTHING, 1, np.random.default_rng(1)) | {
        "token_ids_TK": np.array([[5, 99, 4]], np.int32),
        "logprobs_TK": np.array([[-2.0, -0.3, -7.0]], np.float32),
        "tail_ids_TN": np.array([[7, 7, 99]], np.int32),
        "draw_logprobs_TN": np.array([[-9.0, -9.0, -11.0]], np.float32),
    }


@of_nonsense
def test_a_record_with_any_bit_flipped_is_refused_or_read_as_by_the_processor() -> None:
    record = codec_numpy.encode(target_of(one_of_everything(), EVERYTHING), EVERYTHING).numpy()[0]
    flips = np.packbits(np.eye(8 * len(record), dtype=np.uint8), axis=1)
    assert_records_are_numpys(torch.from_numpy(record ^ flips), EVERYTHING)


@of_nonsense
def test_a_target_with_any_number_wrong_is_refused_or_written_as_by_the_processor() -> None:
    arrays, wrong = one_of_everything(), []
    for name, values in NONSENSE.items():
        for place in np.ndindex(arrays[name].shape):
            for value in values:
                changed = {other: array.copy() for other, array in arrays.items()}
                changed[name][place] = value
                wrong.append(changed)
    every = {name: np.concatenate([each[name] for each in wrong]) for name in arrays}
    assert_rows_are_numpys(target_of(every, EVERYTHING), EVERYTHING)


def spoilt_at(row: int, spec: TargetSpec) -> CompressedLogits:
    """Targets of which one has an entry twice."""
    arrays = arrays_of(spec, 6, np.random.default_rng(0))
    arrays["token_ids_TK"][row, 1] = arrays["token_ids_TK"][row, 0]
    return target_of(arrays, spec)


def test_the_row_that_is_refused_and_the_rule_are_named() -> None:
    spec = TargetSpec(100, 3, num_draws=2)
    complaint = "the record of row 4 has ids out of order, or one of them twice"
    with pytest.raises(ChunkError, match=complaint):
        codec_triton.encode(spoilt_at(4, spec), spec)
    records = codec_triton.encode(
        target_of(arrays_of(spec, 6, np.random.default_rng(0)), spec), spec
    )
    records[5, 0:2] = 255
    with pytest.raises(ChunkError, match="row 5 has a range outside"):
        codec_triton.decode(records, spec)


def test_no_tokens_have_no_records() -> None:
    spec = TargetSpec(100, 3, num_draws=2, label_logprob=True)
    c = target_of(arrays_of(spec, 1, np.random.default_rng(0)), spec).map(itemgetter(slice(0)))
    records = codec_triton.encode(c, spec)
    assert records.shape == (0, spec.bytes_per_token)
    assert_same(codec_triton.decode(records, spec), c)


def test_rows_that_are_strided_in_memory_are_the_same_rows() -> None:
    spec = TargetSpec(100, 3, num_draws=2)
    c = target_of(arrays_of(spec, 6, np.random.default_rng(0)), spec)
    records = codec_numpy.encode(c, spec)
    strided = c.map(lambda tensor: tensor.repeat_interleave(2, dim=0)[::2])
    assert torch.equal(codec_triton.encode(strided, spec), records)
    assert_same(
        codec_triton.decode(records.T.contiguous().T, spec), codec_numpy.decode(records, spec)
    )


class Launches(TorchDispatchMode):
    """What torch does beside the kernels; the interpreter makes and copies tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operation.overloadpacket.__name__
        if name not in ("empty", "new_empty", "set_", "copy_"):
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def test_the_device_is_waited_for_once_and_torch_launches_one_thing() -> None:
    spec = TargetSpec(5, 2, num_draws=3, weighted=True, label_logprob=True, tail_entropy=True)
    c = target_of(arrays_of(spec, 4, np.random.default_rng(0)), spec)
    with Launches() as encoding:
        records = codec_triton.encode(c, spec)
    with Launches() as decoding:
        codec_triton.decode(records, spec)
    assert encoding.names == decoding.names == ["any", "_local_scalar_dense"]


# Whether the kernels are taken
# ------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
TRIED = TargetSpec(50, 2, num_draws=3)


@pytest.mark.parametrize(
    "spec",
    [
        TRIED,
        TargetSpec(5, 5, value_bits=6),
        TargetSpec(2**31 - 1, 0, num_draws=2, weighted=True, label_logprob=True, tail_entropy=True),
    ],
    ids=str,
)
def test_the_self_test_passes_here_for_records_of_any_form(spec: TargetSpec) -> None:
    assert codec_triton.self_test_failure(CPU, spec) is None


def test_kernels_that_write_or_read_wrongly_or_refuse_what_is_right_are_refused() -> None:
    def other_bytes(c: CompressedLogits, spec: TargetSpec) -> tuple[torch.Tensor, torch.Tensor]:
        records, wrong = codec_triton.launch_encode(c, spec)
        return records ^ 1, wrong

    def other_values(
        records: torch.Tensor, spec: TargetSpec
    ) -> tuple[CompressedLogits, torch.Tensor]:
        target, wrong = codec_triton.launch_decode(records, spec)
        return replace(target, logprobs_TK=target.logprobs_TK * 1.001), wrong

    def refusing(records: torch.Tensor, spec: TargetSpec) -> tuple[CompressedLogits, torch.Tensor]:
        target, wrong = codec_triton.launch_decode(records, spec)
        return target, ~wrong

    changes: list[dict[str, Any]] = [
        {"write": other_bytes},
        {"read": other_values},
        {"read": refusing},
    ]
    for change in changes:
        failure = codec_triton.self_test_failure(CPU, TRIED, **change)
        assert "answers wrongly on cpu" in str(failure)


class FailingOnce:
    """A launch that fails at its first call, and is right from then on."""

    def __init__(self, failure: Exception) -> None:
        self.failure, self.num_calls = failure, 0

    def __call__(self, c: CompressedLogits, spec: TargetSpec) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_calls += 1
        if self.num_calls == 1:
            raise self.failure
        return codec_triton.launch_encode(c, spec)


def test_a_failure_that_may_pass_is_told_and_the_next_call_tries_again() -> None:
    write = FailingOnce(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        codec_triton.self_test_failure(CPU, TRIED, write=write)
    assert codec_triton.self_test_failure(CPU, TRIED, write=write) is None
    assert write.num_calls == 2


def test_a_failure_that_lasts_is_a_reason_which_is_remembered() -> None:
    write = FailingOnce(FileNotFoundError(errno.ENOENT, "no such file", "gcc"))
    reasons = [codec_triton.self_test_failure(CPU, TRIED, write=write) for _ in range(2)]
    assert reasons[0] == reasons[1]
    assert "fails on cpu: FileNotFoundError: " in str(reasons[0])
    assert write.num_calls == 1


@pytest.mark.parametrize(
    ("spec", "device", "name", "reason"),
    [
        (TRIED, "cpu", "numpy", "the targets are on the CPU"),
        (TRIED, "meta", "torch", "there are no kernels for meta"),
        (
            TargetSpec(151_936, 513, num_draws=2),
            "cuda",
            "torch",
            "a target has 513 entries and 2 draws, and the kernels are for 512 of each at most",
        ),
        (
            TargetSpec(151_936, 0, num_draws=600),
            "cuda",
            "torch",
            "a target has 0 entries and 600 draws, and the kernels are for 512 of each at most",
        ),
    ],
)
def test_where_the_kernels_are_not_taken_the_reason_is_told(
    spec: TargetSpec, device: str, name: str, reason: str
) -> None:
    assert codec.backend_for(spec, torch.device(device)) == (name, reason)


# Compiled
# ------------------------------------------------------------------------------------------------


def compiled_for(name: str, spec: TargetSpec) -> Kernel:
    """A kernel as `codec_triton` launches it."""
    constants = codec_triton.options_for(spec)
    num_warps, fusion = constants.pop("num_warps"), constants.pop("enable_fp_fusion")
    floats = ("logprobs", "log_tails", "draw_logprobs", "labels", "entropies")
    types = dict.fromkeys(floats, "*fp32:16") | {
        "records": "*u8:16",
        "wrongs": "*i1:16",
        "ids": "*i32:16",
        "draws": "*i32:16",
        "num_records": "i32",
        "num_bytes": "i32",
    }
    module = "stillhouse.logits.codec_kernels_triton"
    return Kernel(module, name, types, constants, num_warps, fusion)


def test_kernels_compile_within_a_gpus_registers_and_round_each_number_that_decides_a_byte(
    tmp_path: Path,
) -> None:
    """Those of the default target with all that a record may hold beside it."""
    spec = TargetSpec(
        151_669, 8, num_draws=40, weighted=True, label_logprob=True, tail_entropy=True
    )
    kernels = [compiled_for(name, spec) for name in ("encode", "decode")]
    encode, decode = machine_code(kernels, cache=tmp_path)
    assert (encode.num_spills, decode.num_spills) == (0, 0)
    assert max(encode.registers, decode.registers) <= 128
    assert encode.inexact == ()
