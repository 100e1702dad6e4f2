"""Writers, `generate` and `grade` are killed before, after and between their puts: each prompt has
its samples once, and nothing that was published changes."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.commands import CommandServer
from helpers.faults import FaultyS3
from helpers.generating import NUM_PROMPTS, SAMPLES, Generating, live_through, live_through_more
from helpers.scene import writes_in
from stillhouse import pipeline
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.tracking import EndEvent, GenerationEvent, WriterEvent, read_journal
from stillhouse.writer.block import written
from stillhouse.writer.transformers import TransformersWriter

# of which most goes to starting clusters, on a machine that others may use
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="package")
def generating(
    s3_endpoint: str,
    commands: CommandServer,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Generating:
    """A generation and its grading that are done, after all that happened to them."""
    name, seed = f"generation-{request.param}", request.param
    with FaultyS3(s3_endpoint) as s3:
        folder = tmp_path_factory.mktemp(name)
        work = Generating.prepare(folder, bucket=name, s3=s3, commands=commands)
        if seed == 0:
            live_through(work)
        else:
            live_through_more(work, random.Random(seed))
    return work


def test_each_prompt_has_its_samples_once(generating: Generating) -> None:
    plan = generating.plan()
    assert plan.store.published() == {*range(plan.recipe.num_shards)}
    numbers = [
        (int(prompt), int(sample))
        for shard in map(plan.store.fetch, range(plan.recipe.num_shards))
        for prompt, sample in zip(shard.prompts_S, shard.samples_S, strict=True)
    ]
    assert numbers == [(prompt, n) for prompt in range(NUM_PROMPTS) for n in range(SAMPLES)]


def test_each_object_was_written_once_and_is_that_of_an_undisturbed_store(
    generating: Generating, tmp_path: Path
) -> None:
    # by one process, in a directory
    plan = generating.plan()
    section = plan.config.store.model_copy(update={"url": str(tmp_path / "casks")})
    plan = replace(plan, config=plan.config.model_copy(update={"store": section}))
    store = RolloutStore.create(section.url, plan.recipe)
    writer = TransformersWriter(plan.config.writer, plan.recipe, device="cpu")
    for number in range(plan.recipe.num_shards):
        store.publish(written(plan.block(number), writer, plan.recipe))
    pipeline.grade(plan)
    files = (path for path in (tmp_path / "casks").rglob("*") if path.is_file())
    undisturbed = {str(path.relative_to(tmp_path)): [path.read_bytes()] for path in files}

    # all that the bucket was ever given; but for what each command tries it with
    writes = writes_in(generating.bucket).items()
    assert {key: given for key, given in writes if "/probe-" not in key} == undisturbed


def test_the_journal_tells_of_every_attempt(generating: Generating) -> None:
    events = read_journal(generating.folder / "run" / "journal.jsonl")
    attempts = [event.attempt for event in events if isinstance(event, GenerationEvent)]
    assert attempts == [*range(1, len(attempts) + 1)]
    assert [event.outcome for event in events if isinstance(event, EndEvent)] == ["done"]
    num_writers = sum(isinstance(event, WriterEvent) for event in events)
    assert num_writers > generating.num_writers_killed
