"""The coordinator's Ray actor: the state of a run that students, teachers, the teacher pool and the
driver share. It takes no tensors.

It holds how far consumers are, which chunks they found damaged, which machines announced their end,
and the heartbeats of all ranks. Ray starts it again where its process dies; what is lost with it is
sent again. It runs on the driver's machine, so it also writes the journal for ranks on other
machines: the run directory need not be shared.

No machine's clock is compared with another's: a deadline travels as seconds left, and the
coordinator has its own monotonic clock.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from stillhouse.cluster.environment import learn_secrets
from stillhouse.cluster.heartbeat import Cause, Heard, Heartbeat, PreviousAttempt, StopRequest
from stillhouse.cluster.preemption import Source
from stillhouse.cluster.rank_group import RankGroup
from stillhouse.errors import StillhouseError, StoreError
from stillhouse.tracking import Journal, RunEvent
from stillhouse.tracking.log import LogPlace, process_log

_log = logging.getLogger(__name__)

_MOST_ANSWERS = 256  # that are remembered: those of some seconds


@dataclass(frozen=True, slots=True)
class RelativeNotice:
    """A preemption notice as it travels between machines, whose clocks may differ."""

    source: Source
    seconds_left: float
    detail: str


class CoordinatorActor:
    """The methods of the actor; `Coordinator` is a process's handle to it. `clock` gives seconds
    from any beginning, and never goes back."""

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
        self._notices: dict[str, tuple[RelativeNotice, float]] = {}  # by node, with the deadline
        self._groups: dict[str, RankGroup] = {}
        self._fatal_error: StillhouseError | None = None
        self._finished = False
        self._messages: list[str] = []
        self._answers: dict[str, Any] = {}  # the newest ones, by question

    def once(self, question: str, method: str, *arguments: Any, **named: Any) -> Any:
        """The answer of a method to the question of this id. A question that comes again, because
        its answer was lost, gets the same answer, and the method acts no second time."""
        if question not in self._answers:
            self._answers[question] = getattr(self, method)(*arguments, **named)
            if len(self._answers) > _MOST_ANSWERS:
                del self._answers[next(iter(self._answers))]
        return self._answers[question]

    # The journal and the driver's terminal

    def record(self, event: RunEvent) -> None:
        assert self._journal is not None
        self._journal.record(event)

    def mention(self, event: RunEvent) -> None:
        if self._journal is not None:
            with suppress(StoreError):
                self._journal.record(event)

    def say(self, message: str) -> None:
        self._messages.append(message)

    def take_messages(self) -> list[str]:
        """For the driver alone: the messages since its last call."""
        messages, self._messages = self._messages, []
        return messages

    def relay(self, line: str) -> None:
        """Log a line of another process."""
        _log.warning("%s", line)

    # News for the teacher pool

    def move_cursor(self, consumer: str, num_chunks: int) -> None:
        """`consumer` will never again need the first `num_chunks` chunks of the reading order."""
        self._cursors[consumer] = num_chunks

    def report_bad_chunk(self, number: int) -> None:
        """A consumer found chunk `number` damaged."""
        self._bad_chunks.add(number)

    def heartbeat_of_worker(self, number: int) -> None:
        """A heartbeat of a teacher or a writer, under the number that the pool gave it."""
        self._heard_teachers.add(number)

    def read(
        self,
    ) -> tuple[dict[str, int], frozenset[int], dict[str, RelativeNotice], frozenset[int]]:
        """The arguments of a `News`, with the notices as they travel. For the pool alone."""
        bad_chunks, self._bad_chunks = self._bad_chunks, set()
        heard, self._heard_teachers = self._heard_teachers, set()
        return dict(self._cursors), frozenset(bad_chunks), self.notices(), frozenset(heard)

    # Machines that will be taken away

    def announce(self, node: str, notice: RelativeNotice) -> None:
        if node not in self._notices:
            self._notices[node] = (notice, self._clock() + notice.seconds_left)
            words = f"{notice.source}: {notice.detail}"
            _log.info("node %s ends in %.0f s: %s", node, notice.seconds_left, words)

    def notices(self) -> dict[str, RelativeNotice]:
        now = self._clock()
        return {
            node: replace(notice, seconds_left=deadline - now)
            for node, (notice, deadline) in self._notices.items()
        }

    # Groups of ranks

    def begin(self, group: str, committed_step: int) -> PreviousAttempt | None:
        """A group begins an attempt, from this commit; None where it is the first one that this
        coordinator knows. One rank calls this."""
        previous = self._group(group).begin(committed_step)
        _log.info(
            "the %s's ranks begin at step %d; previous attempt: %s", group, committed_step, previous
        )
        return previous

    def stepped(self, group: str, step: int) -> None:
        """The group has taken its `step`-th step."""
        self._group(group).stepped(step)

    def heartbeat(self, heartbeat: Heartbeat) -> StopRequest | None:
        """Receive a heartbeat. Returns the stop request to the whole group: the one that was made,
        or the earliest end that one of its machines announced."""
        group = self._group(heartbeat.group)
        group.receive(heartbeat)
        if (request := group.stop_request()) is not None:
            return request
        notices, nodes = self.notices(), [heard.heartbeat.node for heard in group.heard()]
        ours = [notices[node] for node in nodes if node in notices]
        first = min(ours, key=lambda notice: notice.seconds_left, default=None)
        if first is None:
            return None
        return StopRequest("notice", first.seconds_left, f"{first.source}: {first.detail}")

    def heard(self, group: str) -> list[Heard]:
        """The last heartbeat of each rank of a group."""
        return self._groups[group].heard() if group in self._groups else []

    def forget(self, group: str, *, rank: int | None = None) -> None:
        """This rank of a group is done, or all of them are gone: their silence means nothing from
        now on."""
        if group in self._groups:
            self._groups[group].forget(rank)

    def request_stop(self, group: str, stop_request: StopRequest) -> None:
        """Request a group to commit and leave; the last request counts."""
        self._group(group).request_stop(stop_request)

    def explain(self, group: str, cause: Cause, detail: str) -> None:
        self._group(group).explain(cause, detail)
        _log.info("the %s's ranks end: %s: %s", group, cause, detail)

    def exit_reason(self) -> Cause | None:
        """Why a group left on a stop request and did not begin again; None where none did."""
        reasons = (group.exit_reason for group in self._groups.values())
        return next((reason for reason in reasons if reason is not None), None)

    # The end of training

    def finish(self) -> None:
        """All that was to be trained is trained and committed."""
        self._finished = True

    def finished(self) -> bool:
        """Whether a rank has called `finish`."""
        return self._finished

    def give_up(self, error: StillhouseError) -> None:
        """Training failed in a way that another attempt would repeat; the first error stands."""
        self._fatal_error = self._fatal_error or error
        _log.info("training is given up: %s", error)

    def fatal_error(self) -> StillhouseError | None:
        """Why training was given up; None where it was not."""
        return self._fatal_error

    def _group(self, name: str) -> RankGroup:
        return self._groups.setdefault(name, RankGroup(self._clock))
