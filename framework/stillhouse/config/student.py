"""The section [student]: where it begins, what of it is trained and how, and its checkpoints."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stillhouse import suggestions
from stillhouse.config.fields import (
    DIVERGENCES,
    TABLE,
    WORD,
    BatchSize,
    Beta,
    BlockSize,
    Count,
    CountOrZero,
    Fraction,
    LearningRate,
    LossWeight,
    Name,
    NumProcesses,
    Seconds,
    Seed,
    shown,
)
from stillhouse.config.models import ModelSection
from stillhouse.config.weights import CutSection, LoraSection
from stillhouse.extension import is_extension


def _init_is(value: object) -> str:
    return TABLE if isinstance(value, dict | CutSection) else WORD


class StudentSection(ModelSection):
    """The student, its ranks, its loss, its optimiser and its checkpoints."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="number format of weights and activations; the optimiser is in float32",
    )
    init: Annotated[
        Annotated[Literal["weights", "config"], Tag(WORD)] | Annotated[CutSection, Tag(TABLE)],
        Discriminator(_init_is),
    ] = Field(
        "weights",
        description="weights: start from the model's weights; config: from random ones of its "
        "config; { layers = [0, 2, 4] }: from these layers of the model, such as the teacher, and "
        "all that is outside of its layers; with intermediate_size = 1024, of narrower MLPs",
    )
    lora: LoraSection | None = Field(
        None,
        description="train low-rank adapters beside frozen weights, for much less memory; {} takes "
        "the defaults: rank 16, alpha 32, all linear layers but the head; needs the extra 'lora'",
    )
    freeze: tuple[Name, ...] = Field(
        (),
        description="names of weights that are not trained, as patterns: 'model.embed_tokens*'; * "
        "stands for any text",
    )
    tokenizer: Name | None = Field(
        None,
        description="a hub name or a local directory; none: the tokenizer saved with the model",
    )
    num_workers: NumProcesses = Field(1, description="ranks, one to a device")
    min_workers: NumProcesses | None = Field(
        None,
        description="the fewest ranks to train with while machines are lost; none: num_workers",
    )
    max_failures: CountOrZero = Field(
        3, description="losses of ranks in a row, without a new checkpoint, before the run fails"
    )
    watchdog_s: Seconds = Field(
        300.0,
        description="seconds without progress after which a rank is named, killed and replaced",
    )
    regroup_s: Seconds = Field(
        60.0, description="seconds between attempts to bring back ranks that were lost"
    )
    zero_stage: Literal[0, 1, 2, 3, "auto"] = Field(
        "auto",
        description="what DeepSpeed ZeRO divides among the ranks: 0 nothing, 1 Adam's states, 2 "
        "gradients too, 3 weights too; auto: the lowest from 1 that fits into 80 % of "
        "gpu_memory_gb, 1 without gpu_memory_gb, and in a resume that of before",
    )
    overlap_comm: bool | None = Field(
        None,
        description="reduce gradients among the ranks while the backward pass goes on; none: "
        "DeepSpeed's choice, which is true with zero_stage = 3 alone",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu: Adam's states, and its step, in the host's memory: 4 bytes a parameter "
        "are left on a GPU of one rank; needs zero_stage 2 or 3; nvme: those states on a disk, in "
        "offload_path; needs zero_stage 3",
    )
    offload_path: Name | None = Field(
        None,
        description="with nvme, a directory on a local disk of each machine: 16 bytes for each "
        "parameter of its ranks, and 12 more while a checkpoint is written",
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass: less memory, a third more "
        "time",
    )
    activation_checkpointing_every: Count = Field(
        1,
        description="with activation_checkpointing, the layers of which one is computed again: 2 "
        "for every other layer, which saves half the memory for half the time",
    )
    liger: bool = Field(
        False,
        description="Liger's kernels for norms, rotary positions and gated MLPs, on a GPU; needs "
        "the extra 'liger'",
    )
    compile: bool = Field(
        False,
        description="compile the layers when a rank starts (torch.compile), which takes minutes "
        "and saves passes over memory; with zero_stage 0, 1 or 2, without "
        "activation_checkpointing",
    )
    global_batch_sequences: BatchSize = Field(
        64, description="sequences in one optimiser step, over all ranks"
    )
    micro_batch_sequences: BatchSize = Field(
        4, description="sequences in one forward pass of one rank"
    )
    block_tokens: BlockSize | None = Field(
        None,
        description="tokens whose logits are in memory at one time; none: chosen for the device",
    )
    epochs: Count = Field(1, description="passes over the training sequences")
    max_steps: Count | None = Field(
        None, description="optimiser steps after which training ends; none: all epochs"
    )
    learning_rate: LearningRate = Field(
        1e-4, description="peak learning rate of AdamW, reached after the warm-up"
    )
    min_learning_rate: Fraction = Field(0.0, description="learning rate at the end of the schedule")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine",
        description="how the learning rate falls after the warm-up: by a cosine, by a line, or wsd "
        "(warm-up, stable, decay): not before the last decay_steps, and then by a line",
    )
    decay_steps: Count | None = Field(
        None, description="optimiser steps of the decay of wsd; none: a tenth of all"
    )
    warmup_steps: CountOrZero = Field(
        100, description="optimiser steps of linear warm-up, before the schedule begins"
    )
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = Field(
        0.1, description="AdamW's weight decay, of matrices only"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's beta1 and beta2")
    optimiser: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw_8bit: both of AdamW's states in 8 bits, for 6 bytes a parameter less; "
        "needs the extra 'bits', and as many ranks at the end as at the beginning",
    )
    fused_adamw: bool = Field(
        False, description="AdamW's step in one kernel: faster, and rounded in another way"
    )
    gradient_clip: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="L2 norm to which the gradient of a step is clipped; 1e30 never clips"
    )
    divergence: str = Field(
        "forward_kl",
        description="the loss: forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, "
        "tvd, or 'package.module:name', a Divergence of your own; forward_kl is unbiased with "
        "draws, the others with weighted draws, and else they see the tail as one bucket and need "
        "entries that hold 80 % of the mass",
    )
    forward_kl_steps: CountOrZero = Field(
        0,
        description="optimiser steps on forward_kl before divergence begins, for a student that is "
        "far from its teacher: there reverse_kl and jsd are noisy; 0: divergence from the first",
    )
    tail_as_bucket: bool = Field(
        False,
        description="train on one bucket for the tail however little mass the entries hold; "
        "forward_kl never needs this",
    )
    divergence_weight: Fraction = Field(
        1.0, description="weight of the divergence; 0 trains on the text alone"
    )
    mix: Fraction = Field(
        0.5,
        description="beta of jsd, alpha of the skewed divergences; unused by the others",
    )
    ce_weight: LossWeight = Field(
        0.0, description="weight of the cross-entropy to the text's next token"
    )
    z_loss_weight: LossWeight = Field(
        0.0,
        description="weight of the squared log-sum-exp of the logits, which keeps them from "
        "drifting; PaLM took 1e-4",
    )
    seed: Seed = Field(0, description="seed of the training order and of random weights")
    shuffle_window_chunks: Count = Field(
        4, description="neighbouring chunks among which sequences are mixed"
    )
    checkpoint_every_steps: Count = Field(200, description="optimiser steps between checkpoints")
    keep_checkpoints: Count = Field(2, description="newest checkpoints to keep")
    checkpoint_url: str | None = Field(
        None,
        description="none: in the run directory; or a directory or s3://, gs:// or az:// that "
        "outlives every machine",
    )
    prefetch_batches: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        4, description="batches that the loader reads ahead"
    )

    @field_validator("divergence")
    @classmethod
    def _is_a_divergence(cls, name: str) -> str:
        if name in DIVERGENCES or is_extension(name):
            return name
        raise ValueError(
            f"wanted {', '.join(DIVERGENCES)}, or 'package.module:name' of your own; found "
            f"{shown(name)}{suggestions.value(name, DIVERGENCES)}"
        )

    @model_validator(mode="after")
    def _losses_go_together(self) -> "StudentSection":
        if self.divergence_weight == 0.0 and self.ce_weight == 0.0:
            raise ValueError(
                "divergence_weight and ce_weight are both 0: the student would learn nothing; set "
                "one of them above 0"
            )
        if self.forward_kl_steps and self.divergence == "forward_kl":
            raise ValueError(
                f"forward_kl_steps is {self.forward_kl_steps}, and divergence is forward_kl "
                "already; leave forward_kl_steps out, or name the divergence that follows"
            )
        if self.forward_kl_steps and self.divergence_weight == 0.0:
            raise ValueError(
                f"forward_kl_steps is {self.forward_kl_steps}, but divergence_weight is 0: no "
                "divergence is trained on; leave one of them out"
            )
        needs_mix = self.divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl")
        if needs_mix and not 0.0 < self.mix < 1.0:
            raise ValueError(
                f"mix is {self.mix}, but {self.divergence} wants it strictly between 0 and 1"
            )
        return self

    @model_validator(mode="after")
    def _beginning_and_trained_part_go_together(self) -> "StudentSection":
        if isinstance(self.init, CutSection) and self.trust_remote_code:
            raise ValueError(
                "init.layers cuts a model of Transformers' own; leave trust_remote_code out, or "
                'set init = "weights"'
            )
        if self.lora is not None and self.init == "config":
            raise ValueError(
                'init is "config", and lora trains adapters beside weights that would stay '
                'random; set init = "weights", or leave lora out'
            )
        if self.lora is not None and self.freeze:
            raise ValueError(
                "freeze and lora are both set, and lora freezes every weight of the model already; "
                "leave freeze out, and choose what is adapted by lora.targets"
            )
        return self

    @model_validator(mode="after")
    def _optimiser_and_ranks_go_together(self) -> "StudentSection":
        _require_possible_optimiser(self)
        _require_possible_ranks(self)
        return self

    @property
    def chosen_stage(self) -> int:
        """`zero_stage`. A plan makes a number of "auto", by the memory of a GPU where that is
        known; where it is not, this is the lowest that "auto" can be."""
        if self.zero_stage != "auto":
            return self.zero_stage
        return {"none": 1, "cpu": 2, "nvme": 3}[self.offload]


def _require_possible_optimiser(section: StudentSection) -> None:
    # its schedule, and where its states are
    if section.decay_steps is not None and section.schedule != "wsd":
        raise ValueError(
            f'decay_steps is {section.decay_steps}, but schedule is "{section.schedule}", which '
            'falls from the warm-up on; leave decay_steps out, or set schedule = "wsd"'
        )
    if section.offload == "cpu" and section.zero_stage in (0, 1):
        raise ValueError(
            f'offload is "cpu", which needs zero_stage 2 or 3; zero_stage is {section.zero_stage}'
        )
    _require_possible_swapping(section)
    if section.activation_checkpointing_every > 1 and not section.activation_checkpointing:
        raise ValueError(
            f"activation_checkpointing_every is {section.activation_checkpointing_every}, but "
            "activation_checkpointing is false: nothing is computed again; set it to true"
        )
    # states in 8 bits
    is_8bit, fewest = section.optimiser == "adamw_8bit", section.min_workers
    if is_8bit and (section.fused_adamw or section.offload != "none"):
        setting = "fused_adamw = true" if section.fused_adamw else f'offload = "{section.offload}"'
        raise ValueError(
            f'{setting} is a form of the optimiser "adamw"; leave it out, or set optimiser = '
            '"adamw"'
        )
    is_cut = section.zero_stage != 0 and fewest is not None and fewest < section.num_workers
    if is_8bit and is_cut:
        raise ValueError(
            f"min_workers is {fewest}, below num_workers, which is "
            f'{section.num_workers}, but the states of the optimiser "adamw_8bit" cannot be cut '
            'for fewer ranks; leave min_workers out, or set optimiser = "adamw"'
        )


def _require_possible_swapping(section: StudentSection) -> None:
    is_swapped, path = section.offload == "nvme", section.offload_path
    if is_swapped != (path is not None):
        raise ValueError(
            'offload is "nvme", and offload_path is not set; name a directory on a local disk'
            if is_swapped
            else f'offload_path is {path!r}, but offload is "{section.offload}"; leave it out, or '
            'set offload = "nvme"'
        )
    if path is not None and not path.startswith(("/", "~")):
        raise ValueError(
            f"offload_path is {path!r}, which is relative, and ranks run in directories of their "
            "own; give it from / on"
        )
    if is_swapped and section.zero_stage not in (3, "auto"):
        raise ValueError(
            f'offload is "nvme", which needs zero_stage 3; zero_stage is {section.zero_stage}'
        )


def _require_possible_ranks(section: StudentSection) -> None:
    # weights that cannot be divided, and layers that cannot be compiled
    quantise = "none" if section.lora is None else section.lora.quantise
    if quantise != "none" and (section.zero_stage == 3 or section.offload == "nvme"):
        found = "zero_stage is 3" if section.zero_stage == 3 else 'offload is "nvme"'
        raise ValueError(
            f'lora.quantise is "{quantise}", and {found}, but stage 3 cannot divide quantised '
            "weights among the ranks; set zero_stage = 2 without it, or leave lora.quantise out"
        )
    if section.compile and (section.zero_stage == 3 or section.offload == "nvme"):
        found = "zero_stage is 3" if section.zero_stage == 3 else 'offload is "nvme"'
        raise ValueError(
            f"compile is true, and {found}, but the weights that stage 3 gathers for each layer "
            "cannot be compiled; set zero_stage = 2 without it, or leave compile out"
        )
    if section.compile and section.activation_checkpointing:
        raise ValueError(
            "compile and activation_checkpointing are both true, but a layer that is computed "
            "again cannot be compiled; leave one of them out"
        )
    # devices, and how many ranks there are
    if section.liger and section.device == "cpu":
        raise ValueError(
            'liger is true, but device is "cpu", for which its kernels are not compiled; leave '
            "liger out, or train on a GPU"
        )
    if section.zero_stage == 0 and section.dtype == "bfloat16":
        raise ValueError(
            'DeepSpeed trains bfloat16 only with ZeRO; set zero_stage = 1, or dtype = "float32"'
        )
    if section.min_workers is not None and section.min_workers > section.num_workers:
        raise ValueError(
            f"min_workers is {section.min_workers}, above num_workers, which is "
            f"{section.num_workers}"
        )
