"""Accepted samples: which of the rollouts in a store a corpus is made of, by the verdicts of
graders, and by test sets; a view of what lies there."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stillhouse.config import CorpusSection
from stillhouse.config.graders import AcceptSection, DecontaminateSection, require_known
from stillhouse.errors import CorpusError
from stillhouse.sequences.decontaminate import Decontamination, PassageIndex
from stillhouse.sequences.ids import texts_of
from stillhouse.sequences.selection import (
    Fingerprints,
    Samples,
    Selection,
    digests_of,
    fingerprints_of,
    joined,
    select,
)
from stillhouse.sequences.testsets import passages_of
from stillhouse.store.grader_names import named_graders
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import Rollouts
from stillhouse.store.verdicts import verdicts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Scores = Mapping[str, NDArray[np.float64]]  # of all samples, by the name of a grader


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a rule keeps of rollouts. `reasons` says for each sample, by its row, why it is dropped;
    None where it is kept. It reads all shards, at its first call."""

    identity: str  # of the rule, and of all that it is applied to besides the shards
    reasons: Callable[[], Sequence[str | None]]


def accepted(
    store: RolloutStore,
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    cache_dir: Path,
) -> Accepted:
    """The view of [corpus.accept] and [corpus.decontaminate]; without the first, of all samples
    that ended themselves.

    Raises CorpusError where the rule names a grader that has not graded each shard, or a test set
    cannot be read; ChunkError where a verdict is damaged. `reasons` raises CorpusError where
    nothing is kept.
    """
    # what is given
    rule = section.accept or AcceptSection(keep_repeats=True)
    scores = _scores(store, rule, dataset=section.dataset)
    test_sets = _test_sets(section.decontaminate, cache_dir=cache_dir)
    words = Decontamination(section.decontaminate or DecontaminateSection(), test_sets)

    # its identity, and then the view
    new = set() if rule.with_logprobs else {"with_logprobs"}  # views that do without keep theirs
    parts = [
        rule.model_dump(mode="json", exclude=new),
        {name: hashlib.sha256(scores_S.tobytes()).hexdigest() for name, scores_S in scores.items()},
        {name: _digest(test_set) for name, test_set in test_sets.items()},
        [words.rule.max_share, words.rule.passage_words],
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cache
    def reasons() -> Sequence[str | None]:
        shards, size = [], store.recipe.shard_prompts * store.recipe.samples
        for number in range(store.recipe.num_shards):
            rows = slice(number * size, (number + 1) * size)
            own = {name: scores_S[rows] for name, scores_S in scores.items()}
            shards.append(_recorded(store.fetch(number), own, rule, words, tokenizer))
        return _in_words(select(joined(shards), rule), dataset=section.dataset)

    return Accepted(digest, reasons)


def _scores(store: RolloutStore, rule: AcceptSection, *, dataset: str) -> Scores:
    """The verdicts of all shards, by each grader that the rule names."""
    # the graders
    recipe = store.recipe
    if not rule.min_score:
        return {}
    graders = named_graders(store.blobs, recipe.fingerprint)
    try:
        require_known(rule, [*graders])
    except ValueError as error:
        raise CorpusError(
            f"{dataset}: corpus.{error}; correct it, or run `stillhouse grade` with a grader of "
            "this name"
        ) from None

    # their verdicts
    found: dict[str, NDArray[np.float64]] = {}
    for name in rule.min_score:
        verdicts = verdicts_of(store, graders[name], range(recipe.num_shards))
        num_missing = verdicts.count(None)
        if num_missing:
            raise CorpusError(
                f"{num_missing} of {recipe.num_shards} shards of {dataset} have no verdict of "
                f"{name}, which corpus.accept.min_score names; run `stillhouse grade`, with the "
                "file of `stillhouse generate`"
            )
        found[name] = np.array([score for scores in verdicts for score in scores or ()])
    return found


def _test_sets(section: DecontaminateSection | None, *, cache_dir: Path) -> dict[str, PassageIndex]:
    given = {} if section is None else section.test_sets
    return {name: passages_of(each, cache_dir=cache_dir) for name, each in given.items()}


def _recorded(
    rollouts: Rollouts,
    scores: Scores,
    rule: AcceptSection,
    words: Decontamination,
    tokenizer: "PreTrainedTokenizerFast",
) -> Samples:
    """What the selection needs of a shard; its sequences need not stay in memory."""
    ids = [rollouts.ids(row) for row in range(len(rollouts))]
    if rule.similarity is None:
        prints = Fingerprints(digests_of(ids), np.empty((len(ids), 0), np.uint32))
    else:
        prints = fingerprints_of(ids)
    contaminated_S = np.zeros(len(ids), np.bool_)
    if words.test_sets:
        texts = texts_of(ids, tokenizer)
        contaminated_S[:] = [words.found_in(text) is not None for text in texts]
    return Samples(
        prompts_S=rollouts.prompts_S,
        numbers_S=rollouts.samples_S,
        finish_S=rollouts.finish_S,
        has_logprobs_S=rollouts.rows_with_logprobs,
        scores=scores,
        fingerprints=prints,
        contaminated_S=contaminated_S,
    )


def _in_words(selection: Selection, *, dataset: str) -> list[str | None]:
    """Of each sample. Raises CorpusError where nothing is kept."""
    if not len(selection.kept_K):
        counts = ", ".join(
            f"{count:,} {reason}" for reason, count in selection.drops.items() if count
        )
        raise CorpusError(
            f"no sample of {dataset} is accepted: {counts}; lower what corpus.accept asks for, or "
            "generate more samples"
        )
    words = [*(f"samples: {reason}" for reason in selection.drops), None]  # -1 is the last
    return [words[number] for number in selection.reasons_S.tolist()]


def _digest(test_set: PassageIndex) -> str:
    digest = hashlib.sha256()
    for size, grams in test_set.grams.items():
        digest.update(f"{size} {len(grams.hashes_G)} ".encode())
        digest.update(grams.hashes_G.astype("<u8").tobytes())
        digest.update(grams.words_G.astype("<i8").tobytes())
    return digest.hexdigest()
