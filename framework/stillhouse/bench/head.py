"""`stillhouse bench head`: from a teacher's last hidden states to packed records, beside the bare
matrix product and eager torch.

The product alone is a lower bound: every way computes it. Eager torch is the usual first version:
all the logits in float32, their log-sum-exp, and torch.topk; it packs nothing.

Shapes: T tokens, V vocabulary, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from stillhouse.bench.cost import Timings, Work, extra_bytes, time_in_turn
from stillhouse.bench.figures import Spread
from stillhouse.bench.loss import Setting
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.logits import Head, TargetSpec, compress_hidden, encode

PRODUCT, OURS, EAGER = "matrix product", "stillhouse, packed", "eager torch, not packed"


@dataclass(frozen=True, slots=True)
class Inputs:
    """A teacher's last hidden states and head, and the spec of its targets."""

    hidden_TH: Tensor
    head: Head
    spec: TargetSpec

    @classmethod
    def of(cls, setting: Setting, seed: int) -> "Inputs":
        dtype, device = getattr(torch, setting.dtype), setting.torch_device
        random = torch.Generator(device).manual_seed(seed)
        randn = partial(torch.randn, generator=random, device=device)
        hidden_TH = randn(setting.num_tokens, setting.hidden_size)
        weight_VH = randn(setting.vocab_size, setting.hidden_size)
        weight_VH *= 3.0 / setting.hidden_size**0.5
        return cls(
            hidden_TH.to(dtype),
            Head(weight_VH.to(dtype)),
            TargetSpec(setting.vocab_size, setting.k),
        )


def bench_head(setting: Setting, *, repeats: int, command: str, out: Path | None) -> None:
    """Measure, print the table, and write all that was measured to `out`. Raises ConfigError where
    the setting cannot be measured."""
    setting.check()
    torch.set_num_threads(1)
    provenance = Provenance.of(command)
    # speed and memory of every way
    timings = time_in_turn(partial(_works, setting), repeats=repeats, device=setting.torch_device)
    memory = extra_bytes(work_of, setting, list(_WAYS), device=setting.torch_device)
    spec = TargetSpec(setting.vocab_size, setting.k)

    # in a file, and in words
    write_record(
        out,
        "head",
        provenance,
        setting=asdict(setting),
        allocator=timings.allocator,
        bytes_per_token=spec.bytes_per_token,
        tokens_per_s={way: asdict(tokens_per_s(setting, timings, way)) for way in _WAYS},
        seconds_over_product={way: asdict(timings.ratio(way, PRODUCT)) for way in _WAYS},
        extra_bytes=memory,
    )
    console = terminal()
    console.print(table(setting, timings, memory))
    console.print(
        f"A record takes {spec.bytes_per_token} bytes. Load average at the start: "
        f"{provenance.load_average}."
    )
    console.print(f"While it was timed, {timings.allocator}.")


def tokens_per_s(setting: Setting, timings: Timings, way: str) -> Spread:
    return Spread.of(setting.num_tokens / seconds for seconds in timings.seconds[way])


def table(setting: Setting, timings: Timings, memory: dict[str, int]) -> Table:
    """Medians (least to most)."""
    title = f"From hidden states to targets\n{setting.title}"
    found = figures_table(title, ["", "tokens/s", "over the\nproduct's", "extra MB"])
    for way in _WAYS:
        speed, share = tokens_per_s(setting, timings, way), timings.ratio(PRODUCT, way)
        found.add_row(way, shown(speed, ",.0f"), shown(share, ".2f"), f"{memory[way] / 1e6:,.0f}")
    return found


def product(inputs: Inputs) -> Sequence[Tensor]:
    return [inputs.hidden_TH @ inputs.head.weight_VH.T]


def ours(inputs: Inputs) -> Sequence[Tensor]:
    return [encode(compress_hidden(inputs.hidden_TH, inputs.head, spec=inputs.spec), inputs.spec)]


def eager(inputs: Inputs) -> Sequence[Tensor]:
    logits_TV = (inputs.hidden_TH @ inputs.head.weight_VH.T).float()
    kept = logits_TV.topk(inputs.spec.k, dim=1)
    return [kept.values - logits_TV.logsumexp(dim=1, keepdim=True), kept.indices]


_WAYS: dict[str, Callable[[Inputs], Sequence[Tensor]]] = {
    PRODUCT: product,
    OURS: ours,
    EAGER: eager,
}


def work_of(setting: Setting, way: str) -> Work:
    """One way on inputs of its own; can be pickled for another process."""
    return partial(_WAYS[way], Inputs.of(setting, 0))


def _works(setting: Setting, repeat: int) -> dict[str, Work]:
    inputs = Inputs.of(setting, repeat)
    return {way: partial(do, inputs) for way, do in _WAYS.items()}
