"""Writes tests/golden/run_v1: `PYTHONPATH=tests python tests/golden/make_run_v1.py OUT`, on the
tree that the run is to be of.

The run is finished first, for what is expected of it; then it is taken back to the state in which a
lost machine leaves it: the journal ends behind the commit of step 5, later checkpoints are gone,
and so are the last two chunks that it made.
"""

import json
import re
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import xxhash

from helpers.goldenrun import HERE, PLACED, golden_values
from helpers.models import make_model
from stillhouse import pipeline
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection, parse_config
from stillhouse.store import ChunkStore, consumers
from stillhouse.tracking import CheckpointEvent, EvalEvent, latest_train_events, read_journal

VOCAB_SIZE = 264
TEXTS = Path(__file__).parents[2] / "docs" / "format.md"
HALF = 5


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run_v1"
        folder.mkdir()
        make_inputs(folder)
        config = parse_config(golden_values(folder))
        plan = pipeline.make_plan(config, run_dir=folder / "run", cache_dir=Path(scratch) / "cache")
        with attached(ClusterSection(num_cpus=2)):
            pipeline.run(plan, command="stillhouse run golden.toml")
        (folder / "expected.json").write_text(json.dumps(outcome(plan), indent=1) + "\n")
        take_back(plan)
        for name in PLACED:
            path = folder / name
            path.write_text(without_checksum(path.read_text()).replace(str(folder), HERE))
        shutil.copytree(folder, out)


def make_inputs(folder: Path) -> None:
    """Two models and some documents."""
    for name, hidden_size, weight_std, seed in (("teacher", 16, 0.3, 1), ("student", 8, 0.02, 2)):
        make_model(
            folder / name,
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_layers=1,
            weight_std=weight_std,
            seed=seed,
        )
    paragraphs = [text for text in TEXTS.read_text().split("\n\n") if 200 < len(text) < 600]
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in paragraphs[:12])
    )


def outcome(plan: pipeline.Plan) -> dict[str, object]:
    events = read_journal(plan.run_dir / "journal.jsonl")
    store = ChunkStore(plan.config.store.url, plan.recipe)
    chunks = {
        number: xxhash.xxh3_64_hexdigest(Path(store.url, store.key(number)).read_bytes())
        for number in plan.chunks
    }
    return {
        "fingerprint": plan.recipe.fingerprint,
        "curve": [
            [event.step, event.loss, event.grad_norm]
            for event in latest_train_events(events, "student")
        ],
        "chunks": chunks,
        "scores": {
            event.model: {
                name: value
                for name, value in asdict(event).items()
                if name not in ("model", "time")
            }
            for event in events
            if isinstance(event, EvalEvent)
        },
    }


def take_back(plan: pipeline.Plan) -> None:
    """To half its steps."""
    journal = plan.run_dir / "journal.jsonl"
    lines, events = journal.read_text().splitlines(), read_journal(journal)
    (end,) = (
        index
        for index, event in enumerate(events)
        if isinstance(event, CheckpointEvent) and event.step == HALF
    )
    journal.write_text("\n".join(lines[: end + 1]) + "\n")
    store = ChunkStore(plan.config.store.url, plan.recipe)
    for number in plan.chunks[-2:]:
        Path(store.url, store.key(number)).unlink()
    consumers.commit(store, plan.jobs[0].consumer(HALF))
    for path in (plan.run_dir / "checkpoints" / "student").glob(f"step-{2 * HALF:08}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in plan.run_dir.rglob("*"):  # what says where and by whom it was made, and the page
        if path.name in ("lock", "report.html") or path.name.startswith("owner-"):
            path.unlink()
    shutil.rmtree(plan.run_dir / "ray")


def without_checksum(text: str) -> str:
    """Of config.json, and of each line of a journal: readers take such for those of a version that
    wrote none."""
    return re.sub(r',\s*"(xxh3|crc)": "[0-9a-f]+"\s*}', "}", text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
