"""Block-max filter in C: an exact top-k that reads each logit once, and targets of it, on one CPU
core or several.

Shapes: T tokens, V vocabulary, K kept entries, N draws, M blocks of a row.

`blockmax.c` and `targets.c` are compiled at their first use in a process. They are plain C without
torch's headers, so the machine's own compiler needs about a second, and compiles for its very
processor. Nothing is kept on disk that could be stale, or of another machine. Without a compiler,
or with a wrong result of one, the reason is a value, and the caller takes another backend.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk.draws import or_lowest
from stillhouse.logits.topk.found import RawTopK
from stillhouse.logits.topk.reference import compress_reference

_SOURCES = [Path(__file__).with_name(name) for name in ("blockmax.c", "targets.c")]
_OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_TIMEOUT_S = 60
_BLOCK_IDS = 128  # as `blockmax.c` has it
_READ_AS_THEY_ARE = (torch.float32, torch.bfloat16)
_LOGITS_PER_THREAD = 1 << 18  # about 0.2 ms of work: less is not worth a thread
_LOGITS_PER_CONVERSION = 1 << 20


@dataclass(frozen=True, slots=True)
class Compiled:
    """`split_rows` of `blockmax.c`, `make_targets` of `targets.c` and the compiler's name, or None
    twice and the reason."""

    split_rows: Callable[..., int] | None
    make_targets: Callable[..., int] | None
    reason: str


@cache
def compiled() -> Compiled:
    """Compiled by the first compiler on the path; once a process."""
    found = (path for path in map(shutil.which, _COMPILERS) if path)
    return compile_with(next(found, None))


def compile_with(compiler: str | None) -> Compiled:
    """`blockmax.c` by this compiler, loaded and tried.

    Raises nothing: a compiler that is missing, fails or compiles it wrongly is a reason.
    """
    # compile and load
    if compiler is None:
        return _without(f"there is no C compiler ({', '.join(_COMPILERS)}) on the path")
    with TemporaryDirectory(prefix="stillhouse-") as directory:
        library = Path(directory) / "blockmax.so"
        try:
            subprocess.run(
                [compiler, *_OPTIONS, *map(str, _SOURCES), "-lm", "-o", str(library)],
                check=True,
                capture_output=True,
                timeout=_COMPILE_TIMEOUT_S,
            )
            loaded = ctypes.CDLL(str(library))
            split_rows, make_targets = loaded.split_rows, loaded.make_targets
        except subprocess.CalledProcessError as failure:
            found = failure.stderr.decode(errors="replace").strip()
            found = found or f"exit status {failure.returncode}"
            return _without(
                f"{compiler} does not compile {_SOURCES[0].name}: {found.splitlines()[0]}"
            )
        except (OSError, AttributeError, subprocess.TimeoutExpired) as failure:
            return _without(f"{compiler} makes nothing that can be loaded: {failure}")

    # declare and try
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    rows: list[Any] = [pointer, ctypes.c_int32, *(4 * [count]), ctypes.c_double]
    split_rows.argtypes = [*rows, *(4 * [pointer])]
    make_targets.argtypes = [*rows, count, *(10 * [pointer])]
    if not _is_right(split_rows, make_targets):
        return _without(f"{compiler} makes a {_SOURCES[0].name} that answers wrongly")
    return Compiled(split_rows, make_targets, f"compiled by {compiler}")


def _without(reason: str) -> Compiled:
    return Compiled(None, None, reason)


def split(
    split_rows: Callable[..., int], logits_TV: Tensor, *, k: int, temperature: float
) -> RawTopK:
    """The top-k of CPU logits in any floating dtype and strides, by torch's number of threads.

    V is at least 1. Contiguous rows of float32 or bfloat16 are read in place; others are converted
    or copied, some at a time. Raises MemoryError.
    """
    num_tokens, vocab_size = logits_TV.shape
    ids_TK = torch.empty((num_tokens, k), dtype=torch.int32)
    values_TK, rest_base_T = torch.empty((num_tokens, k)), torch.empty(num_tokens)
    rest_sums_TM = torch.empty((num_tokens, -(-vocab_size // _BLOCK_IDS)))

    def fill(rows: slice, *row_arguments: int) -> int:
        outputs = (out[rows].data_ptr() for out in (ids_TK, values_TK, rest_base_T, rest_sums_TM))
        return split_rows(*row_arguments, k, temperature, *outputs)

    _for_rows(logits_TV, fill)
    return RawTopK(ids_TK, values_TK, rest_base_T, rest_sums_TM, _BLOCK_IDS)


def suits(spec: TargetSpec) -> bool:
    """Whether `targets` makes targets of this spec: its draws are from few of a row's blocks."""
    return 2 * spec.num_draws * _BLOCK_IDS <= spec.vocab_size


def targets(
    make_targets: Callable[..., int],
    logits_TV: Tensor,
    *,
    spec: TargetSpec,
    seeds_T: Tensor,
    labels_T: Tensor,
) -> tuple[CompressedLogits, Tensor]:
    """What `normalise` makes of a `split`, with the draws of `draw_rest`, all that the spec asks
    for besides, and the log-sum-exp, for a spec that `suits`.

    Logits as for `split`; seeds_T and labels_T: int64 [T]. Raises MemoryError.
    """
    # everything by row
    num_tokens, num_draws = len(logits_TV), spec.num_draws
    made = CompressedLogits(
        torch.empty((num_tokens, spec.k), dtype=torch.int32),
        torch.empty((num_tokens, spec.k)),
        torch.empty(num_tokens),
        torch.empty((num_tokens, num_draws), dtype=torch.int32),
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
        draw_logprobs_TN=torch.empty((num_tokens, num_draws)) if spec.weighted else None,
        label_logprob_T=torch.empty(num_tokens) if spec.label_logprob else None,
        tail_entropy_T=torch.empty(num_tokens) if spec.tail_entropy else None,
    )
    lse_T = torch.empty(num_tokens)
    given_and_made = (
        seeds_T.contiguous(),
        labels_T.contiguous(),
        made.token_ids_TK,
        made.logprobs_TK,
        made.tail_logmass_T,
        lse_T,
        made.tail_ids_TN,
        made.draw_logprobs_TN,
        made.label_logprob_T,
        made.tail_entropy_T,
    )

    def fill(rows: slice, *row_arguments: int) -> int:
        pointers = (
            None if tensor is None else tensor[rows].data_ptr() for tensor in given_and_made
        )
        return make_targets(*row_arguments, spec.k, spec.temperature, num_draws, *pointers)

    _for_rows(logits_TV, fill)

    # draws where there is no mass
    if num_draws and bool((made.tail_logmass_T == -torch.inf).any()):
        draws_TN = or_lowest(made.tail_ids_TN, made.token_ids_TK, vocab_size=spec.vocab_size)
        made = replace(made, tail_ids_TN=draws_TN)
    return made, lse_T


def _for_rows(logits_TV: Tensor, fill: Callable[..., int]) -> None:
    """Call `fill(rows, ...)` for stretches of rows, with the arguments of C that say where the
    logits of these rows are: address, whether they are bfloat16, stride, number of rows, V."""
    num_tokens, vocab_size = logits_TV.shape

    def fill_stretch(start: int, stop: int) -> None:
        rows_TV = logits_TV[start:stop]
        rows_TV = (rows_TV if rows_TV.dtype in _READ_AS_THEY_ARE else rows_TV.float()).detach()
        rows_TV = rows_TV if rows_TV.stride(1) == 1 or vocab_size == 1 else rows_TV.contiguous()
        place = (rows_TV.data_ptr(), rows_TV.dtype == torch.bfloat16, rows_TV.stride(0))
        if fill(slice(start, stop), *place, stop - start, vocab_size) != 0:
            raise MemoryError(f"no memory for the top-k of {vocab_size} logits")

    # stretches of rows: one for each thread, or as many as are converted at a time
    in_place = logits_TV.dtype in _READ_AS_THEY_ARE and logits_TV.stride(1) == 1
    enough = min(torch.get_num_threads(), num_tokens, logits_TV.numel() // _LOGITS_PER_THREAD)
    num_threads = max(1, enough)
    rows_at_once = _LOGITS_PER_CONVERSION // vocab_size
    if in_place:
        rows_at_once = -(-num_tokens // num_threads)
    bounds = list(pairwise([*range(0, num_tokens, max(1, rows_at_once)), num_tokens]))
    if num_threads == 1:
        for start, stop in bounds:
            fill_stretch(start, stop)
    else:
        with ThreadPoolExecutor(num_threads) as pool:  # C runs without the interpreter's lock
            list(pool.map(fill_stretch, *zip(*bounds, strict=True)))


def _is_right(split_rows: Callable[..., int], make_targets: Callable[..., int]) -> bool:
    """Whether a few rows of distinct numbers have the result of a sort and a log-sum-exp, and the
    targets of the reference."""
    # the top-k, in float64
    random = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(3, 300, generator=random, dtype=torch.float64).float()
    values_TV, ids_TV = logits_TV.sort(dim=1, descending=True)
    raw = split(split_rows, logits_TV, k=5, temperature=2.0)
    rest_T = raw.rest_base_T / 2 + raw.rest_sums_TM.sum(dim=1).log()
    is_right = (
        torch.equal(raw.token_ids_TK.long(), ids_TV[:, :5])
        and torch.equal(raw.logits_TK, values_TV[:, :5])
        and torch.allclose(rest_T, (values_TV[:, 5:] / 2).logsumexp(dim=1), atol=1e-5)
    )

    # targets with and without all that one may hold
    blind = TargetSpec(300, 5, num_draws=1, temperature=2.0)
    whole = replace(blind, weighted=True, label_logprob=True, tail_entropy=True)
    seeds_T, labels_T = torch.arange(3), torch.tensor([1, 77, 299])
    for spec in (blind, whole):
        labels = {"labels_T": labels_T} if spec.label_logprob else {}
        wanted = compress_reference(logits_TV, spec, seeds_T=seeds_T, **labels)
        found, lse_T = targets(
            make_targets, logits_TV, spec=spec, seeds_T=seeds_T, labels_T=labels_T
        )
        is_right &= torch.allclose(lse_T, (logits_TV / 2).logsumexp(dim=1), atol=1e-5)
        is_right &= all(
            torch.allclose(value, wanted.tensors[name], rtol=0, atol=1e-5)
            for name, value in found.tensors.items()
        )
    return is_right
