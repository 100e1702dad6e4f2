"""Every setting is described, and the table, the schema and the pages say what the code does."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from helpers.command import stillhouse
from stillhouse.cli.reference import api_page, settings_page
from stillhouse.config import parse_config
from stillhouse.config.settings import all_settings, config_schema
from stillhouse.errors import ConfigError

ROOT = Path(__file__).parents[2]
# those of runs: the schema is not of `generate`
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.toml"))
    if "prompts" not in tomllib.loads(path.read_text())
]
LEAST = {"corpus": {"dataset": "d"}, "teacher": {"model": "t"}, "student": {"model": "s"}}


def test_every_setting_has_a_description() -> None:
    settings = all_settings()
    assert len(settings) > 80
    assert [f"{each.section}.{each.name}" for each in settings if not each.description] == []


@pytest.mark.parametrize(
    "absurd",
    [
        "student.learning_rate = 1e10",
        "student.weight_decay = 1000",
        "student.ce_weight = 1e9",
        "student.global_batch_sequences = 1_000_000_000_000",
        "student.prefetch_batches = 1_000_000_000",
        "student.max_steps = 1_000_000_000_000",
        "student.num_gpus = 100_000",
        "teacher.num_cpus = 1e9",
        "teacher.block_tokens = 1_000_000_000",
        "teacher.watchdog_s = 1e12",
        "corpus.sequence_length = 1_000_000_000",
        "target.temperature = 1e9",
        "target.temperature = 1e-9",
        "cluster.threads = 1_000_000",
    ],
)
def test_an_absurd_value_is_refused_with_its_range(absurd: str) -> None:
    section, table = next(iter(tomllib.loads(absurd).items()))
    with pytest.raises(ConfigError, match=rf"{section}\..*than.*; found "):
        parse_config(LEAST | {section: LEAST.get(section, {}) | table})


def test_every_number_has_an_upper_bound_but_the_one_that_switches_clipping_off() -> None:
    unbounded = {
        f"{each.section}.{each.name}"
        for each in all_settings()
        if each.kind.startswith(("integer", "number"))
        and not {"to", "below"} & {*each.kind.split()}
    }
    assert unbounded == {"student.gradient_clip"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_every_config_and_refuses_a_misspelt_setting(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    values = tomllib.loads(path.read_text())
    validator.validate(values)
    values["student"]["learning_rte"] = 1e-4
    with pytest.raises(jsonschema.ValidationError, match="learning_rte"):
        validator.validate(values)


def test_the_schema_says_what_each_setting_is() -> None:
    schema = config_schema()
    sections = {
        name: schema["$defs"][reference["$ref"].rpartition("/")[2]]["properties"]
        for name, reference in schema["properties"].items()
    }
    for each in all_settings():
        assert sections[each.section][each.name]["description"] == each.description
    assert json.loads(stillhouse("schema").out) == schema


def test_settings_are_listed_by_section_by_word_and_in_all() -> None:
    lines = stillhouse("settings", "store").out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [
        "store.url",
        "store.chunk_sequences",
        "store.window_bytes",
        "store.retain",
    ]
    assert "student.warmup_steps" in stillhouse("settings", "WARM-UP").out
    assert len(stillhouse("settings").out.splitlines()) == len(all_settings()) + 1


@pytest.mark.parametrize(
    ("word", "answer"),
    [("learning_rte", "did you mean 'learning_rate'?"), ("lr", "here it is student.learning_rate")],
)
def test_a_word_of_no_setting_is_answered_with_the_nearest(word: str, answer: str) -> None:
    outcome = stillhouse("settings", word)
    assert outcome.code == 2
    assert answer in outcome.err


@pytest.mark.parametrize(("name", "page"), [("settings", settings_page), ("api", api_page)])
def test_the_generated_pages_are_current(name: str, page: object) -> None:
    """`python -m stillhouse.cli.reference docs` writes them."""
    assert callable(page)
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == page()
