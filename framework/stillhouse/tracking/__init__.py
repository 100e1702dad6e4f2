"""The events of a run. `journal.jsonl` is their record; W&B and the progress bars are its views.

A view is given the journal's events one by one, and holds nothing that the journal does not.
"""

from stillhouse.tracking.events import (
    CheckpointRow,
    ChunkRow,
    DamagedRow,
    DelayRow,
    EndRow,
    EvalRow,
    NewerRow,
    NoticeRow,
    OutageRow,
    PoolRow,
    RecoveryRow,
    RepairRow,
    Role,
    Row,
    SetAsideRow,
    StallRow,
    StartRow,
    TeacherRow,
    Tracker,
    TrainRow,
    WaitRow,
    latest_train_rows,
)
from stillhouse.tracking.journal import Journal, JournalReader, read_journal, scrubbed
from stillhouse.tracking.progress import ProgressView
from stillhouse.tracking.room import ROOM_PATIENCE, PatientTracker
from stillhouse.tracking.trained import Stretch, nothing_left, schedule_of, stretches, words_of
from stillhouse.tracking.wandb import WandbView

__all__ = [
    "ROOM_PATIENCE",
    "CheckpointRow",
    "ChunkRow",
    "DamagedRow",
    "DelayRow",
    "EndRow",
    "EvalRow",
    "Journal",
    "JournalReader",
    "NewerRow",
    "NoticeRow",
    "OutageRow",
    "PatientTracker",
    "PoolRow",
    "ProgressView",
    "RecoveryRow",
    "RepairRow",
    "Role",
    "Row",
    "SetAsideRow",
    "StallRow",
    "StartRow",
    "Stretch",
    "TeacherRow",
    "Tracker",
    "TrainRow",
    "WaitRow",
    "WandbView",
    "latest_train_rows",
    "nothing_left",
    "read_journal",
    "schedule_of",
    "scrubbed",
    "stretches",
    "words_of",
]
