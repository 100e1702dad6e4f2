"""Adapters (LoRA) and frozen weights: which layers get adapters, what has gradients, and what the
model is once adapters are merged."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from helpers.models import make_model
from helpers.targets import bucketed
from stillhouse.config import StudentSection, parse_config
from stillhouse.errors import CheckpointError, ConfigError
from stillhouse.models.batch import TokenBatch
from stillhouse.models.load import load_model
from stillhouse.sequence import Sequences
from stillhouse.student.adapters import (
    frozen_digest,
    initial_student,
    merge_adapters,
    outline,
    require_same_frozen,
    widen_adapters,
)
from stillhouse.student.loader import MicroBatch
from stillhouse.student.module import StudentModule

VOCAB_SIZE, HIDDEN_SIZE, NUM_TOKENS, SCALE = 300, 32, 24, 2.0
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_model(
        tmp_path / "student", vocab_size=VOCAB_SIZE, tied=request.param, weight_std=0.3
    )


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tied", vocab_size=VOCAB_SIZE)


def section_of(folder: Path, **lora: Any) -> StudentSection:
    values = {"model": str(folder), "dtype": "float32", "lora": {"rank": 4, "alpha": 8.0, **lora}}
    return StudentSection.model_validate(values)


def with_nonzero_products(lm: PreTrainedModel) -> PreTrainedModel:
    """Adapters as training leaves them: peft begins with B = 0, where A has no gradient."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return lm


def loss_of(lm: PreTrainedModel, section: StudentSection) -> Tensor:
    """The loss on one batch in which every token has a target."""
    generator = torch.Generator().manual_seed(4)
    ids_SL = torch.randint(VOCAB_SIZE, (2, NUM_TOKENS // 2), generator=generator).int().numpy()
    positions_SL = np.broadcast_to(np.arange(NUM_TOKENS // 2, dtype=np.int32), ids_SL.shape)
    tokens = TokenBatch.of(Sequences(ids_SL, positions_SL, np.ones_like(ids_SL, np.uint8)))
    target = bucketed(torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator), 8)
    module = StudentModule(lm, section=section, vocab_size=VOCAB_SIZE)
    loss: Tensor = module(MicroBatch(tokens, target), step=0).total
    return loss


def test_adapters_have_the_gradients_that_the_chain_rule_gives_them_from_the_merged_model(
    folder: Path,
) -> None:
    """W' = W + s B A, so dA = s B^T dW' and dB = s dW' A^T."""
    section = section_of(folder)
    adapted, merged = (with_nonzero_products(initial_student(section)) for _ in range(2))
    merge_adapters(merged)
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    losses = [loss_of(lm, section) for lm in (adapted, merged)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)
    for loss in losses:
        loss.backward()
    matrices = dict(merged.named_parameters())
    gradients = dict(adapted.named_parameters())
    paths = [name.partition(".lora_A")[0] for name in gradients if ".lora_A." in name]
    assert len(paths) == 2 * len(LINEAR)
    for path in paths:
        a_RI, b_OR = (gradients[f"{path}.lora_{which}.default.weight"] for which in "AB")
        grad_OI = matrices[f"{path}.weight"].grad
        assert grad_OI is not None
        for found, expected in (
            (a_RI.grad, SCALE * b_OR.T @ grad_OI),
            (b_OR.grad, SCALE * grad_OI @ a_RI.T),
        ):
            assert found is not None
            expected = expected.detach()
            atol = 1e-5 * float(expected.abs().max())
            assert atol > 0.0
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol, msg=path)
    assert {name for name, each in gradients.items() if each.grad is not None} == {
        name for name in gradients if ".lora_" in name
    }


def test_adapters_are_merged_in_float32_and_the_sum_is_rounded_once(tied: Path) -> None:
    section = section_of(tied).model_copy(update={"dtype": "bfloat16"})
    lm = initial_student(section)
    widen_adapters(lm)
    weights = {
        name: each.detach().clone() for name, each in with_nonzero_products(lm).named_parameters()
    }
    merge_adapters(lm)
    for name, merged in lm.named_parameters():
        path, _, kind = name.rpartition(".")
        if f"{path}.base_layer.{kind}" not in weights:
            assert torch.equal(merged, weights[name])
            continue
        a_RI, b_OR = (weights[f"{path}.lora_{which}.default.weight"] for which in "AB")
        sum_OI = weights[f"{path}.base_layer.{kind}"].float() + SCALE * (b_OR @ a_RI)
        assert merged.dtype == torch.bfloat16
        torch.testing.assert_close(merged.float(), sum_OI, rtol=2**-8, atol=1e-6)


class HeadMatmuls(TorchDispatchMode):
    """Counts the matmuls with the vocabulary as a side, while it is entered."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        sides = {side for each in args if isinstance(each, Tensor) for side in each.shape}
        is_matmul = function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        self.count += is_matmul and VOCAB_SIZE in sides
        return function(*args, **(kwargs or {}))


def test_no_gradient_of_a_frozen_head_is_computed(tied: Path) -> None:
    """Of the head's three matmuls, two are left: the logits and the gradient of its inputs."""
    section = section_of(tied)
    for lm, num_matmuls in ((load_model(section), 3), (initial_student(section), 2)):
        with HeadMatmuls() as matmuls:
            loss_of(lm, section).backward()
        assert matmuls.count == num_matmuls


def test_all_linear_layers_but_the_head_are_adapted_or_those_that_are_named(tied: Path) -> None:
    def adapted(**lora: Any) -> set[str]:
        names = (name for name, _ in initial_student(section_of(tied, **lora)).named_parameters())
        return {name.split(".")[-4] for name in names if ".lora_A." in name}

    assert adapted() == set(LINEAR)
    assert adapted(targets=["q_proj", "layers.1.mlp.up_proj"]) == {"q_proj", "up_proj"}


def test_adapters_begin_the_same_in_every_process_and_change_nothing_at_first(tied: Path) -> None:
    section, draws = section_of(tied), torch.random.get_rng_state()
    first, second = initial_student(section), initial_student(section)
    assert torch.equal(draws, torch.random.get_rng_state())
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loss_of(first, section), loss_of(load_model(section), section))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("wq", "'wq' names no linear layer of .*; name some of down_proj, gate_proj, k_proj, .*"),
        ("proj", "'proj' names no linear layer"),  # a part of names, not the last
        ("embed_tokens", "'embed_tokens' names no linear layer"),
        ("lm_head", "'lm_head' names the head of .*, which is fused with the loss"),
    ],
)
def test_targets_that_fit_nothing_and_the_head_are_refused_from_the_config_alone(
    folder: Path, target: str, message: str
) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"student.lora.targets: {message}"):
        outline(section_of(folder, targets=["q_proj", target]))
    outline(section_of(folder))


def test_adapters_beside_random_weights_and_unknown_keys_are_refused() -> None:
    def refusal(**student: Any) -> str:
        values = {"corpus": {"dataset": "d"}, "teacher": {"model": "t"}}
        with pytest.raises(ConfigError) as caught:
            parse_config(values | {"student": {"model": "s", **student}})
        return str(caught.value)

    assert 'set init = "weights", or leave lora out' in refusal(lora={}, init="config")
    assert "leave freeze out" in refusal(lora={}, freeze=["*norm*"])
    assert "student.lora.rnk: no such setting; did you mean 'rank'?" in refusal(lora={"rnk": 8})
    assert "student.lora.rank: " in refusal(lora={"rank": 0})


def test_weights_are_frozen_by_pattern_under_any_name_of_theirs(folder: Path) -> None:
    section = StudentSection(
        model=str(folder), dtype="float32", freeze=("lm_head.*", "*.layers.1.*norm.weight")
    )
    lm = initial_student(section)
    is_tied = lm.config.tie_word_embeddings
    assert {name for name, each in lm.named_parameters() if not each.requires_grad} == {
        "model.embed_tokens.weight" if is_tied else "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }
    loss_of(lm, section).backward()
    for name, parameter in lm.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["lm_haed*"], r"no weight of .* is named 'lm_haed\*'; its weights are lm_head.weight, .*"),
        (["*"], r"'\*' freeze every weight of .*; leave some to be trained"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(
    tied: Path, patterns: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"student.freeze: {message}"):
        outline(StudentSection.model_validate({"model": str(tied), "freeze": patterns}))


def test_without_peft_the_extra_that_brings_it_is_named(
    tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'stillhouse\[lora\]'"):
        outline(section_of(tied))


def test_quantised_weights_need_their_package_and_a_stage_that_leaves_them_whole(
    tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = section_of(tied, quantise="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for begin in (outline, initial_student):
        with pytest.raises(ConfigError, match=r"quantise = .nf4. .*'stillhouse\[bits\]'"):
            begin(section)
    values = section.model_dump(exclude={"mix"}) | {"zero_stage": 3}
    with pytest.raises(ValueError, match=r'lora.quantise is "nf4", and zero_stage is 3, .*'):
        StudentSection.model_validate(values)


def test_frozen_weights_are_told_from_others_by_their_digest(tied: Path) -> None:
    assert frozen_digest(load_model(section_of(tied))) is None
    lm = initial_student(section_of(tied))
    before = frozen_digest(with_nonzero_products(lm))
    assert before == frozen_digest(initial_student(section_of(tied)))
    with torch.no_grad():
        dict(lm.named_parameters())["model.norm.weight"][7] += 1e-6
    with pytest.raises(CheckpointError, match="trained beside other weights than those of tied"):
        require_same_frozen(frozen_digest(lm), wanted=before, model="tied")
