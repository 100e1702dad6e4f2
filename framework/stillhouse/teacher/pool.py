"""The teacher pool: actors that come and go, work leased to them in reading order, and a window that holds them back.

No logit passes through here: an actor gets token ids, publishes a chunk, and answers with its name and size.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import ray

from stillhouse.board import Board
from stillhouse.cluster import Placement, Secrets, cause_of
from stillhouse.errors import StillhouseError, TeacherError, UserError
from stillhouse.logits import CompressedLogits
from stillhouse.store import ChunkStore, StoreUnavailable
from stillhouse.teacher.actor import Produced, Ready, TeacherJob, spawn
from stillhouse.teacher.leases import LeaseTable
from stillhouse.teacher.model import WorkItem, require_same_teacher
from stillhouse.tracking import ChunkRow, PoolRow, TeacherRow, Tracker

_ITEMS_PER_ACTOR = 2  # one in work, one waiting beside it, so that no teacher idles for a round trip
_POLL_S = 0.25
_ROW_EVERY_S = 2.0


@dataclass(slots=True)
class _Replica:
    number: int
    actor: Any
    ready: bool = False
    num_items: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    replica: _Replica
    chunk: int | None  # None: the start-up check


class TeacherPool:
    """Makes the wanted chunks with `min_replicas` to `max_replicas` teachers; `run` until it is told to stop."""

    def __init__(
        self,
        job: TeacherJob,
        *,
        where: Placement,
        secrets: Secrets,
        order: Sequence[int],
        item_of: Callable[[int], WorkItem],
        window_chunks: int,
        journal: Tracker,
    ):
        self._job, self._where, self._secrets = job, where, secrets
        self._item_of, self._window_chunks, self._journal = item_of, window_chunks, journal
        self._store = ChunkStore(job.store_url, job.recipe)
        self._table = LeaseTable(order, published=self._store.published(), max_failures=job.section.max_failures)
        self._replicas: list[_Replica] = []
        self._calls: dict[Any, _Call] = {}
        self._probe: CompressedLogits | None = None
        self._begun = False  # once `min_replicas` have been ready together, it stays begun
        self._num_spawned = 0
        self._num_lost_starting = 0
        self._tokens_since_row, self._window_wait_s = 0, 0.0
        self._last_row = self._last_look = monotonic()

    def run(self, *, readers: Collection[str], board: Board, finished: Callable[[], bool]) -> None:
        """Produce until every wanted chunk is published and `finished()`; `readers` are the students that move cursors on the board.

        Without readers nothing holds the teachers back. Raises TeacherError where a chunk or a start-up check fails too often, and what
        `finished` raises as soon as it does: behind a closed window a student that has failed would be waited for without end.
        """
        cursors: dict[str, int] = {}
        if self._table.done:
            self._record(force=True)  # that there is nothing to make
        try:
            while not (finished() and self._table.done):
                news = board.read()
                cursors.update(news.cursors)
                for number in news.bad_chunks:
                    self._replace(number)
                slowest = min((cursors.get(reader, 0) for reader in readers), default=self._table.num_wanted)
                self._advance(limit=slowest + self._window_chunks)
        finally:
            self._release()

    def _advance(self, *, limit: int) -> None:
        """One round: staff the pool, hand out what may be handed out, and take in answers for a moment."""
        if self._table.done:
            self._release()  # the processors are the students' now
        else:
            self._staff()
        self._begun = self._begun or sum(replica.ready for replica in self._replicas) >= self._job.section.min_replicas
        for replica in self._replicas if self._begun else ():
            while replica.ready and replica.num_items < _ITEMS_PER_ACTOR and (number := self._table.lease(limit=limit)) is not None:
                self._submit(replica, number)
        self._take_in()
        now = monotonic()
        if self._table.held_back(limit=limit) and not self._table.num_leased:
            self._window_wait_s += now - self._last_look
        self._last_look = now
        self._record()

    def _staff(self) -> None:
        """Fill the pool up, but not with more teachers than there are chunks to make."""
        fewest = 1 if self._begun else self._job.section.min_replicas
        wanted = min(self._job.section.max_replicas, max(fewest, self._table.num_wanted - self._table.num_published))
        for _ in range(wanted - len(self._replicas)):
            replica = _Replica(self._num_spawned, spawn(self._job, where=self._where, secrets=self._secrets))
            self._num_spawned += 1
            self._replicas.append(replica)
            self._calls[replica.actor.start.remote()] = _Call(replica, None)

    def _submit(self, replica: _Replica, number: int) -> None:
        replica.num_items += 1
        self._calls[replica.actor.produce.remote(self._item_of(number))] = _Call(replica, number)

    def _take_in(self) -> None:
        if not self._calls:
            sleep(_POLL_S)  # the window is closed, or the students are still at it
            return
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=_POLL_S)
        for reference in done:
            call = self._calls.pop(reference)
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                self._fail(call, cause_of(error))
            except ray.exceptions.RayError as error:  # the actor died, or its node, or its answer, or memory ran out there
                self._lose(call, str(error))
            else:
                self._accept(call, answer)

    def _accept(self, call: _Call, answer: Ready | Produced) -> None:
        if isinstance(answer, Ready):
            if self._probe is None:
                self._probe = answer.probe
            require_same_teacher(self._probe, answer.probe, replica=call.replica.number)
            call.replica.ready = True
            self._num_lost_starting = 0
            self._journal.record(TeacherRow(call.replica.number, answer.seconds, answer.device, answer.topk))
            return
        call.replica.num_items -= 1
        self._table.publish(answer.ref.number)
        self._tokens_since_row += answer.ref.num_tokens
        self._journal.record(
            ChunkRow(
                chunk=answer.ref.number,
                num_tokens=answer.ref.num_tokens,
                num_bytes=answer.ref.num_bytes,
                seconds=answer.seconds,
                replica=call.replica.number,
                kept_mass=answer.fidelity.kept_mass,
                codec_kl=answer.fidelity.codec_kl,
                worst_kl=answer.fidelity.worst_kl,
                duplicate=answer.ref.duplicate,
            )
        )
        if self._table.done:
            self._record(force=True)

    def _fail(self, call: _Call, cause: BaseException) -> None:
        """The teacher lives, but raised."""
        if call.chunk is None:
            if not self._begun:  # every other teacher would most likely meet the same
                raise cause if isinstance(cause, StillhouseError) else TeacherError(f"a teacher could not start: {cause!r}") from cause
            self._lose(call, repr(cause))
            return
        if isinstance(cause, UserError) and not isinstance(cause, StoreUnavailable):
            raise cause  # a store without permission: every other attempt would meet it too
        call.replica.num_items -= 1
        if not isinstance(cause, StillhouseError):
            self._retire(call.replica)  # after an error on the GPU nothing works in that process any more
        self._table.fail(call.chunk, f"{type(cause).__name__}: {cause}")

    def _lose(self, call: _Call, reason: str) -> None:
        """The teacher is gone, with all that it held; whoever staffs the pool next replaces it."""
        self._retire(call.replica)
        if call.chunk is not None:
            self._table.lose(call.chunk, reason)
            return
        self._num_lost_starting += 1
        section = self._job.section
        if self._num_lost_starting >= section.max_failures * section.max_replicas and not any(other.ready for other in self._replicas):
            raise TeacherError(
                f"{self._num_lost_starting} teachers died one after the other while they started, the last with: {reason}; "
                "does the model fit into the memory of their machines?"
            )

    def _retire(self, replica: _Replica) -> None:
        """Give up on a teacher: what else it held comes back as lost."""
        if replica in self._replicas:
            self._replicas.remove(replica)
            ray.kill(replica.actor)

    def _replace(self, number: int) -> None:
        """A reader found the chunk damaged. The store looks before it believes: readers may err, and two may report the same chunk."""
        if self._store.quarantine(number):
            self._table.reopen(number)

    def _record(self, *, force: bool = False) -> None:
        now = monotonic()
        seconds = now - self._last_row
        if not force and (seconds < _ROW_EVERY_S or self._table.done):
            return
        self._journal.record(
            PoolRow(
                published=self._table.num_published,
                needed=self._table.num_wanted,
                in_flight=self._table.num_leased,
                window_chunks=min(self._window_chunks, self._table.num_wanted),
                tokens_per_s=self._tokens_since_row / max(seconds, 1e-9),
                window_wait_s=self._window_wait_s,
                failures=self._table.num_failures,
            )
        )
        self._last_row, self._tokens_since_row = now, 0

    def _release(self) -> None:
        for replica in self._replicas:
            ray.kill(replica.actor)
        for call in self._calls.values():
            if call.chunk is not None:
                self._table.hand_back(call.chunk)
        self._replicas.clear()
        self._calls.clear()
