"""The ways that `bench loss` and `bench head` compare do the same work, and what they cost is
really measured."""

import json
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.bench import head, loss
from stillhouse.bench.allocator import KEPT
from stillhouse.bench.cost import Timings, Work, extra_bytes, time_in_turn
from stillhouse.bench.loss import DIVERGENCES, NAIVE, OURS, PRODUCTS, Inputs, Setting, work_of
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec, compress, decode
from stillhouse.losses.divergences import divergence_named

CPU = torch.device("cpu")
SMALL = Setting(num_tokens=20, vocab_size=101, hidden_size=8, k=7, dtype="float32", device="cpu")
MB = 1_000_000


@pytest.mark.parametrize("name", DIVERGENCES)
def test_ours_and_autograd_are_the_same_loss_with_the_same_gradients(name: str) -> None:
    inputs, divergence = Inputs.of(SMALL, 0), divergence_named(name, 0.5)
    torch.testing.assert_close(
        loss.ours(inputs, divergence), loss.naive(inputs, divergence), rtol=1e-4, atol=1e-5
    )


def test_the_text_alone_is_the_cross_entropy() -> None:
    inputs = Inputs.of(SMALL, 0)
    logits_TV = inputs.hidden_TH @ inputs.weight_VH.T
    wanted = inputs.with_gradients(
        torch.nn.functional.cross_entropy(logits_TV, inputs.labels_T, reduction="sum")
    )
    torch.testing.assert_close(loss.our_text(inputs), wanted, rtol=1e-4, atol=1e-5)


def test_targets_are_distributions_and_each_seed_has_its_own_data() -> None:
    one, other = Inputs.of(SMALL, 1), Inputs.of(SMALL, 2)
    assert all(
        row.unique().numel() == SMALL.k and row.max() < SMALL.vocab_size
        for row in one.target.token_ids_TK
    )
    mass_T = one.target.logprobs_TK.exp().sum(1) + one.target.tail_logmass_T.exp()
    torch.testing.assert_close(mass_T, torch.ones_like(mass_T))
    assert not torch.equal(one.hidden_TH, other.hidden_TH)
    assert not torch.equal(one.target.token_ids_TK, other.target.token_ids_TK)


def test_the_head_benchs_ways_find_the_same_targets() -> None:
    inputs = head.Inputs.of(SMALL, 0)
    (records_TB,), (logprobs_TK, ids_TK) = head.ours(inputs), head.eager(inputs)
    decoded = decode(records_TB, TargetSpec(SMALL.vocab_size, SMALL.k))
    assert torch.equal(decoded.token_ids_TK.sort(1).values.long(), ids_TK.sort(1).values)
    (logits_TV,) = head.product(inputs)
    exact = compress(logits_TV, TargetSpec(SMALL.vocab_size, SMALL.k))
    torch.testing.assert_close(logprobs_TK, exact.logprobs_TK, rtol=1e-5, atol=1e-5)


def test_a_ratio_is_taken_within_a_repeat() -> None:
    timings = Timings({"ours": [1.0, 2.0, 30.0], "theirs": [2.0, 4.0, 60.0]})
    assert (timings.ratio("ours", "theirs").least, timings.ratio("ours", "theirs").most) == (
        0.5,
        0.5,
    )


def test_the_first_rounds_are_not_timed_and_every_repeat_has_fresh_work() -> None:
    done: list[tuple[int, str]] = []

    def work(repeat: int, way: str) -> list[Tensor]:
        done.append((repeat, way))
        return []

    def works_of(repeat: int) -> dict[str, Work]:
        return {way: partial(work, repeat, way) for way in ("a", "b")}

    timings = time_in_turn(works_of, repeats=2, device=CPU)
    assert done == [(0, "a"), (0, "b")] * 3 + [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert {way: len(seconds) for way, seconds in timings.seconds.items()} == {"a": 2, "b": 2}


def test_a_way_with_large_temporaries_is_timed_without_page_faults_of_taking_them_anew() -> None:
    faults: list[int] = []

    def work() -> list[torch.Tensor]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * (80 * MB)  # above 32 MiB, which glibc by itself would give back at once
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return []

    timings = time_in_turn(lambda _: {"hungry": work}, repeats=2, device=CPU)
    assert 4 * faults[-1] < faults[0]
    assert timings.allocator == KEPT


def work_on(given_bytes: int, way: str) -> Work:
    """In a process of its own: work that is given so much, returns 50 MB, and meanwhile needs 80
    MB, or nothing."""
    given = torch.ones(given_bytes // 4)

    def work() -> list[torch.Tensor]:
        if way == "hungry":
            torch.ones(80 * MB // 4)
        return [torch.ones(50 * MB // 4) if way == "hungry" else given[:1]]

    return work


def test_memory_is_counted_beyond_what_is_given_and_returned() -> None:
    found = extra_bytes(work_on, 200 * MB, ["hungry", "modest"], device=CPU)
    # the 80 MB are free again before there are the 50
    assert found["hungry"] == pytest.approx(30 * MB, abs=2 * MB)
    assert abs(found["modest"]) < 2 * MB


def test_the_student_head_takes_less_than_a_tenth_of_the_memory_of_autograd() -> None:
    """1,024 tokens at a vocabulary of 32,000: 33 MB are the logits of 256 tokens, 131 MB those of
    all."""
    setting = Setting(
        num_tokens=1024, vocab_size=32_000, hidden_size=16, k=64, dtype="float32", device="cpu"
    )
    found = extra_bytes(work_of, setting, [NAIVE, OURS], device=CPU)
    assert 32 * MB < found[OURS] < found[NAIVE] / 10


def test_bench_loss_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures" / "loss.json"
    loss.bench_loss(SMALL, repeats=2, with_compile=False, command="stillhouse bench loss", out=out)
    found = json.loads(out.read_text())
    assert found["benchmark"] == "loss"
    assert found["setting"]["vocab_size"] == 101
    assert (found["path"]["name"], found["block_tokens"]) == ("torch", 256)
    assert found["provenance"]["command"] == "stillhouse bench loss"
    assert set(found["seconds"]) >= {PRODUCTS, OURS, NAIVE}
    assert found["over_products"][PRODUCTS]["median"] == 1.0
    assert {name.partition(": ")[0] for name in found["divergences"]} == set(DIVERGENCES)
    assert all(spread["least"] > 0 for spread in found["divergences"].values())
    shown = capsys.readouterr().out
    assert "skew_reverse_kl" in shown
    assert "Left out: autograd, compiled; it was not asked for." in shown


def test_bench_head_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    head.bench_head(SMALL, repeats=2, command="stillhouse bench head", out=out)
    found = json.loads(out.read_text())
    assert found["bytes_per_token"] == TargetSpec(101, 7).bytes_per_token
    assert all(
        found["tokens_per_s"][way]["least"] > 0 for way in (head.PRODUCT, head.OURS, head.EAGER)
    )
    assert set(found["extra_bytes"]) == {head.PRODUCT, head.OURS, head.EAGER}


@pytest.mark.parametrize("bench", [partial(loss.bench_loss, with_compile=False), head.bench_head])
def test_what_cannot_be_measured_is_refused(bench: partial[None]) -> None:
    with pytest.raises(ConfigError, match="--k is 102, above --vocab, which is 101"):
        bench(Setting(20, 101, 8, 102, "float32", "cpu"), repeats=1, command="", out=None)
