"""`bench writing` gives every way the same prompts, and counts what each of them wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.command import stillhouse
from stillhouse.bench.cost import Cost
from stillhouse.bench.random_model import RandomModel
from stillhouse.bench.writing import (
    GENERATE,
    SORTED,
    Measured,
    Setting,
    lengths_of,
    round_of,
    table,
)
from stillhouse.engines.vllm import is_installed

SMALL = (
    "--prompts 5 --longest-prompt 24 --max-new-tokens 8 --mean-new-tokens 4 --batch 2 "
    "--vocab 300 --hidden 32 --layers 1 --repeats 2"
)


def setting_of(num_prompts: int) -> Setting:
    return Setting(num_prompts, 512, 8, 4, 2, RandomModel(300, 32, 1, "float32", "cpu", 1))


def test_the_verb_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "writing.json"
    done = stillhouse("bench", "writing", *SMALL.split(), "--out", out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())["ways"]
    engines = {"transformers", "vllm"} if is_installed() else {"transformers"}
    assert found.keys() == {GENERATE, SORTED} | engines
    assert ("vllm is not installed here" in done.out) == (not is_installed())
    for measured in found.values():
        assert len(measured["costs"]) == len(measured["num_tokens"]) == 2
        assert all(5 <= number <= 5 * 8 for number in measured["num_tokens"])


def test_an_engine_that_is_none_is_refused_by_its_name() -> None:
    done = stillhouse("bench", "writing", "--engines", "transformers,vlm")
    assert done.code == 2
    assert "there is no writer's engine 'vlm'; wanted transformers or vllm" in done.err


def test_prompts_are_the_same_for_a_seed_and_of_mixed_length() -> None:
    first, again, other = (round_of(setting_of(400), seed=seed) for seed in (1, 1, 2))
    pairs = zip(first.prompts, again.prompts, strict=True)
    assert all(np.array_equal(one.ids, other.ids) for one, other in pairs)
    assert first.seeds == again.seeds != other.seeds
    lengths = np.array([len(prompt.ids) for prompt in first.prompts])
    assert 16 <= lengths.min() < 20
    assert 430 < lengths.max() <= 512
    assert 70 < np.median(lengths) < 120  # of 16 and 512, the geometric mean is 91


@pytest.mark.parametrize(
    ("row", "wanted"), [([5, 7, 0, 0], 2), ([9, 5, 5, 5], 1), ([5, 5, 5, 5], 4), ([5, 5, 5, 7], 4)]
)
def test_new_tokens_are_counted_to_the_first_that_ends_a_sample(
    row: list[int], wanted: int
) -> None:
    assert list(lengths_of([row, row], frozenset([7, 9]))) == [wanted, wanted]


def test_ratios_are_taken_within_a_round() -> None:
    slow = Measured([10, 30], [Cost(1.0, 1.0), Cost(1.5, 9.0)])
    fast = Measured([10, 10], [Cost(0.5, 1.0), Cost(0.25, 1.0)])
    assert fast.per_cpu_s == [20.0, 40.0]
    ratio = fast.times(slow)
    assert (ratio.least, ratio.most) == (2.0, 2.0)
    found = table(setting_of(5), {SORTED: slow, "transformers": fast, "vllm": slow})
    _, _, beside_sorted, beside_first, _ = ([*column.cells] for column in found.columns)
    assert beside_sorted == ["1.00\n1.00–1.00", "2.00\n2.00–2.00", "1.00\n1.00–1.00"]
    assert beside_first == ["0.50\n0.50–0.50", "1.00\n1.00–1.00", "0.50\n0.50–0.50"]
