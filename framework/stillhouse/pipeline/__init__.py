"""The steps of a run as functions: make_plan, produce, train, run, repair, evaluate, export, push;
and those before it: plan_generation, generate, grade. Each can be done again."""

from stillhouse.pipeline.export import export_run, push_run
from stillhouse.pipeline.generate import generate
from stillhouse.pipeline.generation import Generation, plan_generation
from stillhouse.pipeline.grading import Grades, grade
from stillhouse.pipeline.plan import Plan
from stillhouse.pipeline.planning import make_plan
from stillhouse.pipeline.verbs import evaluate_run, open_run, produce, repair, run, train

__all__ = [
    "Generation",
    "Grades",
    "Plan",
    "evaluate_run",
    "export_run",
    "generate",
    "grade",
    "make_plan",
    "open_run",
    "plan_generation",
    "produce",
    "push_run",
    "repair",
    "run",
    "train",
]
