"""`bench topk` measures every path on the same fresh rows, and says which one `compress` takes."""

import json
from pathlib import Path

import pytest
import torch

from helpers.command import stillhouse
from stillhouse.bench.topk import DEFAULT_TARGET, WEIGHTED_TARGET, WHOLE_TARGET, Setting
from stillhouse.logits.topk import blockmax_cpu


def test_the_verb_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "topk.json"
    sizes = (
        "--vocab",
        "2000",
        "--k",
        "8",
        "--tokens",
        "4",
        "--dtype",
        "bfloat16",
        "--repeats",
        "2",
        "--no-compile",
    )
    done = stillhouse("bench", "topk", *sizes, "--out", out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    assert found["setting"] == {
        "device": "cpu",
        "vocab_size": 2000,
        "k": 8,
        "num_tokens": 4,
        "dtype": "bfloat16",
    }
    assert found["allocator"] in done.out
    has_compiler = blockmax_cpu.compiled().split_rows is not None
    assert found["path"]["name"] == ("native" if has_compiler else "blockmax")
    assert ("the filter in C" in found["seconds"]) == has_compiler
    assert found["seconds"].keys() >= {DEFAULT_TARGET, WEIGHTED_TARGET, WHOLE_TARGET}
    assert found["seconds"].keys() == found["times_eager"].keys() == found["extra_bytes"].keys()
    assert found["times_eager"]["torch: topk, logsumexp"] == {
        "median": 1.0,
        "least": 1.0,
        "most": 1.0,
    }
    assert "compress takes the path" in done.out


def test_every_repeat_has_logits_of_its_own() -> None:
    setting = Setting(2, 50, 4, "float32", "cpu")
    assert torch.equal(setting.logits(1), setting.logits(1))
    assert not torch.equal(setting.logits(1), setting.logits(2))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(("--k", "9"), "--k is 9, but --vocab is 9"), (("--device", "cuda"), "no such device")],
)
def test_what_cannot_be_measured_is_refused(
    change: tuple[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = stillhouse("bench", "topk", "--vocab", "9", "--k", "3", *change)
    assert done.code == 2
    assert complaint in done.err
