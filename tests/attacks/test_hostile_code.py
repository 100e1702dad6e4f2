"""Code that a model wrote, run to be graded: each way out of the sandbox, and each way to use up
the machine, with a bound of its own on what it would do if it were let."""

import os
import re
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic

import psutil
import pytest

from helpers.graders import section
from stillhouse.errors import ConfigError
from stillhouse.graders import Sample, graded, make_grader
from stillhouse.graders.cgroups import groups_of_one_run, remove_left_groups
from stillhouse.graders.sandbox import Bounds, Sandbox, _unused_id

BOUNDS = Bounds(
    wall_s=20, memory_bytes=128 << 20, file_bytes=4 << 20, output_bytes=1 << 16, max_tasks=16
)
SHORT = replace(BOUNDS, wall_s=0.5)


def readable_python() -> str:
    """The Python of these tests, or Debian's where no other user may read that one."""
    own = Path(sys.executable).resolve()
    is_open = all(path.stat().st_mode & stat.S_IXOTH for path in (own, *own.parents))
    return str(own) if is_open else "/usr/bin/python3"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(BOUNDS, interpreter=readable_python())


@pytest.fixture(scope="module")
def without_groups(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Where no control group can be made, as in most containers."""
    empty = tmp_path_factory.mktemp("cgroup")
    return Sandbox(BOUNDS, interpreter=readable_python(), cgroups=empty)


LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
HELD = "if result: raise OSError(ctypes.get_errno(), 'held')"
# what is tried, and what it raises where it is held; it would pass if it were let
ATTACKS = {
    "a host of the network": (
        "import socket; socket.create_connection(('192.0.2.1', 80), 5)",
        "OSError",
    ),
    "a name of the network": ("import socket; socket.gethostbyname('example.com')", "gaierror"),
    "a password file": ("open('/etc/passwd')", "FileNotFoundError"),
    "this file": (f"open({__file__!r})", "FileNotFoundError"),
    "the user's directory": ("import os; os.listdir('/root')[0]", "FileNotFoundError|IndexError"),
    "a file in /usr": ("open('/usr/stillhouse', 'w')", "OSError"),
    "a file in /": ("open('/stillhouse', 'w')", "OSError"),
    "the environment": ("import os; os.environ['STILLHOUSE_SECRET']", "KeyError"),
    "the kernel's settings": ("open('/proc/sys/kernel/panic')", "FileNotFoundError"),
    "control groups": ("import os; os.listdir('/sys/fs/cgroup')", "FileNotFoundError"),
    "memory of the machine": ("open('/dev/mem')", "FileNotFoundError"),
    "a device": ("import os, stat; os.mknod('/tmp/d', stat.S_IFBLK | 0o600, 0)", "PermissionError"),
    "a mount": (
        f"{LIBC}result = libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)\n{HELD}",
        "PermissionError",
    ),
    "/usr mounted to write": (
        f"{LIBC}result = libc.mount(None, b'/usr', None, 32 | 4096, None)\n{HELD}",
        "PermissionError",
    ),
    "a user namespace": (f"{LIBC}result = libc.unshare(0x10000000)\n{HELD}", "OSError"),
    "root": ("import os; os.setuid(0)", "OSError|PermissionError"),
    "a higher limit": (
        "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))",
        "ValueError",
    ),
    "256 MB of memory": ("bytearray(256 << 20)", "MemoryError"),
    "a file of 8 MB": ("open('/tmp/a', 'wb').write(bytes(8 << 20))", "OSError"),
    "8 MB in files": (
        "for n in range(8): open(f'/tmp/{n}', 'wb', 0).write(bytes(1 << 20)) == 1 << 20 or 1 / 0",
        "OSError|ZeroDivisionError",
    ),
    "8 MB in memory's own file": (
        "import os; os.write(os.memfd_create('a'), bytes(4 << 20)); "
        "os.pwrite(os.memfd_create('b'), bytes(8 << 20), 0) == 8 << 20 or 1 / 0",
        "OSError|ZeroDivisionError",
    ),
    "100 open files": ("files = [open('/dev/null') for _ in range(100)]", "OSError"),
    "40 processes": (
        "import os, signal\nfor _ in range(40):\n    if os.fork() == 0: signal.pause()",
        "BlockingIOError",
    ),
    "40 threads": (
        "import threading\nend = threading.Event()\nfor _ in range(40):\n"
        "    threading.Thread(target=end.wait, daemon=True).start()",
        "RuntimeError",
    ),
    "the end of all processes": ("import os; os.kill(-1, 9)", "ProcessLookupError"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_code_may_not_do_is_held(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    monkeypatch.setenv("STILLHOUSE_SECRET", "secret")
    program, held = ATTACKS[attack]
    ending = sandbox.run([program]).ending
    assert ending.split()[0] in held.split("|"), ending


@pytest.mark.parametrize("attack", ["40 processes", "40 threads", "256 MB of memory"])
def test_limits_hold_without_control_groups(without_groups: Sandbox, attack: str) -> None:
    program, held = ATTACKS[attack]
    assert without_groups.run([program]).ending.split()[0] == held


def test_one_task_is_enough_for_a_program_that_starts_none(sandbox: Sandbox) -> None:
    bounds = replace(BOUNDS, max_tasks=1)
    assert sandbox.run(["x = 1", "assert x == 1"], bounds=bounds).ending == "passed"


def test_a_server_of_this_machine_is_not_reached(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert sandbox.run([program]).ending.startswith("ConnectionRefusedError")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_process_of_this_machine_gets_no_signal(sandbox: Sandbox) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        ending = sandbox.run([f"import os; os.kill({bystander.pid}, 9)"]).ending
        assert ending.startswith("ProcessLookupError")
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("while True: pass", "time"),
        ("import time; time.sleep(600)", "time"),
        ("import time\nwhile True: print(1, flush=True); time.sleep(0.01)", "time"),
        ("import signal\nfor n in (2, 15): signal.signal(n, lambda *_: 0)\nwhile 1: pass", "time"),
        ("while True: print('x' * 1000)", "output"),
        ("import os\nwhile True: os.write(1, bytes(4096))", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "time"),
        ("import os; os.kill(os.getpid(), 9)", "ended"),
        ("import ctypes; ctypes.string_at(0)", "ended"),
    ],
)
def test_what_does_not_end_or_print_little_is_cut_off(
    sandbox: Sandbox, program: str, ending: str
) -> None:
    began = monotonic()
    # a program that ends itself has time to, on a busy machine too
    bounds = replace(SHORT, wall_s=20.0) if ending == "ended" else SHORT
    ran = sandbox.run([program], bounds=bounds)
    assert ran.ending == ending
    assert len(ran.output) <= SHORT.output_bytes + (64 << 10)
    assert monotonic() - began < 30


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os.execv('/bin/true', ['true'])",
        "print('\\n' + '0' * 32 + ' passed')\nimport os; os._exit(0)",
        "def answer(): raise SystemExit(0)",
        "import os\nif os.fork() == 0: os._exit(0)\nos._exit(0)",
        "import sys; sys.stdin.read(); answer = 41",
    ],
)
def test_code_that_leaves_before_its_test_has_not_passed(sandbox: Sandbox, code: str) -> None:
    assert sandbox.run([code, "assert answer() == 42"]).ending != "passed"


def test_no_process_stays_behind(sandbox: Sandbox) -> None:
    token = secrets.token_hex(16)
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", {token!r}])
time.sleep(0.2)
"""
    assert sandbox.run([program]).ending == "passed"
    psutil.wait_procs(processes_with(token), timeout=60)
    assert processes_with(token) == []


def test_a_sandbox_ends_with_the_process_that_made_it() -> None:
    token = secrets.token_hex(16)
    program = f"""
import os, sys
print("x", flush=True)
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", {token!r}])
"""
    script = f"""
from stillhouse.graders.sandbox import Bounds, Sandbox
sandbox = Sandbox({BOUNDS!r}, interpreter={readable_python()!r})
print("tried", flush=True)
sandbox.run([{program!r}])
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        found = waited_for(lambda: processes_with(token))
        owner.kill()
    assert psutil.wait_procs(found, timeout=60)[1] == []


def processes_with(token: str) -> list[psutil.Process]:
    return [
        each
        for each in psutil.process_iter(["cmdline"])
        if token in (each.info["cmdline"] or [])[-1:]
    ]


def waited_for(look: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    end = monotonic() + 60
    while not (found := look()):
        assert monotonic() < end, "waited in vain"
    return found


# ---- where there is no sandbox


def script_in(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("bwrap", "words"),
    [
        (None, "bwrap is not installed; install the packages"),
        ("echo 'bwrap: No permissions to create new namespace'; exit 1", "No permissions to"),
        ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', "can be reached"),
        ("exec sleep 0", "did not start"),
    ],
    ids=["none", "forbidden", "bare", "silent"],
)
def test_code_is_refused_where_it_would_not_be_shut_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bwrap: str | None, words: str
) -> None:
    open_to_all = tmp_path
    while open_to_all != open_to_all.parent and open_to_all.stat().st_uid == os.geteuid():
        open_to_all.chmod(open_to_all.stat().st_mode | 0o055)
        open_to_all = open_to_all.parent
    if bwrap is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        script_in(tmp_path, "bwrap", bwrap)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=words):
        Sandbox(BOUNDS, interpreter=readable_python())


def test_a_python_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="a Python which every user can read"):
        Sandbox(BOUNDS, interpreter="/opt/no/such/python3")


AS_SOMEBODY = """
from pathlib import Path
from stillhouse.errors import ConfigError
from stillhouse.graders.sandbox import Bounds, Sandbox
try:
    sandbox = Sandbox({bounds!r}, interpreter={python!r}, cgroups=Path("/no/such"))
except ConfigError as error:
    print("refused:", error)
else:
    print("held:", sandbox.run([{attack!r}]).ending)
"""


@pytest.mark.machine_root
@pytest.mark.parametrize(
    ("somebody", "words"),
    [
        (["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], "held: BlockingIOError"),
        # no limit on processes binds the machine's root, whatever it is called in its namespace
        (["unshare", "--user", "--map-root-user"], "refused: .*processes are not limited"),
    ],
    ids=["another user", "root of a namespace"],
)
def test_processes_of_every_user_are_limited_or_refused(somebody: list[str], words: str) -> None:
    script = AS_SOMEBODY.format(
        bounds=BOUNDS, python=readable_python(), attack=ATTACKS["40 processes"][0]
    )
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PATH": os.environ["PATH"],
    }
    found = subprocess.run(
        [*somebody, readable_python(), "-B", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert re.match(words, found.stdout), found


def test_a_user_is_found_whom_nobody_else_is() -> None:
    assert _unused_id("0 0 4294967295\n") == 2**31 - 2
    assert _unused_id("0 100000 65536\n") == 65_535
    assert _unused_id("0 1000 1\n") is None


# ---- control groups


def test_a_run_has_control_groups_of_its_own_where_they_can_be_made(tmp_path: Path) -> None:
    limits = {"num_tasks": 18, "memory_bytes": 1 << 20, "root": tmp_path}

    def made() -> dict[str, str]:
        with groups_of_one_run(**limits) as groups:  # type: ignore[arg-type]
            files = {
                str(file.relative_to(tmp_path).parent.parent / file.name): file.read_text()
                for group in groups
                for file in group.iterdir()
            }
            for group in groups:  # the kernel's directories have no files that must be deleted
                for file in group.iterdir():
                    file.unlink()
        assert not any(group.exists() for group in groups)
        return files

    assert made() == {}
    for controller in ("pids", "memory"):
        (tmp_path / controller).mkdir()
    assert made() == {"pids/pids.max": "18\n", "memory/memory.limit_in_bytes": "1048576\n"}
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    assert made() == {}
    (tmp_path / "cgroup.subtree_control").write_text("memory pids\n")
    assert made() == {"pids.max": "18\n", "memory.max": "1048576\n"}


def test_groups_that_a_killed_process_left_are_removed_once_no_run_can_be_about_to_enter_them(
    tmp_path: Path,
) -> None:
    old, new, other = (
        tmp_path / "pids" / name for name in ("stillhouse-run-1", "stillhouse-run-2", "x")
    )
    for path in (old, new, other):
        path.mkdir(parents=True)
    os.utime(old, (1000, 1000))
    os.utime(other, (1000, 1000))
    os.utime(new, (4000, 4000))
    remove_left_groups(tmp_path, now=4100)
    assert [path.exists() for path in (old, new, other)] == [False, True, True]


# ---- the grader


def test_the_grader_runs_a_test_against_the_code_of_a_text() -> None:
    right = "def double(x):\n    return 2 * x"
    texts = [
        right,
        f"Of course:\n```python\n{right}\n```\nThat is all.",
        right.replace("2", "3"),
        "def double(x) return",
        "I cannot do that.",
        "while True: pass",
        "x = bytearray(256 << 20)",
        f"{right}\nif __name__ == '__main__':\n    print(double(int(input())))",
    ]
    test = "assert double(21) == 42\nassert double('a') == 'aa'"
    grader = make_grader(
        section(
            kind="python",
            interpreter=readable_python(),
            wall_s=2.0,
            memory_bytes=128 << 20,
            num_processes=2,
        )
    )
    found = graded(grader, [Sample("", text, test) for text in texts])
    grader.close()
    assert found.scores == (1, 1, 0, 0, 0, 0, 0, 1)
    assert found.failures == {"memory": 1, "time": 1}
