"""What held-out scores decide: after which step a student was best, and whether it goes on.

    <checkpoints root>/heldout/<16 hex digits>-student.json      {"kls": [[step, KL], ...], "xxh3"}

Rank 0 replaces the file after each score, before a checkpoint of that step begins. So for every
commit, the scores up to its step are there. A training that resumes from a commit drops later ones,
and then decides what it would have decided without a stop.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Self

from stillhouse.cluster.collectives import outcomes
from stillhouse.errors import StillhouseError, StudentError
from stillhouse.retry import DEFAULT_PATIENCE, Tell, insist
from stillhouse.sealed import opened, sealed
from stillhouse.store.object_store import Blobs

_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class History:
    """The held-out KLs of a student, (step, nats), in the order of steps. The untrained student's
    is not among them."""

    kls: tuple[tuple[int, float], ...] = ()

    def until(self, step: int) -> Self:
        """The KLs up to a step."""
        return type(self)(tuple(each for each in self.kls if each[0] <= step))

    def after(self, step: int, kl: float) -> Self:
        """With the KL after one more step."""
        return type(self)((*self.until(step - 1).kls, (step, kl)))

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the lowest KL, the first of equal ones, and that KL; None before the first
        score that is a number."""
        finite = [each for each in self.kls if math.isfinite(each[1])]
        return min(finite, key=lambda each: (each[1], each[0]), default=None)

    def is_over(self, *, patience: int) -> bool:
        """Whether so many scores after the best one brought no lower KL. Never with a patience of
        0."""
        if self.best is None:
            return False
        best_step, _ = self.best
        return 0 < patience <= sum(step > best_step for step, _ in self.kls)


def write_history(blobs: Blobs, key: str, history: History, *, tell: Tell) -> None:
    """Replace the file. Waits while the store is unavailable, and reports that to `tell`."""
    data = json.dumps(sealed({"kls": history.kls})).encode()
    insist(lambda: blobs.replace(key, data), patience=DEFAULT_PATIENCE, tell=tell)


def read_history(blobs: Blobs, key: str, *, tell: Tell) -> History:
    """The content of the file, empty where there is none. Waits as `write_history` does. Raises
    StudentError where it is damaged."""
    try:
        data = insist(partial(blobs.read, key), patience=DEFAULT_PATIENCE, tell=tell)
    except FileNotFoundError:
        return History()
    try:
        kls = opened(json.loads(bytes(data)))["kls"]
        return History(tuple((int(step), float(kl)) for step, kl in kls))
    except _DAMAGE as error:
        raise StudentError(
            f"{key} under {blobs.url}, the held-out scores so far, is damaged ({error}); remove it "
            "and give the same command again: patience is then counted from there on"
        ) from None


def agreed_history(blobs: Blobs, key: str, *, is_reader: bool, tell: Tell) -> History:
    """What the one rank that `is_reader` reads, on every rank; raises there what it raises. A
    collective."""

    def kls() -> object:
        return read_history(blobs, key, tell=tell).kls if is_reader else None

    found = outcomes(kls)
    for each in found:
        if isinstance(each, StillhouseError):
            raise each
    (read,) = (each for each in found if each is not None)
    return History(tuple((step, kl) for step, kl in read))
