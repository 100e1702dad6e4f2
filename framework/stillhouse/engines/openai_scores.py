"""What a server says of a document, token by token: read from its answer, and checked.

Shapes: D tokens of a document, T target tokens of it, K kept entries.

The answer is that of vLLM's server to `prompt_logprobs`: for each token of the prompt but the first
the likeliest ids and the token's own, each with its log-probability under the full softmax:

    {"model": "qwen", "choices": [{"prompt_logprobs": [null, {"198": {"logprob": -0.25}, ...}]}]}
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from stillhouse.errors import ServerError, TeacherError
from stillhouse.logits import CompressedLogits
from stillhouse.sequence import WorkItem

# Of the probabilities of one token's entries: float32 and a softmax in few bits may exceed 1.
_ROUNDING = 1e-3
_ALL_OF_IT = 1.0 - 1e-6  # no real model has it in a few entries, after every token of random text

Entries = Mapping[int, float]  # id -> log-probability


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One request: the ids of a document, up to the token that follows its last target."""

    chunk: int
    row: int  # of the chunk's sequences
    token_ids_D: NDArray[np.int32]
    targets_T: NDArray[np.int64]  # the places in it after which the distribution is a target

    @property
    def digest(self) -> str:
        """32 hexadecimal digits: XXH3-128 of its ids and of its targets' places, each in 4 bytes,
        with their number before them."""
        parts = (self.token_ids_D, self.targets_T)
        data = b"".join(np.r_[len(part), part].astype("<i4").tobytes() for part in parts)
        return xxhash.xxh3_128_hexdigest(data)


class Scores(NamedTuple):
    """What a server says of a document's targets: K entries by logprob descending, ties by id
    ascending, and the token that really follows."""

    token_ids_TK: NDArray[np.int32]
    logprobs_TK: NDArray[np.float32]
    label_logprob_T: NDArray[np.float32]


def documents_of(item: WorkItem) -> Iterator[Document]:
    """The documents of an item that have targets, row by row."""
    rows = enumerate(zip(*item.sequences.arrays, strict=True))
    for row, (ids_L, positions_L, mask_L) in rows:
        starts = np.flatnonzero(positions_L == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids_L)], strict=True):
            targets_T = np.flatnonzero(mask_L[start:stop])
            if len(targets_T):
                ids_D = ids_L[start : start + int(targets_T[-1]) + 2]
                yield Document(item.number, row, ids_D, targets_T)


def scores_of(body: Any, document: Document, *, num_entries: int, vocab_size: int) -> Scores:
    """The scores of a document's targets. Raises ServerError for an answer of another kind, and
    TeacherError for numbers that are no distribution over the vocabulary."""
    listed = _entries_of(body, document.token_ids_D, num_entries=num_entries)
    ids, logprobs, labels = [], [], []
    for at in document.targets_T.tolist():
        entries, label = listed[at + 1], int(document.token_ids_D[at + 1])
        _require_distribution(entries, at)
        known = [(-logprob, token) for token, logprob in entries.items() if token < vocab_size]
        best = sorted(known)[:num_entries]
        if len(best) < num_entries:
            raise TeacherError(
                f"after token {at} of a document the server's likeliest ids are {sorted(entries)}, "
                f"of which some are beyond the tokenizer's {vocab_size:,}; wanted the tokenizer of "
                "the model that is served: set teacher.model to it, or lower target.k"
            )
        ids.append([token for _, token in best])
        logprobs.append([-negative for negative, _ in best])
        labels.append(entries[label])
    return Scores(
        np.array(ids, np.int32).reshape(-1, num_entries),
        np.array(logprobs, np.float32).reshape(-1, num_entries),
        np.array(labels, np.float32),
    )


def require_full_softmax(scores: Scores, *, vocab_size: int) -> None:
    """Raise ServerError where the entries of every token sum to 1: then a server has normalised the
    few that it gives."""
    kept_T = np.exp(scores.logprobs_TK.astype(np.float64)).sum(axis=1)
    if scores.token_ids_TK.shape[1] < vocab_size and (kept_T >= _ALL_OF_IT).all():
        raise ServerError(
            f"the server's {scores.token_ids_TK.shape[1]} log-probabilities sum to 1 after every "
            "token of random text, so they are of the entries alone; wanted those of the softmax "
            "over the whole vocabulary: serve the teacher with vLLM's own server, without "
            "--logprobs-mode"
        )


def targets_of(
    scores: Sequence[Scores], *, num_entries: int, vocab_size: int, with_labels: bool
) -> CompressedLogits:
    """The targets of several documents, in order, on the CPU; none of no documents. The tail is one
    bucket, whose mass is what the entries leave."""
    empty = Scores(
        np.empty((0, num_entries), np.int32),
        np.empty((0, num_entries), np.float32),
        np.empty(0, np.float32),
    )
    ids_TK, logprobs_TK, label_T = (
        np.concatenate(parts) for parts in zip(empty, *scores, strict=True)
    )
    kept_T = np.exp(logprobs_TK.astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):  # the entries may have it all
        tail_T = np.log1p(-np.minimum(kept_T, 1.0))
    if num_entries == vocab_size:
        tail_T[:] = -np.inf
    return CompressedLogits(
        torch.from_numpy(ids_TK),
        torch.from_numpy(logprobs_TK),
        torch.from_numpy(tail_T.astype(np.float32)),
        torch.empty((len(ids_TK), 0), dtype=torch.int32),
        vocab_size=vocab_size,
        label_logprob_T=torch.from_numpy(label_T) if with_labels else None,
    )


def _entries_of(
    body: Any, token_ids_D: NDArray[np.int32], *, num_entries: int
) -> Sequence[Entries]:
    """The entries before each token of the prompt, of which the first has none. Raises ServerError
    where they are not as they were asked for."""
    # by token id
    try:
        listed = body["choices"][0]["prompt_logprobs"]
        found = [
            {int(token): float(entry["logprob"]) for token, entry in (entries or {}).items()}
            for entries in listed
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ServerError(
            "the server does not score prompts: its answer has no prompt_logprobs by token id; "
            "wanted vLLM's own server, or one that answers /completions as it does"
        ) from None
    # for each token, its own among them
    if len(found) != len(token_ids_D):
        raise ServerError(
            f"the server scored {len(found)} tokens of a prompt of {len(token_ids_D)}; wanted each "
            "id that was sent, and no other: take a server that does not change prompts"
        )
    for at, (entries, token) in enumerate(zip(found, token_ids_D.tolist(), strict=True)):
        if at and (len(entries) < num_entries or token not in entries):
            raise ServerError(
                f"the server gave {len(entries)} entries for token {at} of a prompt, "
                f"{'with' if token in entries else 'without'} the token's own; wanted the "
                f"likeliest {num_entries} and the token's own: start the server with --max-logprobs"
                f" {num_entries}, or lower teacher.openai.max_logprobs and target.k"
            )
    return found


def _require_distribution(entries: Entries, at: int) -> None:
    """Raise where these are no log-probabilities of the full softmax."""
    if not all(math.isfinite(logprob) for logprob in entries.values()):
        raise TeacherError(
            f"after token {at} of a document the server's log-probabilities are "
            f"{[*entries.values()]}; wanted finite numbers: check the weights that it serves, and "
            "their number format"
        )
    mass = math.fsum(math.exp(min(logprob, 1.0)) for logprob in entries.values())
    if mass > 1.0 + _ROUNDING:
        raise ServerError(
            f"the probabilities of the server's entries sum to {mass:.4f} after token {at} of a "
            "document; wanted log-probabilities of the full softmax, which sum to 1 at most: of "
            "vLLM, --logprobs-mode raw_logprobs"
        )
