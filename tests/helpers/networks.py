"""Several machines on one: network namespaces with addresses of their own, on a bridge whose links
can be cut.

Invariant: a namespace has no name anywhere. It lives as long as a process is in it, and takes its
links along; so nothing is left over, however a test ends. To make one takes the rights of root,
which `unshare --map-root-user` lends where the system allows it.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

_NETWORK = 0x40000000  # CLONE_NEWNET
_PATIENCE_S = 30.0
_DEVICE = "network"  # on every machine


@contextmanager
def inside(namespace: Path) -> Iterator[None]:
    """This thread in another network namespace: sockets that it opens, threads and processes that
    it starts belong there for good."""
    with open("/proc/thread-self/ns/net") as home, namespace.open() as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _NETWORK) != 0:
        raise OSError(
            ctypes.get_errno(),
            "cannot enter a network namespace: " + os.strerror(ctypes.get_errno()),
        )


@dataclass(frozen=True)
class Machine:
    """A network namespace: `address` is its own."""

    name: str
    address: str
    namespace: Path

    @property
    def environment(self) -> dict[str, str]:
        """What processes here have to be told: gloo would look for the address of the host's name,
        which is another network's."""
        return {"GLOO_SOCKET_IFNAME": _DEVICE}


@dataclass(frozen=True)
class Network:
    """The first machine has the bridge, and a link to each of the others."""

    machines: dict[str, Machine]
    _hub: Machine

    @classmethod
    @contextmanager
    def of(cls, names: Sequence[str]) -> Iterator["Network"]:
        """A network of new machines, without a way to any other; it ends with the block, or with
        this process."""
        with ExitStack() as stack:
            machines = {
                name: Machine(name, f"10.77.0.{number}", stack.enter_context(_namespace()))
                for number, name in enumerate(names, 1)
            }
            hub, *others = machines.values()
            _ip(hub, "link", "set", "lo", "up")
            _ip(hub, "link", "add", _DEVICE, "type", "bridge")
            _ip(hub, "address", "add", f"{hub.address}/24", "dev", _DEVICE)
            _ip(hub, "link", "set", _DEVICE, "up")
            for machine in others:
                holder = machine.namespace.parts[2]
                _ip(
                    hub,
                    "link",
                    "add",
                    machine.name,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    _DEVICE,
                    "netns",
                    holder,
                )
                _ip(hub, "link", "set", machine.name, "master", _DEVICE, "up")
                _ip(machine, "link", "set", "lo", "up")
                _ip(machine, "address", "add", f"{machine.address}/24", "dev", _DEVICE)
                _ip(machine, "link", "set", _DEVICE, "up")
            for machine in (
                machines.values()
            ):  # leads nowhere, but Ray asks it which address is the machine's own
                _ip(machine, "route", "add", "default", "dev", _DEVICE)
                for (
                    server
                ) in _name_servers():  # nor do they answer: better known at once than after seconds
                    _ip(machine, "route", "add", "unreachable", server)
            yield cls(machines, hub)

    def cut(self, name: str) -> None:
        """The machine lives on, and reaches nobody."""
        _ip(self._hub, "link", "set", name, "down")

    def mend(self, name: str) -> None:
        _ip(self._hub, "link", "set", name, "up")


def _name_servers() -> list[str]:
    """Of the host, outside its loopback, by IPv4."""
    lines = [line.split() for line in Path("/etc/resolv.conf").read_text().splitlines()]
    servers = {line[1] for line in lines if len(line) > 1 and line[0] == "nameserver"}
    return sorted(server for server in servers if "." in server and not server.startswith("127."))


@contextmanager
def _namespace() -> Iterator[Path]:
    """A namespace, held by a process that ends when its input does."""
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as holder:
        namespace = Path(f"/proc/{holder.pid}/ns/net")
        deadline = monotonic() + _PATIENCE_S
        while namespace.readlink() == Path("/proc/self/ns/net").readlink():
            assert monotonic() < deadline
            assert holder.poll() is None, (
                "no network namespace can be made: run as root, or under `unshare --map-root-user`"
            )
            sleep(0.01)
        yield namespace


def _ip(machine: Machine, *words: str) -> None:
    with inside(machine.namespace):
        subprocess.run(["ip", *words], check=True)
