"""Targets are compared fairly: records of equal bytes, students that begin alike and read the same,
and the real compression."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.models import make_model
from stillhouse.bench.beside_peers import figure as figure_beside
from stillhouse.bench.beside_peers import forms_beside
from stillhouse.bench.classroom import Form, Lessons, target_of, teach
from stillhouse.bench.coding import coding
from stillhouse.bench.peers import Peer, require_a_peer
from stillhouse.bench.targets import (
    BUDGETS,
    QUICK,
    figure,
    forms_of,
    record_of,
    share_of_the_gap,
    spec_within,
    table,
)
from stillhouse.config import CorpusSection, TeacherSection
from stillhouse.errors import ConfigError
from stillhouse.logits import Head, TargetSpec, compress, token_seeds
from stillhouse.losses.score import Scores
from stillhouse.models.load import load_model
from stillhouse.models.tokenizers import load_tokenizer, tokenizer_digest
from stillhouse.pipeline.toy import Shape
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import prepare_corpus

LESSONS = Lessons(
    3,
    2,
    Shape(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2),
    learning_rate=3e-3,
    warmup_steps=1,
)
V = 300
WHOLE = TargetSpec(V, V)


def seeds(num_tokens: int) -> torch.Tensor:
    return token_seeds(0, torch.zeros(num_tokens), torch.arange(num_tokens))


def random_logits(num_tokens: int, vocab_size: int = V) -> torch.Tensor:
    return 2 * torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocab_size", [4096, 151_936])
def test_every_record_fills_its_budget_and_none_is_above_it(vocab_size: int) -> None:
    forms = forms_of(vocab_size)
    assert [form.kind for form in forms[:2]] == ["text", "everything"]
    assert len({form.name for form in forms}) == len(forms)
    for budget in BUDGETS:
        within = [
            form
            for form in forms
            if form.bytes_per_token is not None and budget - 5 <= form.bytes_per_token <= budget
        ]
        assert {form.spec.num_draws == 0 for form in within} == {True, False}
        assert {form.spec.k == 0 for form in within} == {True, False}
        assert "independent" in {form.kind for form in within}
    assert all(
        form.bytes_per_token is None or max(BUDGETS) >= form.bytes_per_token for form in forms
    )


def test_one_draw_more_would_not_fit() -> None:
    spec = spec_within(64, 4096, 10)
    assert spec.bytes_per_token <= 64 < replace(spec, num_draws=spec.num_draws + 1).bytes_per_token


School = tuple[PreTrainedModel, PreTrainedTokenizerFast, Corpus]


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    folder = make_model(tmp_path_factory.mktemp("teacher"), vocab_size=V, weight_std=0.3)
    documents = tmp_path_factory.mktemp("documents") / "all.jsonl"
    documents.write_text(
        "".join(
            json.dumps({"text": f"line {number}: " + "still " * (number % 9)}) + "\n"
            for number in range(60)
        )
    )
    tokenizer = load_tokenizer(str(folder))
    section = CorpusSection(dataset=str(documents), sequence_length=16, heldout_sequences=2)
    split = prepare_corpus(
        section, tokenizer, tokenizer_digest=tokenizer_digest(tokenizer), cache_dir=folder / "cache"
    )
    return load_model(TeacherSection(model=str(folder), dtype="float32")), tokenizer, split.train


def weights_of(
    form: Form, school: School, *, seed: int = 0, beside: tuple[Form, ...] = ()
) -> torch.Tensor:
    teacher, tokenizer, corpus = school
    steps: list[None] = []
    students = teach(
        [*beside, form],
        teacher,
        tokenizer,
        corpus,
        LESSONS,
        seed=seed,
        on_step=lambda: steps.append(None),
    )
    assert len(steps) == LESSONS.num_steps
    return torch.cat(
        [parameter.detach().flatten() for parameter in students[form.name].parameters()]
    )


def test_a_record_that_keeps_everything_teaches_what_the_whole_distribution_does(
    school: School,
) -> None:
    whole = weights_of(Form("everything", "everything", WHOLE), school)
    stored = weights_of(Form("all", "stored", WHOLE), school)
    text = weights_of(Form("text", "text", WHOLE), school)
    assert (whole - stored).norm() < 0.1 * (whole - text).norm()


def test_a_student_is_the_same_alone_and_beside_others_and_another_with_another_seed(
    school: School,
) -> None:
    form = Form("4+3", "stored", TargetSpec(V, 4, num_draws=3))
    alone = weights_of(form, school)
    others = (
        Form("text", "text", WHOLE),
        Form("rs-6", "independent", TargetSpec(V, 0, num_draws=6)),
    )
    assert torch.equal(weights_of(form, school, beside=others), alone)
    assert not torch.equal(weights_of(form, school, seed=1), alone)
    assert not torch.equal(weights_of(replace(form, ce_weight=1.0), school), alone)


def test_corpora_shorter_than_the_lessons_are_read_again(school: School) -> None:
    teacher, tokenizer, corpus = school
    assert isinstance(corpus, Corpus)
    long = replace(LESSONS, num_steps=corpus.num_sequences // LESSONS.batch_sequences + 2)
    teach(
        [Form("text", "text", WHOLE)],
        teacher,
        tokenizer,
        corpus,
        long,
        seed=0,
        on_step=lambda: None,
    )


@pytest.mark.parametrize("power", [0.8, 1.0, 1.25])
def test_weights_make_up_for_the_proposal(school: School, power: float) -> None:
    """With many draws, a student of the weighted ones learns what the whole distribution
    teaches."""
    whole = weights_of(Form("everything", "everything", WHOLE), school)
    text = weights_of(Form("text", "text", WHOLE), school)
    weighted = weights_of(
        Form("many", "weighted", TargetSpec(V, 0, num_draws=4000), proposal=power), school
    )
    assert (whole - weighted).norm() < 0.3 * (whole - text).norm()


def test_a_weight_takes_a_byte() -> None:
    spec = TargetSpec(V, 0, num_draws=9)
    assert Form("", "weighted", spec).bytes_per_token == spec.bytes_per_token + 9


def test_independent_draws_vary_more_than_ours_and_mean_the_same() -> None:
    logits = random_logits(1, 20).expand(5000, 20)
    spec = TargetSpec(20, 0, num_draws=10)
    counts = {}
    for kind in ("stored", "independent"):
        ids = target_of(Form("", kind, spec), logits, seeds(5000), step_seed=3).tail_ids_TN.long()
        counts[kind] = torch.zeros(5000, 20).scatter_add_(1, ids, torch.ones(ids.shape))
    for found in counts.values():
        assert (found.mean(0) - 10 * logits[0].softmax(0)).abs().max() < 0.15
    assert counts["stored"].var(0).sum() < 0.6 * counts["independent"].var(0).sum()


def test_the_bytes_of_counted_draws_are_those_of_a_code_that_can_be_read_back() -> None:
    """Ten draws of one id: E(1) bytes for it, one byte for the number of ids, and 9 bits that would
    part one id's draws from the next's."""
    logits = torch.full((4, 1000), -30.0)
    logits[:, 7] = 0.0
    found = coding("peaks", logits, num_draws=10)
    assert (found.mean_distinct, found.multiset_bytes) == (
        1.0,
        TargetSpec(1000, 0, num_draws=10).bytes_per_token,
    )
    assert found.mean_counted_bytes == TargetSpec(1000, 0, num_draws=1).bytes_per_token + 1 + 2
    flat = coding("flat", torch.zeros(4, 151_936), num_draws=50)
    assert flat.mean_distinct > 49
    assert (
        flat.multiset_bytes
        == 85
        < flat.mean_counted_bytes
        <= flat.worst_counted_bytes
        == 85 + 1 + 7
    )


def scores(kl: float) -> Scores:
    return Scores(10, 4.0 + kl, kl, 0.5, 0.01, 0.8)


def test_the_gap_is_from_the_text_to_the_whole_distribution() -> None:
    found = {
        "text": scores(1.0),
        "everything": scores(0.2),
        "half": scores(0.6),
        "worse": scores(1.4),
    }
    assert [share_of_the_gap(found, name) for name in found] == pytest.approx([0.0, 1.0, 0.5, -0.5])


def test_what_was_measured_is_kept_and_drawn(tmp_path: Path) -> None:
    forms = forms_of(4096)
    rounds = [
        {form.name: scores(1.0 - 0.01 * index + 0.1 * seed) for index, form in enumerate(forms)}
        for seed in range(3)
    ]
    codings = [coding("flat", torch.zeros(2, 500), num_draws=5)]
    found = json.loads(json.dumps(record_of(QUICK, LESSONS, forms, rounds, codings)))
    assert len(found["rounds"]) == 3
    assert found["forms"][2]["bytes_per_token"] <= 48
    assert table(forms, rounds).row_count == len(forms)
    figure(forms, rounds).savefig(tmp_path / "figure.svg")
    assert "48 bytes, independent draws" in (tmp_path / "figure.svg").read_text()


def test_compression_is_the_teachers_own() -> None:
    logits = random_logits(6)
    spec = TargetSpec(V, 5, num_draws=4)
    found = target_of(Form("", "stored", spec), logits, seeds(6), step_seed=0)
    wanted = compress(logits, TargetSpec(logits.shape[1], 5, num_draws=4), seeds_T=seeds(6))
    assert torch.equal(found.tail_ids_TN, wanted.tail_ids_TN)
    assert torch.equal(found.token_ids_TK.sort().values, wanted.token_ids_TK.sort().values)


def dense_loss(
    teacher_TV: torch.Tensor, hidden_TH: torch.Tensor, head: Head, labels_T: torch.Tensor
) -> torch.Tensor:
    assert len(labels_T) == len(teacher_TV)
    logp_TV, logq_TV = (each.log_softmax(dim=1) for each in (teacher_TV, head.logits(hidden_TH)))
    return (logp_TV.exp() * (logp_TV - logq_TV)).sum()


PEER = Peer("all of it", "Another", lambda vocab_size: 4 * vocab_size, dense_loss)


def test_a_peer_teaches_in_the_same_lessons_by_its_own_loss(school: School) -> None:
    peer = weights_of(Form(PEER.name, "peer", WHOLE, peer=PEER), school)
    whole = weights_of(Form("everything", "everything", WHOLE), school)
    text = weights_of(Form("text", "text", WHOLE), school)
    assert (whole - peer).norm() < 1e-3 * (whole - text).norm()


def test_ours_stand_beside_each_peer_in_record_table_and_figure(tmp_path: Path) -> None:
    forms = forms_beside(4096, [PEER, replace(PEER, name="more of it")])
    assert [form.name for form in forms[2:]] == [
        "2+10", "5+26", "8+40", "15+97", "all of it", "more of it"
    ]  # fmt: skip
    rounds = [{form.name: scores(1.0 - 0.01 * index) for index, form in enumerate(forms)}]
    found = json.loads(json.dumps(record_of(QUICK, LESSONS, forms, rounds, [])))["forms"]
    assert [each["bytes_at_real_vocab"] for each in found[4:7]] == [99, 202, 4 * 151_936]
    assert [each["peer"] for each in found[4:7]] == [None, None, "Another"]
    assert table(forms, rounds).row_count == len(forms)
    figure_beside(forms, rounds).savefig(tmp_path / "figure.svg")
    assert "more of it" in (tmp_path / "figure.svg").read_text()


def test_without_a_peer_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ConfigError, match="neither DistillKit nor TRL is installed here"):
        require_a_peer([])
