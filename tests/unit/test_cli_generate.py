"""`stillhouse generate`: mistakes in its file are told before anything is loaded."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillhouse.cli.main import app
from stillhouse.config import Section
from stillhouse.config.generate import GenerateConfig, load_generate_config
from stillhouse.config.graders import SECTIONS_BY_KIND, AcceptSection
from stillhouse.errors import ConfigError

GRADERS = [(kind, name) for kind, each in SECTIONS_BY_KIND.items() for name in each.model_fields]
WHOLE = """
[prompts]
dataset = "prompts.jsonl"
[writer]
model = "./writer"
[sampling]
samples = 4
"""


def file_of(folder: Path, text: str) -> Path:
    file = folder / "generate.toml"
    file.write_text(text)
    return file


def test_a_file_is_read_with_its_paths_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").touch()
    config = load_generate_config(file_of(tmp_path, WHOLE), ["sampling.seed = 3"])
    assert config.prompts.dataset == str(tmp_path / "prompts.jsonl")
    assert config.writer.model == str(tmp_path / "writer")
    assert (config.sampling.samples, config.sampling.seed) == (4, 3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("sample = 3", "sampling.sample: no such setting; .*samples"),
        ("top_p = 0.0", "sampling.top_p: .*found 0.0"),
        ("max_new_tokens = 2048", "sampling: max_new_tokens is 2048, which leaves no room"),
        ("[student]", "student: no such setting"),
        ("[writer.resources]\na = 0", "writer.resources.a"),
        ("[[graders]]\nkind = 'exakt'", "did you mean 'exact'"),
        ("[[graders]]\nkind = 'exact'\nnormalize = 'none'", r"exact.normalize: no .*normalise"),
        (
            "[[graders]]\nkind = 'number'",
            "'number' compares with references, but prompts.reference",
        ),
    ],
)
def test_a_mistake_is_told_by_its_setting(tmp_path: Path, more: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load_generate_config(file_of(tmp_path, WHOLE + more))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('writer.engine = "vlm"', "no engine 'vlm'; known: transformers, vllm, openai"),
        ("writer.vllm.kv_cache_gb = 2", 'vllm has settings, but engine is "transformers"'),
        ('writer.engine = "openai"', r"\[writer\.openai\] base_url"),
        ("writer.min_replicas = 2", "min_replicas is 2, above max_replicas, which is 1"),
        ("graders = [{kind = 'a:b'}, {kind = 'a:b'}]", "two graders are called 'a:b'"),
        ('prompts.format = "text"\nprompts.chat_template = "{{ a }}"', 'set format = "chat"'),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_generate_config(file_of(tmp_path, WHOLE), override)


@pytest.mark.parametrize("section", ["prompts", "writer", "sampling"])
def test_the_settings_of_a_section_are_listed(section: str) -> None:
    result = CliRunner().invoke(app, ["settings", section])
    assert result.exit_code == 0
    fields = GenerateConfig.model_fields[section].annotation
    assert isinstance(fields, type)
    assert issubclass(fields, Section)
    for name in fields.model_fields:
        assert f"{section}.{name}" in result.output


@pytest.mark.parametrize("word", ["graders", "accept", "decontaminate"])
def test_the_settings_of_graders_and_of_acceptance_are_listed(word: str) -> None:
    output = CliRunner().invoke(app, ["settings", word]).output
    wanted = {
        "graders": [f"graders ({kind}).{name}" for kind, name in GRADERS],
        "accept": [f"corpus.accept.{name}" for name in AcceptSection.model_fields],
        "decontaminate": [f"corpus.decontaminate.{name}" for name in ("test_sets", "max_share")],
    }
    assert [name for name in wanted[word] if name not in output] == []


def test_to_grade_without_a_grader_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["grade", str(file_of(tmp_path, WHOLE))])
    assert result.exit_code == 2
    assert "has no grader; add a table" in result.output


def test_a_model_that_is_not_there_ends_the_command_with_words(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(file_of(tmp_path, WHOLE))])
    assert result.exit_code == 2
    assert "writer" in result.output
