"""A grader gives each sample a score from 0 to 1. One that raises, hangs, dies or takes too much
memory costs a sample its score, and one that fails on all of them is an error."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from helpers.graders import samples, section
from stillhouse.config.graders import (
    AcceptSection,
    require_known,
    require_names_of_their_own,
)
from stillhouse.errors import ConfigError, GraderError
from stillhouse.graders import Failure, Graded, Sample, graded, identity_of, make_grader
from stillhouse.graders.fences import last_block
from stillhouse.graders.number import last_number
from stillhouse.store.verdicts import grader_name

OWN = "helpers.graders:obedient"


JUDGE: dict[str, Any] = {
    "kind": "judge",
    "base_url": "http://a/v1",
    "served_model": "m",
    "template": "{text}",
}


def scores_of(texts: Sequence[str], reference: str | None, **settings: Any) -> list[float]:
    with closing(make_grader(section(**settings))) as grader:
        return [*graded(grader, samples(texts, reference)).scores]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4 make 7.", "7"),
        ("1,234.50 in all", "1234.5"),
        ("48/2 = <<48/2=24>>24 clips\n#### 72", "72"),
        ("#### -3\nBut let me check 5.", "-3"),
        ("10-4", "4"),
        ("minus \u22122", "-2"),
        ("$ -1,000,000", "-1000000"),
        ("2024,1,5", "5"),
        ("a: .5", "0.5"),
        ("1.5e3 km", "1500"),
        ("1e99999", "99999"),
        ("x = 07", "7"),
        ("3.", "3"),
        ("version 1.2.3", "3"),
        ("no number", None),
        ("9" * 2000, None),
    ],
)
def test_the_last_number_of_a_text_is_read(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (found is None) == (number is None)
    assert number is None or float(found or 0) == float(number)


def test_a_number_is_compared_by_its_value() -> None:
    texts = ["72", "it is 72.0!", "7 2", "seventy-two", "-72", "#### 72 (not 73)"]
    assert scores_of(texts, "48+24 = <<48+24=72>>72\n#### 72", kind="number") == [1, 1, 0, 0, 0, 1]


def test_texts_are_compared_after_the_named_normalisation() -> None:
    texts = ["Paris", " Paris \n", "the paris.", "London"]
    for normalise, scores in {
        "none": [1, 0, 0, 0],
        "spaces": [1, 1, 0, 0],
        "words": [1, 1, 1, 0],
    }.items():
        assert scores_of(texts, "Paris", kind="exact", normalise=normalise) == scores
    thought = ["<think>Paris</think> London", "<think>London</think> Paris", "Paris"]
    assert scores_of(thought, "Paris", kind="exact", after="</think>") == [0, 1, 1]


def test_json_is_held_to_its_schema() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    texts = [
        '{"a": 1}',
        'Here it is:\n```json\n{"a": 2}\n```\nDone.',
        '{"a": "1"}',
        "{}",
        '{"a": NaN}',
        '{"a": 1',
        "[" * 100_000,
    ]
    settings = {"kind": "json_schema", "schema_text": json.dumps(schema)}
    assert scores_of(texts, None, **settings) == [1, 1, 0, 0, 0, 0, 0]


def test_a_schema_that_is_none_is_refused_and_one_of_another_document_is_not_fetched() -> None:
    with pytest.raises(ConfigError, match="no JSON Schema"):
        make_grader(section(kind="json_schema", schema_text='{"type": "integr"}'))
    elsewhere = '{"$ref": "http://127.0.0.1:9/schema.json"}'
    with pytest.raises(GraderError, match="1 x _WrappedReferencingError"):
        scores_of(["{}"], None, kind="json_schema", schema_text=elsewhere)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\na\n```\nor\n```py\nb\n```\n", "b\n"),
        ("```python\nx = 1", "```python\nx = 1"),
        ("a ``` b ``` c", "a ``` b ``` c"),
    ],
)
def test_the_last_fenced_block_is_read(text: str, block: str) -> None:
    assert last_block(text) == block


def test_a_grader_of_ones_own_that_misbehaves_costs_those_samples_alone() -> None:
    own = section(kind=OWN, wall_s=2.0, memory_bytes=256 << 20, num_processes=2)
    texts = ["0.5", "raise", "hang", "leave", "eat", "1.5", "print", "1", "nan"]
    with closing(make_grader(own)) as grader:
        found = graded(grader, samples(texts))
    assert found.scores == (0.5, 0, 0, 0, 0, 0, 1, 1, 0)
    assert found.failures == {
        "no score from 0 to 1": 2,
        "LookupError": 1,
        "memory": 1,
        "process": 1,
        "time": 1,
    }


def test_a_grader_that_fails_on_all_samples_is_an_error() -> None:
    with pytest.raises(GraderError, match=r"all 3 samples: 3 x LookupError \(the first: as the"):
        scores_of(["raise"] * 3, "", kind=OWN)
    with pytest.raises(GraderError, match="2 x no reference; a score was wanted"):
        scores_of(["a", "b"], None, kind="exact")
    assert scores_of([], None, kind="exact") == []


def test_no_process_of_a_grader_outlives_the_one_that_started_it() -> None:
    script = f"""
import threading
from helpers.graders import samples, section
from stillhouse.graders import make_grader
grader = make_grader(section(kind={OWN!r}))
assert grader.grade(samples(["1"])) == [1.0]
threading.Thread(target=grader.grade, args=(samples(["hang"]),)).start()
print("graded", flush=True)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "graded\n"
        children = psutil.Process(owner.pid).children()
        assert len(children) == 1
        owner.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_what_ones_own_grader_names_must_be_a_function_that_is_there() -> None:
    for name, words in {
        "helpers.graders:not_a_function": "is no function",
        "helpers.graders:missing": "has no missing",
        "helpers.no_such_module:x": "cannot be imported",
    }.items():
        with pytest.raises(ConfigError, match=words):
            make_grader(section(kind=name))


class Broken:
    """It cannot grade some samples, and raises for all that are asked with one of them."""

    identity: Mapping[str, Any] = {"kind": "broken"}

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        if any(sample.text == "bad" for sample in samples):
            raise RuntimeError
        return [1.0] * (1 if len(samples) == 3 else len(samples))

    def close(self) -> None: ...


def test_one_bad_sample_of_a_batch_does_not_cost_the_others() -> None:
    assert graded(Broken(), samples(["a", "bad"])) == Graded((1.0, 0.0), {"RuntimeError": 1})
    assert graded(Broken(), samples(["a", "b", "c"])).scores == (1.0, 1.0, 1.0)


def test_a_failure_is_a_score_of_zero() -> None:
    failure = Failure("time", "too long")
    assert failure == 0.0
    assert json.dumps([failure]) == "[0.0]"
    assert (failure.reason, failure.detail) == ("time", "too long")


# ---- sections and identities


def test_a_grader_is_named_by_what_decides_its_scores() -> None:
    maths = section(kind="maths")
    assert identity_of(maths) == {
        "kind": "maths",
        "memory_bytes": 4 << 30,
        "version": 1,
        "wall_s": 10.0,
    }
    same = section(kind="maths", name="sums", num_processes=8)
    other = section(kind="maths", wall_s=20)
    names = [grader_name(identity_of(each)) for each in (maths, same, other)]
    assert names[0] == names[1] != names[2]
    moved = JUDGE | {"base_url": "http://b/v1/", "api_key_env": "KEY", "timeout_s": 3}
    assert identity_of(section(**JUDGE)) == identity_of(section(**moved))
    own = identity_of(section(kind=OWN))
    assert own["kind"] == OWN
    assert len(own["digest"]) == 16


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "exakt"}, "wanted exact, number, .*did you mean 'exact'"),
        ({"kind": "json_schema", "schema_text": "{"}, "wanted a JSON Schema as JSON text"),
        ({"kind": "json_schema", "schema_text": "3"}, "wanted a JSON object; found 3"),
        (JUDGE | {"base_url": "a"}, "http://"),
        (JUDGE | {"template": "x"}, "{text} somewhere"),
        ({"kind": "number", "after": "####"}, "Extra inputs"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        section(**values)


def test_graders_have_names_of_their_own_and_acceptance_names_those_alone() -> None:
    exact, sums = section(kind="exact"), section(kind="number", name="sums")
    require_names_of_their_own([exact, sums])
    require_known(AcceptSection(min_score={"sums": 1.0}), ["exact", "sums"])
    with pytest.raises(ValueError, match="two graders are called 'exact'"):
        require_names_of_their_own([exact, exact])
    with pytest.raises(ValueError, match="names the grader 'sum', which is none of exact, sums"):
        require_known(AcceptSection(min_score={"sum": 1.0}), ["exact", "sums"])
    with pytest.raises(ValidationError, match="names no grader to choose by"):
        AcceptSection(best_of=4)
