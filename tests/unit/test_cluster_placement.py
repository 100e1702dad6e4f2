"""The placement of processes, and the shortages of a cluster."""

from typing import Any

import pytest

from stillhouse.cluster.placement import (
    Placement,
    placement,
    require_room,
    shortages,
    student_needs,
    teacher_needs,
)
from stillhouse.config import StudentSection, TeacherSection
from stillhouse.errors import ConfigError

CPUS_ONLY = {"CPU": 8.0, "memory": 1e9}
WITH_GPUS = {"CPU": 8.0, "GPU": 4.0}


def teacher(**values: Any) -> TeacherSection:
    return TeacherSection.model_validate({"model": "m"} | values)


def student(**values: Any) -> StudentSection:
    return StudentSection.model_validate({"model": "m"} | values)


@pytest.mark.parametrize(
    ("values", "available", "expected"),
    [
        ({}, CPUS_ONLY, (1.0, 0.0, "cpu")),
        ({}, WITH_GPUS, (1.0, 1.0, "cuda")),
        ({"num_gpus": 0.5}, WITH_GPUS, (1.0, 0.5, "cuda")),
        ({"num_gpus": 0}, WITH_GPUS, (1.0, 0.0, "cpu")),
        ({"device": "cpu"}, WITH_GPUS, (1.0, 0.0, "cpu")),
        (
            {"device": "cuda"},
            CPUS_ONLY,
            (1.0, 1.0, "cuda"),
        ),  # the cluster may not have it: then it is a shortage
        ({"num_gpus": 2, "num_cpus": 0.25}, CPUS_ONLY, (0.25, 2.0, "cuda")),
        (
            {"engine": "openai", "openai": {"base_url": "http://10.0.0.5:8000/v1"}},
            WITH_GPUS,
            (1.0, 0.0, "cpu"),
        ),
        ({"engine": "text", "num_cpus": 0.1}, WITH_GPUS, (0.1, 0.0, "cpu")),
    ],
)
def test_a_process_goes_where_its_section_says(
    values: dict[str, object], available: dict[str, float], expected: tuple[float, float, str]
) -> None:
    where = placement(teacher(**values), available)
    assert (where.num_cpus, where.num_gpus, where.device) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"device": "cuda", "num_gpus": 0},
            "device is 'cuda' but num_gpus is 0; ask for at least a fraction",
        ),
        (
            {"device": "cpu", "num_gpus": 0.5},
            "device is 'cpu' but num_gpus is 0.5; set num_gpus to 0 or leave it out",
        ),
    ],
)
def test_a_device_and_gpus_that_contradict_each_other_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        placement(student(**values), WITH_GPUS)


def test_what_many_processes_need_is_added_up_without_zeros() -> None:
    assert Placement(0.5, 0.0, {"spot": 1.0}).times(3) == {"CPU": 1.5, "spot": 3.0}
    assert Placement(2.0, 0.25, {}).times(2) == {"CPU": 4.0, "GPU": 0.5}


def test_a_cluster_that_is_large_enough_is_short_of_nothing() -> None:
    needs = teacher_needs(teacher(min_replicas=3, max_replicas=99, num_cpus=1)) | student_needs(
        student(num_workers=50, num_cpus=0.1)
    )
    assert shortages(needs, CPUS_ONLY) == []
    require_room(needs, CPUS_ONLY)
    tenths = student_needs(student(num_workers=10, num_cpus=0.1))
    assert shortages(tenths, {"CPU": 1.0}) == []  # ten tenths are one, rounding or not


def test_every_shortage_says_what_is_needed_by_whom_and_what_is_there() -> None:
    needs = teacher_needs(
        teacher(min_replicas=3, max_replicas=4, num_cpus=2, resources={"spot": 1})
    ) | student_needs(student(num_workers=4, device="cuda"))
    assert shortages(needs, CPUS_ONLY) == [
        "CPU: 10 needed (3 teachers and 4 student ranks), 8 in the cluster",
        "spot: 3 needed (3 teachers and 4 student ranks), 0 in the cluster",
        "GPU: 4 needed (3 teachers and 4 student ranks), 0 in the cluster",
    ]
    with pytest.raises(ConfigError) as caught:
        require_room(needs, CPUS_ONLY)
    assert "the cluster is too small for this run:\n  - CPU: 10 needed" in str(caught.value)
    assert "Lower min_replicas, num_workers, num_cpus or num_gpus" in str(caught.value)


def test_a_crew_alone_is_measured_alone() -> None:
    assert shortages(teacher_needs(teacher(min_replicas=9, max_replicas=9)), CPUS_ONLY) == [
        "CPU: 9 needed (9 teachers), 8 in the cluster"
    ]
    assert shortages(student_needs(student(num_workers=8)), CPUS_ONLY) == []
