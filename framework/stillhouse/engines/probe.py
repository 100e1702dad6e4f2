"""Comparing teachers: equal weights bit for bit, and answers that differ by rounding alone.

Shapes: T target tokens, K kept entries.

No single limit for rounding fits: it moves an answer by 6e-8 to 1e-2 nats on small models in
bfloat16, and by less than 1e-8 in float32, depending on depth and weights. So each replica measures
its own: it answers the probe once more with the output of every module rounded otherwise. Replicas
whose matrix products sum in another order differ by less than that. A change of weights may move
the answer even less, so the weights themselves are compared too.
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

_LEAST_LIMIT = 1e-4  # nats: no disagreement in any number format
_ROUNDINGS = 2.0  # two replicas may differ by so many times the rounding of one


@dataclass(frozen=True, slots=True)
class Probe:
    """A replica's answer to `probe_item`, how much of it is rounding, and its weights."""

    answer: CompressedLogits
    rounding_kl: float  # mean nats from the answer to the same one rounded otherwise
    weight_hashes: Mapping[str, int]  # of each parameter's bytes, by the parameter's name


def require_planned_weights(found: str | None, recipe: Recipe, *, replica: int) -> None:
    """Raise ChangedWeightsError unless a replica's files have the recipe's teacher digest.

    `found` is None for a model of a hub, which its commit identifies.
    """
    if found is not None and found != recipe.teacher_digest:
        raise ChangedWeightsError(
            f"teacher replica {replica} loaded other weights than the run was planned with: found "
            f"{found[:16]}, wanted {recipe.teacher_digest[:16]}; it has published nothing. Either "
            "the files changed after they were looked at, and the same command again plans with "
            "the new ones; or its machine has other files at that path: give every machine the same"
        )


def require_same_teacher(first: Probe, other: Probe, *, replica: int) -> None:
    """Raise TeacherError unless two replicas have equal weights, and answers within rounding.

    Answers are compared by mean KL over kept entries and tail. Parameters that only one of them
    has, such as those of a quantised format that its GPU needs, are not compared.
    """
    # weights
    shared = first.weight_hashes.keys() & other.weight_hashes.keys()
    changed = sorted(
        name for name in shared if first.weight_hashes[name] != other.weight_hashes[name]
    )
    if changed:
        raise TeacherError(
            f"teacher replica {replica} has other weights than the first: {len(changed)} of "
            f"{len(shared)} parameters differ, the first of them {changed[0]}; wanted the same "
            "files everywhere. Look for a stale copy of the model on its machine, or name a "
            "revision"
        )

    # answers
    found = disagreement(first, other)
    if found is not None:
        raise TeacherError(
            f"teacher replica {replica} disagrees with the first on equal tokens: {found}; do both "
            "have the same dtype and library versions?"
        )


def disagreement(first: Probe, other: Probe) -> str | None:
    """How far two answers are apart, in words; None where rounding explains it."""
    roundings = [kl for kl in (first.rounding_kl, other.rounding_kl) if math.isfinite(kl)]
    limit = max([_LEAST_LIMIT, *(_ROUNDINGS * kl for kl in roundings)])
    divergence = mean_kl(first.answer, other.answer)
    if divergence <= limit:
        return None
    return f"mean KL {divergence:.2e} nats, wanted at most {limit:.0e}, which rounding explains"


def hashes_of_weights(model: nn.Module) -> dict[str, int]:
    """xxh3 of each parameter's bytes, copied to the CPU one at a time, by the parameter's name.

    Parameters that are offloaded to a disk are left out.
    """
    return {
        name: xxhash.xxh3_64_intdigest(
            parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy().data
        )
        for name, parameter in model.named_parameters()
        if not parameter.is_meta
    }


@contextmanager
def rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Within the context, every output of a leaf module is moved by up to half a unit in the last
    place and rounded, deterministically."""
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

    An entry that only `first` kept is compared with the least that `other` kept, since its
    probability there is at most that.
    """
    # other's log-probabilities of first's entries and of the rest
    same_TKK = first.token_ids_TK[:, :, None] == other.token_ids_TK[:, None, :]
    floor_T1 = other.logprobs_TK.min(dim=1, keepdim=True).values
    matched_TK = torch.where(same_TKK, other.logprobs_TK[:, None, :], -torch.inf).amax(dim=2)
    matched_TK = torch.where(same_TKK.any(dim=2), matched_TK, floor_T1)
    tail_T = torch.log((1 - matched_TK.double().exp().sum(dim=1)).clamp_min(1e-12))

    # a bucket without mass adds nothing
    p_TK, p_tail_T = first.logprobs_TK.double().exp(), first.tail_logmass_T.double().exp()
    head_T = torch.where(p_TK == 0, 0.0, p_TK * (first.logprobs_TK - matched_TK)).sum(dim=1)
    rest_T = torch.where(p_tail_T <= 1e-12, 0.0, p_tail_T * (first.tail_logmass_T - tail_T))
    return float((head_T + rest_T).mean())
