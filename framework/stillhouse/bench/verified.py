"""`stillhouse bench verified`: what a student gains where it is trained on right answers alone.

A writer that is right in a known share of its answers (`addition`) writes to prompts, and a grader
scores them. One student learns from all that was written, another one from what was accepted. Both
begin with the same weights, take the same number of steps, and then answer prompts that were held
out.

Rollouts, verdicts, corpora and answers are made by the parts that `generate`, `grade` and a run
have, in one process. So is the training: by cross-entropy, which is a run's loss where
`divergence_weight` is 0. What is compared is the text, which Ray and DeepSpeed do not change.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import torch
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaForCausalLM

from stillhouse.bench.addition import LONGEST_PROMPT, LONGEST_TRACE, sums, write_prompts
from stillhouse.bench.figures import Spread
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.config import CorpusSection, ModelSection
from stillhouse.config.generate import GenerateConfig
from stillhouse.models.load import load_model, save_model
from stillhouse.models.tokenizers import load_tokenizer, tokenizer_digest
from stillhouse.pipeline import Generation, Grades, grade, plan_generation
from stillhouse.pipeline.console import tell_of_wait
from stillhouse.pipeline.toy import Sizes, llama_config, train_on_text, train_tokenizer
from stillhouse.sequences.packing import Split, prepare_corpus
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.writer.actor import computed, published
from stillhouse.writer.choice import writer_named

ALL, ACCEPTED = "all that was written", "what was accepted"
_GRADER = "number"
_ACCEPT = {ALL: None, ACCEPTED: {"min_score": {_GRADER: 1.0}}}  # of each corpus
_WRITER = "stillhouse.bench.addition:AdditionWriter"
_UNTRAINED = "untrained"  # the directory of the students' first weights
_LENGTH = LONGEST_PROMPT + LONGEST_TRACE
_VOCAB_SIZE = 257  # every byte, and the end of a text
_COLDEST = 0.01  # the least temperature that is allowed: nearly always the likeliest token


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured, and how long a student learns."""

    num_seeds: int
    num_prompts: int
    num_steps: int
    num_heldout: int = 500  # prompts
    samples: int = 4  # of each of these at temperature 1
    batch_sequences: int = 64
    learning_rate: float = 3e-3
    first_seed: int = 0  # of num_seeds


@dataclass(frozen=True, slots=True)
class Result:
    """One student. Shares are from 0 to 1."""

    seed: int
    corpus: str
    num_sequences: int  # of the corpus
    share_dropped: float  # of what was written
    writer_right: float  # share of what was written
    pass_at_1: float  # share of the student's answers at temperature 1 that are right
    coldest: float  # the same at the lowest temperature
    training_cpu_s: float  # processor time


def bench_verified(effort: Effort, *, threads: int, command: str, out: Path | None) -> None:
    """Measure, print the table, and write all that was measured to `out`, after each seed."""
    torch.set_num_threads(threads)
    console, provenance, results = terminal(), Provenance.of(command), list[Result]()
    for seed in range(effort.first_seed, effort.first_seed + effort.num_seeds):
        with (
            TemporaryDirectory() as folder,
            Progress(console=console, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task(f"seed {seed}", total=len(_ACCEPT) * effort.num_steps)
            results += measured(Path(folder), effort, seed=seed, on_step=partial(bar.advance, task))
        write_record(
            out,
            "verified",
            provenance,
            effort=asdict(effort),
            results=[asdict(result) for result in results],
        )
    console.print(table(effort, results))


def table(effort: Effort, results: Sequence[Result]) -> Table:
    """Medians (least to most) of the seeds."""
    title = f"{effort.num_prompts:,} sums, {effort.num_steps:,} steps of each student"
    headings = "right at\nT = 1, %", f"right at\nT = {_COLDEST}, %", "sequences", "training,\nCPU s"
    found = figures_table(title, ["", *headings])
    writer = Spread.of(result.writer_right for result in results)
    found.add_row("the writer", shown(writer, ".1f", unit=0.01))
    for name in _ACCEPT:
        here = [result for result in results if result.corpus == name]
        found.add_row(
            name,
            shown(Spread.of(result.pass_at_1 for result in here), ".1f", unit=0.01),
            shown(Spread.of(result.coldest for result in here), ".1f", unit=0.01),
            shown(Spread.of(result.num_sequences for result in here), ",.0f"),
            shown(Spread.of(result.training_cpu_s for result in here), ".0f"),
        )
    return found


def measured(
    folder: Path, effort: Effort, *, seed: int, on_step: Callable[[], None]
) -> Iterator[Result]:
    """Both students of a seed, one after the other, in the empty directory `folder`."""
    # prompts, some of which are held out, and a student that has learnt nothing
    pairs = sums(effort.num_prompts + effort.num_heldout, seed=seed)
    write_prompts(folder / "train.jsonl", pairs[effort.num_heldout :])
    write_prompts(folder / "heldout.jsonl", pairs[: effort.num_heldout])
    save_untrained(folder / _UNTRAINED, seed=seed)

    # what the writer writes to them, graded
    written = planned(folder, "train.jsonl", _UNTRAINED, seed=seed, engine=_WRITER)
    writers = filled_and_graded(written)

    # a student of each corpus, and its answers
    for name in _ACCEPT:
        split, began = corpus_of(written, name), process_time()
        teach(folder, name, split, effort, on_step=on_step)
        training_cpu_s = process_time() - began
        pass_at_1, coldest = (
            filled_and_graded(
                planned(folder, "heldout.jsonl", name, seed=seed, samples=number, temperature=at)
            ).mean_score
            for number, at in ((effort.samples, 1.0), (1, _COLDEST))
        )
        yield Result(
            seed,
            name,
            split.train.num_sequences,
            sum(split.account.left_out.values()) / writers.num_samples,
            writers.mean_score,
            pass_at_1,
            coldest,
            training_cpu_s,
        )


def planned(
    folder: Path,
    prompts: str,
    model: str,
    *,
    seed: int,
    engine: str = "transformers",
    samples: int = 1,
    temperature: float = 1.0,
) -> Generation:
    """The plan of what `model` writes to `prompts`; both are in `folder`."""
    config = GenerateConfig.model_validate(
        {
            "prompts": {
                "dataset": str(folder / prompts),
                "format": "text",
                "prompt_column": "prompt",
                "reference_column": "answer",
            },
            "writer": {
                "model": str(folder / model),
                "engine": engine,
                "dtype": "float32",
                "device": "cpu",
                "batch_sequences": 256,
            },
            # each text has room for the longest sum
            "sampling": {
                "samples": samples,
                "temperature": temperature,
                "max_new_tokens": LONGEST_TRACE,
                "sequence_length": _LENGTH,
                "seed": seed,
            },
            "store": {"url": str(folder / "store"), "shard_prompts": 500},
            "graders": [{"kind": _GRADER}],
        }
    )
    return plan_generation(config, run_dir=folder / "run", cache_dir=folder / "cache")


def filled_and_graded(plan: Generation) -> Grades:
    """What the grader says of a generation, all shards of which are written here."""
    store = RolloutStore.create(plan.store.url, plan.recipe)
    section = plan.config.writer
    engine = writer_named(section.engine)(
        section, plan.recipe, device=section.device, store_url=plan.store.url
    )
    for number in range(plan.recipe.num_shards):
        published(store, computed(store, plan.block(number), engine), tell=tell_of_wait)
    (grades,) = grade(plan)
    return grades


def corpus_of(written: Generation, name: str) -> Split:
    """All that was written, or what was accepted, each sample padded to a sequence."""
    section = CorpusSection.model_validate(
        {
            "dataset": f"rollouts://{written.store.url}/{written.recipe.fingerprint[:16]}",
            "accept": _ACCEPT[name],
            "packing": False,
            "sequence_length": _LENGTH,
            "heldout_sequences": 1,
        }
    )
    tokenizer = load_tokenizer(written.config.writer.model)
    return prepare_corpus(
        section,
        tokenizer,
        tokenizer_digest=tokenizer_digest(tokenizer),
        cache_dir=written.cache_dir,
    )


def save_untrained(folder: Path, *, seed: int) -> None:
    """Write a student with random weights, and its tokenizer, of characters."""
    tokenizer = train_tokenizer([], vocab_size=_VOCAB_SIZE)
    llama_config(Sizes().student, tokenizer, _LENGTH).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    section = ModelSection(model=str(folder), dtype="float32", device="cpu")
    save_model(load_model(section, random_init_seed=seed), folder)


def teach(
    folder: Path, name: str, split: Split, effort: Effort, *, on_step: Callable[[], None]
) -> None:
    """Train the student of a corpus, and write it to the directory of the corpus's name."""
    untrained = str(folder / _UNTRAINED)
    student = load_model(ModelSection(model=untrained, dtype="float32", device="cpu"))
    sizes = replace(
        Sizes(),
        num_steps=effort.num_steps,
        batch_sequences=effort.batch_sequences,
        learning_rate=effort.learning_rate,
    )
    assert isinstance(student, LlamaForCausalLM)
    train_on_text(student, split.train, sizes, show=lambda _loss: on_step())
    save_model(student, folder / name)
    load_tokenizer(untrained).save_pretrained(str(folder / name))
