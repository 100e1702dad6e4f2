"""`stillhouse bench codec`: what a target takes in bytes, what they lose, and how fast it is packed
and unpacked.

Two kinds of logits: power laws of six exponents from flat to sharp (see `synthetic`), and a
trained model's on held-out text, its vocabulary enlarged.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from stillhouse.bench.cost import Work, require_device, time_in_turn
from stillhouse.bench.figures import Spread
from stillhouse.bench.output import figures_table, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.synthetic import power_law_logits, seeds_of
from stillhouse.bench.trained import DEMO_TEACHER, enlarged, trained_logits
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec, compress, concatenate, decode, encode, fidelity

EXPONENTS = (0.6, 1.0, 1.5, 2.0, 3.0, 4.0)
_DRAWN = ((8, 40), (12, 12), (0, 50))  # entries and draws; first the default target
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
        size = self.vocab_size
        exact = [TargetSpec(size, k, value_bits=bits) for bits in (8, 6) for k in self.ks]
        drawn = [TargetSpec(size, k, num_draws=num) for k, num in _DRAWN if k + num < size]
        return exact + drawn


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """One spec on the tokens of one kind. KL is over the kept entries and the tail, in nats."""

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
    """Measure, print a table for each kind of logits, and write all that was measured to `out`.

    Raises ConfigError where the setting cannot be measured, or `teacher_dir` holds no model.
    Without `teacher_dir` the demo's teacher is used; where there is none, the trained model's
    logits are left out.
    """
    # the logits of each kind
    setting.check()
    torch.set_num_threads(1)
    provenance = Provenance.of(command)
    num_each = max(1, setting.num_tokens // len(EXPONENTS))
    laws = [power_law_logits(num_each, setting.vocab_size, exponent=each) for each in EXPONENTS]
    logits_of = {"power laws": torch.cat(laws)}
    if teacher_dir is None and DEMO_TEACHER.exists():
        teacher_dir = DEMO_TEACHER
    if teacher_dir is not None:
        trained_TV = trained_logits(teacher_dir, num_tokens=setting.num_tokens, cache_dir=cache_dir)
        kind = f"a trained model's, its {trained_TV.shape[1]:,} ids enlarged"
        logits_of[kind] = enlarged(trained_TV, setting.vocab_size)

    # each spec on each kind
    figures = {
        kind: [measure(logits_TV.to(setting.device), spec, repeats) for spec in setting.specs]
        for kind, logits_TV in logits_of.items()
    }
    write_record(
        out,
        "codec",
        provenance,
        setting=asdict(setting),
        exponents=EXPONENTS,
        rows={kind: [asdict(one) for one in of_kind] for kind, of_kind in figures.items()},
    )

    # the same in words
    console = terminal()
    for kind, of_kind in figures.items():
        console.print(table(f"{kind}, {setting.vocab_size:,} ids, {setting.device}", of_kind))
    console.print(f"Load average at the start: {provenance.load_average}.")
    console.print(f"While it was timed, {figures['power laws'][0].allocator}.")
    if teacher_dir is None:
        console.print(
            f"Left out: a trained model's rows; there is none in {DEMO_TEACHER}, which "
            "`stillhouse demo` makes, nor with --teacher."
        )


def measure(logits_TV: Tensor, spec: TargetSpec, repeats: int) -> CodecFigures:
    """Fidelity on these tokens, and speed on many copies of them, on their device."""
    # fidelity
    exact = compress(logits_TV, spec, seeds_T=seeds_of(len(logits_TV)))
    found = fidelity(exact, decode(encode(exact, spec), spec))

    # speed
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
    headings = "k", "draws", "bits", "bytes", "kept", "mean KL", "worst KL"
    speeds = "encode,\nM/s", "decode,\nM/s"
    found = figures_table(f"A target in bytes: {kind}", [*headings, *speeds])
    for one in figures:
        sizes = map(str, (one.k, one.num_draws, one.value_bits, one.bytes_per_token))
        losses = f"{one.kept_mass:.3f}", f"{one.mean_kl:.1e}", f"{one.worst_kl:.1e}"
        both = one.encode_tokens_per_s, one.decode_tokens_per_s
        found.add_row(*sizes, *losses, *(f"{speed.median / 1e6:.2f}" for speed in both))
    return found
