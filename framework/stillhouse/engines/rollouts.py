"""`RolloutsEngine`: no model; the targets are the log-probabilities that a writer's API returned
with its text, as rollouts hold them.

After the last token before an end without log-probabilities, the target is the end itself.

Shapes: T target tokens of a document, K kept entries, S rollouts, L tokens.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from stillhouse.config import TeacherSection
from stillhouse.engines.base import Capabilities, Records, encoded, probe_item, require_no_gpu
from stillhouse.engines.openai_scores import Document, Scores, documents_of, targets_of
from stillhouse.engines.probe import Probe
from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits import Backend, CompressedLogits
from stillhouse.models.identity import ModelIdentity
from stillhouse.sequence import WorkItem
from stillhouse.sequences.named_rollouts import rollouts_named
from stillhouse.store import Recipe
from stillhouse.store.recipe import canonical_json
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import NO_ENTRY, Rollouts

_RULE = "log-probabilities of the writer"  # part of the teacher's digest: see docs/format.md
_SHARDS = 4  # in memory at one time


class _Place(NamedTuple):
    """Of a rollout."""

    shard: int
    row: int


class RolloutsEngine:
    """A teacher without weights. Construction reads nothing; it runs on the CPU."""

    digest: str | None = None  # nothing is loaded

    def __init__(
        self, section: TeacherSection, recipe: Recipe, *, device: str, store_url: str = ""
    ) -> None:
        del device, store_url  # where chunks go
        self._recipe, self._dataset = recipe, dataset_of(section)
        self._index = _Index(rollouts_named(self._dataset))

    @classmethod
    def describe(cls, section: TeacherSection, /) -> Capabilities:
        """Reads the recipe of the rollouts, which says how many entries each token has."""
        require_no_gpu(section)
        num_entries = rollouts_named(dataset_of(section)).recipe.top_logprobs
        if not num_entries:
            raise ConfigError(
                f'teacher.engine is "rollouts", but {dataset_of(section)} has no '
                "log-probabilities; write rollouts with writer.openai.top_logprobs above 0, or "
                'learn from the text alone: teacher.engine = "text"'
            )
        return Capabilities(most_entries=num_entries, draws=False, temperatures=False)

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        """Of the rollouts, shard by shard: they are facts, which no rule makes again."""
        del cache_dir  # nothing is computed
        store = rollouts_named(dataset_of(section))
        facts = {
            "rollouts": store.recipe.fingerprint,
            "shards": store.digest(),
            "target": _RULE,
        }
        digest = hashlib.sha256(canonical_json(facts)).hexdigest()
        return ModelIdentity(digest, section.revision, kind="api")

    def records(self, item: WorkItem) -> Iterator[Records]:
        return encoded([self.targets(item)], self._recipe.spec)

    def targets(self, item: WorkItem) -> CompressedLogits:
        """Targets as tensors on the CPU. Raises TeacherError for a document that is none of the
        samples with log-probabilities."""
        # where each is, so that no shard is read twice
        documents = [*documents_of(item)]
        places = [self._place_of(document) for document in documents]
        order = sorted(range(len(places)), key=lambda number: places[number])

        # what is stored of it
        found = {number: self._scores(documents[number], places[number]) for number in order}
        return self._compressed([found[number] for number in range(len(documents))])

    def probe(self) -> Probe:
        """The targets of the first sample, repeated to as many tokens as any answer has."""
        document, place = self._index.first()
        found = self._compressed([self._scores(document, place)])
        tokens_T = torch.arange(probe_item(self._recipe).sequences.num_targets) % found.num_tokens
        answer = found.map(lambda tensor: tensor[tokens_T])
        return Probe(answer, rounding_kl=0.0, weight_hashes={})

    def backend(self) -> Backend:
        return Backend("rollouts", f"the likeliest {self._recipe.k} of the writer's API")

    def _place_of(self, document: Document) -> _Place:
        place = self._index.place_of(document.digest)
        if place is None:
            raise TeacherError(
                f"sequence {document.row} of chunk {document.chunk} is none of the samples of "
                f"{self._dataset} with log-probabilities; wanted the corpus that the "
                "run was planned with: plan it anew, in another run directory"
            )
        return place

    def _scores(self, document: Document, place: _Place) -> Scores:
        top, k = self._index.shard(place.shard).top, self._recipe.k
        assert top is not None, "the recipe asks for them"
        ids_TK = top.ids_SLK[place.row, document.targets_T, :k].copy()
        logprobs_TK = top.logprobs_SLK[place.row, document.targets_T, :k].copy()

        # the end, which has none: it follows, and what fills the place has no mass
        for target in np.flatnonzero(ids_TK[:, 0] == NO_ENTRY):
            end = int(document.token_ids_D[document.targets_T[target] + 1])
            others = [number for number in range(k) if number != end]
            ids_TK[target] = [end, *others[: k - 1]]
            logprobs_TK[target] = [0.0, *[-np.inf] * (k - 1)]
        return Scores(ids_TK, logprobs_TK, np.empty(0, np.float32))

    def _compressed(self, scores: list[Scores]) -> CompressedLogits:
        vocab_size = self._recipe.vocab_size
        return targets_of(
            scores, num_entries=self._recipe.k, vocab_size=vocab_size, with_labels=False
        )


class _Index:
    """The samples with log-probabilities, by the digest of their ids and targets. Each shard
    is read when it is first needed; of samples with the same tokens the first counts."""

    def __init__(self, store: RolloutStore) -> None:
        self.shard = lru_cache(maxsize=_SHARDS)(store.fetch)
        self._num_shards = store.recipe.num_shards
        self._unread = iter(range(self._num_shards))
        self._places: dict[str, _Place] = {}

    def place_of(self, digest: str) -> _Place | None:
        while digest not in self._places:
            number = next(self._unread, None)
            if number is None:
                return None
            for document in _documents_in(self.shard(number)):
                self._places.setdefault(document.digest, _Place(number, document.row))
        return self._places[digest]

    def first(self) -> tuple[Document, _Place]:
        """The first of all. Raises TeacherError where there is none."""
        for number in range(self._num_shards):
            for document in _documents_in(self.shard(number)):
                return document, _Place(number, document.row)
        raise TeacherError(
            "no sample of these rollouts has log-probabilities; the log of "
            "`stillhouse generate` says why: learn from the text alone, or write with another model"
        )


def _documents_in(rollouts: Rollouts) -> Iterator[Document]:
    """The samples of a shard that have log-probabilities."""
    for row in np.flatnonzero(rollouts.rows_with_logprobs).tolist():
        targets_T = np.flatnonzero(rollouts.sequences.loss_mask_SL[row])
        yield Document(rollouts.number, row, rollouts.ids(row), targets_T)


def require_whole_samples(section: TeacherSection, *, sequence_length: int) -> None:
    """Raise ConfigError where a corpus of sequences so long cuts samples, which are found whole."""
    longest = rollouts_named(dataset_of(section)).recipe.sequence_length
    if sequence_length < longest:
        raise ConfigError(
            f'corpus.sequence_length is {sequence_length:,}, but with teacher.engine = "rollouts" '
            f"no sample may be cut, and those of {dataset_of(section)} have up to {longest:,} "
            f"tokens; set it to {longest}"
        )


def dataset_of(section: TeacherSection) -> str:
    assert section.rollouts is not None, "planning names them"
    return section.rollouts
