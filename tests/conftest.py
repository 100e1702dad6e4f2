"""Shared by every test: one torch thread, no way to a model hub, one Ray cluster, one place where
commands come from, one tiny world to train in."""

import gc
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    # for every cluster of every test, as on every machine of a cluster of ours
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_INTERPRET": os.environ.get(
        "TRITON_INTERPRET", "1"
    ),  # kernels run on the CPU; set it to 0 on a machine with a GPU
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    ).strip(os.pathsep),  # for Ray's workers
}

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(10_000)  # as sitecustomize.py has it in the processes of the tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-machine-root",
        action="store_true",
        help="leave out what only the machine's own root can do, and say so",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--no-machine-root"):
        left_out = [item for item in items if item.get_closest_marker("machine_root")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--no-machine-root"):
        terminalreporter.write_line(
            "left out, for want of the machine's own root: the power cut of a real file system "
            "(tests/chaos/test_power_cut.py),"
            " attacks by another user (tests/attacks/test_hostile_clusters.py),"
            " sandboxes of another user (tests/attacks/test_hostile_code.py)"
        )


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3, which every process started after this one finds in its
    environment."""
    from helpers.s3 import s3_server

    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def commands(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Where commands come from: a helpers.commands.CommandServer, a process that has imported
    everything, once."""
    from helpers.commands import CommandServer

    caches = str(tmp_path_factory.mktemp("caches"))
    server = CommandServer({"XDG_CACHE_HOME": caches, "AWS_ENDPOINT_URL": s3_endpoint})
    yield server
    server.close()


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint: str) -> Iterator[dict[str, float]]:
    """One Ray cluster for the whole session; what the code under test attaches to."""
    from stillhouse.cluster.session import attached
    from stillhouse.config import ClusterSection

    assert s3_endpoint == os.environ["AWS_ENDPOINT_URL"]
    with attached(ClusterSection(num_cpus=4)) as resources:
        yield resources


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two tiny models, a corpus and a config: a helpers.world.TinyWorld."""
    from helpers.world import TinyWorld

    return TinyWorld.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def rank_groups(ray_cluster: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gloo groups of one and of two long-lived processes: a dict of helpers.ranks.RankGroup by
    world size."""
    from helpers.ranks import RankGroup

    assert ray_cluster["CPU"] >= 1
    meetings = tmp_path_factory.mktemp("meetings")
    return {
        world_size: RankGroup.start(world_size, meeting=meetings / str(world_size))
        for world_size in (1, 2)
    }
