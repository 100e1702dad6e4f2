"""A tiny world to distil in: a teacher, a student, a corpus of Python source, a config, and a
store."""

import bisect
import heapq
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.models import make_model
from stillhouse.config import Config, parse_config
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.logits import concatenate, encode
from stillhouse.pipeline import Plan, make_plan
from stillhouse.sequence import WorkItem
from stillhouse.store import Chunk, ChunkStore

_VOCAB_SIZE = 300


def write_documents(path: Path) -> None:
    """A jsonl file of short documents: paragraphs of the standard library's source."""
    texts = [
        text
        for module in (textwrap, bisect, heapq)
        for text in Path(module.__file__ or "").read_text().split("\n\n")
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested tables, the right one winning."""
    both = {
        key: merged(base[key], value) if isinstance(value, dict) else value
        for key, value in changes.items()
        if key in base
    }
    return base | changes | both


def item_with_tokens(plan: Plan, number: int) -> WorkItem:
    """A chunk's sequences, wherever a teacher would read them."""
    return WorkItem(number, plan.sources.train.block(number))


@dataclass(frozen=True)
class TinyWorld:
    folder: Path
    values: dict[str, Any]

    @classmethod
    def make(cls, folder: Path) -> "TinyWorld":
        make_model(
            folder / "teacher", vocab_size=_VOCAB_SIZE, hidden_size=32, weight_std=0.3, seed=1
        )
        make_model(folder / "student", vocab_size=_VOCAB_SIZE, hidden_size=16, seed=2)
        write_documents(folder / "documents.jsonl")
        values: dict[str, Any] = {
            "corpus": {
                "dataset": str(folder / "documents.jsonl"),
                "sequence_length": 32,
                "heldout_sequences": 8,
            },
            "teacher": {
                "model": str(folder / "teacher"),
                "dtype": "float32",
                "num_cpus": 0.25,
                "batch_sequences": 8,
            },
            "student": {
                "model": str(folder / "student"),
                "dtype": "float32",
                "num_cpus": 0.5,
                "global_batch_sequences": 8,
                "micro_batch_sequences": 4,
                "learning_rate": 3e-3,
                "warmup_steps": 5,
                "max_steps": 50,
                "epochs": 20,
                "shuffle_window_chunks": 2,
                "checkpoint_every_steps": 10,
            },
            "target": {"k": 8, "tail_draws": 12},
            "store": {"url": str(folder / "store"), "chunk_sequences": 8},
            "tracking": {"wandb": "off"},
            "cluster": {"notices": "off"},
        }
        return cls(folder, values)

    def config(self, **changes: dict[str, Any]) -> Config:
        return parse_config(merged(self.values, changes))

    def plan(self, run_dir: Path, **changes: dict[str, Any]) -> Plan:
        return make_plan(self.config(**changes), run_dir=run_dir, cache_dir=self.folder / "cache")

    def fill_store(self, plan: Plan) -> None:
        """What the teacher pool does, in this process."""
        store = ChunkStore.create(plan.config.store.url, plan.recipe)
        missing = set(plan.chunks) - store.published()
        if not missing:
            return
        teacher = TransformersEngine(plan.config.teacher, plan.recipe, device="cpu")
        for number in sorted(missing):
            item = item_with_tokens(plan, number)
            records = encode(concatenate(teacher.targets(item)), plan.recipe.spec).numpy()
            store.publish(Chunk(number, item.sequences, records))
