"""The block-max filter in C, compiled when it is first wanted: one read of the logits, on one core
or several.

Shapes: T tokens, V vocabulary, K kept entries, M blocks of a row.

`blockmax.c` is plain C without headers of torch's, so that the machine's own compiler has it ready
in a third of a second, for the very instructions of its processor; nothing is kept on disk that
could be stale, or meant for another machine. Where there is no compiler, or its work is wrong, the
reason is a value, and the caller takes another path.
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
    """`split_rows` of `blockmax.c`, or None, and the compiler that made it, or why there is
    none."""

    split_rows: Callable[..., int] | None
    why: str


@cache
def compiled() -> Compiled:
    """This process's own, made by the first compiler on its path."""
    found = (path for path in map(shutil.which, _COMPILERS) if path)
    return compile_with(next(found, None))


def compile_with(compiler: str | None) -> Compiled:
    """What this compiler makes of `blockmax.c`. Raises nothing: a compiler that is missing, fails
    or errs is a reason."""
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
            complaint = (
                failure.stderr.decode(errors="replace").strip()
                or f"exit status {failure.returncode}"
            )
            return Compiled(
                None, f"{compiler} does not compile {_SOURCE.name}: {complaint.splitlines()[0]}"
            )
        except (OSError, AttributeError, subprocess.TimeoutExpired) as failure:
            return Compiled(None, f"{compiler} makes nothing that can be loaded: {failure}")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    split_rows.argtypes = [
        pointer,
        ctypes.c_int32,
        count,
        count,
        count,
        count,
        ctypes.c_double,
        pointer,
        pointer,
        pointer,
        pointer,
    ]
    if not _is_right(split_rows):
        return Compiled(None, f"{compiler} makes a {_SOURCE.name} that answers wrongly")
    return Compiled(split_rows, f"compiled by {compiler}")


def split(
    split_rows: Callable[..., int], logits_TV: Tensor, *, k: int, temperature: float
) -> RawTopK:
    """The top-k of CPU logits in any floating dtype and strides, by as many threads as torch has. V
    is at least 1.

    Rows of float32 or bfloat16 are read where they lie; others are converted, or made contiguous,
    some at a time.
    """
    num_tokens, vocab_size = logits_TV.shape
    ids_TK = torch.empty((num_tokens, k), dtype=torch.int32)
    values_TK, rest_base_T = torch.empty((num_tokens, k)), torch.empty(num_tokens)
    rest_sums_TM = torch.empty((num_tokens, -(-vocab_size // _BLOCK_IDS)))

    def fill(start: int, stop: int) -> None:
        rows_TV = logits_TV[start:stop]
        rows_TV = (rows_TV if rows_TV.dtype in _READ_AS_THEY_ARE else rows_TV.float()).detach()
        rows_TV = rows_TV if rows_TV.stride(1) == 1 or vocab_size == 1 else rows_TV.contiguous()
        outputs = (out[start:].data_ptr() for out in (ids_TK, values_TK, rest_base_T, rest_sums_TM))
        is_bfloat16, stride = rows_TV.dtype == torch.bfloat16, rows_TV.stride(0)
        if (
            split_rows(
                rows_TV.data_ptr(),
                is_bfloat16,
                stride,
                stop - start,
                vocab_size,
                k,
                temperature,
                *outputs,
            )
            != 0
        ):
            raise MemoryError(f"no memory for the top-k of {vocab_size} logits")

    in_place = logits_TV.dtype in _READ_AS_THEY_ARE and logits_TV.stride(1) == 1
    num_threads = max(
        1, min(torch.get_num_threads(), num_tokens, logits_TV.numel() // _LOGITS_PER_THREAD)
    )
    rows_at_once = (
        -(-num_tokens // num_threads) if in_place else max(1, _LOGITS_PER_CONVERSION // vocab_size)
    )
    bounds = list(pairwise([*range(0, num_tokens, max(1, rows_at_once)), num_tokens]))
    if num_threads == 1:
        for start, stop in bounds:
            fill(start, stop)
    else:
        with ThreadPoolExecutor(num_threads) as pool:  # C runs without the interpreter's lock
            list(pool.map(fill, *zip(*bounds, strict=True)))
    return RawTopK(ids_TK, values_TK, rest_base_T, rest_sums_TM, _BLOCK_IDS)


def _is_right(split_rows: Callable[..., int]) -> bool:
    """Whether a few rows of distinct numbers get what a sort and a log-sum-exp say."""
    logits_TV = torch.randn(
        3, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).float()
    values_TV, ids_TV = logits_TV.sort(dim=1, descending=True)
    raw = split(split_rows, logits_TV, k=5, temperature=2.0)
    rest_T = raw.rest_base_T / 2 + raw.rest_sums_TM.sum(dim=1).log()
    return (
        torch.equal(raw.token_ids_TK.long(), ids_TV[:, :5])
        and torch.equal(raw.logits_TK, values_TV[:, :5])
        and torch.allclose(rest_T, (values_TV[:, 5:] / 2).logsumexp(dim=1), atol=1e-5)
    )
