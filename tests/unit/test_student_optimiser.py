"""The learning rate of each step, what DeepSpeed is told, and which layers are computed again."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.models import make_model
from stillhouse.config import StudentSection, parse_config
from stillhouse.errors import ConfigError
from stillhouse.models.heads import final_hidden
from stillhouse.models.load import load_model
from stillhouse.student.adapters import needs_outline, outline
from stillhouse.student.module import checkpoint_activations
from stillhouse.student.optimiser import (
    client_optimiser,
    deepspeed_config,
    learning_rate_at,
    swap_folder,
)

TOTAL_STEPS = 20


def rates(**changes: Any) -> list[float]:
    values = {"model": "s", "learning_rate": 1.0, "min_learning_rate": 0.2, "warmup_steps": 4}
    section = StudentSection.model_validate(values | changes)
    steps = range(TOTAL_STEPS + 1)
    return [learning_rate_at(step, section=section, total_steps=TOTAL_STEPS) for step in steps]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_every_schedule_warms_up_and_falls_to_the_least_rate_at_the_end(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[TOTAL_STEPS] == pytest.approx(0.2)


def test_a_line_falls_evenly_and_a_cosine_is_the_default_and_at_half_of_it_in_the_middle() -> None:
    assert rates(schedule="linear")[4:] == pytest.approx([1.0 - 0.05 * i for i in range(17)])
    assert rates() == rates(schedule="cosine")
    assert rates()[12] == pytest.approx(0.6)


@pytest.mark.parametrize(("changes", "num_falling"), [({}, 2), ({"decay_steps": 5}, 5)])
def test_warm_up_stable_decay_stays_at_its_peak_before_the_last_steps(
    changes: dict[str, int], num_falling: int
) -> None:
    found = rates(schedule="wsd", **changes)
    assert found[4 : TOTAL_STEPS - num_falling + 1] == [1.0] * (TOTAL_STEPS - num_falling - 3)
    falls = [before - after for before, after in pairwise(found)]
    assert falls[-num_falling:] == pytest.approx([0.8 / num_falling] * num_falling)


def test_a_decay_that_would_begin_in_the_warm_up_begins_after_it() -> None:
    assert rates(schedule="wsd", decay_steps=100) == rates(schedule="linear")


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"decay_steps": 5}, 'decay_steps is 5, but schedule is "cosine"'),
        (
            {"offload": "cpu", "zero_stage": 1},
            'offload is "cpu", which needs zero_stage 2 or 3; zero_stage is 1',
        ),
        ({"offload": "nvme"}, "offload_path is not set; name a directory"),
        ({"offload_path": "/disk"}, "offload_path is '/disk', but offload is \"none\""),
        ({"offload": "nvme", "offload_path": "disk"}, "offload_path is 'disk', which is relative"),
        (
            {"offload": "nvme", "offload_path": "/disk", "zero_stage": 2},
            'offload is "nvme", which needs zero_stage 3; zero_stage is 2',
        ),
        (
            {"offload": "nvme", "offload_path": "/disk", "lora": {"quantise": "nf4"}},
            'lora.quantise is "nf4", and offload is "nvme"',
        ),
        ({"activation_checkpointing_every": 2}, "activation_checkpointing is false"),
        ({"optimiser": "adamw_8bit", "fused_adamw": True}, 'is a form of the optimiser "adamw"'),
        (
            {"optimiser": "adamw_8bit", "offload": "cpu", "zero_stage": 2},
            'offload = "cpu" is a form of the optimiser "adamw"',
        ),
        (
            {"optimiser": "adamw_8bit", "num_workers": 4, "min_workers": 3},
            "min_workers is 3, below num_workers, which is 4, .* leave min_workers out",
        ),
        ({"compile": True, "zero_stage": 3}, "zero_stage is 3, .* leave compile out"),
        ({"compile": True, "activation_checkpointing": True}, "leave one of them out"),
        ({"schedule": "cosin"}, "student.schedule: .* did you mean 'cosine'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    student: dict[str, Any], message: str
) -> None:
    values = {"corpus": {"dataset": "d"}, "teacher": {"model": "t"}}
    with pytest.raises(ConfigError, match=message):
        parse_config(values | {"student": {"model": "s", **student}})


def test_deepspeed_is_told_only_what_is_set() -> None:
    def told(**changes: Any) -> dict[str, Any]:
        section = StudentSection.model_validate({"model": "s", "dtype": "float32", **changes})
        return deepspeed_config(section, 2, device=torch.device("cpu"))

    assert told()["zero_optimization"] == {"stage": 1}
    assert told()["optimizer"]["params"].keys() == {"lr", "betas", "torch_adam"}
    assert told(fused_adamw=True)["optimizer"]["params"]["fused"] is True
    assert told(overlap_comm=False)["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert "zero_allow_untested_optimizer" not in told()
    eight_bit = told(optimiser="adamw_8bit")
    assert eight_bit["zero_allow_untested_optimizer"] is True
    assert "optimizer" not in eight_bit
    offloaded = told(offload="cpu", zero_stage=2)
    assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert offloaded["optimizer"]["params"]["fused"] is True
    swapped = told(offload="nvme", offload_path="/disk")["zero_optimization"]
    assert (swapped["stage"], swapped["offload_optimizer"]["nvme_path"]) == (3, "/disk")


def test_eight_bit_states_need_the_package_that_has_them_when_a_run_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "student")
    plain = StudentSection(model=str(folder), dtype="float32")
    assert client_optimiser(plain) is None
    assert not needs_outline(plain)
    section = plain.model_copy(update={"optimiser": "adamw_8bit"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert needs_outline(section)
    with pytest.raises(ConfigError, match=r"adamw_8bit.*pip install 'stillhouse\[bits\]'"):
        outline(section)


@pytest.mark.parametrize(("every", "num_computed_again"), [(1, 5), (2, 3), (9, 1)])
def test_one_in_so_many_layers_is_computed_again_and_gradients_are_the_same(
    every: int, num_computed_again: int, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "student", num_layers=5)
    section = StudentSection(model=str(folder), dtype="float32")
    plain, checkpointed = load_model(section).train(), load_model(section).train()
    checkpoint_activations(checkpointed, every=every)
    calls: list[nn.Module] = []
    for lm in (plain, checkpointed):
        for name, module in lm.named_modules():
            if name.endswith(".self_attn"):
                module.register_forward_pre_hook(lambda each, _: calls.append(each))
        calls.clear()
        ids_BL = torch.arange(24).view(2, 12)
        final_hidden(lm, ids_BL, torch.arange(12).expand(2, 12)).square().sum().backward()
    assert len(calls) == 5 + num_computed_again
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def swapped_to(path: Path) -> StudentSection:
    values = {"model": "s", "offload": "nvme", "offload_path": str(path)}
    return StudentSection.model_validate(values)


def test_a_folder_for_swapped_states_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        section = swapped_to(tmp_path / name)
        with (
            pytest.raises(ConfigError, match=r"offload_path is .*, where no folder can be made"),
            swap_folder(section),
        ):
            pass
    with swap_folder(swapped_to(tmp_path / "new")) as folder:
        assert folder.parent == tmp_path / "new"
    assert not any((tmp_path / "new").iterdir())
