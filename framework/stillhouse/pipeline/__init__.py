"""The steps of a run as functions: make_plan, produce, train, run, repair, evaluate, export, push.
Each can be done again."""

from stillhouse.pipeline.export import export_run, push_run
from stillhouse.pipeline.plan import Plan
from stillhouse.pipeline.planning import make_plan
from stillhouse.pipeline.verbs import evaluate_run, open_run, produce, repair, run, train

__all__ = [
    "Plan",
    "evaluate_run",
    "export_run",
    "make_plan",
    "open_run",
    "produce",
    "push_run",
    "repair",
    "run",
    "train",
]
