"""The evaluation is exact: it gives what a naive dense computation in float64 gives, however it is
cut into batches and blocks.

Shapes: S sequences, L positions, T target tokens, V vocabulary.
"""

import math
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.chunks import make_chunk, small_recipe
from helpers.models import make_model
from stillhouse.cluster.processes import Secrets
from stillhouse.config import EvaluateSection, ModelSection
from stillhouse.evaluation.scores import EvaluationJob, evaluate
from stillhouse.losses.score import Scores
from stillhouse.sequence import Sequences

RECIPE = small_recipe(num_sequences=7, sequence_length=24, chunk_sequences=7)
V = RECIPE.vocab_size


@dataclass(frozen=True)
class Models:
    """A teacher whose head is padded, and two students of other sizes."""

    teacher: ModelSection
    student: ModelSection
    control: ModelSection

    def job(self, *, batch_sequences: int = 3, block_tokens: int = 10) -> EvaluationJob:
        return EvaluationJob(
            teacher=self.teacher,
            models={"student": self.student, "control": self.control},
            vocab_size=V,
            section=EvaluateSection(batch_sequences=batch_sequences, block_tokens=block_tokens),
            device="cpu",
            threads=1,
            secrets=Secrets(None),
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    make_model(
        folder / "teacher", vocab_size=V + 20, tokenizer_vocab_size=V, weight_std=0.5, seed=1
    )
    make_model(
        folder / "student",
        architecture="gemma2",
        vocab_size=V,
        weight_std=0.3,
        config={"final_logit_softcapping": 3.0},
        seed=2,
    )
    make_model(folder / "control", vocab_size=V, hidden_size=16, weight_std=0.2, tied=False, seed=3)
    return Models(
        *(
            ModelSection(model=str(folder / name), dtype="float32")
            for name in ("teacher", "student", "control")
        )
    )


@pytest.fixture(scope="module")
def heldout(models: Models) -> Sequences:
    """Packed rows of random tokens, which no model foresees, and three rows that the student wrote:
    it is too sure of the first and not sure enough of the others, so that a calibration error
    depends on its bins."""
    chunk = make_chunk(RECIPE)
    rows = Sequences(
        chunk.sequences.token_ids_SL.copy(),
        chunk.sequences.positions_SL.copy(),
        chunk.sequences.loss_mask_SL.copy(),
    )
    rows.token_ids_SL[:3] = written_by(
        models.student, first_tokens=[5, 50, 250], length=RECIPE.sequence_length
    )
    rows.positions_SL[:3] = np.arange(RECIPE.sequence_length)
    rows.loss_mask_SL[:3, :-1] = 1
    return rows


@torch.inference_mode()
def written_by(section: ModelSection, *, first_tokens: list[int], length: int) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32).eval()
    ids_SL = torch.tensor(first_tokens)[:, None]
    while ids_SL.shape[1] < length:
        next_S = model(ids_SL, use_cache=False).logits[:, -1, :V].argmax(dim=-1)
        ids_SL = torch.cat([ids_SL, next_S[:, None]], dim=1)
    return ids_SL.numpy().astype(np.int32)


@torch.inference_mode()
def dense_logprobs(section: ModelSection, rows: Sequences) -> np.ndarray:
    """float64 [T, V]: the model's own logits, one row at a time, at the masked-in positions."""
    model = AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32).eval()
    found = []
    for ids_L, positions_L, mask_L in zip(
        rows.token_ids_SL, rows.positions_SL, rows.loss_mask_SL, strict=True
    ):
        ids_1L, positions_1L = (
            torch.from_numpy(ids_L).long()[None],
            torch.from_numpy(positions_L).long()[None],
        )
        logits_LV = (
            model(input_ids=ids_1L, position_ids=positions_1L, use_cache=False)
            .logits[0, :, :V]
            .double()
        )
        found.append(torch.log_softmax(logits_LV, dim=-1).numpy()[mask_L == 1])
    return np.concatenate(found)


def naive_scores(p_TV: np.ndarray, q_TV: np.ndarray, labels_T: np.ndarray) -> Scores:
    """The definitions, token by token; p is the teacher's, q the model's, both
    log-probabilities."""
    num_tokens = len(labels_T)
    cross_entropy = kl = acceptance = 0.0
    agreed = 0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for p_V, q_V, label in zip(p_TV, q_TV, labels_T, strict=True):
        cross_entropy -= q_V[label]
        kl += float(np.sum(np.exp(p_V) * (p_V - q_V)))
        acceptance += float(np.minimum(np.exp(p_V), np.exp(q_V)).sum())
        agreed += int(p_V.argmax() == q_V.argmax())
        confidence = float(np.exp(q_V.max()))
        bins.setdefault(min(14, int(confidence * 15)), []).append(
            (confidence, bool(q_V.argmax() == label))
        )
    error = 0.0
    for members in bins.values():
        confidences, hits = zip(*members, strict=True)
        error += len(members) / num_tokens * abs(np.mean(confidences) - np.mean(hits))
    return Scores(
        num_tokens,
        cross_entropy / num_tokens,
        kl / num_tokens,
        agreed / num_tokens,
        float(error),
        acceptance / num_tokens,
    )


def labels_of(rows: Sequences) -> np.ndarray:
    return np.array([rows.token_ids_SL[s, t + 1] for s, t in np.argwhere(rows.loss_mask_SL == 1)])


def assert_close(found: Scores, wanted: Scores, *, atol: float = 2e-6) -> None:
    assert found.num_tokens == wanted.num_tokens
    np.testing.assert_allclose(astuple(found), astuple(wanted), rtol=0, atol=atol)


def test_every_score_is_the_naive_dense_one(models: Models, heldout: Sequences) -> None:
    found = evaluate(models.job(), heldout)
    assert found.keys() == {"teacher", "student", "control"}
    teacher_TV, labels_T = dense_logprobs(models.teacher, heldout), labels_of(heldout)
    sections = {"teacher": models.teacher, "student": models.student, "control": models.control}
    for name, scores in found.items():
        wanted = naive_scores(teacher_TV, dense_logprobs(sections[name], heldout), labels_T)
        assert_close(scores, wanted)
    assert found["student"].kl > 0.05
    assert 0.05 < found["student"].acceptance < 0.95


@pytest.mark.parametrize(("batch_sequences", "block_tokens"), [(1, 1), (2, 5), (7, 10_000)])
def test_batches_and_blocks_change_nothing(
    models: Models, heldout: Sequences, batch_sequences: int, block_tokens: int
) -> None:
    found = evaluate(
        models.job(batch_sequences=batch_sequences, block_tokens=block_tokens), heldout
    )
    for name, scores in evaluate(models.job(), heldout).items():
        assert_close(found[name], scores)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_against_itself_is_perfect(
    models: Models, heldout: Sequences, dtype: str
) -> None:
    """In bfloat16 most rows have their greatest logit more than once: a first choice is one of
    them, and both models' the same."""
    teacher = models.teacher.model_copy(update={"dtype": dtype})
    job = replace(models.job(), teacher=teacher, models={"student": teacher.model_copy()})
    for scores in evaluate(job, heldout).values():
        assert (scores.kl, scores.agreement) == (0.0, 1.0)
        assert scores.acceptance == pytest.approx(1.0, abs=1e-6)


def test_two_rows_of_the_head_that_are_equal_are_no_disagreement(
    models: Models, heldout: Sequences, tmp_path: Path
) -> None:
    twins = AutoModelForCausalLM.from_pretrained(models.control.model, dtype=torch.float32)
    twins.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][1::2] = weights["lm_head.weight"][::2]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    section = ModelSection(model=str(tmp_path), dtype="float32")
    scores = evaluate(replace(models.job(), teacher=section, models={"student": section}), heldout)
    assert scores["student"].agreement == 1.0


def test_a_token_that_has_no_target_is_not_scored(models: Models, heldout: Sequences) -> None:
    """What stands behind the mask decides nothing: not the last token of a document, nor a row
    without a target."""
    silent = Sequences(
        heldout.token_ids_SL.copy(), heldout.positions_SL, heldout.loss_mask_SL.copy()
    )
    silent.loss_mask_SL[5:] = 0
    silent.token_ids_SL[5:] = 7
    kept = heldout.select(slice(0, 5))
    for name, scores in evaluate(models.job(), silent).items():
        assert_close(scores, evaluate(models.job(), kept)[name])


def test_a_certain_and_wrong_model_is_badly_calibrated(
    models: Models, heldout: Sequences, tmp_path: Path
) -> None:
    """A head that is a thousand times as loud is sure of itself, and right no more often than
    before."""
    loud = AutoModelForCausalLM.from_pretrained(models.control.model, dtype=torch.float32)
    with torch.no_grad():
        loud.lm_head.weight *= 1000
    loud.save_pretrained(tmp_path)
    job = replace(
        models.job(),
        models={
            "student": ModelSection(model=str(tmp_path), dtype="float32"),
            "control": models.control,
        },
    )
    scores = evaluate(job, heldout)
    assert scores["student"].agreement == scores["control"].agreement
    assert scores["student"].calibration_error > 0.9 > scores["control"].calibration_error


def test_without_a_teachers_weights_students_have_the_same_scores_that_need_none(
    models: Models, heldout: Sequences
) -> None:
    beside = evaluate(models.job(), heldout)
    alone = evaluate(replace(models.job(), teacher=None), heldout)
    assert [*alone] == ["student", "control"]
    for name, found in alone.items():
        assert found.cross_entropy == beside[name].cross_entropy
        assert found.calibration_error == beside[name].calibration_error
        assert all(math.isnan(value) for value in (found.kl, found.agreement, found.acceptance))
