"""A student as a plain module whose forward holds the whole loss, wrapped in a ZeRO engine.

Gradients are normalised by the GLOBAL number of target tokens of the step, so that they do not
depend on how the batch was cut into ranks and micro-batches. Shapes: B sequences, L positions, T
target tokens, H hidden, V vocabulary.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.checkpoint.manifest import Commit
from stillhouse.checkpoint.restore import Restored
from stillhouse.checkpoint.snapshot import HostMemory, Snapshot
from stillhouse.checkpoint.unpickling import only_tensors, opened
from stillhouse.config import StudentSection
from stillhouse.errors import CheckpointError, StudentError
from stillhouse.logits import Head
from stillhouse.losses.distillation import LossTerms, distillation_loss
from stillhouse.losses.divergences import Divergence, divergence_named
from stillhouse.models import head_of
from stillhouse.models.batch import hidden_at
from stillhouse.student import _deepspeed_compat
from stillhouse.student.loader import MicroBatch

_WHOLE_MODULE = "mp_rank_00_model_states.pt"  # up to stage 2


@dataclass(frozen=True, slots=True)
class StepTerms:
    """One optimiser step, over all ranks: means per target token, in nats."""

    loss: float
    divergence: float | None  # None where it has no weight
    cross_entropy: float | None  # likewise
    z_loss: float | None  # likewise; nats squared
    num_tokens: int
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Means:
    """What the micro-batches of all ranks come to: means per target token, in nats, and the number
    of tokens."""

    total: float
    divergence: float
    cross_entropy: float
    z_loss: float
    num_tokens: int


class DistillationHead(nn.Module):
    """The LM head and the loss as one submodule that owns the shared weight: under ZeRO-3 it is
    gathered once, here."""

    def __init__(
        self, head: Head, weight: nn.Parameter, bias: nn.Parameter | None, section: StudentSection
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self._shape = replace(head, weight_VH=torch.empty(0), bias_V=None)
        self._vocab_size = head.vocab_size
        self._divergence: Divergence = divergence_named(section.divergence, section.mix)
        self._section = section

    def forward(self, hidden_TH: Tensor, batch: MicroBatch) -> LossTerms:
        bias_V = None if self.bias is None else _first_rows(self.bias, self._vocab_size)
        head = replace(
            self._shape, weight_VH=_first_rows(self.weight, self._vocab_size), bias_V=bias_V
        )
        return distillation_loss(
            hidden_TH,
            head,
            batch.target,
            divergence=self._divergence,
            labels_T=batch.tokens.labels_T,
            ce_weight=self._section.ce_weight,
            divergence_weight=self._section.divergence_weight,
            z_loss_weight=self._section.z_loss_weight,
            block_tokens=self._section.block_tokens,
        )


class StudentModule(nn.Module):
    """A causal LM from token ids to loss terms; only positions that have a target reach the
    head."""

    def __init__(self, lm: PreTrainedModel, *, section: StudentSection, vocab_size: int):
        super().__init__()
        self.lm = lm
        output = lm.get_output_embeddings()
        self.head = DistillationHead(
            head_of(lm, vocab_size=vocab_size),
            output.weight,
            getattr(output, "bias", None),
            section,
        )

    def forward(self, batch: MicroBatch) -> LossTerms:
        terms: LossTerms = self.head(hidden_at(self.lm, batch.tokens), batch)
        return terms


class StudentEngine:
    """A student under ZeRO. The process group must exist; every rank calls every method in the same
    order."""

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        section: StudentSection,
        vocab_size: int,
        num_micro_batches: int,
        device: torch.device,
    ):
        self.section = section
        self.device = device
        self.num_micro_batches = num_micro_batches
        self._world_size = dist.get_world_size()
        if section.activation_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
        module = StudentModule(lm, section=section, vocab_size=vocab_size)
        self._engine = _deepspeed_compat.initialize(
            model=module,
            model_parameters=_parameter_groups(module, section.weight_decay),
            config=_deepspeed_config(section, num_micro_batches),
            dist_init_required=False,
        )
        self._copies = _HostCopies(device)
        # nothing that could be run goes into a checkpoint
        _deepspeed_compat.save_through(self._engine, self._copies)

    def train_step(self, batches: Sequence[MicroBatch], *, learning_rate: float) -> StepTerms:
        """Forward, backward and step over this rank's micro-batches; every rank has
        `num_micro_batches` of them.

        Raises StudentError on every rank when a loss or gradient is not finite: the weights are
        then as before the step, or unusable.
        """
        means = self.accumulate(batches)
        _require_finite("loss", means.total)
        grad_norm = self._optimiser_step(learning_rate)
        return StepTerms(
            means.total,
            means.divergence if self.section.divergence_weight > 0 else None,
            means.cross_entropy if self.section.ce_weight > 0 else None,
            means.z_loss if self.section.z_loss_weight > 0 else None,
            means.num_tokens,
            grad_norm,
        )

    def accumulate(self, batches: Sequence[MicroBatch]) -> Means:
        """Forward and backward over the micro-batches, up to the step."""
        num_tokens = self._sum_over_ranks(
            [float(sum(batch.tokens.num_targets for batch in batches))]
        )[0]
        # DeepSpeed averages over ranks; this makes it the mean over all tokens
        share = self._world_size / max(num_tokens, 1.0)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            if index > 0:
                self._engine.step()
            terms: LossTerms = self._engine(batch.to(self.device))
            sums += (
                torch.stack([terms.total, terms.divergence, terms.cross_entropy, terms.z_loss])
                .detach()
                .double()
            )
            self._engine.backward(terms.total * share, scale_wrt_gas=False)
        total, divergence, cross_entropy, z_loss = (
            value / max(num_tokens, 1.0) for value in self._sum_over_ranks(sums.tolist())
        )
        return Means(total, divergence, cross_entropy, z_loss, int(num_tokens))

    def snapshot(self, step: int) -> Snapshot:
        """This rank's part of a checkpoint after `step` optimiser steps, copied to host memory;
        training may go on when this returns."""
        began = monotonic()
        self._engine.save_checkpoint(
            "snapshot", tag=str(step), client_state={"step": step}, save_latest=False
        )
        files, release = self._copies.taken()
        return Snapshot(step, files, began, monotonic() - began, release)

    def load(self, found: Restored) -> None:
        """Load weights and optimiser of a checkpoint, as it is or universal. Raises CheckpointError
        where its files hold anything else."""
        with only_tensors():
            is_there = _deepspeed_compat.load(self._engine, found.folder, universal=found.universal)
        if not is_there:
            raise CheckpointError(
                f"DeepSpeed found nothing to load in {found.folder}; remove that checkpoint's "
                "manifest to use an older one"
            )

    @property
    def inner(self) -> Any:
        """DeepSpeed's own engine, to be measured beside."""
        return self._engine

    def full_gradients(self) -> dict[str, Tensor]:
        """The whole gradient of each parameter of the language model as the next step will see it,
        by name; after `accumulate`."""
        return {
            name: safe_get_full_grad(parameter).clone()
            for name, parameter in self._engine.module.lm.named_parameters()
        }

    def close(self) -> None:
        """Free hooks and buffers, so that the process can build another engine."""
        self._engine.destroy()

    def _optimiser_step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        plain = self.section.zero_stage == 0
        # plain DDP clips without telling the norm, and writes NaN into the weights: look before the
        # step
        if plain:
            norm = math.sqrt(
                sum(
                    p.grad.double().square().sum().item()
                    for p in self._engine.module.parameters()
                    if p.grad is not None
                )
            )
            _require_finite("gradient", norm)
        skipped = self._engine.skipped_steps
        self._engine.step()
        if not plain:
            norm = float(self._engine.get_global_grad_norm())
            _require_finite("gradient", norm)
        if self._engine.skipped_steps != skipped:
            raise StudentError("DeepSpeed skipped an optimiser step because a gradient overflowed")
        return norm

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()


def learning_rate_at(step: int, *, section: StudentSection, total_steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from `learning_rate` to `min_learning_rate`
    at `total_steps`."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, total_steps - section.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return section.min_learning_rate + (section.learning_rate - section.min_learning_rate) * cosine


def weight_files(commit: Commit) -> Iterable[str]:
    """The files that `consolidated_weights` reads."""
    return commit.files if commit.origin.zero_stage == 3 else (_WHOLE_MODULE,)


def consolidated_weights(folder: Path, *, zero_stage: int) -> dict[str, Tensor]:
    """The plain state dict of the language model in a checkpoint's folder, in its training dtype or
    float32; Hugging Face's names.

    Raises CheckpointError where its files hold anything else.
    """
    try:
        if zero_stage == 3:
            with only_tensors(), redirect_stdout(io.StringIO()):  # it reports each of its steps
                weights = get_fp32_state_dict_from_zero_checkpoint(
                    str(folder.parent), tag=folder.name
                )
        else:  # up to stage 2 rank 0 saves the whole module
            weights = opened(folder / _WHOLE_MODULE)["module"]
        return {
            name.removeprefix("lm."): value
            for name, value in weights.items()
            if name.startswith("lm.")
        }
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint in {folder} does not hold a model's weights ({error!r}); remove its "
            "manifest to use an older one"
        ) from error


class _HostCopies(CheckpointEngine):
    """What DeepSpeed writes a checkpoint with: it writes nothing, and keeps copies by file name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._memory = HostMemory(device)
        self._files: dict[str, Any] = {}
        self._releases: list[Callable[[], None]] = []

    def taken(self) -> tuple[dict[str, Any], Callable[[], None]]:
        """The files since the last call, when their tensors are there, and what gives their memory
        back."""
        self._memory.settle()
        files, releases = self._files, self._releases
        self._files, self._releases = {}, []

        def release() -> None:
            for give_back in releases:
                give_back()

        return files, release

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        name = Path(path).name
        self._files[name], release = self._memory.snapshot_of(name, state_dict)
        self._releases.append(release)

    def load(self, path: str, map_location: Any = None) -> Any:
        return opened(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return bool(info.tag)


def _first_rows(parameter: nn.Parameter, num_rows: int) -> Tensor:
    """The parameter itself where it has no more: the gradient of a slice would be copied into one
    of the whole."""
    return parameter if parameter.shape[0] == num_rows else parameter[:num_rows]


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; gains and biases do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _deepspeed_config(section: StudentSection, num_micro_batches: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": section.micro_batch_sequences,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": section.gradient_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": section.learning_rate,
                "betas": list(section.betas),
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": section.zero_stage},
        "checkpoint": {"tag_validation": "Ignore"},  # no one else chooses tags
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if section.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # 64 bf16 accumulations lose 25 times the precision
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise StudentError(f"the {what} is {value}")
