"""`stillhouse check`, its part on memory: whether a teacher's weights, and a student's weights,
gradients and optimiser, fit on their devices, and what it would take. By arithmetic: a fifth of a
device is left for activations."""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from stillhouse.cli import estimate
from stillhouse.cli.findings import Findings, bullets, size_words
from stillhouse.cluster.placement import Placement, placement, student_needs
from stillhouse.config import Config, LoraSection, ModelSection, PoolSection, StudentSection
from stillhouse.config.generate import WriterSection
from stillhouse.errors import ConfigError, ModelError
from stillhouse.student.adapters import outline
from stillhouse.student.memory import (
    OFFLOADED_BYTES,
    USABLE_SHARE,
    StudentSize,
    least_ranks,
    memory_of_process,
    size_of,
    state_bytes,
)

_OWN_GROUPS = Path("/proc/self/cgroup")


class Memory(NamedTuple):
    """The bytes of a device, or of a part of it, and what device that is."""

    num_bytes: float
    device: str


class WriterSize(NamedTuple):
    """The bytes of a writer's weights, and of what it writes: so many samples side by side, each
    with its keys and values; 0 where their size is not known."""

    weight_bytes: float
    side_by_side: int
    bytes_of_sample: float

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.side_by_side * self.bytes_of_sample


class Need(NamedTuple):
    """The bytes that a part of the run takes, what takes them, and whose section decides."""

    section: str
    what: str
    num_bytes: float


def check_memory(config: Config, available: Mapping[str, float], found: Findings) -> None:
    """Compare what is known of both models with the memory of their devices, where it is known."""
    on_cpu = {"teachers": 0.0, "student ranks": 0.0}
    is_here = config.cluster.address is None

    # a teacher
    teacher = config.teacher
    if (num_bytes := found.teacher_bytes) is not None:
        if placement(teacher, available).device == "cpu":
            on_cpu["teachers"] = teacher.min_replicas * num_bytes
        elif (gpu := _gpu_of(teacher, available, is_here=is_here)) and teacher.engine == "vllm":
            _divided_by_vllm(teacher, num_bytes, placement(teacher, available), gpu, found)
        elif gpu:
            need = Need("teacher", "a teacher's weights", num_bytes)
            _compare(need, _part_of(gpu, teacher), teacher_cures(num_bytes, gpu=gpu), found)

    # a student's rank
    student, size = config.student, found.student_size
    if size is not None:
        stage, all_ranks = student.chosen_stage, student.num_workers
        if placement(student, available).device == "cpu":
            a_rank = state_bytes(size, student, stage=stage, num_ranks=all_ranks)
            on_cpu["student ranks"] = all_ranks * a_rank
        elif gpu := _gpu_of(student, available, is_here=is_here):
            [(_, ranks)] = student_needs(student).values()
            a_rank = state_bytes(size, student, stage=stage, num_ranks=ranks)
            need = Need("student", "a student rank's weights, gradients and Adam", a_rank)
            cures = student_cures(student, size, num_ranks=ranks, gpu=gpu)
            _compare(need, _part_of(gpu, student), cures, found)

    # all that runs on the CPU of this machine
    if is_here and any(on_cpu.values()):
        machine = memory_here()
        what = " and ".join(name for name, num_bytes in on_cpu.items() if num_bytes)
        need = Need("student", f"{what} on the CPU", sum(on_cpu.values()))
        left = USABLE_SHARE * machine.num_bytes - on_cpu["teachers"]
        cures = iter(())
        if size is not None and on_cpu["student ranks"]:
            cures = cpu_cures(student, size, budget_bytes=left)
        _compare(need, machine, cures, found)


def check_writer(
    writer: WriterSection,
    size: WriterSize,
    available: Mapping[str, float],
    found: Findings,
    *,
    is_here: bool,
) -> None:
    """Compare a writer's weights, and the keys and values of what it writes side by side, with the
    memory of its device, where it is known."""
    # on GPUs
    if placement(writer, available).device == "cuda":
        gpu = _gpu_of(writer, available, is_here=is_here)
        if gpu is not None and writer.engine == "vllm":
            where = placement(writer, available)
            _divided_by_vllm(writer, size.weight_bytes, where, gpu, found)
        elif gpu is not None:
            need = Need("writer", "a writer's weights, keys and values", size.num_bytes)
            cures = _writer_cures(writer, size, gpu=gpu)
            _compare(need, _part_of(gpu, writer), cures, found)
        return

    # on the CPU of this machine
    if is_here:
        what = f"weights, keys and values of {writer.min_replicas:,} writers on the CPU"
        need = Need("writer", what, writer.min_replicas * size.num_bytes)
        _compare(need, memory_here(), iter(()), found)


def _writer_cures(writer: WriterSection, size: WriterSize, *, gpu: Memory) -> Iterator[str]:
    """Fewer samples side by side, and the fewest whole GPUs over which its layers fit."""
    left = USABLE_SHARE * memory_of_process(writer, gpu.num_bytes) - size.weight_bytes
    batch = int(left // size.bytes_of_sample) if size.bytes_of_sample else 0
    if 0 < batch < size.side_by_side:
        taken = size_words(batch * size.bytes_of_sample)
        yield f"batch_sequences = {batch}: {taken} of keys and values"
    num_gpus = math.ceil(size.num_bytes / (USABLE_SHARE * gpu.num_bytes))
    if num_gpus > max(1.0, writer.num_gpus or 1.0):
        yield f"num_gpus = {num_gpus}: its layers are spread over them"


def memory_here(*, groups: Path = Path("/sys/fs/cgroup"), own: Path = _OWN_GROUPS) -> Memory:
    """The memory of this machine, or the limit of this process's control group, such as that of a
    container or of a Slurm job, where that is lower.

    A group's limit holds for the groups in it, too; in both versions of control groups the file
    that names this process's groups has lines of number:controllers:path (cgroups(7)).
    """
    machine = Memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine")
    limits = [machine.num_bytes]
    lines = own.read_text().splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        is_first_version = "memory" in controllers.split(",")
        if controllers and not is_first_version:
            continue
        top = groups / "memory" if is_first_version else groups
        name = "memory.limit_in_bytes" if is_first_version else "memory.max"
        group = top / path.lstrip("/")
        for each in (top, group, *group.parents):
            with suppress(OSError, ValueError):  # not there, or "max"
                limits.append(float((each / name).read_text()))
    lowest = min(limits)
    return machine if lowest == machine.num_bytes else Memory(lowest, "this process's limit")


def student_cures(
    section: StudentSection, size: StudentSize, *, num_ranks: int, gpu: Memory
) -> Iterator[str]:
    """The settings with which a student's ranks would fit on such GPUs, the cheapest first: what is
    free, what costs time, what costs GPUs, and what trains another student."""
    budget = USABLE_SHARE * memory_of_process(section, gpu.num_bytes)
    stages = [stage for stage in (2, 3) if stage > section.chosen_stage]

    # the GPUs that there are
    if 0 < (section.num_gpus or 1.0) < 1:
        a_rank = state_bytes(size, section, stage=section.chosen_stage, num_ranks=num_ranks)
        if a_rank <= USABLE_SHARE * gpu.num_bytes:
            yield f"num_gpus = 1: {size_words(a_rank)} of a whole GPU"
    yield from _by_stage(section, size, stages, num_ranks=num_ranks, budget_bytes=budget)

    # the optimiser in the host's memory, which it needs from stage 2 on
    if section.offload == "none":
        offloaded = section.model_copy(update={"offload": "cpu"})
        for stage in (2, 3):
            a_rank = state_bytes(size, offloaded, stage=stage, num_ranks=num_ranks)
            if stage >= section.chosen_stage and a_rank <= budget:
                host = size_words(size.num_trained * OFFLOADED_BYTES / num_ranks)
                yield (
                    f'offload = "cpu", zero_stage = {stage}: {size_words(a_rank)} a rank, and '
                    f"{host} of the host's memory"
                )
                break

    # the fewest GPUs, at the lowest stage at which so few are enough
    by_stage = {
        stage: least_ranks(size, section, stage=stage, budget_bytes=budget)
        for stage in [section.chosen_stage, *stages]
    }
    counts = [(count, stage) for stage, count in by_stage.items() if count is not None]
    if counts and min(counts)[0] > num_ranks:
        count, stage = min(counts)
        changes = {"num_workers": count} if count > section.num_workers else {}
        changes |= {} if section.min_workers is None else {"min_workers": count}
        changes |= {} if stage == section.chosen_stage else {"zero_stage": stage}
        a_rank = state_bytes(size, section, stage=stage, num_ranks=count)
        settings = ", ".join(f"{name} = {value}" for name, value in changes.items())
        yield f"{settings}: {size_words(a_rank)} a rank"
    yield from _by_adapters(section, num_ranks=num_ranks, budget_bytes=budget)


def cpu_cures(section: StudentSection, size: StudentSize, *, budget_bytes: float) -> Iterator[str]:
    """As `student_cures`, for ranks that share the memory of one machine."""
    ranks = section.num_workers
    stages = [stage for stage in (2, 3) if stage > section.chosen_stage]
    yield from _by_stage(section, size, stages, num_ranks=ranks, budget_bytes=budget_bytes / ranks)
    yield from _by_adapters(section, num_ranks=ranks, budget_bytes=budget_bytes / ranks)


def _by_stage(
    section: StudentSection,
    size: StudentSize,
    stages: Collection[int],
    *,
    num_ranks: int,
    budget_bytes: float,
) -> Iterator[str]:
    for stage in stages:
        a_rank = state_bytes(size, section, stage=stage, num_ranks=num_ranks)
        if a_rank <= budget_bytes:
            yield f"zero_stage = {stage}: {size_words(a_rank)} a rank"


def _by_adapters(section: StudentSection, *, num_ranks: int, budget_bytes: float) -> Iterator[str]:
    if section.lora is not None or section.init == "config":
        return
    adapted = section.model_copy(update={"lora": LoraSection(), "freeze": ()})
    try:
        size = size_of(outline(adapted))
    except (ConfigError, ModelError):  # peft is not installed, or it fits no layer
        return
    for stage in range(section.chosen_stage, 4):
        a_rank = state_bytes(size, adapted, stage=stage, num_ranks=num_ranks)
        if a_rank <= budget_bytes:
            more = "" if stage == section.chosen_stage else f", zero_stage = {stage}"
            yield f"lora = {{}}{more}: {size_words(a_rank)} a rank, and adapters alone are trained"
            return


def teacher_cures(weight_bytes: float, *, gpu: Memory) -> Iterator[str]:
    """The fewest whole GPUs among which vLLM has to divide a teacher's matrices, a power of two as
    the numbers of heads are; and over which its layers have to be spread."""
    num_gpus = math.ceil(weight_bytes / (USABLE_SHARE * gpu.num_bytes))
    together = 1 << (num_gpus - 1).bit_length()
    yield (
        f'engine = "vllm", num_gpus = {together}: {size_words(weight_bytes / together)} of each, '
        "and all compute at once (docs/engines.md)"
    )
    yield (
        f"pipeline = true, num_gpus = {num_gpus}: {size_words(num_gpus * gpu.num_bytes)} for each "
        "teacher, of which one GPU computes at a time"
    )


def _divided_by_vllm(
    section: PoolSection, weight_bytes: float, where: Placement, gpu: Memory, found: Findings
) -> None:
    """A row of a GPU's part of the weights, one of what vLLM then has for its cache, and what was
    never seen."""
    num_gpus = section.vllm.tensor_parallel or max(1, round(where.num_gpus))
    a_gpu = weight_bytes / num_gpus
    what = f"a {section.table}'s weights, divided among {num_gpus} GPUs,"
    need = Need(section.table, what, a_gpu)
    least = math.ceil(weight_bytes / (USABLE_SHARE * gpu.num_bytes))
    together = 1 << (least - 1).bit_length()
    cure = f"num_gpus = {together}: {size_words(weight_bytes / together)} of each"
    _compare(need, gpu, iter((cure,)), found)
    share = section.vllm.memory_share
    left = max(0.0, share * gpu.num_bytes - a_gpu)
    found.add(
        "",
        f"vLLM takes {share:.0%} of a GPU ({section.table}.vllm.memory_share): {size_words(left)} "
        "are left "
        "for its cache and activations",
        "the engine vllm was run on CPUs; it has not been run on a GPU yet (docs/engines.md)",
    )


def _gpu_of(
    section: ModelSection, available: Mapping[str, float], *, is_here: bool
) -> Memory | None:
    """The GPU of the section's processes; None where its memory is not known."""
    if section.gpu_memory_gb is not None:
        return Memory(section.gpu_memory_gb * 1e9, "gpu_memory_gb")
    if (card := estimate.smallest_card(available)) is not None:
        return Memory(estimate.CARD_GB[card] * 1e9, card)
    if is_here and torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return min(Memory(float(card.total_memory), card.name) for card in cards)
    return None


def _part_of(gpu: Memory, section: ModelSection) -> Memory:
    return Memory(memory_of_process(section, gpu.num_bytes), gpu.device)


def _compare(need: Need, memory: Memory, cures: Iterator[str], found: Findings) -> None:
    """A row of what is needed and there; a note, too, where that does not fit."""
    usable = USABLE_SHARE * memory.num_bytes
    there = f"{size_words(memory.num_bytes)} ({memory.device})"
    does_fit = need.num_bytes <= usable
    label = "" if any(label == "memory" for label, _ in found.rows) else "memory"
    taken = f"{need.what} take {size_words(need.num_bytes)}"
    found.add(label, f"{taken} of {there}: {'fits' if does_fit else 'does not fit'}")
    if does_fit:
        return
    lines = [*cures]
    found.notes.append(
        f"{taken}, and {USABLE_SHARE:.0%} of {there} is {size_words(usable)}, which leaves the "
        "rest for activations; "
        + (
            f"to make it fit, set one of these under [{need.section}], the cheapest first:\n"
            + bullets(lines)
            if lines
            else "no setting makes it fit: take a smaller model, or devices with more memory"
        )
    )
