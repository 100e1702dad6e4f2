"""A config is read whole or refused in one message that names the place, what was found and what
would be right."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stillhouse.cli.init import starter_toml
from stillhouse.config import Config, load_config, parse_config, resolved_json
from stillhouse.errors import ConfigError

LEAST: dict[str, Any] = {
    "corpus": {"dataset": "stdlib"},
    "teacher": {"model": "big"},
    "student": {"model": "small"},
}
LEAST_TOML = "[corpus]\ndataset = 'stdlib'\n[teacher]\nmodel = 'big'\n[student]\nmodel = 'small'\n"


@pytest.fixture
def least(tmp_path: Path) -> Path:
    path = tmp_path / "least.toml"
    path.write_text(LEAST_TOML)
    return path


def refusal(*paths: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    return str(caught.value)


def test_three_names_are_enough(least: Path) -> None:
    assert load_config([least]) == parse_config(LEAST)


def test_files_are_merged_left_to_right_key_by_key(least: Path, tmp_path: Path) -> None:
    over = tmp_path / "over.toml"
    over.write_text("student.model = 'tiny'\ntarget.k = 8\n")
    config = load_config([least, over])
    assert (config.student.model, config.target.k, config.corpus.dataset) == ("tiny", 8, "stdlib")
    assert load_config([over, least]).student.model == "small"


def test_overrides_are_toml_and_win_over_files(least: Path) -> None:
    overrides = [
        "student.zero_stage = 3",
        "student.betas = [0.8, 0.9]",
        'tracking.wandb = "off"',
        "teacher.resources = {spot = 1}",
    ]
    config = load_config([least], overrides)
    assert (config.student.zero_stage, config.student.betas, config.tracking.wandb) == (
        3,
        (0.8, 0.9),
        "off",
    )
    assert config.teacher.resources == {"spot": 1.0}


@pytest.mark.parametrize(
    ("override", "place", "cure"),
    [
        ("student.learning_rte = 1e-4", "student.learning_rte", "did you mean 'learning_rate'?"),
        ("studnet.seed = 1", "studnet", "did you mean 'student'?"),
        ("target.zebra = 1", "target.zebra", "known here: k, tail_draws, value_bits, temperature"),
        ("target.k = -1", "target.k", "greater than or equal to 0; found -1"),
        ("target = {k = 0, tail_draws = 0}", "target", "k and tail_draws are both 0"),
        ("target = {tail_draws = 0, weighted_draws = true}", "target", "set tail_draws above 0"),
        ("student.forward_kl_steps = 5", "student", "divergence is forward_kl already"),
        (
            "student = {model = 's', divergence = 'jsd', forward_kl_steps = 5, ce_weight = 1, "
            "divergence_weight = 0}",
            "student",
            "but divergence_weight is 0",
        ),
        ("target.tail_draws = -1", "target.tail_draws", "greater than or equal to 0; found -1"),
        ("student.epochs = 'many'", "student.epochs", "found 'many'"),
        ("student.zero_stage = 4", "student.zero_stage", "0, 1, 2, 3 or 'auto'; found 4"),
        ("student.learning_rate = inf", "student.learning_rate", "finite number; found inf"),
        ("student.betas = [0.9, 1.5]", "student.betas.1", "less than 1; found 1.5"),
        ("student = 3", "student", "found 3"),
        ("corpus.packing = false", "corpus", 'set format = "chat"'),
        (
            "teacher.min_replicas = 2",
            "teacher",
            "min_replicas is 2, above max_replicas, which is 1",
        ),
        ("student.divergence_weight = 0", "student", "set one of them above 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found_and_what_is_wanted(
    least: Path, override: str, place: str, cure: str
) -> None:
    message = refusal(least, overrides=(override,))
    assert f"  - {place}: " in message
    assert cure in message


def test_every_mistake_is_named_at_once(least: Path) -> None:
    message = refusal(
        least, overrides=("target.k = -1", "student.seeed = 1", "store.window_bytes = -1")
    )
    assert [line.split(":")[0] for line in message.splitlines()[1:]] == [
        "  - student.seeed",
        "  - target.k",
        "  - store.window_bytes",
    ]


def test_draws_alone_need_the_divergence_that_learns_from_them(least: Path) -> None:
    draws = ("target.k = 0", "target.tail_draws = 50")
    assert load_config([least], draws).target.tail_draws == 50
    message = refusal(least, overrides=(*draws, "student.divergence = 'jsd'"))
    assert (
        'student.divergence is "jsd", which learns nothing from draws; set student.divergence = '
        '"forward_kl"' in message
    )
    unused = (
        "student.divergence = 'jsd'",
        "student.divergence_weight = 0",
        "student.ce_weight = 1",
    )
    assert load_config([least], (*draws, *unused)).target.k == 0


@pytest.mark.parametrize("setting", ["patience = 3", "keep_best = true"])
def test_what_held_out_scores_decide_needs_scores(least: Path, setting: str) -> None:
    words = refusal(least, overrides=(f"evaluate.{setting}",))
    assert f"{setting.split()[0]} is set, but every_steps is 0" in words
    assert load_config([least], [f"evaluate.{setting}", "evaluate.every_steps = 5"])


def test_what_has_no_default_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model: missing"):
        parse_config(LEAST | {"teacher": {}})


@pytest.mark.parametrize("content", [b"[corpus\n", b"student.dtype = float32\n", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    assert f"{path} is not TOML" in refusal(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent.toml'}: No such file or directory" in refusal(
        tmp_path / "absent.toml"
    )
    assert "Is a directory" in refusal(tmp_path)


def test_an_override_that_is_not_toml_says_how_to_quote(least: Path) -> None:
    message = refusal(least, overrides=("student.dtype = float32",))
    assert "--set 'student.dtype = float32' is not TOML" in message
    assert "quote text, as in 'student.dtype = \"float32\"'" in message


def test_a_config_is_never_mutated(least: Path) -> None:
    config = load_config([least])
    with pytest.raises(ValidationError):
        config.target.k = 5  # type: ignore[misc]


def test_the_resolved_config_is_read_back_the_same() -> None:
    config = parse_config(
        LEAST
        | {
            "target": {"k": 7},
            "tracking": {"tags": ["a", "b"]},
            "teacher": {"model": "big", "resources": {"x": 2}},
        }
    )
    assert Config.model_validate_json(resolved_json(config)) == config


@pytest.mark.parametrize(
    "name", ["owner/name", 'quo"te', "back\\slash", "/data/größe/*.txt", "new\nline"]
)
def test_the_starter_config_holds_what_it_was_given_and_defaults(tmp_path: Path, name: str) -> None:
    path = tmp_path / "starter.toml"
    path.write_text(starter_toml(teacher=name, student=name, dataset=name), encoding="utf-8")
    config = load_config([path])
    stripped = name.strip()
    assert config == parse_config(
        {
            "corpus": {"dataset": stripped},
            "teacher": {"model": stripped},
            "student": {"model": stripped},
        }
    )


def test_the_starter_config_is_about_ten_lines() -> None:
    lines = starter_toml(teacher="a", student="b", dataset="c").splitlines()
    assert len([line for line in lines if line]) <= 13


def test_the_readme_shows_what_init_writes() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert (
        starter_toml(
            teacher="Qwen/Qwen3-32B", student="Qwen/Qwen3-4B", dataset="HuggingFaceFW/fineweb-edu"
        )
        in readme.read_text()
    )
