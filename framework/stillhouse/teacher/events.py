"""What a pool and its crew say to each other, and what the pool hears from outside: its seams, which know neither Ray nor time."""

from dataclasses import dataclass
from typing import Protocol

from stillhouse.cluster.coordinator import News
from stillhouse.sequence import WorkItem
from stillhouse.teacher.actor import Answer, Ready


@dataclass(frozen=True, slots=True)
class Started:
    """A teacher passed its start-up check."""

    teacher: int
    ready: Ready


@dataclass(frozen=True, slots=True)
class Answered:
    teacher: int
    lease: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Raised:
    """The teacher lives, but its start (lease None) or its work raised."""

    teacher: int
    lease: int | None
    error: BaseException


@dataclass(frozen=True, slots=True)
class Died:
    """The teacher is gone, with all that it held. Told once."""

    teacher: int
    reason: str
    with_machine: bool = False  # its whole machine is gone
    preempted: bool = False  # and was taken away on purpose


Event = Started | Answered | Raised | Died


class Crew(Protocol):
    """What starts teachers, under numbers that the pool chooses, and talks to them. A teacher does its work in the order of `submit`."""

    def spawn(self, teacher: int) -> None:
        """Begin to start a teacher; it may wait for a place without end."""
        ...

    def submit(self, teacher: int, lease: int, item: WorkItem, *, publish: bool) -> None: ...

    def kill(self, teacher: int) -> None:
        """End a teacher. Nothing is heard of it any more."""
        ...

    def events(self, *, timeout_s: float) -> list[Event]:
        """All that has happened; waits for the first of it, no longer than the timeout."""
        ...


class Inbox(Protocol):
    """Where students and machines leave their messages; a Coordinator is one."""

    def read(self) -> News: ...
