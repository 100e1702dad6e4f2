"""Rows that are tokenised already: ids, and a mask that says which of them are learnt; and ids as
texts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import CorpusError
from stillhouse.sequences.bad_rows import BadRowError
from stillhouse.sequences.conversations import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MASKS = ("loss_mask", "assistant_masks", "completion_mask", "labels")  # by other libraries' names
_NO_LABEL = -100  # in Hugging Face's `labels`


class Origin(NamedTuple):
    """Where the first token of a document is in a store of rollouts."""

    shard: int
    row: int  # of the rollout in its shard
    token: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """A document's ids, and which of them are labels: tokens that a model is to predict."""

    ids: NDArray[np.int32]
    is_label: NDArray[np.bool_]
    group: int | None = None  # documents of one group are held out together, or not at all
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, num_tokens: int) -> "Tokens":
        """So many of the document's tokens, or all that it has, without the memory of the rest."""
        ids, is_label = self.ids[:num_tokens].copy(), self.is_label[:num_tokens].copy()
        return Tokens(ids, is_label, self.group, self.origin)

    def after(self, num_tokens: int) -> "Tokens":
        """What is left of the document behind so many of its tokens."""
        origin = self.origin
        if origin is not None:
            origin = Origin(origin.shard, origin.row, origin.token + num_tokens)
        return Tokens(self.ids[num_tokens:], self.is_label[num_tokens:], origin=origin)


def form_of_ids(columns: Collection[str], ids: str, mask: str | None) -> Form:
    """Rows of ids in one column, and a mask in another. `mask` names it; None: it is found by its
    name, and all tokens are learnt where there is none.

    A mask is of zeros and ones; one that is named labels holds the id or -100. Raises CorpusError
    where there is no column of the mask's name.
    """
    if mask is None:
        mask = next((name for name in _MASKS if name in columns), None)
    elif mask not in columns:
        raise CorpusError(
            f"the data set has no column '{mask}'; it has {', '.join(sorted(columns))}: set "
            "corpus.mask_column"
        )
    learnt = "every token is learnt" if mask is None else f"learnt is what column '{mask}' marks"
    names = (ids,) if mask is None else (ids, mask)
    return Form(f"ids of column '{ids}'; {learnt}", names, partial(_tokens, ids, mask))


def require_ids(tokens: Tokens, vocab_size: int) -> Tokens:
    """The tokens. Raises BadRowError where an id is not of the vocabulary."""
    wrong = tokens.ids[(tokens.ids < 0) | (tokens.ids >= vocab_size)]
    if len(wrong):
        raise BadRowError(
            f"it has id {wrong[0]}, but the tokenizer's ids are 0 to {vocab_size - 1}; was it "
            "tokenised by another?"
        )
    return tokens


def texts_of(
    sequences: Sequence[NDArray[np.int32]], tokenizer: "PreTrainedTokenizerFast"
) -> list[str]:
    """The texts that the ids of each sequence stand for, without special tokens."""
    return [
        str(
            tokenizer.decode(
                ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        for ids in sequences
    ]


def _tokens(ids_column: str, mask_column: str | None, row: Mapping[str, Any]) -> Tokens:
    ids = _integers(row, ids_column)
    if mask_column is None:
        return Tokens(ids, np.ones(len(ids), np.bool_))
    mask = _integers(row, mask_column)
    if len(mask) != len(ids):
        raise BadRowError(
            f"it has {len(ids)} ids in column '{ids_column}' and {len(mask)} values in column "
            f"'{mask_column}'"
        )
    off, on = (_NO_LABEL, ids) if mask_column == "labels" else (0, 1)
    wrong = mask[(mask != off) & (mask != on)]
    if len(wrong):
        wanted = f"{_NO_LABEL} or the id" if mask_column == "labels" else "0 or 1"
        raise BadRowError(f"it has {wrong[0]} in column '{mask_column}'; wanted: {wanted}")
    return Tokens(ids, mask != off)


def _integers(row: Mapping[str, Any], column: str) -> NDArray[np.int32]:
    values = row[column]
    is_list = isinstance(values, list) and all(type(value) is int for value in values)
    if not is_list or any(abs(value) >= 1 << 31 for value in values):
        raise BadRowError(f"column '{column}' is not a list of integers; found {str(values)[:200]}")
    return np.array(values, np.int32)
