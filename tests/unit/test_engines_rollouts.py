"""The engine `rollouts`: targets are what an API told of its own text, found by the tokens of a
sample; what it cannot teach is refused as the run is planned."""

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.models import make_model
from helpers.rollouts import make_shard, small_rollout_recipe
from helpers.world import TinyWorld, item_with_tokens, merged
from stillhouse.cli.check import describe
from stillhouse.config import TeacherSection, parse_config
from stillhouse.engines.rollouts import RolloutsEngine
from stillhouse.errors import ConfigError, CorpusError, RecipeError, TeacherError
from stillhouse.logits import CompressedLogits, decode
from stillhouse.models.tokenizers import load_tokenizer, vocabulary_digest
from stillhouse.pipeline import Plan
from stillhouse.pipeline.export import card_data, model_card
from stillhouse.pipeline.labels import label_of
from stillhouse.pipeline.planning import resolved
from stillhouse.pipeline.run_dir import changes_that_matter
from stillhouse.sequence import WorkItem
from stillhouse.sequences.source import whole
from stillhouse.store import ChunkStore
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import ENDED, NO_ENTRY, Rollouts, TopLogprobs
from stillhouse.teacher.actor import stored
from stillhouse.teacher.first_answer import require_first_teacher

K, LENGTH, NUM_PROMPTS = 5, 12, 20
LEARNING: dict[str, Any] = {
    "teacher": {"engine": "rollouts"},
    "target": {"k": 3, "tail_draws": 0},
    "corpus": {
        "accept": {"with_logprobs": True},
        "packing": False,
        "sequence_length": LENGTH,
        "heldout_sequences": 2,
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a model's tokenizer and config, and no weights."""
    folder = make_model(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)
    (folder / "model.safetensors").unlink()
    return str(folder)


def recipe_of(tokenizer: str, **changes: Any) -> RolloutRecipe:
    values = {
        "num_prompts": NUM_PROMPTS,
        "writer_kind": "api",
        "top_logprobs": K,
        "vocabulary_digest": vocabulary_digest(load_tokenizer(tokenizer)),
    }
    return small_rollout_recipe(**values | changes)


def write(folder: Path, recipe: RolloutRecipe, *, salt: int = 0) -> RolloutStore:
    """Shards; of the first sample of each prompt, which ended, all is told but its end."""
    store = RolloutStore.create(str(folder), recipe)
    for number in range(recipe.num_shards):
        store.publish(make_shard(recipe, number, salt=salt))
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> RolloutStore:
    return write(tmp_path_factory.mktemp("store"), recipe_of(tokenizer))


def plan_of(
    world: TinyWorld, run_dir: Path, tokenizer: str, store: RolloutStore, **changes: Any
) -> Plan:
    own = {
        "corpus": {"dataset": f"rollouts://{store.recipe.fingerprint[:16]}"},
        "store": {"url": store.url},
        "teacher": {"model": tokenizer},
    }
    return world.plan(run_dir, **merged(merged(LEARNING, own), changes))


def targets_of(plan: Plan, item: WorkItem) -> CompressedLogits:
    """As they are stored."""
    engine = RolloutsEngine(plan.config.teacher, plan.recipe, device="cpu")
    records_TB, _ = stored(engine.records(item), plan.recipe.spec)
    return decode(records_TB, plan.recipe.spec)


def logprobs_of(store: RolloutStore) -> dict[bytes, tuple[Rollouts, int]]:
    """By the tokens of a sample: its shard, and its row."""
    shards = [store.fetch(number) for number in range(store.recipe.num_shards)]
    return {
        shard.ids(row).tobytes(): (shard, row)
        for shard in shards
        for row in np.flatnonzero(shard.rows_with_logprobs).tolist()
    }


def test_a_plan_needs_a_tokenizer_alone_and_is_made_again_without_more(
    tiny_world: TinyWorld, tokenizer: str, store: RolloutStore, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer, store)
    recipe = plan.recipe
    assert (recipe.teacher_kind, recipe.teacher_dtype, recipe.k) == ("api", "as served", 3)
    facts = {
        "rollouts": store.recipe.fingerprint,
        "shards": store.digest(),
        "target": "log-probabilities of the writer",
    }
    data = json.dumps(facts, separators=(",", ":")).encode()
    assert recipe.teacher_digest == hashlib.sha256(data).hexdigest()
    again = resolved(plan.config, run_dir=tmp_path / "run", cache_dir=tiny_world.folder / "cache")
    assert (again.recipe, again.config) == (recipe, plan.config)
    assert not changes_that_matter(plan.config, again.config)
    assert parse_config(json.loads(plan.config.model_dump_json())) == plan.config


def test_a_shard_that_was_written_again_is_another_teacher(
    tiny_world: TinyWorld, tokenizer: str, store: RolloutStore, tmp_path: Path
) -> None:
    other = write(tmp_path / "store", store.recipe, salt=1)
    plans = [plan_of(tiny_world, tmp_path / "run", tokenizer, each) for each in (store, other)]
    assert len({plan.recipe.teacher_digest for plan in plans}) == 2
    assert plans[0].config.teacher.rollouts == plans[0].config.corpus.dataset


def test_every_target_is_what_was_told_and_the_end_where_nothing_was(
    tiny_world: TinyWorld, tokenizer: str, store: RolloutStore, tmp_path: Path
) -> None:
    plan, by_ids = plan_of(tiny_world, tmp_path / "run", tokenizer, store), logprobs_of(store)
    sequences = whole(plan.sources.train)
    assert len(sequences) == len(by_ids) - 2  # those that are held out
    for row in range(len(sequences)):
        item = WorkItem(7, sequences).only(row)
        places = np.flatnonzero(item.sequences.loss_mask_SL[0])
        ids = item.sequences.token_ids_SL[0, : places[-1] + 2]
        shard, at = by_ids[ids.tobytes()]
        assert shard.top is not None
        found = targets_of(plan, item)

        # all but the last, to the codec's precision
        np.testing.assert_array_equal(
            found.token_ids_TK[:-1], shard.top.ids_SLK[at, places[:-1], :3]
        )
        wanted_TK = shard.top.logprobs_SLK[at, places[:-1], :3]
        np.testing.assert_allclose(found.logprobs_TK[:-1], wanted_TK, atol=0.02, rtol=0.01)
        rest_T = np.log1p(-np.exp(wanted_TK.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(found.tail_logmass_T[:-1], rest_T, atol=0.01, rtol=0.01)

        # and the token that ends it
        assert int(found.token_ids_TK[-1, 0]) == ids[-1]
        assert float(found.logprobs_TK[-1, 0]) == 0.0
        assert float(found.logprobs_TK[-1, 1:].max()) < -30.0
        assert float(found.tail_logmass_T[-1]) == -np.inf


def test_an_end_that_was_told_is_a_target_as_others_are(
    tiny_world: TinyWorld, tokenizer: str, tmp_path: Path
) -> None:
    recipe = recipe_of(tokenizer, num_prompts=6, shard_prompts=6)
    shard = make_shard(recipe, 0)
    assert shard.top is not None
    mask_SL = shard.sequences.loss_mask_SL == 1
    told = TopLogprobs.nothing(len(shard), LENGTH, K)
    told.ids_SLK[mask_SL] = [9, 8, 7, 6, 5]
    told.logprobs_SLK[mask_SL] = [-1.0, -2.0, -3.0, -4.0, -5.0]
    store = RolloutStore.create(str(tmp_path / "store"), recipe)
    store.publish(replace(shard, top=told))
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer, store)
    found = targets_of(plan, item_with_tokens(plan, 0))
    assert set(found.token_ids_TK[:, 0].tolist()) == {9}
    assert found.num_tokens == item_with_tokens(plan, 0).sequences.num_targets


def test_of_samples_with_the_same_tokens_the_first_is_the_target(
    tiny_world: TinyWorld, tokenizer: str, tmp_path: Path
) -> None:
    recipe = recipe_of(tokenizer, num_prompts=5, samples=4)
    shards = [make_shard(recipe, number) for number in range(3)]
    for number, shard in enumerate(shards):
        told = shard.top
        assert told is not None
        shard.sequences.token_ids_SL[0] = shards[0].sequences.token_ids_SL[0]
        shard.sequences.loss_mask_SL[0] = shards[0].sequences.loss_mask_SL[0]
        shard.sampled_logprobs_SL[0], shard.finish_S[0] = 0.0, ENDED
        places = np.flatnonzero(shard.sequences.loss_mask_SL[0])
        told.ids_SLK[0], told.logprobs_SLK[0] = NO_ENTRY, np.nan
        told.ids_SLK[0, places] = np.arange(K) + 10 * number
        told.logprobs_SLK[0, places] = -2.0
    store = RolloutStore.create(str(tmp_path / "store"), recipe)
    for shard in shards:
        store.publish(shard)
    accept = {"keep_unfinished": True}
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer, store, corpus={"accept": accept})
    last = shards[2].sequences
    for rows in ([0], [2, 0]):  # before other shards are read, and after
        found = targets_of(plan, WorkItem(0, last.select(np.array(rows))))
        num_targets = last.select(slice(0, 1)).num_targets
        assert found.token_ids_TK[-num_targets:].tolist() == [[0, 1, 2]] * num_targets


def test_teachers_of_later_runs_are_held_to_the_first(
    tiny_world: TinyWorld, tokenizer: str, store: RolloutStore, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer, store)
    ChunkStore.create(plan.config.store.url, plan.recipe)
    for _ in ("first", "later"):
        engine = RolloutsEngine(plan.config.teacher, plan.recipe, device="cpu")
        require_first_teacher(plan.store, engine.probe())
    other = write(tmp_path / "store", store.recipe, salt=1)
    section = plan_of(tiny_world, tmp_path / "other", tokenizer, other).config.teacher
    probe = RolloutsEngine(section, plan.recipe, device="cpu").probe()
    with pytest.raises(RecipeError, match="disagrees with the one that filled this store first"):
        require_first_teacher(plan.store, probe)


def test_a_sequence_that_is_no_sample_is_named(
    tiny_world: TinyWorld, tokenizer: str, store: RolloutStore, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer, store)
    item = item_with_tokens(plan, 0)
    item.sequences.token_ids_SL[3] += 1
    with pytest.raises(TeacherError, match=r"sequence 3 of chunk 0 is none of the samples of roll"):
        targets_of(plan, item)
    untold = store.fetch(0).sequences.select(slice(1, 2))
    with pytest.raises(TeacherError, match=r"sequence 0 of chunk 5 is none of the samples"):
        targets_of(plan, WorkItem(5, untold))


# what is refused as a run is planned
# ------------------------------------------------------------------------------------------------


OTHER = {"dataset": "d", "format": "chat"}


def values_of(**changes: Any) -> dict[str, Any]:
    """A config's, without any world; a section of `changes` takes the place of the whole."""
    rollouts = {"dataset": "rollouts://0123456789abcdef"}
    named = {"corpus": rollouts, "teacher": {"model": "t"}, "student": {"model": "s"}}
    return merged(named, merged({"student": {}}, LEARNING | changes))


@pytest.mark.parametrize(
    ("changes", "sections"),
    [
        ({"corpus": {}, "target": {}}, {"corpus", "target"}),
        ({"target": {"k": 3}}, {"target"}),
        ({"corpus": {"packing": False}}, {"corpus"}),
        ({"corpus": {"accept": {"with_logprobs": True}}}, {"corpus"}),
        ({"corpus": {"packing": False, "accept": {"keep_repeats": True}}}, {"corpus"}),
    ],
)
def test_what_would_not_be_found_is_refused_with_the_lines_to_write(
    changes: dict[str, Any], sections: set[str]
) -> None:
    values = values_of(**changes)
    with pytest.raises(ConfigError, match='engine is "rollouts", whose targets are') as caught:
        parse_config(values)
    lines = tomllib.loads(str(caught.value).partition("; write\n")[2])
    assert lines.keys() == sections
    parse_config(merged(values, lines))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": OTHER | {"accept": None}}, "corpus is d, .* wanted rollouts alone"),
        ({"corpus": {"mixed_with": [OTHER]}}, "mixed with 1 more; wanted rollouts"),
        ({"corpus": {"source": "a.b:c"}}, r"source a\.b:c, .* wanted rollouts alone"),
        ({"teacher": {"rollouts": "rollouts://00"}}, "leave teacher.rollouts out"),
        (
            {"teacher": {"engine": "transformers", "rollouts": "rollouts://00"}},
            'teacher.rollouts is set, but teacher.engine is "transformers"',
        ),
        ({"evaluate": {"every_steps": 10}}, "there are none here; set it to 0"),
    ],
)
def test_a_config_that_has_no_targets_of_its_corpus_is_refused(
    changes: dict[str, Any], words: str
) -> None:
    parse_config(values_of())
    with pytest.raises(ConfigError, match=words):
        parse_config(merged(values_of(), changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": {"k": 6}}, r'target.k is 6, but the engine "rollouts" gives 5 entries'),
        ({"target": {"temperature": 2.0}}, r'temperature is 2, but the engine "rollouts"'),
        ({"target": {"label_logprob": True}}, r'label_logprob is true, but the engine "rollouts"'),
        ({"target": {"tail_entropy": True}}, r'tail_entropy is true, but the engine "rollouts"'),
        ({"corpus": {"sequence_length": 11}}, r"is 11, but .* up to 12 tokens; set it to 12"),
        ({"teacher": {"device": "cuda"}}, r'the engine "rollouts" has no model'),
    ],
)
def test_what_was_not_told_is_refused_by_name(
    tiny_world: TinyWorld,
    tokenizer: str,
    store: RolloutStore,
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_of(tiny_world, tmp_path / "run", tokenizer, store, **changes)


def test_rollouts_whose_writer_was_asked_for_nothing_are_refused(
    tiny_world: TinyWorld, tokenizer: str, tmp_path: Path
) -> None:
    store = write(tmp_path / "store", recipe_of(tokenizer, top_logprobs=0))
    with pytest.raises(ConfigError, match=r"has no log-probabilities; .* teacher.engine = .text."):
        plan_of(tiny_world, tmp_path / "run", tokenizer, store)


def test_rollouts_of_which_nothing_was_told_are_refused(
    tiny_world: TinyWorld, tokenizer: str, store: RolloutStore, tmp_path: Path
) -> None:
    silent = RolloutStore.create(str(tmp_path / "store"), store.recipe)
    for number in range(silent.recipe.num_shards):
        shard = make_shard(silent.recipe, number)
        silent.publish(replace(shard, top=TopLogprobs.nothing(len(shard), LENGTH, K)))
    with pytest.raises(CorpusError, match=r"no sample of .* 19 without log-probabilities of its"):
        plan_of(tiny_world, tmp_path / "run", tokenizer, silent)
    named = f"rollouts://{silent.url}/{silent.recipe.fingerprint[:16]}"
    section = TeacherSection(model="t", engine="rollouts", rollouts=named)
    recipe = plan_of(tiny_world, tmp_path / "run", tokenizer, store).recipe
    with pytest.raises(TeacherError, match="no sample of these rollouts has log-probabilities"):
        RolloutsEngine(section, recipe, device="cpu").probe()


def test_check_says_that_there_is_no_teacher(
    tiny_world: TinyWorld,
    tokenizer: str,
    store: RolloutStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    describe(plan_of(tiny_world, tmp_path / "run", tokenizer, store))
    told = " ".join(capsys.readouterr().out.split())
    assert f"none: the targets are log-probabilities in rollouts://{store.url}" in told


def test_card_and_label_name_the_rollouts(
    tiny_world: TinyWorld, tokenizer: str, store: RolloutStore, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer, store)
    name = f"rollouts {store.recipe.fingerprint[:16]}"
    card = model_card(plan.config, plan.recipe, [], role="student", steps=3)
    assert f"the top 3 log-probabilities of {name} and the mass of the rest" in card
    assert f"| teacher | {name}, as served |" in card
    assert "teacher:" not in card_data(plan.config).to_yaml()
    assert label_of(plan, plan.request.start).names["teacher"] == name
