"""`VllmEngine`: a teacher that vLLM runs, with records made inside its workers.

What it brings: mixtures of experts, quantised weights, and models spread over several GPUs. A
document is a request, so packing costs nothing; vLLM batches them and cuts long ones as it likes,
which changes no draw, and no other byte by more than the rounding of its kernels.

Shapes: T target tokens, B bytes of a record.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from stillhouse.config import TeacherSection
from stillhouse.engines import _vllm_compat
from stillhouse.engines.base import SAMPLE_TOKENS, Capabilities, Records, probe_item, probe_spec
from stillhouse.engines.probe import Probe, mean_kl
from stillhouse.engines.vllm_config import tensor_parallel, vllm_config
from stillhouse.engines.vllm_pooler import PoolerPlan, Question, read_answer, unpack
from stillhouse.errors import TeacherError
from stillhouse.logits import Backend, concatenate
from stillhouse.models.batch import TokenBatch
from stillhouse.models.head_files import plan_head
from stillhouse.models.identity import ModelIdentity, digest_beside, model_identity
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe

_WORKER = "stillhouse.engines.vllm_worker.records_worker"
_BESIDE = 7  # other sequences in the batch that answers the probe a second time


class VllmEngine:
    """A causal LM in vLLM. On one device it runs in this process; spread over several, each has a
    process that ends with this one."""

    def __init__(
        self, section: TeacherSection, recipe: Recipe, *, device: str, store_url: str = ""
    ):
        del store_url  # all that it needs of it is in the recipe
        self._recipe = recipe
        head = plan_head(section, vocab_size=recipe.vocab_size)
        self._plan = PoolerPlan(section, recipe, head, probe_spec(recipe))
        self._world = tensor_parallel(section, device=device)
        config = vllm_config(
            section,
            sequence_length=recipe.sequence_length,
            length_setting="corpus.sequence_length",
            device=device,
            writes=False,
            worker_cls=_WORKER,
            additional_config=self._plan,
        )
        self._engine, self.digest = digest_beside(section, lambda: _vllm_compat.Engine(config))

    @classmethod
    def describe(cls, _section: TeacherSection, /) -> Capabilities:
        return Capabilities(weighted_draws=True, label_logprob=True, tail_entropy=True)

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        return model_identity(section, cache_dir=cache_dir)

    def records(self, item: WorkItem) -> Iterator[Records]:
        """One part: vLLM has all documents of the item at once, to fill its batches."""
        yield self._ask(item)

    def probe(self) -> Probe:
        """The answer to `probe_item`, and how far the batch that it is computed in moves it.

        The batch decides how matrix products are cut and summed. Where kernels do not depend on it,
        which is so on many CPUs, it moves nothing, and that says nothing of other kernels: another
        kind of replica has to measure its own rounding. Weights are not hashed: vLLM fuses them,
        and packs them as the device's kernels want them. The digest of the files, or the hub's
        commit, holds them.
        """
        item = probe_item(self._recipe)
        answer = self._ask(item, is_probe=True).sample
        ids_SL, positions_SL, mask_SL = item.sequences.arrays
        others = [np.roll(ids_SL, shift, axis=1) for shift in range(1, 1 + _BESIDE)]
        among = Sequences(
            np.concatenate([ids_SL, *others]),
            positions_SL.repeat(1 + _BESIDE, axis=0),
            mask_SL.repeat(1 + _BESIDE, axis=0),
        )
        again = self._ask(WorkItem(item.number, among), is_probe=True).sample
        again = again.map(lambda tensor: tensor[: answer.num_tokens])
        return Probe(answer, mean_kl(answer, again), {})

    def backend(self) -> Backend:
        return Backend("vllm", f"records are made in vLLM's workers, {self._world} of them")

    def _ask(self, item: WorkItem, *, is_probe: bool = False) -> Records:
        """The records of an item, and a sample of them: of the probe, all."""
        spec = self._plan.spec(is_probe=is_probe)
        most = item.sequences.num_targets if is_probe else SAMPLE_TOKENS
        requests = requests_of(item, self._recipe, num_sampled=most, is_probe=is_probe)
        if not requests:
            nothing_TB = torch.empty((0, spec.bytes_per_token), dtype=torch.uint8)
            return Records(nothing_TB, unpack(nothing_TB, spec))
        answers = self._engine.answers([(ids, question.fields) for ids, question in requests])
        try:
            parts = [
                read_answer(answer, question, spec)
                for answer, (_, question) in zip(answers, requests, strict=True)
            ]
        except TeacherError:
            self._engine.call_workers("forget")
            raise
        sampled = [part.sample for part in parts if part.sample.num_tokens]
        return Records(torch.cat([part.records_TB for part in parts]), concatenate(sampled))


def is_installed() -> bool:
    """Whether this Python has a vLLM, of whatever version."""
    return _vllm_compat.installed_version() is not None


def requests_of(
    item: WorkItem, recipe: Recipe, *, num_sampled: int, is_probe: bool = False
) -> list[tuple[list[int], Question]]:
    """The item's documents with targets, in row-major order: the ids of each up to its last target,
    and what is asked of them. The first `num_sampled` targets are asked for unencoded, too."""
    if not item.sequences.num_targets:
        return []
    batch = TokenBatch.of(item.sequences)
    length = item.sequences.token_ids_SL.shape[1]
    ids_N = batch.token_ids_BL.flatten()[batch.needed.tokens_N]
    labels_T = batch.labels_T.numpy().astype(np.int32)
    targets_T = batch.needed.targets_T.numpy()
    requests = []
    for begin, end in pairwise(batch.needed.documents.places_D1.tolist()):
        first, stop = np.searchsorted(targets_T, [begin, end]).tolist()
        row, column = divmod(int(batch.needed.tokens_N[begin]), length)
        question = Question(
            (targets_T[first:stop] - begin).astype(np.int32),
            labels_T[first:stop],
            sequence=item.number * recipe.chunk_sequences + row,
            first_column=column,
            num_sampled=min(max(num_sampled - first, 0), stop - first),
            is_probe=is_probe,
        )
        requests.append((ids_N[begin:end].tolist(), question))
    return requests
