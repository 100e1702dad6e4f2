"""The run that everything happens to, and what should come of it.

Processes take seconds to start. So one run lives through it all, and the tests look at what it
left.
"""

import random
from collections.abc import Iterator

import pytest

from helpers.disasters import Disaster, go_on_elsewhere, live_through
from helpers.history import Left, chunks_in, require_kept, violations
from helpers.ranks import RankGroup
from helpers.scene import EPOCH, Scene, Undisturbed, make_bucket, published_in
from helpers.world import TinyWorld


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-seeds",
        type=int,
        default=0,
        help="the long form, with so many disasters to live through: moments and victims differ",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--chaos-seeds", 0):
        left_out = [item for item in items if item.get_closest_marker("long_form")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    seeds = range(metafunc.config.getoption("--chaos-seeds", 0) or 1)
    for name in {"disaster", "generating"}.intersection(metafunc.fixturenames):
        metafunc.parametrize(name, seeds, indirect=True, scope="package", ids="seed{}".format)


@pytest.fixture(scope="session")
def long_form(request: pytest.FixtureRequest) -> bool:
    """Whether there is time: `make chaos`, and not `make test`."""
    return int(request.config.getoption("--chaos-seeds", 0)) > 0


@pytest.fixture(scope="package")
def scene(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Scene.open(s3_endpoint, cache=tmp_path_factory.mktemp("cache")) as scene:
        yield scene


@pytest.fixture(scope="package")
def undisturbed(
    tiny_world: TinyWorld,
    rank_groups: dict[int, RankGroup],
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    """An epoch without teacher actors, a command or a fault: its chunks, and two ranks' losses."""
    plan = tiny_world.plan(tmp_path_factory.mktemp("undisturbed") / "run", student=EPOCH)
    tiny_world.fill_store(plan)
    return Undisturbed.trained(plan, rank_groups[2])


@pytest.fixture(scope="package")
def disaster(
    scene: Scene,
    tiny_world: TinyWorld,
    rank_groups: dict[int, RankGroup],
    long_form: bool,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Disaster:
    """Lived through, and gone on from: by the whole command where there is time, else by the
    training loop in processes that are there."""
    bucket = f"disaster-{request.param}"
    make_bucket(bucket)
    scene.make_whole()
    disaster = Disaster(scene, tiny_world, tmp_path_factory.mktemp(bucket), bucket=bucket)
    live_through(disaster, random.Random(request.param), long_form=long_form)
    go_on_elsewhere(disaster, None if long_form else rank_groups[2])
    commits = {"student": f"s3://{bucket}/commits/student"}
    require_kept(
        disaster.events, disaster.events_elsewhere, checkpoints=commits, store=disaster.store
    )
    assert violations(published_in(bucket), Left(chunks=chunks_in(disaster.store))) == []
    return disaster
