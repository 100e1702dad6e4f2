"""A run's coordinator: one small actor through which students answer the teacher pool and the
driver. It takes no tensors.

It holds how far readers are, which chunks they found damaged, which machines announced their end,
and the heartbeats of all ranks. Ray starts it again where its process dies; what is lost with it is
told again. It lives beside the driver, so it also writes down what ranks on other machines have to
say: the run directory need not be shared.

No machine's clock is compared with another's: a deadline travels as seconds left, and the
coordinator has its own monotonic clock.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stillhouse.cluster.environment import learn_secrets
from stillhouse.cluster.head_process import GONE
from stillhouse.cluster.preemption import PreemptionNotice, Source
from stillhouse.errors import HeadGoneError, StillhouseError, StoreError
from stillhouse.redaction import scrub
from stillhouse.tracking import Journal, Row, scrubbed
from stillhouse.tracking.log import LogPlace, handed_on, process_log

_log = logging.getLogger(__name__)

# Loading, reading a chunk that is there, awaiting chunks, computing, copying its state, awaiting
# the store.
Phase = Literal["start", "reading", "data", "step", "snapshot", "commit"]
Cause = Literal["died", "stalled", "notice", "grown", "stop"]

_P = ParamSpec("_P")
_Answer = TypeVar("_Answer")

_MOST_ANSWERS = 256  # that are remembered: those of some seconds


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank's heartbeat."""

    group: str  # the role that it trains
    rank: int
    world_size: int  # ranks in its group
    node: str  # Ray's node id
    pid: int
    step: int  # that it is in, counted from 1
    phase: Phase
    phase_s: float  # seconds since it entered the phase
    stack: str = ""  # of its threads, once the phase lasts too long
    chunk: int | None = None  # that it is reading


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat, and how long ago it came, by the coordinator's clock."""

    heartbeat: Heartbeat
    ago_s: float


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A group is asked to commit what it has and to leave: on notice, to come back larger, or for
    good (stop)."""

    cause: Cause
    seconds_left: float  # to commit and to leave, from when this was received
    detail: str


@dataclass(frozen=True, slots=True)
class PreviousAttempt:
    """How a group's life before this one ended."""

    cause: Cause
    detail: str
    last_step: int  # taken before the end
    seconds_ago: float  # that this step was taken, when the next life began
    num_failures: (
        int  # lives in a row that were lost without a new commit, this one's predecessor included
    )


@dataclass(frozen=True, slots=True)
class News:
    """What has come in for the teacher pool."""

    # reader -> chunks at the front of the reading order that it will never need again
    cursors: Mapping[str, int]
    bad_chunks: frozenset[int]  # reported since the last look
    notices: Mapping[str, PreemptionNotice]  # node id -> the end that it announced
    # numbers of those that gave a heartbeat since the last look
    heard_teachers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Ending:
    """A notice as it travels between machines, whose clocks may differ."""

    source: Source
    seconds_left: float
    detail: str


class CoordinatorActor:
    """What the actor is. `clock` gives seconds from any beginning, and never goes back."""

    def __init__(
        self,
        journal: Path | None,
        *,
        log: LogPlace | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        learn_secrets()
        self._log = None if log is None else process_log("coordinator", log)
        if self._log is not None:
            self._log.__enter__()
        self._journal = None if journal is None else Journal(journal)
        self._clock = clock
        self._cursors: dict[str, int] = {}
        self._bad_chunks: set[int] = set()
        self._heard_teachers: set[int] = set()
        self._endings: dict[str, tuple[float, _Ending]] = {}  # each with its deadline, by the clock
        self._groups: dict[str, _Group] = {}
        self._verdict: StillhouseError | None = None
        self._finished = False
        self._words: list[str] = []
        self._answers: dict[str, Any] = {}  # the newest ones, by question

    def once(self, question: str, method: str, *arguments: Any, **named: Any) -> Any:
        """What a method returns to the question of this id. Asked again, because the answer was
        lost on its way, it acts no second time."""
        if question not in self._answers:
            self._answers[question] = getattr(self, method)(*arguments, **named)
            if len(self._answers) > _MOST_ANSWERS:
                del self._answers[next(iter(self._answers))]
        return self._answers[question]

    def record(self, row: Row) -> None:
        assert self._journal is not None
        self._journal.record(row)

    def mention(self, row: Row) -> None:
        if self._journal is not None:
            with suppress(StoreError):
                self._journal.record(row)

    def say(self, words: str) -> None:
        self._words.append(words)

    def words(self) -> list[str]:
        """For the driver, which alone asks: what has come in to be said."""
        words, self._words = self._words, []
        return words

    def relay(self, line: str) -> None:
        _log.warning("%s", line)

    def move_cursor(self, reader: str, num_chunks: int) -> None:
        """`reader` will never again need the first `num_chunks` chunks of the reading order."""
        self._cursors[reader] = num_chunks

    def report_bad_chunk(self, number: int) -> None:
        """A reader found chunk `number` damaged."""
        self._bad_chunks.add(number)

    def heartbeat_of_teacher(self, number: int) -> None:
        """A teacher's heartbeat, under the number that the pool gave it."""
        self._heard_teachers.add(number)

    def announce(self, node: str, ending: _Ending) -> None:
        if node not in self._endings:
            self._endings[node] = (self._clock() + ending.seconds_left, ending)
            _log.info(
                "node %s ends in %.0f s: %s: %s",
                node,
                ending.seconds_left,
                ending.source,
                ending.detail,
            )

    def notices(self) -> dict[str, _Ending]:
        now = self._clock()
        return {
            node: replace(ending, seconds_left=at - now)
            for node, (at, ending) in self._endings.items()
        }

    def read(self) -> tuple[dict[str, int], frozenset[int], dict[str, _Ending], frozenset[int]]:
        bad_chunks, self._bad_chunks = self._bad_chunks, set()
        heard, self._heard_teachers = self._heard_teachers, set()
        return dict(self._cursors), frozenset(bad_chunks), self.notices(), frozenset(heard)

    def begin(self, group: str, committed_step: int) -> PreviousAttempt | None:
        """A group begins, from this commit; None where it is the first time on this coordinator.
        One rank calls this."""
        past = self._group(group).begin(committed_step)
        _log.info(
            "the %s's ranks begin at step %d; their life before: %s", group, committed_step, past
        )
        return past

    def stepped(self, group: str, step: int) -> None:
        """The group has taken its `step`-th step."""
        self._group(group).stepped(step)

    def heartbeat(self, heartbeat: Heartbeat) -> StopRequest | None:
        """Give a heartbeat; what comes back asks the whole group to leave."""
        now, group = self._clock(), self._group(heartbeat.group)
        group.heartbeats[heartbeat.rank] = (heartbeat, now)
        return group.stop_request(now) or _stop_request_of(
            self.notices(), [heard.node for heard, _ in group.heartbeats.values()]
        )

    def heard(self, group: str) -> list[Heard]:
        """The last heartbeat of each rank of a group."""
        now = self._clock()
        heartbeats = self._groups[group].heartbeats.values() if group in self._groups else ()
        return [Heard(heartbeat, now - at) for heartbeat, at in heartbeats]

    def forget(self, group: str, *, rank: int | None = None) -> None:
        """This rank of a group is done, or all of them are gone: silence means nothing from now
        on."""
        heartbeats = self._groups[group].heartbeats if group in self._groups else {}
        for each in list(heartbeats) if rank is None else [rank]:
            heartbeats.pop(each, None)

    def request_stop(self, group: str, stop_request: StopRequest) -> None:
        """Ask a group to commit and leave; what it is asked last counts."""
        self._group(group).request_stop(stop_request, self._clock())

    def explain(self, group: str, cause: Cause, detail: str) -> None:
        self._group(group).explain(cause, detail)
        _log.info("the %s's ranks end: %s: %s", group, cause, detail)

    def departure(self) -> Cause | None:
        """Why the group that was last at work left on a stop request; None where none did."""
        return next(
            (group.departure for group in self._groups.values() if group.departure is not None),
            None,
        )

    def finish(self) -> None:
        """All that was to be trained is trained and committed."""
        self._finished = True

    def finished(self) -> bool:
        """Whether a rank has said so."""
        return self._finished

    def give_up(self, error: StillhouseError) -> None:
        """Training failed in a way that would only come again; the first error stands."""
        self._verdict = self._verdict or error
        _log.info("training is given up: %s", error)

    def verdict(self) -> StillhouseError | None:
        """Why training was given up; None where it was not."""
        return self._verdict

    def _group(self, name: str) -> "_Group":
        return self._groups.setdefault(name, _Group(self._clock))


class _Group:
    """The lives of one group of ranks, from loss to loss."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.heartbeats: dict[int, tuple[Heartbeat, float]] = {}
        self._clock = clock
        self._stop_request: tuple[float, StopRequest] | None = (
            None  # with its deadline, by the clock
        )
        self._why: tuple[Cause, str] | None = None
        self._last: tuple[int, float] = (0, clock())
        self._begun_from: int | None = None
        self._num_failures = 0

    def request_stop(self, stop_request: StopRequest, now: float) -> None:
        self._stop_request = (now + stop_request.seconds_left, stop_request)

    def stop_request(self, now: float) -> StopRequest | None:
        return (
            None
            if self._stop_request is None
            else replace(self._stop_request[1], seconds_left=self._stop_request[0] - now)
        )

    def stepped(self, step: int) -> None:
        self._last = (step, self._clock())

    def explain(self, cause: Cause, detail: str) -> None:
        if self._why is None:  # ranks that fail because another did have nothing to add
            self._why = (cause, detail)

    @property
    def departure(self) -> Cause | None:
        cause = self._why[0] if self._why is not None else None
        return cause if cause in ("notice", "grown", "stop") else None

    def begin(self, committed_step: int) -> PreviousAttempt | None:
        before, self._begun_from = self._begun_from, committed_step
        (cause, detail), self._why = (
            self._why or ("died", "a rank was killed, or its machine"),
            None,
        )
        self.heartbeats.clear()
        if self._stop_request is not None and self._stop_request[1].cause != "stop":
            self._stop_request = None
        if before is None:
            self.stepped(committed_step)
            return None
        if committed_step > before or cause in ("notice", "grown"):
            self._num_failures = 0
        self._num_failures += cause in ("died", "stalled")
        last_step, at = self._last
        return PreviousAttempt(cause, detail, last_step, self._clock() - at, self._num_failures)


def _stop_request_of(endings: Mapping[str, _Ending], nodes: list[str]) -> StopRequest | None:
    """The first end that one of the group's machines announced."""
    ours = [endings[node] for node in nodes if node in endings]
    first = min(ours, key=lambda ending: ending.seconds_left, default=None)
    return (
        None
        if first is None
        else StopRequest("notice", first.seconds_left, f"{first.source}: {first.detail}")
    )


def _relay(actor: Any, line: str) -> None:
    actor.relay.remote(line)


def _told(
    method: Callable[Concatenate[CoordinatorActor, _P], None],
) -> Callable[Concatenate["Coordinator", _P], None]:
    """The actor's method on its handle. Returns at once; nobody hears of a failure."""

    def tell(self: "Coordinator", /, *arguments: _P.args, **named: _P.kwargs) -> None:
        getattr(self._actor, method.__name__).remote(*arguments, **named)

    return tell


def _asked(
    method: Callable[Concatenate[CoordinatorActor, _P], _Answer], *, once: bool = False
) -> Callable[Concatenate["Coordinator", _P], _Answer]:
    """The actor's method on its handle, which waits for the answer. `once`: it must not act twice
    where its answer is lost."""

    def ask(self: "Coordinator", /, *arguments: _P.args, **named: _P.kwargs) -> _Answer:
        call = self._ask_once if once else self._ask
        answer: _Answer = call(method.__name__, *arguments, **named)
        return answer

    return ask


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A handle to the coordinator; it can be passed to any process. Raises HeadGoneError where the
    coordinator's machine is gone.

    The actor lives on the node of the process that made it, the driver: on another it might be
    taken away from a run that goes on. `wall` is this process's clock, which a `PreemptionNotice`
    is in. What it does is said at the actor's methods; those that are written out here translate a
    time, or keep this process's secrets in it.
    """

    _actor: Any
    wall: Callable[[], float] = field(default=time, repr=False)
    log: LogPlace | None = None  # for `process_log`, in a process that was handed this

    # For consumers and teachers
    move_cursor = _told(CoordinatorActor.move_cursor)
    report_bad_chunk = _told(CoordinatorActor.report_bad_chunk)
    heartbeat_of_teacher = _told(CoordinatorActor.heartbeat_of_teacher)

    # For groups of ranks, and those who look after them
    begin = _asked(CoordinatorActor.begin, once=True)
    stepped = _told(CoordinatorActor.stepped)
    heartbeat = _asked(CoordinatorActor.heartbeat)
    heard = _asked(CoordinatorActor.heard)
    forget = _asked(CoordinatorActor.forget)
    request_stop = _asked(CoordinatorActor.request_stop)
    departure = _asked(CoordinatorActor.departure)

    # For all
    words = _asked(CoordinatorActor.words)
    finish = _asked(CoordinatorActor.finish)
    finished = _asked(CoordinatorActor.finished)
    give_up = _asked(CoordinatorActor.give_up)
    verdict = _asked(CoordinatorActor.verdict)

    @classmethod
    def create(cls, journal: Path | None = None) -> "Coordinator":
        """A coordinator that writes rows down in this journal, a file of the driver's machine;
        without one it takes no rows."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": -1,
            "scheduling_strategy": here,
        }
        place = handed_on()
        actor = (
            ray.remote(CoordinatorActor)
            .options(**options)
            .remote(None if journal is None else journal.resolve(), log=place)
        )
        return cls(
            actor, log=None if place is None else replace(place, relay=partial(_relay, actor))
        )

    def record(self, row: Row) -> None:
        """As a Tracker: returns when the row is on the driver's disk. Raises StoreError where it
        cannot be written.

        While that disk is full it raises StoreUnavailable at once: the coordinator, which all ask,
        does not wait. This process's secrets stay in it: the coordinator does not know them.
        """
        self._ask_once("record", scrubbed(row if row.time else replace(row, time=self.wall())))

    def mention(self, row: Row) -> None:
        """Have a row written down where there is a journal that can be written. Returns at once;
        nobody hears of a failure."""
        self._actor.mention.remote(scrubbed(row if row.time else replace(row, time=self.wall())))

    def say(self, words: str) -> None:
        """Have words said on the driver's terminal, where no row can say them. Returns at once."""
        self._actor.say.remote(scrub(words))

    def announce(self, node: str, notice: PreemptionNotice) -> None:
        """The machine of Ray's node `node` will be taken away. Returns at once; the first to say so
        is believed."""
        self._actor.announce.remote(
            node, _Ending(notice.source, notice.deadline - self.wall(), notice.detail)
        )

    def notices(self) -> dict[str, PreemptionNotice]:
        """Every notice so far, by node id, in this process's time."""
        return self._in_our_time(self._ask("notices"))

    def read(self) -> News:
        """For the teacher pool, which alone reads: what has come in."""
        cursors, bad_chunks, endings, heard_teachers = self._ask_once("read")
        return News(cursors, bad_chunks, self._in_our_time(endings), heard_teachers)

    def explain(self, group: str, cause: Cause, detail: str) -> None:
        """Say why a group is about to end; the first to say so is believed."""
        self._ask("explain", group, cause, scrub(detail))

    def _ask_once(self, method: str, *arguments: object, **named: object) -> Any:
        """For what must not be done twice: see `_ask`."""
        return self._ask("once", uuid4().hex, method, *arguments, **named)

    def _ask(self, method: str, *arguments: object, **named: object) -> Any:
        """Ray calls again by itself where the coordinator's process died, or its answer was lost.
        Its machine is the driver's own."""
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments, **named))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, StillhouseError) else error) from None
        except ray.exceptions.RayError as error:
            raise HeadGoneError(GONE) from error

    def _in_our_time(self, endings: Mapping[str, _Ending]) -> dict[str, PreemptionNotice]:
        now = self.wall()
        return {
            node: PreemptionNotice(ending.source, now + ending.seconds_left, ending.detail)
            for node, ending in endings.items()
        }
