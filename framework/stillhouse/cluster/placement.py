"""What the processes of a run ask of a cluster, and whether it has that: values and arithmetic,
without Ray."""

from collections.abc import Mapping
from dataclasses import dataclass

from stillhouse.config import ModelSection, StudentSection, TeacherSection
from stillhouse.errors import ConfigError

# by what they are called: the section that says what each process needs, and how many
ResourceNeeds = Mapping[str, tuple[ModelSection, int]]


@dataclass(frozen=True, slots=True)
class Placement:
    """What one process asks of Ray, and the device that its tensors will live on."""

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float]

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"

    def times(self, count: int) -> dict[str, float]:
        """The total of `count` such processes, by resource name."""
        return {
            name: count * amount
            for name, amount in {
                "CPU": self.num_cpus,
                "GPU": self.num_gpus,
                **self.resources,
            }.items()
            if amount
        }


def placement(section: ModelSection, available: Mapping[str, float]) -> Placement:
    """Where a process of this section goes: a GPU where `device` says so or the cluster has one,
    else the CPU."""
    on_gpu = section.device == "cuda" or (
        section.device == "auto" and available.get("GPU", 0.0) > 0
    )
    default_gpus = 1.0 if on_gpu else 0.0
    num_gpus = default_gpus if section.num_gpus is None else section.num_gpus
    if section.device == "cpu" and num_gpus > 0:
        raise ConfigError(
            f"device is 'cpu' but num_gpus is {num_gpus:g}; set num_gpus to 0 or leave it out, or "
            'set device = "cuda"'
        )
    if section.device == "cuda" and num_gpus == 0:
        raise ConfigError(
            "device is 'cuda' but num_gpus is 0; ask for at least a fraction of a GPU, or set "
            'device = "cpu"'
        )
    return Placement(section.num_cpus, num_gpus, dict(section.resources))


def teacher_needs(section: TeacherSection) -> dict[str, tuple[ModelSection, int]]:
    """The fewest teachers with which a run begins, as a crew."""
    return {"teachers": (section, section.min_replicas)}


def student_needs(section: StudentSection) -> dict[str, tuple[ModelSection, int]]:
    """The fewest student ranks that train, as a crew."""
    return {"student ranks": (section, section.min_workers or section.num_workers)}


def shortages(crews: ResourceNeeds, available: Mapping[str, float]) -> list[str]:
    """What would be waited for in vain: each resource of which the crews, by name, together need
    more than the cluster has."""
    needed: dict[str, float] = {}
    for section, count in crews.values():
        for name, amount in placement(section, available).times(count).items():
            needed[name] = needed.get(name, 0.0) + amount
    of_whom = " and ".join(f"{count} {crew}" for crew, (_, count) in crews.items())
    return [
        f"{name}: {amount:g} needed ({of_whom}), {available.get(name, 0.0):g} in the cluster"
        for name, amount in needed.items()
        if amount > available.get(name, 0.0) + 1e-9
    ]


def require_room(crews: ResourceNeeds, available: Mapping[str, float]) -> None:
    """Raise ConfigError where `shortages` finds any: Ray itself would wait for ever without a
    word."""
    missing = shortages(crews, available)
    if missing:
        raise ConfigError(
            "the cluster is too small for this run:\n"
            + "\n".join(f"  - {line}" for line in missing)
            + "\nLower min_replicas, num_workers, num_cpus or num_gpus (fractions share a core), "
            "or attach to a larger cluster."
        )


def how_many_fit(there: Mapping[str, float], where: Placement) -> int:
    """How many such processes a machine with these resources, by name, has room for."""
    return min(
        (int(there.get(name, 0.0) / amount + 1e-6) for name, amount in where.times(1).items()),
        default=0,
    )
