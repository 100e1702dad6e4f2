"""`TransformersWriter`: Hugging Face causal language models write; the example of an engine to
read.

Shapes: B samples side by side, P tokens of the longest prompt among them, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.config.generate import WriterSection
from stillhouse.engines.probe import hashes_of_weights
from stillhouse.models import ModelIdentity, digest_beside, load_model, model_identity
from stillhouse.models.caches import new_cache
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.engine import Sample
from stillhouse.writer.sampling import Drawn, draw, uniforms


class TransformersWriter:
    """A causal LM in this process, on one device or spread over its GPUs."""

    def __init__(self, section: WriterSection, recipe: RolloutRecipe, *, device: str):
        self._section, self._recipe = section, recipe
        many_gpus = device == "cuda" and torch.cuda.device_count() > 1
        self._model, self.digest = digest_beside(
            section,
            lambda: load_model(
                section, device_map="auto" if many_gpus else device, by_document=False
            ),
        )
        self._ends = torch.tensor(recipe.end_ids, device=self._model.device, dtype=torch.long)

    @classmethod
    def identity(cls, section: WriterSection, *, cache_dir: Path) -> ModelIdentity:
        return model_identity(section, cache_dir=cache_dir)

    def weight_hashes(self) -> Mapping[str, int]:
        return hashes_of_weights(self._model)

    def write(self, prompts: Sequence[NDArray[np.int32]], seeds: Sequence[int]) -> list[Sample]:
        # prompts of about the same length side by side: the rest is padding
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        written: dict[int, Sample] = {}
        for start in range(0, len(order), self._section.batch_sequences):
            batch = order[start : start + self._section.batch_sequences].tolist()
            samples = self._write([prompts[i] for i in batch], [seeds[i] for i in batch])
            written |= dict(zip(batch, samples, strict=True))
        return [written[i] for i in range(len(prompts))]

    def _write(self, prompts: Sequence[NDArray[np.int32]], seeds: Sequence[int]) -> list[Sample]:
        """A sample for each prompt of one batch."""
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for rows, drawn, ends_B in self._tokens(prompts, seeds):
            for row, token, logprob, ends in zip(
                rows, drawn.ids_B.tolist(), drawn.logprobs_B.tolist(), ends_B, strict=True
            ):
                if not ended[row]:
                    ids[row].append(token)
                    logprobs[row].append(logprob)
                    ended[row] = ends
        return [
            Sample(np.array(ids[row], np.int32), np.array(logprobs[row], np.float32), ended[row])
            for row in range(len(prompts))
        ]

    @torch.inference_mode()
    def _tokens(
        self, prompts: Sequence[NDArray[np.int32]], seeds: Sequence[int]
    ) -> Iterator[tuple[list[int], Drawn, list[bool]]]:
        """One token after the other for all prompts side by side: their rows, what was drawn for
        each, and whether it ends there. Rows that have ended are left out once they are half."""
        # prompts end at the same place: what is before a shorter one is masked
        device, recipe = self._model.device, self._recipe
        cache_name, cache = new_cache(self._model)
        rows, is_open_B = list(range(len(prompts))), torch.ones(len(prompts), dtype=torch.bool)
        seeds_B = torch.tensor(seeds, dtype=torch.long, device=device)
        ids_BP, mask_BP = (each.to(device) for each in _left_padded(prompts))
        positions_BP = (mask_BP.cumsum(1) - 1).clamp_min(0)
        for place in range(recipe.max_new_tokens):
            # one token of each
            logits_BV = self._model(
                input_ids=ids_BP,
                position_ids=positions_BP,
                attention_mask=mask_BP,
                use_cache=True,
                logits_to_keep=1,
                **{cache_name: cache},
            ).logits[:, -1, : recipe.vocab_size]
            uniforms_B = uniforms(seeds_B, place).to(logits_BV.device)
            drawn = draw(logits_BV, uniforms_B, temperature=recipe.temperature, top_p=recipe.top_p)
            ids_BP = drawn.ids_B.to(device)[:, None]
            ends_B = torch.isin(ids_BP[:, 0], self._ends).cpu()
            yield rows, drawn, ends_B.tolist()

            # the next one follows it, where the sample goes on
            is_open_B &= ~ends_B
            if not is_open_B.any():
                return
            positions_BP = positions_BP[:, -1:] + 1
            mask_BP = torch.cat([mask_BP, torch.ones_like(ids_BP)], dim=1)
            if 2 * int(is_open_B.sum()) <= len(rows):
                kept = is_open_B.nonzero()[:, 0]
                rows, is_open_B = [rows[i] for i in kept.tolist()], is_open_B[kept]
                kept = kept.to(device)
                cache.batch_select_indices(kept)
                seeds_B, mask_BP = seeds_B[kept], mask_BP[kept]
                ids_BP, positions_BP = ids_BP[kept], positions_BP[kept]


def _left_padded(prompts: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Prompts as int64 [B, P] that end in the last column, and which of it is a prompt's."""
    length = max(len(prompt) for prompt in prompts)
    ids_BP = torch.zeros(len(prompts), length, dtype=torch.long)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BP[row, length - len(prompt) :] = 1
    return ids_BP, mask_BP
