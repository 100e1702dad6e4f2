"""A student that is cut from its teacher: the layers that stay, in weights and in config, and what
cannot be cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from stillhouse.config import CutSection, ModelSection, StudentSection, parse_config
from stillhouse.errors import ConfigError, ModelError
from stillhouse.models.cuts import write_cut
from stillhouse.models.heads import check_head
from stillhouse.models.load import load_model
from stillhouse.student.adapters import outline

KEPT = (0, 2, 5)

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tied": False},
    # every third layer sees the whole text, the others a window
    "gemma3_text": {
        "config": {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 4,
        }
    },
}


@pytest.mark.parametrize("architecture", KINDS)
def test_a_cut_model_has_the_weights_and_the_kinds_of_its_layers_and_all_that_is_outside_of_them(
    architecture: str, tmp_path: Path
) -> None:
    whole_section, cut_section = (
        ModelSection(model=str(tmp_path / name), dtype="float32") for name in ("whole", "cut")
    )
    make_model(
        tmp_path / "whole",
        architecture=architecture,
        num_layers=6,
        weight_std=0.2,
        **KINDS[architecture],
    )
    write_cut(whole_section, CutSection(layers=KEPT), tmp_path / "cut")
    whole, cut = load_model(whole_section), load_model(cut_section)
    # every weight
    expected = whole.state_dict()
    numbers = {f".layers.{new}.": f".layers.{old}." for new, old in enumerate(KEPT)}
    for name, weight in cut.state_dict().items():
        new = next((each for each in numbers if each in name), None)
        origin = name if new is None else name.replace(new, numbers[new])
        assert torch.equal(weight, expected[origin]), name
    assert cut.config.num_hidden_layers == len(KEPT)
    types = getattr(whole.config, "layer_types", None)
    if types is not None:
        assert cut.config.layer_types == [types[layer] for layer in KEPT]
    # and what they compute, which is what the whole model does without its other layers
    body = whole.get_decoder()
    body.layers = torch.nn.ModuleList([body.layers[layer] for layer in KEPT])
    whole.config.num_hidden_layers = len(KEPT)
    whole.config.layer_types = getattr(cut.config, "layer_types", None)
    ids_BL = torch.arange(1, 25).view(2, 12)
    with torch.inference_mode():
        logits = [lm(ids_BL, use_cache=False).logits for lm in (cut, whole)]
    assert torch.equal(logits[0], logits[1])
    check_head(cut, vocab_size=320)


def test_channels_without_weights_are_cut_first_and_change_no_logit(tmp_path: Path) -> None:
    section = ModelSection(
        model=str(make_model(tmp_path / "whole", weight_std=0.2)), dtype="float32"
    )
    whole = load_model(section)
    num_channels = whole.config.intermediate_size
    idle_I = torch.randperm(num_channels, generator=torch.Generator().manual_seed(0))[::2]
    for layer in whole.model.layers:
        layer.mlp.up_proj.weight.data[idle_I] = 0.0
    whole.save_pretrained(tmp_path / "whole")
    num_kept = num_channels - len(idle_I)
    write_cut(section, CutSection(layers=(0, 1), intermediate_size=num_kept), tmp_path / "cut")
    cut = load_model(ModelSection(model=str(tmp_path / "cut"), dtype="float32"))
    assert cut.model.layers[1].mlp.down_proj.weight.shape[1] == num_kept
    ids_BL = torch.arange(1, 25).view(2, 12)
    with torch.inference_mode():
        logits = [lm(ids_BL, use_cache=False).logits for lm in (cut, whole)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "num_kept", "error"),
    [("llama", 10**6, "give fewer, or leave it out"), ("gpt2", 4, "0 have a gated MLP")],
)
def test_channels_that_cannot_be_cut_are_refused_from_the_config_alone(
    tmp_path: Path, architecture: str, num_kept: int, error: str
) -> None:
    make_model(tmp_path / "teacher", architecture=architecture)
    init = {"layers": [0], "intermediate_size": num_kept}
    values = {"model": str(tmp_path / "teacher"), "init": init}
    with pytest.raises((ConfigError, ModelError), match=error):
        outline(StudentSection.model_validate(values))


def test_a_cut_is_written_once_and_opens_in_transformers_alone(tmp_path: Path) -> None:
    section = ModelSection(model=str(make_model(tmp_path / "whole")), dtype="bfloat16")
    write_cut(section, CutSection(layers=(1,)), tmp_path / "cut")
    written = (tmp_path / "cut" / "model.safetensors").stat().st_mtime_ns
    write_cut(section, CutSection(layers=(1,)), tmp_path / "cut")
    assert (tmp_path / "cut" / "model.safetensors").stat().st_mtime_ns == written
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").dtype == torch.bfloat16


def test_layers_that_are_not_there_are_refused_from_the_config_alone(tmp_path: Path) -> None:
    make_model(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()

    def outlined(*layers: int) -> None:
        values = {"model": str(tmp_path / "teacher"), "init": {"layers": layers}}
        outline(StudentSection.model_validate(values))

    outlined(1)
    with pytest.raises(
        ConfigError, match=r"student.init.layers has 2, but the layers of .* 0 to 1"
    ):
        outlined(0, 2)


def test_a_model_whose_config_tells_kinds_of_layers_by_number_is_refused(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    make_model(tmp_path / "moe", architecture="qwen3_moe", num_layers=3, config=experts)
    with pytest.raises(ModelError, match="Qwen3MoeForCausalLM cannot be cut"):
        write_cut(
            ModelSection(model=str(tmp_path / "moe")), CutSection(layers=(1, 2)), tmp_path / "cut"
        )
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"init": {"layers": [2, 0]}}, "student.init.layers: wanted each layer once, in ascending"),
        ({"init": {"layers": []}}, "student.init.layers: .* at least 1 item"),
        ({"init": {"layer": [0]}}, "student.init.layer: no such setting; did you mean 'layers'"),
        ({"init": "wieghts"}, "student.init: .* did you mean 'weights'"),
        ({"init": {"layers": [0]}, "trust_remote_code": True}, "leave trust_remote_code out"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused_with_its_setting(
    student: dict[str, Any], message: str
) -> None:
    values = {"corpus": {"dataset": "d"}, "teacher": {"model": "t"}}
    with pytest.raises(ConfigError, match=message):
        parse_config(values | {"student": {"model": "s", **student}})
