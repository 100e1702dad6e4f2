"""Toy models, trained on the source of Python's standard library: for the demo, the benches and the
tests, without network, GPU or data set.

The teacher learns from the training split alone: no model trains on the held-out one.

Shapes: B sequences, L positions, T target tokens, H hidden, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stillhouse.config import Config, CorpusSection, load_config
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.load import save_model
from stillhouse.models.tokenizers import tokenizer_digest
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.documents import load_documents
from stillhouse.sequences.packing import prepare_corpus

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the two models are, and how long the teacher learns."""

    vocab_size: int = 4096
    teacher: Shape = Shape(hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4)
    student: Shape = Shape(hidden_size=64, intermediate_size=176, num_layers=2, num_heads=4)
    num_steps: int = 1700
    batch_sequences: int = 4
    learning_rate: float = 4e-3
    warmup_steps: int = 50


def demo_config(run_dir: Path, overrides: Iterable[str] = ()) -> Config:
    """The demo's config (demo.toml of the package), with its models and its store in `run_dir`,
    unless an override names other places."""
    places = {
        "teacher.model": "models/teacher",
        "student.model": "models/student",
        "store.url": "store",
    }
    own = [
        f"{name} = {json.dumps(str(run_dir / place), ensure_ascii=False)}"
        for name, place in places.items()
    ]
    with as_file(files("stillhouse.pipeline") / "demo.toml") as path:
        return load_config([path], [*own, *overrides])


def make_models(
    directory: Path, corpus: CorpusSection, sizes: Sizes, *, cache_dir: Path, console: Console
) -> None:
    """Write `teacher`, with weights, and `student`, a config alone, into an existing directory.
    Both have one tokenizer."""
    # a tokenizer, and the corpus by it
    texts = [text for _, text in load_documents(corpus, cache_dir=cache_dir)]
    num_megabytes = sum(map(len, texts)) / 1e6
    console.print(
        f"\n1. A tokenizer of {sizes.vocab_size:,} tokens, learnt from {len(texts)} files of "
        f"Python's standard library ({num_megabytes:.1f} MB), which are then tokenised"
    )
    tokenizer = train_tokenizer(texts, vocab_size=sizes.vocab_size)
    split = prepare_corpus(
        corpus, tokenizer, tokenizer_digest=tokenizer_digest(tokenizer), cache_dir=cache_dir
    )

    # a teacher, which learns
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(corpus.seed)
        teacher = LlamaForCausalLM(llama_config(sizes.teacher, tokenizer, corpus.sequence_length))
    num_tokens = sizes.num_steps * sizes.batch_sequences * corpus.sequence_length
    console.print(
        f"2. A teacher of {teacher.num_parameters() / 1e6:.1f} M parameters reads "
        f"{num_tokens / 1e6:.1f} M tokens of them"
    )
    with _progress(console, sizes.num_steps) as show:
        train_on_text(teacher, split.train, sizes, show=show)

    # the directories
    save_model(teacher, directory / "teacher")
    llama_config(sizes.student, tokenizer, corpus.sequence_length).save_pretrained(
        directory / "student"
    )
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(str(directory / name))


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end-of-text token; it encodes any text without loss."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)


def llama_config(
    shape: Shape, tokenizer: PreTrainedTokenizerFast, sequence_length: int
) -> LlamaConfig:
    """A Llama of this shape over the tokenizer's ids, for sequences of up to `sequence_length`
    tokens."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_on_text(
    model: LlamaForCausalLM, corpus: Corpus, sizes: Sizes, *, show: Callable[[float], None]
) -> None:
    """Train by next-token prediction over the corpus in its own order, which is shuffled already.
    `show(loss)` is called after each step."""
    optimiser = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()
    for step in range(sizes.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = sizes.learning_rate * learning_rate_share(step, sizes)

        num_starts = max(1, corpus.num_sequences - sizes.batch_sequences + 1)
        start = step * sizes.batch_sequences % num_starts
        stop = min(start + sizes.batch_sequences, corpus.num_sequences)
        batch = TokenBatch.of(corpus.rows(start, stop))
        logits_TV = model.lm_head(hidden_at(model, batch))
        loss = functional.cross_entropy(logits_TV, batch.labels_T)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimiser.step()
        optimiser.zero_grad()
        show(loss.item())
    model.eval()


def learning_rate_share(step: int, sizes: Sizes) -> float:
    """Linear warm-up from 0 to 1, then half a cosine down to 0."""
    if step < sizes.warmup_steps:
        return (step + 1) / sizes.warmup_steps
    num_after = max(1, sizes.num_steps - sizes.warmup_steps)
    return 0.5 + 0.5 * math.cos(math.pi * (step - sizes.warmup_steps) / num_after)


@contextmanager
def _progress(console: Console, num_steps: int) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal; elsewhere a line at every tenth of the steps."""
    columns = (
        TextColumn("   step {task.completed:,} of {task.total:,}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
        TimeRemainingColumn(compact=True),
    )
    line_every = max(1, num_steps // 10)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_steps, loss=math.nan)

        def show(loss: float) -> None:
            bar.update(task, advance=1, loss=loss)
            step = int(bar.tasks[task].completed)
            if bar.disable and step % line_every == 0:
                console.print(f"   step {step:,} of {num_steps:,}, loss {loss:.2f}")

        yield show
