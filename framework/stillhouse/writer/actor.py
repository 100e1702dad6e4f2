"""The writer actor: writes to a block of prompts, and publishes the rollouts as a shard, while it
writes to the next block.

Stateless: any actor can be killed, and the prompts that it had leased are written to by another,
which may write other words. What is published stays.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import Placement
from stillhouse.cluster.processes import Secrets
from stillhouse.config import NoticeSource
from stillhouse.config.generate import WriterSection
from stillhouse.pool.actor_backend import actor_options
from stillhouse.pool.events import Found, Passed
from stillhouse.pool.stages import PUBLISHING, TwoStages
from stillhouse.pool.worker_process import WorkerProcess, is_there
from stillhouse.retry import DEFAULT_PATIENCE, Tell, insist
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollout_store import RolloutStore, ShardRef
from stillhouse.store.rollouts import CUT, ENDED, SET_ASIDE, Rollouts
from stillhouse.tracking import PhaseEvent, ShardEvent, WriterEvent
from stillhouse.tracking.log import failures_logged
from stillhouse.writer.block import PromptBlock, written
from stillhouse.writer.choice import writer_named
from stillhouse.writer.engine import WriterEngine

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriterJob:
    """What an actor needs to be a writer of a recipe."""

    section: WriterSection
    recipe: RolloutRecipe
    store_url: str
    threads: int
    notices: NoticeSource  # of the preemption of its machine


@dataclass(frozen=True, slots=True)
class Ready:
    """A writer that has loaded its model, with what it loaded, for comparison with the others."""

    weight_hashes: Mapping[str, int]
    weights_digest: str | None  # None for a model of a hub, whose commit identifies it
    device: str
    seconds: float
    node: str  # Ray's id of the machine's node

    def journal_event(self, worker: int) -> WriterEvent:
        return WriterEvent(worker, self.seconds, self.device)


@dataclass(frozen=True, slots=True)
class Written:
    """A shard that is in the store, and how its samples ended. No tensors: those are in the
    store."""

    ref: ShardRef
    num_ended: int
    num_cut: int
    num_set_aside: int
    num_with_logprobs: int
    seconds: float

    @property
    def num_tokens(self) -> int:
        return self.ref.num_tokens

    def journal_event(self, worker: int) -> ShardEvent:
        return ShardEvent(
            shard=self.ref.number,
            num_tokens=self.ref.num_tokens,
            num_bytes=self.ref.num_bytes,
            num_ended=self.num_ended,
            num_cut=self.num_cut,
            num_set_aside=self.num_set_aside,
            num_with_logprobs=self.num_with_logprobs,
            seconds=self.seconds,
            replica=worker,
            duplicate=self.ref.duplicate,
        )


class Computed(NamedTuple):
    """A shard that is not published yet."""

    rollouts: Rollouts
    began: float  # by the monotonic clock


class _WriterActor:
    """For each shard, `produce` and `publish` are called once. Ray has a thread for `publish`, and
    another for all other calls; each does its calls in their order."""

    def __init__(
        self, job: WriterJob, number: int, device: str, secrets: Secrets, coordinator: Coordinator
    ):
        self._job, self._device, self._coordinator = job, device, coordinator
        self._process = WorkerProcess(
            "writer", number, job, device=device, secrets=secrets, coordinator=coordinator
        )
        self._stages = TwoStages(self._computed, self._published)

    @failures_logged(_log, "start-up")
    def start(self) -> Ready:
        began = monotonic()
        self._coordinator.mention(PhaseEvent("writer", "loading"))
        self._engine = writer_named(self._job.section.engine)(
            self._job.section,
            self._job.recipe,
            device=self._device,
            store_url=self._job.store_url,
        )
        self._store = RolloutStore(self._job.store_url, self._job.recipe)
        hashes = self._engine.weight_hashes()
        name = torch.cuda.get_device_name() if self._device == "cuda" else "cpu"
        seconds = monotonic() - began
        _log.info("%s is ready after %.1f s, on %s", self._job.section.model, seconds, name)
        return Ready(hashes, self._engine.digest, name, seconds, self._process.node)

    def produce(self, item: PromptBlock) -> None:
        """Write to a block of prompts, whose rollouts `publish` then publishes."""
        self._stages.first(item)

    @ray.method(concurrency_group=PUBLISHING)
    def publish(self) -> Written | Found:
        """The answer for the next shard in the order of `produce`, once it is in the store."""
        return self._stages.second()

    def compute(self, item: PromptBlock) -> Passed:
        with failures_logged(_log, f"a prompt of shard {item.number}, on trial"):
            written(item, self._engine, self._job.recipe)
            return Passed()

    def _computed(self, item: PromptBlock) -> Computed | Found:
        with failures_logged(_log, f"shard {item.number}"):
            return computed(self._store, item, self._engine)

    def _published(self, shard: Computed | Found) -> Written | Found:
        with failures_logged(_log, "publishing a shard"):
            return published(self._store, shard, tell=self._process.tell_of_outage)


def computed(store: RolloutStore, item: PromptBlock, engine: WriterEngine) -> Computed | Found:
    """What a writer writes to a block of prompts, unless it is in the store already."""
    if is_there(store, item.number):  # published since it was leased
        return Found()
    began = monotonic()
    return Computed(written(item, engine, store.recipe), began)


def published(store: RolloutStore, shard: Computed | Found, *, tell: Tell) -> Written | Found:
    """Publish a shard. A store that is full or does not answer is waited for, which is reported to
    `tell`."""
    if isinstance(shard, Found):
        return shard
    rollouts, began = shard
    ref = insist(lambda: store.publish(rollouts), patience=DEFAULT_PATIENCE, tell=tell)
    ended, cut, aside = (
        int(np.count_nonzero(rollouts.finish_S == each)) for each in (ENDED, CUT, SET_ASIDE)
    )
    with_logprobs = int(np.count_nonzero(rollouts.rows_with_logprobs))
    return Written(ref, ended, cut, aside, with_logprobs, monotonic() - began)


def spawn(
    job: WriterJob, number: int, *, where: Placement, secrets: Secrets, coordinator: Coordinator
) -> Any:
    """A new writer actor on the cluster, whose heartbeats carry `number`.

    Its `start` must have returned before it gets work.
    """
    threads: dict[str, Any] = {"concurrency_groups": {PUBLISHING: 1}}
    actor = ray.remote(**threads)(_WriterActor).options(**actor_options(job.section, where))
    return actor.remote(job, number, where.device, secrets, coordinator)
