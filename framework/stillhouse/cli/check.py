"""`stillhouse check`: all that follows from a plan, and what would stop its run. No weights are
loaded and nothing is written."""

from collections.abc import Mapping
from pathlib import Path

import torch

from stillhouse.cli.check_cluster import check_cluster
from stillhouse.cli.check_corpus import check_corpus
from stillhouse.cli.check_store import check_store
from stillhouse.cli.check_weights import format_words, quantisation_of, weight_bytes
from stillhouse.cli.findings import (
    Findings,
    bullets,
    count_words,
    print_findings,
    require_writable,
    size_words,
)
from stillhouse.cluster.placement import student_needs
from stillhouse.config import StudentSection, TeacherSection
from stillhouse.errors import ConfigError, ModelError, StoreError
from stillhouse.models.heads import head_of
from stillhouse.models.load import load_model
from stillhouse.pipeline import Plan
from stillhouse.pipeline.plan import require_full_step
from stillhouse.pipeline.run_dir import changes_since
from stillhouse.student.adapters import outline
from stillhouse.student.memory import StudentSize, size_of, state_bytes

_STARTS: Mapping[str, str] = {
    "weights": "from its weights",
    "config": "from random weights",
    "layers": "from some of its layers",
}


def describe(plan: Plan) -> None:
    """Print what a run of this plan makes, reads and needs. Raises ConfigError naming everything
    that would stop it."""
    found = Findings()
    _models(plan, found)
    check_corpus(plan, found)
    check_store(plan, found)
    _training(plan, found)
    check_cluster(plan, found)
    _run_directory(plan, found)
    print_findings(found)
    if found.obstacles:
        raise ConfigError("this run would stop:\n" + bullets(found.obstacles))


def _models(plan: Plan, found: Findings) -> None:
    vocab_size, sequence_length = plan.recipe.vocab_size, plan.recipe.sequence_length
    for role, section in (("teacher", plan.config.teacher), ("student", plan.config.student)):
        name = section.model + (f" at {section.revision[:12]}" if section.revision else "")
        if isinstance(section, TeacherSection) and not section.has_weights:
            found.add(role, _without_weights(section, name))
            continue

        # the model, without memory for its weights
        try:
            with torch.device("meta"):
                model = (
                    outline(section)
                    if isinstance(section, StudentSection)
                    else load_model(section, random_init_seed=0)
                )
            head_of(model, vocab_size=vocab_size)
        except ModelError as error:
            found.obstacles.append(f"{role}: {error}")
            found.add(role, name)
            continue

        # its size
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        found.num_parameters[role] = num_parameters
        quantised = quantisation_of(model)
        if isinstance(section, TeacherSection) and section.vllm.quantization is not None:
            quantised = {"quant_method": section.vllm.quantization}  # while they are loaded
        num_bytes = weight_bytes(
            model, quantised, dtype_bytes=getattr(torch, section.dtype).itemsize
        )
        size = f"{size_words(num_bytes)} in {format_words(quantised, section.dtype)}"
        padding = model.get_output_embeddings().weight.shape[0] - vocab_size
        head = (
            f"its head is padded by {padding:,}, which is cut off"
            if padding
            else "its head has a row for each id"
        )
        parameters = f"{count_words(num_parameters)} parameters"
        found.add(role, f"{name}: {parameters}, {size}; {head}")
        if isinstance(section, StudentSection):
            found.student_size = size_of(model)
            found.add("", _student_memory(section, found.student_size))
            found.add("", f"ZeRO stage {section.chosen_stage}: {plan.why_zero_stage}")
        else:
            found.teacher_bytes = num_bytes

        # its context
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and limit < sequence_length:
            found.notes.append(
                f"corpus.sequence_length is {sequence_length:,}; the {role} is made for "
                f"{limit:,} positions at most"
            )
    found.add("tokenizer", f"the same {vocab_size:,} ids in teacher and student")


def _without_weights(section: TeacherSection, name: str) -> str:
    if section.openai is not None:
        return f"{name}: scored by the server at {section.openai.base_url}, which has the weights"
    if section.rollouts is not None:
        return (
            f"none: the targets are log-probabilities in {section.rollouts}; {name} has the "
            "tokenizer"
        )
    return f"none: the target is the next token of the text; {name} has the tokenizer"


def _student_memory(section: StudentSection, size: StudentSize) -> str:
    [(_, num_ranks)] = student_needs(section).values()
    stage = section.chosen_stage
    num_bytes = state_bytes(size, section, stage=stage, num_ranks=num_ranks)
    start = _STARTS[section.init if isinstance(section.init, str) else "layers"]
    part = f", {count_words(size.num_trained)} parameters are trained" if size.num_frozen else ""
    return (
        f"{start}{part}; weights, gradients and Adam take at least {size_words(num_bytes)} a rank"
        f" ({num_ranks} with ZeRO stage {stage}), activations not counted"
    )


def _training(plan: Plan, found: Findings) -> None:
    student, corpus, steps = plan.config.student, plan.sources.train, plan.total_steps
    batch, ranks = student.global_batch_sequences, student.num_workers
    try:
        require_full_step(batch, there=corpus.num_sequences)
    except ConfigError as error:
        found.obstacles.append(str(error))

    # how much is read; the last step of an epoch may be short
    epochs, more_steps = divmod(steps, plan.order.steps_per_epoch)
    num_sequences = epochs * corpus.num_sequences + min(more_steps * batch, corpus.num_sequences)
    num_tokens = num_sequences * corpus.sequence_length
    loss = student.divergence if student.divergence_weight > 0.0 else "cross-entropy"
    found.add(
        "training",
        f"{steps:,} steps of {batch:,} sequences: {count_words(num_tokens)} tokens, "
        f"{num_sequences / corpus.num_sequences:.3g} epochs;"
        f" {loss}, learning rate {student.learning_rate:g}",
    )
    if plan.config.evaluate.control:
        found.add("", "and the same again for the control, on the text alone")

    if student.forward_kl_steps:
        found.add("", f"forward_kl for the first {student.forward_kl_steps:,} steps")

    # settings that go badly together
    if student.forward_kl_steps >= steps:
        found.notes.append(
            f"student.forward_kl_steps is {student.forward_kl_steps:,}, but training ends after "
            f"{steps:,} steps: none is on {student.divergence}"
        )
    if student.warmup_steps >= steps:
        found.notes.append(
            f"student.warmup_steps is {student.warmup_steps:,} of {steps:,} steps: the learning "
            "rate never reaches its peak"
        )
    in_one_pass = student.micro_batch_sequences * ranks
    if batch % in_one_pass:
        found.notes.append(
            f"student.global_batch_sequences is {batch:,}, no multiple of the {in_one_pass:,} "
            "sequences of one pass over all ranks: every"
            " step is filled up with masked rows, which cost time and teach nothing"
        )


def _run_directory(plan: Plan, found: Findings) -> None:
    is_there = (plan.run_dir / "config.json").exists()
    found.add("run", f"{plan.run_dir}: {'a run to resume' if is_there else 'new'}")
    places = {
        "--run-dir": str(plan.run_dir),
        "student.checkpoint_url": plan.config.student.checkpoint_url or "",
    }
    for setting, place in places.items():
        try:
            if place and "://" not in place:
                require_writable(Path(place))
        except StoreError as error:
            found.obstacles.append(f"{setting}: {error}")
    changes = changes_since(plan.run_dir, config=plan.config, recipe=plan.recipe)
    if changes:
        found.obstacles.append(
            f"{plan.run_dir} belongs to another run; these differ:\n"
            + bullets(changes, "      ")
            + "\n    set them back to resume it, or name another --run-dir"
        )
