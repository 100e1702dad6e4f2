"""Two ways to write the same draws: a multiset in Elias-Fano form, as the codec does, or the
distinct ids and how often each was drawn.

Shapes: T tokens, N draws, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.bench.output import figures_table
from stillhouse.bench.synthetic import power_law_logits, seeds_of
from stillhouse.bench.trained import heldout_logits
from stillhouse.logits import TargetSpec, compress
from stillhouse.sequences.corpus import Corpus

_NUM_TOKENS, _NUM_SYNTHETIC = 128, 32
_NUM_DRAWS = 50
_REAL_VOCABULARY = 151_936
_EXPONENTS = (1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Coding:
    """Bytes of the draws alone, on the same rows: each id as often as drawn, or the distinct ids
    with counts."""

    rows: str
    num_draws: int
    mean_distinct: float
    multiset_bytes: int  # of every record
    mean_counted_bytes: float  # of records whose size varies
    worst_counted_bytes: int  # of records of one size: all draws distinct


def codings_of(teacher: PreTrainedModel, heldout: Corpus, vocab_size: int) -> list[Coding]:
    """The codings of draws from a trained teacher's distributions on held-out text, and from
    synthetic ones over a vocabulary as large as today's models have."""
    teacher_TV = heldout_logits(teacher, heldout, vocab_size=vocab_size, num_tokens=_NUM_TOKENS)
    logits_of = {f"the teacher's, {vocab_size:,} ids": teacher_TV}
    for exponent in _EXPONENTS:
        name = f"a power law of exponent {exponent}, {_REAL_VOCABULARY:,} ids"
        logits_of[name] = power_law_logits(_NUM_SYNTHETIC, _REAL_VOCABULARY, exponent=exponent)
    return [coding(name, logits_TV, num_draws=_NUM_DRAWS) for name, logits_TV in logits_of.items()]


def coding(rows: str, logits_TV: Tensor, *, num_draws: int) -> Coding:
    """What draws from these rows cost as a multiset in Elias-Fano form, and what their distinct ids
    would with counts.

    The second form is an Elias-Fano set, the number of its ids, and N - 1 bits that mark where one
    id's draws end and the next one's begin.
    """
    num_tokens, vocab_size = logits_TV.shape
    spec = TargetSpec(vocab_size, 0, num_draws=num_draws)
    draws_TN = compress(logits_TV, spec, seeds_T=seeds_of(num_tokens)).tail_ids_TN
    num_distinct_T = (draws_TN[:, 1:] != draws_TN[:, :-1]).sum(dim=1) + 1

    def counted(num_distinct: int) -> int:
        counts = -(-num_draws.bit_length() // 8) + -(-(num_draws - 1) // 8)
        return TargetSpec(vocab_size, 0, num_draws=num_distinct).bytes_per_token + counts

    counted_bytes = [counted(int(number)) for number in num_distinct_T]
    return Coding(
        rows=rows,
        num_draws=num_draws,
        mean_distinct=float(num_distinct_T.double().mean()),
        multiset_bytes=spec.bytes_per_token,
        mean_counted_bytes=sum(counted_bytes) / len(counted_bytes),
        worst_counted_bytes=counted(num_draws),
    )


def coding_table(codings: Sequence[Coding]) -> Table:
    """Draws in bytes: the multiset has one size; counts make it vary, or cost more where one size
    is wanted."""
    headings = "rows", "draws", "distinct", "multiset", "distinct +\ncounts, mean"
    found = figures_table("Draws alone in bytes", [*headings, "the same at\none size"])
    for one in codings:
        sizes = str(one.multiset_bytes), f"{one.mean_counted_bytes:.1f}"
        worst = str(one.worst_counted_bytes)
        found.add_row(one.rows, str(one.num_draws), f"{one.mean_distinct:.1f}", *sizes, worst)
    return found
