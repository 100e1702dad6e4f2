"""Sources of sequences: the protocol, and its implementation over a prepared corpus.

A source is a plan of numbered blocks of sequences. Block c, scored by a teacher, is chunk c of the
store. So a block is a function of the source's identity and the block's number alone: the same
tokens whenever and wherever it is made.

To write a source of your own, read `SequenceSource`, then `CorpusSource` as the example. A config
names it as `corpus.source = "package.module:function"`; `open_sources` has the function's contract.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stillhouse.config import CorpusSection
from stillhouse.errors import ConfigError
from stillhouse.extension import load_extension
from stillhouse.sequence import Sequences, WorkItem, joined
from stillhouse.sequences.account import Account
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.mixture import Mixture, end_to_end, mixed, shared_out
from stillhouse.sequences.packing import prepare_corpus
from stillhouse.sequences.pieces import LocatedBlock
from stillhouse.sequences.stored import StoredItem, Work
from stillhouse.store.rollout_store import RolloutsPlace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Identity(NamedTuple):
    """What decides every block of a source. It is part of the recipe, and so of the fingerprint."""

    kind: str  # "corpus", or a name that a source of your own chooses
    digest: str  # another one for every other plan of blocks


class SequenceSource(Protocol):
    """Numbered blocks of sequences, all of one length. It stays in the process that opened it."""

    @property
    def identity(self) -> Identity: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_sequences(self) -> int:
        """Sequences in all blocks. Every block but the last has the same number of them."""
        ...

    @property
    def num_targets(self) -> int:
        """Target tokens in all blocks: the ones of their loss masks."""
        ...

    @property
    def sequence_length(self) -> int:
        """Tokens in each sequence."""
        ...

    def block(self, number: int) -> Sequences:
        """The sequences of block 0 <= number < num_blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """A data set of a corpus: all of it, or a part of a mixture."""

    name: str
    account: Account
    num_sequences: int  # that are used to train on
    num_targets: int  # in them


@dataclass(frozen=True, slots=True)
class Sources:
    """What to train on, and what to evaluate on; they share no document."""

    train: SequenceSource
    heldout: SequenceSource
    parts: tuple[Part, ...] = field(default=(), kw_only=True)  # the data sets of a corpus


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """The sequences of a prepared corpus, or of a mixture of them, `block_sequences` in each block
    but the last."""

    corpus: Corpus | Mixture
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
        return self.corpus.rows(*self._extent(number))

    def located_block(self, number: int) -> LocatedBlock:
        """A block's sequences, by where they are in a store, if they are in one."""
        return self.corpus.located(*self._extent(number))

    def _extent(self, number: int) -> tuple[int, int]:
        start = number * self.block_sequences
        return start, min(start + self.block_sequences, self.corpus.num_sequences)


def read_from(source: SequenceSource) -> list[RolloutsPlace]:
    """Where who is sent an item of the source reads tokens."""
    return source.corpus.read_from if isinstance(source, CorpusSource) else []


def item_of(source: SequenceSource, number: int) -> Work:
    """A block as a teacher is sent it: sequences that are in a store by where they are there."""
    if isinstance(source, CorpusSource) and source.corpus.read_from:
        return StoredItem(number, source.located_block(number))
    return WorkItem(number, source.block(number))


def open_sources(
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tokenizer_digest: str,
    block_sequences: int,
    cache_dir: Path,
    on_progress: Callable[[int, int], None],
) -> Sources:
    """The sources that a config names.

    A source of your own is a function `(section, tokenizer, *, block_sequences, cache_dir) ->
    Sources`. Raises CorpusError, and ConfigError where that function cannot be imported, or returns
    something else.
    """
    # A source of the user's own.
    if section.source != "corpus":
        own: Callable[..., Sources] = load_extension(section.source, setting="corpus.source")
        found = own(section, tokenizer, block_sequences=block_sequences, cache_dir=cache_dir)
        _check(found, section)
        return found

    # The corpus: each data set alone, then the mixture.
    sections = section.parts()
    held_out = shared_out(section.heldout_sequences, [each.weight for each in sections])
    splits = [
        prepare_corpus(
            each.model_copy(update={"heldout_sequences": count}),
            tokenizer,
            tokenizer_digest=tokenizer_digest,
            cache_dir=cache_dir,
            on_progress=on_progress,
        )
        for each, count in zip(sections, held_out, strict=True)
    ]
    train: Corpus | Mixture = splits[0].train
    heldout: Corpus | Mixture = splits[0].heldout
    used = [(train.num_sequences, train.num_targets)]
    if len(splits) > 1:
        train = mixed(
            [split.train for split in splits],
            [each.weight for each in sections],
            seed=section.seed,
            cache_dir=cache_dir / "mixture",
        )
        heldout = end_to_end([split.heldout for split in splits])
        used = list(zip(train.counts_P.tolist(), train.targets_P.tolist(), strict=True))
    return Sources(
        CorpusSource(train, block_sequences),
        CorpusSource(heldout, block_sequences),
        parts=tuple(
            Part(_name(each), split.account, *counts)
            for each, split, counts in zip(sections, splits, used, strict=True)
        ),
    )


def _name(section: CorpusSection) -> str:
    """A data set, with its subset and split where they are given."""
    split = section.split if section.split != "train" else None
    return " ".join(filter(None, (section.dataset, section.subset, split)))


def _check(found: object, section: CorpusSection) -> None:
    """Raise ConfigError unless these are Sources of the config's sequence length."""
    if not isinstance(found, Sources):
        raise ConfigError(
            f'corpus.source is "{section.source}", which gives a {type(found).__name__}; '
            f"wanted {Sources.__module__}.Sources"
        )
    for source in (found.train, found.heldout):
        if source.sequence_length != section.sequence_length:
            raise ConfigError(
                f'corpus.source is "{section.source}", whose sequences have '
                f"{source.sequence_length} tokens; wanted corpus.sequence_length, which is "
                f"{section.sequence_length}"
            )


def whole(source: SequenceSource) -> Sequences:
    """All sequences of a source, in this process's memory."""
    return joined([source.block(number) for number in range(source.num_blocks)])
