"""Block-max filter in C: an exact top-k that reads each logit once, on one CPU core or several.

Shapes: T tokens, V vocabulary, K kept entries, M blocks of a row.

`blockmax.c` is compiled at its first use in a process. It is plain C without torch's headers, so
the machine's own compiler needs a third of a second, and compiles for its very processor. Nothing
is kept on disk that could be stale, or of another machine. Without a compiler, or with a wrong
result of one, the reason is a value, and the caller takes another backend.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from stillhouse.logits.topk.found import RawTopK

_SOURCE = Path(__file__).with_name("blockmax.c")
_OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_TIMEOUT_S = 60
_BLOCK_IDS = 128  # as `blockmax.c` has it
_READ_AS_THEY_ARE = (torch.float32, torch.bfloat16)
_LOGITS_PER_THREAD = 1 << 18  # about 0.2 ms of work: less is not worth a thread
_LOGITS_PER_CONVERSION = 1 << 20


@dataclass(frozen=True, slots=True)
class Compiled:
    """`split_rows` of `blockmax.c` and the compiler's name, or None and the reason."""

    split_rows: Callable[..., int] | None
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
        return Compiled(None, f"there is no C compiler ({', '.join(_COMPILERS)}) on the path")
    with TemporaryDirectory(prefix="stillhouse-") as directory:
        library = Path(directory) / "blockmax.so"
        try:
            subprocess.run(
                [compiler, *_OPTIONS, str(_SOURCE), "-o", str(library)],
                check=True,
                capture_output=True,
                timeout=_COMPILE_TIMEOUT_S,
            )
            split_rows = ctypes.CDLL(str(library)).split_rows
        except subprocess.CalledProcessError as failure:
            found = failure.stderr.decode(errors="replace").strip()
            found = found or f"exit status {failure.returncode}"
            return Compiled(
                None, f"{compiler} does not compile {_SOURCE.name}: {found.splitlines()[0]}"
            )
        except (OSError, AttributeError, subprocess.TimeoutExpired) as failure:
            return Compiled(None, f"{compiler} makes nothing that can be loaded: {failure}")

    # declare and try
    pointer, counts = ctypes.c_void_p, 4 * [ctypes.c_int64]
    split_rows.argtypes = [pointer, ctypes.c_int32, *counts, ctypes.c_double, *(4 * [pointer])]
    if not _is_right(split_rows):
        return Compiled(None, f"{compiler} makes a {_SOURCE.name} that answers wrongly")
    return Compiled(split_rows, f"compiled by {compiler}")


def split(
    split_rows: Callable[..., int], logits_TV: Tensor, *, k: int, temperature: float
) -> RawTopK:
    """The top-k of CPU logits in any floating dtype and strides, by torch's number of threads.

    V is at least 1. Contiguous rows of float32 or bfloat16 are read in place; others are converted
    or copied, some at a time. Raises MemoryError.
    """
    # outputs
    num_tokens, vocab_size = logits_TV.shape
    ids_TK = torch.empty((num_tokens, k), dtype=torch.int32)
    values_TK, rest_base_T = torch.empty((num_tokens, k)), torch.empty(num_tokens)
    rest_sums_TM = torch.empty((num_tokens, -(-vocab_size // _BLOCK_IDS)))

    def fill(start: int, stop: int) -> None:
        rows_TV = logits_TV[start:stop]
        rows_TV = (rows_TV if rows_TV.dtype in _READ_AS_THEY_ARE else rows_TV.float()).detach()
        rows_TV = rows_TV if rows_TV.stride(1) == 1 or vocab_size == 1 else rows_TV.contiguous()
        outputs = (out[start:].data_ptr() for out in (ids_TK, values_TK, rest_base_T, rest_sums_TM))
        rows = (rows_TV.data_ptr(), rows_TV.dtype == torch.bfloat16, rows_TV.stride(0))
        if split_rows(*rows, stop - start, vocab_size, k, temperature, *outputs) != 0:
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
            fill(start, stop)
    else:
        with ThreadPoolExecutor(num_threads) as pool:  # C runs without the interpreter's lock
            list(pool.map(fill, *zip(*bounds, strict=True)))
    return RawTopK(ids_TK, values_TK, rest_base_T, rest_sums_TM, _BLOCK_IDS)


def _is_right(split_rows: Callable[..., int]) -> bool:
    """Whether a few rows of distinct numbers have the result of a sort and a log-sum-exp."""
    random = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(3, 300, generator=random, dtype=torch.float64).float()
    values_TV, ids_TV = logits_TV.sort(dim=1, descending=True)
    raw = split(split_rows, logits_TV, k=5, temperature=2.0)
    rest_T = raw.rest_base_T / 2 + raw.rest_sums_TM.sum(dim=1).log()
    return (
        torch.equal(raw.token_ids_TK.long(), ids_TV[:, :5])
        and torch.equal(raw.logits_TK, values_TV[:, :5])
        and torch.allclose(rest_T, (values_TV[:, 5:] / 2).logsumexp(dim=1), atol=1e-5)
    )
