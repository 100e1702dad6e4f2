"""Every file in configs/ is a whole run: it loads, and its numbers fit together."""

import tomllib
from pathlib import Path

import pytest

from stillhouse.config import load_config, parse_config
from stillhouse.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def test_there_is_a_config_for_the_demo_a_small_card_a_cluster_and_chat() -> None:
    assert {"demo", "small-24gb", "one-node", "qwen3-32b-to-4b", "llama-70b-to-8b", "chat"} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
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
