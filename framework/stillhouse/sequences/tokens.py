"""Tokenising: documents become token ids and labels.

A token is a label iff a model is to learn to predict it: in chat, an assistant's words and end
token. The ids are those of a model in use: a text as the tokenizer encodes it, a conversation as
the chat template renders it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.account import Account
from stillhouse.sequences.chat import TEMPLATE_LIMIT_S, ChatTemplate, Rendered, template_text
from stillhouse.sequences.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Item = TypeVar("_Item")

BATCH_DOCUMENTS = 256  # most documents tokenised at one time
# Most bytes of their text, each of which takes a tokenizer about 200 bytes of memory. A longer
# document is tokenised alone.
BATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Tokens:
    """A document's ids, and which of them are labels."""

    ids: NDArray[np.int32]
    is_label: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def tokenise(
    documents: Documents,
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    account: Account | None = None,
    template_limit_s: float = TEMPLATE_LIMIT_S,
) -> Iterator[Tokens]:
    """Every document's tokens, in order. Memory is bounded by the longest document and a constant.

    They are counted in the account. Raises CorpusError: a tokenizer without EOS or chat template, a
    row that is no text or conversation, a conversation without an answer, a template that drops
    calls of tools, or takes longer than the limit for one conversation.
    """
    account = Account() if account is None else account
    if section.format == "text":
        found = _tokenise_text(documents, section, tokenizer)
    else:
        template = ChatTemplate(tokenizer, template_text(section), limit_s=template_limit_s)
        found = _tokenise_chat(_rendered(documents, section, template, account), tokenizer)
    for tokens in found:
        account.num_documents += 1
        account.num_tokens += len(tokens)
        account.num_labels += int(tokens.is_label.sum())
        yield tokens


def batches(items: Iterable[_Item], *, num_bytes: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """The items in order, at most BATCH_DOCUMENTS and BATCH_BYTES of them at a time; a larger item
    alone."""
    batch: list[_Item] = []
    size = 0
    for item in items:
        more = num_bytes(item)
        if batch and (len(batch) == BATCH_DOCUMENTS or size + more > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += more
    if batch:
        yield batch


def _tokenise_text(
    documents: Documents, section: CorpusSection, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Tokens]:
    """Each text as its tokenizer encodes it (with a beginning-of-sequence token where that adds
    one), and EOS. Empty texts are left out."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CorpusError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token to put between "
            "documents; set its eos_token"
        )
    for texts in batches(_texts(documents, section), num_bytes=_num_bytes):
        for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
            ended = np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int32)
            yield Tokens(ended, np.ones(len(ended), dtype=np.bool_))


def _texts(documents: Documents, section: CorpusSection) -> Iterator[str]:
    for row, text in documents:
        if not isinstance(text, str):
            raise CorpusError(
                f"row {row} of {section.dataset} has {type(text).__name__} in column "
                f"'{section.text_column}'; wanted: text. Convert such rows, or remove them"
            )
        if text:
            yield text


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _tokenise_chat(
    conversations: Iterable[Rendered], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Tokens]:
    """Each conversation's tokens; one is a label iff its first character is in a span that is
    learnt."""
    for batch in batches(conversations, num_bytes=lambda one: _num_bytes(one.text)):
        encoded = tokenizer(
            [one.text for one in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets, one in zip(
            encoded["input_ids"], encoded["offset_mapping"], batch, strict=True
        ):
            first_chars = np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
            # The spans are disjoint and ascending: a character is inside one iff the number of
            # borders before it is odd.
            borders = np.array(one.spans, dtype=np.int64).ravel()
            is_label = np.searchsorted(borders, first_chars, side="right") % 2 == 1
            yield Tokens(np.array(ids, dtype=np.int32), is_label)


def _rendered(
    documents: Documents, section: CorpusSection, template: ChatTemplate, account: Account
) -> Iterator[Rendered]:
    """Each conversation as text."""
    for row in map(int, documents.order):
        try:
            rendered = template.rendered(documents.read(row))
        except CorpusError as error:
            raise CorpusError(f"row {row} of {section.dataset}: {error}") from error
        account.ways[rendered.way] = account.ways.get(rendered.way, 0) + 1
        yield rendered
