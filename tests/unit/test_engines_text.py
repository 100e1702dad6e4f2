"""The text as its own teacher: no model is looked for, the target is the next token, and what that
cannot serve is refused with the lines to write."""

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from helpers.chunks import make_chunk, small_recipe
from helpers.models import make_model
from helpers.world import TinyWorld, merged
from stillhouse.config import TargetSection, TeacherSection, parse_config
from stillhouse.config.generate import WriterSection
from stillhouse.engines.choice import engine_named, require_capable
from stillhouse.engines.text import TextEngine
from stillhouse.errors import ConfigError
from stillhouse.logits import Fidelity, decode
from stillhouse.pipeline import Plan
from stillhouse.pipeline.export import card_data, model_card
from stillhouse.pipeline.labels import label_of
from stillhouse.pipeline.planning import resolved
from stillhouse.pipeline.run_dir import changes_that_matter
from stillhouse.sequence import WorkItem
from stillhouse.store import parse_recipe
from stillhouse.teacher.actor import stored

RECIPE = small_recipe(
    format=2, k=1, num_draws=0, teacher_kind="text", teacher_dtype="one-hot", sequence_length=24
)
TEXT_ALONE: dict[str, Any] = {
    "teacher": {"engine": "text"},
    "target": {"k": 1, "tail_draws": 0},
    "student": {"divergence_weight": 0.0, "ce_weight": 1.0},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a model's tokenizer and config, and no weights."""
    folder = make_model(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)
    (folder / "model.safetensors").unlink()
    return str(folder)


def plan_of(world: TinyWorld, run_dir: Path, tokenizer: str, **changes: Any) -> Plan:
    values = merged(TEXT_ALONE, {"teacher": {"model": tokenizer}})
    return world.plan(run_dir, **merged(values, changes))


def test_a_stored_target_is_the_next_token_and_nothing_is_lost() -> None:
    sequences = make_chunk(RECIPE, 1).sequences
    engine = TextEngine(TeacherSection(model="t", engine="text"), RECIPE, device="cpu")
    records_TB, measured = stored(engine.records(WorkItem(1, sequences)), RECIPE.spec)
    assert measured == Fidelity(kept_mass=1.0, codec_kl=0.0, worst_kl=0.0)
    found = decode(records_TB, RECIPE.spec)
    wanted = [
        int(ids_L[at + 1])
        for ids_L, mask_L in zip(sequences.token_ids_SL, sequences.loss_mask_SL, strict=True)
        for at in np.flatnonzero(mask_L)
    ]
    assert found.token_ids_TK.flatten().tolist() == wanted
    assert torch.equal(found.logprobs_TK, torch.zeros(len(wanted), 1))
    assert (found.tail_logmass_T == -torch.inf).all()


def test_a_plan_needs_a_tokenizer_alone_and_is_made_again_without_more(
    tiny_world: TinyWorld, tokenizer: str, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer)
    recipe = plan.recipe
    assert (recipe.teacher_kind, recipe.teacher_dtype, recipe.k) == ("text", "one-hot", 1)
    assert recipe.teacher_digest == hashlib.sha256(b'{"target":"next token"}').hexdigest()
    assert parse_recipe(recipe.canonical_json(), where="here") == recipe
    again = resolved(plan.config, run_dir=tmp_path / "run", cache_dir=tiny_world.folder / "cache")
    assert (again.recipe, again.config) == (recipe, plan.config)
    assert not changes_that_matter(plan.config, again.config)


def test_equal_texts_have_equal_targets_whatever_else_a_teacher_is_given(
    tiny_world: TinyWorld, tokenizer: str, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer)
    other = plan_of(
        tiny_world,
        tmp_path / "other",
        str(tiny_world.folder / "teacher"),
        teacher={"dtype": "bfloat16", "logits": "fast", "revision": "v2"},
    )
    assert other.recipe == plan.recipe
    asked = tiny_world.plan(
        tmp_path / "asked", target=TEXT_ALONE["target"], student=TEXT_ALONE["student"]
    )
    assert asked.recipe.fingerprint != plan.recipe.fingerprint


def values_of(**changes: Any) -> dict[str, Any]:
    """A config's, without any world; a section of `changes` takes the place of the whole."""
    values = TEXT_ALONE | {"corpus": {"dataset": "d"}} | changes
    named = {"teacher": {"model": "t"}, "student": {"model": "s"}}
    return merged(values, named)


@pytest.mark.parametrize(
    ("changes", "sections"),
    [
        ({"target": {}, "student": {}}, {"target", "student"}),
        ({"target": {"k": 1}}, {"target"}),
        ({"target": {"k": 2, "tail_draws": 0}}, {"target"}),
        ({"student": {"ce_weight": 1.0}}, {"student"}),
        ({"student": {"divergence_weight": 0.5, "divergence": "reverse_kl"}}, {"student"}),
    ],
)
def test_what_the_text_cannot_teach_is_refused_with_the_lines_to_write(
    changes: dict[str, Any], sections: set[str]
) -> None:
    values = values_of(**changes)
    with pytest.raises(ConfigError, match="whose target is the next token alone") as caught:
        parse_config(values)
    lines = tomllib.loads(str(caught.value).partition("; write\n")[2])
    assert lines.keys() == sections
    config = parse_config(merged(values, lines))
    assert (config.target.k, config.target.tail_draws) == (1, 0)
    assert config.student.divergence_weight == 0.0 < config.student.ce_weight


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"control": True}, "the student is that one; leave it out"),
        ({"every_steps": 10}, "there are none here; set it to 0"),
    ],
)
def test_comparisons_that_need_a_teacher_are_refused(evaluate: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(values_of(evaluate=evaluate))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"device": "cuda"}, 'teacher.device is "cuda", but the engine "text" has no model'),
        ({"num_gpus": 0.5}, "teacher.num_gpus is 0.5, .* leave device and num_gpus out"),
    ],
)
def test_a_gpu_for_no_model_is_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TextEngine.describe(TeacherSection(model="t", engine="text", **section))


@pytest.mark.parametrize("name", ["temperature", "label_logprob", "tail_entropy"])
def test_what_means_nothing_of_one_token_is_refused_by_name(name: str) -> None:
    capabilities = engine_named("text").describe(TeacherSection(model="t", engine="text"))
    only = {"k": 1, "tail_draws": 0}
    require_capable(capabilities, TargetSection.model_validate(only), engine="text")
    asked = TargetSection.model_validate(only | {name: 2.0 if name == "temperature" else True})
    with pytest.raises(ConfigError, match=f'target.{name} is .*the engine "text"'):
        require_capable(capabilities, asked, engine="text")


def test_a_writer_needs_a_model() -> None:
    with pytest.raises(
        ValidationError, match="no engine 'text'; known: transformers, vllm, openai"
    ):
        WriterSection.model_validate({"model": "m", "engine": "text"})


def test_card_and_label_name_no_teacher(
    tiny_world: TinyWorld, tokenizer: str, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path / "run", tokenizer)
    card = model_card(plan.config, plan.recipe, [], role="student", steps=3)
    assert "on the text alone." in card
    assert "| loss | 1 of cross-entropy |" in card
    assert "distilled from" not in card
    assert "| teacher |" not in card
    assert "teacher:" not in card_data(plan.config).to_yaml()
    assert plan.request.start.teacher is None
    assert label_of(plan, plan.request.start).names["teacher"] == "the text itself"
