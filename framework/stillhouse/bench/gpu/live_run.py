"""A small run on the GPU, which teacher and student share: random weights, Python's own library."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from stillhouse import pipeline
from stillhouse.bench.gpu.findings import Recorder
from stillhouse.bench.gpu.scale import Scale
from stillhouse.config import Config, parse_config
from stillhouse.pipeline.toy import Sizes, make_models
from stillhouse.tracking import EndEvent, RunEvent, TeacherEvent, latest_train_events, read_journal

_GLOBAL_BATCH = 8
_DOCUMENTS_PER_STEP = 4  # of the standard library's files: several sequences each


def run(scale: Scale, recorder: Recorder) -> None:
    """What `stillhouse run` does, from an empty store to the report."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = _config(scale, folder)
        models, cache_dir = folder / "models", folder / "cache"
        models.mkdir()
        untrained, quiet = replace(Sizes(), num_steps=0), Console(quiet=True)
        make_models(models, config.corpus, untrained, cache_dir=cache_dir, console=quiet)
        plan = pipeline.make_plan(config, run_dir=folder / "run", cache_dir=cache_dir)
        pipeline.run(plan)
        _tell(read_journal(plan.run_dir / "journal.jsonl"), scale, recorder)


def _tell(events: list[RunEvent], scale: Scale, recorder: Recorder) -> None:
    steps = latest_train_events(events, "student")
    (teacher,) = (event for event in events if isinstance(event, TeacherEvent))
    losses, on_kernels = [event.loss for event in steps], teacher.topk.startswith("triton")
    recorder.tell(
        "the run ended well", isinstance(events[-1], EndEvent) and events[-1].outcome == "done"
    )
    recorder.tell(
        "every step was taken",
        [event.step for event in steps] == list(range(1, scale.num_steps + 1)),
    )
    recorder.tell("every loss is finite", all(map(math.isfinite, losses)), losses=losses)
    recorder.tell(
        "the teacher took the kernels", on_kernels or scale.device == "cpu", topk=teacher.topk
    )
    recorder.tell("the teacher's device", teacher.device)


def _config(scale: Scale, folder: Path) -> Config:
    # the GPU, which teacher and student share
    place = {"device": scale.device, "dtype": scale.teacher_dtype, "num_cpus": 0.5}
    if scale.device == "cuda":
        place["num_gpus"] = 0.5

    # a small run
    models = folder / "models"
    return parse_config(
        {
            "corpus": {
                "dataset": "stdlib",
                "sequence_length": 128,
                "max_documents": _DOCUMENTS_PER_STEP * scale.num_steps,
                "heldout_sequences": 8,
            },
            "teacher": place | {"model": str(models / "teacher"), "batch_sequences": 8},
            "store": {"url": str(folder / "store"), "chunk_sequences": 8},
            "student": place
            | {
                "model": str(models / "student"),
                "init": "config",
                "global_batch_sequences": _GLOBAL_BATCH,
                "micro_batch_sequences": _GLOBAL_BATCH,
                "max_steps": scale.num_steps,
                "checkpoint_every_steps": scale.num_steps,
            },
            "tracking": {"wandb": "off"},
            "cluster": {"notices": "off"},
        }
    )
