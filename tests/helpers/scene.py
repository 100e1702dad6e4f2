"""The scene of a disaster: three machines with a Ray cluster and a bucket, where the command
`stillhouse` runs on the first.

Each machine reaches the bucket by a way of its own, where requests can be held; cutting a machine
off from the others leaves it that way.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import boto3
import psutil
import xxhash

from helpers.clusters import RayMachines
from helpers.command import as_toml
from helpers.commands import Command, CommandServer
from helpers.faults import FaultyS3
from helpers.history import Published
from helpers.metadata import MetadataServer
from helpers.networks import Network, inside
from helpers.ranks import RankGroup
from helpers.training import train_and_tell
from helpers.world import TinyWorld, merged
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore
from stillhouse.tracking import JournalReader, RunEvent, latest_train_events

HUB, LEFT, RIGHT = "hub", "left", "right"
_TEACHER, _RANK = "ray::_TeacherActor", "ray::RayTrainWorker"
_PATIENCE_S = 300.0
_LOOK_EVERY_S = 0.05
EPOCH = {"epochs": 1, "max_steps": 1000}  # of the student: all of it, once
PLACES = {  # teachers come one to a machine, students live on the head
    "teacher": {"resources": {"teacher": 1.0}, "min_replicas": 2, "max_replicas": 2},
    "student": {"resources": {"student": 1.0}} | EPOCH,
}
_RESOURCES = {
    HUB: {"student": 2.0},
    LEFT: {"teacher": 1.0, "rank": 1.0},
    RIGHT: {"teacher": 1.0, "rank": 1.0},
}
_NUM_CPUS = {HUB: 4, LEFT: 1, RIGHT: 1}


@dataclass
class Scene:
    network: Network
    s3: Mapping[str, FaultyS3]  # machine -> its way to the bucket
    metadata: Mapping[str, MetadataServer]  # machine -> who says when it ends
    cluster: RayMachines
    commands: CommandServer
    _cut_off: set[str] = field(default_factory=set)

    @classmethod
    @contextmanager
    def open(cls, s3_endpoint: str, *, cache: Path) -> Iterator["Scene"]:
        """Three machines and their cluster, which end with the block; commands keep their corpora
        in `cache`."""
        with ExitStack() as stack:
            network = stack.enter_context(Network.of((HUB, LEFT, RIGHT)))
            s3, metadata = {}, {}
            for name, machine in network.machines.items():
                with inside(
                    machine.namespace
                ):  # they listen there; what they ask of others they ask from here
                    s3[name], metadata[name] = FaultyS3(s3_endpoint), MetadataServer("aws")
                stack.enter_context(s3[name])
                stack.enter_context(metadata[name])
            hub = network.machines[HUB]
            with inside(hub.namespace):
                commands = CommandServer(
                    {"XDG_CACHE_HOME": str(cache), "AWS_ENDPOINT_URL": s3[HUB].url}
                )
            stack.callback(commands.close)
            scene = cls(network, s3, metadata, RayMachines(hub), commands)
            stack.callback(lambda: scene.cluster.close())
            scene.make_whole()
            yield scene

    def join(self, name: str) -> None:
        """A new node on a machine that has none."""
        machine = self.network.machines[name]
        self.metadata[name].withdraw()
        clouds = {
            "AWS_ENDPOINT_URL": self.s3[name].url,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata[name].url,
        }
        self.cluster.join(
            machine,
            num_cpus=_NUM_CPUS[name],
            resources=_RESOURCES[name],
            environment=machine.environment | clouds,
        )

    def cut_off(self, name: str) -> None:
        """The machine lives on and reaches the bucket, but no other machine."""
        self.network.cut(name)
        self._cut_off.add(name)

    def make_whole(self) -> None:
        """A cluster with a node on every machine, and all links."""
        if self.cluster.is_lost():
            self.cluster = RayMachines(self.network.machines[HUB])
        for name in self.network.machines:
            if name in self._cut_off:
                self._cut_off.remove(name)
                if name in self.cluster.raylets:
                    self.cluster.kill_node(name)
                self.network.mend(name)
            if name not in self.cluster.raylets:
                self.join(name)

    def teacher(self, name: str) -> psutil.Process:
        """The teacher on a machine, once there is one."""
        return self.cluster.workers(name, _TEACHER)[-1]

    def ranks(self) -> list[psutil.Process]:
        """The students' ranks, once there are any."""
        return self.cluster.workers(HUB, _RANK)

    def plan(self, world: TinyWorld, run_dir: Path, **changes: dict[str, Any]) -> Plan:
        """A run on this cluster."""
        return world.plan(
            run_dir, **merged(PLACES | {"cluster": {"address": self.cluster.address}}, changes)
        )

    def run(self, plan: Plan) -> "LiveRun":
        """Begin `stillhouse run`."""
        config = plan.run_dir.with_suffix(".toml")
        values = plan.config.model_dump(mode="json", exclude_none=True)
        config.write_text(
            as_toml(
                {
                    name: {key: value for key, value in table.items() if value != []}
                    for name, table in values.items()
                }
            )
        )
        log = plan.run_dir.with_suffix(".log")
        return LiveRun(plan, self.commands.start("run", config, "--run-dir", plan.run_dir, log=log))


@dataclass(frozen=True)
class Undisturbed:
    """What comes of a run when nothing happens."""

    plan: Plan
    curve: list[tuple[float, ...]]

    @classmethod
    def trained(cls, plan: Plan, ranks: RankGroup) -> "Undisturbed":
        """By the training loop alone, in processes that are there already, on a store that is
        full."""
        (job,) = plan.jobs
        return cls(plan, curve(ranks.call(train_and_tell, job)[0]))

    def chunk(self, number: int) -> bytes:
        store = ChunkStore(self.plan.config.store.url, self.plan.recipe)
        return (Path(store.url) / store.key(number)).read_bytes()


def curve(events: Sequence[RunEvent]) -> list[tuple[float, ...]]:
    """Step, loss and gradient of each step, as it was last taken."""
    return [
        (event.step, event.loss, event.grad_norm)
        for event in latest_train_events(events, "student")
    ]


class LiveRun:
    """A run whose command is at work."""

    def __init__(self, plan: Plan, command: Command) -> None:
        self.plan, self.command = plan, command
        self._journal, self._events = (
            JournalReader(plan.run_dir / "journal.jsonl"),
            list[RunEvent](),
        )

    @property
    def events(self) -> list[RunEvent]:
        """Of its journal, so far."""
        self._events += self._journal.new_events()
        return self._events

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it. Fails where the command ends before."""
        deadline = monotonic() + _PATIENCE_S
        while not condition():
            assert not self.command.has_ended(), f"the command ended: {self.command.words()}"
            assert monotonic() < deadline, f"waited in vain: {self.command.words()}"
            sleep(_LOOK_EVERY_S)


def make_bucket(bucket: str) -> None:
    """A bucket that remembers each time a key is written."""
    client = _s3()
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})


def times_written(bucket: str) -> Counter[str]:
    """How many times each key of a bucket was written."""
    pages = _s3().get_paginator("list_object_versions").paginate(Bucket=bucket)
    return Counter(version["Key"] for page in pages for version in page.get("Versions", ()))


def writes_in(bucket: str) -> dict[str, list[bytes | None]]:
    """What each key of a bucket was given, each time; None where it was deleted."""
    client, found = _s3(), dict[str, list[bytes | None]]()
    for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket):
        for version in page.get("Versions", ()):
            key = version["Key"]
            body = client.get_object(Bucket=bucket, Key=key, VersionId=version["VersionId"])["Body"]
            found.setdefault(key, []).append(body.read())
        for marker in page.get("DeleteMarkers", ()):
            found.setdefault(marker["Key"], []).append(None)
    return found


def published_in(bucket: str) -> list[Published]:
    """Every time that a chunk was written to the bucket, in turn, with what was written."""
    client = _s3()
    pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket)
    versions = sorted(
        (each for page in pages for each in page.get("Versions", ())),
        key=lambda version: version["LastModified"],
    )
    found = []
    for version in versions:
        number = re.search(r"/chunks/(?:[0-9a-f]{2}/)?(\d{10})\.safetensors$", version["Key"])
        if number is not None:
            data = client.get_object(
                Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"]
            )["Body"].read()
            found.append(
                Published(
                    int(number[1]),
                    f"a write at {version['LastModified']:%H:%M:%S}",
                    xxhash.xxh3_64_hexdigest(data),
                )
            )
    return found


def contents(bucket: str, key: str) -> bytes:
    data: bytes = _s3().get_object(Bucket=bucket, Key=key)["Body"].read()
    return data


def put(bucket: str, key: str, data: bytes) -> None:
    _s3().put_object(Bucket=bucket, Key=key, Body=data)


def _s3() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
