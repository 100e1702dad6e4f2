"""`check` on a corpus: how it was read, what was skipped, and an example with its mask."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.command import as_toml, stillhouse
from helpers.models import CHAT_TEMPLATE, make_model
from helpers.world import TinyWorld, merged
from stillhouse.cli.check_corpus import check_corpus, example_of
from stillhouse.cli.findings import Findings, Piece, print_findings
from stillhouse.sequence import Sequences

TALK = [{"role": "user", "content": "Which tree?"}, {"role": "assistant", "content": "An oak."}]


def test_the_ways_of_conversations_bad_rows_and_an_example_are_told(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", vocab_size=300, chat_template=CHAT_TEMPLATE)
    chat = tmp_path / "chat.jsonl"
    rows = [{"messages": TALK}] * 40 + [{"messages": TALK[:1]}]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "corpus": {"dataset": str(chat), "format": "chat", "max_bad_rows": 0.1}
        | {"sequence_length": 128, "heldout_sequences": 1},
        "teacher": {"model": str(model)},
        "student": {"model": str(model)},
        "store": {"url": str(tmp_path / "store")},
    }
    config = tmp_path / "config.toml"
    config.write_text(as_toml(merged(tiny_world.values, changes)))
    outcome = stillhouse("check", config, "--run-dir", tmp_path / "run", cache=tmp_path / "cache")
    assert outcome.code == 0, outcome
    told = " ".join(outcome.out.split())
    assert "40 documents: messages of column 'messages'" in told
    assert "in 40 of them every assistant's message is learnt" in told
    assert f"bad rows that are skipped: 1, the first: row 40 of {chat}: it has no" in told
    assert "what is between « and » is learnt" in told
    assert "An oak.<|im_end|>»" in told


def test_what_each_data_set_of_a_mixture_contributes_is_told_and_journalled(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    texts = [*(f"{n} words " * 20 for n in range(90)), "half a surrogate: \ud800"]
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = {"mixed_with": [{"dataset": str(other), "weight": 0.25}], "max_bad_rows": 0.1}
    plan = tiny_world.plan(tmp_path / "run", corpus=corpus)
    found = Findings()
    check_corpus(plan, found)
    first, second = plan.sources.parts
    told = [text for _, text in found.rows]
    assert told[0].startswith("2 data sets: ")
    assert any(text.startswith(f"{other}: {second.num_sequences} sequences, ") for text in told)
    assert first.num_sequences == pytest.approx(4 * second.num_sequences, abs=2)
    assert plan.request.start.corpus_targets == {
        str(tiny_world.folder / "documents.jsonl"): first.num_targets,
        str(other): second.num_targets,
    }
    assert plan.request.start.bad_rows == {str(other): 1}


def sequences(*, ids: list[int], positions: list[int], mask: list[int]) -> Sequences:
    return Sequences(
        np.array([ids, ids], np.int32),
        np.array([positions, positions], np.int32),
        np.array([[0] * len(ids), mask], np.uint8),
    )


def test_an_example_is_of_one_document_and_ends_with_what_is_learnt() -> None:
    found = example_of(
        sequences(
            ids=[1, 2, 3, 4, 5, 6, 7, 8, 9],
            positions=[0, 1, 0, 1, 2, 3, 4, 5, 6],
            mask=[0, 0, 0, 1, 1, 0, 1, 0, 0],
        ),
        lambda ids: "".join(map(str, ids)),
    )
    assert found == [Piece("34", False), Piece("56", True), Piece("7", False), Piece("8", True)]


def test_an_example_of_a_long_document_is_cut_on_both_sides() -> None:
    found = example_of(
        sequences(ids=[1] * 900, positions=[*range(900)], mask=[0] * 300 + [1] * 599 + [0]),
        lambda ids: "a" * len(ids),
    )
    assert [(len(piece.text), piece.is_learnt) for piece in found] == [(81, False), (119, True)]


@pytest.mark.parametrize(("colour", "shown"), [("", "a«b»c"), ("1", "a\x1b[32mb\x1b[0mc")])
def test_what_is_learnt_is_in_colour_on_a_terminal_and_else_between_marks(
    colour: str,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", colour)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces = [Piece("a", False), Piece("b", True), Piece("c", False)]
    print_findings(Findings(example=pieces))
    assert shown in capsys.readouterr().out
