"""Ray loses requests and replies of its own, and a run ends as if it had not; nothing is told,
counted or written down twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command import config_of
from helpers.commands import CommandServer
from helpers.history import require_kept
from helpers.ranks import RankGroup
from helpers.scene import Undisturbed, curve
from helpers.world import TinyWorld
from stillhouse.store import ChunkStore
from stillhouse.tracking import EndEvent, WaitEvent, read_journal

# Each process loses some of the first messages of these kinds that it sends: the message itself, or
# the reply to one that has arrived.
ONE_EACH_WAY = {
    "num_failures": 2,
    "num_lower_bound_req_failures": 1,
    "num_lower_bound_resp_failures": 1,
}
LOST = {
    "CoreWorkerService.grpc_client.PushTask": {
        "num_failures": 8,
        "req_failure_prob": 15,
        "resp_failure_prob": 35,
    },  # any call of ours
    "ray::rpc::ActorInfoGcsService.grpc_client.RegisterActor": ONE_EACH_WAY,
    "ray::rpc::ActorInfoGcsService.grpc_client.CreateActor": ONE_EACH_WAY,
    "ray::rpc::ActorInfoGcsService.grpc_client.GetActorInfo": ONE_EACH_WAY,
    "ray::rpc::ActorInfoGcsService.grpc_client.KillActorViaGcs": ONE_EACH_WAY,
    "ray::rpc::InternalKVGcsService.grpc_client.InternalKVGet": ONE_EACH_WAY,
}
ENVIRONMENT = {
    "RAY_testing_rpc_failure": json.dumps(LOST),
    # for a lost message, before those behind it are sent back
    "RAY_actor_scheduling_queue_max_reorder_wait_seconds": "0",
    # for word of room that a lost message may have brought; then it is asked for again
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}


TWENTY_ROWS = """
import sys
from pathlib import Path
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection
from stillhouse.tracking import WaitEvent

with attached(ClusterSection(num_cpus=1)):
    coordinator = Coordinator.create(Path(sys.argv[1]))
    for number in range(20):
        coordinator.record(WaitEvent(f"row {number}"))
"""


@pytest.mark.long_form
def test_a_row_whose_acknowledgement_is_lost_is_written_down_once(tmp_path: Path) -> None:
    half = {"CoreWorkerService.grpc_client.PushTask": {"num_failures": 20, "resp_failure_prob": 50}}
    environment = os.environ | ENVIRONMENT | {"RAY_testing_rpc_failure": json.dumps(half)}
    command = [sys.executable, "-c", TWENTY_ROWS, str(tmp_path / "journal.jsonl")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    events = read_journal(tmp_path / "journal.jsonl")
    assert [event.missing for event in events if isinstance(event, WaitEvent)] == [
        f"row {number}" for number in range(20)
    ]
    assert len(events) == 20


@pytest.mark.long_form  # Ray Train starts its ranks again for each of its own messages that is lost
@pytest.mark.timeout(600)
def test_a_run_whose_cluster_loses_messages_ends_with_the_losses_of_an_undisturbed_one(
    tiny_world: TinyWorld, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    student = {"max_steps": 8, "checkpoint_every_steps": 2}
    undisturbed = tiny_world.plan(
        tmp_path / "undisturbed", store={"url": str(tmp_path / "other")}, student=student
    )
    tiny_world.fill_store(undisturbed)
    plan = tiny_world.plan(
        tmp_path / "run",
        store={"url": str(tmp_path / "store")},
        student=student,
        cluster={"num_cpus": 2},
    )
    server = CommandServer({"XDG_CACHE_HOME": str(tmp_path / "cache")} | ENVIRONMENT)
    try:
        command = server.start(
            "run", config_of(plan), "--run-dir", plan.run_dir, log=tmp_path / "run.log"
        )
        wanted = Undisturbed.trained(undisturbed, rank_groups[1])
        assert command.wait(timeout_s=240.0) == 0, command.words()
    finally:
        server.close()
    events = read_journal(plan.run_dir / "journal.jsonl")
    assert isinstance(events[-1], EndEvent)
    assert events[-1].outcome == "done"
    assert curve(events) == wanted.curve
    assert len({repr(event) for event in events}) == len(
        events
    )  # each bears the time at which it was sent
    (job,) = plan.jobs
    require_kept(
        events,
        checkpoints={"student": job.checkpoints},
        store=ChunkStore(plan.config.store.url, plan.recipe),
    )
