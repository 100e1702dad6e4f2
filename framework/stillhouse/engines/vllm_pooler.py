"""The pooler that runs inside vLLM's workers: final hidden states in, packed answers out.

So records alone leave a worker. A document is a request, whose `Question` says which of its tokens
are targets. An answer is bytes, uint8: a status, then the request's records, then a sample of its
first targets before encoding.

Under tensor parallelism every rank holds some rows of the head, and all ranks make the same answer.

Shapes: T target tokens, H hidden, B bytes of a record, P bytes of a sampled target.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from stillhouse.config import TeacherSection
from stillhouse.engines import _vllm_compat
from stillhouse.engines.base import Records
from stillhouse.errors import TeacherError
from stillhouse.logits import (
    CompressedLogits,
    Head,
    TargetSpec,
    compress_hidden,
    compress_shard,
    concatenate,
    encode,
    token_seeds,
)
from stillhouse.models.head_files import HeadPlan
from stillhouse.store import Recipe

_WHOLE, _FAILED = 0, 1  # the first byte of an answer


@dataclass(frozen=True, slots=True)
class PoolerPlan:
    """What a worker has to know before it loads; it travels within vLLM's config."""

    section: TeacherSection
    recipe: Recipe
    head: HeadPlan
    probe_spec: TargetSpec

    def compute_hash(self) -> str:
        """What vLLM names its compiled code by: nothing here changes it."""
        return ""

    def spec(self, *, is_probe: bool) -> TargetSpec:
        return self.probe_spec if is_probe else self.recipe.spec


@dataclass(frozen=True, slots=True)
class Question:
    """Which tokens of a request are targets, and what their draws and labels depend on."""

    places_T: NDArray[np.int32]  # of the targets in the request, ascending
    labels_T: NDArray[np.int32]  # the ids that follow them
    sequence: int  # its number in the corpus
    first_column: int  # of the request in that sequence
    num_sampled: int  # of the first targets: they are also given before encoding
    is_probe: bool = False  # by the probe's spec, not by the recipe's

    @property
    def fields(self) -> dict[str, Any]:
        """As vLLM carries it to its workers."""
        return {
            "places": self.places_T.tobytes(),
            "labels": self.labels_T.tobytes(),
            "sequence": self.sequence,
            "first_column": self.first_column,
            "num_sampled": self.num_sampled,
            "is_probe": self.is_probe,
        }

    @classmethod
    def of(cls, fields: Mapping[str, Any] | None, *, num_tokens: int) -> Self:
        """Read back; every token is a target of a request that vLLM makes up to measure memory."""
        if fields is None:
            places_T = np.arange(num_tokens, dtype=np.int32)
            return cls(places_T, np.zeros_like(places_T), 0, 0, 0)
        arrays = {name: np.frombuffer(fields[name], np.int32) for name in ("places", "labels")}
        others = {name: value for name, value in fields.items() if name not in arrays}
        return cls(arrays["places"], arrays["labels"], **others)


class _Step(NamedTuple):
    """The targets of one request within one forward pass."""

    question: Question
    first: int  # of the question's targets
    rows_T: NDArray[np.int64]  # of the pass

    @property
    def num_targets(self) -> int:
        return len(self.rows_T)

    @property
    def targets(self) -> slice:
        return slice(self.first, self.first + self.num_targets)

    @property
    def num_sampled(self) -> int:
        """Of these targets, those that are among the first of the request."""
        return min(max(self.question.num_sampled - self.first, 0), self.num_targets)


class _Part(NamedTuple):
    """What one pass adds to a request's answer."""

    records_TB: Tensor
    sample_TP: Tensor
    failure: str | None = None


class RecordsPooler(nn.Module):
    """Takes the place of a model's pooler in vLLM. `head` has the ids from `first_id` on; `group`
    is of the ranks that have the others, or None where there are none."""

    def __init__(self, plan: PoolerPlan, head: Head, *, first_id: int, group: ProcessGroup | None):
        super().__init__()
        self._plan, self._head, self._first_id, self._group = plan, head, first_id, group

    def get_supported_tasks(self) -> set[str]:
        return {"token_embed"}

    def get_pooling_updates(self, _task: str) -> Any:
        return _vllm_compat.no_updates()

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """Answers of the requests that end in this pass, None for the others."""
        requests = _vllm_compat.requests_of(pooling_metadata)
        answers: list[Tensor | None] = []
        for request, part in zip(requests, self._parts(hidden_states, requests), strict=True):
            if request.begin == 0:
                request.parts.clear()  # one that lost its memory is computed anew
            request.parts.append(part)
            answers.append(_answer(request.parts) if request.is_finished else None)
            if request.is_finished:
                request.parts.clear()
        return answers

    def _parts(self, hidden_TH: Tensor, requests: Sequence[_vllm_compat.Request]) -> list[_Part]:
        """The targets of a pass, compressed together and cut by request."""
        steps = list(_steps(requests))
        kinds = {step.question.is_probe for step in steps}
        assert len(kinds) == 1, "the probe is asked alone"
        spec = self._plan.spec(is_probe=kinds.pop())
        try:
            targets = self._compress(hidden_TH, steps, spec)
        except TeacherError as error:  # all ranks raise it, and the engine goes on
            none_00 = torch.empty((0, 0), dtype=torch.uint8, device=hidden_TH.device)
            return [_Part(none_00, none_00, str(error)) for _ in steps]
        records = encode(targets, spec).split([step.num_targets for step in steps])
        parts, first = [], 0
        for step, records_TB in zip(steps, records, strict=True):
            rows = slice(first, first + step.num_sampled)
            parts.append(_Part(records_TB, pack(targets, rows)))
            first += step.num_targets
        return parts

    def _compress(
        self, hidden_NH: Tensor, steps: Sequence[_Step], spec: TargetSpec
    ) -> CompressedLogits:
        # the hidden states, seeds and labels of the targets
        device = hidden_NH.device
        rows_T = torch.from_numpy(np.concatenate([step.rows_T for step in steps])).to(device)
        hidden_TH = hidden_NH.index_select(0, rows_T).to(self._head.weight_VH.dtype)
        columns_T, sequences_T, labels_T = (
            torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)
            for arrays in zip(*(_of_targets(step) for step in steps), strict=True)
        )
        seeds_T = token_seeds(self._plan.recipe.draw_seed, sequences_T, columns_T)
        block_tokens = self._plan.section.block_tokens

        # by the whole head, or by all ranks' parts of it
        wanted_T = labels_T if spec.label_logprob else None
        if self._group is None:
            return compress_hidden(
                hidden_TH,
                self._head,
                spec=spec,
                seeds_T=seeds_T,
                labels_T=wanted_T,
                block_tokens=block_tokens,
            )
        blocks = [
            slice(at, at + block_tokens) for at in range(0, max(1, len(rows_T)), block_tokens)
        ]
        return concatenate(
            compress_shard(
                self._head.logits(hidden_TH[block]),
                spec,
                first_id=self._first_id,
                seeds_T=seeds_T[block],
                labels_T=None if wanted_T is None else wanted_T[block],
                group=self._group,
            )
            for block in blocks
        )


def _steps(requests: Iterable[_vllm_compat.Request]) -> Iterator[_Step]:
    """The targets of each request in a pass, whose rows are those of its requests in order."""
    first_row = 0
    for request in requests:
        question = Question.of(request.fields, num_tokens=request.end)
        first, stop = np.searchsorted(question.places_T, [request.begin, request.end]).tolist()
        places_T = question.places_T[first:stop].astype(np.int64)
        yield _Step(question, first, places_T + (first_row - request.begin))
        first_row += request.end - request.begin


def _of_targets(step: _Step) -> tuple[NDArray[np.int32], ...]:
    """The column, the sequence and the label of each target of a step."""
    question = step.question
    columns_T = question.places_T[step.targets] + question.first_column
    return columns_T, np.full_like(columns_T, question.sequence), question.labels_T[step.targets]


def _answer(parts: Sequence[_Part]) -> Tensor:
    """uint8: a status, then all records and the whole sample, or what went wrong."""
    failure = next((part.failure for part in parts if part.failure is not None), None)
    if failure is not None:
        return torch.tensor([_FAILED, *failure.encode()], dtype=torch.uint8)
    status = parts[0].records_TB.new_full((1,), _WHOLE)
    flat = [part.records_TB.flatten() for part in parts]
    return torch.cat([status, *flat, *(part.sample_TP.flatten() for part in parts)])


def read_answer(answer: Tensor, question: Question, spec: TargetSpec) -> Records:
    """What an answer holds. Raises TeacherError where the worker raised it."""
    if answer[0] == _FAILED:
        raise TeacherError(
            f"in a forward pass with sequence {question.sequence}: "
            f"{bytes(answer[1:].tolist()).decode()}"
        )
    num_bytes = len(question.places_T) * spec.bytes_per_token
    records_TB = answer[1 : 1 + num_bytes].view(-1, spec.bytes_per_token)
    return Records(records_TB, unpack(answer[1 + num_bytes :], spec))


def pack(targets: CompressedLogits, rows: slice) -> Tensor:
    """Some of exact targets as bytes, uint8 [T, P]; all of their tensors are of 32 bits."""
    tensors = [tensor[rows] for tensor in targets.tensors.values()]
    columns = [tensor if tensor.ndim == 2 else tensor[:, None] for tensor in tensors]
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)


def unpack(packed: Tensor, spec: TargetSpec) -> CompressedLogits:
    """The targets of a spec from what `pack` made of them, flat."""
    # the numbers of each tensor in a row, and their type
    widths = {
        "token_ids_TK": (spec.k, torch.int32),
        "logprobs_TK": (spec.k, torch.float32),
        "tail_logmass_T": (1, torch.float32),
        "tail_ids_TN": (spec.num_draws, torch.int32),
    }
    if spec.weighted:
        widths["draw_logprobs_TN"] = (spec.num_draws, torch.float32)
    if spec.label_logprob:
        widths["label_logprob_T"] = (1, torch.float32)
    if spec.tail_entropy:
        widths["tail_entropy_T"] = (1, torch.float32)

    # cut there
    packed_TP = packed.view(-1, 4 * sum(width for width, _ in widths.values()))
    parts = packed_TP.split([4 * width for width, _ in widths.values()], dim=1)
    tensors: dict[str, Any] = {}
    for (name, (width, dtype)), part in zip(widths.items(), parts, strict=True):
        values = part.flatten().clone().view(dtype)  # a clone, whose memory begins at a number
        tensors[name] = values if name.endswith("_T") else values.view(len(part), width)
    return CompressedLogits(**tensors, vocab_size=spec.vocab_size, temperature=spec.temperature)
