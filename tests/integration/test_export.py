"""`stillhouse export` and the final evaluation on real parts: a kill leaves no half of a model, and
a bucket that is away is waited for."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from uuid import uuid4

import boto3
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from helpers.checkpoints import commit_weights
from helpers.commands import CommandServer
from helpers.faults import FaultyS3, Request, everything
from helpers.models import make_model
from helpers.s3 import s3_environment
from helpers.training import ListTracker
from helpers.world import TinyWorld
from stillhouse import pipeline
from stillhouse.checkpoint.choice import newest_step
from stillhouse.cluster.processes import Secrets
from stillhouse.config import ModelSection
from stillhouse.evaluation.scores import EvaluationJob, Trained, evaluate, outage_teller
from stillhouse.models.load import load_model
from stillhouse.pipeline import Plan
from stillhouse.pipeline.run_dir import claim
from stillhouse.retry import Patience
from stillhouse.store import StoreUnavailable
from stillhouse.student.export import load_trained
from stillhouse.tracking import OutageEvent

PATIENCE_S = 60.0


def until(condition: Callable[[], object], *, every_s: float = 0.01) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < deadline
        sleep(every_s)


# ---- a kill


def test_an_export_that_was_killed_leaves_no_half_of_a_model_and_the_same_command_writes_it(
    tiny_world: TinyWorld, commands: CommandServer, tmp_path: Path
) -> None:
    """It is killed when the first bytes of the weights are there."""
    make_model(
        tmp_path / "large",
        vocab_size=300,
        hidden_size=768,
        intermediate_size=4096,
        num_layers=4,
        seed=2,
    )
    plan = tiny_world.plan(tmp_path / "run", student={"model": str(tmp_path / "large")})
    claim_and_commit(plan)
    out = tmp_path / "exports" / "student"
    out.parent.mkdir()
    first = commands.start("export", plan.run_dir, out, log=tmp_path / "first.log")
    until(lambda: any(out.parent.rglob("*.safetensors")) or first.has_ended(), every_s=0.001)
    first.kill()
    assert not out.exists()
    second = commands.start("export", plan.run_dir, out, log=tmp_path / "second.log")
    assert second.wait(timeout_s=PATIENCE_S) == 0, second.words()
    AutoModelForCausalLM.from_pretrained(out)
    assert [*out.parent.iterdir()] == [out]


def claim_and_commit(plan: Plan) -> None:
    """What a run leaves, as far as an export reads it."""
    plan.run_dir.mkdir()
    claim(plan.run_dir, config=plan.config, recipe=plan.recipe)
    commit_weights(plan.jobs[0].checkpoints, load_model(plan.config.student, random_init_seed=1), 7)


# ---- a bucket that is away


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    with FaultyS3(s3_endpoint) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def plan(tiny_world: TinyWorld, s3_endpoint: str, proxy: FaultyS3, tmp_path: Path) -> Plan:
    """A run whose student is committed in a bucket."""
    assert proxy.url != s3_endpoint
    bucket = f"exports-{uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    plan = tiny_world.plan(tmp_path / "run", student={"checkpoint_url": f"s3://{bucket}/run"})
    claim_and_commit(plan)
    return plan


def reads(request: Request) -> bool:
    return request.method == "GET"


NOT_YET = 425  # an answer that obstore does not try again by itself


def test_an_export_asks_again_where_a_request_found_the_bucket_away(
    plan: Plan, proxy: FaultyS3, tmp_path: Path
) -> None:
    proxy.refuse(reads, status=NOT_YET, times=2)
    assert pipeline.export_run(plan, tmp_path / "out") == 7
    assert len(proxy.refused) == 2


def test_an_evaluation_asks_again_where_a_request_found_the_bucket_away(
    plan: Plan, proxy: FaultyS3
) -> None:
    proxy.refuse(reads, status=NOT_YET, times=2)
    job, heldout = plan.jobs[0], plan.sources.heldout
    comparison = EvaluationJob(
        teacher=ModelSection(model=plan.config.teacher.model, dtype="float32"),
        models={"student": Trained(job.section, job.checkpoints, ListTracker())},
        vocab_size=plan.recipe.vocab_size,
        section=plan.config.evaluate,
        device="cpu",
        threads=1,
        secrets=Secrets(None),
    )
    scores = evaluate(comparison, heldout.block(0).select(slice(0, 2)))
    assert np.isfinite(scores["student"].kl)
    assert len(proxy.refused) == 2


def test_a_bucket_that_is_away_for_long_is_told_and_waited_for_and_one_that_stays_away_is_given_up(
    plan: Plan, proxy: FaultyS3
) -> None:
    job, tracker = plan.jobs[0], ListTracker()
    patience = Patience(request_s=0.1, tell_after_s=0.3, last_pause_s=0.1)
    proxy.refuse(everything, status=503)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(
            load_trained,
            job.checkpoints,
            job.section,
            tell=outage_teller(tracker),
            patience=patience,
        )
        until(lambda: tracker.rows or loading.done())
        proxy.end()
        _, steps = loading.result(timeout=PATIENCE_S)
    assert steps == newest_step(job.checkpoints) == 7
    (event,) = tracker.rows
    assert isinstance(event, OutageEvent)
    assert event.who == "the evaluation"
    assert "too busy" in event.why
    proxy.refuse(everything, status=503)
    brief = Patience(request_s=0.1, end_after_s=0.2, first_pause_s=0.1, last_pause_s=0.1)
    with pytest.raises(StoreUnavailable, match="after 0 s of waiting it is given up"):
        load_trained(job.checkpoints, job.section, tell=outage_teller(tracker), patience=brief)
