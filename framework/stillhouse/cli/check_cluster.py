"""`stillhouse check`, its third part: room in the cluster, and an estimate of the hours."""

import os
from collections.abc import Mapping, Sequence

import torch

from stillhouse.cli import estimate
from stillhouse.cli.check_memory import check_memory
from stillhouse.cli.findings import Findings
from stillhouse.cluster.interpreters import Interpreters, require_here
from stillhouse.cluster.nodes import nodes_with_room
from stillhouse.cluster.placement import placement, shortages, student_needs, teacher_needs
from stillhouse.cluster.session import attached, lacks, remarks
from stillhouse.config import ClusterSection, Config, ModelSection, PoolSection
from stillhouse.errors import ConfigError
from stillhouse.pipeline import Plan

_ASKED_S = 90.0  # for the machines' answers about their interpreters


def check_cluster(plan: Plan, found: Findings) -> None:
    """Describe the cluster and what each process needs of it; estimate the hours on GPUs."""
    config, section = plan.config, plan.config.cluster
    found.obstacles += lacks(section)
    found.notes += remarks(section)

    # what there is, and what is missing
    try:
        available = resources_for(section, config.teacher)
        _processes(config, available, found)
        needs = teacher_needs(config.teacher) | student_needs(config.student)
        missing = shortages(needs, available)
    except ConfigError as error:
        found.obstacles.append(str(error))
        return
    check_memory(plan.config, available, found)
    _hours(plan, available, found)

    # what to do about it
    lower = "lower min_replicas, num_workers, num_cpus or num_gpus (fractions share one)"
    tell_shortages(section, missing, found, lower=lower, store_url=config.store.url)
    if not missing:
        _replicas_that_fit(config, available, found)


def tell_shortages(
    section: ClusterSection,
    missing: Sequence[str],
    found: Findings,
    *,
    lower: str,
    store_url: str,
) -> None:
    """An obstacle for each resource that is missing, which `lower` may mend; and a note on a store
    that each machine has to see."""
    is_here = section.address is None
    cure = "name a larger cluster in cluster.address" if is_here else "add machines to the cluster"
    found.obstacles += [f"{line}; {cure}, or {lower}" for line in missing]
    if not is_here and "://" not in store_url:
        found.notes.append(
            f"store.url is a directory, {store_url}: every machine of the cluster has to see the "
            "same one"
        )


def resources_for(section: ClusterSection, pool: PoolSection) -> Mapping[str, float]:
    """The resources of the cluster, by name; of a cluster started here, those it would have.

    Raises ConfigError where a machine cannot start the pool's `python`.
    """
    python, table = pool.python, pool.table
    if section.address is not None:
        with attached(section) as resources:
            if python is not None:
                nodes = nodes_with_room([placement(pool, resources)])
                Interpreters(python, lambda: nodes, table=table).require(timeout_s=_ASKED_S)
            return dict(resources)
    if python is not None:
        require_here(python, table=table)
    return {
        "CPU": float(section.num_cpus or os.cpu_count() or 1),
        "GPU": float(torch.cuda.device_count()),
    }


def _processes(config: Config, available: Mapping[str, float], found: Findings) -> None:
    teacher, student = config.teacher, config.student
    found.add(
        "cluster",
        cluster_words(config.cluster, available),
        f"teachers: {replicas_words(teacher)}, each with {needs_words(teacher, available)}",
        f"student ranks: {student.num_workers:,}, each with {needs_words(student, available)}",
    )


def cluster_words(section: ClusterSection, available: Mapping[str, float]) -> str:
    """Which cluster it is, and what it has."""
    name = section.address or "this machine"
    return f"{name}: {available.get('CPU', 0):g} CPUs, {available.get('GPU', 0):g} GPUs"


def replicas_words(section: PoolSection) -> str:
    """How many replicas are asked for: 1, or 1 to 4."""
    fewest, most = section.min_replicas, section.max_replicas
    return f"{fewest:,}" if most == fewest else f"{fewest:,} to {most:,}"


def needs_words(section: ModelSection, available: Mapping[str, float]) -> str:
    """What one process of a section needs, and where it is."""
    where = placement(section, available)
    amounts = ", ".join(f"{amount:g} {name}" for name, amount in where.times(1).items())
    return f"{amounts} (on {where.device})"


def _replicas_that_fit(config: Config, available: Mapping[str, float], found: Findings) -> None:
    teacher, beside = config.teacher, student_needs(config.student)
    most = max(
        count
        for count in range(teacher.max_replicas + 1)
        if not shortages({"teachers": (teacher, count)} | beside, available)
    )
    if most < teacher.max_replicas:
        found.notes.append(
            f"teacher.max_replicas is {teacher.max_replicas:,}: {most:,} fit beside the "
            "student now, the others join when there is room"
        )


def _hours(plan: Plan, available: Mapping[str, float], found: Findings) -> None:
    """Estimate the hours where the size of each model is known and all run on GPUs. A teacher
    without weights takes none of them."""
    config, corpus = plan.config, plan.sources.train
    sections: dict[str, ModelSection] = {"student": config.student}
    if config.teacher.has_weights:
        sections["teacher"] = config.teacher
    places = {role: placement(section, available) for role, section in sections.items()}
    on_cpu = any(where.device == "cpu" for where in places.values())
    if on_cpu or found.num_parameters.keys() != sections.keys():
        return
    card = estimate.card_of(available) or estimate.ASSUMED
    hours, operations = [], []

    # targets of every sequence that is read, once
    if "teacher" in places:
        num_scored = min(len(plan.chunks) * plan.recipe.chunk_sequences, corpus.num_sequences)
        num_cards = config.teacher.max_replicas * places["teacher"].num_gpus
        scoring = estimate.scoring_hours(
            found.num_parameters["teacher"],
            num_scored * corpus.sequence_length,
            card=card,
            num_cards=num_cards,
        )
        hours.append(f"targets {_hours_words(scoring)} on {num_cards:g} {card}")
        operations.append(
            f"{estimate.FORWARD_OPERATIONS} for targets at {estimate.FORWARD_SHARE:.0%}"
        )

    # training on each as often as it is read
    num_trained = plan.total_steps * config.student.global_batch_sequences
    checkpointing = config.student.activation_checkpointing
    num_cards = config.student.num_workers * places["student"].num_gpus
    training = estimate.training_hours(
        found.num_parameters["student"],
        num_trained * corpus.sequence_length,
        checkpointing=checkpointing,
        card=card,
        num_cards=num_cards,
    )
    again = ", and as much again for the control" if config.evaluate.control else ""
    hours.append(f"training {_hours_words(training)} on {num_cards:g} {card}{again}")
    operations.append(
        f"{estimate.training_operations(checkpointing)} for training at "
        f"{estimate.TRAINING_SHARE:.0%}"
    )
    found.add(
        "hours",
        ", ".join(hours),
        f"by arithmetic: operations a parameter and token are {', '.join(operations)} of its data "
        f"sheet's {estimate.PEAK_TFLOPS[card]:g} TFLOP/s",
    )


def _hours_words(hours: float) -> str:
    return f"about {hours:.2g} h" if hours >= 0.1 else "minutes"
