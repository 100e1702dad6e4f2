"""What an exported student keeps of the model that it came from, beside weights."""

import json
from pathlib import Path

import pytest

from helpers.models import make_model
from stillhouse.config import StudentSection
from stillhouse.models import load_model
from stillhouse.student.export import generation_config_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "chat", vocab_size=300, hidden_size=8)


def write(folder: Path, **values: object) -> StudentSection:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return StudentSection(model=str(folder), dtype="float32")


def test_a_chat_model_keeps_its_end_tokens_and_its_sampling(folder: Path, tmp_path: Path):
    section = write(folder, eos_token_id=[1, 2], do_sample=True, temperature=0.7)
    found = generation_config_of(section)
    assert found is not None
    model = load_model(section, random_init_seed=0)
    model.generation_config = found
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["do_sample"], saved["temperature"]) == ([1, 2], True, 0.7)


def test_settings_that_cannot_be_saved_are_left_behind(folder: Path):
    assert generation_config_of(write(folder, do_sample=False, temperature=0.7)) is None
    (folder / "generation_config.json").unlink()
    assert generation_config_of(StudentSection(model=str(folder))) is None
