"""The events of a run: everything that is worth knowing after it, with units. Each is a row of the
journal.

An event holds plain values only, so that its row of JSON can be read in any language. Fields that
a later version added have a default, so that older journals stay readable.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

Role = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event. `time` is in unix seconds; 0 lets the journal fill it in."""

    kind: ClassVar[str]
    is_once: ClassVar[bool] = False  # whether an equal one that comes later is not journalled
    time: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True, slots=True)
class StartEvent(RunEvent):
    """An attempt begins: the first event of a run, and again after each resume."""

    kind: ClassVar[str] = "start"
    attempt: int  # counts from 1
    command: str  # as the user typed it
    versions: dict[str, str]  # package -> version
    teacher: str | None  # None: no model, the target is the next token of the text
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
    # The schedule that is asked for; None in the journal of a version that did not write it.
    learning_rate: float | None = None
    min_learning_rate: float | None = None
    warmup_steps: int | None = None
    epochs: int | None = None
    max_steps: int | None = None  # None: not limited, too
    committed_steps: dict[str, int] = field(default_factory=dict)  # role -> steps committed so far
    schedule: str = "cosine"  # what follows the warm-up
    decay_steps: int | None = None  # of "wsd"
    # whether the student's divergence has the entropy of the teacher's tail on top, a constant
    loss_constant: bool | None = None
    corpus_targets: dict[str, int] = field(default_factory=dict)  # data set -> its target tokens
    bad_rows: dict[str, int] = field(default_factory=dict)  # data set -> rows skipped, if any were


@dataclass(frozen=True, slots=True)
class TeacherEvent(RunEvent):
    """A teacher replica has passed its start-up check."""

    kind: ClassVar[str] = "teacher"
    replica: int
    seconds_to_ready: float
    device: str
    topk: str  # the backend that makes targets of its logits, and the reason


@dataclass(frozen=True, slots=True)
class ChunkEvent(RunEvent):
    """A teacher published a chunk. Its fidelity figures compare decoded records with the exact
    targets."""

    kind: ClassVar[str] = "chunk"
    chunk: int
    num_tokens: int  # target tokens
    num_bytes: int
    seconds: float  # from the arrival of the work item to the published chunk
    replica: int
    kept_mass: float  # mean over tokens, 0..1
    codec_kl: float  # mean, nats
    worst_kl: float  # of one token, nats
    duplicate: bool  # another publisher was there first


@dataclass(frozen=True, slots=True)
class PoolEvent(RunEvent):
    """The teacher pool at one moment."""

    kind: ClassVar[str] = "pool"
    published: int  # chunks
    needed: int  # chunks
    in_flight: int  # chunks leased to teachers
    window_chunks: int  # how far teachers may be ahead of the slowest consumer
    tokens_per_s: float  # target tokens, all replicas, mean since the PoolEvent before
    window_wait_s: float  # seconds in which the window held teachers back, since the attempt began
    failures: int  # since the attempt began
    replicas: int = 0  # teachers that are ready
    losses: int = 0  # leases whose teacher was lost, since the attempt began
    late: int = 0  # leases that ran past their deadline, since the attempt began
    hedged: int = 0  # chunks given to a second teacher too, as the first is slow; as above


@dataclass(frozen=True, slots=True)
class TrainEvent(RunEvent):
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
    data_wait_s: float  # of `seconds`, spent waiting for chunks
    tokens_per_s: float  # num_tokens / seconds
    z_loss: float | None = None  # squared log-sum-exp of its logits; None where not computed
    world_size: int = 1  # ranks that shared the step
    clipped: bool | None = None  # whether the gradient was; None in a journal before it was written
    # Over the step's weighted draws, None without them. A log-ratio alone is no alarm, since a draw
    # that is rare in the teacher weighs little; a mass above 1 is: one draw decides the gradient.
    max_log_ratio: float | None = None  # the largest log(student / teacher), at least 0, nats
    max_draw_mass: float | None = None  # the largest mass of the student that a draw stands for


@dataclass(frozen=True, slots=True)
class CheckpointEvent(RunEvent):
    """A checkpoint was committed."""

    kind: ClassVar[str] = "checkpoint"
    role: Role
    step: int
    seconds: float  # from the end of the step to the commit
    num_bytes: int
    blocking_s: float = 0.0  # of `seconds`, training stood still; the rest was beside training


@dataclass(frozen=True, slots=True)
class DelayEvent(RunEvent):
    """A checkpoint cannot be written at present. Training goes on, and the write is tried again
    until it succeeds."""

    kind: ClassVar[str] = "delay"
    role: Role
    step: int
    rank: int
    why: str  # the store's error


@dataclass(frozen=True, slots=True)
class OutageEvent(RunEvent):
    """A process has waited for an unavailable store for some time. Recorded once an outage."""

    kind: ClassVar[str] = "outage"
    who: str  # such as "student, rank 0" or "teacher on 4fe1a02c"
    seconds: float  # waited so far
    why: str  # the store's error


@dataclass(frozen=True, slots=True)
class DamagedEvent(RunEvent):
    """A checkpoint that does not verify was passed over for the one before it."""

    kind: ClassVar[str] = "damaged"
    role: Role
    problem: str  # the manifest's name, and the file that is not as it was committed


@dataclass(frozen=True, slots=True)
class RecoveryEvent(RunEvent):
    """The ranks of a student were lost, or stopped on request, and train again."""

    kind: ClassVar[str] = "recovery"
    role: Role
    # notice: of preemption; grown: machines came back, and the group was made larger
    cause: Literal["died", "stalled", "notice", "grown"]
    detail: str
    seconds: float  # from the last step before to the first step after
    world_size: int  # ranks from now on
    resumed_step: int  # steps in the commit that training goes on from
    lost_steps: int  # steps that have to be taken again


@dataclass(frozen=True, slots=True)
class NoticeEvent(RunEvent):
    """Preemption notice: a machine of the run will be taken away."""

    kind: ClassVar[str] = "notice"
    source: str  # aws, gcp, azure, sigterm or ray
    node: str
    seconds_left: float
    detail: str


@dataclass(frozen=True, slots=True)
class WaitEvent(RunEvent):
    """The run cannot begin yet: machines that it needs have not joined the cluster."""

    kind: ClassVar[str] = "wait"
    missing: str  # each resource that is short: needed, for what, and found; empty: it can begin


@dataclass(frozen=True, slots=True)
class PhaseEvent(RunEvent):
    """A part of the run begins a phase that may take long and in which nothing is counted."""

    kind: ClassVar[str] = "phase"
    who: Literal["run", "teacher", "writer", "student", "control"]
    phase: str  # such as "starting Ray", "loading", "proving" or "evaluating"


@dataclass(frozen=True, slots=True)
class StallEvent(RunEvent):
    """A process sent no heartbeat for longer than the watchdog allows, and is killed.

    A teacher or a writer is replaced, the group of a rank is started again.
    """

    kind: ClassVar[str] = "stall"
    role: Literal["student", "control", "teacher", "writer"]
    rank: int  # of a teacher or a writer, its replica
    step: int  # during which it stalled; 0 for a teacher or a writer
    # data, reading, step, evaluate, snapshot or start; of a teacher or a writer, start or work
    phase: str
    seconds: float  # without a heartbeat
    stack: str  # of its threads, where it could be read
    # that a rank was reading, or a teacher was making; the shard that a writer was making
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class SetAsideEvent(RunEvent):
    """Poison: sequences that every teacher failed at. Their chunk is published without targets for
    them."""

    kind: ClassVar[str] = "set_aside"
    chunk: int
    sequences: list[int]
    reason: str  # the error of the last failure


@dataclass(frozen=True, slots=True)
class RepairEvent(RunEvent):
    """A damaged chunk was moved to quarantine and will be made anew."""

    kind: ClassVar[str] = "repair"
    chunk: int


@dataclass(frozen=True, slots=True)
class EvalEvent(RunEvent):
    """The dense scores of one model on held-out text: no compressed targets.

    Entropies and divergences are means over target tokens, in nats.
    """

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
class HeldoutEvent(RunEvent):
    """The dense scores of a student while it learns, on a few held-out sequences: the same ones at
    every step. Means over target tokens, as in EvalEvent."""

    kind: ClassVar[str] = "heldout"
    role: Role
    step: int  # steps taken; 0: before the first
    num_tokens: int  # target tokens
    cross_entropy: float
    kl: float  # KL(teacher || model)
    agreement: float
    calibration_error: float
    acceptance: float
    seconds: float  # that training stood still


@dataclass(frozen=True, slots=True)
class EarlyStopEvent(RunEvent):
    """A student stops before its last step, because its held-out KL fell no more. A training that
    resumes there finds it again."""

    kind: ClassVar[str] = "early_stop"
    is_once: ClassVar[bool] = True
    role: Role
    step: int  # the last one
    best_step: int  # with the lowest held-out KL
    best_kl: float  # nats


@dataclass(frozen=True, slots=True)
class EndEvent(RunEvent):
    """An attempt ended by itself; a killed one has no such row."""

    kind: ClassVar[str] = "end"
    outcome: Literal["done", "interrupted", "failed"]
    seconds: float  # of this attempt
    message: str
    # role -> optimiser steps in this attempt, each as often as it was taken
    steps_taken: dict[str, int] = field(default_factory=dict)
    # role -> optimiser steps in its weights now, over all attempts
    steps_done: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewerEvent(RunEvent):
    """A row of a kind that only a later version knows. It is read and never recorded; of its values
    only the time is known."""

    kind: ClassVar[str] = "newer"
    name: str  # the row's kind


class Tracker(Protocol):
    """What events are recorded with: the journal, a view of it, or a test's list."""

    def record(self, event: RunEvent) -> None: ...


def latest_heldout_events(events: Iterable[RunEvent], role: Role) -> list[HeldoutEvent]:
    """The last scores of each step, in the order of steps; of the text that was scored last, where
    an attempt asked for another number of tokens."""
    scores = [event for event in events if isinstance(event, HeldoutEvent) and event.role == role]
    latest = {event.step: event for event in scores if event.num_tokens == scores[-1].num_tokens}
    return [latest[step] for step in sorted(latest)]


def latest_train_events(events: Iterable[RunEvent], role: Role) -> list[TrainEvent]:
    """The last event of each step, in the order of steps: after a resume, steps since the last
    checkpoint are taken again."""
    steps = (event for event in events if isinstance(event, TrainEvent) and event.role == role)
    latest = {event.step: event for event in steps}
    return [latest[step] for step in sorted(latest)]
