"""A process that holds what one command alone may use: who it is, for a refusal that names it, and
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
_MOST_SINCE = (
    253_402_300_799.0  # unix seconds: the last of year 9999, up to which dates can be written
)


@dataclass(frozen=True, slots=True)
class Holder:
    """One use of a run directory by one process. Plain values, so that it can be written beside
    what is held."""

    host: str
    pid: int
    command: str  # as the user typed it, without secrets
    since: float  # unix seconds
    run_dir: str
    # one boot and one process namespace, within which a pid means one process; empty where that
    # cannot be known
    machine: str
    born: str  # when the process began, as its system counts: a pid is given again
    token: str  # of this one use

    @classmethod
    def here(cls, command: str, run_dir: Path, *, now: float) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(
            socket.gethostname(),
            pid,
            scrub(command),
            now,
            str(run_dir),
            _machine(),
            _born(pid),
            uuid4().hex,
        )

    def state(self) -> Literal["alive", "gone", "unknown"]:
        """Whether the process still exists; unknown where it is not on this machine, or in another
        container of it."""
        if not self.machine or self.machine != _machine():
            return "unknown"
        return "alive" if _born(self.pid) == self.born else "gone"

    def words(self) -> str:
        since = datetime.fromtimestamp(self.since, tz=UTC).strftime("%-d %B %Y, %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} (`{self.command}`, since {since})"

    def packed(self, **more: object) -> bytes:
        """As JSON with a checksum, and with these plain values beside it."""
        return json.dumps(sealed({**asdict(self), **more})).encode()


@dataclass(frozen=True, slots=True)
class Record:
    """What was read: the holder, None where it is damaged or of another version, and what was
    written beside it."""

    data: bytes
    holder: Holder | None
    more: dict[str, Any]

    @classmethod
    def parsed(cls, data: bytes) -> Self:
        try:
            values = opened(json.loads(data))
            own = {field.name: values.pop(field.name) for field in fields(Holder)}
            return (
                cls(data, Holder(**own), values) if _may_be_a_holder(own) else cls(data, None, {})
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls(data, None, {})

    def words(self) -> str:
        return (
            "another command, whose record cannot be read"
            if self.holder is None
            else self.holder.words()
        )


def _may_be_a_holder(values: dict[str, Any]) -> bool:
    """Whether every value has its type, and the time is one that can be written as a date."""
    of_their_types = (
        type(values[field.name]) in ((int, float) if field.type is float else (field.type,))
        for field in fields(Holder)
    )
    return all(of_their_types) and 0 <= values["since"] <= _MOST_SINCE


def _machine() -> str:
    """Linux alone says it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """The clock ticks between the machine's boot and the start of a process; empty where there is
    no such process, or only a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return _NO_PROCESS
    return _NO_PROCESS if state in "ZX" else rest[18]
