"""Verdicts and acceptance by the real verbs, without Ray: a writer of the tests' own fills a small
store, graders score it, and a run's plan takes what its rule accepts."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.calls import must_not_be_called
from helpers.models import make_model
from helpers.world import TinyWorld
from helpers.writers import Pupil
from stillhouse.cli.main import app
from stillhouse.config.generate import load_generate_config
from stillhouse.errors import CorpusError
from stillhouse.graders import Sample
from stillhouse.pipeline import Generation, plan_generation
from stillhouse.pipeline.grading import grade_with
from stillhouse.sequences.account import Account
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import CUT, ENDED
from stillhouse.writer.actor import computed, published

NUM_PROMPTS, SAMPLES, SHARD_PROMPTS = 30, 4, 7
CONFIG = """
[prompts]
dataset = "sums.jsonl"
format = "text"
prompt_column = "question"
reference_column = "answer"
[writer]
model = "./writer"
engine = "helpers.writers:Pupil"
dtype = "float32"
[sampling]
samples = 4
max_new_tokens = 20
sequence_length = 64
[store]
url = "./store"
shard_prompts = 7
[[graders]]
kind = "number"
[[graders]]
kind = "exact"
name = "word for word"
"""


class Killed(BaseException):
    """The process ends here."""


class Counting:
    """Scores by the last word; it counts what it is asked, and is killed at one of its calls."""

    identity: Mapping[str, Any] = {"kind": "counting", "version": 1}

    def __init__(self, *, dies_at: int | None = None) -> None:
        self.asked: list[Sequence[Sample]] = []
        self._dies_at = dies_at

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        if len(self.asked) == self._dies_at:
            raise Killed
        self.asked.append(samples)
        return [float(each.text.split()[-1] == each.reference) for each in samples]

    def close(self) -> None:
        raise AssertionError("whoever made it closes it")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "writer", vocab_size=300)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A config file with its data set and its writer."""
    rows = [{"question": f"{n}+{n + 10}=", "answer": f"{2 * n + 10}"} for n in range(NUM_PROMPTS)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "writer").symlink_to(model)
    (tmp_path / "maths.toml").write_text(CONFIG)
    return tmp_path


def planned(folder: Path, *overrides: str) -> Generation:
    config = load_generate_config(folder / "maths.toml", overrides)
    return plan_generation(config, run_dir=folder / "run", cache_dir=folder / "cache")


def write_shards(plan: Generation, numbers: Sequence[int]) -> None:
    """What the pool of writers does, in this process."""
    store = RolloutStore.create(plan.store.url, plan.recipe)
    writer = Pupil(plan.config.writer, plan.recipe, device="cpu")
    for number in numbers:
        shard = computed(store, plan.block(number), writer)
        published(store, shard, tell=must_not_be_called)


def verdicts(plan: Generation) -> dict[str, bytes]:
    folder = Path(plan.store.url) / plan.store.folder / "verdicts"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


def account_of(plan: Generation, world: TinyWorld, run_dir: Path, **corpus: Any) -> Account:
    """What a run's plan says of these rollouts."""
    run = world.plan(
        run_dir,
        corpus={
            "dataset": f"rollouts://{plan.recipe.fingerprint[:16]}",
            "heldout_sequences": 1,
            "sequence_length": 16,
            **corpus,
        },
        store={"url": plan.store.url},
    )
    (part,) = run.sources.parts
    return part.account


def test_the_verbs_lead_from_rollouts_to_a_run_of_what_is_accepted(
    folder: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    # some shards are written: those are graded, and the rest is told
    plan = planned(folder)
    assert plan.recipe.num_shards == 5
    write_shards(plan, [0, 2])
    command = ["grade", str(folder / "maths.toml")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "3 of 5 shards are not written yet" in result.output
    before = verdicts(plan)
    assert len(before) == 2 * 2

    # a run needs the verdicts of all
    rule = {"min_score": {"number": 1.0}}
    write_shards(plan, [1, 3, 4])
    with pytest.raises(CorpusError, match=r"3 of 5 shards of .* have no verdict of number.*grade"):
        account_of(plan, tiny_world, tmp_path / "run", accept=rule)

    # the same command grades the rest, and shows the lines of a config
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert verdicts(plan).items() > before.items()
    shards = [plan.store.fetch(number) for number in range(5)]
    finish = Counter(int(each) for shard in shards for each in shard.finish_S)
    (row,) = [line.split() for line in result.output.splitlines() if line.startswith("number")]
    assert row[:2] == ["number", "120"]
    assert f'dataset = "rollouts://{plan.recipe.fingerprint[:16]}"' in result.output
    assert 'min_score = {"number" = 1.0, "word for word" = 1.0}' in result.output

    # each sample is kept, or counted by the reason why it is not
    account = account_of(plan, tiny_world, tmp_path / "run", accept=rule)
    assert account.form == "samples of 30 prompts that are accepted"
    assert account.left_out["samples: cut at the longest length"] == finish[CUT]
    assert account.num_documents + sum(account.left_out.values()) == NUM_PROMPTS * SAMPLES
    assert set(account.left_out) == {
        "samples: cut at the longest length",
        "samples: below the least score of number",
        "samples: the tokens of another",
    }
    assert 20 < account.num_documents <= NUM_PROMPTS  # all right answers to a question are equal
    assert account_of(plan, tiny_world, tmp_path / "run").num_documents == finish[ENDED]


@pytest.mark.parametrize("call", range(5))
def test_killed_between_two_verdicts_the_same_command_goes_on(folder: Path, call: int) -> None:
    plan = planned(folder)
    write_shards(plan, range(5))
    deadly, patient = Counting(dies_at=call), Counting()
    with pytest.raises(Killed):
        grade_with({"counting": deadly}, plan)
    before = verdicts(plan)
    assert len(before) == call
    (grades,) = grade_with({"counting": patient}, plan)
    assert (grades.num_new, grades.num_shards, grades.num_samples) == (5 - call, 5, 120)
    assert verdicts(plan).items() >= before.items()
    assert len(deadly.asked) + len(patient.asked) == 5  # each shard once
    asked = {sample for samples in (*deadly.asked, *patient.asked) for sample in samples}
    assert Sample("7+17=", "that is 24", "24") in asked

    # again it does nothing, and another grader asks for no other one
    again, after = Counting(), verdicts(plan)
    assert grade_with({"counting": again}, plan)[0].mean_score == grades.mean_score
    assert (again.asked, verdicts(plan)) == ([], after)
