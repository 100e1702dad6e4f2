"""The command `grade` as a function of a generation's plan: graders give verdicts on the rollouts
that lie in its store.

It works in this process, and in those of the graders. A verdict is one create-only put a shard, so
the command can be stopped at any moment and given again, also while `generate` is at work.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.cluster.environment import secret_in
from stillhouse.config import ServerSection
from stillhouse.config.graders import GraderSection, JudgeSection, OwnSection, PythonSection
from stillhouse.errors import ChunkError, ConfigError, StoreError
from stillhouse.graders import Grader, Sample, graded, identity_of, make_grader
from stillhouse.graders.python import sandbox_of
from stillhouse.pipeline.console import say, tell_of_wait
from stillhouse.pipeline.generation import Generation
from stillhouse.pipeline.planning import tokenizer_of
from stillhouse.retry import DEFAULT_PATIENCE, insist
from stillhouse.sequences.ids import texts_of
from stillhouse.sequences.prompts import Prompts
from stillhouse.sequences.selection import SET_ASIDE_REASON
from stillhouse.servers.access import access_of
from stillhouse.servers.client import Access
from stillhouse.store import ChunkMissing
from stillhouse.store.grader_names import claim_name, named_graders
from stillhouse.store.rollout_maintenance import is_begun
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import ENDED, SET_ASIDE, Rollouts
from stillhouse.store.verdicts import (
    graded_shards,
    grader_name,
    put_verdict,
    verdict_key,
    verdicts_of,
)

_log = logging.getLogger(__name__)

_Texts = Callable[[Sequence[NDArray[np.int32]]], list[str]]


@dataclass(frozen=True, slots=True)
class Grades:
    """What lies in the store of one grader's verdicts, and what this call has added."""

    name: str
    num_shards: int  # of which it has graded so many by now
    num_new: int  # in this call
    num_samples: int
    mean_score: float  # nan where nothing is graded
    full_share: float  # of the samples, that have the score 1; nan where nothing is graded
    without_score: Mapping[str, int]  # samples of this call that count as 0, by reason


@dataclass(frozen=True, slots=True)
class Standing:
    """Of a grader of a config: how many shards it has graded, and why it cannot grade more here;
    None where it can."""

    name: str
    num_graded: int
    problem: str | None


def standings(plan: Generation) -> list[Standing]:
    """Of each grader of the config. Nothing is written, and no server is asked."""
    return [_standing(plan, section) for section in plan.config.graders]


def _standing(plan: Generation, section: GraderSection) -> Standing:
    # whether it can be made
    try:
        make_grader(section, access=_access_of(section, plan)).close()
        if isinstance(section, PythonSection):
            sandbox_of(section)
        problem = missing_key(section) if isinstance(section, JudgeSection) else None
    except ConfigError as error:
        problem = str(error)
        if isinstance(section, OwnSection):  # its verdicts go by the digest of its file
            return Standing(section.title, 0, problem)

    # its verdicts, and what its name stands for
    digits = grader_name(_with_references(identity_of(section), plan.prompts))
    try:
        if not is_begun(plan.store):
            return Standing(section.title, 0, problem)
        num_graded = len(graded_shards(plan.store, digits))
        named = named_graders(plan.store.blobs, plan.recipe.fingerprint)
    except (ChunkError, StoreError) as error:
        return Standing(section.title, 0, problem or str(error))
    if named.get(section.title, digits) != digits:
        problem = (
            "in the store this name stands for one of other settings or references, and its "
            "verdicts stay; set them back, or give this one a `name` of its own"
        )
    return Standing(section.title, num_graded, problem)


def missing_key(section: ServerSection) -> str | None:
    """What is missing where a server wants a key, since it costs money or a config names the key's
    variable, and the variable is not set."""
    wants_one = section.is_paid or "api_key_env" in section.model_fields_set
    if not wants_one or secret_in(section.api_key_env) is not None:
        return None
    return f"{section.api_key_env}, which api_key_env names, is not set; set it to the server's key"


def grade(
    plan: Generation, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> list[Grades]:
    """Grade each shard that is in the store, by each of the config's graders that has not graded it
    yet. `on_progress` is told how many of how many verdicts are there.

    Raises ConfigError where a grader cannot be made, or its name stands for another one;
    GraderError where one fails on all samples of a shard; ChunkError where a shard is damaged.
    """
    with graders_of(plan) as graders:
        return grade_with(graders, plan, on_progress=on_progress)


@contextmanager
def graders_of(plan: Generation) -> Iterator[dict[str, Grader]]:
    """The config's graders by their names, until the end of the block; then what judges came to is
    said, where that is limited. Raises ConfigError."""
    graders: dict[str, Grader] = {}
    accesses = {section.title: _access_of(section, plan) for section in plan.config.graders}
    try:
        for section in plan.config.graders:
            graders[section.title] = make_grader(section, access=accesses[section.title])
        yield graders
    finally:
        for grader in graders.values():
            grader.close()
    for section in plan.config.graders:
        access = accesses[section.title]
        if isinstance(section, JudgeSection) and section.max_cost_usd is not None and access:
            spent, limit = access.money.granted_usd(), section.max_cost_usd
            say(f"the grader {section.title}: {spent:.4g} of {limit:g} USD spent or reserved")


def grade_with(
    graders: Mapping[str, Grader],
    plan: Generation,
    *,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Grades]:
    """As `grade`, with these graders, which are not closed."""
    # the names, which a run refers to, before any work
    store, fingerprint = plan.store, plan.recipe.fingerprint
    if not store.has_recipe():
        raise StoreError(
            f"there are no rollouts of these settings in {store.url}; `stillhouse generate`, given "
            "the same file, writes them"
        )
    identities = {
        name: _with_references(grader.identity, plan.prompts) for name, grader in graders.items()
    }
    for name, identity in identities.items():
        claim_name(store.blobs, fingerprint, name=name, grader=identity)

    # what is there, and what is missing
    published = sorted(store.published())
    done = {name: graded_shards(store, grader_name(each)) for name, each in identities.items()}
    num_done = sum(len(numbers & {*published}) for numbers in done.values())
    failures = {name: Counter[str]() for name in graders}
    num_new = dict.fromkeys(graders, 0)
    texts = partial(texts_of, tokenizer=tokenizer_of(plan.config.writer))
    for number in published:
        missing = [name for name in graders if number not in done[name]]
        if not missing:
            continue
        checksum = store.checksum(number)
        samples = _samples(plan, number, texts)
        for name in missing:
            scores = _scores(graders[name], samples, failures[name])
            _put(store, number, identities[name], scores)
            if not _is_still(store, number, checksum):
                key = verdict_key(fingerprint, grader_name(identities[name]), number)
                store.withdraw(key)
                _log.warning("shard %d was replaced while it was graded; grade it again", number)
                break
            num_new[name] += 1
            num_done += 1
            on_progress(num_done, len(published) * len(graders))
    return [
        _summary(name, store, grader_name(identity), num_new[name], failures[name])
        for name, identity in identities.items()
    ]


def _with_references(identity: Mapping[str, Any], prompts: Prompts) -> dict[str, Any]:
    """What decides the scores of these prompts' samples: the grader, and the references."""
    own = {"references": prompts.references_digest} if prompts.references else {}
    return {**identity, **own}


def _samples(plan: Generation, number: int, texts: _Texts) -> list[Sample | None]:
    """The samples of a shard as graders see them, in order; None for one that was set aside."""
    rollouts, references = plan.store.fetch(number), plan.prompts.references
    rows = plan.store.rows(number)
    prompts = dict(zip(rows, texts([plan.prompts[row] for row in rows]), strict=True))
    written = texts([_written(rollouts, row) for row in range(len(rollouts))])
    return [
        None
        if finish == SET_ASIDE
        else Sample(prompts[prompt], text, references[prompt] if references else None)
        for prompt, text, finish in zip(
            rollouts.prompts_S.tolist(), written, rollouts.finish_S.tolist(), strict=True
        )
    ]


def _written(rollouts: Rollouts, row: int) -> NDArray[np.int32]:
    """The ids of a sample's text: without the one with which it ended itself."""
    ids = rollouts.sampled_ids(row)
    return ids[:-1] if rollouts.finish_S[row] == ENDED else ids


def _scores(
    grader: Grader, samples: Sequence[Sample | None], failures: Counter[str]
) -> list[float]:
    """Of each sample; those that have none are counted by reason, and have 0."""
    found = graded(grader, [each for each in samples if each is not None])
    failures.update(found.failures)
    failures.update({SET_ASIDE_REASON: samples.count(None)})
    scores = iter(found.scores)
    return [0.0 if each is None else next(scores) for each in samples]


def _put(
    store: RolloutStore, number: int, identity: Mapping[str, Any], scores: Sequence[float]
) -> None:
    """A store that is full or does not answer is waited for."""
    insist(
        lambda: put_verdict(
            store.blobs, store.recipe.fingerprint, number=number, grader=identity, scores=scores
        ),
        patience=DEFAULT_PATIENCE,
        tell=tell_of_wait,
    )


def _is_still(store: RolloutStore, number: int, checksum: str) -> bool:
    """Whether the shard with this checksum is still in its place."""
    try:
        return store.checksum(number) == checksum
    except (ChunkMissing, ChunkError):
        return False


def _summary(
    name: str, store: RolloutStore, grader: str, num_new: int, failures: Mapping[str, int]
) -> Grades:
    """What all verdicts of a grader say together."""
    verdicts = verdicts_of(store, grader, sorted(graded_shards(store, grader)))
    scores = np.array([score for each in verdicts for score in each or ()])
    return Grades(
        name,
        len(verdicts),
        num_new,
        len(scores),
        float(scores.mean()) if len(scores) else math.nan,
        float((scores == 1.0).mean()) if len(scores) else math.nan,
        {reason: count for reason, count in failures.items() if count},
    )


def _access_of(section: GraderSection, plan: Generation) -> Access | None:
    """A judge's access to its server. What it costs is counted for this grader of these
    rollouts."""
    if not isinstance(section, JudgeSection):
        return None
    name = grader_name(_with_references(identity_of(section), plan.prompts))
    folder = f"{plan.store.folder}/judges/{name}"
    return access_of(section, plan.store.blobs, folder, table=f"the grader {section.title}")
