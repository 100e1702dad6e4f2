"""The rows of the journal: everything that is worth knowing about a run after it, each with its
units.

A row is plain values only, so that its line of JSON reads the same in any language.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin

Role = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the journal. `time` is in unix seconds; 0 lets the journal fill it in."""

    kind: ClassVar[str]
    time: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True, slots=True)
class StartRow(Row):
    """An attempt begins: the first row of a run, and again after each resume."""

    kind: ClassVar[str] = "start"
    attempt: int  # counts from 1
    command: str  # as the user typed it
    versions: dict[str, str]  # package -> version
    teacher: str
    student: str
    recipe_fingerprint: str  # 64 hex digits
    num_chunks: int
    num_sequences: int
    sequence_length: int  # tokens
    num_targets: int  # target tokens in one epoch
    bytes_per_token: int  # of a packed record
    num_draws: int  # from the tail, a token
    vocab_size: int
    k: int
    world_size: int  # student ranks
    zero_stage: int
    num_teachers: int  # replicas asked for
    total_steps: int  # optimiser steps of the student
    control: bool  # whether a control student is trained too
    learning_rate: float | None = (
        None  # of the schedule that is asked for; None, as below: of a version that did not say it
    )
    min_learning_rate: float | None = None
    warmup_steps: int | None = None
    epochs: int | None = None
    max_steps: int | None = None  # None: not limited, too
    # role -> optimiser steps in its newest commit as the attempt begins
    committed_steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TeacherRow(Row):
    """A teacher replica has passed its start-up check."""

    kind: ClassVar[str] = "teacher"
    replica: int
    seconds_to_ready: float
    device: str
    topk: str  # the path that its logits take to targets, and why


@dataclass(frozen=True, slots=True)
class ChunkRow(Row):
    """A chunk came out of a teacher. The fidelity figures are of its decoded records against the
    exact targets."""

    kind: ClassVar[str] = "chunk"
    chunk: int
    num_tokens: int  # target tokens
    num_bytes: int
    seconds: float  # from the work item to the published chunk
    replica: int
    kept_mass: float  # mean over tokens, 0..1
    codec_kl: float  # mean, nats
    worst_kl: float  # of one token, nats
    duplicate: bool  # another publisher was there first


@dataclass(frozen=True, slots=True)
class PoolRow(Row):
    """The teacher pool at one moment."""

    kind: ClassVar[str] = "pool"
    published: int  # chunks
    needed: int  # chunks
    in_flight: int  # chunks leased to teachers
    window_chunks: int  # how far teachers may run ahead of the slowest reader
    tokens_per_s: float  # target tokens, all replicas, mean since the row before
    window_wait_s: float  # seconds in which the window held teachers back, since the attempt began
    failures: int  # since the attempt began
    replicas: int = 0  # teachers that are ready
    losses: int = 0  # leases whose teacher died, since the attempt began
    late: int = 0  # leases that ran past their deadline, since the attempt began
    hedged: int = (
        0  # chunks given to a second teacher because the first is slow, since the attempt began
    )


@dataclass(frozen=True, slots=True)
class TrainRow(Row):
    """One optimiser step. Losses are means over the step's target tokens, in nats."""

    kind: ClassVar[str] = "train"
    role: Role
    step: int  # steps taken, this one included
    loss: float  # what was minimised: the weighted sum
    divergence: float | None  # from the teacher's targets; None where not computed
    cross_entropy: float | None  # to the text; None where not computed
    grad_norm: float  # before clipping
    learning_rate: float
    num_tokens: int  # target tokens, all ranks
    seconds: float  # the whole step, waiting included
    data_wait_s: float  # of these, spent waiting for chunks
    tokens_per_s: float  # num_tokens / seconds
    z_loss: float | None = (
        None  # squared log-sum-exp of the student's logits; None where not computed
    )
    world_size: int = 1  # ranks that shared the step


@dataclass(frozen=True, slots=True)
class CheckpointRow(Row):
    """A checkpoint was committed."""

    kind: ClassVar[str] = "checkpoint"
    role: Role
    step: int
    seconds: float  # from the end of the step to the commit
    num_bytes: int
    blocking_s: float = 0.0  # of these, training stood still; the rest was uploaded beside it


@dataclass(frozen=True, slots=True)
class DelayRow(Row):
    """A checkpoint cannot be written at present. Training goes on, and writing is tried again until
    the store takes it."""

    kind: ClassVar[str] = "delay"
    role: Role
    step: int
    rank: int
    why: str  # the store's words


@dataclass(frozen=True, slots=True)
class OutageRow(Row):
    """A store has been unavailable for a while to a process that waits for it. Told once for each
    outage."""

    kind: ClassVar[str] = "outage"
    who: str  # as "student, rank 0" or "teacher on 4fe1a02c"
    seconds: float  # for which it has waited
    why: str  # the store's words


@dataclass(frozen=True, slots=True)
class DamagedRow(Row):
    """A checkpoint that does not verify was passed over for the one before it."""

    kind: ClassVar[str] = "damaged"
    role: Role
    problem: str  # the manifest's name, and which file is not what was committed


@dataclass(frozen=True, slots=True)
class RecoveryRow(Row):
    """The ranks of a student were lost or sent away, and go on."""

    kind: ClassVar[str] = "recovery"
    role: Role
    # grown: machines came back, and the group was made larger
    cause: Literal["died", "stalled", "notice", "grown"]
    detail: str
    seconds: float  # from the last step before to the first step after
    world_size: int  # ranks from now on
    resumed_step: int  # steps taken in the commit that it goes on from
    lost_steps: int  # steps that have to be taken again


@dataclass(frozen=True, slots=True)
class NoticeRow(Row):
    """A machine of the run announced its end."""

    kind: ClassVar[str] = "notice"
    source: str  # aws, gcp, azure, sigterm or ray
    node: str
    seconds_left: float
    detail: str


@dataclass(frozen=True, slots=True)
class WaitRow(Row):
    """The run cannot begin yet: machines that it needs have not joined the cluster."""

    kind: ClassVar[str] = "wait"
    missing: (
        str  # each resource that is short: needed, by whom, and there; empty where that is over
    )


@dataclass(frozen=True, slots=True)
class StallRow(Row):
    """A process did nothing for longer than the watchdog allows, and is killed; a teacher is
    replaced, a rank's group is started again."""

    kind: ClassVar[str] = "stall"
    role: Literal["student", "control", "teacher"]
    rank: int  # of a teacher, its replica
    step: int  # that it was in; 0 for a teacher
    phase: str  # data, reading, step, snapshot or start; of a teacher, start or work
    seconds: float  # without a heartbeat
    stack: str  # of its threads, where it could be had
    chunk: int | None = None  # that a rank was reading, or a teacher making


@dataclass(frozen=True, slots=True)
class SetAsideRow(Row):
    """Sequences that no teacher could compute: their chunk is published without targets for
    them."""

    kind: ClassVar[str] = "set_aside"
    chunk: int
    sequences: list[int]
    reason: str  # the last failure's words


@dataclass(frozen=True, slots=True)
class RepairRow(Row):
    """A damaged chunk was moved to quarantine and will be made anew."""

    kind: ClassVar[str] = "repair"
    chunk: int


@dataclass(frozen=True, slots=True)
class EvalRow(Row):
    """The exact, dense comparison on held-out text. Entropies and divergences are means over target
    tokens, in nats."""

    kind: ClassVar[str] = "eval"
    model: Literal["teacher", "student", "control"]
    step: int
    num_tokens: int  # target tokens
    cross_entropy: float
    kl: float | None  # KL(teacher || model); None for the teacher
    agreement: float | None  # share of tokens with the teacher's top-1, 0..1
    calibration_error: float | None  # expected calibration error of the top-1, 0..1
    acceptance: float | None  # speculative acceptance, the mean of sum_v min(p_v, q_v), 0..1


@dataclass(frozen=True, slots=True)
class EndRow(Row):
    """An attempt ended by itself; a killed one has no such row."""

    kind: ClassVar[str] = "end"
    outcome: Literal["done", "interrupted", "failed"]
    seconds: float  # of this attempt
    message: str
    # role -> optimiser steps in this attempt, each as often as it was taken
    steps_taken: dict[str, int] = field(default_factory=dict)
    # role -> optimiser steps that its weights have now, of all attempts
    steps_done: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewerRow(Row):
    """Stands for a row of a kind that a later version writes. It is read and never recorded; of its
    values only the time is known."""

    kind: ClassVar[str] = "newer"
    name: str  # its kind


ROW_TYPES: dict[str, type[Row]] = {
    row.kind: row
    for row in (
        StartRow,
        TeacherRow,
        ChunkRow,
        PoolRow,
        TrainRow,
        CheckpointRow,
        DelayRow,
        OutageRow,
        DamagedRow,
        RecoveryRow,
        NoticeRow,
        WaitRow,
        StallRow,
        SetAsideRow,
        RepairRow,
        EvalRow,
        EndRow,
    )
}


def is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value may stand in a column of this type.

    A number without a fraction may stand for one with. Any text may stand for one of several: a
    later version may know more of them.
    """
    if type(value) is kind:
        return True
    if kind is float:
        return type(value) is int and abs(value) <= sys.float_info.max
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return type(value) is str
    if origin is UnionType:
        return any(is_of(value, each) for each in arguments)
    if origin is list:
        return type(value) is list and all(is_of(each, arguments[0]) for each in value)
    if origin is dict:
        return type(value) is dict and all(
            is_of(key, arguments[0]) and is_of(each, arguments[1]) for key, each in value.items()
        )
    return False


class Tracker(Protocol):
    """Anything that takes rows."""

    def record(self, row: Row) -> None: ...


def latest_train_rows(rows: Iterable[Row], role: Role) -> list[TrainRow]:
    """The last row for each step, in step order: after a resume, steps since the last checkpoint
    are taken again."""
    latest = {row.step: row for row in rows if isinstance(row, TrainRow) and row.role == role}
    return [latest[step] for step in sorted(latest)]
