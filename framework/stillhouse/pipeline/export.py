"""The export of a trained model: a Hugging Face directory or a repository of the hub, with a model
card that says what it learned from, and how well."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData

from stillhouse.checkpoint.scratch import scratch_folder
from stillhouse.config import Config, CorpusSection, StudentSection
from stillhouse.errors import CheckpointError
from stillhouse.models.hub import licence_of, upload
from stillhouse.models.identity import is_local
from stillhouse.models.tokenizers import with_chat_template
from stillhouse.pipeline.console import say
from stillhouse.pipeline.heldout import best_step
from stillhouse.pipeline.plan import Plan
from stillhouse.report.words import short_name
from stillhouse.sequences.chat import template_text
from stillhouse.sequences.tables import looks_like_path
from stillhouse.store import Recipe
from stillhouse.tracking import EvalEvent, Role, RunEvent, read_journal, stretches, words_of


def export_run(
    plan: Plan, out: Path, *, role: Role = "student", best: bool = False, adapter: bool = False
) -> int:
    """Write a trained model as a Hugging Face directory, or its adapters alone as one of peft's:
    its newest commit, or the `best` one by held-out scores. Returns its optimiser steps.

    Raises CheckpointError where the run has no such role, or no commit of it; ConfigError where the
    best one was not kept, or there are no adapters.
    """
    # late: DeepSpeed takes seconds to import, and only this function needs it here
    from stillhouse.student.export import export

    job = next((job for job in plan.jobs if job.role == role), None)
    if job is None:
        raise CheckpointError(f"this run has no {role}: evaluate.control is false in its config")
    journal = plan.run_dir / "journal.jsonl"

    def tell(seconds: float, why: str) -> None:
        say(f"the export has waited for {seconds:.0f} s: {why}")

    return export(
        job.checkpoints,
        out,
        section=job.section,
        tokenizer=with_chat_template(plan.tokenizer, trained_template(plan.config.corpus)),
        card=lambda steps: model_card(
            plan.config,
            plan.recipe,
            read_journal(journal),
            role=role,
            steps=steps,
            adapter=adapter,
        ),
        adapter=adapter,
        step=best_step(plan.evaluation, job, tell=tell) if best else None,
        tell=tell,
    )


def trained_template(corpus: CorpusSection) -> str | None:
    """The chat template that a student learns and is served with, of several data sets that of the
    first one with conversations; None: its tokenizer's own."""
    chats = [part for part in corpus.parts() if part.format == "chat"]
    return template_text(chats[0]) if chats else None


def push_run(plan: Plan, name: str, *, private: bool) -> str:
    """Export the student and commit it to the hub's repository `owner/name`; returns its address.
    Raises what `export_run` does, and ModelError where the hub refuses it."""
    with scratch_folder() as folder:
        out = folder / "model"
        steps = export_run(plan, out)
        message = f"The student after {steps} steps, recipe {plan.recipe.fingerprint[:16]}"
        return upload(out, name, private=private, message=message)


def model_card(
    config: Config,
    recipe: Recipe,
    events: Sequence[RunEvent],
    *,
    role: Role,
    steps: int,
    adapter: bool = False,
) -> str:
    """The README of a model, or of its adapters alone, after `steps` optimiser steps. `events`: of
    its run's journal."""
    # what it learned from, and how
    teacher = config.teacher.scored_by
    number_format = config.teacher.dtype if config.teacher.has_weights else recipe.teacher_dtype
    lesson = (
        "the text alone"
        if role == "control" or teacher is None
        else f"the top {recipe.k} log-probabilities of {short_name(teacher)} and "
        f"{_rest(recipe.num_draws)}"
    )
    data = " and ".join(short_name(each.dataset) for each in config.corpus.parts())
    schedule = words_of(stretches(events, role, until=steps)) or "not in the run's journal"
    taught_by = "" if teacher is None else f", distilled from {Path(teacher).name}"
    facts = {
        "student": f"{short_name(config.student.model)} (from {_beginning(config.student)})",
        "teacher": teacher and f"{short_name(teacher)}, {number_format}",
        "data": f"{data}, {recipe.num_sequences:,} sequences of {recipe.sequence_length} tokens",
        "loss": _loss(config.student, recipe),
        "optimiser steps": f"{steps:,} of {config.student.global_batch_sequences} sequences",
        "AdamW": schedule,
        "recipe": f"`{recipe.fingerprint}`",
    }

    # the page
    lines = [
        "---",
        card_data(config, adapter=adapter).to_yaml(),
        "---",
        f"# {Path(config.student.model).name}{taught_by}",
        "",
        f"Trained by Stillhouse {version('stillhouse')} on {lesson}.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {words} |" for name, words in facts.items() if words),
    ]
    return "\n".join(lines + _scores(events)) + "\n"


def card_data(config: Config, *, adapter: bool = False) -> ModelCardData:
    """The card's metadata, as the hub reads it: names of the hub alone, since a path of this
    machine means nothing there. Adapters that were trained beside a part of a model are not the
    model's."""
    student, rollouts = config.student, config.teacher.rollouts
    keeps_weights = student.init != "config"
    on_hub = keeps_weights and not is_local(student)
    if adapter:
        on_hub &= student.init == "weights"
    relation = "adapter" if adapter else "finetune"
    names = [part.dataset for part in config.corpus.parts()]
    of_the_hub = [name for name in names if name != "stdlib" and not looks_like_path(name)]
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "stillhouse"],
        base_model=student.model if on_hub else None,
        base_model_relation=relation if on_hub else None,
        teacher=None if is_local(config.teacher) or rollouts else config.teacher.scored_by,
        license=licence_of(student.model) if keeps_weights else None,
        datasets=of_the_hub or None,
    )


def _beginning(student: StudentSection) -> str:
    start, lora = student.init, student.lora
    words = start if isinstance(start, str) else f"its layers {', '.join(map(str, start.layers))}"
    if not isinstance(start, str) and start.intermediate_size is not None:
        words += f" with {start.intermediate_size:,} channels of their MLPs"
    return words + (f", LoRA of rank {lora.rank}" if lora is not None else "")


def _loss(student: StudentSection, recipe: Recipe) -> str:
    if student.divergence_weight == 0.0:
        return f"{student.ce_weight:g} of cross-entropy"
    return (
        f"{student.divergence} at temperature {recipe.temperature:g}, plus {student.ce_weight:g} "
        "of cross-entropy"
    )


def _rest(num_draws: int) -> str:
    return f"{num_draws} draws from the rest" if num_draws else "the mass of the rest"


def _scores(events: Sequence[RunEvent]) -> list[str]:
    """A table of the last evaluation of each model, which may be of an earlier step than the
    export."""
    scores = {event.model: event for event in events if isinstance(event, EvalEvent)}
    if not scores:
        return []
    return [
        "",
        "Held-out text, exact and dense:",
        "",
        "| model | after steps | cross-entropy | KL from the teacher | top-1 agreement | "
        "acceptance |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {'' if name == 'teacher' else f'{event.step:,}'} "
            f"| {event.cross_entropy:.4f} "
            "| " + " | ".join(map(_figure, (event.kl, event.agreement, event.acceptance))) + " |"
            for name, event in scores.items()
        ),
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
