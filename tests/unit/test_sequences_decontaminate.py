"""No passage of a test set that a model's text repeats is missed, and honest texts are kept."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.config.graders import DecontaminateSection, TestSetSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.decontaminate import (
    Decontamination,
    index_of,
    overlap_of,
)
from stillhouse.sequences.testsets import passages_of

RULE = DecontaminateSection()
VOCABULARY = [f"w{number}" for number in range(5000)]


def words(rng: random.Random, num: int) -> list[str]:
    return rng.choices(VOCABULARY, k=num)


def random_texts(seed: int, num: int, *, num_words: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [words(rng, num_words) for _ in range(num)]


TEST_SET = random_texts(0, 40, num_words=200)
KNOWN = {"exam": index_of(" ".join(text) for text in TEST_SET)}


@settings(max_examples=40, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(0, len(TEST_SET) - 1),
    st.integers(0, 150),
    st.integers(0, 5000),
    st.integers(0, 1000),
)
def test_every_planted_passage_of_50_words_is_found(
    rng: random.Random, number: int, start: int, before: int, after: int
) -> None:
    passage = [
        rng.choice([word, word.upper(), f"({word},", f"*{word}*\n"])
        for word in TEST_SET[number][start : start + 50]
    ]
    clean = Decontamination(RULE, KNOWN)
    around = random.Random(before)
    text = " ".join([*words(around, before), *passage, *words(around, after)])
    assert clean.found_in(text) == "exam"


def test_a_text_with_nothing_of_a_test_set_is_clean() -> None:
    clean = Decontamination(RULE, KNOWN)
    for text in ("", "word", "...", *map(" ".join, random_texts(1, 50, num_words=500))):
        assert clean.found_in(text) is None
    shuffled = random.Random(0).sample(TEST_SET[0], k=200)
    assert clean.found_in(" ".join(shuffled)) is None
    assert Decontamination(RULE, {}).found_in(" ".join(TEST_SET[0])) is None


@pytest.mark.parametrize(
    ("num_common", "num_own", "found"),
    [
        (12, 0, False),  # no run of 13
        (30, 400, False),  # an idiom in a long text
        (30, 100, True),  # most of a short one
        (49, 4000, False),
        (50, 4000, True),
    ],
)
def test_a_common_idiom_is_let_pass_and_a_passage_or_a_large_share_is_not(
    num_common: int, num_own: int, found: bool
) -> None:
    own = words(random.Random(2), num_own)
    text = " ".join(
        [*own[: num_own // 2], *TEST_SET[3][20 : 20 + num_common], *own[num_own // 2 :]]
    )
    (known,) = KNOWN.values()
    assert overlap_of(text, known).passage_words == (num_common if num_common >= 13 else 0)
    assert (Decontamination(RULE, KNOWN).found_in(text) is not None) == found


@pytest.mark.parametrize("num_words", [8, 12, 13, 20, 45])
def test_a_whole_question_is_found_however_short_and_in_however_long_a_text(
    num_words: int,
) -> None:
    questions = random_texts(3, 10, num_words=num_words)
    known = index_of(" ".join(question) for question in questions)
    clean = Decontamination(RULE, {"short": known})
    own = words(random.Random(4), 1000)
    for question in questions:
        assert clean.found_in(" ".join([*own, *question, *own])) == "short"
        assert clean.found_in(" ".join([*own, *question[1:], *own])) is None


def test_texts_that_cannot_be_looked_for_are_counted() -> None:
    known = index_of(["What is 2 + 2?", "", " ".join(TEST_SET[0])])
    assert (known.num_texts, known.num_too_short) == (3, 2)
    assert not index_of([]).grams


def test_the_first_test_set_by_order_is_named() -> None:
    both = {"none": index_of([]), "other": index_of([" ".join(TEST_SET[5])]), **KNOWN}
    clean = Decontamination(RULE, both)
    assert clean.found_in(" ".join(TEST_SET[5])) == "other"
    assert clean.found_in(" ".join(TEST_SET[6])) == "exam"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Ein Übel größer als das andere, und noch eins: wie naïve", "E\u0301"),
        ("甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥。", ""),  # a sign is a word
        ("かなもじはひとつずつことばとしてかぞえる", ""),
    ],
)
def test_signs_of_other_scripts_are_words(text: str, same: str) -> None:
    clean = Decontamination(RULE, {"set": index_of([text])})
    assert clean.found_in(f"{same} x {unicodedata.normalize('NFD', text).upper()} y") == "set"
    assert clean.found_in(text[: len(text) // 3]) is None


def test_a_rule_decides_how_much_is_too_much() -> None:
    text = " ".join([*words(random.Random(5), 100), *TEST_SET[7][:40]])

    def found(**rule: float) -> str | None:
        return Decontamination(DecontaminateSection.model_validate(rule), KNOWN).found_in(text)

    assert found(max_share=0.5) is None
    assert found(max_share=0.1) == "exam"
    assert found(max_share=0.5, passage_words=40) == "exam"


def test_every_text_of_a_test_set_is_looked_for(tmp_path: Path) -> None:
    question, choice, turn, essay = (" ".join(text) for text in TEST_SET[:4])
    row = {"question": question, "n": 3, "choices": [choice], "turns": [{"content": turn}]}
    (tmp_path / "exam.jsonl").write_text(json.dumps(row) + "\nnot JSON\n")
    (tmp_path / "essay.txt").write_text(essay)

    def found(name: str, *texts: str) -> list[str | None]:
        section = TestSetSection(dataset=str(tmp_path / name))
        known = passages_of(section, cache_dir=tmp_path / "cache")
        clean = Decontamination(RULE, {"set": known})
        return [*map(clean.found_in, texts)]

    assert found("exam.jsonl", question, choice, turn, essay) == ["set", "set", "set", None]
    assert found("essay.txt", essay, question) == ["set", None]
    with pytest.raises(CorpusError, match="does not exist"):
        found("absent.jsonl")
    (tmp_path / "short.jsonl").write_text('{"question": "What is 2 + 2?"}\n')
    with pytest.raises(CorpusError, match="1 texts, and none of 8 words or more"):
        found("short.jsonl")
