"""Asking a server many things at one time."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")


def all_answers(
    ask: Callable[[_Question, threading.Event], _Answer],
    questions: Sequence[_Question],
    *,
    num_threads: int,
) -> list[_Answer]:
    """What `ask` returns for each question, in order, so many at once.

    Raises the first error. The event is set then, so that nobody waits on. What is on its way is
    waited for, since it is paid; nothing more is sent.
    """
    stop, errors = threading.Event(), list[BaseException]()

    def answer(question: _Question) -> list[_Answer]:
        try:
            return [] if stop.is_set() else [ask(question, stop)]
        except BaseException as error:
            errors.append(error)
            stop.set()
            return []

    with ThreadPoolExecutor(num_threads) as threads:
        found = [*threads.map(answer, questions)]
    if errors:
        raise errors[0]
    return [each for (each,) in found]
