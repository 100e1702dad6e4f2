"""`TransformersEngine`: Hugging Face causal language models; the example of an engine to read.

Shapes: S sequences of a chunk, B of one forward pass, L positions, T target tokens, H hidden.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from stillhouse.config import TeacherSection
from stillhouse.engines.base import (
    Capabilities,
    Records,
    draw_seeds,
    encoded,
    probe_item,
    probe_spec,
)
from stillhouse.engines.probe import Probe, hashes_of_weights, mean_kl, rounded_otherwise
from stillhouse.errors import ConfigError
from stillhouse.logits import (
    Backend,
    CompressedLogits,
    TargetSpec,
    backend_for,
    compress_hidden,
    concatenate,
)
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.compiling import as_written, check_compiled, compile_layers
from stillhouse.models.heads import check_head, check_packing, head_of
from stillhouse.models.identity import ModelIdentity, digest_beside, model_identity
from stillhouse.models.load import load_model
from stillhouse.models.sources import SEVERAL_GPUS
from stillhouse.sequence import WorkItem
from stillhouse.store import Recipe


class TransformersEngine:
    """A causal LM in this process, on one device; or, as a pipeline, its layers spread over several
    GPUs, of which one works at a time.

    Construction loads the model and checks its head and its packing on a probe batch.
    """

    def __init__(
        self, section: TeacherSection, recipe: Recipe, *, device: str, store_url: str = ""
    ):
        del store_url  # all that it needs of it is in the recipe
        self._section, self._recipe = section, recipe
        device_map = "auto" if section.pipeline and device == "cuda" else device
        self._model, self.digest = digest_beside(
            section, lambda: load_model(section, device_map=device_map)
        )
        check_head(self._model, vocab_size=recipe.vocab_size)
        check_packing(self._model, vocab_size=recipe.vocab_size)
        if section.compile:
            compile_layers(self._model)
            with torch.inference_mode():
                check_compiled(self._model, vocab_size=recipe.vocab_size)
        self._head = replace(
            head_of(self._model, vocab_size=recipe.vocab_size),
            float32_logits=section.logits == "exact",
        )

    @classmethod
    def describe(cls, section: TeacherSection, /) -> Capabilities:
        _require_possible_gpus(section)
        return Capabilities(weighted_draws=True, label_logprob=True, tail_entropy=True)

    @classmethod
    def identity(cls, section: TeacherSection, *, cache_dir: Path) -> ModelIdentity:
        return model_identity(section, cache_dir=cache_dir)

    def records(self, item: WorkItem) -> Iterator[Records]:
        return encoded(self.targets(item), self._recipe.spec)

    def targets(self, item: WorkItem) -> Iterator[CompressedLogits]:
        """Targets as tensors on the teacher's device, one part for each forward pass."""
        return self._compress(item, self._recipe.spec)

    def probe(self) -> Probe:
        """The answer to `probe_item`, how far rounding moves it, and the weights' hashes."""
        answer = self._answer()
        with as_written(), rounded_otherwise(self._model):  # compiled layers call no hooks
            rounding_kl = mean_kl(answer, self._answer())
        return Probe(answer, rounding_kl, hashes_of_weights(self._model))

    def _answer(self) -> CompressedLogits:
        parts = self._compress(probe_item(self._recipe), probe_spec(self._recipe))
        return concatenate(parts).map(torch.Tensor.cpu)

    def backend(self) -> Backend:
        return backend_for(
            self._head.logits(self._head.weight_VH[:1]),
            k=self._recipe.k,
            temperature=self._recipe.temperature,
        )

    @torch.inference_mode()
    def _compress(self, item: WorkItem, spec: TargetSpec) -> Iterator[CompressedLogits]:
        seeds_SL = draw_seeds(item, self._recipe)
        for start in range(0, len(item.sequences), self._section.batch_sequences):
            rows = slice(start, start + self._section.batch_sequences)
            batch = TokenBatch.of(item.sequences.select(rows))
            yield compress_hidden(
                hidden_at(self._model, batch).to(self._head.weight_VH.device),
                self._head,
                spec=spec,
                seeds_T=seeds_SL[rows].flatten()[batch.target_positions_T],
                labels_T=batch.labels_T if spec.label_logprob else None,
                block_tokens=self._section.block_tokens,
            )


def _require_possible_gpus(section: TeacherSection) -> None:
    num_gpus = 1.0 if section.num_gpus is None else section.num_gpus
    if num_gpus > 1 and not section.pipeline:
        raise ConfigError(
            f'teacher.num_gpus is {num_gpus:g}, but the engine "transformers" computes on one GPU: '
            f"set num_gpus = 1, or {SEVERAL_GPUS.format(num_gpus=math.ceil(num_gpus))}"
        )
    if section.pipeline and num_gpus <= 1:
        raise ConfigError(
            f"teacher.pipeline is true, but num_gpus is {num_gpus:g}; set num_gpus to the number "
            "of GPUs that the layers are spread over, or leave pipeline out"
        )
    if section.pipeline and section.compile:
        raise ConfigError(
            "teacher.pipeline and teacher.compile are both true, but layers on several GPUs are "
            "not compiled; leave one of them out"
        )
