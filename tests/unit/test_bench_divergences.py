"""Divergences are compared fairly: equal bytes, equal beginnings, and shares between the bounds."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.bench.divergences import (
    BUDGET,
    DIVERGENCES,
    Effort,
    Result,
    Scope,
    bench_divergences,
    forms_of,
    table,
)
from stillhouse.bench.language import Language, LanguageScores, LanguageStudent, language_scores
from stillhouse.bench.peers import REAL_VOCAB, Peer
from stillhouse.errors import ConfigError
from stillhouse.logits import Head, TargetSpec
from stillhouse.losses.divergences import forward_kl


def nothing_to_learn(teacher_TV: Tensor, hidden_TH: Tensor, head: Head, labels_T: Tensor) -> Tensor:
    assert teacher_TV.shape == (len(hidden_TH), head.vocab_size)
    assert labels_T.shape == hidden_TH.shape[:1]
    return 0.0 * hidden_TH.sum()


PEER = Peer("a peer", "Another", lambda vocab_size: vocab_size // 1000, nothing_to_learn)
QUICK = Effort(num_seeds=1, num_steps=2, batch_tokens=8, num_contexts=6)


def test_a_form_affords_what_fits_into_the_budget_at_a_real_vocabulary() -> None:
    specs = [form for form in forms_of(REAL_VOCAB).values() if isinstance(form, TargetSpec)]
    assert [(spec.k, spec.num_draws, spec.weighted) for spec in specs] == [
        (8, 0, False),
        (34, 0, False),
        (8, 40, False),
        (8, 25, True),
    ]
    assert all(spec.bytes_per_token <= BUDGET for spec in specs)


@pytest.mark.parametrize("top8_mass", [0.5, 0.85])
def test_a_language_is_as_sharp_as_it_was_asked_for(top8_mass: float) -> None:
    language = Language.of(num_contexts=8, vocab_size=600, top8_mass=top8_mass, seed=0)
    best = language.logp_CV.exp().topk(8, dim=1).values.sum(dim=1).mean()
    assert float(best) == pytest.approx(top8_mass, abs=1e-3)


def test_scores_are_those_of_the_whole_distribution() -> None:
    language = Language.of(num_contexts=4, vocab_size=100, top8_mass=0.6, seed=0)
    student = LanguageStudent(language, seed=0)
    p, q = language.logp_CV.exp(), student.logq(torch.arange(4)).exp().detach()
    scores = language_scores(language, student, forward_kl)
    assert scores.divergence == scores.forward_kl
    kl, distance = (p * (p / q).log()).sum(dim=1).mean(), (p - q).abs().sum(dim=1).mean() / 2
    assert scores.forward_kl == pytest.approx(float(kl), rel=1e-4)
    assert scores.acceptance == pytest.approx(1 - float(distance), rel=1e-4)


def test_every_divergence_meets_every_form_and_a_bound_has_its_share(tmp_path: Path) -> None:
    out = tmp_path / "divergences.json"
    bench_divergences(
        200, QUICK, Scope(), peers_at=lambda _: [PEER], threads=1, command="a test", out=out
    )
    record = json.loads(out.read_text())
    results = record["results"]
    assert {each["teacher"] for each in results} == {"flat", "sharp"}
    weighted = {each["divergence"] for each in results if each["form"] == "8 + 25 weighted"}
    assert weighted == set(DIVERGENCES)
    peers = [each for each in results if each["form"] == PEER.name]
    assert {each["divergence"] for each in peers} == {"forward_kl"}
    assert {each["share_of_gain"] for each in peers if each["start"] == "warm"} == {0.0}
    assert record["bytes_at_real_vocab"][PEER.name] == 151
    dense = {each["share_of_gain"] for each in results if each["form"] == "everything"}
    assert dense <= {1.0, None}
    far = [each for each in results if each["form"] == "text" and each["start"] == "far"]
    assert {each["share_of_gain"] for each in far} <= {0.0, None}


def test_a_part_of_the_pairings_is_measured_as_in_the_whole(tmp_path: Path) -> None:
    found = {}
    scopes = {
        "all": Scope(starts=("warm", "far"), divergences=("jsd", "tvd")),
        "part": Scope(("sharp",), ("warm",), ("tvd",)),
    }
    for name, scope in scopes.items():
        bench_divergences(
            100,
            QUICK,
            scope,
            peers_at=lambda _: [],
            threads=1,
            command="a test",
            out=tmp_path / f"{name}.json",
        )
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    part = [
        each
        for each in found["all"]
        if (each["teacher"], each["start"], each["divergence"]) == ("sharp", "warm", "tvd")
    ]
    assert found["part"] == part != []


def test_where_the_whole_distribution_gains_nothing_there_is_no_share() -> None:
    scores = LanguageScores(1.0, 1.0, 0.5)
    results = [
        Result("flat", 0, "far", "jsd", "8 + tail", 0.0, scores, None),
        Result("sharp", 0, "far", "jsd", "8 + tail", 0.0, scores, 0.5),
    ]
    (column,) = list(table(results, "far").columns)[2:]
    assert list(column.cells) == ["no gain", "50\n50–50"]


def test_what_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="there is no 'hot'; wanted one of warm, schedule, far"):
        Scope(starts=("warm", "hot")).check()
