"""`stillhouse bench checkpoint`: how long training stands still for a checkpoint, beside
DeepSpeed's own synchronous one.

Both write the state of the same engine to the same disk, one after the other; each repeat begins
with the other one. What is timed is the wall clock until training may go on. Ours then has the rest
to write, so the time to its commit and a step taken meanwhile are timed as well.

Shapes: T target tokens.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.bench.cost import Timings, require_device
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.checkpoint.manifest import Commit, Origin
from stillhouse.checkpoint.writer import CheckpointWriter
from stillhouse.cluster.processes import prepare_process
from stillhouse.config import StudentSection
from stillhouse.logits import TargetSpec, compress
from stillhouse.models.batch import TokenBatch
from stillhouse.sequence import Sequences
from stillhouse.student.engine import StudentEngine
from stillhouse.student.loader import MicroBatch

SYNCHRONOUS, OURS, COMMITTED, STEP, STEP_MEANWHILE = (
    "save_checkpoint", "stillhouse, blocking", "stillhouse, to the commit",
    "a step", "a step, while it is written",
)  # fmt: skip
_VOCAB_SIZE, _NUM_TOKENS, _RATE = 16_384, 64, 1e-4


@dataclass(frozen=True, slots=True)
class Setting:
    """The student whose state is written: one rank of it."""

    hidden_size: int
    num_layers: int
    dtype: str
    zero_stage: int
    device: str

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True, slots=True)
class Measured:
    timings: Timings
    first_blocking_s: float  # of the first snapshot, whose memory is taken from the system
    num_bytes: int  # of a checkpoint


def bench_checkpoint(
    setting: Setting, work_dir: Path, *, repeats: int, command: str, out: Path | None
) -> None:
    """Measure, print the table, and write all that was measured to `out`. Raises ConfigError where
    the setting cannot be measured."""
    require_device(setting.device)
    # for the process that measures, too: it is started with this one's environment
    prepare_process(setting.device, 1)
    provenance = Provenance.of(command)
    work_dir.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=work_dir) as folder,
        ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool,
    ):
        measured = pool.submit(measure, setting, Path(folder), repeats=repeats).result()
    timings = measured.timings
    write_record(
        out,
        "checkpoint",
        provenance,
        setting=asdict(setting),
        num_bytes=measured.num_bytes,
        first_blocking_s=measured.first_blocking_s,
        seconds={way: asdict(timings.of(way)) for way in timings.seconds},
        blocking_over_synchronous=asdict(timings.ratio(OURS, SYNCHRONOUS)),
        every_repeat=dict(timings.seconds),
    )
    console = terminal()
    console.print(table(setting, measured))
    console.print(
        f"The first snapshot took {measured.first_blocking_s:.2f} s. Load average at the start: "
        f"{provenance.load_average}."
    )


def table(setting: Setting, measured: Measured) -> Table:
    """Medians (least to most)."""
    student = f"{setting.dtype}, ZeRO {setting.zero_stage}, {setting.device}"
    title = f"A checkpoint\n{measured.num_bytes / 1e6:,.0f} MB, {student}"
    found = figures_table(title, ["", "ms", f"over\n{SYNCHRONOUS}"])
    for way in measured.timings.seconds:
        is_step = way in (STEP, STEP_MEANWHILE)
        ratio = "" if is_step else shown(measured.timings.ratio(way, SYNCHRONOUS), ".3f")
        found.add_row(way, shown(measured.timings.of(way), ".0f", unit=1e-3), ratio)
    return found


def measure(setting: Setting, folder: Path, *, repeats: int) -> Measured:
    """Each way `repeats` times, in turn, after an untimed round. This process becomes a rank, so it
    should be a fresh one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's collectives have new names
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but not marked as exported
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        engine = _engine(setting)
        bench = _Bench(engine, _batch(), folder)
        bench.step()
        first = bench.ours()
        bench.synchronous()
        rounds = [_round(bench, swapped=bool(repeat % 2)) for repeat in range(repeats)]
        engine.close()
    finally:
        dist.destroy_process_group()
    return Measured(
        Timings({way: [one[way] for one in rounds] for way in rounds[0]}),
        first[OURS],
        bench.num_bytes,
    )


def _round(bench: "_Bench", *, swapped: bool) -> Mapping[str, float]:
    ways: list[Callable[[], Mapping[str, float]]] = [bench.synchronous, bench.ours]
    found = {STEP: bench.step()}
    for way in reversed(ways) if swapped else ways:
        found |= way()
    return {way: found[way] for way in (SYNCHRONOUS, OURS, COMMITTED, STEP, STEP_MEANWHILE)}


class _Bench:
    """The ways; each writes into a directory of its own, and removes it before it returns."""

    def __init__(self, engine: StudentEngine, batch: MicroBatch, folder: Path) -> None:
        self.num_bytes = 0
        self._engine, self._batch, self._folder = engine, batch, folder

    def step(self) -> float:
        began = monotonic()
        self._engine.train_step([self._batch], step=0, learning_rate=_RATE)
        return monotonic() - began

    def synchronous(self) -> Mapping[str, float]:
        """DeepSpeed's own checkpoint, with its default settings."""
        inner = self._engine.inner
        ours, inner.checkpoint_engine = inner.checkpoint_engine, TorchCheckpointEngine()
        inner.checkpoint_engine.zipfile_serialization = True  # its default in a config
        began = monotonic()
        inner.save_checkpoint(str(self._folder / "synchronous"), tag="one")
        seconds = monotonic() - began
        inner.checkpoint_engine = ours
        shutil.rmtree(self._folder / "synchronous")
        return {SYNCHRONOUS: seconds}

    def ours(self) -> Mapping[str, float]:
        """A snapshot, and a step as soon as it is taken."""
        url, committed_s = self._folder / "ours", []

        def on_commit(made: Commit, seconds: float, _blocking_s: float) -> None:
            committed_s.append(seconds)
            self.num_bytes = made.num_bytes

        origin = Origin(self._engine.section.chosen_stage, "", {})
        with CheckpointWriter(
            str(url),
            origin=origin,
            attempt="one",
            rank=0,
            world_size=1,
            keep=1,
            on_commit=on_commit,
            on_delay=print,
        ) as writer:
            began = monotonic()
            writer.submit(self._engine.snapshot(1))
            blocking_s = monotonic() - began
            step_s = self.step()
            writer.wait()
        shutil.rmtree(url)
        return {OURS: blocking_s, COMMITTED: committed_s[0], STEP_MEANWHILE: step_s}


def _engine(setting: Setting) -> StudentEngine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=setting.hidden_size,
        intermediate_size=4 * setting.hidden_size,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=_NUM_TOKENS,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(setting.torch_device, getattr(torch, setting.dtype))
    sizes = {"global_batch_sequences": 1, "micro_batch_sequences": 1}
    section = StudentSection.model_validate(
        {"model": "random", "dtype": setting.dtype, "zero_stage": setting.zero_stage, **sizes}
    )
    return StudentEngine(
        model,
        section=section,
        vocab_size=_VOCAB_SIZE,
        num_micro_batches=1,
        device=setting.torch_device,
    )


def _batch() -> MicroBatch:
    random = np.random.default_rng(0)
    sequences = Sequences(
        random.integers(_VOCAB_SIZE, size=(1, _NUM_TOKENS), dtype=np.int32),
        np.arange(_NUM_TOKENS, dtype=np.int32)[None],
        np.ones((1, _NUM_TOKENS), dtype=np.uint8),
    )
    return MicroBatch(
        TokenBatch.of(sequences),
        compress(torch.randn(_NUM_TOKENS, _VOCAB_SIZE), TargetSpec(_VOCAB_SIZE, k=8)),
    )
