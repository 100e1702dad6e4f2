"""`stillhouse bench engines`: one teacher on four kinds of blocks, by each engine that is installed
and by the attention that a model has of its own: rows with a mask.

A model with random weights costs what a trained one does. Its targets are the default ones, and its
records are compared between the ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.table import Table
from torch import Tensor

from stillhouse.bench.allocator import freed_memory_kept
from stillhouse.bench.cost import Cost, cost_of
from stillhouse.bench.engine_blocks import KINDS, block_of
from stillhouse.bench.figures import Spread
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.random_model import RandomModel
from stillhouse.config import TeacherSection
from stillhouse.engines.base import TeacherEngine
from stillhouse.engines.choice import engine_named
from stillhouse.engines.probe import mean_kl
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.engines.vllm import is_installed
from stillhouse.errors import ConfigError
from stillhouse.logits import decode
from stillhouse.sequence import WorkItem
from stillhouse.store import Recipe

ROWS, DOCUMENTS = "rows with a mask", "transformers"
COMPILED, VLLM = "transformers, compiled", "vllm"
_ENTRIES, _DRAWS = 8, 40
_UNTIMED_ROUNDS = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """A teacher of random weights, and the blocks that it is given."""

    num_sequences: int
    sequence_length: int
    model: RandomModel

    @property
    def title(self) -> str:
        block = f"blocks of {self.num_sequences} x {self.sequence_length}"
        return f"{self.model.title}; {block}, {self.model.dtype}, {self.model.device}"

    def check(self) -> None:
        """Raises ConfigError where this cannot be measured here."""
        self.model.check()
        if self.model.vocab_size <= _ENTRIES:
            raise ConfigError(
                f"--vocab is {self.model.vocab_size}; wanted more than {_ENTRIES} ids"
            )


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of blocks: the costs of each way, repeat by repeat, and how far its records are from
    those of `DOCUMENTS`."""

    num_targets: Sequence[int]  # of each repeat's block
    costs: Mapping[str, Sequence[Cost]]
    mean_kl: Mapping[str, float]  # nats

    def targets_per_cpu_s(self, way: str) -> Spread:
        pairs = zip(self.num_targets, self.costs[way], strict=True)
        return Spread.of(number / cost.cpu_s for number, cost in pairs)

    def targets_per_s(self, way: str) -> Spread:
        pairs = zip(self.num_targets, self.costs[way], strict=True)
        return Spread.of(number / cost.wall_s for number, cost in pairs)

    def times_rows(self, way: str) -> Spread:
        """How many times as fast as rows with a mask by processor time, within each repeat."""
        pairs = zip(self.costs[ROWS], self.costs[way], strict=True)
        return Spread.of(rows.cpu_s / cost.cpu_s for rows, cost in pairs)


class RowsEngine(TransformersEngine):
    """The same engine with the masked attention of transformers, over whole rows."""

    def __init__(self, section: TeacherSection, recipe: Recipe, *, device: str):
        super().__init__(section, recipe, device=device)
        self._model.set_attn_implementation("sdpa")


def bench_engines(
    setting: Setting, *, repeats: int, with_compile: bool, command: str, out: Path | None
) -> None:
    """Measure, print a table for each kind of blocks, and write all that was measured to `out`.
    Raises ConfigError where the setting cannot be measured."""
    setting.check()
    torch.set_num_threads(setting.model.threads)
    provenance = Provenance.of(command)
    recipe = recipe_of(setting)
    with TemporaryDirectory() as folder, freed_memory_kept() as allocator:
        setting.model.save(Path(folder), max_positions=setting.sequence_length)
        engines = _engines(setting, recipe, Path(folder), with_compile=with_compile)
        found = {kind: _measured(setting, recipe, kind, engines, repeats=repeats) for kind in KINDS}

    # in a file, and in words
    write_record(
        out,
        "engines",
        provenance,
        setting=asdict(setting),
        allocator=allocator,
        kinds={kind: asdict(measured) for kind, measured in found.items()},
    )
    console = terminal()
    for kind, measured in found.items():
        console.print(table(setting, kind, measured))
    console.print(
        f"Targets a second; KL is from the records of `{DOCUMENTS}`. Load average at the start: "
        f"{provenance.load_average}. While it was timed, {allocator}."
    )
    if VLLM not in engines:
        console.print("vllm is not installed here, and not measured.")


def table(setting: Setting, kind: str, measured: Measured) -> Table:
    """Medians (least to most)."""
    headings = "per CPU\nsecond", "times\nrows", "per second", "mean KL"
    found = figures_table(f"{kind.capitalize()}\n{setting.title}", ["", *headings])
    for way in measured.costs:
        found.add_row(
            way,
            shown(measured.targets_per_cpu_s(way), ",.0f"),
            shown(measured.times_rows(way), ".2f"),
            shown(measured.targets_per_s(way), ",.0f"),
            f"{measured.mean_kl[way]:.1e}",
        )
    return found


def recipe_of(setting: Setting) -> Recipe:
    """The default target, of a teacher and a corpus that nothing else has."""
    return Recipe(
        corpus_digest="bench",
        num_sequences=setting.num_sequences,
        sequence_length=setting.sequence_length,
        packing="packed",
        chunk_sequences=setting.num_sequences,
        tokenizer_digest="bench",
        teacher_digest="bench",
        teacher_dtype=setting.model.dtype,
        vocab_size=setting.model.vocab_size,
        k=_ENTRIES,
        num_draws=_DRAWS,
    )


def _engines(
    setting: Setting, recipe: Recipe, folder: Path, *, with_compile: bool
) -> dict[str, TeacherEngine]:
    """Each way, loaded."""
    section = TeacherSection(
        model=str(folder), dtype=setting.model.dtype, device=setting.model.device
    )
    load = {"device": setting.model.device}
    engines: dict[str, TeacherEngine] = {
        ROWS: RowsEngine(section, recipe, **load),
        DOCUMENTS: TransformersEngine(section, recipe, **load),
    }
    if is_installed():
        in_vllm = TeacherSection.model_validate(section.model_dump() | {"engine": VLLM})
        engines[VLLM] = engine_named(VLLM)(in_vllm, recipe, **load)
    if with_compile:
        compiled = section.model_copy(update={"compile": True})
        engines[COMPILED] = TransformersEngine(compiled, recipe, **load)
    return engines


def _measured(
    setting: Setting,
    recipe: Recipe,
    kind: str,
    engines: Mapping[str, TeacherEngine],
    *,
    repeats: int,
) -> Measured:
    """The ways take turns on the same blocks, which are fresh for every repeat."""
    shape = setting.num_sequences, setting.sequence_length
    items = [
        WorkItem(0, block_of(kind, shape, vocab_size=setting.model.vocab_size, seed=number))
        for number in range(_UNTIMED_ROUNDS + repeats)
    ]
    costs: dict[str, list[Cost]] = {way: [] for way in engines}
    for item in items:
        for way, engine in engines.items():
            _, cost = cost_of(partial(records_of, engine, item))
            costs[way].append(cost)

    # how far apart they are, on the last block
    records = {way: records_of(engine, items[-1]) for way, engine in engines.items()}
    targets = {way: decode(records_TB, recipe.spec) for way, records_TB in records.items()}
    return Measured(
        num_targets=[item.sequences.num_targets for item in items[_UNTIMED_ROUNDS:]],
        costs={way: each[_UNTIMED_ROUNDS:] for way, each in costs.items()},
        mean_kl={way: mean_kl(targets[DOCUMENTS], found) for way, found in targets.items()},
    )


def records_of(engine: TeacherEngine, item: WorkItem) -> Tensor:
    """uint8 [T, B] on the CPU, where they have arrived."""
    return torch.cat([part.records_TB.cpu() for part in engine.records(item)])
