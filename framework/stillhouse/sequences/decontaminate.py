"""Decontamination: which samples hold passages of test sets, by runs of 13 words that both have (as
for GPT-3: Brown et al. 2020, arXiv 2005.14165, appendix C).

Idioms and licences are shared by honest texts, too. So one common run proves nothing: a sample is
contaminated where many of its runs are in a test set, where a long passage is, or where a whole
text of the set is.

Letters of shapes: W words of a text, G runs of words.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import xxhash

from stillhouse.config.graders import DecontaminateSection

GRAM_WORDS = 13
FEWEST_WORDS = 8  # a shorter text of a test set is in too many others by chance

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"  # Japanese and Chinese, where each sign is a word
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MOST_CACHED = 1 << 20


@dataclass(frozen=True, slots=True)
class _Grams:
    """Runs of the same number of words, and how long the shortest text is that has each."""

    hashes_G: np.ndarray  # uint64, ascending, each once
    words_G: np.ndarray  # int64
    present: np.ndarray  # bool [2^n]: whether there is a hash that begins with these n bits

    def lengths(self, hashes_G: np.ndarray) -> np.ndarray:
        """Of each of these runs, how long the shortest text is that has it; 0 where none has."""
        lengths_G = np.zeros(len(hashes_G), np.int64)
        # most are ruled out by one look into memory, where a search takes twenty
        maybe = np.flatnonzero(self.present[_first_bits(hashes_G, len(self.present))])
        wanted = hashes_G[maybe]
        at = np.searchsorted(self.hashes_G, wanted).clip(max=len(self.hashes_G) - 1)
        lengths_G[maybe] = np.where(self.hashes_G[at] == wanted, self.words_G[at], 0)
        return lengths_G


@dataclass(frozen=True, slots=True)
class PassageIndex:
    """The runs of words in a test set's texts: some 30 bytes each."""

    grams: Mapping[int, _Grams]  # by their number of words: 13, or all of a shorter text
    num_texts: int
    num_too_short: int  # texts that cannot be looked for


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a text has in common with a test set."""

    share: float  # of its runs of 13 words
    passage_words: int  # of its longest passage; 0 where there is none
    has_whole_text: bool  # a text of the test set, from its first word to its last

    def is_contaminated(self, rule: DecontaminateSection) -> bool:
        return (
            self.has_whole_text
            or self.share > rule.max_share
            or self.passage_words >= rule.passage_words
        )


def index_of(texts: Iterable[str]) -> PassageIndex:
    """The index of a test set's texts: questions, answers, or both joined."""
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    num_texts = num_too_short = 0
    words = _WordHashes()
    for text in texts:
        hashes_W = words.of(text)
        num_words, size = len(hashes_W), min(len(hashes_W), GRAM_WORDS)
        num_texts += 1
        if num_words < FEWEST_WORDS:
            num_too_short += 1
            continue
        *_, hashes_G = _runs(hashes_W, size)
        found.setdefault(size, []).append((hashes_G, np.full(len(hashes_G), num_words)))
    return PassageIndex(
        {size: _joined(parts) for size, parts in sorted(found.items())}, num_texts, num_too_short
    )


@dataclass(frozen=True, slots=True)
class Decontamination:
    """Texts held against test sets by a rule. Not thread-safe."""

    rule: DecontaminateSection
    test_sets: Mapping[str, PassageIndex]
    _words: "_WordHashes" = field(default_factory=lambda: _WordHashes(), init=False, repr=False)

    def found_in(self, text: str) -> str | None:
        """The name of the first test set of which a text has a passage; None where it is clean."""
        if not self.test_sets:
            return None
        hashes_W = self._words.of(text)
        sizes = {size for test_set in self.test_sets.values() for size in test_set.grams}
        runs = dict(enumerate(_runs(hashes_W, max(sizes, default=0)), start=1))
        return next(
            (
                name
                for name, test_set in self.test_sets.items()
                if _overlap(runs, test_set).is_contaminated(self.rule)
            ),
            None,
        )


def overlap_of(text: str, test_set: PassageIndex) -> Overlap:
    """What a text has in common with a test set."""
    return _overlap(dict(enumerate(_runs(_WordHashes().of(text), GRAM_WORDS), start=1)), test_set)


def _overlap(runs: Mapping[int, np.ndarray], test_set: PassageIndex) -> Overlap:
    """`runs` are a text's, by their number of words."""
    share, passage_words, has_whole_text = 0.0, 0, False
    for size, grams in test_set.grams.items():
        if size not in runs:
            continue
        lengths_G = grams.lengths(runs[size])
        for start, end in _stretches(lengths_G > 0):
            num_words = end - start + size - 1
            passage_words = max(passage_words, num_words)
            has_whole_text |= num_words >= lengths_G[start:end].min()
        if size == GRAM_WORDS:
            share = float((lengths_G > 0).mean())
    return Overlap(share, passage_words, bool(has_whole_text))


def _stretches(is_common_G: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch of true values."""
    if not is_common_G.any():
        return
    edges = np.flatnonzero(np.diff(is_common_G, prepend=False, append=False))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _runs(hashes_W: np.ndarray, most_words: int) -> Iterator[np.ndarray]:
    """Hashes of all runs of 1, 2 ... `most_words` words, as far as the text has as many. No string
    is built for any."""
    runs_G = np.zeros(len(hashes_W), np.uint64)
    for offset in range(min(most_words, len(hashes_W))):
        runs_G = runs_G[: len(hashes_W) - offset] * _FACTOR + hashes_W[offset:]
        yield runs_G


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> _Grams:
    hashes_G, words_G = (np.concatenate(each) for each in zip(*parts, strict=True))
    order_G = np.lexsort([words_G, hashes_G])  # of equal ones the shortest text's first
    hashes_G, first = np.unique(hashes_G[order_G], return_index=True)
    present = np.zeros(8 << len(hashes_G).bit_length(), bool)
    present[_first_bits(hashes_G, len(present))] = True
    return _Grams(hashes_G, words_G[order_G][first], present)


def _first_bits(hashes_G: np.ndarray, size: int) -> np.ndarray:
    """As many as number the places of a table of this size, a power of two."""
    first_G: np.ndarray = hashes_G >> np.uint64(65 - size.bit_length())
    return first_G


class _WordHashes(dict[str, int]):
    """XXH3 of words, kept for words that come again."""

    def of(self, text: str) -> np.ndarray:
        """uint64 [W]: of the words of a text, without case and punctuation."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
        if len(self) > _MOST_CACHED:
            self.clear()
        words = _WORD.findall(text.casefold())
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))

    def __missing__(self, word: str) -> int:
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return found
