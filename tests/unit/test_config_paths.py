"""A relative path in a config file is relative to that file; one of --set to the current
directory."""

from pathlib import Path

import pytest

from stillhouse.config import Config, load_config, parse_config
from stillhouse.pipeline.run_dir import changes_that_matter

TOML = """
[corpus]
dataset = '{dataset}'
[teacher]
model = '{teacher}'
[student]
model = 'owner/small'
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with configs and data in folders beside each other; the current directory is its
    root."""
    for folder in ("configs/teacher", "configs/owner", "data", "models/big"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("data/a.jsonl", "data/b.jsonl", "configs/own.jsonl"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(
    folder: str, *, dataset: str = "stdlib", teacher: str = "owner/big", rest: str = ""
) -> Config:
    path = Path(folder) / "run.toml"
    path.write_text(TOML.format(dataset=dataset, teacher=teacher) + rest)
    return load_config(path)


def test_a_path_with_dots_is_relative_to_its_config_file(project: Path) -> None:
    config = load(
        "configs",
        dataset="../data/*.jsonl",
        teacher="./gone",
        rest="checkpoint_url = '../kept'\n[store]\nurl = './store'\n",
    )
    assert config.corpus.dataset == str(project / "data" / "*.jsonl")
    assert config.teacher.model == str(project / "configs" / "gone")
    assert config.store.url == str(project / "configs" / "store")
    assert config.student.checkpoint_url == str(project / "kept")


def test_an_input_beside_the_config_file_is_found_there(project: Path) -> None:
    config = load("configs", dataset="own.jsonl", teacher="teacher")
    assert config.corpus.dataset == str(project / "configs" / "own.jsonl")
    assert config.teacher.model == str(project / "configs" / "teacher")
    assert load("configs", dataset="*.jsonl").corpus.dataset == str(project / "configs/*.jsonl")


@pytest.mark.parametrize("name", ["data/a.jsonl", "owner/name", "stdlib", "/data/x", "~/x"])
def test_any_other_input_stays_as_it_is(project: Path, name: str) -> None:
    (project / "configs" / "stdlib").mkdir()
    assert load("configs", dataset=name).corpus.dataset == name


@pytest.mark.parametrize("given", ["../data/chat.jinja", "own.jinja", "{{ a }}", "./{% b %}"])
def test_a_chat_template_is_a_path_as_others_are_unless_it_is_the_template(
    project: Path, given: str
) -> None:
    (project / "configs" / "own.jinja").touch()
    (project / "configs" / "run.toml").write_text(
        f"[corpus]\ndataset = 'stdlib'\nformat = 'chat'\nchat_template = '{given}'\n"
        "[teacher]\nmodel = 'owner/big'\n[student]\nmodel = 'owner/small'\n"
    )
    found = load_config(project / "configs" / "run.toml").corpus.chat_template
    paths = {
        "../data/chat.jinja": str(project / "data" / "chat.jinja"),
        "own.jinja": str(project / "configs" / "own.jinja"),
    }
    assert found == paths.get(given, given)


@pytest.mark.parametrize("url", ["runs/store", "s3://bucket/store", "/data/store"])
def test_any_other_output_stays_as_it_is(project: Path, url: str) -> None:
    (project / "configs" / "runs" / "store").mkdir(parents=True)
    assert load("configs", rest=f"[store]\nurl = '{url}'\n").store.url == url


def test_the_parent_of_a_linked_folder_is_that_of_the_folder(project: Path) -> None:
    (project / "deep" / "er").mkdir(parents=True)
    (project / "deep" / "er" / "linked").symlink_to(project / "configs")
    config = load("deep/er/linked", dataset="../data/a.jsonl")
    assert config.corpus.dataset == str(project / "data" / "a.jsonl")


def test_a_test_set_is_an_input_as_a_data_set_is(project: Path) -> None:
    path = project / "configs" / "run.toml"
    path.write_text(
        TOML.format(dataset="rollouts://0123456789abcdef", teacher="owner/big")
        + "[corpus.decontaminate.test_sets]\na = {dataset = 'own.jsonl'}\n"
        "b = {dataset = '../data/b.jsonl'}\nc = {dataset = 'owner/name'}\n"
    )
    rule = load_config(path).corpus.decontaminate
    assert rule is not None
    assert {name: each.dataset for name, each in rule.test_sets.items()} == {
        "a": str(project / "configs" / "own.jsonl"),
        "b": str(project / "data" / "b.jsonl"),
        "c": "owner/name",
    }


def test_an_override_is_relative_to_the_current_directory(project: Path) -> None:
    path = project / "configs" / "run.toml"
    path.write_text(TOML.format(dataset="stdlib", teacher="owner/big"))
    override = "corpus.dataset = './own.jsonl'"
    assert load_config(path, override).corpus.dataset == "./own.jsonl"


@pytest.mark.usefixtures("project")
def test_a_run_planned_with_another_spelling_of_a_path_is_the_same_run() -> None:
    """A run directory remembers what its config file said: a path relative to the current
    directory, before it moved into a file beside the data."""
    now = load("data", dataset="a.jsonl")
    before = parse_config(
        now.model_dump() | {"corpus": now.corpus.model_dump() | {"dataset": "data/a.jsonl"}}
    )
    other = parse_config(
        now.model_dump() | {"corpus": now.corpus.model_dump() | {"dataset": "data/b.jsonl"}}
    )
    assert before != now
    assert changes_that_matter(before, now) == []
    assert len(changes_that_matter(other, now)) == 1
