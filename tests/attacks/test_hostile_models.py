"""A model that brings code along: it is not run unless the config says so."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from helpers.models import make_model
from stillhouse.config import ModelSection, StudentSection, parse_config
from stillhouse.errors import ModelError
from stillhouse.models.load import load_model
from stillhouse.models.tokenizers import load_tokenizer

CODE = """
from pathlib import Path
Path({target!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "hostile"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A model's directory, and the file that its code would leave behind."""
    folder, target = tmp_path / "model", tmp_path / "it ran"
    make_model(folder, vocab_size=300, hidden_size=16, seed=1)
    (folder / "hostile.py").write_text(CODE.format(target=str(target)))
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    classes = {
        "AutoConfig": "hostile.Config",
        "AutoModelForCausalLM": "hostile.Model",
        "AutoTokenizer": ["hostile.Tokenizer", None],
    }
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "hostile", "auto_map": classes})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"tokenizer_class": "Tokenizer", "auto_map": classes})
    )
    return folder, target


def test_code_beside_a_model_does_not_run(hostile: tuple[Path, Path]) -> None:
    folder, target = hostile
    with pytest.raises(ModelError):
        load_model(StudentSection(model=str(folder), dtype="float32"), random_init_seed=None)
    with suppress(ModelError):  # it may well do without
        load_tokenizer(str(folder))
    assert not target.exists()


def test_code_is_run_only_by_those_who_ask_for_it(
    hostile: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = hostile
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with suppress(ModelError):
        load_model(
            StudentSection(model=str(folder), dtype="float32", trust_remote_code=True),
            random_init_seed=None,
        )
    assert target.exists()  # so the code was fit to run
    assert ModelSection(model="anything").trust_remote_code is False
    assert (
        parse_config(
            {"corpus": {"dataset": "stdlib"}, "teacher": {"model": "a"}, "student": {"model": "b"}}
        ).teacher.trust_remote_code
        is False
    )
