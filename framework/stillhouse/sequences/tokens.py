"""Tokenising: documents become token ids and labels.

A token is a label iff a model is to learn to predict it: in chat, an assistant's words and end
token. The ids are those of a model in use: a text as the tokenizer encodes it, a conversation as
the chat template renders it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.conversations import checked_messages
from stillhouse.sequences.cpu_limit import CpuLimitError, cpu_limit
from stillhouse.sequences.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Item = TypeVar("_Item")

BATCH_DOCUMENTS = 256  # most documents tokenised at one time
# Most bytes of their text, each of which takes a tokenizer about 200 bytes of memory. A longer
# document is tokenised alone.
BATCH_BYTES = 4 << 20
TEMPLATE_LIMIT_S = 10.0  # CPU time to render one conversation, which takes milliseconds


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
    template_limit_s: float = TEMPLATE_LIMIT_S,
) -> Iterator[Tokens]:
    """Every document's tokens, in order. Memory is bounded by the longest document and a constant.

    Raises CorpusError: a tokenizer without EOS or chat template, a row that is no text or
    conversation, a conversation without an assistant's turn, a template that rewrites earlier turns
    or takes longer than the limit for one conversation.
    """
    if section.format == "text":
        return _tokenise_text(documents, section, tokenizer)
    return _tokenise_chat(documents, section, tokenizer, limit_s=template_limit_s)


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
    documents: Documents,
    section: CorpusSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    limit_s: float,
) -> Iterator[Tokens]:
    """Each conversation through the chat template; a token is a label iff its first character is
    in an assistant's turn."""
    # Conversations as text.
    if not tokenizer.chat_template:
        raise CorpusError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; use that of an "
            'instruction-tuned model, or set corpus.format = "text"'
        )
    rendered = (
        _render(tokenizer, row, messages, section, limit_s=limit_s) for row, messages in documents
    )

    # Text as tokens.
    for batch in batches(rendered, num_bytes=lambda one: _num_bytes(one[0])):
        encoded = tokenizer(
            [text for text, _ in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets, (_, turns) in zip(
            encoded["input_ids"], encoded["offset_mapping"], batch, strict=True
        ):
            first_chars = np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
            # The turns are disjoint and ascending: a character is inside one iff the number of
            # borders before it is odd.
            is_label = np.searchsorted(np.array(turns).ravel(), first_chars, side="right") % 2 == 1
            yield Tokens(np.array(ids, dtype=np.int32), is_label)


def _render(
    tokenizer: "PreTrainedTokenizerFast",
    row: int,
    messages: Any,
    section: CorpusSection,
    *,
    limit_s: float,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text, and the half-open spans of its characters that are an assistant's.

    Turn i begins at the end of `messages[:i]` with the generation prompt, and ends at the end of
    `messages[:i + 1]`.
    """
    # The turns.
    where = f"row {row} of {section.dataset}"
    turns = checked_messages(messages, where, section.text_column)
    assistants = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not assistants:
        raise CorpusError(
            f"{where} has no assistant's turn, so nothing to learn from; remove such rows"
        )

    render = partial(_apply_template, tokenizer, where=where, limit_s=limit_s)

    # The span of each, which is known only if the template leaves earlier turns as they are.
    text = render(turns)
    ends_of_turn = tuple(
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    )
    spans = []
    for number in assistants:
        prompt = render(turns[:number], add_generation_prompt=True)
        through = text if number == len(turns) - 1 else render(turns[: number + 1])
        if not (through.startswith(prompt) and text.startswith(through)):
            raise CorpusError(
                f"{where}: under the chat template of {tokenizer.name_or_path} the conversation "
                f"up to turn {number} is not a prefix of the whole, so an assistant's words cannot "
                "be told from the others; templates that rewrite earlier turns, such as those that "
                "drop earlier reasoning, do this. Use a template that only appends, or give each "
                "row one assistant's turn"
            )
        trimmed = through.rstrip()  # ChatML has a newline behind the end token: not a label
        end = len(trimmed) if trimmed.endswith(ends_of_turn) else len(through)
        spans.append((len(prompt), end))
    return text, spans


def _apply_template(
    tokenizer: "PreTrainedTokenizerFast",
    turns: list[dict[str, Any]],
    *,
    where: str,
    limit_s: float,
    add_generation_prompt: bool = False,
) -> str:
    """Turns as text. Raises CorpusError where the template raises, or exceeds the limit."""
    template = f"{where}: the chat template of {tokenizer.name_or_path}"
    try:
        with cpu_limit(limit_s):
            return str(
                tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
    except CpuLimitError:
        raise CorpusError(
            f"{template} took more than {limit_s:g} s of CPU time for its first {len(turns)} "
            "turns; wanted: milliseconds. Look for a loop without end in it, or use the template "
            "of another model"
        ) from None
    except Exception as error:  # a template is a foreign program, which may raise anything
        raise CorpusError(f"{template} refuses its first {len(turns)} turns: {error}") from error
