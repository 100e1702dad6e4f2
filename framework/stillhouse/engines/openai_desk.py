"""The desk where scores are bought: what is kept already is not bought again."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillhouse.engines.openai_scores import Document, Scores, scores_of
from stillhouse.servers.answers import Answers
from stillhouse.servers.client import Question, Server, Tokens
from stillhouse.servers.desk import all_answers

_ENTRY_BYTES, _OTHER_BYTES = 512, 1 << 20  # of an answer's JSON at most: an entry, all around them


@dataclass(frozen=True, slots=True)
class Desk:
    """Where scores are bought: of the server, unless they were bought before. Safe to share among
    threads."""

    server: Server
    answers: Answers | None  # None: what costs nothing is not kept
    num_entries: int
    vocab_size: int

    def scores(self, document: Document, stop: threading.Event) -> Scores:
        """The scores of a document. Raises what `Server.ask` raises."""
        kept = None if self.answers is None else self._kept(self.answers, document)
        if kept is not None:
            return kept
        bought = self.asked(document, num_entries=self.num_entries, stop=stop)
        if self.answers is not None:
            self.answers.keep(document.chunk, document.digest, _values_of(bought))
        return bought

    def asked(self, document: Document, *, num_entries: int, stop: threading.Event) -> Scores:
        """The same, of the server, and not kept."""
        return self.server.ask(
            question_of(document, num_entries=num_entries),
            read=lambda body: scores_of(
                body, document, num_entries=num_entries, vocab_size=self.vocab_size
            ),
            stop=stop,
        )

    def scores_of_all(self, documents: Sequence[Document], *, num_threads: int) -> list[Scores]:
        """The scores of all documents, in order, so many at once, as `all_answers` asks."""
        return all_answers(self.scores, documents, num_threads=num_threads)

    def _kept(self, answers: Answers, document: Document) -> Scores | None:
        values = answers.read(document.chunk, document.digest)
        shape = (len(document.targets_T), self.num_entries)
        try:
            return Scores(
                np.array(values["token_ids"], np.int32).reshape(shape),
                np.array(values["logprobs"], np.float32).reshape(shape),
                np.array(values["label_logprobs"], np.float32).reshape(shape[:1]),
            )
        except (KeyError, ValueError, TypeError, OverflowError):
            return None


def question_of(document: Document, *, num_entries: int) -> Question:
    """What is asked of a document: the scores of its tokens, and one more token, for none is not
    allowed."""
    num_tokens = len(document.token_ids_D)
    fields = {
        "prompt": document.token_ids_D.tolist(),
        "prompt_logprobs": num_entries,
        "max_tokens": 1,
        "temperature": 1.0,
    }
    return Question(
        "completions",
        fields,
        Tokens(num_tokens, 1),
        most_bytes=_OTHER_BYTES + _ENTRY_BYTES * num_tokens * (num_entries + 1),
        wanted="log-probabilities for a prompt of token ids",
    )


def _values_of(scores: Scores) -> Mapping[str, Any]:
    return {
        "label_logprobs": scores.label_logprob_T.tolist(),
        "logprobs": scores.logprobs_TK.tolist(),
        "token_ids": scores.token_ids_TK.tolist(),
    }
