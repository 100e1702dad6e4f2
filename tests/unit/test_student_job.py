"""When a training job is due to begin a checkpoint, and what its checkpoints are of."""

from pathlib import Path

import pytest

from helpers.chunks import small_recipe
from stillhouse.config import LoraSection, StudentSection
from stillhouse.student.job import TrainJob

TOTAL_STEPS = 10


def checkpoints_of(*, resumed: int, every: int, busy_steps: set[int]) -> list[int]:
    """The steps after which a training that resumes from a step begins a checkpoint."""
    section = StudentSection(model="student", checkpoint_every_steps=every)
    job = TrainJob("student", section, small_recipe(), "store", Path("run"), TOTAL_STEPS)
    begun = [resumed]
    for num_steps in range(resumed + 1, TOTAL_STEPS + 1):
        if job.is_checkpoint_due(num_steps, last=begun[-1], is_busy=num_steps in busy_steps):
            begun.append(num_steps)
    return begun[1:]


@pytest.mark.parametrize(
    ("resumed", "every", "busy_steps", "wanted"),
    [
        (0, 4, set(), [4, 8, 10]),
        (0, 5, set(), [5, 10]),  # the last step is due once
        (0, 100, set(), [10]),
        (4, 4, set(), [8, 10]),  # the commit that it resumes from is not made again
        (6, 4, set(), [8, 10]),  # a commit between two, which a group made as it left
    ],
)
def test_a_checkpoint_begins_at_every_nth_step_and_after_the_last(
    resumed: int, every: int, busy_steps: set[int], wanted: list[int]
) -> None:
    assert checkpoints_of(resumed=resumed, every=every, busy_steps=busy_steps) == wanted


@pytest.mark.parametrize(
    ("busy_steps", "wanted"),
    [
        ({4, 5}, [6, 8, 10]),  # late, and the next one in time
        ({4, 5, 6, 7, 8}, [9, 10]),  # two that were due are one
        ({8, 9, 10}, [4, 10]),  # the last one waits for the one before in `submit`
    ],
)
def test_a_checkpoint_that_is_due_while_a_rank_is_busy_begins_as_soon_as_none_is(
    busy_steps: set[int], wanted: list[int]
) -> None:
    assert checkpoints_of(resumed=0, every=4, busy_steps=busy_steps) == wanted


def test_a_checkpoint_of_one_optimiser_is_not_one_of_another() -> None:
    plain, eight_bit = (
        TrainJob("student", section, small_recipe(), "store", Path("run"), TOTAL_STEPS).origin
        for section in (
            StudentSection(model="student"),
            StudentSection(model="student", optimiser="adamw_8bit"),
        )
    )
    assert "optimiser" not in plain.settings  # as in checkpoints of earlier versions
    assert eight_bit.settings == {**plain.settings, "optimiser": "adamw_8bit"}


def test_quantised_weights_are_a_part_of_what_a_checkpoint_is_of_where_there_are_some() -> None:
    plain, quantised = (
        TrainJob("student", section, small_recipe(), "store", Path("run"), TOTAL_STEPS).origin
        for section in (
            StudentSection(model="student", lora=LoraSection()),
            StudentSection(model="student", lora=LoraSection(quantise="nf4")),
        )
    )
    assert plain.settings["lora"].keys() == {"rank", "alpha", "targets", "dropout"}
    assert quantised.settings["lora"] == {**plain.settings["lora"], "quantise": "nf4"}


def test_a_schedule_of_divergences_is_a_part_of_what_a_checkpoint_is_of_where_there_is_one() -> (
    None
):
    sections = (
        StudentSection(model="student", divergence="jsd", forward_kl_steps=steps)
        for steps in (0, 5)
    )
    plain, scheduled = (
        TrainJob("student", section, small_recipe(), "store", Path("run"), TOTAL_STEPS).origin
        for section in sections
    )
    assert "forward_kl_steps" not in plain.settings  # as in checkpoints of earlier versions
    assert scheduled.settings == {**plain.settings, "forward_kl_steps": 5}
