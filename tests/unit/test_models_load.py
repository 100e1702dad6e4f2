"""Loading: the dtype of the config, a seed that decides random weights, and refusals in words."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import make_model
from stillhouse.config import ModelSection
from stillhouse.errors import ConfigError, ModelError
from stillhouse.models.load import load_model, resolve_device


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", [None, 0])
def test_the_dtype_is_the_sections_whatever_the_config_says(
    saved: Path, dtype: str, seed: int | None
) -> None:
    model = load_model(
        ModelSection.model_validate({"model": str(saved), "dtype": dtype}), random_init_seed=seed
    )
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


def test_the_saved_weights_are_those_that_come_back(saved: Path) -> None:
    model = load_model(ModelSection(model=str(saved), dtype="float32"), device_map="cpu")
    for name, weight in load_file(saved / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], weight)


def test_random_weights_follow_the_seed_and_leave_everybody_elses_randomness_alone(
    saved: Path,
) -> None:
    section = ModelSection(model=str(saved), dtype="float32")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        load_model(section, random_init_seed=seed).get_output_embeddings().weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, load_file(saved / "model.safetensors")["model.embed_tokens.weight"])


def test_a_weight_that_the_files_lack_is_refused_and_never_made_up(tmp_path: Path) -> None:
    directory = make_model(tmp_path)
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of the model's weights.*layers\.1\.mlp\.up_proj"):
        load_model(ModelSection(model=str(directory)))


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    directory = make_model(tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(8)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(ModelSection(model=str(directory)))


def test_weights_that_were_cut_short_are_refused(tmp_path: Path) -> None:
    weights = make_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be loaded.*whole saved model"):
        load_model(ModelSection(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/absent", "no directory /absent.*owner/name"),
        ("./absent", r"no directory \./absent"),
        ("runs/a/checkpoint", "no directory runs/a/checkpoint"),
        ("owner/absent", "owner/absent cannot be loaded.*the hub was not reached"),
    ],
)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_model_that_is_not_there_is_named_with_what_to_do(
    model: str, message: str, seed: int | None
) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_model(ModelSection(model=model), random_init_seed=seed)


def test_a_directory_without_weights_or_of_an_unknown_architecture_is_refused(
    tmp_path: Path,
) -> None:
    directory = make_model(tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded.*whole saved model"):
        load_model(ModelSection(model=str(directory)))
    (directory / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(ModelError, match="no_such_architecture"):
        load_model(ModelSection(model=str(directory)))


def test_auto_is_the_device_that_there_is() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"torch sees no GPU.*'auto' or 'cpu'"):
        resolve_device("cuda")
