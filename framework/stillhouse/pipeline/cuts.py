"""The student that is cut from another model: written once, by the command that trains it."""

from collections.abc import Collection
from pathlib import Path

from stillhouse.cluster.placement import Placement
from stillhouse.config import CutSection
from stillhouse.models.cuts import write_cut
from stillhouse.pipeline.console import say
from stillhouse.pipeline.plan import Plan
from stillhouse.pipeline.shared_dirs import require_shared


def make_cut(plan: Plan, workers: Collection[Placement]) -> None:
    """Write the model that the plan's student begins as, where it is cut from another one, and is
    not there yet. Raises ConfigError where the machines of the workers do not see it."""
    section, folder = plan.config.student, Path(plan.initial_section.model)
    if not isinstance(section.init, CutSection):
        return
    require_shared(
        str(folder.parent), workers, what="the student's first weights", setting="--run-dir"
    )
    if not folder.is_dir():
        say(f"cutting the student's {len(section.init.layers)} layers out of {section.model}")
        write_cut(section, section.init, folder)
