"""A teacher actor: it takes a work item, compresses it and publishes the chunk. It keeps no state that anybody would miss."""

from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import ray
import torch

from stillhouse.cluster import Placement, Secrets, prepare_process
from stillhouse.config import TeacherSection
from stillhouse.logits import CompressedLogits, Fidelity, decode, encode, fidelity
from stillhouse.store import Chunk, ChunkRef, ChunkStore, Recipe, StoreUnavailable
from stillhouse.teacher.model import HuggingFaceTeacher, WorkItem

_FIDELITY_TOKENS = 512  # of each chunk, to measure what compression and codec cost
_STORE_PATIENCE_S = 1800.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class TeacherJob:
    """What an actor needs to become a teacher of this recipe."""

    section: TeacherSection
    recipe: Recipe
    store_url: str
    threads: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A teacher that passed its start-up check: its answer to the probe, for comparison with its fellows'."""

    probe: CompressedLogits
    device: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Produced:
    """A chunk that is in the store, and what it took. No tensors: those went to the store."""

    ref: ChunkRef
    fidelity: Fidelity
    seconds: float


class _TeacherActor:
    def __init__(self, job: TeacherJob, device: str, secrets: Secrets):
        self._job, self._device = job, device
        prepare_process(device, job.threads)
        secrets.adopt()

    def start(self) -> Ready:
        began = monotonic()
        self._teacher = HuggingFaceTeacher(self._job.section, self._job.recipe, device=self._device)
        self._store = ChunkStore(self._job.store_url, self._job.recipe)
        probe = self._teacher.probe()
        name = torch.cuda.get_device_name() if self._device == "cuda" else "cpu"
        return Ready(probe, name, monotonic() - began)

    def produce(self, item: WorkItem) -> Produced:
        began = monotonic()
        codec = self._job.recipe.codec
        targets = self._teacher.compress(item)
        records = encode(targets, codec)
        sample = targets.map(lambda tensor: tensor[:_FIDELITY_TOKENS])
        measured = fidelity(sample, decode(records[:_FIDELITY_TOKENS], codec))  # first: what cannot be read back is not published
        chunk = Chunk(item.number, item.token_ids_SL, item.positions_SL, item.loss_mask_SL, records.numpy())
        return Produced(publish_when_possible(self._store, chunk, patience_s=_STORE_PATIENCE_S), measured, monotonic() - began)


def publish_when_possible(store: ChunkStore, chunk: Chunk, *, patience_s: float) -> ChunkRef:
    """Publish; while the store is full or does not answer, wait with the chunk in hand, so that nothing is dropped or made twice.

    Raises what the store raised once `patience_s` are over, or at once where waiting cannot help.
    """
    deadline, pause_s = monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            return store.publish(chunk)
        except StoreUnavailable:
            if monotonic() + pause_s > deadline:
                raise
        sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)


def spawn(job: TeacherJob, *, where: Placement, secrets: Secrets) -> Any:
    """A new teacher actor on the cluster; its `start` must be awaited before it gets work."""
    options = {"num_cpus": where.num_cpus, "num_gpus": where.num_gpus, "resources": dict(where.resources) or None}
    return ray.remote(_TeacherActor).options(**options).remote(job, where.device, secrets)
