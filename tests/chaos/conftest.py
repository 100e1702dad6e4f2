"""What every disaster needs: the scene, and what should have come of the run."""

from collections.abc import Iterator

import pytest

from helpers.ranks import RankGroup
from helpers.scene import EPOCH, Scene, Undisturbed
from helpers.world import TinyWorld


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seeds", type=int, default=1, help="how many courses to live through: moments and victims differ")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chaos_seed" in metafunc.fixturenames:
        metafunc.parametrize("chaos_seed", range(metafunc.config.getoption("--chaos-seeds")), scope="module", ids="seed{}".format)


@pytest.fixture(scope="session")
def scene(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Scene.open(s3_endpoint, cache=tmp_path_factory.mktemp("cache")) as scene:
        yield scene


@pytest.fixture(scope="session")
def undisturbed(tiny_world: TinyWorld, rank_groups: dict[int, RankGroup], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """An epoch without teacher actors, a command or a fault."""
    made = tiny_world.plan(tmp_path_factory.mktemp("undisturbed") / "run", student=EPOCH)
    tiny_world.fill_store(made)
    return Undisturbed.trained(made, rank_groups)
