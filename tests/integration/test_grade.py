"""Verdicts and acceptance by the real verbs, without Ray: a writer of the tests' own fills a small
store, graders score it, and a run's plan takes what its rule accepts."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.calls import must_not_be_called
from helpers.command import Outcome, as_toml, stillhouse
from helpers.models import make_model
from helpers.rollouts import write_sums
from helpers.world import TinyWorld, merged
from helpers.writers import Pupil
from stillhouse.config.generate import load_generate_config
from stillhouse.errors import ChunkError, ConfigError, CorpusError, GraderError
from stillhouse.graders import Sample
from stillhouse.pipeline import Generation, grade, plan_generation
from stillhouse.pipeline.grading import grade_with
from stillhouse.sequences.account import Account
from stillhouse.store.grader_names import named_graders
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import CUT, ENDED
from stillhouse.store.verdicts import verdict_key
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
    write_sums(tmp_path, num_prompts=NUM_PROMPTS, model=model, config=CONFIG)
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


def verdict_of(plan: Generation, name: str, number: int) -> Path:
    grader = named_graders(plan.store.blobs, plan.recipe.fingerprint)[name]
    return Path(plan.store.url) / verdict_key(plan.recipe.fingerprint, grader, number)


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
    command, cache = ("grade", folder / "maths.toml"), tmp_path / "caches"
    first = stillhouse(*command, cache=cache)
    assert first.code == 0, first.err
    assert "3 of 5 shards are not written yet" in first.out
    before = verdicts(plan)
    assert len(before) == 2 * 2

    # a run needs the verdicts of all
    rule = {"min_score": {"number": 1.0}}
    write_shards(plan, [1, 3, 4])
    with pytest.raises(CorpusError, match=r"3 of 5 shards of .* have no verdict of number.*grade"):
        account_of(plan, tiny_world, tmp_path / "run", accept=rule)

    # the same command grades the rest, and shows the lines of a config
    second = stillhouse(*command, cache=cache)
    assert second.code == 0, second.err
    assert verdicts(plan).items() > before.items()
    shards = [plan.store.fetch(number) for number in range(5)]
    finish = Counter(int(each) for shard in shards for each in shard.finish_S)
    rows = [line.split() for line in second.out.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["number"]]
    is_right = [
        score == 1.0
        for number in range(5)
        for score in json.loads(verdict_of(plan, "number", number).read_bytes())["scores"]
    ]
    mean = sum(is_right) / len(is_right)
    assert row == ["number", "120", f"{mean:.3f}", f"{mean:.1%}"]
    (lines,) = re.findall(r"(?ms)^\[corpus\].*", second.out)
    assert tomllib.loads(lines) == {
        "corpus": {
            "dataset": f"rollouts://{plan.recipe.fingerprint[:16]}",
            "accept": {"min_score": {"number": 1.0, "word for word": 1.0}},
        },
        "store": {"url": plan.store.url},
    }

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
    repeats = account_of(plan, tiny_world, tmp_path / "run", accept={**rule, "keep_repeats": True})
    assert repeats.left_out.keys() == account.left_out.keys() - {"samples: the tokens of another"}
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


class Replacing(Counting):
    """While it looks at the first shard that it is given, another process writes that one anew."""

    def __init__(self, plan: Generation) -> None:
        super().__init__()
        self._plan = plan

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        if not self.asked:
            store = self._plan.store
            shard = store.fetch(0)
            Path(store.url, store.key(0)).unlink()
            store.publish(replace(shard, weights_version_S=shard.weights_version_S + 1))
        return super().grade(samples)


def test_a_verdict_on_a_shard_that_was_replaced_meanwhile_does_not_stay(folder: Path) -> None:
    plan = planned(folder)
    write_shards(plan, range(2))
    (grades,) = grade_with({"counting": Replacing(plan)}, plan)
    assert (grades.num_new, grades.num_shards) == (1, 1)
    assert [name[-6:] for name in verdicts(plan)] == ["1.json"]
    (grades,) = grade_with({"counting": Counting()}, plan)
    assert (grades.num_new, grades.num_shards) == (1, 2)


def test_a_command_that_is_killed_by_a_signal_has_published_whole_verdicts(
    folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"question": f"{n}+1=", "answer": str(tmp_path / ("mark" if n == 9 else ""))}
        for n in range(30)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "maths.toml"
    config.write_text(
        CONFIG.partition("[[graders]]")[0] + "[[graders]]\nkind = 'helpers.graders:deadly'\n"
    )
    plan = planned(folder)
    write_shards(plan, range(5))
    command = [sys.executable, "-m", "stillhouse", "grade", str(config)]
    ended = subprocess.run(
        command, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "caches")}, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    before = verdicts(plan)
    assert len(before) < 5
    (grades,) = grade(plan)
    assert (grades.num_new, grades.mean_score) == (5 - len(before), 1.0)
    assert verdicts(plan).items() >= before.items()


def test_a_name_stands_for_one_grader(folder: Path) -> None:
    plan = planned(folder)
    write_shards(plan, [0])
    grade(plan)
    before = verdicts(plan)
    other = planned(folder, "graders = [{kind = 'exact', name = 'number'}]")
    with pytest.raises(ConfigError, match=r"name 'number' .kind: 'number' against 'exact'"):
        grade(other)
    (same,) = grade(planned(folder, "graders = [{kind = 'number', name = 'last number'}]"))
    assert same.num_new == 0
    assert verdicts(plan) == before

    # another reference makes other scores, and so another grader
    (folder / "sums.jsonl").write_text((folder / "sums.jsonl").read_text().replace('"10"', '"11"'))
    with pytest.raises(ConfigError, match=r"name 'number' .references: "):
        grade(planned(folder))
    (mended,) = grade(planned(folder, "graders = [{kind = 'number', name = 'mended'}]"))
    assert mended.num_new == 1
    assert verdicts(plan).items() > before.items()


def test_what_a_run_cannot_accept_by_is_refused(
    folder: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = planned(folder)
    write_shards(plan, range(5))

    def accepting(**rule: Any) -> Account:
        return account_of(plan, tiny_world, tmp_path / "run", accept=rule)

    assert accepting().num_documents > 0  # by no grader
    with pytest.raises(CorpusError, match="'number', which is none of the graders: there are none"):
        accepting(min_score={"number": 1.0})
    grade(plan)
    with pytest.raises(CorpusError, match="'numbers', which is none of number, word for word"):
        accepting(min_score={"numbers": 1.0})
    with pytest.raises(CorpusError, match=r"no sample of .* is accepted: .*least score of word"):
        accepting(min_score={"word for word": 1.0})
    damaged = verdict_of(plan, "number", 3)
    damaged.write_bytes(b"")
    with pytest.raises(ChunkError, match="is damaged"):
        accepting(min_score={"number": 1.0})
    damaged.unlink()
    with pytest.raises(CorpusError, match=r"1 of 5 shards .* have no verdict of number"):
        accepting(min_score={"number": 1.0})


def test_check_of_a_run_tells_what_is_missing_and_then_what_is_kept_and_why_the_rest_is_not(
    folder: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = planned(folder)
    rollouts = f"rollouts://{plan.recipe.fingerprint[:16]}"
    corpus = {"dataset": rollouts, "heldout_sequences": 1, "sequence_length": 16}
    accept = {"accept": {"min_score": {"number": 1.0}}}
    changes = {"corpus": {**corpus, **accept}, "store": {"url": plan.store.url}}
    config = tmp_path / "run.toml"
    config.write_text(as_toml(merged(tiny_world.values, changes)))

    def check() -> Outcome:
        return stillhouse("check", config, "--run-dir", tmp_path / "run", cache=tmp_path / "caches")

    # what is missing, in the order in which it can be made
    write_shards(plan, [0, 2, 3])
    incomplete = check()
    assert incomplete.code == 2
    assert "2 of 5 shards are not in" in incomplete.err
    write_shards(plan, [1, 4])
    grade(plan)
    verdict_of(plan, "number", 3).unlink()
    ungraded = check()
    assert ungraded.code == 2
    assert "1 of 5 shards of" in ungraded.err
    assert "have no verdict of number" in ungraded.err

    # all is there
    grade(plan)
    outcome = check()
    assert outcome.code == 0, outcome.err
    told = " ".join(outcome.out.split())
    account = account_of(plan, tiny_world, tmp_path / "run", **accept)
    assert account.samples is not None
    for reason, count in account.left_out.items():
        assert f"left out: {count} {reason}" in told
    assert f"of 120 samples of 30 prompts {account.samples.num_ended} ended" in told
    assert f"{account.num_documents} are kept" in told
    mean = account.samples.gradings["number"].mean_score
    assert f"grader number: mean score {mean:.3f}, {mean:.1%} of score 1, of 120" in told


def test_a_grader_that_fails_on_a_whole_shard_ends_the_command_without_a_verdict(
    folder: Path,
) -> None:
    plan = planned(folder, "graders = [{kind = 'helpers.graders:obedient'}]")
    write_shards(plan, [0])
    with pytest.raises(GraderError, match="failed on all 28 samples: 28 x ValueError"):
        grade(plan)
    assert verdicts(plan) == {}


def test_samples_with_passages_of_a_test_set_are_dropped(
    folder: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    # a question of a test set is among the prompts
    known = "+".join(map(str, range(14)))
    rows = [{"question": f"{n}+1=", "answer": ""} for n in range(NUM_PROMPTS)]
    rows[4]["question"] = f"{known}="
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({"q": f"What is {known}?", "a": "91"}) + "\n")
    plan = planned(folder)
    write_shards(plan, range(5))
    (number,) = [n for n in range(NUM_PROMPTS) if len(plan.prompts[n]) > 12]
    finish = Counter[bool]()
    for shard in map(plan.store.fetch, range(5)):
        finish.update((shard.prompts_S[shard.finish_S == ENDED] == number).tolist())

    # its samples are dropped, and no other one for it; repeats stay, as they do without a rule
    rule = {"test_sets": {"sums": {"dataset": str(folder / "test.jsonl")}}}
    account = account_of(plan, tiny_world, tmp_path / "run", decontaminate=rule)
    assert account.left_out["samples: a passage of a test set"] == finish[True] > 0
    assert account.num_documents == finish[False]
