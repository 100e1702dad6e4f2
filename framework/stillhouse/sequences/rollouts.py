"""Rollouts as documents: what a model wrote to each prompt, of those samples that ended themselves,
or of those that [corpus.accept] keeps.

A data set `rollouts://<url>/<fingerprint16>` is the shards of that recipe in a store; a config may
leave its own store's URL out.

The samples of a prompt are one group: a prompt that is held out is never trained on. Shards are
shuffled, not what is in one: the prompts of a shard are a random sample of all already.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.models.tokenizers import vocabulary_digest
from stillhouse.sequences.accepted import accepted
from stillhouse.sequences.bad_rows import LeftOutError
from stillhouse.sequences.documents import Documents, refuse_settings
from stillhouse.sequences.ids import Origin, Tokens
from stillhouse.sequences.named_rollouts import rollouts_named
from stillhouse.sequences.shuffle import shuffled_order
from stillhouse.sequences.tally import Tally
from stillhouse.store.rollouts import CUT, SET_ASIDE, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_RULE = "ended"  # which samples are documents; part of what identifies them
_LEFT_OUT = {
    CUT: "samples that were cut before they ended",
    SET_ASIDE: "samples of prompts that were set aside",
}
_SHARDS = 4  # in memory at one time


def documents_of_rollouts(
    section: CorpusSection, tokenizer: "PreTrainedTokenizerFast", *, cache_dir: Path
) -> Documents:
    """The samples of `section.dataset`, as tokens of which those that were sampled are labels.
    `cache_dir` holds copies of test sets.

    Raises CorpusError where the tokenizer's ids stand for other tokens than the writer's, a setting
    has no meaning here, or a shard has not been graded; RecipeError, StoreError and ChunkError
    where the rollouts are absent, incomplete or damaged.
    """
    # what is there
    refuse_settings(section, "rollouts", ("subset", "revision", "column", "mask_column"))
    store = rollouts_named(section.dataset)
    recipe = store.recipe
    if recipe.vocabulary_digest != vocabulary_digest(tokenizer):
        raise CorpusError(
            f"the rollouts of {section.dataset} are ids of another vocabulary than that of "
            f"{tokenizer.name_or_path}; wanted: a teacher and a student with the writer's ids"
        )
    digest = store.digest()  # all shards are there
    rule, reasons, words = _RULE, None, "that ended themselves"
    if section.accept is not None or section.decontaminate is not None:
        view = accepted(store, section, tokenizer, cache_dir=cache_dir)
        rule, reasons, words = view.identity, view.reasons, "that are accepted"
    identity = f"rollouts:{recipe.fingerprint}:{digest}:{rule}"

    # its rows: each sample of each prompt, a shard after the other
    size = recipe.shard_prompts * recipe.samples
    shards = shuffled_order(recipe.num_shards, "corpus", seed=section.seed)
    rows = (shards[:, None] * size + np.arange(size)).ravel()
    order = rows[rows < recipe.num_prompts * recipe.samples][: section.max_documents]
    shard, tally = lru_cache(maxsize=_SHARDS)(store.fetch), Tally(store)

    def read(row: int) -> Tokens:
        rollouts, place = shard(row // size), row % size
        finish = int(rollouts.finish_S[place])
        reason = _LEFT_OUT.get(finish) if reasons is None else reasons()[row]
        tally.see(rollouts, place, reason)
        if reason is not None:
            raise LeftOutError(reason)
        return _tokens(rollouts, place)

    return Documents(
        identity,
        order,
        read=read,
        place=lambda row: (f"{store.url}/{store.key(row // size)}", row % size),
        in_store=store.place,
        form=f"samples of {recipe.num_prompts:,} prompts {words}",
        samples=lambda: tally.account(tokenizer),
    )


def _tokens(rollouts: Rollouts, row: int) -> Tokens:
    """A sample with its prompt, without padding."""
    ids = rollouts.ids(row)
    is_label = np.zeros(len(ids), np.bool_)
    is_label[1:] = rollouts.sequences.loss_mask_SL[row, : len(ids) - 1]
    group, origin = int(rollouts.prompts_S[row]), Origin(rollouts.number, row)
    return Tokens(ids, is_label, group=group, origin=origin)
