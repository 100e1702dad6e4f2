"""The tally of rollouts: while a corpus reads the samples of a store once, they are counted, and a
few are chosen to be looked at.

The choice depends on the rollouts and on what is kept of them alone. Prompts are ranked by a hash,
so that samples of the same prompts are shown on both sides.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from stillhouse.errors import ChunkError
from stillhouse.sequences.ids import texts_of
from stillhouse.store.grader_names import named_graders
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import CUT, ENDED, SET_ASIDE, Rollouts
from stillhouse.store.verdicts import verdicts_of
from stillhouse.tracking.samples import Grading, SampleAccount, ShownSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FINISH = {ENDED: "ended", CUT: "cut", SET_ASIDE: "set aside"}
_SHOWN = 4  # prompts of which a kept sample is shown, and samples that are dropped at least
_FIRST, _LAST = 1200, 600  # characters of a long text that are shown
_TENTHS = 10


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A sample that may be shown."""

    prompt: int
    number: int
    prompt_ids: NDArray[np.int32]
    text_ids: NDArray[np.int32]
    finish: int
    scores: Mapping[str, float]


@dataclass(slots=True)
class _Scores:
    """Those of one grader so far."""

    total: float = 0.0
    num_full: int = 0
    by_tenth: list[int] = field(default_factory=lambda: [0] * _TENTHS)

    def add(self, score: float) -> None:
        self.total += score
        self.num_full += score == 1.0
        self.by_tenth[min(int(min(max(score, 0.0), 1.0) * _TENTHS), _TENTHS - 1)] += 1

    def grading(self) -> Grading:
        num = sum(self.by_tenth)
        return Grading(num, self.total / num, self.num_full, tuple(self.by_tenth))


class Tally:
    """Counts of the samples that were read so far, and the samples to be shown."""

    def __init__(self, store: RolloutStore) -> None:
        self._store, self._fingerprint = store, store.recipe.fingerprint
        self._finish, self._drops = Counter[int](), Counter[str]()
        self._prompts = set[int]()
        self._num_tokens = self._num_kept = 0
        self._of_shard: tuple[int, dict[str, Sequence[float]]] = -1, {}
        self._graders: Mapping[str, str] | None = None  # digits by name, once they are asked for
        self._scores: dict[str, _Scores] = defaultdict(_Scores)
        # by reason, None for what is kept, and by the rank of the prompt
        self._shown: dict[str | None, dict[int, _Candidate]] = defaultdict(dict)

    def see(self, rollouts: Rollouts, row: int, reason: str | None) -> None:
        """Count a sample of a shard, and why it is dropped, if it is. Called once for each sample;
        those of a shard come one after the other."""
        # counts
        finish, prompt = int(rollouts.finish_S[row]), int(rollouts.prompts_S[row])
        self._finish[finish] += 1
        self._prompts.add(prompt)
        self._num_tokens += int(rollouts.sequences.loss_mask_SL[row].sum())
        if reason is None:
            self._num_kept += 1
        else:
            self._drops[reason] += 1

        # scores
        scores = {name: of[row] for name, of in self._verdicts(rollouts.number).items()}
        for name, score in scores.items():
            self._scores[name].add(score)

        # whether it is shown: one of each prompt, of the prompts of lowest rank
        shown, rank = self._shown[reason], _rank(self._fingerprint, prompt)
        if rank in shown or (len(shown) == _SHOWN and rank > max(shown)):
            return
        ids, text_ids = rollouts.ids(row), rollouts.sampled_ids(row)
        prompt_ids, number = ids[: len(ids) - len(text_ids)].copy(), int(rollouts.samples_S[row])
        shown[rank] = _Candidate(prompt, number, prompt_ids, text_ids, finish, scores)
        if len(shown) > _SHOWN:
            del shown[max(shown)]

    def account(self, tokenizer: "PreTrainedTokenizerFast") -> SampleAccount:
        """What was counted and chosen so far, as text. Of the samples that are dropped, those of
        each reason take turns."""
        drops = dict(sorted(self._drops.items(), key=lambda each: (-each[1], each[0])))
        turns = zip_longest(*(self._by_rank(reason, tokenizer) for reason in drops))
        dropped = [each for turn in turns for each in turn if each is not None]
        return SampleAccount(
            num_prompts=len(self._prompts),
            num_ended=self._finish[ENDED],
            num_cut=self._finish[CUT],
            num_set_aside=self._finish[SET_ASIDE],
            num_tokens=self._num_tokens,
            num_kept=self._num_kept,
            drops=drops,
            gradings={name: each.grading() for name, each in sorted(self._scores.items())},
            kept=self._by_rank(None, tokenizer),
            dropped=dropped[: max(_SHOWN, len(drops))],
        )

    def _verdicts(self, number: int) -> Mapping[str, Sequence[float]]:
        """The scores of a shard by each grader that has a sound verdict on it."""
        if self._graders is None:
            self._graders = _names_in(self._store)
        if self._of_shard[0] != number:
            self._of_shard = number, _verdicts_on(self._store, number, self._graders)
        return self._of_shard[1]

    def _by_rank(
        self, reason: str | None, tokenizer: "PreTrainedTokenizerFast"
    ) -> list[ShownSample]:
        found = [each for _, each in sorted(self._shown[reason].items())]
        prompts = texts_of([each.prompt_ids for each in found], tokenizer)
        texts = texts_of([each.text_ids for each in found], tokenizer)
        return [
            ShownSample(
                each.prompt,
                each.number,
                _shortened(prompt),
                _shortened(text),
                _FINISH[each.finish],
                each.scores,
                reason,
            )
            for each, prompt, text in zip(found, prompts, texts, strict=True)
        ]


# What is damaged counts as absent here: by what samples are accepted is read elsewhere, and refused
# there.


def _names_in(store: RolloutStore) -> dict[str, str]:
    """The graders that have a name for these rollouts."""
    try:
        return named_graders(store.blobs, store.recipe.fingerprint)
    except ChunkError:
        return {}


def _verdicts_on(
    store: RolloutStore, number: int, graders: Mapping[str, str]
) -> dict[str, Sequence[float]]:
    found: dict[str, Sequence[float]] = {}
    for name, grader in graders.items():
        with suppress(ChunkError):
            (scores,) = verdicts_of(store, grader, [number])
            if scores is not None:
                found[name] = scores
    return found


def _rank(fingerprint: str, prompt: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{fingerprint} {prompt}".encode())


def _shortened(text: str) -> str:
    """A text, without the middle of a long one: what is asked is at its beginning, and an answer at
    its end."""
    num_left_out = len(text) - _FIRST - _LAST
    if num_left_out <= 0:
        return text
    return f"{text[:_FIRST]}\n[... {num_left_out:,} characters left out ...]\n{text[-_LAST:]}"
