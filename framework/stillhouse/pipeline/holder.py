"""The holder of what one command alone may use: a process, as a refused command names it, and
whether it is still there."""

import json
import os
import socket
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

from stillhouse.redaction import scrub
from stillhouse.sealed import opened, sealed

_NO_PROCESS = ""
_MOST_SINCE = 253_402_300_799.0  # unix seconds: the end of the year 9999, the last that has dates


@dataclass(frozen=True, slots=True)
class Holder:
    """One use of a run directory by one process, as plain values: it is written as JSON."""

    host: str
    pid: int
    command: str  # as the user typed it, without secrets
    since: float  # unix seconds
    run_dir: str
    machine: str  # one boot and one process namespace, where a pid is unique; empty if not known
    born: str  # when the process began, in clock ticks: pids are used again
    token: str  # of this one use

    @classmethod
    def here(cls, command: str, run_dir: Path, *, now: float) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            command=scrub(command),
            since=now,
            run_dir=str(run_dir),
            machine=_machine(),
            born=_born(pid),
            token=uuid4().hex,
        )

    def state(self) -> Literal["alive", "gone", "unknown"]:
        """Whether the process still exists; unknown where it is on another machine, or in another
        container of this one."""
        if not self.machine or self.machine != _machine():
            return "unknown"
        return "alive" if _born(self.pid) == self.born else "gone"

    def words(self) -> str:
        """The process, for a person."""
        since = datetime.fromtimestamp(self.since, tz=UTC).strftime("%-d %B %Y, %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} (`{self.command}`, since {since})"

    def packed(self, **more: object) -> bytes:
        """As JSON with a checksum, with these values beside its own."""
        return json.dumps(sealed({**asdict(self), **more})).encode()


@dataclass(frozen=True, slots=True)
class Record:
    """A holder as it was read: None where it is damaged or of another version. `more` was written
    beside it."""

    data: bytes
    holder: Holder | None
    more: dict[str, Any]

    @classmethod
    def parsed(cls, data: bytes) -> Self:
        try:
            values = opened(json.loads(data))
            own = {field.name: values.pop(field.name) for field in fields(Holder)}
            if _may_be_a_holder(own):
                return cls(data, Holder(**own), values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        return cls(data, None, {})

    def words(self) -> str:
        """The holder, for a person."""
        if self.holder is None:
            return "another command, whose record cannot be read"
        return self.holder.words()


def _may_be_a_holder(values: dict[str, Any]) -> bool:
    """Whether every value has its type, and the time is one that can be written as a date."""
    for field in fields(Holder):
        types = (int, float) if field.type is float else (field.type,)
        if type(values[field.name]) not in types:
            return False
    return bool(0 <= values["since"] <= _MOST_SINCE)


def _machine() -> str:
    """This boot and process namespace; only Linux has a name for them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """The clock ticks between the machine's boot and the start of a process; `_NO_PROCESS` where
    there is none, or only a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return _NO_PROCESS
    return _NO_PROCESS if state in "ZX" else rest[18]
