"""A student module under DeepSpeed ZeRO: optimiser steps, gradients and snapshots.

Gradients are normalised by the GLOBAL number of target tokens of the step, so that they do not
depend on how its batch is cut into ranks and micro-batches.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.checkpoint.restore import Restored
from stillhouse.checkpoint.snapshot import HostMemory, OnDisk, Snapshot
from stillhouse.checkpoint.unpickling import only_tensors, opened
from stillhouse.config import StudentSection
from stillhouse.errors import CheckpointError, StudentError
from stillhouse.losses.distillation import LossTerms
from stillhouse.losses.score import Scores, no_sums, scores_of
from stillhouse.models.compiling import check_compiled, compile_layers
from stillhouse.student import _deepspeed_compat
from stillhouse.student.adapters import FROZEN, frozen_digest, require_same_frozen
from stillhouse.student.heldout import HeldoutBatch
from stillhouse.student.liger import apply_liger
from stillhouse.student.loader import MicroBatch
from stillhouse.student.module import StudentModule, checkpoint_activations
from stillhouse.student.optimiser import (
    client_optimiser,
    deepspeed_config,
    parameter_groups,
    swap_folder,
)


@dataclass(frozen=True, slots=True)
class StepTerms:
    """One optimiser step over all ranks: means per target token, in nats. A term is None where its
    weight is 0."""

    loss: float  # the weighted sum of the terms
    divergence: float | None
    cross_entropy: float | None
    z_loss: float | None  # nats squared
    num_tokens: int
    max_log_ratio: float | None = None  # of a weighted draw: see `TrainEvent`
    max_draw_mass: float | None = None
    grad_norm: float = math.nan  # before clipping; NaN before the optimiser step


class StudentEngine:
    """A student under ZeRO. The process group must exist. All methods but `close` are collectives:
    every rank calls them in the same order."""

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
        self._world_size = dist.get_world_size()
        # the plain module
        if section.liger:
            apply_liger(lm, model=section.model, device=device)
        if section.activation_checkpointing:
            checkpoint_activations(lm, every=section.activation_checkpointing_every)
        if section.compile:
            compile_layers(lm)
        lm.train()
        self._frozen_digest = frozen_digest(lm)
        module = StudentModule(lm, section=section, vocab_size=vocab_size)
        # ZeRO round it; no code goes into its checkpoints
        self._swap_folder = ExitStack()
        self._engine = _deepspeed_compat.initialize(
            model=module,
            optimizer=client_optimiser(section),
            model_parameters=parameter_groups(module, section.weight_decay),
            config=deepspeed_config(
                self._with_swap_folder(section), num_micro_batches, device=device
            ),
            dist_init_required=False,
        )
        if section.compile:
            check_compiled(lm.eval(), vocab_size=vocab_size)
            lm.train()
        if section.offload == "nvme":
            _deepspeed_compat.forget_swap_folder(self._engine)
        self._copies = _HostCopies(device, maps_files=section.offload == "nvme")
        _deepspeed_compat.save_through(self._engine, self._copies)

    def train_step(
        self, batches: Sequence[MicroBatch], *, step: int, learning_rate: float
    ) -> StepTerms:
        """Forward, backward and optimiser step over this rank's micro-batches, of which every rank
        has `num_micro_batches`. `step`: the optimiser steps before it, which choose the divergence.

        Raises StudentError on every rank where a loss or gradient is not finite: the weights are
        then as before the step, or unusable.
        """
        terms = self.accumulate(batches, step=step)
        _require_finite("loss", terms.loss)
        return replace(terms, grad_norm=self._optimiser_step(learning_rate))

    def accumulate(self, batches: Sequence[MicroBatch], *, step: int) -> StepTerms:
        """Forward and backward over the micro-batches, without the optimiser step."""
        # DeepSpeed averages over ranks: this makes that the mean over all tokens
        own_tokens = float(sum(batch.tokens.num_targets for batch in batches))
        num_tokens = self._sum_over_ranks([own_tokens])[0]
        share = self._world_size / max(num_tokens, 1.0)
        # gradients add up in the engine
        sums_4 = torch.zeros(4, dtype=torch.float64, device=self.device)
        extremes_2 = sums_4[:2].clone()
        for index, batch in enumerate(batches):
            if index > 0:
                self._engine.step()  # ends a micro-batch; the optimiser steps at the last one
            terms: LossTerms = self._engine(batch.to(self.device), step=step)
            sums_4 += torch.stack(terms[:4]).detach().double()
            largest_2 = torch.stack([terms.max_logratio, terms.max_draw_mass])
            extremes_2 = extremes_2.maximum(largest_2.double())
            self._engine.backward(terms.total * share, scale_wrt_gas=False)
        # means over the tokens of all ranks
        loss, divergence, cross_entropy, z_loss = (
            value / max(num_tokens, 1.0) for value in self._sum_over_ranks(sums_4.tolist())
        )
        has_weights = self.section.divergence_weight > 0 and any(
            batch.target.draw_logprobs_TN is not None for batch in batches
        )
        if has_weights:
            dist.all_reduce(extremes_2, op=dist.ReduceOp.MAX)
        max_log_ratio, max_draw_mass = extremes_2.tolist() if has_weights else (None, None)
        return StepTerms(
            loss,
            divergence if self.section.divergence_weight > 0 else None,
            cross_entropy if self.section.ce_weight > 0 else None,
            z_loss if self.section.z_loss_weight > 0 else None,
            int(num_tokens),
            max_log_ratio,
            max_draw_mass,
        )

    def score(self, batches: Sequence[HeldoutBatch], *, step: int) -> Scores:
        """The scores over the batches of all ranks, of which every rank has as many, after `step`
        optimiser steps. Weights and gradients stay as they are; without dropout, no random number
        is drawn."""
        sums_X = no_sums(self.device)
        self._engine.eval()
        with torch.no_grad():
            for batch in batches:
                sums_X += self._engine(batch, step=step)
        self._engine.train()
        dist.all_reduce(sums_X)
        dist.broadcast(sums_X, src=0)  # ranks decide by it: not one bit may differ
        return scores_of(sums_X)

    def snapshot(self, step: int) -> Snapshot:
        """This rank's part of a checkpoint after `step` optimiser steps, copied to host memory;
        training may go on when this returns."""
        began = monotonic()
        state: dict[str, object] = {"step": step}
        if self._frozen_digest is not None:
            state[FROZEN] = self._frozen_digest
        self._copies.on_disk = _deepspeed_compat.swapped_states(self._engine)
        with _deepspeed_compat.as_if_in_memory(self._engine):
            self._engine.save_checkpoint(
                "snapshot",
                tag=str(step),
                client_state=state,
                save_latest=False,
                exclude_frozen_parameters=self._frozen_digest is not None,
            )
        files, release = self._copies.taken()
        return Snapshot(step, files, began, monotonic() - began, release)

    def load(self, found: Restored) -> None:
        """Load weights and optimiser state of a checkpoint, as it is or universal.

        Raises CheckpointError where its files hold anything else, or belong to other frozen
        weights.
        """
        with only_tensors():
            state = _deepspeed_compat.load(self._engine, found.folder, universal=found.universal)
        if state is None:
            raise CheckpointError(
                f"DeepSpeed found nothing to load in {found.folder}; remove that checkpoint's "
                "manifest to use an older one"
            )
        require_same_frozen(self._frozen_digest, wanted=state.get(FROZEN), model=self.section.model)

    @property
    def inner(self) -> Any:
        """DeepSpeed's own engine, for measurements."""
        return self._engine

    def full_gradients(self) -> dict[str, Tensor]:
        """The whole gradient of each parameter of the language model that is trained, as the next
        optimiser step will use it, by name; after `accumulate`."""
        return {
            name: safe_get_full_grad(parameter).clone()
            for name, parameter in self._engine.module.lm.named_parameters()
            if parameter.requires_grad
        }

    def close(self) -> None:
        """Free hooks and buffers, so that the process can build another engine."""
        self._engine.destroy()
        self._swap_folder.close()

    def _with_swap_folder(self, section: StudentSection) -> StudentSection:
        """The section, with a folder of this rank's own as the one for swapped states."""
        if section.offload != "nvme":
            return section
        _deepspeed_compat.load_async_io()
        folder = self._swap_folder.enter_context(swap_folder(section))
        return section.model_copy(update={"offload_path": str(folder)})

    def _optimiser_step(self, learning_rate: float) -> float:
        """Returns the gradient's norm."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # stage 0 gives no norm, and writes NaN into the weights: look before the step
        is_plain = self.section.chosen_stage == 0
        if is_plain:
            gradients = (parameter.grad for parameter in self._engine.module.parameters())
            squares = (g.double().square().sum().item() for g in gradients if g is not None)
            norm = math.sqrt(sum(squares))
            _require_finite("gradient", norm)
        # the step
        skipped = self._engine.skipped_steps
        self._engine.step()
        # the other stages have the norm afterwards
        if not is_plain:
            norm = float(self._engine.get_global_grad_norm())
            _require_finite("gradient", norm)
        if self._engine.skipped_steps != skipped:
            raise StudentError("DeepSpeed skipped an optimiser step because a gradient overflowed")
        return norm

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()


class _HostCopies(CheckpointEngine):
    """DeepSpeed's writer of checkpoint files. It writes nothing, and keeps copies in host memory,
    by file name."""

    def __init__(self, device: torch.device, *, maps_files: bool) -> None:
        """`maps_files`: whether tensors of a file are read as they are used, and not at once."""
        super().__init__()
        self.on_disk: dict[int, OnDisk] = {}
        self._maps_files = maps_files
        self._memory = HostMemory(device)
        self._files: dict[str, Any] = {}
        self._releases: list[Callable[[], None]] = []

    def taken(self) -> tuple[dict[str, Any], Callable[[], None]]:
        """The files since the last call, once their copies have arrived, and what releases their
        memory."""
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
        self._files[name], release = self._memory.snapshot_of(
            name, state_dict, on_disk=self.on_disk
        )
        self._releases.append(release)

    def load(self, path: str, map_location: Any = None) -> Any:
        return opened(path, map_location, mmap=self._maps_files)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return bool(info.tag)


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise StudentError(f"the {what} is {value}")
