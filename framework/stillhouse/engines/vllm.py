"""`VllmEngine`: a teacher that vLLM runs, with records made inside its workers.

What it brings: mixtures of experts, quantised weights, and models spread over several GPUs. A
document is a request, so packing costs nothing; vLLM batches them and cuts long ones as it likes,
which changes no draw, and no other byte by more than the rounding of its kernels.

Shapes: T target tokens, B bytes of a record.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.config import TeacherSection
from stillhouse.engines import _vllm_compat
from stillhouse.engines.base import SAMPLE_TOKENS, Capabilities, Records, probe_item, probe_spec
from stillhouse.engines.probe import Probe, mean_kl
from stillhouse.engines.vllm_pooler import PoolerPlan, Question, read_answer, unpack
from stillhouse.errors import ConfigError, ModelError, TeacherError
from stillhouse.logits import Backend, concatenate
from stillhouse.model_path import source_of
from stillhouse.models import ModelIdentity, digest_beside, model_identity
from stillhouse.models.batch import TokenBatch
from stillhouse.models.head_files import plan_head
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe

_WORKER = "stillhouse.engines.vllm_worker.records_worker"
_BESIDE = 7  # other sequences in the batch that answers the probe a second time
_CACHE_GB_ON_CPU = 1.0


class VllmEngine:
    """A causal LM in vLLM. On one device it runs in this process; spread over several, each has a
    process that ends with this one."""

    def __init__(
        self, section: TeacherSection, recipe: Recipe, *, device: str, store_url: str = ""
    ):
        del store_url  # all that it needs of it is in the recipe
        _vllm_compat.require_tried(_vllm_compat.installed_version())
        _vllm_compat.prepare_environment()
        self._recipe = recipe
        head = plan_head(section, vocab_size=recipe.vocab_size)
        self._plan = PoolerPlan(section, recipe, head, probe_spec(recipe))
        self._world = tensor_parallel(section, device=device)
        config = _config(self._plan, device=device)
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


def arguments_of(section: TeacherSection, *, sequence_length: int, device: str) -> dict[str, Any]:
    """The settings as vLLM's EngineArgs names them."""
    settings, on_cpu = section.vllm, device == "cpu"
    cache_gb = _CACHE_GB_ON_CPU if on_cpu and settings.kv_cache_gb is None else settings.kv_cache_gb
    world = tensor_parallel(section, device=device)
    given = {
        "quantization": settings.quantization,
        "max_num_batched_tokens": settings.max_batched_tokens,
        "kv_cache_memory_bytes": None if cache_gb is None else int(cache_gb * 1e9),
    }
    return {
        "model": source_of(section.model),
        "revision": section.revision,
        "tokenizer_revision": section.revision,
        "trust_remote_code": section.trust_remote_code,
        "dtype": section.dtype,
        "max_model_len": sequence_length,
        "tensor_parallel_size": world,
        "enable_expert_parallel": settings.expert_parallel,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "gpu_memory_utilization": settings.memory_share,
        "distributed_executor_backend": "uni" if world == 1 else "mp",
        "enforce_eager": on_cpu,  # compiling takes minutes there, and gains little
        "worker_cls": _WORKER,
    } | {name: value for name, value in given.items() if value is not None}


def tensor_parallel(section: TeacherSection, *, device: str) -> int:
    """The number of devices that share each layer."""
    if section.vllm.tensor_parallel is not None:
        return section.vllm.tensor_parallel
    return max(1, int(section.num_gpus or 1)) if device == "cuda" else 1


def _config(plan: PoolerPlan, *, device: str) -> Any:
    """vLLM's config of a teacher. Raises ConfigError or ModelError for what vLLM does not run."""
    # vLLM is built for one kind of device
    section, length = plan.section, plan.recipe.sequence_length
    built_for = "cpu" if _vllm_compat.is_cpu() else "cuda"
    if built_for != device:
        raise ConfigError(
            f"the teacher is placed on {device}, but the vLLM that is installed here runs on "
            f'{built_for}; set teacher.device = "{built_for}", or install the vLLM for {device}'
        )

    # its own refusals, and one that it makes too late
    arguments = arguments_of(section, sequence_length=length, device=device)
    try:
        config = _vllm_compat.engine_config(**arguments, additional_config=plan)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"vLLM does not run {section.model} with sequences of {length} tokens and these "
            f"settings: {error}; change corpus.sequence_length, [teacher] or [teacher.vllm], or "
            "take another model"
        ) from error
    size = _vllm_compat.unsupported_head_size(config)
    if size is not None:
        raise ModelError(
            f"the attention of {section.model} has heads of {size} numbers, for which vLLM has no "
            'kernel on the CPU; run it on a GPU, or set teacher.engine = "transformers"'
        )
    return config
