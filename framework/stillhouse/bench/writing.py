"""`stillhouse bench writing`: what writers of one model sample to prompts of mixed length, by each
engine that is installed, and by `generate` of Transformers.

A model with random weights costs what a trained one does. So many of its tokens end a sample that
samples are of mixed length too. `generate` gets as many prompts at a time as the engine
`transformers`, padded on the left; vLLM chooses itself how many it has in a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from transformers import GenerationMixin, PreTrainedModel

from stillhouse.bench.allocator import freed_memory_kept
from stillhouse.bench.cost import Cost, cost_of
from stillhouse.bench.figures import Spread
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.random_model import RandomModel
from stillhouse.config.generate import WriterSection
from stillhouse.engines.vllm import is_installed
from stillhouse.errors import ConfigError
from stillhouse.extension import is_extension
from stillhouse.models.caches import left_padded
from stillhouse.models.load import load_model
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.writer.choice import writer_named
from stillhouse.writer.engine import Prompt

GENERATE, SORTED = "generate", "generate, by length"
_ENGINES = ("transformers", "vllm")
_SHORTEST_PROMPT = 16
_UNTIMED_ROUNDS = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """A model of random weights, and what it writes to."""

    num_prompts: int
    longest_prompt: int
    max_new_tokens: int
    mean_new_tokens: int  # of samples that are not cut, where all tokens are as likely
    batch_sequences: int
    model: RandomModel

    @property
    def title(self) -> str:
        prompts = f"{self.num_prompts} prompts of {_SHORTEST_PROMPT} to {self.longest_prompt}"
        batch = f"{self.batch_sequences} at a time, {self.model.dtype}, {self.model.device}"
        return f"{self.model.title}; {prompts}, {batch}"

    def check(self) -> None:
        """Raises ConfigError where this cannot be measured here."""
        self.model.check()
        vocab_size = self.model.vocab_size
        if vocab_size < self.mean_new_tokens or self.longest_prompt < _SHORTEST_PROMPT:
            raise ConfigError(
                f"--vocab is {vocab_size} and --longest-prompt {self.longest_prompt}; wanted "
                f"--mean-new-tokens ({self.mean_new_tokens}) ids or more, and prompts of "
                f"{_SHORTEST_PROMPT} tokens or more"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What all ways write to: prompts, and the seed of each sample."""

    prompts: Sequence[Prompt]
    seeds: Sequence[int]


Way = Callable[[Round], Sequence[int]]
"""Writes to the prompts of a round; returns the number of new tokens of each."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way, round by round."""

    num_tokens: Sequence[int]  # new ones
    costs: Sequence[Cost]

    @property
    def per_cpu_s(self) -> list[float]:
        pairs = zip(self.num_tokens, self.costs, strict=True)
        return [number / cost.cpu_s for number, cost in pairs]

    def times(self, other: "Measured") -> Spread:
        """How many times as fast by processor time, within each round."""
        pairs = zip(self.per_cpu_s, other.per_cpu_s, strict=True)
        return Spread.of(own / its for own, its in pairs)


def bench_writing(
    setting: Setting, engines: Sequence[str], *, repeats: int, command: str, out: Path | None
) -> None:
    """Measure, print the table, and write all that was measured to `out`. Raises ConfigError where
    the setting cannot be measured, or an engine is none."""
    setting.check()
    for name in engines:
        if name not in _ENGINES and not is_extension(name):
            raise ConfigError(
                f"there is no writer's engine {name!r}; wanted {' or '.join(_ENGINES)}, or "
                "'package.module:name' of your own"
            )
    torch.set_num_threads(setting.model.threads)
    provenance, recipe = Provenance.of(command), recipe_of(setting)

    # every way, with a model of its own
    absent = [name for name in engines if name == "vllm" and not is_installed()]
    with TemporaryDirectory() as folder, freed_memory_kept() as allocator:
        setting.model.save(Path(folder), max_positions=recipe.sequence_length)
        ways = _generate(setting, recipe, Path(folder))
        for name in engines:
            if name not in absent:
                ways[name] = _writer(name, setting, recipe, Path(folder))
        rounds = [round_of(setting, seed=seed) for seed in range(_UNTIMED_ROUNDS + repeats)]
        found = measured(ways, rounds)

    # in a file, and in words
    write_record(
        out,
        "writing",
        provenance,
        setting=asdict(setting),
        allocator=allocator,
        ways={way: asdict(each) for way, each in found.items()},
    )
    console = terminal()
    console.print(table(setting, found))
    console.print(
        f"New tokens. Load average at the start: {provenance.load_average}. While it was timed, "
        f"{allocator}."
    )
    for name in absent:
        console.print(f"{name} is not installed here, and not measured.")


def measured(ways: Mapping[str, Way], rounds: Sequence[Round]) -> dict[str, Measured]:
    """The ways take turns on the same prompts, which are fresh in every round."""
    numbers: dict[str, list[int]] = {name: [] for name in ways}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for each in rounds:
        for name, way in ways.items():
            lengths, cost = cost_of(partial(way, each))
            numbers[name].append(sum(lengths))
            costs[name].append(cost)
    timed = slice(_UNTIMED_ROUNDS, None)
    return {name: Measured(numbers[name][timed], costs[name][timed]) for name in ways}


def table(setting: Setting, found: Mapping[str, Measured]) -> Table:
    """Medians (least to most), beside the better `generate` and the first engine."""
    engines = [way for way in found if way not in (GENERATE, SORTED)]
    beside = [SORTED, *engines[:1]]
    times = ["times\n" + way.replace(", ", ",\n") for way in beside]
    rows = figures_table(setting.title, ["", "per CPU\nsecond", *times, "new tokens"])
    for way, each in found.items():
        rows.add_row(
            way,
            shown(Spread.of(each.per_cpu_s), ",.0f"),
            *(shown(each.times(found[other]), ".2f") for other in beside),
            shown(Spread.of(each.num_tokens), ",.0f"),
        )
    return rows


def recipe_of(setting: Setting) -> RolloutRecipe:
    """One sample of each prompt, at temperature 1; of prompts and a writer that nothing else
    has."""
    return RolloutRecipe(
        prompts_digest="bench",
        num_prompts=setting.num_prompts,
        shard_prompts=setting.num_prompts,
        samples=1,
        sequence_length=setting.longest_prompt + setting.max_new_tokens,
        max_new_tokens=setting.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        end_ids=tuple(range(0, setting.model.vocab_size, setting.mean_new_tokens)),
        vocab_size=setting.model.vocab_size,
        vocabulary_digest="bench",
        writer_kind="weights",
        writer_digest="bench",
        writer_numerics=setting.model.dtype,
    )


def round_of(setting: Setting, *, seed: int) -> Round:
    """Random prompts, whose lengths have a uniform logarithm."""
    random = np.random.default_rng(seed)
    shortest, longest = np.log(_SHORTEST_PROMPT), np.log(setting.longest_prompt)
    lengths = np.exp(random.uniform(shortest, longest, setting.num_prompts)).round().astype(int)
    prompts = [
        Prompt(number, random.integers(0, setting.model.vocab_size, size).astype(np.int32))
        for number, size in enumerate(lengths)
    ]
    return Round(prompts, random.integers(-(2**63), 2**63, setting.num_prompts).tolist())


def _writer(name: str, setting: Setting, recipe: RolloutRecipe, folder: Path) -> Way:
    """A writer's engine, by its name in a config."""
    section = WriterSection(
        model=str(folder),
        engine=name,
        dtype=setting.model.dtype,
        device=setting.model.device,
        batch_sequences=setting.batch_sequences,
    )
    engine = writer_named(name)(section, recipe, device=setting.model.device, store_url="")

    def write(given: Round) -> list[int]:
        samples = engine.write(given.prompts, given.seeds)
        return [0 if sample is None else len(sample.ids) for sample in samples]

    return write


def _generate(setting: Setting, recipe: RolloutRecipe, folder: Path) -> dict[str, Way]:
    """`generate` of Transformers, in batches of the prompts as they come, and in their order of
    length."""
    section = WriterSection(
        model=str(folder), dtype=setting.model.dtype, device=setting.model.device
    )
    model = load_model(section, device_map=setting.model.device, by_document=False)
    new_tokens = partial(_new_tokens, model, recipe)

    def write(given: Round, *, is_sorted: bool) -> list[int]:
        prompts = [prompt.ids for prompt in given.prompts]
        prompts = sorted(prompts, key=len) if is_sorted else prompts
        size = setting.batch_sequences
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(given.seeds[0])
            return [number for batch in batches for number in new_tokens(batch)]

    return {
        GENERATE: partial(write, is_sorted=False),
        SORTED: partial(write, is_sorted=True),
    }


@torch.inference_mode()
def _new_tokens(
    model: PreTrainedModel, recipe: RolloutRecipe, batch: Sequence[NDArray[np.int32]]
) -> list[int]:
    """Of a sample of each prompt of one batch."""
    assert isinstance(model, GenerationMixin)
    padded = left_padded([torch.from_numpy(each.astype(np.int64)) for each in batch])
    ids_BP, _, mask_BP = (each.to(model.device) for each in padded)
    found_BL = model.generate(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        do_sample=True,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        top_k=0,
        max_new_tokens=recipe.max_new_tokens,
        eos_token_id=list(recipe.end_ids),
        pad_token_id=0,
    )
    rows = found_BL[:, ids_BP.shape[1] :].tolist()
    return list(lengths_of(rows, frozenset(recipe.end_ids)))


def lengths_of(rows: Sequence[Sequence[int]], ends: frozenset[int]) -> Iterator[int]:
    """New tokens of each row, to the first that ends it."""
    for row in rows:
        yield next((place for place, each in enumerate(row, 1) if each in ends), len(row))
