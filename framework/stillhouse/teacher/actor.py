"""The teacher actor: computes the targets of a work item and publishes them as a chunk, while it
computes those of the next item.

Stateless: any actor can be killed, which re-runs at most the chunks that it had leased.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets
from stillhouse.config import NoticeSource, TeacherSection
from stillhouse.engines.base import Records
from stillhouse.engines.choice import engine_named
from stillhouse.engines.probe import Probe
from stillhouse.logits import Fidelity, TargetSpec, concatenate, decode, fidelity
from stillhouse.pool.actor_backend import actor_options
from stillhouse.pool.events import Found, Passed
from stillhouse.pool.stages import PUBLISHING, TwoStages
from stillhouse.pool.worker_process import WorkerProcess, is_there
from stillhouse.retry import DEFAULT_PATIENCE, Patience, Tell, insist
from stillhouse.sequence import WorkItem
from stillhouse.sequences.stored import StoredReader, Work
from stillhouse.store import Chunk, ChunkRef, ChunkStore, Recipe
from stillhouse.teacher.first_answer import require_first_teacher
from stillhouse.tracking import ChunkEvent, PhaseEvent, TeacherEvent
from stillhouse.tracking.log import failures_logged

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TeacherJob:
    """What an actor needs to be a teacher of a recipe."""

    section: TeacherSection
    recipe: Recipe
    store_url: str
    threads: int
    notices: NoticeSource  # of the preemption of its machine


@dataclass(frozen=True, slots=True)
class Ready:
    """A teacher that passed its start-up check, with its probe, for comparison with the other
    replicas."""

    probe: Probe
    device: str
    topk: str  # the backend that makes targets of its logits, and the reason
    seconds: float
    node: str  # Ray's id of the machine's node
    # Of a local model's files as they were loaded; a commit identifies a model of a hub.
    weights_digest: str | None = None

    def journal_event(self, worker: int) -> TeacherEvent:
        return TeacherEvent(worker, self.seconds, self.device, self.topk)


@dataclass(frozen=True, slots=True)
class Produced:
    """A chunk that is in the store, with its measurements. No tensors: those are in the store."""

    ref: ChunkRef
    fidelity: Fidelity
    seconds: float  # from when its computing began

    @property
    def num_tokens(self) -> int:
        return self.ref.num_tokens

    def journal_event(self, worker: int) -> ChunkEvent:
        return ChunkEvent(
            chunk=self.ref.number,
            num_tokens=self.ref.num_tokens,
            num_bytes=self.ref.num_bytes,
            seconds=self.seconds,
            replica=worker,
            kept_mass=self.fidelity.kept_mass,
            codec_kl=self.fidelity.codec_kl,
            worst_kl=self.fidelity.worst_kl,
            duplicate=self.ref.duplicate,
        )


class _Computed(NamedTuple):
    chunk: Chunk
    fidelity: Fidelity
    began: float


class _TeacherActor:
    """For each chunk, `produce` and `publish` are called once. Ray has a thread for `publish`, and
    another for all other calls; each does its calls in their order."""

    def __init__(
        self, job: TeacherJob, number: int, device: str, secrets: Secrets, coordinator: Coordinator
    ):
        self._job, self._device, self._coordinator = job, device, coordinator
        self._process = WorkerProcess(
            "teacher", number, job, device=device, secrets=secrets, coordinator=coordinator
        )
        self._reader = StoredReader()
        self._stages = TwoStages(self._computed, self._published)
        self._has_published = False

    @failures_logged(_log, "start-up")
    def start(self) -> Ready:
        began = monotonic()
        self._coordinator.mention(PhaseEvent("teacher", "loading"))
        self._engine = engine_named(self._job.section.engine)(
            self._job.section,
            self._job.recipe,
            device=self._device,
            store_url=self._job.store_url,
        )
        self._store = ChunkStore(self._job.store_url, self._job.recipe)
        self._coordinator.mention(PhaseEvent("teacher", "proving"))
        probe = self._probe = self._engine.probe()
        name = torch.cuda.get_device_name() if self._device == "cuda" else "cpu"
        backend = self._engine.backend()
        topk, seconds = f"{backend.name}: {backend.reason}", monotonic() - began
        model = self._job.section.model
        _log.info("%s is ready after %.1f s, on %s, by %s", model, seconds, name, topk)
        return Ready(probe, name, topk, seconds, self._process.node, self._engine.digest)

    def produce(self, item: Work) -> None:
        """Compute the targets of a chunk, which `publish` then publishes."""
        self._stages.first(item)

    @ray.method(concurrency_group=PUBLISHING)
    def publish(self) -> Produced | Found:
        """The answer for the next chunk in the order of `produce`, once it is in the store."""
        return self._stages.second()

    def compute(self, item: Work) -> Passed:
        with failures_logged(_log, f"a sequence of chunk {item.number}, on trial"):
            stored(self._engine.records(self._read(item)), self._job.recipe.spec)
            return Passed()

    def _computed(self, item: Work) -> _Computed | Found:
        with failures_logged(_log, f"chunk {item.number}"):
            if is_there(self._store, item.number):  # published since it was leased
                return Found()
            began = monotonic()
            work = self._read(item)
            records_NB, measured = stored(self._engine.records(work), self._job.recipe.spec)
            return _Computed(
                Chunk(work.number, work.sequences, records_NB.numpy()), measured, began
            )

    def _read(self, item: Work) -> WorkItem:
        """The item with its sequences, which it waits for while their store does not answer."""
        return insist(
            lambda: self._reader.work(item),
            patience=DEFAULT_PATIENCE,
            tell=self._process.tell_of_outage,
        )

    def _published(self, computed: _Computed | Found) -> Produced | Found:
        if isinstance(computed, Found):
            return computed
        number = computed.chunk.number
        with failures_logged(_log, f"chunk {number}"):
            if not self._has_published:
                insist(
                    lambda: require_first_teacher(self._store, self._probe),
                    patience=DEFAULT_PATIENCE,
                    tell=self._process.tell_of_outage,
                )
            ref = publish_when_possible(
                self._store,
                computed.chunk,
                patience=DEFAULT_PATIENCE,
                tell=self._process.tell_of_outage,
            )
            self._has_published = True
            seconds = monotonic() - computed.began
            _log.debug("chunk %d is published after %.2f s", number, seconds)
            return Produced(ref, computed.fidelity, seconds)


def stored(parts: Iterable[Records], spec: TargetSpec) -> tuple[Tensor, Fidelity]:
    """The records of a chunk's N targets, uint8 [N, B] in CPU memory, and their fidelity.

    Fidelity is measured on a sample of every part. Records leave a GPU through pinned memory, those
    of one part while the next is computed; all have arrived on return. Raises ChunkError for
    records that cannot be read back, which must not be published.
    """
    arriving, exact, written = [], [], []
    for records_TB, sample in parts:
        landing_TB = torch.empty_like(records_TB, device="cpu", pin_memory=records_TB.is_cuda)
        arriving.append(landing_TB.copy_(records_TB, non_blocking=True))
        exact.append(sample)
        # a clone, since a view would keep the whole part in memory
        written.append(records_TB[: sample.num_tokens].clone())
    measured = fidelity(concatenate(exact), decode(torch.cat(written), spec))
    if records_TB.is_cuda:
        torch.cuda.synchronize(records_TB.device)
    return torch.cat(arriving), measured


def publish_when_possible(
    store: ChunkStore, chunk: Chunk, *, patience: Patience, tell: Tell
) -> ChunkRef:
    """Publish a chunk, waiting with it while the store is full or does not answer.

    So nothing is dropped or computed twice. Raises StoreUnavailable at the end of the patience, and
    any other error of the store at once, since waiting cannot help there.
    """
    return insist(lambda: store.publish(chunk), patience=patience, tell=tell)


def spawn(
    job: TeacherJob, number: int, *, where: Placement, secrets: Secrets, coordinator: Coordinator
) -> Any:
    """A new teacher actor on the cluster, whose heartbeats carry `number`.

    Its `start` must have returned before it gets work.
    """
    threads: dict[str, Any] = {"concurrency_groups": {PUBLISHING: 1}}
    actor = ray.remote(**threads)(_TeacherActor).options(**actor_options(job.section, where))
    return actor.remote(job, number, where.device, secrets, coordinator)
