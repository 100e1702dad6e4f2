"""Mixtures: the sequences of several corpora in one order, each corpus with its weight's share.

Each data set is prepared alone, so a mixture of other weights tokenises nothing again. No sequence
is used twice: the corpus that is smallest for its weight is used whole, and of each other one as
many sequences as make the shares right.

Shapes: P corpora, S sequences.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse import atomic
from stillhouse.cache import writing_cache
from stillhouse.errors import CorpusError
from stillhouse.sealed import opened, sealed
from stillhouse.sequence import Sequences, joined
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.pieces import LocatedBlock
from stillhouse.sequences.shuffle import shuffled_order
from stillhouse.store.rollout_store import RolloutsPlace

_RULE = "stillhouse mixture 1"  # a change to counts or order is another rule, and another digest
_COUNTED_ROWS = 256  # read at one time to count their targets


@dataclass(frozen=True, slots=True)
class Mixture:
    """The first sequences of some corpora, as one. It stays in the process that made it."""

    corpora: tuple[Corpus, ...]
    counts_P: NDArray[np.int64]  # sequences that are used of each
    targets_P: NDArray[np.int64]  # targets in them
    order_S: NDArray[np.int64]  # sequence i's place in the used ones of all corpora, end to end
    digest: str

    @property
    def num_sequences(self) -> int:
        return len(self.order_S)

    @property
    def num_targets(self) -> int:
        return int(self.targets_P.sum())

    @property
    def sequence_length(self) -> int:
        return self.corpora[0].sequence_length

    def rows(self, start: int, stop: int) -> Sequences:
        """Sequences start <= s < stop."""
        return joined(
            [self.corpora[number].rows(row, row + 1) for number, row in self._places(start, stop)]
        )

    def located(self, start: int, stop: int) -> LocatedBlock:
        """The same sequences, a part of each corpus, named by where they are in a store, if they
        are in one."""
        of_S, rows_S = np.array(self._places(start, stop)).T
        parts = [
            self.corpora[number].located_at(rows_S[of_S == number]) for number in np.unique(of_S)
        ]
        order_S = np.empty(stop - start, np.int64)
        order_S[np.argsort(of_S, kind="stable")] = np.arange(stop - start)
        return LocatedBlock(parts, order_S)

    @property
    def read_from(self) -> list[RolloutsPlace]:
        """The stores that `located` names."""
        return [place for corpus in self.corpora for place in corpus.read_from]

    def _places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Of each sequence the number of its corpus, and its own there."""
        ends_P = np.cumsum(self.counts_P)
        found = []
        for place in self.order_S[start:stop].tolist():
            number = int(np.searchsorted(ends_P, place, side="right"))
            found.append((number, place - int(ends_P[number] - self.counts_P[number])))
        return found


def mixed(
    corpora: Sequence[Corpus], weights: Sequence[float], *, seed: int, cache_dir: Path
) -> Mixture:
    """Corpora of one sequence length in the shares of their weights, which are above 0. Targets are
    counted once, and remembered in `cache_dir`.

    Raises CorpusError where a share is less than one sequence, CacheError.
    """
    # How many of each: all of the one that is smallest for its weight.
    sizes_P = np.array([each.num_sequences for each in corpora], np.float64)
    shares_P = np.array(weights) / sum(weights)
    total = float((sizes_P / shares_P).min())
    counts_P = np.minimum(np.rint(total * shares_P), sizes_P).astype(np.int64)
    if not counts_P.all():
        number = int(counts_P.argmin())
        raise CorpusError(
            f"corpus weight {weights[number]:g} is less than one sequence of {total:.0f}, which is "
            "all that the smallest data set allows for its weight; raise it, or set it to 0"
        )

    # Their order, their targets and their name.
    order_S = shuffled_order(int(counts_P.sum()), "sequence", seed=seed)
    parts = [_RULE, [each.digest for each in corpora], counts_P.tolist(), seed]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    targets_P = _targets(corpora, counts_P, cache_dir / f"{digest[:32]}.json")
    return Mixture(tuple(corpora), counts_P, targets_P, order_S, digest)


def shared_out(total: int, weights: Sequence[float]) -> list[int]:
    """A number of things by weight: at least one for each, and `total` in all."""
    shares = [1 + (total - len(weights)) * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    most_left = sorted(range(len(shares)), key=lambda each: (counts[each] - shares[each], each))
    for number in most_left[: total - sum(counts)]:
        counts[number] += 1
    return counts


def end_to_end(corpora: Sequence[Corpus]) -> Mixture:
    """All sequences of some corpora, one corpus after the other."""
    counts_P = np.array([each.num_sequences for each in corpora], np.int64)
    targets_P = np.array([each.num_targets for each in corpora], np.int64)
    parts = [_RULE, [each.digest for each in corpora]]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Mixture(tuple(corpora), counts_P, targets_P, np.arange(counts_P.sum()), digest)


def _targets(
    corpora: Sequence[Corpus], counts_P: NDArray[np.int64], remembered: Path
) -> NDArray[np.int64]:
    """int64 [P]: targets in the first sequences of each corpus."""
    try:
        return np.array(opened(json.loads(remembered.read_text()))["targets"], np.int64)
    except (OSError, ValueError, KeyError):
        pass
    found = []
    for corpus, count in zip(corpora, counts_P.tolist(), strict=True):
        if count == corpus.num_sequences:
            found.append(corpus.num_targets)
            continue
        starts = range(0, count, _COUNTED_ROWS)
        ends = [min(start + _COUNTED_ROWS, count) for start in starts]
        found.append(sum(corpus.rows(*each).num_targets for each in zip(starts, ends, strict=True)))
    with writing_cache(remembered.parent):
        atomic.make_directory(remembered.parent)
        atomic.replace(remembered, json.dumps(sealed({"targets": found})).encode())
    return np.array(found, np.int64)
