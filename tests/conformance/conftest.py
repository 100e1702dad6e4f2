"""Which engines and sources are held to the suite: ours, the tests' own, and one that is named.

pytest tests/conformance --engine my_package.my_module:Engine --teacher DIR
pytest tests/conformance --source my_package.my_module:open_sources --tokenizer DIR
"""

import sys
from pathlib import Path

import pytest

from helpers.models import make_model

OUTSIDE = str(Path(__file__).parents[1] / "outside")
ENGINES = ("transformers", "text", "rollouts", "own_parts.engine:PlainEngine")
SOURCES = ("corpus", "own_parts.source:sums")

if OUTSIDE not in sys.path:
    sys.path.append(OUTSIDE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", help="package.module:name of an engine to hold to the suite")
    parser.addoption("--teacher", help="the directory of a small model that it can load")
    parser.addoption("--source", help="package.module:name of a source to hold to the suite")
    parser.addoption("--tokenizer", help="the directory of a tokenizer for it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, ours in (("engine_name", ENGINES), ("source_name", SOURCES)):
        if name in metafunc.fixturenames:
            named = metafunc.config.getoption(f"--{name.removesuffix('_name')}", default=None)
            metafunc.parametrize(name, [named] if named else ours)


@pytest.fixture(scope="session")
def teacher_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its tokenizer."""
    given = request.config.getoption("--teacher", default=None) or request.config.getoption(
        "--tokenizer", default=None
    )
    return (
        Path(given)
        if given
        else make_model(tmp_path_factory.mktemp("teacher"), vocab_size=300, weight_std=0.3, seed=1)
    )
