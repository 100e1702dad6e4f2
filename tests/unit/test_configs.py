"""Every file in configs/ is a whole run, or generates data whole: it loads, and its numbers fit
together."""

import re
import tomllib
from pathlib import Path

import pytest

from stillhouse.config import load_config, parse_config
from stillhouse.config.generate import load_generate_config
from stillhouse.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
GENERATIONS = [path for path in CONFIGS if "prompts" in tomllib.loads(path.read_text())]
RUNS = [path for path in CONFIGS if path not in GENERATIONS]


def test_there_is_a_config_for_the_demo_a_small_card_a_cluster_and_chat() -> None:
    assert {"demo", "small-24gb", "one-node", "qwen3-32b-to-4b", "llama-70b-to-8b", "chat"} <= {
        path.stem for path in RUNS
    }


def test_there_is_a_config_that_generates_data_and_one_of_a_run_that_learns_from_it() -> None:
    by_name = {path.stem: path for path in CONFIGS}
    generation = load_generate_config(by_name["generated-maths"])
    run = load_config(by_name["trained-on-maths"])
    assert run.corpus.dataset.startswith("rollouts://")
    assert run.corpus.sequence_length == generation.sampling.sequence_length
    assert run.store.url == generation.store.url
    assert run.corpus.accept is not None
    assert {*run.corpus.accept.min_score} <= {grader.title for grader in generation.graders}
    assert (run.corpus.accept.most_a_prompt or 1) <= generation.sampling.samples


@pytest.mark.parametrize("path", GENERATIONS, ids=lambda path: path.stem)
def test_a_generation_loads_and_its_numbers_fit_together(path: Path) -> None:
    config = load_generate_config(path)
    assert config.graders
    assert config.prompts.reference_column is not None
    assert config.cluster.address == "auto" or not config.store.url.startswith("s3:")
    assert config.writer.min_replicas == 1  # writers may all be taken away


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_loads_and_its_numbers_fit_together(path: Path) -> None:
    config = load_config([path])
    student = config.student
    assert (
        student.global_batch_sequences % (student.micro_batch_sequences * student.num_workers) == 0
    )
    assert student.min_learning_rate < student.learning_rate
    assert (
        config.store.chunk_sequences * student.shuffle_window_chunks
        >= student.global_batch_sequences
    )
    assert student.max_steps is None or student.warmup_steps < student.max_steps
    assert config.cluster.address == "auto" or not config.store.url.startswith("s3:")
    assert not student.num_workers > 1 or student.zero_stage != 0


@pytest.mark.parametrize("path", GENERATIONS, ids=lambda path: path.stem)
def test_each_misspelt_field_of_a_generation_is_refused_by_its_name(
    path: Path, tmp_path: Path
) -> None:
    text = path.read_text()
    keys = re.findall(r"^(\w+) = ", text, flags=re.MULTILINE)
    assert len(keys) > 10
    for key in keys:
        changed = tmp_path / "changed.toml"
        changed.write_text(re.sub(rf"^{key} = ", f"{key}x = ", text, count=1, flags=re.MULTILINE))
        with pytest.raises(ConfigError, match=rf"\.{key}x: no such setting"):
            load_generate_config(changed)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_each_misspelt_field_is_refused_by_its_name(path: Path) -> None:
    values = tomllib.loads(path.read_text())
    fields = [(section, key) for section, table in values.items() for key in table]
    for section, key in fields:
        changed = {name: dict(table) for name, table in values.items()}
        changed[section][f"{key}x"] = changed[section].pop(key)
        with pytest.raises(ConfigError, match=rf"{section}\.{key}x: no such setting"):
            parse_config(changed)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_says_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_the_single_card_config_fits_on_one_card() -> None:
    config = load_config([next(path for path in CONFIGS if path.stem == "small-24gb")])
    shares = [config.teacher.num_gpus, config.student.num_gpus]
    assert sum(share for share in shares if share is not None) == pytest.approx(1.0)
    assert None not in shares
