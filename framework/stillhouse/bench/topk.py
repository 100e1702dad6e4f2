"""`stillhouse bench topk`: from logits to (ids, log-probabilities, log-sum-exp), every path of ours beside what one would write without it.

Logits are normal, scaled by 4: some tens of ids above the rest, as language models have them. Fresh ones in every round.

Shapes: T tokens, V vocabulary, K kept entries.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from stillhouse.bench.contest import Way, contest, contest_table
from stillhouse.bench.provenance import Provenance
from stillhouse.logits import blockmax, compress, native, path_for, token_seeds
from stillhouse.logits.rawtopk import RawTopK, normalise

EAGER = "torch: topk and logsumexp"
_NUM_ROUNDS = 7
_SCALE = 4.0
_NUM_DRAWS = 12


def bench_topk(*, device: str, vocab_size: int, k: int, num_tokens: int, dtype: torch.dtype, command: str, out: Path | None) -> None:
    """Measure, print the table, and write all that was measured to `out`. On the CPU, one thread."""
    torch.set_num_threads(1)
    provenance = Provenance.of(command)
    where = torch.device(device)

    def fresh(number: int) -> Tensor:
        random = torch.Generator(where).manual_seed(number + 1)
        return (_SCALE * torch.randn(num_tokens, vocab_size, generator=random, device=where)).to(dtype)

    path = path_for(fresh(0)[:1], k=k)
    found = contest(_ways(where, vocab_size=vocab_size, k=k, num_tokens=num_tokens), fresh, device=where, num_rounds=_NUM_ROUNDS)
    if out is not None:
        shape = {"device": device, "vocab_size": vocab_size, "k": k, "num_tokens": num_tokens, "dtype": str(dtype)}
        values = {"benchmark": "topk", "provenance": asdict(provenance), "shape": shape, "path": asdict(path)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(values | {"ways": [asdict(one) for one in found]}, indent=2) + "\n")
    console = Console(highlight=False)
    title = f"{num_tokens} x {vocab_size:,} logits, {str(dtype).removeprefix('torch.')}, k = {k}, {device}"
    console.print(contest_table(title, found, num_tokens=num_tokens, baseline=EAGER))
    console.print(f"compress takes the path '{path.name}': {path.why}")


def _ways(device: torch.device, *, vocab_size: int, k: int, num_tokens: int) -> list[Way[Tensor]]:
    compiled = torch.compile(torch.logsumexp)
    seeds_T = token_seeds(0, torch.zeros(num_tokens), torch.arange(num_tokens))
    compiled_pass = torch.compile(_pass)
    ways: list[Way[Tensor]] = [
        Way(EAGER, lambda logits_TV: (logits_TV.topk(k, dim=1), logits_TV.float().logsumexp(dim=1))),
        Way("torch: topk and compiled logsumexp", lambda logits_TV: (logits_TV.topk(k, dim=1), compiled(logits_TV.float(), dim=1))),
        Way("compress", lambda logits_TV: compress(logits_TV, k=k)),
        Way(f"compress, with {_NUM_DRAWS} draws", lambda logits_TV: compress(logits_TV, k=k, tail_draws=_NUM_DRAWS, seeds_T=seeds_T)),
        Way("our filter in torch", _normalised(lambda logits_TV: blockmax.split(logits_TV, k=k, temperature=1.0), vocab_size)),
    ]
    ways.append(Way("the filter's pass alone, by torch.compile", compiled_pass))
    split_rows = native.compiled().split_rows
    if device.type == "cpu" and split_rows is not None:
        in_c = _normalised(lambda logits_TV: native.split(split_rows, logits_TV, k=k, temperature=1.0), vocab_size)
        ways.append(Way("our filter in C", in_c))
    if device.type == "cuda" and find_spec("triton"):
        from stillhouse.logits import kernels

        ways.append(Way("our filter in Triton", _normalised(lambda z: kernels.launch(z, k=k, temperature=1.0)[0], vocab_size)))
    if device.type == "cuda" and find_spec("flashinfer"):
        import flashinfer

        ways.append(Way("FlashInfer top_k, torch logsumexp", lambda z: (flashinfer.top_k(z, k), z.float().logsumexp(dim=1))))
    return ways


def _pass(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Block maxima and sums of exponentials: all of the filter that reads every logit."""
    whole_TMB = logits_TV[:, : logits_TV.shape[1] // blockmax.BLOCK_IDS * blockmax.BLOCK_IDS].float().unflatten(1, (-1, blockmax.BLOCK_IDS))
    maxima_TM = whole_TMB.amax(dim=2)
    return maxima_TM, (whole_TMB - maxima_TM[:, :, None]).exp().sum(dim=2)


def _normalised(split: Callable[[Tensor], RawTopK], vocab_size: int) -> Callable[[Tensor], object]:
    return lambda logits_TV: normalise(split(logits_TV), vocab_size=vocab_size, temperature=1.0)
