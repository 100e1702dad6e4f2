"""The door for sources of sequences: what one has to do. A prepared corpus is the one to read as an
example.

A source is a plan of blocks: block c, scored by a teacher, is chunk c. So a block has to be the
same whoever asks for it, and whenever.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stillhouse.config import CorpusSection
from stillhouse.errors import ConfigError
from stillhouse.extension import load_extension
from stillhouse.sequence import Sequences, joined
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import prepare_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Identity(NamedTuple):
    """What decides every block of a source."""

    kind: str  # "corpus", or a word of a source's own
    digest: str  # another plan of blocks, another digest


class SequenceSource(Protocol):
    """Blocks of sequences of one length, by number. It travels to no other process."""

    @property
    def identity(self) -> Identity: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_sequences(self) -> int:
        """Of all blocks; every block but the last has the same number of them."""
        ...

    @property
    def num_targets(self) -> int:
        """Ones of all loss masks."""
        ...

    @property
    def sequence_length(self) -> int: ...

    def block(self, number: int) -> Sequences:
        """Block 0 <= number < num_blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Sources:
    """Two sources that share no document."""

    train: SequenceSource
    heldout: SequenceSource


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """The sequences of a prepared corpus, `block_sequences` to a block."""

    corpus: Corpus
    block_sequences: int

    @property
    def identity(self) -> Identity:
        return Identity("corpus", self.corpus.digest)

    @property
    def num_blocks(self) -> int:
        return -(-self.corpus.num_sequences // self.block_sequences)

    @property
    def num_sequences(self) -> int:
        return self.corpus.num_sequences

    @property
    def num_targets(self) -> int:
        return self.corpus.num_targets

    @property
    def sequence_length(self) -> int:
        return self.corpus.sequence_length

    def block(self, number: int) -> Sequences:
        start = number * self.block_sequences
        return self.corpus.rows(start, min(start + self.block_sequences, self.corpus.num_sequences))


def open_sources(
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tokenizer_digest: str,
    block_sequences: int,
    cache_dir: Path,
    on_progress: Callable[[int, int], None],
) -> Sources:
    """The sources that a config names. One of the user's own is a function (section, tokenizer, *,
    block_sequences, cache_dir) -> Sources.

    Raises CorpusError, and ConfigError where one of the user's own cannot be imported, or gives
    something else.
    """
    if section.source != "corpus":
        own: Callable[..., Sources] = load_extension(section.source, setting="corpus.source")
        found = own(section, tokenizer, block_sequences=block_sequences, cache_dir=cache_dir)
        if not isinstance(found, Sources):
            raise ConfigError(
                f'corpus.source is "{section.source}", which gives a {type(found).__name__}; '
                f"wanted {Sources.__module__}.Sources"
            )
        for source in (found.train, found.heldout):
            if source.sequence_length != section.sequence_length:
                raise ConfigError(
                    f'corpus.source is "{section.source}", whose sequences have '
                    f"{source.sequence_length} tokens; wanted"
                    f" corpus.sequence_length, which is {section.sequence_length}"
                )
        return found
    split = prepare_corpus(
        section,
        tokenizer,
        tokenizer_digest=tokenizer_digest,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )
    return Sources(
        CorpusSource(split.train, block_sequences), CorpusSource(split.heldout, block_sequences)
    )


def whole(source: SequenceSource) -> Sequences:
    """All of its sequences, in this process's memory."""
    return joined([source.block(number) for number in range(source.num_blocks)])
