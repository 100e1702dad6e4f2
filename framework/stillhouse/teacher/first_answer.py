"""The first answer to a recipe's probe, in its store: teachers of all runs, and of all engines, are
held to the one that published there first.

<root>/<first 16 digits of the fingerprint>/probe.json      created once, never changed

It is written by a teacher that its pool has accepted, right before its first chunk. So one with
other weights or a fault, which is refused at its start, does not decide what the store holds.

Shapes: T target tokens, K kept entries, N draws, of which a probe has none.
"""

import math
from typing import Any

import torch

from stillhouse.engines.base import probe_item
from stillhouse.engines.probe import Probe, disagreement
from stillhouse.errors import RecipeError, StoreError
from stillhouse.logits import CompressedLogits
from stillhouse.servers.ledger import opened_values, sealed_values
from stillhouse.store import ChunkStore, Recipe

_LOWEST = torch.finfo(torch.float32).min  # in the place of -inf, which JSON has not


def require_first_teacher(store: ChunkStore, probe: Probe) -> None:
    """Raise RecipeError unless a teacher answers as the first one of this store did, within
    rounding. Where there is none, it becomes the first.

    Raises StoreUnavailable if another try may help, StoreError if the store cannot be written, or
    what is there is damaged.
    """
    key = f"{store.folder}/probe.json"
    if store.blobs.create(key, _packed(probe)):
        return
    where = f"{store.url}/{key}"
    first = _unpacked(bytes(store.blobs.read(key)), store.recipe)
    if first is None:
        raise StoreError(
            f"{where} is damaged, so it is unknown which teacher filled this store; delete it, and "
            "the next teacher's answer counts"
        )
    found = disagreement(first, probe)
    if found is not None:
        raise RecipeError(
            f"the teacher disagrees with the one that filled this store first, on equal tokens: "
            f"{found}; nothing of it is published. Use the same engine, library versions and kind "
            f"of device, or another store.url; or delete {where}, and the next answer counts"
        )


def _packed(probe: Probe) -> bytes:
    answer, rounding_kl = probe.answer, probe.rounding_kl
    values: dict[str, Any] = {
        "logprobs": answer.logprobs_TK.clamp_min(_LOWEST).tolist(),
        "rounding_kl": rounding_kl if math.isfinite(rounding_kl) else None,
        "tail_logmass": answer.tail_logmass_T.clamp_min(_LOWEST).tolist(),
        "token_ids": answer.token_ids_TK.tolist(),
    }
    return sealed_values(values)


def _unpacked(data: bytes, recipe: Recipe) -> Probe | None:
    """The answer without the weights' hashes, which the recipe's digest stands for; None where it
    is damaged, or no answer to the recipe's probe."""
    values, num_tokens = opened_values(data), probe_item(recipe).sequences.num_targets
    try:
        ids_TK = torch.tensor(values["token_ids"], dtype=torch.int32)
        logprobs_TK = torch.tensor(values["logprobs"], dtype=torch.float32)
        tail_T = torch.tensor(values["tail_logmass"], dtype=torch.float32)
        rounding_kl = values["rounding_kl"]
        rounding_kl = math.nan if rounding_kl is None else float(rounding_kl)
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    is_answer = ids_TK.ndim == 2 and logprobs_TK.shape == ids_TK.shape
    if not is_answer or not len(ids_TK) == len(tail_T) == num_tokens:
        return None
    nothing_TN = torch.empty((num_tokens, 0), dtype=torch.int32)
    answer = CompressedLogits(
        ids_TK, logprobs_TK, tail_T, nothing_TN, recipe.vocab_size, recipe.temperature
    )
    return Probe(answer, rounding_kl, {})
