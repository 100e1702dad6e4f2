"""A schedule of divergences on real ranks: forward KL for the first steps, then another one; a
function of the step alone, so that a resumed training goes on with the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.ranks import RankGroup
from helpers.training import loss_of_step, train_and_tell
from helpers.world import TinyWorld

STUDENT = {
    "divergence": "reverse_kl",
    "forward_kl_steps": 2,
    "learning_rate": 1e-12,  # so that every step has the weights of the first
    "gradient_clip": 1e-3,
    "max_steps": 3,
    "zero_stage": 2,
    "init": "weights",
    "micro_batch_sequences": 3,
}
TARGET = {"k": 8, "tail_draws": 12, "temperature": 0.1}


def test_forward_kl_teaches_the_first_steps_and_the_divergence_the_others_across_a_resume(
    tiny_world: TinyWorld, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    plan = tiny_world.plan(tmp_path, target=TARGET, student=STUDENT)
    tiny_world.fill_store(plan)
    (job, *_) = plan.jobs
    first = rank_groups[2].call(train_and_tell, replace(job, total_steps=1))[0]
    rest = rank_groups[1].call(train_and_tell, job)[0]

    losses = []
    for step, divergence in enumerate(["forward_kl", "forward_kl", "reverse_kl"]):
        section = job.section.model_copy(update={"divergence": divergence})
        of_step = replace(job, section=section)
        losses.append(loss_of_step(of_step, step, model=Path(section.model)))
    assert [event.loss for event in (*first, *rest)] == pytest.approx(losses, rel=1e-4)
    assert [event.clipped for event in rest] == [True, True]
    assert [event.max_log_ratio for event in rest] == [None, None]  # its draws have no weights
