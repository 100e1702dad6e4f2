"""Placement of a run's processes: the resources that they need, and whether a cluster has them.
Values and arithmetic, without Ray."""

from collections.abc import Mapping
from dataclasses import dataclass

from stillhouse.config import ModelSection, PoolSection, StudentSection, TeacherSection
from stillhouse.errors import ConfigError

# by the name of the processes: the section with the needs of one, and how many
ResourceNeeds = Mapping[str, tuple[ModelSection, int]]


@dataclass(frozen=True, slots=True)
class Placement:
    """The resources that one process requests from Ray, and the device of its tensors."""

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float]

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"

    def times(self, count: int) -> dict[str, float]:
        """The total of `count` such processes, by resource name."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: count * amount for name, amount in amounts.items() if amount}


def placement(section: ModelSection, available: Mapping[str, float]) -> Placement:
    """The placement of a process of this section: on a GPU where `device` says so or the cluster
    has one, otherwise on the CPU, as a process that loads no weights is. Raises ConfigError where
    `device` and `num_gpus` contradict."""
    uses_gpu = not isinstance(section, PoolSection) or section.has_weights
    finds_gpu = section.device == "auto" and uses_gpu and available.get("GPU", 0.0) > 0
    default_gpus = 1.0 if section.device == "cuda" or finds_gpu else 0.0
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
    """The needs of the fewest teachers with which a run begins."""
    return {"teachers": (section, section.min_replicas)}


def student_needs(section: StudentSection) -> dict[str, tuple[ModelSection, int]]:
    """The needs of the fewest student ranks that train."""
    return {"student ranks": (section, section.min_workers or section.num_workers)}


def shortages(needs: ResourceNeeds, available: Mapping[str, float]) -> list[str]:
    """One line for each resource of which the processes together need more than the cluster has."""
    needed: dict[str, float] = {}
    for section, count in needs.values():
        for name, amount in placement(section, available).times(count).items():
            needed[name] = needed.get(name, 0.0) + amount
    processes = " and ".join(f"{count} {name}" for name, (_, count) in needs.items())
    return [
        f"{name}: {amount:g} needed ({processes}), {available.get(name, 0.0):g} in the cluster"
        for name, amount in needed.items()
        if amount > available.get(name, 0.0) + 1e-9
    ]


def require_room(needs: ResourceNeeds, available: Mapping[str, float]) -> None:
    """Raise ConfigError where there are `shortages`: Ray itself would wait for ever, silently."""
    missing = shortages(needs, available)
    if missing:
        raise ConfigError(
            "the cluster is too small for this run:\n"
            + "\n".join(f"  - {line}" for line in missing)
            + "\nLower min_replicas, num_workers, num_cpus or num_gpus (fractions share a core), "
            "or attach to a larger cluster."
        )


def how_many_fit(there: Mapping[str, float], where: Placement) -> int:
    """How many such processes fit on a machine with these resources, by name."""
    return min(
        (int(there.get(name, 0.0) / amount + 1e-6) for name, amount in where.times(1).items()),
        default=0,
    )
