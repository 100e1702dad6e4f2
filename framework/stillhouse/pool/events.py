"""What a pool and its workers say to each other, and what the pool hears from outside: its seams,
which know neither Ray nor time."""

from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeAlias, TypeVar

from stillhouse.cluster.coordinator import News
from stillhouse.tracking import Row


class Item(Protocol):
    """What a worker needs to make one block. Its rows can be computed alone, or set aside."""

    def only(self, row: int) -> Self: ...

    def without(self, rows: frozenset[int]) -> Self: ...


class Ready(Protocol):
    """A worker's answer to its start-up check."""

    @property
    def node(self) -> str:
        """Ray's id of its machine's node."""
        ...

    def journal_row(self, worker: int) -> Row:
        """What the journal keeps of it."""
        ...


class Produced(Protocol):
    """A block that is in the store."""

    @property
    def num_tokens(self) -> int: ...

    def journal_row(self, worker: int) -> Row:
        """What the journal keeps of it."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """Another publisher was there first; nothing was computed."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A row on trial could be computed; nothing of it was published."""


Answer: TypeAlias = Produced | Found | Passed
ItemT = TypeVar("ItemT", bound=Item)
ItemT_contra = TypeVar("ItemT_contra", bound=Item, contravariant=True)
ReadyT = TypeVar("ReadyT", bound=Ready)


@dataclass(frozen=True, slots=True)
class Started(Generic[ReadyT]):
    """A worker passed its start-up check."""

    worker: int
    ready: ReadyT


@dataclass(frozen=True, slots=True)
class Answered:
    worker: int
    lease: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Raised:
    """The worker lives, but its start (lease None) or its work raised."""

    worker: int
    lease: int | None
    error: BaseException


@dataclass(frozen=True, slots=True)
class Died:
    """The worker is gone, with all that it held. Told once."""

    worker: int
    reason: str
    with_machine: bool = False  # its whole machine is gone
    preempted: bool = False  # and was taken away on purpose


Event: TypeAlias = Started[ReadyT] | Answered | Raised | Died


class Crew(Protocol[ItemT_contra, ReadyT]):
    """The worker backend: starts workers, under numbers that the pool chooses, and talks to them.

    A worker does its work in the order of `submit`.
    """

    def spawn(self, worker: int) -> None:
        """Begin to start a worker; it may wait for a place without end."""
        ...

    def submit(self, worker: int, lease: int, item: ItemT_contra, *, publish: bool) -> None: ...

    def kill(self, worker: int) -> None:
        """End a worker. Nothing is heard of it any more."""
        ...

    def events(self, *, timeout_s: float) -> list[Event[ReadyT]]:
        """All that has happened; waits for the first of it, no longer than the timeout."""
        ...


class Inbox(Protocol):
    """Where students and machines leave their messages; a Coordinator is one."""

    def read(self) -> News: ...
