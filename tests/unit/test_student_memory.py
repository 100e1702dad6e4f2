"""What a student takes on each rank, the ZeRO stage that follows, and the settings that `check`
names where it does not fit."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import ORIGIN
from helpers.checkpoints import make as make_checkpoints
from helpers.models import make_model
from helpers.world import TinyWorld
from stillhouse.cli.check_memory import (
    Memory,
    cpu_cures,
    memory_here,
    student_cures,
    teacher_cures,
)
from stillhouse.config import StudentSection
from stillhouse.pipeline.run_dir import claim
from stillhouse.student.adapters import outline
from stillhouse.student.memory import (
    StudentSize,
    least_ranks,
    lowest_stage,
    memory_of_process,
    size_of,
    state_bytes,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is much larger than its adapters."""
    folder = tmp_path_factory.mktemp("model") / "student"
    return str(make_model(folder, vocab_size=300, hidden_size=256, seed=0))


SMALL, LARGE = StudentSize(600_000_000, 0), StudentSize(8_000_000_000, 0)


def section_of(**changes: Any) -> StudentSection:
    return StudentSection.model_validate({"model": "s", **changes})


@pytest.mark.parametrize(
    ("changes", "stage", "on_one", "on_four"),
    [
        ({}, 1, 20, 2 + 2 + 4 + 12 / 4),
        ({}, 2, 18, 2 + (4 + 12) / 4),
        ({}, 3, 18, 18 / 4),
        ({"dtype": "float32"}, 0, 16, 16),
        ({"dtype": "float32"}, 1, 20, 4 + 4 + 12 / 4),
        ({"dtype": "float32"}, 3, 20, 20 / 4),
        ({"offload": "cpu", "zero_stage": 2}, 2, 4, 2 + 2 / 4),
        ({"optimiser": "adamw_8bit"}, 1, 14, 2 + 2 + 4 + 6 / 4),
    ],
)
def test_bytes_of_a_trained_parameter(
    changes: dict[str, Any], stage: int, on_one: float, on_four: float
) -> None:
    section, size = section_of(**changes), StudentSize(1000, 0)
    found = [state_bytes(size, section, stage=stage, num_ranks=ranks) / 1000 for ranks in (1, 4)]
    assert found == [on_one, on_four]


def test_frozen_layers_take_four_bits_and_a_share_of_their_scale_where_they_are_quantised() -> None:
    size = StudentSize(num_trained=0, num_frozen=1000, num_in_frozen_layers=640)
    plain, nf4 = (
        state_bytes(size, section_of(lora={"quantise": kind}), stage=1, num_ranks=1)
        for kind in ("none", "nf4")
    )
    assert plain == 2000
    assert nf4 == 360 * 2 + 640 / 2 + 10 * 4


def test_a_frozen_parameter_is_a_weight_alone() -> None:
    size, section = StudentSize(0, 1000), section_of()
    assert state_bytes(size, section, stage=2, num_ranks=4) == 2000
    assert state_bytes(size, section, stage=3, num_ranks=4) == 500


@pytest.mark.parametrize(
    ("size", "num_ranks", "gigabytes", "changes", "stage"),
    [
        (SMALL, 1, 24, {}, 1),
        (LARGE, 8, 96, {}, 1),
        (LARGE, 8, 80, {}, 2),
        (LARGE, 8, 24, {}, 3),
        (LARGE, 1, 24, {}, 3),  # it fits in none
        (SMALL, 1, 24, {"offload": "cpu"}, 2),
        (LARGE, 1, 24, {"lora": {"quantise": "nf4"}}, 2),  # 3 cannot divide its weights
    ],
)
def test_the_lowest_stage_that_fits_is_chosen(
    size: StudentSize, num_ranks: int, gigabytes: float, changes: dict[str, Any], stage: int
) -> None:
    budget = 0.8 * gigabytes * 1e9
    section = section_of(**changes)
    assert lowest_stage(size, section, num_ranks=num_ranks, budget_bytes=budget) == stage


def test_no_rank_less_than_the_fewest_would_do() -> None:
    section, budget = section_of(), 19.2e9
    fewest = least_ranks(LARGE, section, stage=3, budget_bytes=budget)
    assert fewest == 8
    fits = [state_bytes(LARGE, section, stage=3, num_ranks=ranks) <= budget for ranks in (7, 8)]
    assert fits == [False, True]
    assert least_ranks(LARGE, section, stage=1, budget_bytes=budget) is None


def test_a_process_has_the_part_of_a_gpu_that_it_reserves(tiny_world: TinyWorld) -> None:
    assert memory_of_process(section_of(), 24e9) == 24e9
    assert memory_of_process(section_of(num_gpus=0.5), 24e9) == 12e9
    assert memory_of_process(section_of(num_gpus=2), 24e9) == 24e9
    teacher = tiny_world.plan(Path("run")).config.teacher.model_copy(update={"num_gpus": 2})
    assert memory_of_process(teacher, 24e9) == 48e9


@pytest.mark.parametrize(
    ("changes", "share", "names"),
    [
        ({}, 0.5, {"offload", "num_workers", "lora"}),
        ({"num_workers": 4}, 0.9, {"zero_stage", "offload", "lora"}),
        ({"num_workers": 4, "min_workers": 2}, 0.6, {"min_workers", "lora"}),
        ({"num_gpus": 0.5}, 0.9, {"num_gpus"}),
        ({"zero_stage": 3, "lora": {}}, 0.9, {"num_workers"}),
        ({"init": "config"}, 0.5, {"num_workers"}),
    ],
)
def test_each_setting_that_is_named_makes_it_fit(
    model: str, changes: dict[str, Any], share: float, names: set[str]
) -> None:
    values = {"model": model} | changes

    def needed(values: dict[str, Any]) -> tuple[StudentSection, StudentSize, int, float]:
        section = StudentSection.model_validate(values)
        size, ranks = size_of(outline(section)), section.min_workers or section.num_workers
        taken = state_bytes(size, section, stage=section.chosen_stage, num_ranks=ranks)
        return section, size, ranks, taken

    # a GPU with room for a part of it
    section, size, ranks, taken = needed(values)
    gpu = Memory(share * taken / 0.8 / (section.num_gpus or 1.0), "a GPU")
    lines = [*student_cures(section, size, num_ranks=ranks, gpu=gpu)]
    settings = [tomllib.loads(line.partition(": ")[0].replace(", ", "\n")) for line in lines]
    assert names <= {name for each in settings for name in each}
    for each in settings:
        changed, _, _, now = needed(values | each)
        assert now <= 0.8 * memory_of_process(changed, gpu.num_bytes), each


def test_ranks_on_one_machine_are_told_what_makes_all_of_them_smaller() -> None:
    section = section_of(num_workers=2, init="config")
    both = [2 * state_bytes(LARGE, section, stage=stage, num_ranks=2) for stage in (1, 2, 3)]
    (line,) = cpu_cures(section, LARGE, budget_bytes=(both[1] + both[2]) / 2)
    assert line.startswith("zero_stage = 3: ")


def test_a_teacher_is_told_the_fewest_gpus_that_hold_its_weights() -> None:
    on_vllm, spread = teacher_cures(65.6e9, gpu=Memory(24e9, "L4"))
    assert on_vllm.startswith('engine = "vllm", num_gpus = 4: 16.4 GB of each')
    assert spread.startswith("pipeline = true, num_gpus = 4: ")
    on_vllm, spread = teacher_cures(65.6e9, gpu=Memory(16e9, "T4"))
    assert on_vllm.startswith('engine = "vllm", num_gpus = 8: 8.2 GB of each')
    assert spread.startswith("pipeline = true, num_gpus = 6: ")


@pytest.mark.parametrize(
    ("student", "stage", "why"),
    [
        ({}, 1, "the lowest, for gpu_memory_gb is not set"),
        ({"offload": "cpu"}, 2, "the lowest, for gpu_memory_gb is not set"),
        ({"gpu_memory_gb": 24.0}, 1, "the lowest that fits into 80% of 24 GB"),
        ({"gpu_memory_gb": 1e-6}, 3, "the highest, and none fits into 80% of 1e-06 GB"),
        (
            {"gpu_memory_gb": 1e-6, "compile": True},
            2,
            "the highest, and none fits into 80% of 1e-06 GB",
        ),
        ({"gpu_memory_gb": 1e-6, "zero_stage": 2}, 2, "as zero_stage says"),
    ],
)
def test_the_stage_is_by_memory_where_that_is_known_and_a_number_in_a_plan(
    tiny_world: TinyWorld, tmp_path: Path, student: dict[str, Any], stage: int, why: str
) -> None:
    plan = tiny_world.plan(tmp_path / "run", student=student)
    assert plan.config.student.zero_stage == plan.jobs[0].origin.zero_stage == stage
    assert plan.why_zero_stage == why
    assert not plan.run_dir.exists()


def test_auto_stays_as_the_run_or_the_checkpoints_were_begun(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    auto = {"gpu_memory_gb": 24.0}
    begun = tiny_world.plan(tmp_path / "begun", student={"zero_stage": 2})
    begun.run_dir.mkdir()
    claim(begun.run_dir, config=begun.config, recipe=begun.recipe)
    resumed = tiny_world.plan(begun.run_dir, student=auto)
    assert (resumed.config.student.zero_stage, resumed.why_zero_stage) == (
        2,
        "as the run was begun",
    )

    # every machine is lost, and the checkpoints are not
    make_checkpoints(tmp_path / "kept" / "student", 5)
    elsewhere = auto | {"checkpoint_url": str(tmp_path / "kept")}
    plan = tiny_world.plan(tmp_path / "new", student=elsewhere)
    assert plan.why_zero_stage == "as its checkpoints were begun"
    assert plan.config.student.zero_stage == ORIGIN.zero_stage == 3


@pytest.mark.parametrize(
    ("lines", "file", "limit", "is_lower"),
    [
        ("0::/", "memory.max", "300000000", True),  # in a container
        ("0::/", "memory.max", "max", False),
        ("0::/slurm/job_7/step", "slurm/job_7/memory.max", "300000000", True),
        ("4:memory:/docker/7\n1:cpu:/", "memory/memory.limit_in_bytes", "300000000", True),
        ("4:memory:/job", "memory/job/memory.limit_in_bytes", "9223372036854771712", False),
        ("1:cpu:/", "memory.max", "300000000", False),
    ],
)
def test_the_memory_is_that_of_the_machine_or_a_lower_limit_of_its_process(
    tmp_path: Path, lines: str, file: str, limit: str, is_lower: bool
) -> None:
    own, path = tmp_path / "own", tmp_path / "groups" / file
    own.write_text(lines + "\n")
    path.parent.mkdir(parents=True)
    path.write_text(limit + "\n")
    found = memory_here(groups=tmp_path / "groups", own=own)
    machine = memory_here(groups=tmp_path / "none", own=tmp_path / "none")
    assert machine.device == "this machine"
    lower = Memory(3e8, "this process's limit")
    assert found == (lower if is_lower else machine)
