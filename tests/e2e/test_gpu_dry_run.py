"""The run of `make gpu`, tiny and on the CPU; test_bench_gpu_session.py has its other parts."""

from pathlib import Path

import pytest

from stillhouse.bench.gpu.findings import Recorder, read_findings
from stillhouse.bench.gpu.live_run import run
from stillhouse.bench.gpu.scale import TINY


@pytest.mark.usefixtures("ray_cluster")
def test_the_run_of_a_gpu_session_finds_no_fault_on_the_cpu(tmp_path: Path) -> None:
    run(TINY, Recorder(tmp_path / "findings.jsonl", "run"))
    findings = read_findings(tmp_path / "findings.jsonl")
    assert {"the run ended well", "every step was taken"} <= {found.name for found in findings}
    assert [found for found in findings if found.passed is False] == []
