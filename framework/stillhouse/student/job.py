"""A training job as a value: what every rank of one student receives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.checkpoint.manifest import Origin
from stillhouse.config import StudentSection
from stillhouse.losses.divergences import divergence_identity
from stillhouse.store import Consumer, Recipe
from stillhouse.store.consumers import consumer_name
from stillhouse.student.order import Order

# Of the student's settings, those without which the same steps would lead to other weights; a
# schedule may change on the way.
_DECIDE_WEIGHTS = (
    *("revision", "dtype", "init", "seed", "global_batch_sequences", "shuffle_window_chunks"),
    *("weight_decay", "betas", "gradient_clip"),
    *("divergence", "divergence_weight", "mix", "ce_weight", "z_loss_weight"),
)


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One student's training, as every rank of it receives it."""

    role: Literal["student", "control"]
    section: StudentSection
    recipe: Recipe
    store_url: str
    run_dir: Path
    total_steps: int
    owner: int | None = (
        # the number under which its command owns the place of checkpoints; None: no command does,
        # as in a bench
        None
    )

    @property
    def place(self) -> str:
        """The URL under which the commits of all roles are; one command owns it."""
        return place_of_checkpoints(self.section, self.run_dir)

    @property
    def checkpoints(self) -> str:
        """The URL under which its commits are."""
        return f"{self.place}/{self.role}"

    @property
    def origin(self) -> Origin:
        """What its checkpoints are of."""
        values = self.section.model_dump(mode="json")
        settings = {name: values[name] for name in _DECIDE_WEIGHTS} | {
            "model": Path(self.section.model).name
        }
        settings["divergence"] = divergence_identity(self.section.divergence)
        return Origin(self.section.zero_stage, self.recipe.fingerprint, settings)

    @property
    def journal(self) -> Path:
        return self.run_dir / "journal.jsonl"

    @property
    def order(self) -> Order:
        return order_of(self.section, self.recipe)

    def reader(self, committed_step: int) -> Consumer:
        """This student as a reader of the store, once `committed_step` steps are safe in a
        checkpoint."""
        return Consumer(
            name=consumer_name(resume_location(self.section, self.run_dir), self.role),
            global_batch_sequences=self.section.global_batch_sequences,
            seed=self.section.seed,
            window_chunks=self.section.shuffle_window_chunks,
            total_steps=self.total_steps,
            committed_step=committed_step,
        )


def place_of_checkpoints(section: StudentSection, run_dir: Path) -> str:
    """Where the commits of all roles of a run are."""
    return (
        str(run_dir / "checkpoints")
        if section.checkpoint_url is None
        else section.checkpoint_url.rstrip("/")
    )


def resume_location(section: StudentSection, run_dir: Path) -> str:
    """What a run has in common with the one that goes on with it, wherever that is: the place of
    its checkpoints."""
    return str(run_dir) if section.checkpoint_url is None else section.checkpoint_url.rstrip("/")


def order_of(reads: StudentSection | Consumer, recipe: Recipe) -> Order:
    """The order in which a student of this section, or any registered reader, reads the recipe's
    sequences."""
    return Order(
        num_sequences=recipe.num_sequences,
        chunk_sequences=recipe.chunk_sequences,
        global_batch_sequences=reads.global_batch_sequences,
        seed=reads.seed,
        window_chunks=reads.window_chunks
        if isinstance(reads, Consumer)
        else reads.shuffle_window_chunks,
    )
