"""`TransformersWriter`: Hugging Face causal language models write; the example of an engine to
read.

Shapes: B samples side by side, P tokens of the longest prompt among them, then 1, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.config.generate import WriterSection
from stillhouse.engines.probe import hashes_of_weights
from stillhouse.models.caches import WritersCache, check_cache, left_padded, next_logits
from stillhouse.models.identity import ModelIdentity, digest_beside, model_identity
from stillhouse.models.load import load_model
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.engine import Prompt, Sample
from stillhouse.writer.sampling import Drawn, draw, uniforms


class TransformersWriter:
    """A causal LM in this process, on one device or spread over its GPUs.

    Construction loads the model, and checks its cache on a probe batch.
    """

    def __init__(
        self, section: WriterSection, recipe: RolloutRecipe, *, device: str, store_url: str = ""
    ) -> None:
        del store_url  # all that it needs of it is in the recipe
        self._section, self._recipe = section, recipe
        many_gpus = device == "cuda" and torch.cuda.device_count() > 1
        self._model, self.digest = digest_beside(
            section,
            lambda: load_model(
                section, device_map="auto" if many_gpus else device, by_document=False
            ),
        )
        check_cache(self._model, vocab_size=recipe.vocab_size)
        self._ends = torch.tensor(recipe.end_ids, device=self._model.device, dtype=torch.long)

    @classmethod
    def identity(cls, section: WriterSection, *, cache_dir: Path) -> ModelIdentity:
        return model_identity(section, cache_dir=cache_dir)

    def weight_hashes(self) -> Mapping[str, int]:
        return hashes_of_weights(self._model)

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        # prompts of about the same length side by side: the rest is padding
        order = np.argsort([len(prompt.ids) for prompt in prompts], kind="stable")
        written: dict[int, Sample] = {}
        for start in range(0, len(order), self._section.batch_sequences):
            batch = order[start : start + self._section.batch_sequences].tolist()
            samples = self._write([prompts[i].ids for i in batch], [seeds[i] for i in batch])
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
        each, and whether it ends there. Rows that have ended are left out once they are half, where
        the model's cache can shrink."""
        # prompts end at the same place: what is before a shorter one is masked
        device, recipe = self._model.device, self._recipe
        cache = WritersCache.of(self._model)
        rows, is_open_B = list(range(len(prompts))), torch.ones(len(prompts), dtype=torch.bool)
        seeds_B = torch.tensor(seeds, dtype=torch.long, device=device)
        padded = left_padded([torch.from_numpy(each.astype(np.int64)) for each in prompts])
        ids_BP, positions_BP, mask_BP = (each.to(device) for each in padded)
        for place in range(recipe.max_new_tokens):
            # one token of each
            logits_BV = next_logits(self._model, ids_BP, positions_BP, mask_BP, cache)
            logits_BV = logits_BV[:, : recipe.vocab_size]
            uniforms_B = uniforms(seeds_B, torch.full_like(seeds_B, place)).to(logits_BV.device)
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
            if cache.can_shrink and 2 * int(is_open_B.sum()) <= len(rows):
                kept = is_open_B.nonzero()[:, 0]
                rows, is_open_B = [rows[i] for i in kept.tolist()], is_open_B[kept]
                kept = kept.to(device)
                cache.keep(kept)
                seeds_B, mask_BP = seeds_B[kept], mask_BP[kept]
                ids_BP, positions_BP = ids_BP[kept], positions_BP[kept]
