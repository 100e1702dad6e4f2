"""What docker/compose.yaml says of its containers, done without an engine: each service is a
process tree with a machine of its own.

A container here has the file's command and environment, the image's user and variables, and
namespaces of its own: network, mounts, process ids and host name. Its root is made of this system's
programs, and of this environment in place of the image's. It ends, with all that is in it, when its
first process does, and at the latest with the test's.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.networks import Machine, inside

ROOT = Path(__file__).parents[2]
USER = 10001  # of both images
_ENVIRONMENT = "/opt/stillhouse"  # where the images have it
_BUILD = """
set -eu
mount -t tmpfs -o mode=755 root "$root"
for place in bin lib lib64 sbin usr etc dev sys; do
    if [ -L "/$place" ]; then
        cp -P "/$place" "$root/"
    elif [ -d "/$place" ]; then
        mkdir "$root/$place" && mount --rbind "/$place" "$root/$place"
    fi
done
mkdir "$root/proc" && mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777,size=512m shm "$root/dev/shm"
mount --bind "$hosts" "$root/etc/hosts"
while read -r here there; do
    mkdir -p "$root$there"
    mount --bind "$here" "$root$there"
done <"$binds"
mkdir -p "$root/home/stillhouse"
chown "$user:$user" "$root/home/stillhouse"
hostname "$name"
exec chroot "$root" setpriv $drop --pdeathsig=KILL --inh-caps=-all --bounding-set=-all \
    --no-new-privs env --chdir=/runs "$@"
"""


@dataclass(frozen=True)
class Service:
    """One of compose.yaml: what it runs, and with which variables beyond the image's."""

    command: Sequence[str]
    environment: Mapping[str, str]

    @classmethod
    def of(cls, name: str, *, given: Mapping[str, str]) -> "Service":
        """As the file has it, with the variables that its user has to give."""
        service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"][name]
        entrypoint = service.get("entrypoint", _image_of(service)["ENTRYPOINT"])
        values = {key: _filled_in(value, given) for key, value in service["environment"].items()}
        return cls([*entrypoint, *service["command"]], _image_of(service)["ENV"] | values)


def _image_of(service: Mapping[str, Any]) -> dict[str, Any]:
    """ENV and ENTRYPOINT of the Dockerfile's last stage."""
    last_stage = (
        (ROOT / service["build"]["dockerfile"])
        .read_text()
        .replace("\\\n", "")
        .rpartition("\nFROM ")[2]
    )
    pairs = [
        pair.split("=", 1)
        for line in re.findall(r"^ENV (.+)$", last_stage, re.MULTILINE)
        for pair in shlex.split(line)
    ]
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.+)$", last_stage, re.MULTILINE)
    return {"ENV": dict(pairs), "ENTRYPOINT": yaml.safe_load(entrypoint)}


def _filled_in(value: str, given: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: given[match[1]], value)


class Container:
    """A service at work on a machine of its own."""

    def __init__(self, service: Service, machine: Machine, *, hosts: Path, runs: Path) -> None:
        """`hosts` is its /etc/hosts; `runs`, an empty directory or one with what its volume brings,
        is its /runs. `tmp` is its /tmp."""
        user = USER if _may_become(USER) else os.getuid()
        for path in (runs, *runs.rglob("*")):
            os.chown(path, user, user)
        root, self.tmp, binds, self._log = (
            runs.with_name(f"{machine.name}.{what}") for what in ("root", "tmp", "binds", "log")
        )
        root.mkdir()
        self.tmp.mkdir()
        self.tmp.chmod(0o1777)
        places: list[tuple[object, object]] = [
            (self.tmp, "/tmp"),
            (sys.base_prefix, sys.base_prefix),
            (sys.prefix, sys.prefix),
            (sys.prefix, _ENVIRONMENT),
        ]
        # any of which may lie below /tmp
        places += [(ROOT / "framework", ROOT / "framework"), (runs, "/runs")]
        binds.write_text("".join(f"{here} {there}\n" for here, there in places))
        environment = dict(service.environment) | {
            "PATH": service.environment["PATH"].replace("$PATH", os.defpath)
        }
        asked = {"root": root, "binds": binds, "hosts": hosts, "user": user, "name": machine.name}
        asked["drop"] = f"--reuid={user} --regid={user} --clear-groups" if user else ""
        with inside(machine.namespace), self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig=KILL"),
                    *(
                        "unshare",
                        "--mount",
                        "--propagation=private",
                        "--uts",
                        "--pid",
                        "--fork",
                        "--kill-child",
                    ),
                    *(
                        "sh",
                        "-c",
                        _BUILD,
                        "sh",
                        "--ignore-environment",
                        *(f"{key}={value}" for key, value in environment.items()),
                    ),
                    *service.command,
                ],
                env={"PATH": os.environ["PATH"]}
                | {name: str(value) for name, value in asked.items()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, *, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def words(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        """End everything in it: the kernel does, once the first process of its process ids is
        gone."""
        self._process.kill()
        self._process.wait()


def _may_become(user: int) -> bool:
    """Whether that user is known here: whoever is root in a namespace of its own knows itself
    alone."""
    ranges = [
        tuple(map(int, line.split()))
        for line in Path("/proc/self/uid_map").read_text().splitlines()
    ]
    return os.getuid() == 0 and any(first <= user < first + count for first, _, count in ranges)
