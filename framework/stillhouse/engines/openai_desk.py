"""The desk where scores are bought: what is kept already is not bought again."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from stillhouse.engines.ledger import Answers
from stillhouse.engines.openai_client import Money, Server
from stillhouse.engines.openai_scores import Document, Scores


@dataclass(frozen=True, slots=True)
class Desk:
    """Where scores are bought: of the server, unless they were bought before. Safe to share among
    threads."""

    server: Server
    money: Money
    answers: Answers | None  # None: what costs nothing is not kept
    num_entries: int
    vocab_size: int

    def scores(self, document: Document, stop: threading.Event) -> Scores:
        """The scores of a document. Raises what `Server.score` raises."""
        kept = None if self.answers is None else self.answers.read(document)
        if kept is not None:
            return kept
        bought = self.asked(document, num_entries=self.num_entries, stop=stop)
        if self.answers is not None:
            self.answers.keep(document, bought)
        return bought

    def asked(self, document: Document, *, num_entries: int, stop: threading.Event) -> Scores:
        """The same, of the server, and not kept."""
        return self.server.score(
            document,
            num_entries=num_entries,
            vocab_size=self.vocab_size,
            money=self.money,
            stop=stop,
        )

    def scores_of_all(self, documents: Sequence[Document], *, num_threads: int) -> list[Scores]:
        """The scores of all documents, in order, so many at once.

        Raises the first error. What is on its way then is waited for and kept, since it is paid;
        nothing more is sent.
        """
        stop, errors = threading.Event(), list[BaseException]()

        def buy(document: Document) -> Scores | None:
            try:
                return None if stop.is_set() else self.scores(document, stop)
            except BaseException as error:
                errors.append(error)
                stop.set()
                return None

        with ThreadPoolExecutor(num_threads) as threads:
            found = [*threads.map(buy, documents)]
        if errors:
            raise errors[0]
        return [scores for scores in found if scores is not None]
