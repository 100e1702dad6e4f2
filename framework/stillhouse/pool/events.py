"""The protocols of a pool: what it needs of its workers, of their backend and of the coordinator,
and the events that it receives. Neither Ray nor time is known here."""

from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeAlias, TypeVar

from stillhouse.cluster.coordinator import News
from stillhouse.tracking import RunEvent


class Item(Protocol):
    """What a worker needs to make one block, of which rows can be left out."""

    def only(self, row: int) -> Self: ...

    def without(self, rows: frozenset[int]) -> Self: ...


class Ready(Protocol):
    """A worker's answer to its start-up check."""

    @property
    def node(self) -> str:
        """Ray's id of its machine's node."""
        ...

    def journal_event(self, worker: int) -> RunEvent:
        """The journal's event."""
        ...


class Produced(Protocol):
    """A worker's answer: it published the block."""

    @property
    def num_tokens(self) -> int: ...

    def journal_event(self, worker: int) -> RunEvent:
        """The journal's event."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """A worker's answer: the block was in the store already; nothing was computed."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A worker's answer: the row on trial could be computed; nothing of it was published."""


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
class Computed:
    """A worker has computed a block, and goes on to the next while it publishes this one: its
    answer is still to come."""

    worker: int
    lease: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A worker ended the work of a lease."""

    worker: int
    lease: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Raised:
    """A worker's start (`lease` is None) or its work raised; its process is still there."""

    worker: int
    lease: int | None
    error: BaseException


@dataclass(frozen=True, slots=True)
class Died:
    """A worker is gone, with all its leases. There is one such event for it."""

    worker: int
    reason: str
    with_machine: bool = False  # its whole machine is gone
    preempted: bool = False  # and was taken away on purpose


Event: TypeAlias = Started[ReadyT] | Computed | Answered | Raised | Died


class WorkerBackend(Protocol[ItemT_contra, ReadyT]):
    """Starts workers, under numbers that the pool chooses, and passes work and events.

    A worker does its work in the order of `submit`. One that computes the next block while it
    publishes the one before has an event `Computed` for each.
    """

    def spawn(self, worker: int) -> None:
        """Begin to start a worker. Returns at once: the worker may wait for a free machine for any
        time."""
        ...

    def submit(self, worker: int, lease: int, item: ItemT_contra, *, publish: bool) -> None: ...

    def kill(self, worker: int) -> None:
        """End a worker. It has no events any more."""
        ...

    def events(self, *, timeout_s: float) -> list[Event[ReadyT]]:
        """All events so far; waits for the first one, but no longer than the timeout."""
        ...


class Inbox(Protocol):
    """Where students and machines leave messages for the pool; a Coordinator is one."""

    def read(self) -> News: ...
