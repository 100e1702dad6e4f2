"""What runs inside vLLM's workers for a writer: a worker that ends with its owner, and a logits
processor that draws by a sample's own seed, as `TransformersWriter` does.

So both engines write the same samples up to rounding, however vLLM batches them.

Shapes: B samples in a forward pass, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.engines import _vllm_compat
from stillhouse.engines.vllm_worker import end_with_owner
from stillhouse.writer.sampling import draw, uniforms

NOT_FINITE = 1.0  # in place of a log-probability, where logits are no distribution


@dataclass(frozen=True, slots=True)
class WriterPlan:
    """What a worker has to know before it loads; it travels within vLLM's config."""

    vocab_size: int  # of the tokenizer; the head may have more rows
    temperature: float
    top_p: float

    def compute_hash(self) -> str:
        """What vLLM names its compiled code by: nothing here changes it."""
        return ""


def writers_worker(**arguments: Any) -> Any:
    """A worker of this platform. vLLM calls this by its name, as it calls the class of its own
    workers; the plan is its `additional_config`."""
    end_with_owner()  # before anything is loaded, which takes minutes
    _vllm_compat.accept_processor(SeededDraws)
    base = _vllm_compat.worker_class()

    class WritersWorker(base):  # type: ignore[misc, valid-type]
        def forget(self) -> None:
            """Clear the cache of keys and values, in which a NaN would spread."""
            _vllm_compat.clear_keys_and_values(self)

    return WritersWorker(**arguments)


class SeededDraws:
    """A logits processor of vLLM's: for each sample it leaves the token that is drawn, with its
    log-probability in place of its logit."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory
        self._plan: WriterPlan = vllm_config.additional_config
        self._device = device
        self._rows: dict[int, tuple[int, list[int]]] = {}  # a seed, and what is written so far

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Every request is ours."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the samples as they come, go and move within the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, written in batch_update.added:
            self._rows[row] = params.extra_args[_vllm_compat.SEED], written
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source), self._rows.pop(target, None)
            self._rows[target] = moved
            if direction.name == "SWAP" and replaced is not None:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [B, V]: -inf, but for the token that is drawn for each row."""
        # the random number of each row, by its seed and its place
        plan, rows = self._plan, [self._rows[row] for row in range(len(logits))]
        seeds_B = torch.tensor([seed for seed, _ in rows], device=self._device)
        places_B = torch.tensor([len(written) for _, written in rows], device=self._device)

        # a draw among the tokenizer's ids
        logits_BV = logits[:, : plan.vocab_size]
        is_whole_B1 = torch.isfinite(logits_BV.logsumexp(dim=1, keepdim=True))
        logits_BV = torch.where(is_whole_B1, logits_BV, 0.0)
        drawn = draw(
            logits_BV,
            uniforms(seeds_B, places_B),
            temperature=plan.temperature,
            top_p=plan.top_p,
        )
        logprobs_B1 = torch.where(is_whole_B1, drawn.logprobs_B[:, None], NOT_FINITE)
        return torch.full_like(logits, -torch.inf).scatter_(1, drawn.ids_B[:, None], logprobs_B1)
