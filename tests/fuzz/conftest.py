"""How long parsers are fuzzed: one round of each in `make test`, as many as one likes in `make
chaos`."""

import random
from collections.abc import Iterator

import pytest

from helpers.bounded import measured_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-rounds",
        type=int,
        default=1,
        help="rounds of mutants for each parser; a round is the same in each session",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_round" in metafunc.fixturenames:
        metafunc.parametrize(
            "fuzz_round", range(metafunc.config.getoption("--fuzz-rounds", 1)), ids="round{}".format
        )


@pytest.fixture
def rng(request: pytest.FixtureRequest, fuzz_round: int) -> Iterator[random.Random]:
    """What decides the mutants of a test in one round."""
    with measured_memory():
        yield random.Random(f"{request.function.__name__} {fuzz_round}")
