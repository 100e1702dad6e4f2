"""`stillhouse bench codec`: what a target takes in bytes, what they lose, and how fast it is packed
and unpacked.

Two kinds of rows: power laws, -a log(rank) plus N(0, 1) with each token's ranks in an order of
their own, for six exponents a from flat to sharp; and what a trained model says to held-out text,
its vocabulary enlarged.

Shapes: T tokens, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stillhouse.bench.cost import Work, require_device, time_in_turn
from stillhouse.bench.figures import Spread
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.trained import DEMO_TEACHER, enlarged, trained_logits
from stillhouse.errors import ConfigError
from stillhouse.logits import (
    TargetSpec,
    compress,
    concatenate,
    decode,
    encode,
    fidelity,
    token_seeds,
)

EXPONENTS = (0.6, 1.0, 1.5, 2.0, 3.0, 4.0)
_DRAWN = ((12, 12), (0, 50))  # entries and draws
_COPIES = 50  # of the tokens, so that packing and unpacking take long enough to be timed


@dataclass(frozen=True, slots=True)
class Setting:
    """How many tokens of each kind, and what is kept of them."""

    num_tokens: int
    vocab_size: int
    ks: Sequence[int]
    device: str

    def check(self) -> None:
        """Raises ConfigError where this cannot be measured here."""
        if max(self.ks) > self.vocab_size:
            raise ConfigError(
                f"--k is {max(self.ks)}, above --vocab, which is {self.vocab_size}; keep no more "
                "entries than there are"
            )
        require_device(self.device)

    @property
    def specs(self) -> list[TargetSpec]:
        drawn = [
            TargetSpec(self.vocab_size, k, num_draws=num_draws)
            for k, num_draws in _DRAWN
            if k + num_draws < self.vocab_size
        ]
        return [
            TargetSpec(self.vocab_size, k, value_bits=bits) for bits in (8, 6) for k in self.ks
        ] + drawn


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """One codec on the tokens of one kind. KL is over the kept entries and the tail, in nats."""

    k: int
    num_draws: int
    value_bits: int
    bytes_per_token: int
    kept_mass: float  # mean over tokens
    mean_kl: float  # lost to the codec, mean over tokens
    worst_kl: float  # of one token
    encode_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    allocator: str  # what malloc did with freed memory meanwhile


def bench_codec(
    setting: Setting,
    teacher_dir: Path | None,
    *,
    repeats: int,
    cache_dir: Path,
    command: str,
    out: Path | None,
) -> None:
    """Measure, print a table for each kind of rows, and write all that was measured to `out`.

    Raises ConfigError where the setting cannot be measured, or `teacher_dir` holds no model.
    Without one, and without the demo's, the trained rows are left out.
    """
    setting.check()
    torch.set_num_threads(1)
    provenance = Provenance.of(command)
    rows = {"power laws": _power_laws(setting)}
    if teacher_dir is None and DEMO_TEACHER.exists():
        teacher_dir = DEMO_TEACHER
    if teacher_dir is not None:
        trained_TV = trained_logits(teacher_dir, num_tokens=setting.num_tokens, cache_dir=cache_dir)
        rows[f"a trained model's, its {trained_TV.shape[1]:,} ids enlarged"] = enlarged(
            trained_TV, setting.vocab_size
        )
    found = {
        kind: [
            measure(logits_TV.to(setting.device), spec, repeats=repeats) for spec in setting.specs
        ]
        for kind, logits_TV in rows.items()
    }
    if out is not None:
        values = {
            "benchmark": "codec",
            "provenance": asdict(provenance),
            "setting": asdict(setting),
            "exponents": EXPONENTS,
        }
        figures = {kind: [asdict(one) for one in of_kind] for kind, of_kind in found.items()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(values | {"rows": figures}, indent=2) + "\n")
    console = Console(highlight=False, soft_wrap=True)
    for kind, figures_of_kind in found.items():
        console.print(
            table(f"{kind}, {setting.vocab_size:,} ids, {setting.device}", figures_of_kind)
        )
    console.print(f"Load average at the start: {provenance.load_average}.")
    console.print(f"While it was timed, {found['power laws'][0].allocator}.")
    if teacher_dir is None:
        console.print(
            f"Left out: a trained model's rows; there is none in {DEMO_TEACHER}, which "
            "`stillhouse demo` makes, nor with --teacher."
        )


def power_law_logits(num_tokens: int, vocab_size: int, *, exponent: float) -> Tensor:
    """[T, V] logits with a language model's long tail, the same for the same arguments."""
    generator = torch.Generator().manual_seed(round(10 * exponent))
    ranked_TV = -exponent * torch.arange(1, vocab_size + 1).log() + torch.randn(
        num_tokens, vocab_size, generator=generator
    )
    return torch.stack(
        [row_V[torch.randperm(vocab_size, generator=generator)] for row_V in ranked_TV]
    )


def _power_laws(setting: Setting) -> Tensor:
    num_each = max(1, setting.num_tokens // len(EXPONENTS))
    return torch.cat(
        [
            power_law_logits(num_each, setting.vocab_size, exponent=exponent)
            for exponent in EXPONENTS
        ]
    )


def measure(logits_TV: Tensor, spec: TargetSpec, *, repeats: int) -> CodecFigures:
    """Fidelity on these tokens, and speed on many copies of them, on their device."""
    seeds_T = token_seeds(0, torch.zeros(len(logits_TV)), torch.arange(len(logits_TV)))
    exact = compress(logits_TV, spec, seeds_T=seeds_T)
    found = fidelity(exact, decode(encode(exact, spec), spec))
    many = concatenate([exact] * _COPIES)
    records_TB = encode(many, spec)

    def works(_: int) -> Mapping[str, Work]:
        return {
            "encode": lambda: [encode(many, spec)],
            "decode": lambda: [decode(records_TB, spec).token_ids_TK],
        }

    timings = time_in_turn(works, repeats=repeats, device=logits_TV.device)
    encode_speed, decode_speed = (
        Spread.of(many.num_tokens / seconds for seconds in timings.seconds[way])
        for way in ("encode", "decode")
    )
    return CodecFigures(
        k=spec.k,
        num_draws=spec.num_draws,
        value_bits=spec.value_bits,
        bytes_per_token=spec.bytes_per_token,
        kept_mass=found.kept_mass,
        mean_kl=found.codec_kl,
        worst_kl=found.worst_kl,
        encode_tokens_per_s=encode_speed,
        decode_tokens_per_s=decode_speed,
        allocator=timings.allocator,
    )


def table(kind: str, figures: Sequence[CodecFigures]) -> Table:
    """Kept mass, and speeds in millions of tokens a second; medians."""
    found = Table(title=f"A target in bytes: {kind}", box=box.SIMPLE)
    for heading in (
        "k",
        "draws",
        "bits",
        "bytes",
        "kept",
        "mean KL",
        "worst KL",
        "encode,\nM/s",
        "decode,\nM/s",
    ):
        found.add_column(heading, justify="right")
    for one in figures:
        sizes = (
            str(one.k),
            str(one.num_draws),
            str(one.value_bits),
            str(one.bytes_per_token),
            f"{one.kept_mass:.3f}",
        )
        speeds = [
            f"{spread.median / 1e6:.2f}"
            for spread in (one.encode_tokens_per_s, one.decode_tokens_per_s)
        ]
        found.add_row(*sizes, f"{one.mean_kl:.1e}", f"{one.worst_kl:.1e}", *speeds)
    return found
