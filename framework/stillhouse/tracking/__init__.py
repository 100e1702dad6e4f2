"""The events of a run. `journal.jsonl` is their record; W&B and the progress bars are its views.

A view is given the journal's events one by one, and holds nothing that the journal does not.
"""

from stillhouse.tracking.events import (
    CheckpointEvent,
    ChunkEvent,
    DamagedEvent,
    DelayEvent,
    EarlyStopEvent,
    EndEvent,
    EvalEvent,
    HeldoutEvent,
    NewerEvent,
    NoticeEvent,
    OutageEvent,
    PhaseEvent,
    PoolEvent,
    RecoveryEvent,
    RepairEvent,
    Role,
    RunEvent,
    SetAsideEvent,
    StallEvent,
    StartEvent,
    TeacherEvent,
    Tracker,
    TrainEvent,
    WaitEvent,
    latest_heldout_events,
    latest_train_events,
)
from stillhouse.tracking.generation import GenerationEvent, ShardEvent, WriterEvent
from stillhouse.tracking.journal import Journal, JournalReader, read_journal, scrubbed
from stillhouse.tracking.progress import ProgressView
from stillhouse.tracking.room import ROOM_PATIENCE, PatientTracker
from stillhouse.tracking.trained import Stretch, nothing_left, schedule_of, stretches, words_of
from stillhouse.tracking.wandb import WandbView

__all__ = [
    "ROOM_PATIENCE",
    "CheckpointEvent",
    "ChunkEvent",
    "DamagedEvent",
    "DelayEvent",
    "EarlyStopEvent",
    "EndEvent",
    "EvalEvent",
    "GenerationEvent",
    "HeldoutEvent",
    "Journal",
    "JournalReader",
    "NewerEvent",
    "NoticeEvent",
    "OutageEvent",
    "PatientTracker",
    "PhaseEvent",
    "PoolEvent",
    "ProgressView",
    "RecoveryEvent",
    "RepairEvent",
    "Role",
    "RunEvent",
    "SetAsideEvent",
    "ShardEvent",
    "StallEvent",
    "StartEvent",
    "Stretch",
    "TeacherEvent",
    "Tracker",
    "TrainEvent",
    "WaitEvent",
    "WandbView",
    "WriterEvent",
    "latest_heldout_events",
    "latest_train_events",
    "nothing_left",
    "read_journal",
    "schedule_of",
    "scrubbed",
    "stretches",
    "words_of",
]
