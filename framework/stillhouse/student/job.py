"""A training job as a value: all that every rank of one student receives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.checkpoint.manifest import Origin
from stillhouse.config import StudentSection
from stillhouse.losses.divergences import divergence_identity
from stillhouse.store import Consumer, Recipe
from stillhouse.store.consumers import consumer_name
from stillhouse.student.order import Order

# The settings of a student that decide its weights: with another value, the same steps lead to
# other weights. A schedule may change on the way.
_DECIDE_WEIGHTS = (
    *("revision", "dtype", "init", "seed", "global_batch_sequences", "shuffle_window_chunks"),
    *("weight_decay", "betas", "gradient_clip"),
    *("divergence", "divergence_weight", "mix", "ce_weight", "z_loss_weight"),
)


@dataclass(frozen=True, slots=True)
class HeldoutPlan:
    """When students are scored while they learn, and beside what: see `student.heldout`."""

    every_steps: int
    key: str  # of the teacher's part, under the root of the checkpoints
    block_tokens: int  # whose two dense distributions are in memory at one time
    patience: int = 0  # scores in a row without a lower KL that end a training; 0: none do
    keep_best: bool = False  # whether the checkpoint with the lowest KL is kept

    def is_due(self, num_steps: int, *, total_steps: int) -> bool:
        """Whether to score after `num_steps` steps; also before the first, and after the last."""
        return num_steps % self.every_steps == 0 or num_steps == total_steps

    @property
    def decides(self) -> bool:
        """Whether anything follows from the scores."""
        return self.patience > 0 or self.keep_best

    def history_key(self, role: str) -> str:
        """The key of a role's scores so far, beside the teacher's part: see `student.best`."""
        return f"{self.key.removesuffix('.safetensors')}-{role}.json"


@dataclass(frozen=True, slots=True)
class TrainJob:
    """The training of one student."""

    role: Literal["student", "control"]
    section: StudentSection
    recipe: Recipe
    store_url: str
    run_dir: Path
    total_steps: int
    # of the command that owns `checkpoints_root` (see checkpoint.fence); None: owned by none, as in
    # a bench
    owner: int | None = None
    heldout: HeldoutPlan | None = None  # None: it is not scored while it learns

    @property
    def checkpoints_root(self) -> str:
        """The URL under which all roles commit. One command owns it."""
        return checkpoints_root_of(self.section, self.run_dir)

    @property
    def checkpoints(self) -> str:
        """The URL under which this role commits."""
        return f"{self.checkpoints_root}/{self.role}"

    @property
    def origin(self) -> Origin:
        """What its checkpoints are of."""
        values = self.section.model_dump(mode="json")
        settings = {name: values[name] for name in _DECIDE_WEIGHTS}
        settings["model"] = Path(self.section.model).name
        settings["divergence"] = divergence_identity(self.section.divergence)
        if self.section.forward_kl_steps:  # left out at 0: checkpoints from before it was known
            settings["forward_kl_steps"] = self.section.forward_kl_steps
        if self.section.lora is not None:
            lora = values["lora"]
            if lora["quantise"] == "none":
                del lora["quantise"]
            settings["lora"] = lora
        if self.section.freeze:
            settings["freeze"] = values["freeze"]
        if self.section.optimiser != "adamw":
            settings["optimiser"] = self.section.optimiser
        if self.section.offload == "nvme":  # its states are in smaller groups
            settings["offload"] = self.section.offload
        return Origin(self.section.chosen_stage, self.recipe.fingerprint, settings)

    @property
    def journal(self) -> Path:
        return self.run_dir / "journal.jsonl"

    @property
    def order(self) -> Order:
        return order_of(self.section, self.recipe)

    def consumer(self, committed_step: int) -> Consumer:
        """This student as a consumer of the store, after a commit of `committed_step` steps."""
        return Consumer(
            name=consumer_name(resume_location(self.section, self.run_dir), self.role),
            global_batch_sequences=self.section.global_batch_sequences,
            seed=self.section.seed,
            window_chunks=self.section.shuffle_window_chunks,
            total_steps=self.total_steps,
            committed_step=committed_step,
        )

    def is_checkpoint_due(self, num_steps: int, *, last: int, is_busy: bool) -> bool:
        """Whether to begin a checkpoint after `num_steps` steps, when the last one is of `last`.

        After the last step of all, always. Else once in every `checkpoint_every_steps`, as soon as
        no rank is busy writing an earlier one.
        """
        every = self.section.checkpoint_every_steps
        has_passed_one = num_steps // every > last // every
        return num_steps == self.total_steps or (has_passed_one and not is_busy)


def checkpoints_root_of(section: StudentSection, run_dir: Path) -> str:
    """The URL under which all roles of a run commit."""
    if section.checkpoint_url is None:
        return str(run_dir / "checkpoints")
    return section.checkpoint_url.rstrip("/")


def resume_location(section: StudentSection, run_dir: Path) -> str:
    """What a run and the run that goes on from its checkpoints, from whatever directory, have in
    common: `checkpoint_url`, or else the run directory."""
    return str(run_dir) if section.checkpoint_url is None else section.checkpoint_url.rstrip("/")


def order_of(reads: StudentSection | Consumer, recipe: Recipe) -> Order:
    """The order in which a student, given by its section or as a consumer, reads the recipe's
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
