"""What happened in a run, row by row: `journal.jsonl` is the record; W&B and the progress bars are views of it."""

from stillhouse.tracking.journal import Journal, JournalReader, read_journal
from stillhouse.tracking.redaction import scrub
from stillhouse.tracking.rows import (
    CheckpointRow,
    ChunkRow,
    DamagedRow,
    EndRow,
    EvalRow,
    NoticeRow,
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
from stillhouse.tracking.views import ProgressView, WandbView

__all__ = [
    "CheckpointRow",
    "ChunkRow",
    "DamagedRow",
    "EndRow",
    "EvalRow",
    "Journal",
    "JournalReader",
    "NoticeRow",
    "PoolRow",
    "ProgressView",
    "RecoveryRow",
    "RepairRow",
    "Role",
    "Row",
    "SetAsideRow",
    "StallRow",
    "StartRow",
    "TeacherRow",
    "Tracker",
    "TrainRow",
    "WaitRow",
    "WandbView",
    "latest_train_rows",
    "read_journal",
    "scrub",
]
