"""Teachers without models, machines without hardware and hours without waiting: a crew for the real
pool, on a clock of its own.

A simulated teacher does its work in order, each piece in as long as `seconds` says, and publishes
real chunks to a real store; where that takes `publish_s`, it computes the next meanwhile. `fate`
says how a piece of work ends otherwise: with an error that it raises, or with the teacher's death.
"""

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np
import torch

from helpers.chunks import make_records
from stillhouse.cluster.coordinator import News
from stillhouse.cluster.preemption import PreemptionNotice
from stillhouse.engines.probe import Probe
from stillhouse.logits import CompressedLogits, Fidelity
from stillhouse.pool.events import Answered, Computed, Died, Event, Found, Passed, Raised, Started
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Chunk, ChunkRef, ChunkStore, Recipe
from stillhouse.teacher.actor import Produced, Ready

_ANSWER = CompressedLogits(
    token_ids_TK=torch.tensor([[0]], dtype=torch.int32),
    logprobs_TK=torch.tensor([[0.5]]).log(),
    tail_logmass_T=torch.tensor([0.5]).log(),
    tail_ids_TN=torch.empty((1, 0), dtype=torch.int32),
    vocab_size=10,
    temperature=1.0,
)
_PROBE = Probe(_ANSWER, rounding_kl=0.0, weight_hashes={})


class Death(Exception):
    """The teacher dies of its work."""


def item_of(recipe: Recipe, number: int) -> WorkItem:
    """Sequences of one token each, their number in the corpus plus 1 (modulo the vocabulary), with
    targets at all places but the last."""
    rows = recipe.chunk_rows(number)
    shape = (len(rows), recipe.sequence_length)
    token_ids_SL = np.broadcast_to(
        np.arange(rows.start + 1, rows.stop + 1, dtype=np.int32)[:, None] % recipe.vocab_size, shape
    ).copy()
    loss_mask_SL = np.ones(shape, dtype=np.uint8)
    loss_mask_SL[:, -1] = 0
    positions_SL = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    return WorkItem(number, Sequences(token_ids_SL, positions_SL, loss_mask_SL))


def publish(store: ChunkStore, item: WorkItem) -> ChunkRef:
    """What a teacher would, with random targets."""
    records = make_records(
        store.recipe.spec, item.sequences.num_targets, np.random.default_rng(item.number)
    )
    return store.publish(Chunk(item.number, item.sequences, records))


@dataclass
class _Job:
    lease: int
    item: WorkItem
    publish: bool
    found: bool = False  # the chunk was there when the teacher was about to begin


@dataclass
class _Worker:
    number: int
    node: str | None = None
    busy: bool = False
    queue: deque[_Job] = field(default_factory=deque)
    publishing: deque[_Job] = field(default_factory=deque)


@dataclass
class SimulatedCrew:
    """`nodes` says how many teachers a machine takes; machines may be added, drained and removed at
    any time, by `at`."""

    publish: Callable[[WorkItem], ChunkRef]
    is_there: Callable[[int], bool]
    nodes: dict[str, int] = field(default_factory=lambda: {"a": 10**6})
    seconds: Callable[[int, WorkItem], float] = lambda _teacher, _item: 10.0
    fate: Callable[[int, WorkItem], Exception | None] = lambda _teacher, _item: None
    publish_s: float = 0.0
    start_s: float = 5.0
    starts: Callable[[int], bool] = lambda _teacher: True  # or it hangs
    # the digest of the files that a teacher loaded
    weights: Callable[[int], str | None] = lambda _teacher: None
    drained: set[str] = field(default_factory=set)  # nodes on which nothing more is started
    now: float = 1000.0
    num_spawned: int = 0
    num_submitted: int = 0
    most_held: int = 0  # pieces of work that one teacher held at a time
    begun: list[int] = field(default_factory=list)  # chunks, once for each time that one was
    computed: list[int] = field(default_factory=list)  # to the end
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _homeless: dict[int, _Worker] = field(default_factory=dict)
    _events: list[Event[Ready]] = field(default_factory=list)
    _agenda: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)
    _sequence: Iterator[int] = field(default_factory=count)

    def clock(self) -> float:
        return self.now

    def at(self, time: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._agenda, (time, next(self._sequence), action))

    # What the pool sees of a crew.

    def spawn(self, teacher: int) -> None:
        self.num_spawned += 1
        self._workers[teacher] = self._homeless[teacher] = _Worker(teacher)
        self._find_homes()

    def submit(self, teacher: int, lease: int, item: WorkItem, *, publish: bool) -> None:
        self.num_submitted += 1
        worker = self._workers[teacher]
        worker.queue.append(_Job(lease, item, publish))
        self.most_held = max(self.most_held, len(worker.queue) + len(worker.publishing))
        self._work(worker)

    def kill(self, teacher: int) -> None:
        worker = self._workers.pop(teacher, None)
        self._homeless.pop(teacher, None)
        if worker is not None and worker.node in self.nodes:
            self.nodes[worker.node] += 1
            self._find_homes()

    def events(self, *, timeout_s: float) -> list[Event[Ready]]:
        end = self.now + timeout_s
        while not self._events and self._agenda and self._agenda[0][0] <= end:
            self._step()
        while self._agenda and self._agenda[0][0] <= self.now:
            self._step()
        if not self._events:
            self.now = end
        events, self._events = self._events, []
        return events

    # What befalls it.

    def add_node(self, node: str, places: int) -> None:
        self.nodes[node] = places
        self._find_homes()

    def remove_node(self, node: str, *, preempted: bool = False) -> None:
        del self.nodes[node]
        for worker in [worker for worker in self._workers.values() if worker.node == node]:
            self.die(worker.number, "its node went away", with_machine=True, preempted=preempted)

    def die(
        self,
        teacher: int,
        reason: str = "killed",
        *,
        with_machine: bool = False,
        preempted: bool = False,
    ) -> None:
        if teacher in self._workers:
            self.kill(teacher)
            self._events.append(Died(teacher, reason, with_machine, preempted))

    def placed(self) -> set[int]:
        """The teachers that have a place on a machine, whether they have started yet or not."""
        return self._workers.keys() - self._homeless.keys()

    def teachers_on(self, node: str) -> list[int]:
        return [worker.number for worker in self._workers.values() if worker.node == node]

    def _step(self) -> None:
        time, _, action = heapq.heappop(self._agenda)
        self.now = max(self.now, time)
        action()

    def _find_homes(self) -> None:
        for worker in [*self._homeless.values()]:
            node = next(
                (
                    node
                    for node, places in self.nodes.items()
                    if places > 0 and node not in self.drained
                ),
                None,
            )
            if node is not None:
                del self._homeless[worker.number]
                self.nodes[node] -= 1
                worker.node = node
                self.at(self.now + self.start_s, partial(self._start, worker))

    def _start(self, worker: _Worker) -> None:
        if self._workers.get(worker.number) is worker and self.starts(worker.number):
            ready = Ready(
                _PROBE,
                "cpu",
                "simulated: it is",
                self.start_s,
                str(worker.node),
                self.weights(worker.number),
            )
            self._events.append(Started(worker.number, ready))

    def _work(self, worker: _Worker) -> None:
        if worker.busy or not worker.queue:
            return
        worker.busy = True
        job = worker.queue[0]
        job.found = job.publish and self.is_there(job.item.number)
        seconds = 0.0 if job.found else self.seconds(worker.number, job.item)
        if job.publish and not job.found:
            self.begun.append(job.item.number)
        self.at(self.now + seconds, lambda: self._finish(worker, job))

    def _finish(self, worker: _Worker, job: _Job) -> None:
        if self._workers.get(worker.number) is not worker:
            return
        worker.busy = False
        worker.queue.popleft()
        if job.publish and not job.found:
            self.computed.append(job.item.number)
        fate = None if job.found else self.fate(worker.number, job.item)
        if isinstance(fate, Death):
            self.die(worker.number, str(fate))
            return
        if fate is None and job.publish and not job.found and self.publish_s > 0:
            self._events.append(Computed(worker.number, job.lease))
            worker.publishing.append(job)
            if len(worker.publishing) == 1:
                self.at(self.now + self.publish_s, partial(self._finish_publishing, worker))
            self._work(worker)
            return
        self._events.append(
            Raised(worker.number, job.lease, fate)
            if fate is not None
            else Answered(worker.number, job.lease, self._answer(job))
        )
        self._work(worker)

    def _finish_publishing(self, worker: _Worker) -> None:
        if self._workers.get(worker.number) is not worker:
            return
        job = worker.publishing.popleft()
        self._events.append(Answered(worker.number, job.lease, self._answer(job)))
        if worker.publishing:
            self.at(self.now + self.publish_s, partial(self._finish_publishing, worker))

    def _answer(self, job: _Job) -> Produced | Found | Passed:
        if not job.publish:
            return Passed()
        if job.found:
            return Found()
        return Produced(self.publish(job.item), Fidelity(0.9, 1e-5, 1e-4), 1.0)


@dataclass
class Mailbox:
    """What students and machines would have left on a coordinator."""

    cursors: dict[str, int] = field(default_factory=dict)
    bad_chunks: set[int] = field(default_factory=set)
    notices: dict[str, PreemptionNotice] = field(default_factory=dict)
    beating: Callable[[], Collection[int]] = tuple  # teachers that have given a heartbeat

    def read(self) -> News:
        bad_chunks, self.bad_chunks = frozenset(self.bad_chunks), set()
        return News(dict(self.cursors), bad_chunks, dict(self.notices), frozenset(self.beating()))
