"""The search for poison: a chunk that failed too often is taken apart, its rows are tried one by
one, and those that fail are set aside.

A pure state machine. What it says to others is a `Ruling`: which work is wanted no more, and which
has to be done instead.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stillhouse.errors import TeacherError
from stillhouse.pool.backlog import Work

RAISED, DIED = 3, 1  # the weight of a failure: a lost machine is seldom the chunk's fault


@dataclass(frozen=True, slots=True)
class Budget:
    """What is tried before something is given up. A death counts a third of an attempt that
    raised."""

    max_failures: int  # attempts at one chunk, and then at one of its rows
    max_set_aside: int  # rows, of all chunks together
    timeout_s: float  # for one lease

    @property
    def weight(self) -> int:
        return RAISED * self.max_failures


@dataclass(frozen=True, slots=True)
class SetAside:
    """Rows of a chunk that no worker could compute."""

    chunk: int
    rows: tuple[int, ...]
    reason: str


class Ruling(NamedTuple):
    """What follows from an attempt."""

    closed: Sequence[Work] = ()  # wanted no more
    opened: Sequence[Work] = ()  # to be done now
    set_aside: SetAside | None = None


@dataclass(slots=True)
class _Examination:
    """A chunk whose rows are tried, each alone."""

    undecided: set[int]
    condemned: list[int]
    reason: str


class PoisonSearch:
    """`num_rows` says how long a chunk is."""

    def __init__(self, num_rows: Callable[[int], int], budget: Budget):
        self._num_rows = num_rows
        self._budget = budget
        self._against: Counter[Work] = Counter()
        self._examinations: dict[int, _Examination] = {}  # by position
        self._left_out: dict[int, frozenset[int]] = {}  # of the positions that were examined
        self.num_set_aside = 0

    def left_out(self, position: int) -> frozenset[int]:
        """The rows of a chunk that are set aside."""
        return self._left_out.get(position, frozenset())

    def weight_against(self, work: Work) -> int:
        return self._against[work]

    def wants(self, work: Work) -> bool:
        """Whether an open chunk is to be made by this work: as a whole, or on trial row by row."""
        examination = self._examinations.get(work.position)
        return (
            examination is None
            if work.is_whole
            else examination is not None and work.row in examination.undecided
        )

    def accuse(self, work: Work, weight: int, *, chunk: int, reason: str) -> Ruling:
        """An attempt at wanted work failed. Raises TeacherError where rows alone cannot explain
        it."""
        self._against[work] += weight
        if not work.is_whole:
            self._refuse_a_general_failure(work, chunk, reason)
        if self._against[work] < self._budget.weight:
            return Ruling()
        return (
            self._examine(work, chunk, reason)
            if work.is_whole
            else self._condemn(work, chunk, reason)
        )

    def acquit(self, work: Work, *, chunk: int) -> Ruling:
        """The row on trial could be computed."""
        self._examinations[work.position].undecided.remove(work.row)
        return self._conclude(work, chunk)

    def end(self, position: int) -> list[Work]:
        """The chunk is published. Returns the work that is wanted no more."""
        examination = self._examinations.pop(position, None)
        undecided = () if examination is None else examination.undecided
        return [
            self._close(work)
            for work in (Work(position), *(Work(position, row) for row in undecided))
        ]

    def _close(self, work: Work) -> Work:
        self._against.pop(work, None)
        return work

    def _examine(self, work: Work, chunk: int, reason: str) -> Ruling:
        """Take the chunk apart: from now on its rows are leased, each alone."""
        if work.position in self._left_out:
            raise TeacherError(
                f"chunk {chunk} cannot be made although each of its sequences could be computed "
                "alone; the last attempt ended with: "
                f"{reason}. Every other published chunk is kept: see whether it exhausts the "
                "memory of its teacher "
                "(teacher.batch_sequences, teacher.block_tokens), and run again to go on from here."
            )
        rows = range(self._num_rows(chunk))
        self._examinations[work.position] = _Examination(set(rows), [], reason)
        return Ruling([self._close(work)], [Work(work.position, row) for row in rows])

    def _refuse_a_general_failure(self, work: Work, chunk: int, reason: str) -> None:
        """Raise TeacherError where more rows are in doubt than may be set aside: then the fault is
        in no single one of them."""
        examination = self._examinations[work.position]
        doubtful = [
            row
            for row in sorted(examination.undecided)
            if self._against[Work(work.position, row)] >= RAISED
        ]
        if self.num_set_aside + len(doubtful) > self._budget.max_set_aside:
            shown = ", ".join(map(str, sorted([*examination.condemned, *doubtful])))
            raise TeacherError(
                f"chunk {chunk} failed {self._budget.max_failures} times, and then its sequences "
                f"did one by one (rows {shown}), "
                f"last with: {reason}. With {self.num_set_aside} set aside that is more than "
                "teacher.max_set_aside, "
                f"which is {self._budget.max_set_aside}. Every published chunk is kept: mend the "
                "cause and run again to go on from here."
            )

    def _condemn(self, work: Work, chunk: int, reason: str) -> Ruling:
        examination = self._examinations[work.position]
        examination.undecided.remove(work.row)
        examination.condemned.append(work.row)
        examination.reason = reason
        self.num_set_aside += 1
        return self._conclude(work, chunk)

    def _conclude(self, decided: Work, chunk: int) -> Ruling:
        """Once every row is decided the chunk is leased again, without the condemned ones and with
        its budget as new."""
        closed, examination = [self._close(decided)], self._examinations[decided.position]
        if examination.undecided:
            return Ruling(closed)
        del self._examinations[decided.position]
        condemned = tuple(sorted(examination.condemned))
        self._left_out[decided.position] = frozenset(condemned)
        return Ruling(
            closed,
            [Work(decided.position)],
            SetAside(chunk, condemned, examination.reason) if condemned else None,
        )
