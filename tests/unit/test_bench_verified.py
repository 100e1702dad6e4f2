"""`bench verified`: a writer that is right as often as it says, and students that differ in their
text alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.command import stillhouse
from stillhouse.bench.addition import (
    LONGEST_PROMPT,
    LONGEST_TRACE,
    SHARE_RIGHT,
    sums,
    trace,
    write_prompts,
)
from stillhouse.bench.verified import (
    ACCEPTED,
    ALL,
    Effort,
    corpus_of,
    filled_and_graded,
    measured,
    planned,
    save_untrained,
    table,
    teach,
)
from stillhouse.graders.number import last_number
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.pipeline import Generation
from stillhouse.sequences.packing import Split

WRITER = "stillhouse.bench.addition:AdditionWriter"
NUM_PROMPTS = 700


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """What the writer wrote, graded."""
    folder = tmp_path_factory.mktemp("verified")
    write_prompts(folder / "train.jsonl", sums(NUM_PROMPTS, seed=0))
    save_untrained(folder / "untrained", seed=0)
    plan = planned(folder, "train.jsonl", "untrained", seed=0, engine=WRITER)
    filled_and_graded(plan)
    return plan


def texts_of(split: Split, plan: Generation) -> list[str]:
    """The learnt part of each sequence behind its prompt, to the end of the text."""
    tokenizer, corpus = load_tokenizer(plan.config.writer.model), split.train
    rows = corpus.rows(0, corpus.num_sequences)
    texts = tokenizer.batch_decode(rows.token_ids_SL.tolist())
    ends = [text.index(tokenizer.eos_token) for text in texts]
    learnt_S = rows.loss_mask_SL.sum(axis=1)
    asked = [text.index("=") + 1 for text in texts]
    assert [end + 1 - begin for begin, end in zip(asked, ends, strict=True)] == learnt_S.tolist()
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


def is_right(text: str) -> bool:
    question, _, answer = text.partition("=")
    return last_number(answer) == sum(map(int, question.split("+")))


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (587, 645, "7+5=12 8+4+1=13 5+6+1=12 1232"),
        (100, 100, "0+0=0 0+0+0=0 1+1+0=2 200"),
        (123, 456, "3+6=9 2+5+0=7 1+4+0=5 579"),
    ],
)
def test_a_sum_is_written_from_its_last_digits_on(a: int, b: int, wanted: str) -> None:
    assert trace(a, b, [0, 0, 0]) == wanted


def test_an_answer_is_right_where_each_of_its_steps_is() -> None:
    shifts = [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]
    for a, b in [(100, 100), (999, 999), *sums(50, seed=1)]:
        assert len(f"{a}+{b}=") == LONGEST_PROMPT
        for each in shifts:
            text = trace(a, b, each)
            assert len(text) < LONGEST_TRACE
            assert (last_number(text) == a + b) == (not any(each))


def test_prompts_are_the_same_for_a_seed_and_none_repeats() -> None:
    pairs = sums(20_000, seed=3)
    assert len({*pairs}) == 20_000
    assert pairs == sums(20_000, seed=3) != sums(20_000, seed=4)
    assert {len(str(number)) for pair in pairs for number in pair} == {3}


def test_the_writer_is_right_as_often_as_it_says(written: Generation) -> None:
    """Within three standard deviations."""
    texts = texts_of(corpus_of(written, ALL), written)
    share = np.mean([is_right(text) for text in texts])
    assert len(texts) == NUM_PROMPTS - 1  # one prompt is held out by the corpus
    assert abs(share - SHARE_RIGHT) < 3 * (SHARE_RIGHT * (1 - SHARE_RIGHT) / NUM_PROMPTS) ** 0.5


def test_what_was_accepted_is_all_that_is_right_and_nothing_else(written: Generation) -> None:
    everything, accepted = (corpus_of(written, name) for name in (ALL, ACCEPTED))
    right = {text for text in texts_of(everything, written) if is_right(text)}
    found = texts_of(accepted, written)
    assert all(map(is_right, found))
    assert len(right ^ {*found}) <= 2  # what either of them holds out
    (dropped,) = accepted.account.left_out.values()
    assert dropped + accepted.account.num_documents == NUM_PROMPTS


def test_students_differ_by_their_text_alone(tmp_path: Path) -> None:
    """One is what it would be without the other, and what it is with another seed's weights is
    another."""
    effort = Effort(1, 100, num_steps=2, num_heldout=5, samples=2, batch_sequences=4)
    steps: list[None] = []
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    found = list(measured(together, effort, seed=0, on_step=lambda: steps.append(None)))
    assert len(steps) == 2 * effort.num_steps

    # the second student again, in a directory without the first
    plan = planned(together, "train.jsonl", "untrained", seed=0, engine=WRITER)
    weights = {name: weights_of(together / name) for name in (ALL, ACCEPTED)}
    for seed, is_same in ((0, True), (1, False)):
        save_untrained(alone / "untrained", seed=seed)
        teach(alone, ACCEPTED, corpus_of(plan, ACCEPTED), effort, on_step=lambda: None)
        assert (weights_of(alone / ACCEPTED) == weights[ACCEPTED]) == is_same
    assert weights[ALL] != weights[ACCEPTED]

    # what is said of them
    everything, accepted = found
    assert (everything.corpus, accepted.corpus) == (ALL, ACCEPTED)
    assert everything.share_dropped == 0
    assert accepted.share_dropped == pytest.approx(1 - accepted.writer_right)
    assert table(effort, found).row_count == 3


def weights_of(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


def test_the_verb_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "verified.json"
    small = "--prompts 64 --heldout 3 --steps 1 --seeds 1 --first-seed 5"
    done = stillhouse("bench", "verified", *small.split(), "--out", out)
    assert done.code == 0, done.err
    record = json.loads(out.read_text())
    assert [(each["seed"], each["corpus"]) for each in record["results"]] == [
        (5, ALL),
        (5, ACCEPTED),
    ]
    assert (record["effort"]["num_prompts"], record["effort"]["num_heldout"]) == (64, 3)
    assert all(name in done.out for name in (ALL, ACCEPTED, "the writer"))
