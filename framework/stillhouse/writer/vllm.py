"""`VllmWriter`: a writer that vLLM runs, which batches samples of unequal length as they come and
go.

What it brings: mixtures of experts, quantised weights, and models spread over several GPUs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stillhouse.config.generate import WriterSection
from stillhouse.engines import _vllm_compat
from stillhouse.engines.vllm_config import vllm_config
from stillhouse.errors import TeacherError
from stillhouse.models.identity import ModelIdentity, digest_beside, model_identity
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.engine import Prompt, Sample
from stillhouse.writer.vllm_worker import SeededDraws, WriterPlan

_WORKER = "stillhouse.writer.vllm_worker.writers_worker"
_PROCESSOR = "stillhouse.writer.vllm_worker:SeededDraws"


class VllmWriter:
    """A causal LM in vLLM. On one device it runs in this process; spread over several, each has a
    process that ends with this one. Its samples are those of `TransformersWriter`, up to
    rounding."""

    def __init__(
        self, section: WriterSection, recipe: RolloutRecipe, *, device: str, store_url: str = ""
    ) -> None:
        del store_url  # all that it needs of it is in the recipe
        self._recipe = recipe
        config = vllm_config(
            section,
            sequence_length=recipe.sequence_length,
            length_setting="sampling.sequence_length",
            device=device,
            writes=True,
            worker_cls=_WORKER,
            additional_config=WriterPlan(recipe.vocab_size, recipe.temperature, recipe.top_p),
            logits_processors=[_PROCESSOR],
        )
        _vllm_compat.accept_processor(SeededDraws)
        self._engine, self.digest = digest_beside(section, lambda: _vllm_compat.Engine(config))

    @classmethod
    def identity(cls, section: WriterSection, *, cache_dir: Path) -> ModelIdentity:
        return model_identity(section, cache_dir=cache_dir)

    def weight_hashes(self) -> Mapping[str, int]:
        """None: vLLM fuses weights, and packs them as the device's kernels want them. The digest of
        the files, or the hub's commit, holds them."""
        return {}

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        found = self._engine.samples(
            [prompt.ids.tolist() for prompt in prompts],
            seeds,
            max_new_tokens=self._recipe.max_new_tokens,
            end_ids=self._recipe.end_ids,
        )
        samples = [
            Sample(np.array(each.ids, np.int32), np.array(each.logits, np.float32), each.ended)
            for each in found
        ]
        if any((each.logprobs > 0).any() for each in samples):  # NOT_FINITE
            self._engine.call_workers("forget")
            raise TeacherError(
                "the writer gives logits that are not finite; its weights are damaged, or need a "
                "wider dtype (float32 or bfloat16)"
            )
        return samples
