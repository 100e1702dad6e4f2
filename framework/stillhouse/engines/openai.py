"""`OpenAIEngine`: a teacher behind a server that scores prompts by their token ids, as vLLM's own
server does with `prompt_logprobs`.

Shapes: T target tokens, K kept entries.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from stillhouse.config import ScoringSection, TeacherSection
from stillhouse.engines.base import Capabilities, Records, encoded, probe_item
from stillhouse.engines.openai_desk import Desk
from stillhouse.engines.openai_scores import (
    Scores,
    documents_of,
    require_full_softmax,
    targets_of,
)
from stillhouse.engines.probe import Probe, mean_kl
from stillhouse.errors import ServerError
from stillhouse.logits import Backend, CompressedLogits
from stillhouse.models.identity import ModelIdentity, is_local
from stillhouse.retry import DEFAULT_PATIENCE, Patience
from stillhouse.sequence import WorkItem
from stillhouse.servers.access import access_of, served_model
from stillhouse.servers.answers import answers_of
from stillhouse.servers.client import Server
from stillhouse.store import ChunkStore, Recipe
from stillhouse.store.recipe import canonical_json

TABLE = "teacher.openai"
_PROBES_AT_ONCE = 3  # in one batch of the server's, where the first probe was alone


class OpenAIEngine:
    """A teacher on a server. Construction sends no request; the first is the probe's, whose answer
    decides whether the server can be used."""

    digest: str | None = None  # nothing is loaded here

    def __init__(
        self,
        section: TeacherSection,
        recipe: Recipe,
        *,
        device: str,
        store_url: str,
        patience: Patience = DEFAULT_PATIENCE,
    ) -> None:
        del device  # the server has its own
        self._recipe = recipe
        self._options = options = options_of(section)
        store = ChunkStore(store_url, recipe)
        self._access = access_of(options, store.blobs, store.folder, table=TABLE)
        self._desk = Desk(
            Server(options, table=TABLE, access=self._access, patience=patience),
            answers_of(store) if options.is_paid else None,  # what costs nothing is not kept
            recipe.k,
            recipe.vocab_size,
        )

    @classmethod
    def describe(cls, section: TeacherSection, /) -> Capabilities:
        return Capabilities(
            most_entries=options_of(section).max_logprobs,
            draws=False,
            label_logprob=True,
            temperatures=False,
        )

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        """Of the names that the user and the server give the teacher, since no file of it can be
        read: see docs/format.md. Asks the server only where `served_model` is not set."""
        del cache_dir  # nothing is computed
        options = options_of(section)
        served = served_model(options, table=TABLE)
        names = {
            "model": None if is_local(section) else section.model,
            "revision": section.revision,
            "served_model": served,
        }
        digest = hashlib.sha256(canonical_json(names)).hexdigest()
        return ModelIdentity(digest, section.revision, kind="api", served_model=served)

    def records(self, item: WorkItem) -> Iterator[Records]:
        return encoded(self.targets(item), self._recipe.spec)

    def targets(self, item: WorkItem) -> Iterator[CompressedLogits]:
        """Targets as tensors on the CPU, one part for each sequence that has some."""
        documents = [*documents_of(item)]
        scores = self._desk.scores_of_all(documents, num_threads=self._options.max_in_flight)
        if not documents:
            yield self._targets([], num_entries=self._recipe.k)
        pairs = zip(documents, scores, strict=True)
        for _, of_row in groupby(pairs, key=lambda pair: pair[0].row):
            yield self._targets([each for _, each in of_row], num_entries=self._recipe.k)
        self.tidy()  # the chunks before this one are published

    def probe(self) -> Probe:
        """The answer to `probe_item`, and how far it is from those to the same in one batch.

        Raises ServerError where the server cannot be used.
        """
        answer = self.prove()
        with ThreadPoolExecutor(_PROBES_AT_ONCE) as threads:
            others = [threads.submit(self._answer) for _ in range(_PROBES_AT_ONCE)]
        rounding_kl = max(mean_kl(answer, other.result()) for other in others)
        return Probe(answer, rounding_kl, weight_hashes={})

    def prove(self) -> CompressedLogits:
        """Ask for one probe, and return the answer. Raises ServerError where the server cannot be
        used: it does not score prompts of ids, or not as the recipe wants."""
        self._require_room()
        return self._answer()

    def tidy(self) -> None:
        """Delete the answers that are kept of published chunks, if the store lets it."""
        if self._desk.answers is not None:
            self._desk.answers.tidy()

    def granted_usd(self) -> float:
        """What is spent on the recipe's targets, or reserved; 0 where there is no limit."""
        return self._access.money.granted_usd()

    def backend(self) -> Backend:
        return Backend("server", f"the likeliest {self._recipe.k} of {self._options.base_url}")

    def _answer(self) -> CompressedLogits:
        """With as many entries as the server gives: the few likeliest of a flat distribution may
        agree in models that differ."""
        num_entries = min(self._options.max_logprobs, self._recipe.vocab_size)
        (document,) = documents_of(probe_item(self._recipe))
        scores = self._desk.asked(document, num_entries=num_entries, stop=threading.Event())
        require_full_softmax(scores, vocab_size=self._recipe.vocab_size)
        return self._targets([scores], num_entries=num_entries)

    def _targets(self, scores: Sequence[Scores], *, num_entries: int) -> CompressedLogits:
        return targets_of(
            scores,
            num_entries=num_entries,
            vocab_size=self._recipe.vocab_size,
            with_labels=self._recipe.label_logprob,
        )

    def _require_room(self) -> None:
        """Raise ServerError where the server says that prompts may not be as long as sequences."""
        for model in self._desk.server.models():
            wanted = self._recipe.sequence_length + 1
            if model.name != self._options.served_model or model.max_tokens is None:
                continue
            if model.max_tokens < wanted:
                raise ServerError(
                    f"the server takes {model.max_tokens:,} tokens at most, of a prompt and one "
                    f"more; wanted {wanted:,}: serve the model with --max-model-len {wanted}, or "
                    "lower corpus.sequence_length"
                )


def options_of(section: TeacherSection) -> ScoringSection:
    assert section.openai is not None, "the config wants it with this engine"
    return section.openai
