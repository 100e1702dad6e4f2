"""A run as an earlier tree left it: models, documents, store and run directory, in
tests/golden/run_v1.

It stopped right after the commit of step 5 of 10, and two chunks that it still needs were never
made. `tests/golden/make_run_v1.py` wrote it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.config import Config, parse_config

GOLDEN_RUN = Path(__file__).parent.parent / "golden" / "run_v1"
HERE = "@HERE@"  # in its files: the directory in which it was made
# the files that name it; their checksums are of other bytes, so they go without
PLACED = (
    "run/config.json",
    "run/journal.jsonl",
)


@dataclass(frozen=True, slots=True)
class GoldenRun:
    """A copy of it that may be written to."""

    folder: Path

    @classmethod
    def copied(cls, folder: Path) -> "GoldenRun":
        shutil.copytree(GOLDEN_RUN, folder)
        for name in PLACED:
            path = folder / name
            path.write_text(path.read_text().replace(HERE, str(folder)))
        return cls(folder)

    @property
    def expected(self) -> dict[str, Any]:
        """What came of the undisturbed run."""
        return dict(json.loads((self.folder / "expected.json").read_text()))

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def config(self) -> Config:
        """As the run was asked for, and as a user would write it down."""
        return parse_config(golden_values(self.folder))


def golden_values(folder: Path) -> dict[str, Any]:
    return {
        "corpus": {
            "dataset": str(folder / "documents.jsonl"),
            "sequence_length": 16,
            "heldout_sequences": 8,
            "max_documents": 12,
        },
        "teacher": {
            "model": str(folder / "teacher"),
            "dtype": "float32",
            "num_cpus": 0.25,
            "batch_sequences": 8,
            "max_replicas": 1,
        },
        "student": {
            "model": str(folder / "student"),
            "dtype": "float32",
            "num_cpus": 0.5,
            "zero_stage": 2,
            "global_batch_sequences": 8,
            "micro_batch_sequences": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "max_steps": 10,
            "shuffle_window_chunks": 2,
            "checkpoint_every_steps": 5,
        },
        "target": {"k": 8, "tail_draws": 12},
        "store": {"url": str(folder / "store"), "chunk_sequences": 8},
        "tracking": {"wandb": "off"},
        "cluster": {"notices": "off"},
    }
