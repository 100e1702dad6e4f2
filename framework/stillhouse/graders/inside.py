"""What runs in the sandbox: limits, then the programs. sandbox.py sends this file's text to an
interpreter there; nothing of Stillhouse can be imported.

It says `+` when it begins, and at the end a line with the word that only it was told, and how the
programs ended. So a program that leaves early, whatever its exit code, has not passed.
"""

import contextlib
import json
import os
import resource
import signal
import sys

_OPEN_FILES = 64


def main() -> None:
    """Run the programs that standard input holds, one after the other, in one namespace."""
    job = json.load(sys.stdin.buffer)
    set_limits(job["limits"])
    nothing, said = os.open(os.devnull, os.O_RDWR), os.dup(1)
    os.dup2(nothing, 0)
    os.dup2(nothing, 2)
    os.write(said, b"+")
    ending = ended(job["programs"])
    with contextlib.suppress(Exception):  # the programs may have closed it
        sys.stdout.flush()
    os.write(said, f"\n{job['word']} {ending}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)  # no thread of the programs keeps it


def set_limits(limits: dict[str, int]) -> None:
    """Of this process and of all that it starts; none can be raised again."""
    for name, limit in {
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": limits["cpu_s"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NOFILE": _OPEN_FILES,
        "RLIMIT_NPROC": limits["num_tasks"],
    }.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))


def ended(programs: list[str]) -> str:
    """`passed`, or what was raised, on one line."""
    names: dict[str, object] = {"__name__": "solution"}
    try:
        for program in programs:
            exec(compile(program, "<program>", "exec"), names)
        return "passed"
    except BaseException as error:
        return f"{type(error).__name__} {str(error)[:200]!a}"


if __name__ == "__main__":
    main()
