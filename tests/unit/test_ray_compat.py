"""What cluster/_ray_compat.py relies on, asked of the Ray that is installed. All has to hold before
its cap is raised."""

import inspect
import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Any

import psutil
import pytest
import ray
import ray.train
from ray._private import ray_constants, services
from ray.core.generated import autoscaler_pb2
from ray.train.torch import TorchTrainer
from ray.train.v2.api import data_parallel_trainer

from stillhouse.cluster import _ray_compat

REMEDY = "see to cluster/_ray_compat.py before the cap on Ray is raised"


@pytest.mark.usefixtures("ray_cluster")
def test_this_machines_node_says_where_the_head_and_its_raylet_listen() -> None:
    node = _ray_compat.local_node()
    assert node is not None, (
        f"`_global_node` is not what this process is attached through; {REMEDY}"
    )
    assert node.gcs_address == ray.get_runtime_context().gcs_address, REMEDY
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(node.raylet_socket))


def test_resources_are_told_node_by_node_under_rays_ids(ray_cluster: dict[str, float]) -> None:
    ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    for resources in (_ray_compat.total_resources(), _ray_compat.free_resources()):
        assert list(resources) == ids, REMEDY
    (total,), (free,) = (
        _ray_compat.total_resources().values(),
        _ray_compat.free_resources().values(),
    )
    assert total["CPU"] == ray_cluster["CPU"], REMEDY
    assert 0 <= free.get("CPU", 0) <= total["CPU"], REMEDY


@pytest.mark.usefixtures("ray_cluster")
def test_a_node_is_drained_by_its_id_a_reason_words_and_a_deadline() -> None:
    reasons: Any = autoscaler_pb2
    assert (
        reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION") == _ray_compat._PREEMPTION
    ), REMEDY
    # of no cluster: nothing ends
    _ray_compat.drain_node(
        secrets.token_hex(28), detail="a test", deadline_ms=int(time() * 1e3) + 60_000
    )
    assert _ray_compat.drain_deadlines_ms() == {}, REMEDY


def test_ray_starts_where_and_as_patient_as_it_is_told() -> None:
    options = _ray_compat.start_options(Path("/tmp/r"), failed_checks=7)
    source = inspect.getsource(ray.init)
    assert all(f'"{name}"' in source for name in options), (
        f"`ray.init` has no option of this name; {REMEDY}"
    )
    raylet: Any = ray._raylet
    assert all(hasattr(raylet.Config, name) for name in options["_system_config"]), (
        f"Ray's own settings have none of this name; {REMEDY}"
    )


def test_what_starts_in_the_block_is_told_to_listen_on_loopback_and_afterwards_nothing_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    before = ray_constants.ENABLE_RAY_CLUSTER
    with _ray_compat.on_loopback():
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0", (
            f"the variable has another name; {REMEDY}"
        )
        assert "ray_constants.ENABLE_RAY_CLUSTER:" in inspect.getsource(
            services.get_node_ip_address
        ), f"it is asked elsewhere; {REMEDY}"
        assert not ray_constants.ENABLE_RAY_CLUSTER
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    assert before == ray_constants.ENABLE_RAY_CLUSTER


def test_a_process_that_has_a_token_shows_it_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    _ray_compat.use_token_if_there_is_one()
    assert os.environ.get("RAY_AUTH_MODE") == "token", (
        f"authentication is turned on in another way; {REMEDY}"
    )


def test_trains_controller_has_a_limit_of_its_own() -> None:
    """Public at run time, though Ray's types are those of Train's first version."""
    limits: Any = ray.train.FailureConfig
    assert limits(max_failures=-1, controller_failure_limit=0).controller_failure_limit == 0, REMEDY
    assert issubclass(ray.train.ControllerError, Exception), REMEDY


@pytest.mark.usefixtures("ray_cluster")
def test_a_thread_that_waits_for_ray_trains_controller_is_freed_by_its_end() -> None:
    def run(_self: object) -> None:
        threading.Event().wait()

    def started(name: str) -> Any:
        """An actor whose class has this name, at work without end."""
        actor: Any = ray.remote(num_cpus=0)(type(name, (), {"run": run})).remote()
        ray.get(actor.__ray_ready__.remote(), timeout=60)
        return actor

    trainer: Any = data_parallel_trainer
    controller = started(trainer.TrainController.__qualname__)
    other = started("Other")
    running, other_running = controller.run.remote(), other.run.remote()
    _ray_compat.kill_train_controllers()
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(running, timeout=60)
    assert ray.wait([other_running], timeout=0)[0] == [], REMEDY
    ray.kill(other)


def test_a_trainer_without_data_sets_has_all_other_callbacks_of_rays_own() -> None:
    def callbacks_of(trainer: Any) -> list[str]:
        made = trainer(print, run_config=ray.train.RunConfig(storage_path="/tmp"))
        return [type(each).__name__ for each in made._create_default_callbacks()]

    found = callbacks_of(_ray_compat.without_data_sets(TorchTrainer))
    everything = callbacks_of(TorchTrainer)
    assert len(found) == len(everything) - 1, REMEDY
    assert sorted([*found, "DatasetsCallback"]) == sorted(everything), REMEDY


@pytest.mark.usefixtures("ray_cluster")
def test_a_commands_own_cluster_has_no_log_monitor() -> None:
    started = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie is one, too
            started.append(" ".join(child.cmdline()))
    assert any("/raylet" in command for command in started)
    assert not any("log_monitor" in command for command in started), REMEDY
