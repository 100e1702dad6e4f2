"""All that follows from a config before anything runs: the sequences, the recipe, which chunks to
make and how many steps to take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from stillhouse.config import Config, ModelSection, StudentSection, TargetSection, TeacherSection
from stillhouse.engines.choice import engine_named, require_capable
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec
from stillhouse.losses.divergences import divergence_named
from stillhouse.models import (
    ModelIdentity,
    check_same_ids,
    load_tokenizer,
    model_identity,
    require_whole_weights,
    tokenizer_digest,
    vocab_size_of,
)
from stillhouse.sequence import WorkItem
from stillhouse.sequences.source import Sources, open_sources
from stillhouse.store import ChunkStore, Recipe
from stillhouse.store.object_store import Blobs
from stillhouse.student.job import TrainJob, order_of
from stillhouse.student.loader import chunks_read_ahead
from stillhouse.student.order import Order
from stillhouse.terminal import one_line

_Section = TypeVar("_Section", bound=ModelSection)

_TELL_EVERY_DOCUMENTS = 100


@dataclass(frozen=True)
class Plan:
    """A run, decided: `config` has its model revisions pinned, and everything else is a function of
    these fields."""

    config: Config
    run_dir: Path
    cache_dir: Path
    tokenizer: PreTrainedTokenizerFast
    sources: Sources
    recipe: Recipe

    @property
    def store(self) -> ChunkStore:
        """The chunks of this recipe, where the config puts them. Made without touching the
        store."""
        return ChunkStore(self.config.store.url, self.recipe)

    @cached_property
    def order(self) -> Order:
        return order_of(self.config.student, self.recipe)

    @cached_property
    def total_steps(self) -> int:
        section = self.config.student
        steps = self.order.steps_per_epoch * section.epochs
        return min(steps, section.max_steps) if section.max_steps else steps

    @cached_property
    def chunks(self) -> list[int]:
        """The chunks that the students will read, in the order in which they first do."""
        return self.order.chunks_in_reading_order(self.total_steps)

    @property
    def bytes_per_chunk(self) -> float:
        """The mean size of a full chunk: ids, positions and mask of every token, a record for every
        target, the header not counted."""
        corpus = self.sources.train
        targets_per_sequence = corpus.num_targets / corpus.num_sequences
        per_sequence = (
            9 * corpus.sequence_length + targets_per_sequence * self.recipe.spec.bytes_per_token
        )
        return per_sequence * min(self.recipe.chunk_sequences, corpus.num_sequences)

    @property
    def window_chunks(self) -> int:
        """How far teachers may run ahead: what `window_bytes` affords, but never less than a
        student may need for its next step."""
        affordable = int(self.config.store.window_bytes / self.bytes_per_chunk)
        return max(affordable, chunks_read_ahead(self.order))

    def item(self, number: int) -> WorkItem:
        """What a teacher needs to make chunk `number`."""
        return WorkItem(number, self.sources.train.block(number))

    def jobs(self) -> list[TrainJob]:
        """The student, then, where the config asks for it, its control: the same in everything but
        what it learns from."""
        student = self.config.student
        sections: dict[Literal["student", "control"], StudentSection] = {"student": student}
        if self.config.evaluate.control:
            sections["control"] = student.model_copy(
                update={"divergence_weight": 0.0, "ce_weight": 1.0}
            )
        return [
            TrainJob(
                role, section, self.recipe, self.config.store.url, self.run_dir, self.total_steps
            )
            for role, section in sections.items()
        ]


def make_plan(config: Config, *, run_dir: Path, cache_dir: Path) -> Plan:
    """Look whether the models' weights are whole, and resolve the config.

    Raises ModelError, CorpusError, CacheError or ConfigError for what cannot be used, before
    anything heavy starts.
    """
    require_whole_weights(config.teacher.model)
    if config.student.init == "weights":
        require_whole_weights(config.student.model)
    return resolved(config, run_dir=run_dir, cache_dir=cache_dir)


def resolved(config: Config, *, run_dir: Path, cache_dir: Path) -> Plan:
    """Resolve revisions, compare the tokenizers, open the sources (a corpus is tokenised once, into
    `cache_dir`) and name the recipe.

    Raises as `make_plan` does.

    What is done with a finished run needs no more: not the weights that its student began with.
    """
    engine = engine_named(config.teacher.engine)
    require_capable(engine.describe(config.teacher), config.target, engine=config.teacher.engine)
    teacher, student = (
        engine.identity(config.teacher, cache_dir=cache_dir),
        model_identity(config.student, cache_dir=cache_dir),
    )
    config = config.model_copy(
        update={
            "teacher": _pinned(config.teacher, teacher),
            "student": _pinned(config.student, student),
        }
    )
    tokenizer = load_tokenizer(
        config.teacher.model,
        revision=teacher.revision,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    check_same_ids(tokenizer, _student_tokenizer(config.student))
    vocab_size = vocab_size_of(tokenizer)
    spec = _target_spec(config.target, vocab_size)
    # one of the user's own is imported and tried
    divergence_named(config.student.divergence, config.student.mix)
    digest = tokenizer_digest(tokenizer)
    with _tokenising(config.corpus.dataset) as on_progress:
        sources = open_sources(
            config.corpus,
            tokenizer,
            tokenizer_digest=digest,
            block_sequences=config.store.chunk_sequences,
            cache_dir=cache_dir,
            on_progress=on_progress,
        )
    identity = sources.train.identity
    recipe = Recipe(
        corpus_digest=identity.digest if identity.kind == "corpus" else ":".join(identity),
        num_sequences=sources.train.num_sequences,
        sequence_length=config.corpus.sequence_length,
        packing="packed" if config.corpus.packing else "padded",
        chunk_sequences=config.store.chunk_sequences,
        tokenizer_digest=digest,
        teacher_digest=teacher.digest,
        teacher_dtype=_number_format(config.teacher),
        **asdict(spec),
    )
    store = config.store.model_copy(update={"url": ChunkStore(config.store.url, recipe).url})
    student_section = config.student.model_copy(
        update={"checkpoint_url": _absolute(config.student.checkpoint_url)}
    )
    config = config.model_copy(update={"store": store, "student": student_section})
    return Plan(config, run_dir.absolute(), cache_dir, tokenizer, sources, recipe)


def _target_spec(section: TargetSection, vocab_size: int) -> TargetSpec:
    """The target that the config asks for. Raises ConfigError where the vocabulary has no such
    target."""
    try:
        return TargetSpec(
            vocab_size,
            section.k,
            num_draws=section.tail_draws,
            value_bits=section.value_bits,
            temperature=section.temperature,
        )
    except ConfigError as error:
        raise ConfigError(f"[target] {error}") from None


def require_full_step(wanted: int, *, there: int) -> None:
    """Raise ConfigError where one optimiser step asks for more sequences than the corpus has."""
    if wanted > there:
        raise ConfigError(
            f"student.global_batch_sequences is {wanted:,}, but the corpus has {there:,} "
            "sequences to train on;"
            f" set it to {there:,} or less, or give more documents"
        )


def _pinned(section: _Section, identity: ModelIdentity) -> _Section:
    """The section with its revision resolved and a local directory spelt out: a worker's own
    directory is another one."""
    path = Path(section.model).expanduser()
    model = str(path.resolve()) if path.is_dir() else section.model
    return section.model_copy(update={"model": model, "revision": identity.revision})


def _absolute(checkpoint_url: str | None) -> str | None:
    """The same place seen from a worker's directory. Raises ConfigError where only one process
    would see it."""
    if checkpoint_url is None:
        return None
    if checkpoint_url.startswith("memory:"):
        raise ConfigError(
            "student.checkpoint_url is in memory, which dies with its process; set it to a "
            "directory or a bucket"
        )
    return Blobs(checkpoint_url).url


def _student_tokenizer(section: StudentSection) -> PreTrainedTokenizerFast:
    if section.tokenizer is not None:
        return load_tokenizer(section.tokenizer)
    return load_tokenizer(
        section.model, revision=section.revision, trust_remote_code=section.trust_remote_code
    )


@contextmanager
def _tokenising(dataset: str) -> Iterator[Callable[[int, int], None]]:
    """Say on the terminal how far tokenising has come; a corpus that was tokenised before passes in
    silence."""
    console = Console(stderr=True)
    with console.status(Text(one_line(f"reading {dataset}"))) as status:

        def on_progress(num_documents: int, num_tokens: int) -> None:
            if num_documents % _TELL_EVERY_DOCUMENTS == 0:
                status.update(
                    Text(
                        one_line(
                            f"tokenising {dataset}: {num_documents:,} documents, {num_tokens:,} "
                            "tokens"
                        )
                    )
                )

        yield on_progress


def _number_format(teacher: TeacherSection) -> str:
    """Of the teacher, and of its logits where that is another."""
    return (
        teacher.dtype
        if teacher.logits == "fast" or teacher.dtype == "float32"
        else f"{teacher.dtype}+float32"
    )
