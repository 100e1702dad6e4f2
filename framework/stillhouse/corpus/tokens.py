"""Documents become token ids and labels; a token is a label iff a model is to learn to say it: in chat, an assistant's words and end token.

The ids are those that a model meets when it is used: a text as its tokenizer writes it, a conversation as its chat template renders it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.config import CorpusSection
from stillhouse.corpus.documents import Documents
from stillhouse.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_DOCUMENTS = 256  # documents tokenised at one time


@dataclass(frozen=True, slots=True)
class Tokens:
    """A document's ids, and which of them are labels."""

    ids: NDArray[np.int32]
    is_label: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def tokenise(documents: Documents, section: CorpusSection, tokenizer: "PreTrainedTokenizerFast") -> Iterator[Tokens]:
    """Every document's tokens, in order.

    Raises CorpusError: a tokenizer without EOS or chat template, a row that is no text or conversation, one without an assistant's turn,
    a template that rewrites earlier turns.
    """
    batches = documents.batches(BATCH_DOCUMENTS)
    if section.format == "text":
        return _tokenise_text(batches, section, tokenizer)
    return _tokenise_chat(batches, section, tokenizer)


def _tokenise_text(
    batches: Iterable[tuple[list[int], list[Any]]], section: CorpusSection, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Tokens]:
    """Each text as its tokenizer writes it (with a beginning-of-sequence token where that adds one), and EOS. Empty texts are left out."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CorpusError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token to put between documents; set its eos_token"
        )
    for rows, texts in batches:
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise CorpusError(
                    f"row {row} of {section.dataset} has {type(text).__name__} in column '{section.text_column}'; wanted: text"
                )
        present = [text for text in texts if text]
        for ids in tokenizer(present, return_attention_mask=False, verbose=False)["input_ids"] if present else []:
            ended = np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int32)
            yield Tokens(ended, np.ones(len(ended), dtype=np.bool_))


def _tokenise_chat(
    batches: Iterable[tuple[list[int], list[Any]]], section: CorpusSection, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Tokens]:
    """Each conversation through the chat template; a token is a label iff its first character lies in an assistant's turn."""
    if not tokenizer.chat_template:
        raise CorpusError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; use that of an instruction-tuned model,"
            ' or set corpus.format = "text"'
        )
    for rows, conversations in batches:
        rendered = [_render(tokenizer, row, messages, section) for row, messages in zip(rows, conversations, strict=True)]
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets, (_, turns) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
            first_chars = np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
            # The turns are disjoint and ascending: a character lies in one iff it is past an odd number of their borders.
            is_label = np.searchsorted(np.array(turns).ravel(), first_chars, side="right") % 2 == 1
            yield Tokens(np.array(ids, dtype=np.int32), is_label)


def _render(tokenizer: "PreTrainedTokenizerFast", row: int, messages: Any, section: CorpusSection) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text, and the half-open spans of its characters that an assistant wrote.

    A turn runs from the end of the prompt before it (`messages[:i]` with the generation prompt) to the end of `messages[:i + 1]`.
    """
    where = f"row {row} of {section.dataset}"
    turns = _checked_messages(messages, where, section)
    assistants = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not assistants:
        raise CorpusError(f"{where} has no assistant's turn, so nothing to learn from; remove such rows")
    text = _apply_template(tokenizer, turns, where)
    ends_of_turn = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    spans = []
    for number in assistants:
        prompt = _apply_template(tokenizer, turns[:number], where, add_generation_prompt=True)
        through = text if number == len(turns) - 1 else _apply_template(tokenizer, turns[: number + 1], where)
        if not (through.startswith(prompt) and text.startswith(through)):
            raise CorpusError(
                f"{where}: under the chat template of {tokenizer.name_or_path} the conversation up to turn {number} is not a prefix of"
                " the whole, so an assistant's words cannot be told from the others; templates that rewrite earlier turns, such as those"
                " that drop earlier reasoning, do this. Use a template that only appends, or give each row one assistant's turn"
            )
        trimmed = through.rstrip()  # ChatML writes a newline after the end token: not the assistant's
        spans.append((len(prompt), len(trimmed) if trimmed.endswith(ends_of_turn) else len(through)))
    return text, spans


def _checked_messages(messages: Any, where: str, section: CorpusSection) -> list[dict[str, Any]]:
    is_conversation = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in messages
    )
    if not is_conversation:
        raise CorpusError(
            f"{where}: column '{section.text_column}' is not a list of messages, each with a text 'role' and a text 'content'; found"
            f" {str(messages)[:120]}"
        )
    return [{name: value for name, value in turn.items() if value is not None} for turn in messages]


def _apply_template(
    tokenizer: "PreTrainedTokenizerFast", turns: list[dict[str, Any]], where: str, *, add_generation_prompt: bool = False
) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template is a program of somebody else's: it may raise anything
        raise CorpusError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses its first {len(turns)} turns: {error}"
        ) from error
