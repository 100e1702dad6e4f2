"""`stillhouse bench codec`: what a target costs in bytes, in fidelity and in time on one thread, at a vocabulary of today's models.

The logits are synthetic: -a log(rank) plus N(0, 1), each token's ranks in an order of their own, for six exponents a from flat to sharp.

Shapes: T tokens, V vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import torch
from rich.console import Console
from rich.table import Table

from stillhouse.bench.figures import Spread
from stillhouse.bench.provenance import Provenance
from stillhouse.logits import Codec, compress, concatenate, decode, encode, fidelity

VOCAB_SIZE = 151_936
EXPONENTS = (0.6, 1.0, 1.5, 2.0, 3.0, 4.0)
_TOKENS_PER_EXPONENT = 32
_COPIES = 50  # of these tokens, so that encoding and decoding take long enough to be timed
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """One codec on tokens of all exponents alike."""

    k: int
    value_bits: int
    bytes_per_token: int
    kept_mass: float  # mean over tokens
    mean_kl: float  # nats lost to the codec, mean over tokens
    worst_kl: float  # of one token
    encode_tokens_per_s: Spread  # of one thread's processor time
    decode_tokens_per_s: Spread


def bench_codec(*, command: str, out: Path | None) -> None:
    """Measure, print the table, and write all that was measured to `out`."""
    torch.set_num_threads(1)
    provenance = Provenance.of(command)
    logits_TV = torch.cat([power_law_logits(_TOKENS_PER_EXPONENT, VOCAB_SIZE, exponent=exponent) for exponent in EXPONENTS])
    figures = [measure(logits_TV, Codec(VOCAB_SIZE, k, value_bits=bits)) for bits in (8, 6) for k in (32, 64, 128)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        values = {"benchmark": "codec", "provenance": asdict(provenance), "vocab_size": VOCAB_SIZE, "exponents": EXPONENTS}
        out.write_text(json.dumps(values | {"codecs": [asdict(found) for found in figures]}, indent=2) + "\n")
    Console(highlight=False).print(table(figures))


def power_law_logits(num_tokens: int, vocab_size: int, *, exponent: float) -> torch.Tensor:
    """[T, V] logits with a language model's long tail, the same for the same arguments."""
    generator = torch.Generator().manual_seed(round(10 * exponent))
    ranked_TV = -exponent * torch.arange(1, vocab_size + 1).log() + torch.randn(num_tokens, vocab_size, generator=generator)
    return torch.stack([row_V[torch.randperm(vocab_size, generator=generator)] for row_V in ranked_TV])


def measure(logits_TV: torch.Tensor, codec: Codec) -> CodecFigures:
    """Fidelity on these tokens, and speed on many copies of them."""
    exact = compress(logits_TV, k=codec.k)
    found = fidelity(exact, decode(encode(exact, codec), codec))
    many = concatenate([exact] * _COPIES)
    records_TB = encode(many, codec)
    return CodecFigures(
        k=codec.k,
        value_bits=codec.value_bits,
        bytes_per_token=codec.bytes_per_token,
        kept_mass=found.kept_mass,
        mean_kl=found.codec_kl,
        worst_kl=found.worst_kl,
        encode_tokens_per_s=_speed(lambda: encode(many, codec), many.num_tokens),
        decode_tokens_per_s=_speed(lambda: decode(records_TB, codec), many.num_tokens),
    )


def table(figures: list[CodecFigures]) -> Table:
    """Speeds in millions of tokens a second, median (least to most)."""
    found = Table(title=f"A target in bytes, at a vocabulary of {VOCAB_SIZE:,}")
    for heading in ("k", "bits", "bytes", "mean KL", "worst KL", "encode, M tokens/s", "decode, M tokens/s"):
        found.add_column(heading, justify="right")
    for one in figures:
        speeds = [
            f"{spread.median / 1e6:.2f} ({spread.least / 1e6:.2f} to {spread.most / 1e6:.2f})"
            for spread in (one.encode_tokens_per_s, one.decode_tokens_per_s)
        ]
        found.add_row(str(one.k), str(one.value_bits), str(one.bytes_per_token), f"{one.mean_kl:.1e}", f"{one.worst_kl:.1e}", *speeds)
    return found


def _speed(work: Callable[[], object], num_tokens: int) -> Spread:
    def seconds() -> float:
        began = process_time()
        work()
        return process_time() - began

    return Spread.of([num_tokens / seconds() for _ in range(_REPEATS)])
