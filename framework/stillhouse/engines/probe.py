"""Whether two replicas are the same teacher: the same weights bit for bit, and answers that differ
by rounding alone.

How far rounding moves an answer depends on the number format, the depth and the weights, and no
single limit fits: on small models from 6e-8 to 1e-2 nats in bfloat16, and below 1e-8 in float32. So
each replica measures its own: it answers once more with the output of every module rounded
otherwise. Two replicas whose matrix products sum in another order are closer to each other than
that. A change of the weights may be smaller, and so the weights are compared as they are.

Shapes: T target tokens, K kept entries.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from stillhouse.errors import ChangedWeightsError, TeacherError
from stillhouse.logits import CompressedLogits
from stillhouse.store import Recipe

_LEAST_LIMIT = 1e-4  # nats: what is below is no disagreement in any number format
_ROUNDINGS = 2.0  # what two replicas may differ by, each of which rounds in its own way


@dataclass(frozen=True, slots=True)
class Probe:
    """What a replica says to the same short sequence as its fellows, and of itself."""

    answer: CompressedLogits
    rounding_kl: float  # mean nats from its answer to the same one rounded otherwise
    weight_hashes: Mapping[str, int]  # of each parameter's bytes, by its name


def require_planned_weights(found: str | None, recipe: Recipe, *, replica: int) -> None:
    """Raise ChangedWeightsError unless a replica loaded the files that the recipe's teacher digest
    is of; `found` is None for a hub's."""
    if found is not None and found != recipe.teacher_digest:
        raise ChangedWeightsError(
            f"teacher replica {replica} loaded other weights than the run was planned with: found "
            f"{found[:16]}, wanted"
            f" {recipe.teacher_digest[:16]}; it has published nothing. Either the files changed "
            "after they were looked at, and the same"
            " command again plans with the new ones; or its machine has other files at that path: "
            "give every machine the same"
        )


def require_same_teacher(first: Probe, other: Probe, *, replica: int) -> None:
    """Raise TeacherError unless two replicas have equal weights, and answers whose mean KL over
    kept entries and tail is one of rounding.

    Parameters that only one of them has, such as those of a quantised format that only its GPU
    knows, are not compared.
    """
    shared = first.weight_hashes.keys() & other.weight_hashes.keys()
    changed = sorted(
        name for name in shared if first.weight_hashes[name] != other.weight_hashes[name]
    )
    if changed:
        raise TeacherError(
            f"teacher replica {replica} has other weights than the first: {len(changed)} of "
            f"{len(shared)} parameters differ, the first of "
            f"them {changed[0]}; wanted the same files everywhere. Look for a stale copy of the "
            "model on its machine, or name a revision"
        )
    limit = max(
        _LEAST_LIMIT,
        *(
            _ROUNDINGS * probe.rounding_kl
            for probe in (first, other)
            if math.isfinite(probe.rounding_kl)
        ),
    )
    divergence = mean_kl(first.answer, other.answer)
    if not divergence <= limit:
        raise TeacherError(
            f"teacher replica {replica} disagrees with the first on equal tokens: mean KL "
            f"{divergence:.2e} nats, wanted at most "
            f"{limit:.0e}, which rounding explains; do both have the same dtype and library "
            "versions?"
        )


def hashes_of_weights(model: nn.Module) -> dict[str, int]:
    """xxh3 of each parameter's bytes, one copied to this process's memory at a time. Those that
    were put off to a disk are left out."""
    return {
        name: xxhash.xxh3_64_intdigest(
            parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy().data
        )
        for name, parameter in model.named_parameters()
        if not parameter.is_meta
    }


@contextmanager
def rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Within, each number that a module puts out is moved by up to half a unit in its last place,
    and rounded; always the same way."""
    random = torch.Generator().manual_seed(0)

    def move(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        shares = torch.rand(output.shape, generator=random).to(output.device) - 0.5
        return (output.float() * (1.0 + torch.finfo(output.dtype).eps * shares)).to(output.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_hook(move) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mean_kl(first: CompressedLogits, other: CompressedLogits) -> float:
    """KL(first || other) over first's kept entries and one bucket for the rest, mean over tokens.
    An entry that only `first` kept is compared with the least that `other` kept: its true value
    there is at most that."""
    same_TKK = first.token_ids_TK[:, :, None] == other.token_ids_TK[:, None, :]
    floor_T1 = other.logprobs_TK.min(dim=1, keepdim=True).values
    matched_TK = torch.where(same_TKK, other.logprobs_TK[:, None, :], -torch.inf).amax(dim=2)
    matched_TK = torch.where(same_TKK.any(dim=2), matched_TK, floor_T1)
    tail_T = torch.log((1 - matched_TK.double().exp().sum(dim=1)).clamp_min(1e-12))
    p_TK, p_tail_T = first.logprobs_TK.double().exp(), first.tail_logmass_T.double().exp()
    head_T = torch.where(p_TK == 0, 0.0, p_TK * (first.logprobs_TK - matched_TK)).sum(dim=1)
    return float(
        (
            head_T + torch.where(p_tail_T <= 1e-12, 0.0, p_tail_T * (first.tail_logmass_T - tail_T))
        ).mean()
    )
