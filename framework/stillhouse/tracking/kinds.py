"""The kinds of events: which rows a journal may have, and what the values in one may be."""

import sys
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from stillhouse.tracking.events import (
    CheckpointEvent,
    ChunkEvent,
    DamagedEvent,
    DelayEvent,
    EarlyStopEvent,
    EndEvent,
    EvalEvent,
    HeldoutEvent,
    NoticeEvent,
    OutageEvent,
    PhaseEvent,
    PoolEvent,
    RecoveryEvent,
    RepairEvent,
    RunEvent,
    SetAsideEvent,
    StallEvent,
    StartEvent,
    TeacherEvent,
    TrainEvent,
    WaitEvent,
)
from stillhouse.tracking.generation import CostEvent, GenerationEvent, ShardEvent, WriterEvent

EVENT_TYPES: dict[str, type[RunEvent]] = {
    event.kind: event
    for event in (
        StartEvent,
        TeacherEvent,
        ChunkEvent,
        PoolEvent,
        TrainEvent,
        CheckpointEvent,
        DelayEvent,
        OutageEvent,
        DamagedEvent,
        RecoveryEvent,
        NoticeEvent,
        WaitEvent,
        PhaseEvent,
        StallEvent,
        SetAsideEvent,
        RepairEvent,
        EvalEvent,
        HeldoutEvent,
        EarlyStopEvent,
        EndEvent,
        GenerationEvent,
        WriterEvent,
        ShardEvent,
        CostEvent,
    )
}


def is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value is valid for a field of this type.

    An integer is valid for a float. Any text is valid for a Literal of texts, for a later version
    may know more of them.
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
