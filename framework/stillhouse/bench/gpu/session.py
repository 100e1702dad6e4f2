"""A GPU session: its parts, most wanted first, each a process with a limit.

A crash or a hang costs no other part's findings. The session itself is standard library alone:
where something heavy cannot be imported, it still says which parts failed, and why.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from stillhouse.bench.gpu.findings import Recorder, read_findings, table
from stillhouse.errors import ConfigError, UserError

FINDINGS, LOG, SUMMARY = "findings.jsonl", "log.txt", "summary.txt"
# from SIGTERM to SIGKILL, and from there until the session goes on without that process
GRACE_S = 2.0
INSTALL_LIMIT_S = 20.0
_ASK_LIMIT_S = 60.0  # where that is not enough, nothing follows
_LOG_TAIL_CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class Part:
    """A process of the session, and how long it may take."""

    name: str
    limit_s: float
    function: str  # module of this package:function(scale, recorder)


PARTS = (
    Part("machine", 15, "checks:machine"),
    Part("topk", 85, "checks:topk"),
    Part("records", 18, "checks:records"),
    Part("loss", 25, "checks:loss"),
    Part("tests", 105, "checks:tests"),
    Part("time-topk", 45, "ratios:topk"),
    Part("time-head", 40, "ratios:head"),
    Part("time-loss", 35, "ratios:loss"),
    Part("teacher", 55, "teacher:teacher"),
    Part("run", 55, "live_run:run"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every part ended, and all that was promised is so; 1: not; 2: nothing was tried."""
    parser = argparse.ArgumentParser(
        prog="python -m stillhouse.bench.gpu", description="Everything that needs a GPU."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        help="directory of the findings, whose files are overwritten",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PART,PART",
        help=f"of {', '.join(part.name for part in PARTS)}",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny sizes on the CPU, kernels in Triton's interpreter",
    )
    parser.add_argument(
        "--wheels", type=Path, help="directory of wheels to use beside the packages that are there"
    )
    options = parser.parse_args(arguments)
    try:
        parts = _chosen(options.only)
        if not options.dry_run:
            _require_gpu()
        with tempfile.TemporaryDirectory() as site:
            environment = _environment(dry_run=options.dry_run) | _import_path(
                options.wheels, Path(site)
            )
            out, dry_run = options.out, ["--dry-run"] if options.dry_run else []
            command = [sys.executable, "-m", "stillhouse.bench.gpu.part", *dry_run]
            # the summary is written then, too
            usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                passed = hold(parts, lambda part: [*command, part.name, str(out)], out, environment)
                return 0 if passed else 1
            finally:
                signal.signal(signal.SIGTERM, usual)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 1


def hold(
    parts: Sequence[Part],
    command_of: Callable[[Part], Sequence[str]],
    out: Path,
    environment: Mapping[str, str],
    *,
    grace_s: float = GRACE_S,
) -> bool:
    """Run the parts, then write and print the summary, also where a signal ends the session early.

    Returns whether every part ended and every finding passed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in (FINDINGS, LOG):
        (out / name).write_text("")
    try:
        for part in parts:
            _run(part, command_of(part), out, environment, grace_s=grace_s)
    finally:
        findings = read_findings(out / FINDINGS)
        (out / SUMMARY).write_text(table(findings) + "\n")
        print("\n" + table(findings), flush=True)
    return all(found.passed is not False for found in findings)


def _run(
    part: Part, command: Sequence[str], out: Path, environment: Mapping[str, str], *, grace_s: float
) -> None:
    """One part, to its end or its limit. How it ended is a finding of its own."""
    # the process, all of whose output is in the log
    began = monotonic()
    with (out / LOG).open("a+", errors="replace") as log:
        log.write(f"===== {part.name}\n")
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=part.limit_s)
            error = f"it ended with {_words_of(code)}" if code else ""
        except subprocess.TimeoutExpired:
            error = f"it ran out of its {part.limit_s:g} s"
        finally:
            _end(process, grace_s=grace_s)

        # how it ended
        log.seek(start)
        tail = log.read()[-_LOG_TAIL_CHARACTERS:]
    if error:
        print(f"{tail}\n", flush=True)
    seconds = f"{monotonic() - began:.0f} s of {part.limit_s:g}"
    Recorder(out / FINDINGS, part.name).tell("ran to its end", not error, seconds, error=error)


def _end(process: "subprocess.Popen[bytes]", *, grace_s: float) -> None:
    """End a process that still runs, and its group.

    One that waits for a driver may outlive SIGKILL: the session goes on without it.
    """
    if process.poll() is not None:
        return
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)


def _words_of(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def _chosen(only: str) -> list[Part]:
    wanted = only.split(",") if only else [part.name for part in PARTS]
    known = {part.name: part for part in PARTS}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        wrong, right = ", ".join(unknown), ", ".join(known)
        raise ConfigError(f"--only names {wrong}, but there is no such part; choose from {right}")
    return [part for part in PARTS if part.name in wanted]


def _require_gpu() -> None:
    """Raises ConfigError where torch finds no GPU. In a child process: a broken driver may hang."""
    ask = "import torch; print(torch.__version__, torch.cuda.is_available())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", ask],
            capture_output=True,
            text=True,
            timeout=_ASK_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            "torch does not say whether there is a GPU; see whether nvidia-smi answers"
        ) from None
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        raise ConfigError(
            f"{sys.executable} cannot import torch: {why}; choose another with PYTHON="
        )
    version, there = done.stdout.split()
    if there != "True":
        raise ConfigError(
            f"torch {version} finds no GPU, and all this is about one; run it where nvidia-smi"
            " shows one, or see with `make gpu-dry` that everything runs on the CPU"
        )


def _environment(*, dry_run: bool) -> dict[str, str]:
    return os.environ | {
        "TRITON_INTERPRET": "1" if dry_run else "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _import_path(wheels: Path | None, site: Path) -> dict[str, str]:
    """Where the parts find packages. What wheels need has to be there, or among them."""
    usual = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(Path(__file__).parents[3]), *filter(None, usual)]
    if wheels is not None:
        _install(sorted(map(str, wheels.glob("*.whl"))), site)
        path = [str(site), *path]
    return {"PYTHONPATH": os.pathsep.join(path)}


def _install(files: Sequence[str], site: Path) -> None:
    """Raises ConfigError where pip refuses, or takes too long."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, *files]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=True)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"pip took more than {INSTALL_LIMIT_S:g} s for the wheels; bring fewer"
        ) from None
    except subprocess.CalledProcessError as failure:
        why = failure.stderr.strip()
        raise ConfigError(
            f"{sys.executable} cannot install the wheels: {why}; bring others"
        ) from None
