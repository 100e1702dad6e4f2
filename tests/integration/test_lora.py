"""Students of which a part is trained, adapters (LoRA) or some weights, on real DeepSpeed engines:
the same training however it is cut, small checkpoints, exports that compute what was trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from helpers.ranks import RankGroup
from helpers.training import loss_of_step, refuse_outage, train_and_tell, with_student
from helpers.world import TinyWorld
from stillhouse.checkpoint.choice import newest_manifest
from stillhouse.config import LoraSection
from stillhouse.errors import CheckpointError
from stillhouse.models.load import load_model
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.student.adapters import initial_student
from stillhouse.student.export import export, load_trained
from stillhouse.student.job import TrainJob
from stillhouse.tracking import TrainEvent

Ranks = dict[int, RankGroup]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def job(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """At a constant learning rate, so that a shorter training is the beginning of a longer one."""
    plan = tiny_world.plan(
        tmp_path_factory.mktemp("lora"),
        student={
            "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "down_proj"]},
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_steps": NUM_STEPS,
            "checkpoint_every_steps": 100,
        },
    )
    tiny_world.fill_store(plan)
    return plan.jobs[0]


def trained(
    job: TrainJob, group: RankGroup, run_dir: Path, *, total_steps: int = NUM_STEPS, **changes: Any
) -> tuple[TrainJob, list[TrainEvent]]:
    """The job with these settings of its student, and the rows of its training."""
    mine = replace(with_student(job, **changes), run_dir=run_dir, total_steps=total_steps)
    return mine, group.call(train_and_tell, mine)[0]


def dropping(job: TrainJob) -> dict[str, Any]:
    """Settings with dropout in the adapters."""
    assert job.section.lora is not None
    return {"lora": job.section.lora.model_copy(update={"dropout": 0.2})}


@pytest.fixture(scope="module")
def alone(
    job: TrainJob, rank_groups: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> list[TrainEvent]:
    """Without ZeRO."""
    return trained(job, rank_groups[1], tmp_path_factory.mktemp("alone"), zero_stage=0)[1]


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"zero_stage": 0}, 1),
        ({"zero_stage": 1, "dtype": "bfloat16"}, 2),
        ({"zero_stage": 3, "offload": "cpu", "overlap_comm": False}, 2),
    ],
)
def test_a_resumed_training_with_dropout_is_bit_identical(
    job: TrainJob, rank_groups: Ranks, changes: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    changes = dropping(job) | changes
    _, whole = trained(job, rank_groups[ranks], tmp_path / "whole", **changes)
    _, first = trained(job, rank_groups[ranks], tmp_path / "parts", **changes, total_steps=2)
    _, second = trained(job, rank_groups[ranks], tmp_path / "parts", **changes)
    assert [row.step for row in second] == [3, 4]
    assert [(row.loss, row.grad_norm) for row in first + second] == [
        (row.loss, row.grad_norm) for row in whole
    ]


# of peft, which asks Transformers by a former name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_adapters_as_one_does_which_goes_on_and_the_export_is_what_it_trains(
    job: TrainJob, rank_groups: Ranks, alone: list[TrainEvent], stage: int, tmp_path: Path
) -> None:
    run_dir, changes = tmp_path / "run", {"zero_stage": stage, "micro_batch_sequences": 3}
    mine, rows = trained(job, rank_groups[2], run_dir, total_steps=2, **changes)
    # merged, and as an adapter
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    for out in (merged, adapter):
        steps = export(
            mine.checkpoints,
            out,
            section=mine.section,
            tokenizer=load_tokenizer(mine.section.model),
            card=str,
            tell=refuse_outage,
            adapter=out == adapter,
        )
        assert steps == 2
    ids_BL = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        base, as_merged, as_adapter = (
            opener.from_pretrained(folder)(ids_BL).logits
            for opener, folder in (
                (AutoModelForCausalLM, mine.section.model),
                (AutoModelForCausalLM, merged),
                (AutoPeftModelForCausalLM, adapter),
            )
        )
    assert (as_merged - base).abs().max() > 1e-3
    torch.testing.assert_close(as_adapter, as_merged, rtol=1e-5, atol=1e-6)
    # one rank goes on, with the loss of the merged model
    _, following = trained(job, rank_groups[1], run_dir, **changes)
    assert loss_of_step(mine, 2, model=merged) == pytest.approx(following[0].loss, rel=1e-5)
    # all as one process without ZeRO
    for found, expected in zip((*rows, *following), alone, strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert expected.grad_norm > 1e-4


@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_holds_adapters_alone_and_belongs_to_the_weights_beside_them(
    job: TrainJob, rank_groups: Ranks, stage: int, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    make_model(folder, vocab_size=300, hidden_size=256, tied=stage == 0)
    changes: dict[str, Any] = {
        "model": str(folder),
        "zero_stage": stage,
        "lora": LoraSection(rank=1),
    }
    mine, _ = trained(job, rank_groups[1], tmp_path / "run", total_steps=1, **changes)
    # weights and both of Adam's states in float32
    commit = newest_manifest(mine.checkpoints)
    lm = initial_student(mine.section)
    num_trained, num_frozen = (
        sum(each.numel() for each in lm.parameters() if each.requires_grad is is_trained)
        for is_trained in (True, False)
    )
    assert commit is not None
    assert 4 * 3 * num_trained < commit.num_bytes < 4 * 3 * num_trained + 200_000
    assert 4 * num_frozen > 10 * commit.num_bytes
    # other weights under the same name
    make_model(folder, vocab_size=300, hidden_size=256, tied=stage == 0, seed=5)
    message = "trained beside other weights than those of .*student"
    with pytest.raises(CheckpointError, match=message):
        load_trained(mine.checkpoints, mine.section, tell=refuse_outage)
    with pytest.raises(CheckpointError, match=message):
        trained(job, rank_groups[1], tmp_path / "run", **changes)


def test_a_student_with_frozen_embeddings_trains_resumes_and_is_exported_whole(
    job: TrainJob, rank_groups: Ranks, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lora": None, "freeze": ("model.embed_tokens*",), "zero_stage": 2}
    _, whole = trained(job, rank_groups[2], tmp_path / "whole", **changes)
    _, first = trained(job, rank_groups[2], tmp_path / "parts", **changes, total_steps=2)
    mine, second = trained(job, rank_groups[2], tmp_path / "parts", **changes)
    assert [row.loss for row in first + second] == [row.loss for row in whole]
    found, steps = load_trained(mine.checkpoints, mine.section, tell=refuse_outage)
    assert steps == NUM_STEPS
    before, after = load_model(mine.section).state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {"model.embed_tokens.weight", "lm_head.weight"}
