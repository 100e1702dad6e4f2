"""A Slurm cluster on one machine: Debian's munged, slurmctld and slurmd; each node has its own
address, hostname and place for Ray's files.

Invariant: what runs on a node lives in a process namespace that ends with its holder's input. So
nothing is left over, however a test ends, and no service or file of the system is touched.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil

from helpers.networks import Machine, Network, inside

# in the order in which Slurm gives them out; the first has the controller
FIRST, SECOND = (
    "still-1",
    "still-2",
)
URGENT = "urgent"  # a partition whose jobs take nodes from those of the usual one
_PATIENCE_S = 600.0
_LOOK_EVERY_S = 0.2

_SETTINGS = """
ClusterName=stillhouse
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SlurmdParameters=config_overrides
MailProg=/bin/true
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName={urgent} Nodes=ALL PriorityTier=2
"""  # cred_expire is also how long a job that was queued again is held back

_NODE = """\
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mkdir -p /tmp/stillhouse-0
mount -t tmpfs -o mode=700 tmpfs /tmp/stillhouse-0
{daemons}
echo ready
read -r || true
"""
_CONTROLLER = """\
munged --force --socket={folder}/munge.socket --key-file={folder}/munge.key \\
    --seed-file={folder}/munge.seed \\
    --pid-file={folder}/munge.pid --log-file={folder}/munge.log
slurmctld -f {folder}/slurm.conf
"""
_OWN_NAMESPACES = (
    "unshare",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "bash",
)


@dataclass(frozen=True)
class Slurm:
    """Two nodes, set up as `launch/slurm/README.md` asks for."""

    folder: Path
    network: Network

    @classmethod
    @contextmanager
    def open(cls, folder: Path, *, gpus_per_node: int) -> Iterator["Slurm"]:
        """Idle nodes, which end with the block or with this process. Nobody has the GPUs that Slurm
        counts on them."""
        with ExitStack() as stack:
            slurm = cls(folder, stack.enter_context(Network.of((FIRST, SECOND))))
            slurm._write_files(gpus_per_node=gpus_per_node)
            for machine in slurm.network.machines.values():
                stack.enter_context(slurm._node(machine))
            nodes = ("sinfo", "--partition=usual", "--noheader", "--Node", "--format=%N %T")
            wait_until(lambda: slurm.ask(*nodes).split("\n") == [f"{FIRST} idle", f"{SECOND} idle"])
            yield slurm

    def ask(self, *command: str, environment: Mapping[str, str] = os.environ) -> str:
        """What one of Slurm's commands answers on the first node."""
        with inside(self.network.machines[FIRST].namespace):
            done = subprocess.run(
                command,
                env={**environment, "SLURM_CONF": str(self.folder / "slurm.conf")},
                cwd=self.folder,
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments: str | Path, environment: Mapping[str, str]) -> "Job":
        """By `sbatch`; the job has the environment."""
        return Job(
            self, self.ask("sbatch", "--parsable", *map(str, arguments), environment=environment)
        )

    def titles(self, name: str) -> list[str]:
        """What runs on a node, as the processes call themselves."""
        there, found = self.network.machines[name].namespace.readlink(), []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if Path(f"/proc/{process.pid}/ns/net").readlink() == there:
                    found.append(" ".join(process.cmdline()))
        return found

    def _write_files(self, *, gpus_per_node: int) -> None:
        machines = self.network.machines.values()
        nodes = [
            f"NodeName={each.name} NodeAddr={each.address} CPUs={os.cpu_count()} "
            f"Gres=gpu:{gpus_per_node}"
            for each in machines
        ]
        settings = _SETTINGS.format(
            first=FIRST,
            address=self.network.machines[FIRST].address,
            folder=self.folder,
            urgent=URGENT,
        )
        (self.folder / "slurm.conf").write_text("\n".join([settings, *nodes]) + "\n")
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/gpu[0-{gpus_per_node - 1}]\n"
        )
        for number in range(gpus_per_node):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "hosts").write_text(
            "".join(f"{each.address} {each.name}\n" for each in machines) + "127.0.0.1 localhost\n"
        )
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        for each in machines:
            (self.folder / each.name / "spool").mkdir(parents=True)

    @contextmanager
    def _node(self, machine: Machine) -> Iterator[None]:
        daemons = (_CONTROLLER if machine.name == FIRST else "") + "slurmd -f {folder}/slurm.conf"
        script = self.folder / machine.name / "start"
        script.write_text(
            _NODE.format(
                name=machine.name, folder=self.folder, daemons=daemons.format(folder=self.folder)
            )
        )
        with inside(machine.namespace):
            holder = subprocess.Popen(
                [*_OWN_NAMESPACES, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            yield


@dataclass(frozen=True)
class Job:
    """One that was submitted."""

    slurm: Slurm
    number: str

    def __getitem__(self, field: str) -> str:
        """What `scontrol show job` says, such as of JobState."""
        found = re.search(
            rf"\b{field}=(\S+)", self.slurm.ask("scontrol", "show", "job", self.number)
        )
        assert found, field
        return found[1]

    def terminate(self) -> None:
        """SIGTERM to the batch script alone: what `--signal=B:TERM@...` asks Slurm to send."""
        self.slurm.ask("scancel", "--batch", "--signal=TERM", self.number)

    def has_ended(self) -> bool:
        return self["JobState"] not in (
            "PENDING",
            "CONFIGURING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
        )

    def log(self) -> str:
        """What it has written so far."""
        return Path(self["StdOut"]).read_text()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + _PATIENCE_S
    while not condition():
        assert monotonic() < deadline, "waited in vain"
        sleep(_LOOK_EVERY_S)
