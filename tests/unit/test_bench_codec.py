"""`bench codec` measures both kinds of rows, and a model's vocabulary grows without a change to
what the model says."""

import json
from pathlib import Path

import pytest
import torch

from helpers.command import stillhouse
from helpers.models import make_model
from stillhouse.bench.trained import enlarged
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher"), vocab_size=300, weight_std=0.3)


def test_the_verb_measures_every_codec_on_both_kinds_of_rows(tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "codec.json"
    sizes = ("--vocab", "1000", "--tokens", "6", "--k", "4", "--k", "9", "--repeats", "1")
    done = stillhouse(
        "bench", "codec", *sizes, "--teacher", teacher, "--out", out, cache=tmp_path / "cache"
    )
    assert done.code == 0, done.err
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["power laws", "a trained model's, its 300 ids enlarged"]
    wanted = [(4, 0, 8), (9, 0, 8), (4, 0, 6), (9, 0, 6), (8, 40, 8), (12, 12, 8), (0, 50, 8)]
    for found in rows.values():
        assert [(one["k"], one["num_draws"], one["value_bits"]) for one in found] == wanted
        for one in found:
            spec = TargetSpec(
                1000, one["k"], num_draws=one["num_draws"], value_bits=one["value_bits"]
            )
            assert one["bytes_per_token"] == spec.bytes_per_token
            assert 0 <= one["mean_kl"] <= one["worst_kl"] < 1e-2
            assert one["encode_tokens_per_s"]["median"] > 0 < one["decode_tokens_per_s"]["median"]
    assert done.out.count("A target in bytes") == 2


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    done = stillhouse(
        "bench", "codec", "--vocab", "100", "--tokens", "6", "--k", "4", "--teacher", tmp_path
    )
    assert done.code == 2
    assert f"there is no model in {tmp_path}" in done.err


def test_an_enlarged_vocabulary_keeps_likely_ids_odds_and_doubles_the_lower_halfs_mass() -> None:
    logits = (
        3
        * torch.randn(
            5, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).float()
    )
    large = enlarged(logits, 10_000)
    assert large.shape == (5, 10_000)
    own = large[:, : 400 * 25 : 25]
    assert torch.equal(own, logits)
    added = torch.ones(10_000, dtype=torch.bool)
    added[: 400 * 25 : 25] = False
    lower = logits.sort(dim=1).values[:, :200]
    torch.testing.assert_close(
        large[:, added].logsumexp(dim=1), lower.logsumexp(dim=1), rtol=0, atol=0.1
    )
    assert torch.equal(large.topk(20, dim=1).values, logits.topk(20, dim=1).values)


def test_a_vocabulary_grows_to_any_size_and_never_shrinks() -> None:
    logits = torch.randn(2, 400)
    assert enlarged(logits, 400) is logits
    assert enlarged(logits, 700).shape == (2, 700)
    assert torch.equal(enlarged(logits, 700)[:, :400], logits)
    with pytest.raises(ConfigError, match="--vocab is 300, less than the 400 ids of the teacher"):
        enlarged(logits, 300)
