"""Training on text alone: a real run over accepted rollouts, without any weights of a teacher, is
stopped and goes on; its losses are those of the same student beside a real teacher."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.calls import must_not_be_called
from helpers.models import make_tokenizer
from helpers.ranks import RankGroup
from helpers.training import train_and_tell
from helpers.world import TinyWorld, merged
from helpers.writers import Pupil
from stillhouse import pipeline
from stillhouse.config.generate import GenerateConfig
from stillhouse.errors import CorpusError
from stillhouse.evaluation.scores import ModelName
from stillhouse.losses.score import Scores
from stillhouse.pipeline import Plan
from stillhouse.pipeline.heldout import first_sequences
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.tracking import ChunkEvent, TeacherEvent, TrainEvent, read_journal
from stillhouse.writer.actor import computed, published

STOPPED, STEPS = 3, 6
LEARNING: dict[str, Any] = {
    "divergence_weight": 0.0,
    "ce_weight": 1.0,
    "global_batch_sequences": 4,
    "min_learning_rate": 3e-3,  # the peak: as if it had been asked for all steps at once
    "checkpoint_every_steps": STOPPED,
}


def accepted_rollouts(folder: Path, writer: Path) -> dict[str, Any]:
    """The corpus and the store of a run on sums that were answered and graded, of which the right
    ones are taken."""
    rows = [{"question": f"{n}+{n + 10}=", "answer": f"{2 * n + 10}"} for n in range(60)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "prompts": {
            "dataset": str(folder / "sums.jsonl"),
            "format": "text",
            "prompt_column": "question",
            "reference_column": "answer",
        },
        "writer": {"model": str(writer), "engine": "helpers.writers:Pupil", "dtype": "float32"},
        "sampling": {"samples": 2, "max_new_tokens": 20, "sequence_length": 64},
        "store": {"url": str(folder / "store"), "shard_prompts": 20},
        "graders": [{"kind": "number"}],
    }
    plan = pipeline.plan_generation(
        GenerateConfig.model_validate(values), run_dir=folder / "g", cache_dir=folder / "cache"
    )
    store = RolloutStore.create(plan.store.url, plan.recipe)
    pupil = Pupil(plan.config.writer, plan.recipe, device="cpu")
    for number in range(plan.recipe.num_shards):
        published(store, computed(store, plan.block(number), pupil), tell=must_not_be_called)
    pipeline.grade(plan)
    corpus = {
        "dataset": f"rollouts://{plan.recipe.fingerprint[:16]}",
        "accept": {"min_score": {"number": 1.0}},
        "heldout_sequences": 2,
    }
    return {"corpus": corpus, "store": {"url": plan.store.url, "chunk_sequences": 4}}


@dataclass(frozen=True)
class Trained:
    """A run on text alone that was asked for its first steps, and then for all."""

    plan: Plan
    data: dict[str, Any]  # its sections corpus and store
    scores: dict[ModelName, Scores]

    @property
    def steps(self) -> list[TrainEvent]:
        events = read_journal(self.plan.run_dir / "journal.jsonl")
        return [event for event in events if isinstance(event, TrainEvent)]


@pytest.fixture(scope="module")
def trained(
    tiny_world: TinyWorld, ray_cluster: dict[str, float], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    assert ray_cluster["CPU"] >= 1
    folder = tmp_path_factory.mktemp("text")
    make_tokenizer(folder / "tokenizer", vocab_size=300)  # and no weights
    data = accepted_rollouts(folder, tiny_world.folder / "teacher")
    values = data | {
        "teacher": {"engine": "text", "model": str(folder / "tokenizer")},
        "target": {"k": 1, "tail_draws": 0},
        "student": LEARNING,
    }
    for max_steps in (STOPPED, STEPS):
        asked = merged(values, {"student": {"max_steps": max_steps}})
        plan = tiny_world.plan(folder / "run", **asked)
        scores = pipeline.run(plan)
    return Trained(plan, data, scores)


def test_its_losses_are_those_of_the_same_student_beside_a_teacher(
    trained: Trained, tiny_world: TinyWorld, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    beside = tiny_world.plan(
        tmp_path / "run", **trained.data, student=LEARNING | {"max_steps": STEPS}
    )
    assert beside.recipe.teacher_kind == "weights"
    tiny_world.fill_store(beside)
    rows = rank_groups[1].call(train_and_tell, beside.jobs[0])[0]
    assert [(row.step, row.loss, row.cross_entropy, row.grad_norm) for row in rows] == [
        (row.step, row.loss, row.cross_entropy, row.grad_norm) for row in trained.steps
    ]
    assert len(rows) == STEPS


def test_its_chunks_keep_all_and_are_made_once_by_actors_on_the_cpu(trained: Trained) -> None:
    events = read_journal(trained.plan.run_dir / "journal.jsonl")
    chunks = [event for event in events if isinstance(event, ChunkEvent)]
    assert sorted(event.chunk for event in chunks) == sorted(trained.plan.chunks)
    assert {(event.kept_mass, event.codec_kl) for event in chunks} == {(1.0, 0.0)}
    teachers = [event for event in events if isinstance(event, TeacherEvent)]
    assert {event.device for event in teachers} == {"cpu"}


def test_its_student_is_scored_without_a_teacher(trained: Trained) -> None:
    ((name, scores),) = trained.scores.items()
    assert name == "student"
    heldout = first_sequences(trained.plan.sources.heldout, num_targets=10**6)
    assert scores.num_tokens == heldout.num_targets
    assert scores.kl != scores.kl  # nan: compared with nothing
    page = (trained.plan.run_dir / "report.html").read_text()
    assert "trained on the text alone, reaches a held-out cross-entropy" in page


def test_its_teachers_read_the_rollouts_themselves_and_refuse_what_was_not_packed(
    trained: Trained, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """From another store than that of the chunks. A damaged token is found there, and not what the
    driver packed before is scored."""
    rollouts = tmp_path / "rollouts"
    digits = trained.data["corpus"]["dataset"].removeprefix("rollouts://")
    shutil.copytree(Path(trained.plan.config.store.url) / "rollouts", rollouts / "rollouts")
    values = {
        "corpus": trained.data["corpus"] | {"dataset": f"rollouts://{rollouts}/{digits}"},
        "store": {"url": str(tmp_path / "targets"), "chunk_sequences": 4},
        "teacher": trained.plan.config.teacher.model_dump(include={"engine", "model"}),
        "target": {"k": 1, "tail_draws": 0},
        "student": LEARNING | {"max_steps": STEPS},
    }
    plan = tiny_world.plan(tmp_path / "run", **values)
    (damaged,) = [file for file in rollouts.rglob("*.safetensors") if file.stem.endswith("1")]
    data = damaged.read_bytes()
    start, end = len(data) * 2 // 3, len(data) * 5 // 6  # where a shard has its ids
    damaged.write_bytes(data[:start] + bytes(end - start) + data[end:])
    with pytest.raises(CorpusError, match="packed from: shard 1 is damaged"):
        pipeline.produce(plan)
