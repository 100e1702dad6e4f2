"""A GPU session keeps what its parts found, whatever becomes of them, and says what is wrong."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch

from stillhouse.bench.gpu import checks, session
from stillhouse.bench.gpu.findings import Finding, Recorder, read_findings
from stillhouse.bench.gpu.part import function_of
from stillhouse.bench.gpu.scale import TINY
from stillhouse.bench.gpu.session import FINDINGS, GRACE_S, PARTS, SUMMARY, Part, hold, main
from stillhouse.logits.topk import blockmax_torch
from stillhouse.logits.topk.found import RawTopK

IMPORTS = (
    "import os, signal; from pathlib import Path; from stillhouse.bench.gpu.findings import *;"
)
SCRIPTS = {
    "right": "r.tell('it is right', True)",
    "wrong": "r.tell('it is right', False)",
    "crashes": "r.tell('before', 3.0, 'ms'); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "signal.signal(15, signal.SIG_IGN); r.tell('before', 3.0, 'ms'); signal.pause()",
    "cannot start": "import no_such_package",
}


def command_of(part: Part, out: Path) -> list[str]:
    recorder = f"r = Recorder(Path({str(out / FINDINGS)!r}), {part.name!r});"
    return [sys.executable, "-c", f"{IMPORTS} {recorder} {SCRIPTS[part.name]}"]


def held(out: Path, *names: str, limit_s: float = 60.0) -> tuple[bool, list[Finding]]:
    parts = [Part(name, 1.0 if name == "hangs" else limit_s, "") for name in names]
    passed = hold(parts, lambda part: command_of(part, out), out, os.environ, grace_s=0.2)
    return passed, read_findings(out / FINDINGS)


def test_a_part_that_crashes_hangs_or_cannot_start_costs_no_other_parts_findings(
    tmp_path: Path,
) -> None:
    passed, findings = held(tmp_path, "crashes", "hangs", "cannot start", "right")
    assert not passed
    ends = {found.part: found for found in findings if found.name == "ran to its end"}
    assert [(part, found.passed) for part, found in ends.items()] == [
        ("crashes", False),
        ("hangs", False),
        ("cannot start", False),
        ("right", True),
    ]
    errors = [found.details["error"] for found in ends.values()]
    assert errors == [
        "it ended with SIGSEGV",
        "it ran out of its 1 s",
        "it ended with exit code 1",
        "",
    ]
    assert {found.part for found in findings if found.name == "before"} == {"crashes", "hangs"}
    assert "no_such_package" in (tmp_path / "log.txt").read_text()


def test_only_where_every_part_ended_and_every_promise_was_kept_all_is_well(tmp_path: Path) -> None:
    assert held(tmp_path / "one", "right")[0]
    assert not held(tmp_path / "other", "right", "wrong")[0]
    assert "2 passed, 0 FAILED" in (tmp_path / "one" / SUMMARY).read_text()
    assert "3 passed, 1 FAILED" in (tmp_path / "other" / SUMMARY).read_text()


def test_a_session_that_is_told_to_end_ends_its_part_and_writes_its_summary(tmp_path: Path) -> None:
    part = Part("hangs", 600.0, "")
    command = command_of(part, tmp_path)
    script = f"""
import os, signal
from pathlib import Path
from stillhouse.bench.gpu.session import Part, hold
signal.signal(signal.SIGTERM, signal.default_int_handler)
hold([{part}], lambda part: {command}, Path({str(tmp_path)!r}), os.environ, grace_s=0.2)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = monotonic() + 60
    while not (tmp_path / FINDINGS).exists() or "before" not in (tmp_path / FINDINGS).read_text():
        assert monotonic() < deadline
        assert process.poll() is None
        sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert "before" in (tmp_path / SUMMARY).read_text()


@pytest.mark.parametrize(
    ("finding", "passed"),
    [
        (Finding("p", "n", True), True),
        (Finding("p", "n", 0.5), None),
        (Finding("p", "n", "words"), None),
        (Finding("p", "n", 0.9, at_least=0.86), True),
        (Finding("p", "n", 0.8, at_least=0.86), False),
        (Finding("p", "n", 1.2, at_most=1.15), False),
        (Finding("p", "n", float("nan"), at_most=1.15), False),
    ],
    ids=str,
)
def test_a_finding_passes_within_its_bounds(finding: Finding, passed: bool | None) -> None:
    assert finding.passed is passed


def test_a_failure_is_a_finding_and_the_part_goes_on(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / FINDINGS, "part")
    with recorder.attempt("first"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    recorder.tell("second", 2.0)
    first, second = read_findings(tmp_path / FINDINGS)
    assert first.passed is False
    assert (
        first.details["error"]
        == "RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert second.value == 2.0


def test_a_session_takes_less_than_nine_minutes_whatever_hangs() -> None:
    assert session.INSTALL_LIMIT_S + sum(part.limit_s + 2 * GRACE_S for part in PARTS) < 540


def test_without_a_gpu_it_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "finds no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "machine,speed"]) == 2
    assert (
        "--only names speed, but there is no such part; choose from machine, topk"
        in capsys.readouterr().err
    )


def test_a_dry_run_is_the_same_session_on_the_cpu(tmp_path: Path) -> None:
    assert main(["--dry-run", "--only", "machine", "--out", str(tmp_path)]) == 0
    device, end = read_findings(tmp_path / FINDINGS)
    assert (device.name, device.value) == ("device", "cpu")
    assert (end.name, end.passed) == ("ran to its end", True)


@pytest.mark.parametrize(
    "part", [part for part in PARTS if part.name != "run"], ids=lambda part: part.name
)
def test_every_part_but_the_run_finds_no_fault_at_tiny_sizes_on_the_cpu(
    part: Part, tmp_path: Path
) -> None:
    function_of(part)(TINY, Recorder(tmp_path / FINDINGS, part.name))
    findings = read_findings(tmp_path / FINDINGS)
    assert findings
    assert [found for found in findings if found.passed is False] == []


def test_a_kernel_that_answers_wrongly_is_found(tmp_path: Path) -> None:
    def wrong(logits: torch.Tensor, *, k: int, temperature: float) -> tuple[RawTopK, torch.Tensor]:
        raw = blockmax_torch.split(logits, k=k, temperature=temperature)
        return replace(raw, token_ids_TK=raw.token_ids_TK.flip(1)), torch.zeros(
            len(logits), dtype=torch.bool
        )

    checks.topk(TINY, Recorder(tmp_path / FINDINGS, "topk"), launch=wrong)
    assert [found.passed for found in read_findings(tmp_path / FINDINGS)] == [
        False,
        False,
        False,
        True,
    ]


def test_each_test_that_needs_a_gpu_is_a_finding(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1] / "gpu" / "test_codec_on_gpu.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(tests),
        f"--findings={tmp_path / FINDINGS}",
    ]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, check=False
    )
    findings = read_findings(tmp_path / FINDINGS)
    assert done.returncode == 1
    assert {found.name.partition("[")[0] for found in findings} == {
        f"test_codec_on_gpu.py::{name}"
        for name in (
            "test_a_gpus_records_are_the_cpus",
            "test_values_on_the_edge_between_two_codes_fall_on_the_cpus_side",
            "test_records_straight_from_a_gpus_logits_hold_its_targets",
            "test_a_damaged_record_is_refused_by_its_row",
            "test_a_target_that_cannot_be_written_is_refused_by_its_row",
        )
    }
    assert all(
        found.passed is False and "there is no GPU" in str(found.details["error"])
        for found in findings
    )
