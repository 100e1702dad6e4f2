"""`TargetSpec`: what a target holds, checked once, and the record sizes that follow from it.

K kept entries, N draws from the tail, V vocabulary.
"""

import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from stillhouse.errors import ConfigError

HEADER_BYTES = 4
HALF_BYTES = 2  # of a binary16 number
_MOST_COUNT = 2**31 - 1  # ids are stored in 32 bits


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What is kept of a teacher's distribution after one token: K exact entries, N draws.

    Raises ConfigError, naming every fault, for values that no target can have. A spec that exists
    is therefore valid, and nothing that takes one checks it again.

        spec = TargetSpec(vocab_size=151_669, k=8, num_draws=40)
        spec.bytes_per_token  # 99
    """

    vocab_size: int  # the tokenizer's highest id + 1; padded columns of a head are not counted
    k: int  # entries kept with their log-probabilities
    _: KW_ONLY
    num_draws: int = 0  # ids drawn from the tail
    value_bits: int = 8  # bits of a stored log-probability, 6 or 8
    temperature: float = 1.0  # targets are of softmax(logits / temperature)
    weighted: bool = False  # each draw has its log-probability, so that any divergence can use it
    label_logprob: bool = False  # the log-probability of the token that really follows
    tail_entropy: bool = False  # the entropy within the tail, which takes the constant off a loss

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def codec_name(self) -> str:
        """The name in recipes and chunks: Elias-Fano ids, square-root companded values."""
        return f"ef-sqrt{self.value_bits}"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one record."""
        return sum(self.section_bytes)

    @property
    def section_bytes(self) -> tuple[int, int, int, int, int, int, int]:
        """Bytes of a record's header, ids, values, draws, draws' values, label and tail entropy."""
        ids, draws = (sum(elias_fano_bytes(m, self.vocab_size)) for m in (self.k, self.num_draws))
        return (
            HEADER_BYTES if self.k else 0,
            ids,
            -(-self.k * self.value_bits // 8),
            draws,
            self.num_draws if self.weighted else 0,
            HALF_BYTES if self.label_logprob else 0,
            HALF_BYTES if self.tail_entropy else 0,
        )

    @property
    def max_code(self) -> int:
        """The largest code of a stored log-probability; the smallest is 0."""
        return (1 << self.value_bits) - 1


def low_bits(m: int, vocab_size: int) -> int:
    """The number of low bits that Elias-Fano form writes verbatim for each of m ids, m > 0."""
    return max(0, (vocab_size // m).bit_length() - 1)


def elias_fano_bytes(m: int, vocab_size: int) -> tuple[int, int]:
    """Bytes of the low and of the high bits of m ids in Elias-Fano form."""
    if m == 0:
        return 0, 0
    low = low_bits(m, vocab_size)
    return -(-m * low // 8), -(-(m + ((vocab_size - 1) >> low) + 1) // 8)


def _problems(spec: TargetSpec) -> Iterator[str]:
    vocab_size, k, num_draws = spec.vocab_size, spec.k, spec.num_draws
    if not 0 < vocab_size <= _MOST_COUNT:
        yield f"vocab_size is {vocab_size}; set it between 1 and {_MOST_COUNT}"
    elif not 0 <= k <= vocab_size:
        yield (
            f"k is {k}, but the vocabulary has {vocab_size} ids; set k between 0 and {vocab_size}"
        )
    elif k == vocab_size and num_draws > 0:
        yield (
            f"{num_draws} draws are asked for, but k is {k}, the whole vocabulary, and there is no "
            "tail to draw from; draw none, or lower k"
        )
    elif k == num_draws == 0:
        yield "no entries and no draws: nothing of the teacher is kept; keep or draw at least one"
    if not 0 <= num_draws <= _MOST_COUNT:
        yield f"{num_draws} draws are asked for; set a number between 0 and {_MOST_COUNT}"
    if spec.weighted and spec.num_draws == 0:
        yield "weighted draws are asked for, but no draws; draw some, or set weighted to False"
    if spec.tail_entropy and k == vocab_size:
        yield (
            f"the tail's entropy is asked for, but k is {k}, the whole vocabulary, and there is no "
            "tail; lower k, or leave it out"
        )
    if spec.value_bits not in (6, 8):
        yield f"value_bits is {spec.value_bits}, wanted 6 or 8"
    if not 0.0 < spec.temperature <= sys.float_info.max:
        yield f"temperature is {spec.temperature}; set a finite number above 0"
