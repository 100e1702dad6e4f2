"""What `stillhouse check` says: all that follows from a plan, and what would stop its run; no
weight is loaded and nothing is written.

Notes are worth knowing; obstacles would stop `stillhouse run`, and make `check` fail.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from stillhouse.checkpoint.manifest import newest_step
from stillhouse.cli import estimate
from stillhouse.cluster.machine import why_not_writable
from stillhouse.cluster.placement import placement, shortages, student_needs, teacher_needs
from stillhouse.cluster.session import attached, lacks, remarks
from stillhouse.config import ClusterSection, ModelSection, StudentSection
from stillhouse.errors import CheckpointError, ChunkError, ConfigError, ModelError, StoreError
from stillhouse.logits import decode, kept_mass
from stillhouse.losses.divergences import divergence_named, is_unbiased_with_draws
from stillhouse.models import head_of, load_model
from stillhouse.pipeline import Plan
from stillhouse.pipeline.plan import require_full_step
from stillhouse.pipeline.run_dir import changes_since
from stillhouse.redaction import scrub
from stillhouse.store import ChunkStore, Recipe, StoredRecipe, differences, list_recipes, nearest
from stillhouse.student.pairing import LEAST_KEPT_MASS, depends_on_kept_mass, require_kept_mass
from stillhouse.terminal import one_line, printable

_NEARLY = 4  # differing fields up to which another recipe is a near one
# a parameter's weight, gradient and Adam states in mixed precision or in float32 (ZeRO, arXiv
# 1910.02054, section 3.1)
_STATE_BYTES = 16
_SPLIT_BYTES = {0: 0, 1: 12, 2: 14, 3: 16}  # how many of them a ZeRO stage divides among the ranks


@dataclass(slots=True)
class _Findings:
    """What there is to say, as it is found."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    num_parameters: dict[str, int] = field(default_factory=dict)  # of each model that could be made


def describe(plan: Plan) -> None:
    """Print what a run of this plan makes, reads and needs. Raises ConfigError naming everything
    that would stop it."""
    found = _Findings()
    _models(plan, found)
    _corpus(plan, found)
    _store(plan, found)
    _training(plan, found)
    _cluster(plan, found)
    _run_directory(plan, found)
    _print(found)
    if found.obstacles:
        raise ConfigError(
            "this run would stop:\n" + "\n".join(f"  - {obstacle}" for obstacle in found.obstacles)
        )


def _models(plan: Plan, found: _Findings) -> None:
    for role, section in (("teacher", plan.config.teacher), ("student", plan.config.student)):
        commit = f" at {section.revision[:12]}" if section.revision else ""
        try:
            with torch.device("meta"):
                model = load_model(section, random_init_seed=0)
            head_of(model, vocab_size=plan.recipe.vocab_size)
        except ModelError as error:
            found.obstacles.append(f"{role}: {error}")
            found.rows.append((role, f"{section.model}{commit}"))
            continue
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        found.num_parameters[role] = num_parameters
        num_bytes = num_parameters * getattr(torch, section.dtype).itemsize
        padding = model.get_output_embeddings().weight.shape[0] - plan.recipe.vocab_size
        shape = f"{_count(num_parameters)} parameters, {decimal(num_bytes)} in {section.dtype}"
        head = (
            f"its head is padded by {padding:,}, which is cut off"
            if padding
            else "its head has a row for each id"
        )
        found.rows.append((role, f"{section.model}{commit}: {shape}; {head}"))
        if isinstance(section, StudentSection):
            found.rows.append(("", _student_memory(section, num_parameters)))
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and limit < plan.recipe.sequence_length:
            found.notes.append(
                f"corpus.sequence_length is {plan.recipe.sequence_length:,}; the {role} is made "
                f"for {limit:,} positions at most"
            )
    found.rows.append(
        ("tokenizer", f"the same {plan.recipe.vocab_size:,} ids in teacher and student")
    )


def _student_memory(section: StudentSection, num_parameters: int) -> str:
    split = _SPLIT_BYTES[section.zero_stage]
    num_bytes = num_parameters * (_STATE_BYTES - split + split / section.num_workers)
    start = "from its weights" if section.init == "weights" else "from random weights"
    return (
        f"{start}; weights, gradients and Adam take at least {decimal(round(num_bytes))} a rank"
        f" ({section.num_workers} with ZeRO stage {section.zero_stage}), activations not counted"
    )


def _corpus(plan: Plan, found: _Findings) -> None:
    corpus, heldout = plan.sources.train, plan.sources.heldout
    found.rows.append(
        (
            "corpus",
            f"{plan.config.corpus.dataset}: {corpus.num_sequences:,} sequences of "
            f"{corpus.sequence_length:,} tokens,"
            f" {_count(corpus.num_targets)} of them with a target; {heldout.num_sequences:,} more "
            "are held out",
        )
    )


def _store(plan: Plan, found: _Findings) -> None:
    recipe, url, num_chunks = plan.recipe, plan.config.store.url, len(plan.chunks)
    stored = _stored(plan, found)
    is_there = any(other.recipe == recipe for other in stored)
    present = ChunkStore(url, recipe).published() & set(plan.chunks) if is_there else set()
    per_chunk, window_bytes = plan.bytes_per_chunk, plan.window_chunks * plan.bytes_per_chunk
    ahead = min(plan.window_chunks, num_chunks)
    found.rows += [
        (
            "targets",
            f"k = {recipe.k}{_draws(recipe)}, {recipe.spec.codec_name}: "
            f"{recipe.spec.bytes_per_token:,} bytes each",
        ),
        ("store", f"{url}/{recipe.fingerprint[:16]}"),
        (
            "",
            f"{num_chunks:,} chunks of {recipe.chunk_sequences:,} sequences, {_size(per_chunk)} "
            f"each; {len(present):,} are there already",
        ),
        ("", f"{_size(num_chunks * per_chunk)} in all"),
        (
            "window",
            f"teachers run up to {ahead:,} chunks ahead of the student: {_size(ahead * per_chunk)}",
        ),
    ]
    if ahead < num_chunks and window_bytes > plan.config.store.window_bytes:
        found.notes.append(
            f"store.window_bytes is {_size(plan.config.store.window_bytes)}, less than a student "
            "may need for one step; lower"
            " store.chunk_sequences or student.shuffle_window_chunks to come within it"
        )
    _pairing(plan, present, found)
    near = nearest([other.recipe for other in stored], recipe)
    if near is not None and not is_there and len(differences(recipe, near)) <= _NEARLY:
        found.notes.append(
            f"the store has {near.fingerprint[:16]}, which would serve but for these (this run's "
            "value first):\n    " + "\n    ".join(differences(recipe, near))
        )


def _pairing(plan: Plan, present: Collection[int], found: _Findings) -> None:
    """What the student's divergence makes of such targets."""
    student, recipe = plan.config.student, plan.recipe
    divergence = divergence_named(student.divergence, student.mix)
    if student.divergence_weight == 0.0 or (
        recipe.num_draws and is_unbiased_with_draws(divergence)
    ):
        return
    unused = (
        f"learns nothing from the {recipe.num_draws} draws a token and " if recipe.num_draws else ""
    )
    cure = (
        "unless another student reads this store, spend their bytes on entries: target.k = 64, "
        "target.tail_draws = 0"
    )
    found.notes.append(
        f"student.divergence is {student.divergence}, which {unused}sees all but the {recipe.k} "
        "kept entries as one bucket"
        + (
            f"; {cure}"
            if unused
            else "; with target.tail_draws above 0 forward_kl would be unbiased"
        )
    )
    if not depends_on_kept_mass(student):
        return
    mass = _kept_mass_of_the_first_batch(plan, present)
    if mass is None:
        found.notes.append(
            "training stops before its first step unless the kept entries hold "
            f"{LEAST_KEPT_MASS:.0%} of the teacher's mass in the first"
            " batch, whose chunks are not there yet, or student.tail_as_bucket = true"
        )
        return
    found.rows.append(
        ("", f"the kept entries hold {mass:.1%} of the teacher's mass in the first batch")
    )
    try:
        if not _has_begun(plan.jobs()[0].checkpoints):
            require_kept_mass(student, recipe.spec, kept_mass=mass)
    except (ConfigError, CheckpointError, StoreError) as error:
        found.obstacles.append(str(error))


def _has_begun(checkpoints: str) -> bool:
    """Whether training goes on from a commit. No directory is looked into before it is there: the
    look would make it."""
    return ("://" in checkpoints or Path(checkpoints).is_dir()) and newest_step(checkpoints) > 0


def _kept_mass_of_the_first_batch(plan: Plan, present: Collection[int]) -> float | None:
    """As the ranks will measure it; None while its chunks are not there, or cannot be read."""
    numbers, rows = np.divmod(plan.order.sequences(0), plan.recipe.chunk_sequences)
    if not present or not set(numbers.tolist()) <= set(present):
        return None
    store = ChunkStore(plan.config.store.url, plan.recipe)
    try:
        chunks = [
            store.fetch_rows(number, rows[numbers == number])
            for number in np.unique(numbers).tolist()
        ]
        targets = [decode(torch.from_numpy(chunk.targets_NB), plan.recipe.spec) for chunk in chunks]
    except (ChunkError, StoreError):
        return None
    return float(torch.cat([kept_mass(target) for target in targets]).mean())


def _draws(recipe: Recipe) -> str:
    return f", {recipe.num_draws} draws from the tail" if recipe.num_draws else ""


def _stored(plan: Plan, found: _Findings) -> list[StoredRecipe]:
    """The recipes in the store; what keeps it from being read or written becomes an obstacle. It is
    not written to."""
    try:
        where = ChunkStore(plan.config.store.url, plan.recipe).url
        if where.startswith("memory:"):
            raise StoreError(
                f"{where} cannot be shared between processes; give a directory or a bucket"
            )
        if "://" not in where:
            _require_writable(Path(where))
        return list_recipes(where)
    except StoreError as error:
        found.obstacles.append(f"store.url: {error}")
        return []


def _require_writable(path: Path) -> None:
    why = why_not_writable(path)
    if why is not None:
        raise StoreError(f"{why}; name another place")


def _training(plan: Plan, found: _Findings) -> None:
    student, corpus, steps = plan.config.student, plan.sources.train, plan.total_steps
    try:
        require_full_step(student.global_batch_sequences, there=corpus.num_sequences)
    except ConfigError as error:
        found.obstacles.append(str(error))
    batch, ranks = student.global_batch_sequences, student.num_workers
    epochs, more_steps = divmod(steps, plan.order.steps_per_epoch)
    num_sequences = epochs * corpus.num_sequences + min(more_steps * batch, corpus.num_sequences)
    num_tokens = num_sequences * corpus.sequence_length
    found.rows.append(
        (
            "training",
            f"{steps:,} steps of {batch:,} sequences: {_count(num_tokens)} tokens, "
            f"{num_sequences / corpus.num_sequences:.3g} epochs;"
            f" {student.divergence}, learning rate {student.learning_rate:g}",
        )
    )
    if plan.config.evaluate.control:
        found.rows.append(("", "and the same again for the control, on the text alone"))
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


def _cluster(plan: Plan, found: _Findings) -> None:
    section, teacher, student = plan.config.cluster, plan.config.teacher, plan.config.student
    found.obstacles += lacks(section)
    found.notes += remarks(section)
    try:
        available = _available(section)
        replicas = f"{teacher.min_replicas:,}" + (
            f" to {teacher.max_replicas:,}" if teacher.max_replicas > teacher.min_replicas else ""
        )
        found.rows += [
            (
                "cluster",
                f"{section.address or 'this machine'}: {available.get('CPU', 0):g} CPUs, "
                f"{available.get('GPU', 0):g} GPUs",
            ),
            ("", f"teachers: {replicas}, each with {_needs(teacher, available)}"),
            ("", f"student ranks: {student.num_workers:,}, each with {_needs(student, available)}"),
        ]
        missing = shortages(teacher_needs(teacher) | student_needs(student), available)
    except ConfigError as error:
        found.obstacles.append(str(error))
        return
    _hours(plan, available, found)
    cure = (
        "name a larger cluster in cluster.address"
        if section.address is None
        else "add machines to the cluster"
    )
    lower = "lower min_replicas, num_workers, num_cpus or num_gpus (fractions share one)"
    found.obstacles += [f"{line}; {cure}, or {lower}" for line in missing]
    beside = student_needs(student)
    room = [
        count
        for count in range(teacher.max_replicas + 1)
        if not shortages({"teachers": (teacher, count)} | beside, available)
    ]
    if not missing and room[-1] < teacher.max_replicas:
        found.notes.append(
            f"teacher.max_replicas is {teacher.max_replicas:,}: {room[-1]:,} fit beside the "
            "student now, the others join when there is room"
        )
    if section.address is not None and "://" not in plan.config.store.url:
        found.notes.append(
            f"store.url is a directory, {plan.config.store.url}: every machine of the cluster has "
            "to see the same one"
        )


def _hours(plan: Plan, available: Mapping[str, float], found: _Findings) -> None:
    """An estimate, where both models are known and live on GPUs."""
    config, corpus = plan.config, plan.sources.train
    places = {
        role: placement(section, available)
        for role, section in (("teacher", config.teacher), ("student", config.student))
    }
    if found.num_parameters.keys() != places.keys() or any(
        where.device == "cpu" for where in places.values()
    ):
        return
    card = estimate.card_of(available) or estimate.ASSUMED
    recipe, student = plan.recipe, config.student
    num_taught = (
        min(len(plan.chunks) * recipe.chunk_sequences, corpus.num_sequences)
        * corpus.sequence_length
    )
    num_learnt = plan.total_steps * student.global_batch_sequences * corpus.sequence_length
    checkpointing = student.activation_checkpointing
    targets = estimate.teaching(
        found.num_parameters["teacher"],
        num_taught,
        card=card,
        num_cards=config.teacher.max_replicas * places["teacher"].num_gpus,
    )
    steps = estimate.training(
        found.num_parameters["student"],
        num_learnt,
        checkpointing=checkpointing,
        card=card,
        num_cards=student.num_workers * places["student"].num_gpus,
    )
    again = ", and as much again for the control" if config.evaluate.control else ""
    found.rows += [
        (
            "hours",
            f"targets {_some(targets.hours)} on {targets.num_cards:g} {card},"
            f" training {_some(steps.hours)} on {steps.num_cards:g} {card}{again}",
        ),
        (
            "",
            f"by arithmetic: {estimate.FORWARD_OPERATIONS} operations a parameter and token for "
            "targets,"
            f" {estimate.training_operations(checkpointing)} for training, at"
            f" {estimate.FORWARD_SHARE:.0%} and {estimate.TRAINING_SHARE:.0%} of its data sheet's "
            f"{estimate.PEAK_TFLOPS[card]:g} TFLOP/s",
        ),
    ]


def _some(hours: float) -> str:
    return f"about {hours:.2g} h" if hours >= 0.1 else "minutes"


def _available(section: ClusterSection) -> Mapping[str, float]:
    if section.address is not None:
        with attached(section) as resources:
            return dict(resources)
    return {
        "CPU": float(section.num_cpus or os.cpu_count() or 1),
        "GPU": float(torch.cuda.device_count()),
    }


def _needs(section: ModelSection, available: Mapping[str, float]) -> str:
    asked = placement(section, available)
    return (
        f"{', '.join(f'{amount:g} {name}' for name, amount in asked.times(1).items())} (on "
        f"{asked.device})"
    )


def _run_directory(plan: Plan, found: _Findings) -> None:
    is_there = (plan.run_dir / "config.json").exists()
    found.rows.append(("run", f"{plan.run_dir}: {'a run to go on with' if is_there else 'new'}"))
    places = {
        "--run-dir": str(plan.run_dir),
        "student.checkpoint_url": plan.config.student.checkpoint_url or "",
    }
    for setting, place in places.items():
        try:
            if place and "://" not in place:
                _require_writable(Path(place))
        except StoreError as error:
            found.obstacles.append(f"{setting}: {error}")
    changes = changes_since(plan.run_dir, config=plan.config, recipe=plan.recipe)
    if changes:
        found.obstacles.append(
            f"{plan.run_dir} belongs to another run; these differ:\n"
            + "\n".join(f"      {change}" for change in changes)
            + "\n    set them back to go on with it, or name another --run-dir"
        )


def _print(found: _Findings) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in found.rows:
        table.add_row(label, Text(one_line(scrub(text))))
    console = Console(highlight=False)
    console.print(table)
    for note in found.notes:
        console.print(Text(printable(scrub(f"note: {note}"))))
    if not found.obstacles:
        console.print("\nNothing stands in the way of this run.", style="green")


def _count(number: float) -> str:
    """A number of things, to three digits: 950, 25.3 M, 32.8 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def _size(num_bytes: float) -> str:
    return decimal(round(num_bytes))
