"""These tests need a GPU: `make test` leaves them out, `make gpu` runs them."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stillhouse.bench.gpu.findings import Recorder

# files of tests that need a package of an extra
_NEEDS = {
    "test_liger_on_gpu.py": "liger_kernel",
    "test_bits_on_gpu.py": "bitsandbytes",
    "test_qlora_on_gpu.py": "bitsandbytes",
}
collect_ignore = [file for file, package in _NEEDS.items() if find_spec(package) is None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--findings",
        type=Path,
        help="file to which a line is appended for each test, as soon as it has ended",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--findings")
    if path is not None and not hasattr(
        config, "workerinput"
    ):  # with xdist, its controller hears of all
        config.pluginmanager.register(_Teller(Recorder(path, "tests")))


class _Teller:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            name, seconds = report.nodeid.rpartition("/")[2], round(report.duration, 2)
            crash = getattr(report.longrepr, "reprcrash", None)
            error = crash.message if crash else report.longreprtext
            self._recorder.tell(name, report.passed, error=error[:500], seconds=seconds)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    assert torch.cuda.is_available(), (
        "there is no GPU that torch can use; run these on a machine with one"
    )
    return torch.device("cuda")
