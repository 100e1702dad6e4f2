"""The search for poison rows: a chunk that failed too often is taken apart, its rows are tried one
by one, and those that fail are set aside.

A pure state machine. Its answer is a `Ruling`: which work is not wanted any more, and which has to
be done instead. A row is a sequence of a chunk.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stillhouse.errors import TeacherError
from stillhouse.pool.backlog import Work

RAISED, DIED = 3, 1  # the weight of a failure: a lost machine is seldom the chunk's fault


@dataclass(frozen=True, slots=True)
class Words:
    """What a pool's workers, their blocks and the rows of one are called in messages. The worker's
    name is also that of its section in a config."""

    worker: Literal["teacher", "writer"]
    block: str
    row: str
    memory: str  # the settings that decide how much memory a worker takes


OF_TEACHERS = Words("teacher", "chunk", "sequence", "teacher.batch_sequences, teacher.block_tokens")


@dataclass(frozen=True, slots=True)
class Budget:
    """What is tried before work is given up. A lost worker counts a third of an attempt that
    raised."""

    max_failures: int  # attempts at one chunk, and then at one of its rows
    max_set_aside: int  # rows, of all chunks together
    timeout_s: float  # for one lease
    words: Words = OF_TEACHERS

    @property
    def weight(self) -> int:
        return RAISED * self.max_failures


@dataclass(frozen=True, slots=True)
class SetAside:
    """Rows of a chunk that no worker could compute; the chunk is published without them."""

    chunk: int
    rows: tuple[int, ...]
    reason: str


class Ruling(NamedTuple):
    """What follows from an attempt."""

    closed: Sequence[Work] = ()  # not wanted any more
    opened: Sequence[Work] = ()  # to be done now
    set_aside: SetAside | None = None


@dataclass(slots=True)
class _Examination:
    """A chunk whose rows are tried one by one."""

    undecided: set[int]
    condemned: list[int]
    reason: str


class PoisonSearch:
    """Counts failures against work, examines chunks, and sets rows aside. `num_rows(chunk)` is the
    number of a chunk's rows."""

    def __init__(self, num_rows: Callable[[int], int], budget: Budget):
        self._num_rows = num_rows
        self._budget = budget
        self._against: Counter[Work] = Counter()
        self._examinations: dict[int, _Examination] = {}  # by position
        self._left_out: dict[int, frozenset[int]] = {}  # of the positions that were examined
        self.num_set_aside = 0

    def left_out(self, position: int) -> frozenset[int]:
        """The rows that are set aside, of the chunk at this position."""
        return self._left_out.get(position, frozenset())

    def weight_against(self, work: Work) -> int:
        return self._against[work]

    def wants(self, work: Work) -> bool:
        """Whether this work is still to be done for an open chunk: the chunk as a whole, or one row
        of it on trial."""
        examination = self._examinations.get(work.position)
        if examination is None:
            return work.is_whole
        return work.row in examination.undecided

    def accuse(self, work: Work, weight: int, *, chunk: int, reason: str) -> Ruling:
        """Count a failed attempt at wanted work. Raises TeacherError where rows alone cannot
        explain it."""
        self._against[work] += weight
        if not work.is_whole:
            self._refuse_a_general_failure(work, chunk, reason)
        if self._against[work] < self._budget.weight:
            return Ruling()
        if work.is_whole:
            return self._examine(work, chunk, reason)
        return self._condemn(work, chunk, reason)

    def acquit(self, work: Work, *, chunk: int) -> Ruling:
        """Clear the row on trial: it could be computed."""
        self._examinations[work.position].undecided.remove(work.row)
        return self._conclude(work, chunk)

    def end(self, position: int) -> list[Work]:
        """End the search in a chunk that is published. Returns the work that is not wanted any
        more."""
        examination = self._examinations.pop(position, None)
        rows = () if examination is None else examination.undecided
        return [self._close(work) for work in (Work(position), *(Work(position, r) for r in rows))]

    def _close(self, work: Work) -> Work:
        self._against.pop(work, None)
        return work

    def _examine(self, work: Work, chunk: int, reason: str) -> Ruling:
        """Take the chunk apart: from now on its rows are leased, each alone."""
        if work.position in self._left_out:
            words = self._budget.words
            raise TeacherError(
                f"{words.block} {chunk} cannot be made although each of its {words.row}s could be "
                f"computed alone; the last attempt ended with: {reason}. Every other published "
                f"{words.block} is kept: see whether it exhausts the memory of its {words.worker} "
                f"({words.memory}), and run again to go on from here."
            )
        rows = range(self._num_rows(chunk))
        self._examinations[work.position] = _Examination(set(rows), [], reason)
        return Ruling([self._close(work)], [Work(work.position, row) for row in rows])

    def _refuse_a_general_failure(self, work: Work, chunk: int, reason: str) -> None:
        """Raise TeacherError where more rows are in doubt than may be set aside: then no single row
        is at fault."""
        examination = self._examinations[work.position]
        doubtful = [
            row
            for row in sorted(examination.undecided)
            if self._against[Work(work.position, row)] >= RAISED
        ]
        if self.num_set_aside + len(doubtful) > self._budget.max_set_aside:
            shown = ", ".join(map(str, sorted([*examination.condemned, *doubtful])))
            words = self._budget.words
            raise TeacherError(
                f"{words.block} {chunk} failed {self._budget.max_failures} times, and then its "
                f"{words.row}s did one by one (rows {shown}), last with: {reason}. With "
                f"{self.num_set_aside} set aside that is more than {words.worker}.max_set_aside, "
                f"which is {self._budget.max_set_aside}. Every published {words.block} is kept: "
                "mend the cause and run again to go on from here."
            )

    def _condemn(self, work: Work, chunk: int, reason: str) -> Ruling:
        examination = self._examinations[work.position]
        examination.undecided.remove(work.row)
        examination.condemned.append(work.row)
        examination.reason = reason
        self.num_set_aside += 1
        return self._conclude(work, chunk)

    def _conclude(self, decided: Work, chunk: int) -> Ruling:
        """End the examination once every row is decided: the chunk is leased again as a whole,
        without the condemned rows and with a new budget."""
        closed, examination = [self._close(decided)], self._examinations[decided.position]
        if examination.undecided:
            return Ruling(closed)
        del self._examinations[decided.position]
        condemned = tuple(sorted(examination.condemned))
        self._left_out[decided.position] = frozenset(condemned)
        set_aside = SetAside(chunk, condemned, examination.reason) if condemned else None
        return Ruling(closed, [Work(decided.position)], set_aside)
