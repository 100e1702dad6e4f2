"""A run's coordinator: the handle through which every process calls its one small Ray actor.

See `CoordinatorActor` for what the actor holds and where it runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import time
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stillhouse.cluster.coordinator_actor import CoordinatorActor, RelativeNotice
from stillhouse.cluster.head_process import GONE
from stillhouse.cluster.heartbeat import Cause
from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.errors import HeadGoneError, StillhouseError
from stillhouse.redaction import scrub
from stillhouse.tracking import RunEvent, scrubbed
from stillhouse.tracking.log import LogPlace, handed_on

_P = ParamSpec("_P")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class News:
    """What the teacher pool reads from the coordinator."""

    # consumer -> chunks at the front of the reading order that it will never need again
    cursors: Mapping[str, int]
    bad_chunks: frozenset[int]  # reported since the last read
    notices: Mapping[str, PreemptionNotice]  # by node id
    # numbers of the teachers that gave a heartbeat since the last read
    heard_teachers: frozenset[int] = frozenset()


def _relay(actor: Any, line: str) -> None:
    actor.relay.remote(line)


def _one_way(
    method: Callable[Concatenate[CoordinatorActor, _P], None],
) -> Callable[Concatenate["Coordinator", _P], None]:
    """The actor's method on its handle. Returns at once; a failure is not reported."""

    def send(self: "Coordinator", /, *arguments: _P.args, **named: _P.kwargs) -> None:
        getattr(self._actor, method.__name__).remote(*arguments, **named)

    return send


def _answered(
    method: Callable[Concatenate[CoordinatorActor, _P], _Answer], *, once: bool = False
) -> Callable[Concatenate["Coordinator", _P], _Answer]:
    """The actor's method on its handle, which waits for the answer. `once`: the method must not act
    twice where its answer is lost."""

    def ask(self: "Coordinator", /, *arguments: _P.args, **named: _P.kwargs) -> _Answer:
        call = self._ask_once if once else self._ask
        answer: _Answer = call(method.__name__, *arguments, **named)
        return answer

    return ask


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A handle to the coordinator; it can be passed to any process. Raises HeadGoneError where the
    coordinator's machine is gone.

    The actor runs on the node of the process that made it, the driver: another node might be taken
    away from a run that goes on. `wall` is this process's clock, in which a `PreemptionNotice` has
    its deadline. Methods are documented at the actor; those that are written out here translate a
    time, or remove this process's secrets from what they send.
    """

    _actor: Any
    wall: Callable[[], float] = field(default=time, repr=False)
    log: LogPlace | None = None  # for `process_log`, in a process that was given this handle

    # For consumers and teachers
    move_cursor = _one_way(CoordinatorActor.move_cursor)
    report_bad_chunk = _one_way(CoordinatorActor.report_bad_chunk)
    heartbeat_of_worker = _one_way(CoordinatorActor.heartbeat_of_worker)

    # For groups of ranks, and those who watch them
    begin = _answered(CoordinatorActor.begin, once=True)
    stepped = _one_way(CoordinatorActor.stepped)
    heartbeat = _answered(CoordinatorActor.heartbeat)
    heard = _answered(CoordinatorActor.heard)
    forget = _answered(CoordinatorActor.forget)
    request_stop = _answered(CoordinatorActor.request_stop)
    exit_reason = _answered(CoordinatorActor.exit_reason)

    # For all
    take_messages = _answered(CoordinatorActor.take_messages)
    finish = _answered(CoordinatorActor.finish)
    finished = _answered(CoordinatorActor.finished)
    give_up = _answered(CoordinatorActor.give_up)
    fatal_error = _answered(CoordinatorActor.fatal_error)

    @classmethod
    def create(cls, journal: Path | None = None) -> "Coordinator":
        """Start a coordinator that writes rows into this journal, a file of the driver's machine;
        without one it takes no rows."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(CoordinatorActor).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
        )
        log = handed_on()
        actor = remote.remote(None if journal is None else journal.resolve(), log=log)
        return cls(actor, log=None if log is None else replace(log, relay=partial(_relay, actor)))

    def record(self, event: RunEvent) -> None:
        """As a Tracker: returns when the row is on the driver's disk. Raises StoreError where it
        cannot be written.

        While that disk is full it raises StoreUnavailable at once: the coordinator, which all
        processes call, does not wait.
        """
        self._ask_once("record", self._sendable(event))

    def mention(self, event: RunEvent) -> None:
        """Write a row where there is a journal that can be written. Returns at once; a failure is
        not reported."""
        self._tell_once("mention", self._sendable(event))

    def say(self, message: str) -> None:
        """Print a message on the driver's terminal, for what no row holds. Returns at once."""
        self._tell_once("say", scrub(message))

    def announce(self, node: str, notice: PreemptionNotice) -> None:
        """The machine of Ray's node `node` will be taken away. Returns at once; the first notice
        for a node stands."""
        seconds_left = notice.deadline - self.wall()
        self._actor.announce.remote(
            node, RelativeNotice(notice.source, seconds_left, notice.detail)
        )

    def notices(self) -> dict[str, PreemptionNotice]:
        """Every notice so far, by node id, in this process's time."""
        return self._in_our_time(self._ask("notices"))

    def read(self) -> News:
        """For the teacher pool alone: the news since its last call."""
        cursors, bad_chunks, notices, heard_teachers = self._ask_once("read")
        return News(cursors, bad_chunks, self._in_our_time(notices), heard_teachers)

    def explain(self, group: str, cause: Cause, detail: str) -> None:
        """Why a group's attempt is about to end; see `RankGroup.explain`."""
        self._ask("explain", group, cause, scrub(detail))

    def _sendable(self, event: RunEvent) -> RunEvent:
        """The row with its time, and without this process's secrets, which the coordinator does not
        know."""
        return scrubbed(event if event.time else replace(event, time=self.wall()))

    def _tell_once(self, method: str, argument: object) -> None:
        """Call a method that must not act twice. Returns at once."""
        self._actor.once.remote(uuid4().hex, method, argument)

    def _ask_once(self, method: str, *arguments: object, **named: object) -> Any:
        """As `_ask`, for a method that must not act twice."""
        return self._ask("once", uuid4().hex, method, *arguments, **named)

    def _ask(self, method: str, *arguments: object, **named: object) -> Any:
        """Call the actor and wait. Ray itself calls again where the actor's process died, or its
        answer was lost. The actor's machine is the driver's own."""
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments, **named))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, StillhouseError) else error) from None
        except ray.exceptions.RayError as error:
            raise HeadGoneError(GONE) from error

    def _in_our_time(self, notices: Mapping[str, RelativeNotice]) -> dict[str, PreemptionNotice]:
        now = self.wall()
        return {
            node: PreemptionNotice(notice.source, now + notice.seconds_left, notice.detail)
            for node, notice in notices.items()
        }
