"""A plan: all that follows from a config before anything runs, and the values that a run hands to
its parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from stillhouse.config import Config, CutSection, EvaluateSection, StudentSection, TeacherSection
from stillhouse.errors import ConfigError
from stillhouse.sequences.source import Part, SequenceSource, Sources, item_of, read_from
from stillhouse.sequences.stored import Work
from stillhouse.store import ChunkStore, Recipe
from stillhouse.store.rollout_store import RolloutsPlace
from stillhouse.student.job import TrainJob, order_of
from stillhouse.student.loader import chunks_read_ahead
from stillhouse.student.optimiser import decay_steps_of
from stillhouse.student.order import Order
from stillhouse.student.pairing import has_loss_constant
from stillhouse.tracking import StartEvent


@dataclass(frozen=True, slots=True)
class Request:
    """What a command asks of a run directory."""

    run_dir: Path
    config: Config
    recipe: Recipe
    store: ChunkStore
    chunks: Sequence[int]  # that the command makes or reads
    start: StartEvent  # but for what the attempt adds: number, command, versions, committed steps
    parts: Sequence[Part]  # of the corpus


@dataclass(frozen=True, slots=True)
class Targets:
    """What teachers make: chunks, in the order in which students first read them."""

    teacher: TeacherSection
    store: ChunkStore
    chunks: Sequence[int]
    item_of: Callable[[int], Work]  # the sequences of a chunk, by its number
    reads: Sequence[RolloutsPlace]  # where the sequences' tokens are, if teachers are not sent them
    window_chunks: int  # how far teachers may run ahead of the slowest student
    cache_dir: Path  # remembers the teacher's identity


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is scored: the teacher and the newest commit of each job, on held-out sequences."""

    teacher: TeacherSection
    jobs: Sequence[TrainJob]
    section: EvaluateSection
    heldout: SequenceSource


@dataclass(frozen=True)
class Plan:
    """A run, decided: `config` has its model revisions pinned and its ZeRO stage chosen, and
    everything else is a function of these fields."""

    config: Config
    run_dir: Path
    cache_dir: Path
    tokenizer: PreTrainedTokenizerFast
    sources: Sources
    recipe: Recipe
    why_zero_stage: str  # for people

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

    def item(self, number: int) -> Work:
        """What a teacher needs to make chunk `number`."""
        return item_of(self.sources.train, number)

    @property
    def initial_section(self) -> StudentSection:
        """The student's section with the model that its ranks load: where it is cut from another
        one, a folder of the run directory, of the same name, into which the cut is written."""
        section = self.config.student
        if not isinstance(section.init, CutSection):
            return section
        folder = self.run_dir / "student" / Path(section.model).name
        return section.model_copy(update={"model": str(folder)})

    @cached_property
    def jobs(self) -> tuple[TrainJob, ...]:
        """The student's training, then, where the config asks for it, that of its control: the same
        in everything but what it learns from."""
        section, url = self.initial_section, self.config.store.url
        student = TrainJob("student", section, self.recipe, url, self.run_dir, self.total_steps)
        if not self.config.evaluate.control:
            return (student,)
        text_alone = section.model_copy(update={"divergence_weight": 0.0, "ce_weight": 1.0})
        return student, replace(student, role="control", section=text_alone)

    @property
    def targets(self) -> Targets:
        return Targets(
            teacher=self.config.teacher,
            store=self.store,
            chunks=self.chunks,
            item_of=self.item,
            reads=read_from(self.sources.train),
            window_chunks=self.window_chunks,
            cache_dir=self.cache_dir,
        )

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(
            self.config.teacher, self.jobs, self.config.evaluate, self.sources.heldout
        )

    @property
    def request(self) -> Request:
        # the values of the journal's `start` event that the plan knows; an attempt sets the others
        config, student, corpus = self.config, self.config.student, self.sources.train
        parts = self.sources.parts
        start = StartEvent(
            attempt=0,
            command="",
            versions={},
            teacher=config.teacher.scored_by,
            student=student.model,
            recipe_fingerprint=self.recipe.fingerprint,
            num_chunks=len(self.chunks),
            num_sequences=corpus.num_sequences,
            sequence_length=corpus.sequence_length,
            num_targets=corpus.num_targets,
            bytes_per_token=self.recipe.spec.bytes_per_token,
            num_draws=self.recipe.num_draws,
            vocab_size=self.recipe.vocab_size,
            k=self.recipe.k,
            world_size=student.num_workers,
            zero_stage=student.chosen_stage,
            num_teachers=config.teacher.max_replicas,
            total_steps=self.total_steps,
            control=config.evaluate.control,
            learning_rate=student.learning_rate,
            min_learning_rate=student.min_learning_rate,
            warmup_steps=student.warmup_steps,
            epochs=student.epochs,
            max_steps=student.max_steps,
            schedule=student.schedule,
            decay_steps=decay_steps_of(student, total_steps=self.total_steps)
            if student.schedule == "wsd"
            else None,
            loss_constant=has_loss_constant(student, self.recipe.spec),
            corpus_targets={part.name: part.num_targets for part in parts},
            bad_rows={part.name: len(bad) for part in parts if (bad := part.account.bad_rows)},
        )
        return Request(self.run_dir, config, self.recipe, self.store, self.chunks, start, parts)


def require_full_step(wanted: int, *, there: int) -> None:
    """Raise ConfigError where one optimiser step asks for more sequences than the corpus has."""
    if wanted > there:
        raise ConfigError(
            f"student.global_batch_sequences is {wanted:,}, but the corpus has {there:,} "
            "sequences to train on;"
            f" set it to {there:,} or less, or give more documents"
        )


def require_heldout(source: SequenceSource) -> None:
    """Raise ConfigError where there is no held-out text to score a model on."""
    if source.num_sequences == 0 or source.num_targets == 0:
        raise ConfigError(
            f"the held-out text has {source.num_sequences:,} sequences and {source.num_targets:,} "
            "target tokens, wanted at least one of each: models are scored on it; let "
            "corpus.source set some sequences apart"
        )
