"""Tokenising: documents become token ids and labels.

A token is a label iff a model is to learn to predict it: in chat, an assistant's words and end
token. The ids are those of a model in use: a text as the tokenizer encodes it, a conversation as
the chat template renders it.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.models.tokenizers import vocab_size_of
from stillhouse.sequences.account import Account
from stillhouse.sequences.bad_rows import BadRow, BadRowError, LeftOutError, require_few, where
from stillhouse.sequences.chat import TEMPLATE_LIMIT_S, ChatTemplate, Rendered, template_text
from stillhouse.sequences.documents import Documents
from stillhouse.sequences.ids import Tokens, require_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Item = TypeVar("_Item")

BATCH_DOCUMENTS = 256  # most documents tokenised at one time
# Most bytes of their text, each of which takes a tokenizer about 200 bytes of memory. A longer
# document is tokenised alone.
BATCH_BYTES = 4 << 20


def tokenise(
    documents: Documents,
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    account: Account | None = None,
    template_limit_s: float = TEMPLATE_LIMIT_S,
) -> Iterator[Tokens]:
    """Every document's tokens, in order, counted in the account. Memory is bounded by the longest
    document and a constant.

    Raises CorpusError: a tokenizer without EOS or chat template, more bad rows than the section
    allows, a template that drops calls of tools, or takes longer than the limit for a conversation.
    """
    account = Account() if account is None else account
    account.form = documents.form
    if section.format == "text":
        found = _tokenise_text(_good(documents, section, account), tokenizer)
    elif section.format == "chat":
        template = ChatTemplate(tokenizer, template_text(section), limit_s=template_limit_s)
        conversations = _good(documents, section, account, template.rendered)
        found = _tokenise_chat(conversations, tokenizer, account)
    else:
        in_vocabulary = partial(require_ids, vocab_size=vocab_size_of(tokenizer))
        found = _good(documents, section, account, in_vocabulary)
    for tokens in found:
        account.num_documents += 1
        account.num_tokens += len(tokens)
        account.num_labels += int(tokens.is_label.sum())
        yield tokens


def _good(
    documents: Documents,
    section: CorpusSection,
    account: Account,
    change: Callable[[Any], Any] = lambda document: document,
) -> Iterator[Any]:
    """The documents, changed. Rows that are bad or not wanted are skipped, and told in the
    account."""
    for row in map(int, documents.order):
        try:
            document = change(documents.read(row))
        except LeftOutError as error:
            account.left_out[str(error)] = account.left_out.get(str(error), 0) + 1
            continue
        except BadRowError as error:
            account.bad_rows.append(BadRow(*documents.place(row), str(error)))
            require_few(account.bad_rows, num_rows=len(documents), max_share=section.max_bad_rows)
            continue
        except CorpusError as error:
            raise CorpusError(f"{where(*documents.place(row))}: {error}") from error
        yield document


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


def _tokenise_text(texts: Iterable[str], tokenizer: "PreTrainedTokenizerFast") -> Iterator[Tokens]:
    """Each text as its tokenizer encodes it (with a beginning-of-sequence token where that adds
    one), and EOS. Empty texts are left out."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CorpusError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token to put between "
            "documents; set its eos_token"
        )
    for batch in batches(filter(None, texts), num_bytes=_num_bytes):
        for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
            ended = np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int32)
            yield Tokens(ended, np.ones(len(ended), dtype=np.bool_))


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _tokenise_chat(
    conversations: Iterable[Rendered], tokenizer: "PreTrainedTokenizerFast", account: Account
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
            account.ways[one.way] = account.ways.get(one.way, 0) + 1
            yield Tokens(np.array(ids, dtype=np.int32), is_label)
