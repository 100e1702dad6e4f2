"""`bench topk` measures every path on the same fresh rows, and says which one `compress` takes."""

import json
from pathlib import Path

import torch

from helpers.command import stillhouse
from stillhouse.bench.contest import Way, contest, contest_table
from stillhouse.logits import native

CPU = torch.device("cpu")


def test_every_way_gets_the_same_fresh_inputs_in_each_round() -> None:
    seen: dict[str, list[float]] = {"a": [], "b": []}
    ways = [Way("a", lambda x: seen["a"].append(float(x))), Way("b", lambda x: seen["b"].append(float(x)))]
    found = contest(ways, lambda number: torch.tensor(float(number)), device=CPU, num_rounds=3)
    assert seen == {"a": [-1.0, 0.0, 1.0, 2.0], "b": [-1.0, 0.0, 1.0, 2.0]}
    assert [one.name for one in found] == ["a", "b"]
    assert all(0 <= one.seconds.least <= one.seconds.median <= one.seconds.most for one in found)


def test_memory_is_the_peak_of_the_work_without_its_inputs() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).mul_(2)  # one copy

    def twice(x: torch.Tensor) -> torch.Tensor:
        return (x + 1) * 2  # two of them at one time

    one, two = contest([Way("one", work), Way("two", twice)], lambda _: torch.zeros(1 << 24), device=CPU, num_rounds=2)
    assert one.peak_bytes is not None
    assert two.peak_bytes is not None
    assert 60 * 2**20 < one.peak_bytes < 80 * 2**20
    assert 120 * 2**20 < two.peak_bytes < 160 * 2**20


def test_the_table_compares_with_the_baseline() -> None:
    ways = [Way("slow", lambda x: [x.exp() for _ in range(40)]), Way("fast", lambda x: x)]
    found = contest(ways, lambda _: torch.zeros(100_000), device=CPU, num_rounds=1)
    rows = contest_table("title", found, num_tokens=10, baseline="slow").columns[2]
    assert next(iter(rows.cells)) == "1.00 x"


def test_the_verb_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "topk.json"
    done = stillhouse("bench", "topk", "--vocab", "2000", "--k", "8", "--tokens", "4", "--dtype", "bfloat16", "--out", str(out))
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    assert found["shape"] == {"device": "cpu", "vocab_size": 2000, "k": 8, "num_tokens": 4, "dtype": "torch.bfloat16"}
    assert found["path"]["name"] == ("native" if native.compiled().split_rows else "blockmax")
    assert {"compress", "our filter in torch"} <= {way["name"] for way in found["ways"]}
    assert "compress takes the path" in done.out
