"""The sandbox of code that a model wrote: bubblewrap, with nothing of this machine but Python.

It has no network, no files but Python's (to read) and a small /tmp, no environment, no other
processes, no right to user namespaces, and no devices but null, zero and urandom. Time, memory,
files, output and processes are limited. The kernel does not apply the limit on processes to the
machine's root, so there the sandbox is another user's. Where a control group can be made, memory
and processes are limited in sum as well; where none can, a run may take `memory_bytes` in each of
`max_tasks` processes.

What cannot be limited is refused. The sandbox protects the machine; a program that was written
against a test can still deceive that test, since both run in one interpreter.
"""

import json
import math
import os
import pwd
import secrets
import selectors
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic, time
from typing import NamedTuple

from stillhouse.errors import ConfigError, GraderError
from stillhouse.graders.cgroups import ROOT, groups_of_one_run, remove_left_groups

_START_S = 60.0
_OWN_TASKS = 2  # of bubblewrap and the interpreter itself
_PROBED_TASKS = 8
_HIGHEST_ID = 2**31 - 2

_ALONE = (
    "--unshare-user",
    "--disable-userns",
    "--unshare-ipc",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-uts",
    "--unshare-cgroup-try",
    "--die-with-parent",
    "--new-session",
    "--clearenv",
)
# the numbers of groups come first, then the command
_ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 1; shift; done; shift; '
_PROBE = """
import os, signal, socket
assert os.getpid() < 10, "other processes can be reached"
assert not os.path.exists("/etc/passwd"), "files of this machine can be read"
assert [name for _, name in socket.if_nameindex()] == ["lo"], "a network can be reached"
for path in ("/", "/usr"):
    try:
        open(os.path.join(path, "x"), "w")
    except OSError:
        continue
    raise AssertionError(f"{path} can be written")
try:
    bytearray(MEMORY)
except MemoryError:
    pass
else:
    raise AssertionError("memory is not limited")
children = []
try:
    for _ in range(2 * TASKS):
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
except BlockingIOError:
    pass
else:
    raise AssertionError("processes are not limited")
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of one run in the sandbox."""

    wall_s: float
    memory_bytes: int
    file_bytes: int
    output_bytes: int
    max_tasks: int


class Ran(NamedTuple):
    """How programs ended: `passed`; `time`, `output` or `ended` (early, or killed) where a limit or
    the program cut them off; or else what they raised."""

    ending: str
    output: bytes = b""


class Sandbox:
    """A way to run programs in sandboxes, which has been tried.

    Raises ConfigError where they cannot be had here, or cannot be limited.
    """

    def __init__(
        self, bounds: Bounds, *, interpreter: str | None = None, cgroups: Path = ROOT
    ) -> None:
        """`cgroups` is where the kernel has its control groups."""
        self.bounds, self._cgroups = bounds, cgroups
        self._python = Path(interpreter or sys.executable).resolve()
        self._bwrap, self._enter = _found("bwrap"), _own_user()
        remove_left_groups(cgroups, now=time())
        self._require_limits()

    def run(self, programs: Sequence[str], *, bounds: Bounds | None = None) -> Ran:
        """Run Python programs one after the other in one namespace of a new sandbox.

        Raises GraderError where the sandbox itself does not start.
        """
        # what is run, within which limits
        bounds, word = bounds or self.bounds, secrets.token_hex(16)
        num_tasks = bounds.max_tasks + _OWN_TASKS
        limits = {
            **asdict(bounds),
            "cpu_s": math.ceil(bounds.wall_s) + 1,
            "num_tasks": num_tasks,
        }
        job = {"limits": limits, "programs": [*programs], "word": word}
        with groups_of_one_run(
            num_tasks=num_tasks, memory_bytes=bounds.memory_bytes, root=self._cgroups
        ) as groups:
            said, cut_by = _said(
                self._command(groups, bounds), json.dumps(job).encode(), bounds=bounds
            )
        # how it ended
        if not said.startswith(b"+"):
            raise GraderError(
                f"the sandbox did not start: {said[-300:].decode(errors='replace').strip()!r} "
                f"{cut_by}; see that this machine has processes and memory left, and run again"
            )
        output, proof, ending = said[1:].rpartition(f"\n{word} ".encode())
        if cut_by or not proof:
            return Ran(cut_by or "ended", said[1:])
        return Ran(ending.decode().strip(), output)

    def _command(self, groups: Sequence[Path], bounds: Bounds) -> list[str]:
        """Enter the groups, become the user, make the sandbox, and run inside.py in it."""
        enter = ["/bin/sh", "-c", _ENTER + 'exec "$@"', "sh", *map(str, groups), "--"]
        inside = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
        return [
            *(enter if groups else []),
            *self._enter,
            self._bwrap,
            *_ALONE,
            *_files(self._python),
            *("--perms", "0700", "--size", str(bounds.file_bytes), "--tmpfs", "/tmp"),
            *("--remount-ro", "/", "--chdir", "/tmp"),
            *("--", str(self._python), "-I", "-S", "-c", inside),
        ]

    def _require_limits(self) -> None:
        # whether it starts, and what it can do
        bounds = replace(self.bounds, wall_s=_START_S, max_tasks=_PROBED_TASKS)
        probe = f"MEMORY, TASKS = {bounds.memory_bytes}, {_PROBED_TASKS + _OWN_TASKS}\n{_PROBE}"
        try:
            ending = self.run([probe], bounds=bounds).ending
        except GraderError as error:
            ending = str(error)
        if ending != "passed":
            raise ConfigError(
                f"code that a model wrote cannot be run safely on this machine: {ending}. Wanted: "
                "bubblewrap 0.8 or newer, user namespaces for users other than root, a kernel of "
                "5.14 or newer, and a Python which every user can read (its section's "
                f"`interpreter`; this one is {self._python}). Grade elsewhere, or leave the grader "
                "'python' out"
            )


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise ConfigError(
            f"a grader is of the kind 'python', but {program} is not installed; install the "
            "packages bubblewrap and util-linux on every machine"
        )
    return path


def _own_user() -> list[str]:
    """The command before bubblewrap that makes it another user's, where this process is of a root
    that can become others; no limit on processes binds the machine's root."""
    if os.geteuid() != 0:
        return []
    ids = _unused_id(Path("/proc/self/uid_map").read_text(encoding="ascii"))
    if ids is None:
        return []
    return [_found("setpriv"), f"--reuid={ids}", f"--regid={ids}", "--clear-groups", "--"]


def _unused_id(uid_map: str) -> int | None:
    """The highest number of a user that this namespace has and nobody uses; None where it has root
    alone. `uid_map` has a line for each range: its start, its start outside, its length."""
    ranges = [[int(part) for part in line.split()] for line in uid_map.splitlines()]
    highest = min(max(start + length for start, _, length in ranges) - 1, _HIGHEST_ID)
    used = {user.pw_uid for user in pwd.getpwall()}
    return next((number for number in range(highest, 0, -1) if number not in used), None)


def _files(python: Path) -> list[str]:
    """What of the machine's files the sandbox sees: /usr and Python, to read."""
    binds = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            binds += ["--symlink", f"usr/{name}", str(path)]
        elif path.is_dir():
            binds += ["--ro-bind", str(path), str(path)]
    home = python.parents[1]  # /opt/python of /opt/python/bin/python3
    if not home.is_relative_to("/usr"):
        binds += ["--ro-bind", str(home), str(home)]
    for device in ("null", "zero", "urandom"):
        binds += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return binds


def _said(command: Sequence[str], data: bytes, *, bounds: Bounds) -> tuple[bytes, str]:
    """What a command prints, given these bytes, and which limit cut it off, if one did. Its time
    begins with its first byte."""
    try:
        started = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            bufsize=0,
        )
    except OSError as error:  # no process is left on this machine
        return str(error).encode(), ""
    with started as process:
        try:
            return _exchanged(process, memoryview(data), bounds)
        finally:
            process.kill()


def _exchanged(
    process: "subprocess.Popen[bytes]", data: memoryview, bounds: Bounds
) -> tuple[bytes, str]:
    assert process.stdin is not None
    assert process.stdout is not None
    said, end = bytearray(), monotonic() + _START_S
    with selectors.DefaultSelector() as ready:
        os.set_blocking(process.stdin.fileno(), False)
        ready.register(process.stdin, selectors.EVENT_WRITE)
        ready.register(process.stdout, selectors.EVENT_READ)
        while (left_s := end - monotonic()) > 0:
            for key, _ in ready.select(left_s):
                # to it
                if key.fileobj is process.stdin:
                    try:
                        data = data[os.write(key.fd, data[: 1 << 16]) :]
                    except BrokenPipeError:
                        data = data[:0]
                    if not data:
                        ready.unregister(process.stdin)
                        process.stdin.close()
                    continue
                # from it
                part = os.read(key.fd, 1 << 16)
                if not said and part:
                    end = monotonic() + bounds.wall_s
                said += part
                if not part:
                    return bytes(said), ""
                if len(said) > bounds.output_bytes:
                    return bytes(said), "output"
    return bytes(said), "time"
