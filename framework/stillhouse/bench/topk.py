"""`stillhouse bench topk`: from logits to (ids, log-probabilities, log-sum-exp), every backend of
ours beside plain torch.

Logits are normal, scaled by 4: some tens of ids above the rest, as language models have them.

Shapes: T tokens, V vocabulary, U of it in whole blocks, M blocks of B ids, K kept entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from stillhouse.bench.cost import Timings, Work, extra_bytes, require_device, time_in_turn
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.synthetic import seeds_of
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec, backend_for, compress
from stillhouse.logits.topk import blockmax_cpu, blockmax_torch
from stillhouse.logits.topk.found import RawTopK, normalise

EAGER, COMPILED = "torch: topk, logsumexp", "torch: topk, compiled logsumexp"
IN_TORCH, IN_TRITON = "the filter in torch", "the filter in Triton"
OURS, DEFAULT_TARGET = "stillhouse", "stillhouse: 8 entries, 40 draws"
WEIGHTED_TARGET = "stillhouse: 8 entries, 25 weighted draws"
WHOLE_TARGET = "stillhouse: 8 + 25, label and entropy"
_ENTRIES = 8
_SCALE = 4.0


@dataclass(frozen=True, slots=True)
class Setting:
    """How many logits, of which kind and where, and how many of them are kept."""

    num_tokens: int
    vocab_size: int
    k: int
    dtype: str
    device: str

    @property
    def title(self) -> str:
        shape = f"{self.num_tokens:,} x {self.vocab_size:,}"
        return f"{shape} logits, k = {self.k}, {self.dtype}, {self.device}"

    def check(self) -> None:
        """Raises ConfigError where this cannot be measured here."""
        if self.k >= self.vocab_size:
            raise ConfigError(
                f"--k is {self.k}, but --vocab is {self.vocab_size}; keep fewer entries than "
                "there are"
            )
        require_device(self.device)

    def logits(self, seed: int) -> Tensor:
        """[T, V] logits, others for each seed."""
        random = torch.Generator(self.device).manual_seed(seed)
        shape = self.num_tokens, self.vocab_size
        logits_TV = _SCALE * torch.randn(shape, generator=random, device=self.device)
        return logits_TV.to(getattr(torch, self.dtype))


def bench_topk(
    setting: Setting, *, repeats: int, with_compile: bool, command: str, out: Path | None
) -> None:
    """Measure, print the table, and write all that was measured to `out`. Raises ConfigError where
    the setting cannot be measured."""
    setting.check()
    torch.set_num_threads(1)
    provenance, device = Provenance.of(command), torch.device(setting.device)
    # speed and memory of every way
    backend = backend_for(setting.logits(0)[:1], k=setting.k)
    works_of = partial(works_of_ways, setting, with_compile=with_compile)
    timings = time_in_turn(works_of, repeats=repeats, device=device)
    memory = extra_bytes(work_of, setting, list(timings.seconds), device=device)

    # in a file, and in words
    write_record(
        out,
        "topk",
        provenance,
        setting=asdict(setting),
        allocator=timings.allocator,
        path={"name": backend.name, "why": backend.reason},
        seconds={way: asdict(timings.of(way)) for way in timings.seconds},
        times_eager={way: asdict(timings.ratio(EAGER, way)) for way in timings.seconds},
        extra_bytes=memory,
    )
    console = terminal()
    console.print(table(setting, timings, memory))
    console.print(
        f"compress takes the path {backend.name}: {backend.reason}. Load average at the start: "
        f"{provenance.load_average}."
    )
    console.print(f"While it was timed, {timings.allocator}.")


def table(setting: Setting, timings: Timings, memory: dict[str, int]) -> Table:
    """Medians (least to most)."""
    title = f"From logits to the greatest and their log-sum-exp\n{setting.title}"
    found = figures_table(title, ["", "µs a token", "times eager\ntorch's speed", "extra MB"])
    for way in timings.seconds:
        times = shown(timings.of(way), ".1f", unit=1e-6 * setting.num_tokens)
        speed = shown(timings.ratio(EAGER, way), ".2f")
        found.add_row(way, times, speed, f"{memory[way] / 1e6:,.0f}")
    return found


def work_of(setting: Setting, way: str) -> Work:
    """One way on logits of its own; can be pickled for another process."""
    return works_of_ways(setting, 0, with_compile=True)[way]


def works_of_ways(setting: Setting, repeat: int, *, with_compile: bool) -> dict[str, Work]:
    """Every way on the logits of this repeat."""
    logits_TV, k = setting.logits(repeat), setting.k

    def in_raw(split: Callable[[Tensor], RawTopK]) -> Sequence[Tensor]:
        target, lse_T = normalise(split(logits_TV), vocab_size=setting.vocab_size, temperature=1.0)
        return [target.token_ids_TK, target.logprobs_TK, lse_T]

    # on any device
    works: dict[str, Work] = {
        EAGER: lambda: [*logits_TV.topk(k, dim=1), logits_TV.float().logsumexp(dim=1)],
        OURS: partial(_tensors, logits_TV, TargetSpec(setting.vocab_size, k)),
        IN_TORCH: lambda: in_raw(partial(blockmax_torch.split, k=k, temperature=1.0)),
    }
    for way, spec in _targets(setting.vocab_size).items():
        works[way] = partial(_tensors, logits_TV, spec)
    if with_compile:
        works[COMPILED] = lambda: [
            *logits_TV.topk(k, dim=1),
            _compiled_logsumexp()(logits_TV.float(), dim=1),
        ]
        works["torch.compile: the filter's pass alone"] = lambda: _compiled_pass()(logits_TV)

    # on one kind of device, where the package or compiler is there
    split_rows = blockmax_cpu.compiled().split_rows
    if setting.device == "cpu" and split_rows is not None:
        works["the filter in C"] = lambda: in_raw(
            partial(blockmax_cpu.split, split_rows, k=k, temperature=1.0)
        )
    if setting.device == "cuda" and find_spec("triton"):
        from stillhouse.logits.topk import blockmax_triton

        if k <= blockmax_triton.MOST_ENTRIES:
            works[IN_TRITON] = lambda: in_raw(
                lambda logits_TV: blockmax_triton.launch(logits_TV, k=k, temperature=1.0)[0]
            )
    if setting.device == "cuda" and find_spec("flashinfer"):
        import flashinfer

        works["FlashInfer top_k, torch's logsumexp"] = lambda: [
            *flashinfer.top_k(logits_TV, k),
            logits_TV.float().logsumexp(dim=1),
        ]
    return works


def _targets(vocab_size: int) -> dict[str, TargetSpec]:
    """The targets that are timed beside the top-k alone; none where all ids would be kept."""
    if vocab_size <= _ENTRIES:
        return {}
    weighted = TargetSpec(vocab_size, _ENTRIES, num_draws=25, weighted=True)
    return {
        DEFAULT_TARGET: TargetSpec(vocab_size, _ENTRIES, num_draws=40),
        WEIGHTED_TARGET: weighted,
        WHOLE_TARGET: replace(weighted, label_logprob=True, tail_entropy=True),
    }


def _tensors(logits_TV: Tensor, spec: TargetSpec) -> Sequence[Tensor]:
    num_tokens = len(logits_TV)
    labels_T = torch.arange(num_tokens) % spec.vocab_size if spec.label_logprob else None
    target = compress(logits_TV, spec, seeds_T=seeds_of(num_tokens), labels_T=labels_T)
    return list(target.tensors.values())


def _pass(logits_TV: Tensor) -> Sequence[Tensor]:
    """Block maxima and sums of exponentials: all of the filter that reads every logit."""
    num_blocks, block_ids = logits_TV.shape[1] // blockmax_torch.BLOCK_IDS, blockmax_torch.BLOCK_IDS
    whole_TU = logits_TV[:, : num_blocks * block_ids].float()
    blocks_TMB = whole_TU.unflatten(1, (num_blocks, block_ids))
    maxima_TM = blocks_TMB.amax(dim=2)
    return [maxima_TM, (blocks_TMB - maxima_TM[:, :, None]).exp().sum(dim=2)]


@cache
def _compiled_pass() -> Callable[[Tensor], Sequence[Tensor]]:
    return torch.compile(_pass, dynamic=False)


@cache
def _compiled_logsumexp() -> Callable[..., Tensor]:
    return torch.compile(torch.logsumexp, dynamic=False)
