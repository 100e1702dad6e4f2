"""Packed conversations, token by token: what is learnt is what an assistant wrote, by a rule that
knows the text of a template alone.

The rule: in the rendered text each character has an owner, and a token is a label iff an assistant
owns its first character. A position is learnt from iff the token after it lies in the same sequence
and the same document, and is a label.

Shapes: S sequences, L tokens in a sequence, N tokens of a stream.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE, make_tokenizer
from stillhouse.config import CorpusSection
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import prepare_corpus

LENGTH = 64
# an assistant's turn has no header, and a system's leaves no trace: a document may begin with an
# assistant's word
NO_HEADERS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[user]{{ message['content'] "
    "}}[/user]"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}<|im_end|>{% endif %}{% "
    "endfor %}"
)
Owner = Callable[[str], list[bool]]


@dataclass(frozen=True)
class Document:
    """A conversation's tokens, and which of them are labels by the rule."""

    ids: list[int]
    is_label: list[bool]


def owned_in_chatml(text: str) -> list[bool]:
    """An assistant owns what lies between its header and the end of its end token."""
    owned = [False] * len(text)
    for turn in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL):
        owned[turn.start(1) : turn.end(1)] = [True] * len(turn[1])
    return owned


def owned_without_headers(text: str) -> list[bool]:
    """An assistant owns all but the user's brackets and what is in them."""
    owned = [True] * len(text)
    for turn in re.finditer(r"\[user\].*?\[/user\]", text, re.DOTALL):
        owned[turn.start() : turn.end()] = [False] * len(turn[0])
    return owned


TEMPLATES: dict[str, tuple[str, Owner]] = {
    "ChatML": (CHAT_TEMPLATE, owned_in_chatml),
    "no headers": (NO_HEADERS, owned_without_headers),
}


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Of one to three answers, some after a system's turn, some of which an assistant opens; each
    says its number in its first answer."""
    random = np.random.default_rng(0)

    def said(role: str, words: str, most: int) -> dict[str, str]:
        return {"role": role, "content": words + " said… 木 \n" * int(random.integers(0, most))}

    found = []
    for number in range(count):
        turns = [said("system", "Be brief.", 1)] if number % 2 else []
        for answer in range(int(random.integers(1, 4))):
            if answer or number % 4 != 1:
                turns.append(said("user", "And then?", 1))
            turns.append(said("assistant", f"{number:03d} it is." if not answer else "Yes", 5))
        found.append(turns)
    return found


def document(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], owner: Owner
) -> Document:
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(text, str)
    owned = owner(text)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Document(found["input_ids"], [owned[first] for first, _ in found["offset_mapping"]])


def columns(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # in the order of their packing
    rows = replace(corpus, order_path=None).rows(0, corpus.num_sequences)
    return rows.token_ids_SL, rows.positions_SL, rows.loss_mask_SL


def account_of(
    stream: Sequence[int], documents: Sequence[Document]
) -> tuple[list[int], list[bool]]:
    """Of each token of documents laid end to end, the last one perhaps cut: which document it is
    of, and whether it is a label.

    No document is the beginning of another; of several that begin with the same few last tokens,
    any gives the same account.
    """
    owners: list[int] = []
    labels: list[bool] = []
    left = dict(enumerate(documents))
    while len(owners) < len(stream):
        rest = list(stream[len(owners) :])
        number = next(
            number for number, one in left.items() if rest[: len(one.ids)] == one.ids[: len(rest)]
        )
        one = left.pop(number)
        owners += [number] * min(len(one.ids), len(rest))
        labels += one.is_label[: len(rest)]
    return owners, labels


def expected_mask(owners: Sequence[int], labels: Sequence[bool]) -> list[int]:
    """One token after the other: 1 iff the one after it is in the same sequence, of the same
    document, and a label."""
    mask = []
    for here in range(len(owners)):
        after = here + 1
        is_last = after % LENGTH == 0
        mask.append(int(not is_last and owners[after] == owners[here] and labels[after]))
    return mask


@pytest.fixture(params=TEMPLATES)
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[Corpus], list[Document]]:
    """Both corpora of the packed conversations, and the documents by the rule."""
    template, owner = TEMPLATES[request.param]
    tokenizer = make_tokenizer(tmp_path / "tokenizer", vocab_size=400, chat_template=template)
    rows = conversations(160)
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    values: dict[str, Any] = {
        "dataset": str(file),
        "format": "chat",
        "sequence_length": LENGTH,
        "heldout_sequences": 8,
    }
    split = prepare_corpus(
        CorpusSection.model_validate(values),
        tokenizer,
        tokenizer_digest="digest",
        cache_dir=tmp_path / "cache",
    )
    return [split.heldout, split.train], [document(tokenizer, turns, owner) for turns in rows]


def test_a_position_is_learnt_from_iff_the_next_token_of_its_document_is_an_assistants(
    prepared: tuple[list[Corpus], list[Document]],
) -> None:
    corpora, documents = prepared
    for corpus in corpora:
        ids_SL, _, mask_SL = columns(corpus)
        owners, labels = account_of(ids_SL.ravel().tolist(), documents)
        assert len(set(owners)) > 2
        assert mask_SL.ravel().tolist() == expected_mask(owners, labels)


def test_positions_begin_anew_with_each_conversation_and_each_sequence(
    prepared: tuple[list[Corpus], list[Document]],
) -> None:
    corpora, documents = prepared
    for corpus in corpora:
        ids_SL, positions_SL, _ = columns(corpus)
        owners, _ = account_of(ids_SL.ravel().tolist(), documents)
        position = 0
        for here, found in enumerate(positions_SL.ravel().tolist()):
            begins = here % LENGTH == 0 or owners[here] != owners[here - 1]
            position = 0 if begins else position + 1
            assert found == position


def test_a_mask_that_is_shifted_or_ignores_documents_would_be_another(
    prepared: tuple[list[Corpus], list[Document]],
) -> None:
    """Or these conversations could not tell a wrong mask from a right one."""
    corpora, documents = prepared
    ids_SL, _, _ = columns(corpora[1])
    owners, labels = account_of(ids_SL.ravel().tolist(), documents)
    right = expected_mask(owners, labels)
    assert [*right[1:], 0] != right != [0, *right[:-1]]
    begins_with_a_label = any(one.is_label[0] for one in documents)
    assert (expected_mask([0] * len(owners), labels) != right) == begins_with_a_label
