"""What a teacher is: token ids in, compressed targets out. One method, and a Hugging Face causal LM that implements it.

Shapes: S sequences of a chunk, B of one forward pass, L positions, T target tokens, H hidden.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from stillhouse.config import TeacherSection
from stillhouse.logits import Backend, CompressedLogits, backend_for, compress_hidden, concatenate, token_seeds
from stillhouse.models import check_head, check_packing, head_of, load_model
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe
from stillhouse.teacher.replica import Probe, hashes_of_weights, mean_kl, rounded_otherwise

_PROBE_ENTRIES = 128  # whatever the recipe keeps: few entries of a flat distribution are alike in models that are not


class Teacher(Protocol):
    """Anything that knows the next-token distribution after each masked-in token."""

    def compress(self, item: WorkItem) -> Iterator[CompressedLogits]:
        """The targets of the item's masked-in positions, in row-major order: a part for each forward pass, on the teacher's device."""
        ...


class HuggingFaceTeacher:
    """A causal LM in this process. Construction loads it and proves its head and its packing on a probe batch."""

    def __init__(self, section: TeacherSection, recipe: Recipe, *, device: str):
        self._section, self._recipe = section, recipe
        many_gpus = device == "cuda" and torch.cuda.device_count() > 1
        self._model = load_model(section, device_map="auto" if many_gpus else device)
        check_head(self._model, vocab_size=recipe.vocab_size)
        check_packing(self._model, vocab_size=recipe.vocab_size)
        self._head = replace(head_of(self._model, vocab_size=recipe.vocab_size), float32_logits=section.logits == "exact")

    def compress(self, item: WorkItem) -> Iterator[CompressedLogits]:
        return self._compress(item, k=self._recipe.k, tail_draws=self._recipe.num_draws)

    def probe(self) -> Probe:
        """What this replica says to `probe_item`, and of its number format and its weights, to be compared with its fellows' words."""
        answer = self._answer()
        with rounded_otherwise(self._model):
            rounding_kl = mean_kl(answer, self._answer())
        return Probe(answer, rounding_kl, hashes_of_weights(self._model))

    def _answer(self) -> CompressedLogits:
        parts = self._compress(probe_item(self._recipe), k=min(_PROBE_ENTRIES, self._recipe.vocab_size), tail_draws=0)
        return concatenate(parts).map(torch.Tensor.cpu)

    def path(self) -> Backend:
        """The way that its logits take to targets."""
        return backend_for(self._head.logits(self._head.weight_VH[:1]), k=self._recipe.k, temperature=self._recipe.temperature)

    @torch.inference_mode()
    def _compress(self, item: WorkItem, *, k: int, tail_draws: int) -> Iterator[CompressedLogits]:
        seeds_SL = draw_seeds(item, self._recipe)
        for start in range(0, len(item.sequences), self._section.batch_sequences):
            rows = slice(start, start + self._section.batch_sequences)
            batch = TokenBatch.of(item.sequences.select(rows))
            yield compress_hidden(
                hidden_at(self._model, batch).to(self._head.weight_VH.device),
                self._head,
                k=k,
                tail_draws=tail_draws,
                temperature=self._recipe.temperature,
                seeds_T=seeds_SL[rows].flatten()[batch.target_positions_T],
                block_tokens=self._section.block_tokens,
            )


def draw_seeds(item: WorkItem, recipe: Recipe) -> torch.Tensor:
    """int64 [S, L]: the seed of each position's draws, a function of the recipe and the position's place in the corpus alone."""
    num_sequences, length = item.sequences.token_ids_SL.shape
    sequences_S = item.number * recipe.chunk_sequences + torch.arange(num_sequences)
    seeds = token_seeds(recipe.draw_seed, sequences_S.repeat_interleave(length), torch.arange(length).repeat(num_sequences))
    return seeds.view(num_sequences, length)


def probe_item(recipe: Recipe, *, num_tokens: int = 64) -> WorkItem:
    """The same short pseudo-random sequence for every replica of a recipe."""
    length = min(num_tokens, recipe.sequence_length)
    token_ids = np.random.default_rng(0).integers(0, recipe.vocab_size, size=(1, length), dtype=np.int32)
    mask = np.ones((1, length), dtype=np.uint8)
    mask[:, -1] = 0
    return WorkItem(-1, Sequences(token_ids, np.arange(length, dtype=np.int32)[None], mask))
