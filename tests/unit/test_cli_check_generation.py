"""`check` of a config of `generate` says what it makes, needs and finds, and names every obstacle
at once, without a weight, a request or a file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.command import Outcome, stillhouse, toml_value
from helpers.damage import read_only
from helpers.models import make_model
from helpers.rollouts import make_shard, write_sums
from stillhouse.config.generate import load_generate_config
from stillhouse.graders import identity_of
from stillhouse.models.load import load_model
from stillhouse.pipeline import Generation, plan_generation
from stillhouse.store.grader_names import claim_name
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.verdicts import put_verdict
from stillhouse.writer.openai import most_usd

Check = Callable[..., Outcome]
NUM_PROMPTS, SAMPLES = 30, 4
CONFIG = """
[prompts]
dataset = "sums.jsonl"
format = "text"
prompt_column = "question"
reference_column = "answer"
max_bad_rows = 0.1
[writer]
model = "./writer"
dtype = "float32"
num_cpus = 0.5
[sampling]
samples = 4
max_new_tokens = 20
sequence_length = 64
[store]
url = "./store"
shard_prompts = 7
[cluster]
num_cpus = 2
[[graders]]
kind = "number"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "writer", vocab_size=300)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A config file with its data set, of which one row is too long, and its writer."""
    write_sums(tmp_path, num_prompts=NUM_PROMPTS, model=model, config=CONFIG)
    with (tmp_path / "sums.jsonl").open("a") as rows:
        rows.write(json.dumps({"question": "1+" * 200, "answer": "1"}) + "\n")
    return tmp_path


@pytest.fixture
def check(folder: Path) -> Check:
    def checked(*overrides: str) -> Outcome:
        options = [each for override in overrides for each in ("--set", override)]
        where = ("--run-dir", folder / "run")
        return stillhouse("check", folder / "maths.toml", *where, *options, cache=folder / "cache")

    return checked


def planned(folder: Path, *overrides: str) -> Generation:
    config = load_generate_config(folder / "maths.toml", overrides)
    return plan_generation(config, run_dir=folder / "run", cache_dir=folder / "cache/stillhouse")


def write_shards(plan: Generation, *numbers: int) -> RolloutStore:
    store = RolloutStore.create(plan.store.url, plan.recipe)
    for number in numbers:
        store.publish(make_shard(plan.recipe, number))
    return store


def test_it_says_what_generate_makes_and_needs_and_that_nothing_is_there(
    check: Check, folder: Path
) -> None:
    outcome, plan = check(), planned(folder)
    assert outcome.code == 0, outcome.err
    parameters = sum(each.numel() for each in load_model(plan.config.writer).parameters())
    for words in (
        "30 prompts of 5 to 6 tokens",
        "bad rows that are skipped: 1, the first: row 30 of",
        "each with a reference, from column 'answer'",
        "the first: ",
        f"{parameters:,} parameters, {4 * parameters / 1000:.1f} kB in float32",
        "4 of each prompt, 120 in all; temperature 1, top_p 1",
        "at most 2,400 tokens: up to 20 each",
        f"{folder}/store/{plan.store.folder}",
        "5 shards of 7 prompts, up to 24.0 kB each; 0 are there already",
        "number: has graded 0 of 0 shards",
        "writers: 1, each with 0.5 CPU (on cpu)",
        "run: new",
        "Nothing stands in the way",
    ):
        assert words in outcome.out.replace("run  ", "run")
    assert {each.name for each in folder.iterdir()} == {
        *("sums.jsonl", "writer", "maths.toml", "cache")
    }


def test_the_bytes_that_it_promises_are_those_that_a_shard_takes_at_most(folder: Path) -> None:
    store = write_shards(planned(folder), 0)
    size = (Path(store.url) / store.key(0)).stat().st_size
    assert 24_000 < size < 25_500  # with a header of its own


def test_it_counts_what_is_there_and_what_is_graded(check: Check, folder: Path) -> None:
    plan = planned(folder)
    store, (grader,) = write_shards(plan, 0, 2, 4), plan.config.graders
    identity = {**identity_of(grader), "references": plan.prompts.references_digest}
    claim_name(store.blobs, plan.recipe.fingerprint, name="number", grader=identity)
    put_verdict(store.blobs, plan.recipe.fingerprint, number=2, grader=identity, scores=[1.0] * 28)
    out = check().out
    assert "3 are there already" in out
    assert "number: has graded 1 of 3 shards" in out
    write_shards(plan, 1, 3)
    assert f'all are there: corpus.dataset = "rollouts://{plan.recipe.fingerprint[:16]}"' in (
        check().out
    )


def test_rollouts_that_nearly_match_are_named_with_the_fields_that_differ(
    check: Check, folder: Path
) -> None:
    plan = planned(folder)
    write_shards(plan, 0)
    outcome = check("sampling.temperature = 0.5")
    assert outcome.code == 0, outcome.err
    assert f"rollouts of {plan.recipe.fingerprint[:16]}, which would serve" in outcome.out
    assert "temperature: 0.5 against 1.0" in outcome.out


def test_every_obstacle_is_named_at_once(check: Check, folder: Path) -> None:
    plan = planned(folder)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_bytes(plan.recipe.canonical_json())
    (folder / "store").write_text("a file")
    judge = 'kind = "judge", base_url = "http://a/v1", served_model = "m", template = "{text}"'
    outcome = check(
        "sampling.seed = 1",
        "writer.num_cpus = 64",
        f'graders = [{{{judge}, api_key_env = "NO_SUCH"}}, {{kind = "no_such_module:grader"}}]',
    )
    assert outcome.code == 2
    for words in (
        "generate or grade would stop:",
        "store.url: ",
        "grader judge: NO_SUCH, which api_key_env names, is not set",
        "no_such_module",
        "CPU: 64 needed (1 writers), 2 in the cluster",
        "belongs to a run, or to prompts, a writer or sampling of other settings",
    ):
        assert words in outcome.err


def test_a_name_that_stands_for_another_grader_is_an_obstacle(check: Check, folder: Path) -> None:
    plan = planned(folder)
    store = write_shards(plan, 0)
    claim_name(store.blobs, plan.recipe.fingerprint, name="number", grader={"kind": "other"})
    outcome = check()
    assert outcome.code == 2
    assert "grader number: in the store this name stands for one of other settings" in outcome.err


def test_a_store_that_may_only_be_read_is_an_obstacle_while_shards_are_missing(
    check: Check, folder: Path, tmp_path: Path
) -> None:
    plan = planned(folder)
    store = write_shards(plan, 0)
    with read_only(Path(store.url), at=tmp_path / "seen") as seen:
        outcome = check(f'store.url = "{seen}"')
        assert outcome.code == 2
        assert "store.url: " in outcome.err
    write_shards(plan, 1, 2, 3, 4)
    with read_only(Path(store.url), at=tmp_path / "whole") as seen:
        assert "store.url: " not in check(f'store.url = "{seen}"').err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('store.url = "memory://x"', "a memory:// store cannot be shared"),
        ("prompts.max_bad_rows = 0.0", "prompts.max_bad_rows = 0 allows 0 of 31 rows"),
        ('prompts.prompt_column = "no"', "has no column 'no'"),
        ("sampling.sequence_length = 100000", "is made for"),
        ("writer.sample = 3", "writer.sample: no such setting"),
        ("teacher.model = 'a'", "teacher: no such setting"),
    ],
)
def test_what_cannot_be_used_ends_it_with_words(check: Check, override: str, words: str) -> None:
    outcome = check(override)
    assert outcome.code == 2
    assert words in outcome.err


def test_a_writer_that_does_not_fit_on_its_gpu_is_told_with_what_it_would_take(
    check: Check,
) -> None:
    outcome = check("writer.num_gpus = 1", "writer.gpu_memory_gb = 0.0005")
    assert "does not fit" in outcome.out
    assert "under [writer], the cheapest first" in outcome.out
    assert "batch_sequences = 8" in outcome.out


def test_a_writer_on_vllm_is_divided_among_its_gpus(check: Check) -> None:
    outcome = check(
        'writer.engine = "vllm"', "writer.num_gpus = 2", "writer.gpu_memory_gb = 0.00001"
    )
    told = " ".join(outcome.out.split())
    assert "a writer's weights, divided among 2 GPUs, take 60.5 kB of 10.0 kB" in told
    assert "(writer.vllm.memory_share)" in told
    assert "keys and values" not in told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "NO_SUCH_KEY, which api_key_env names, is not set"),
        ({"max_cost_usd": 0.5}, "writer.openai.max_cost_usd is 0.5, and the samples may cost"),
    ],
)
def test_what_a_server_wants_for_the_samples_is_told_and_a_key_that_is_missing(
    check: Check, folder: Path, more: dict[str, float], words: str
) -> None:
    server = {
        "base_url": "http://127.0.0.1:9/v1",  # where nothing answers
        "served_model": "large",
        "api_key_env": "NO_SUCH_KEY",
        "usd_per_million_input_tokens": 1000.0,
        "usd_per_million_output_tokens": 1000.0,
        **more,
    }
    overrides = ['writer.engine = "openai"', f"writer.openai = {toml_value(server)}"]
    plan = planned(folder, *overrides)
    assert plan.config.writer.openai is not None
    usd = most_usd(plan.config.writer.openai, plan.recipe, plan.prompts.sources)
    outcome = check(*overrides)
    assert outcome.code == 2
    assert "the server at http://127.0.0.1:9/v1" in outcome.out
    assert f"they cost {usd:.4g} USD at most" in outcome.out
    assert words in " ".join((outcome.out + outcome.err).split())


def test_a_writer_of_ones_own_has_no_size(check: Check) -> None:
    out = check('writer.engine = "helpers.writers:Pupil"').out
    assert "by helpers.writers:Pupil, whose memory is not known" in out
