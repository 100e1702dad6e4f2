"""The demo over machines with addresses of their own, as docker/compose.yaml has it; a network and
an S3 server are all they share."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from time import monotonic, sleep

import boto3
import pytest
from rich.console import Console

from helpers.containers import Container, Service
from helpers.networks import Machine, Network, inside
from stillhouse.config import CorpusSection
from stillhouse.pipeline.toy import Shape, Sizes, make_models
from stillhouse.tracking import (
    ChunkEvent,
    EndEvent,
    EvalEvent,
    JournalReader,
    RunEvent,
    StartEvent,
    TeacherEvent,
    TrainEvent,
    WaitEvent,
    read_journal,
)

pytestmark = pytest.mark.timeout(600)

PATIENCE_S = 300.0
GIVEN = {"RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "S3_SECRET_KEY": "a-key-that-nobody-guesses"}
# of the person who starts the run
SECRETS = {
    "HF_TOKEN": "hf_aTokenThatNobodyMaySee00000000000",
    "WANDB_API_KEY": "c0ffee" * 6 + "beef",
}
MACHINES = ("s3", "head", "teacher-a", "teacher-b", "student")
SMALLER = (  # than the demo is: seconds, not minutes
    "corpus.max_documents = 100",
    "corpus.heldout_sequences = 16",
    "store.chunk_sequences = 16",
    "student.max_steps = 40",
    "student.checkpoint_every_steps = 20",
    "evaluate.control = false",
)
SIZES = Sizes(
    vocab_size=512,
    teacher=Shape(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
    student=Shape(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2),
    num_steps=20,
)


@dataclass(frozen=True)
class Demo:
    """What was left on each machine, and how many bytes its link carried."""

    exit_code: int
    words: str
    runs: Mapping[str, Path]
    tmp: Mapping[str, Path]
    sent: Mapping[str, int]
    received: Mapping[str, int]

    @property
    def rows(self) -> list[RunEvent]:
        return read_journal(self.runs["head"] / "demo" / "journal.jsonl")


@pytest.fixture(scope="module")
def demo(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    from moto.server import ThreadedMotoServer

    folder = tmp_path_factory.mktemp("compose")
    models = folder / "models"
    models.mkdir()
    corpus = CorpusSection(
        dataset="stdlib", sequence_length=128, heldout_sequences=16, max_documents=100
    )
    make_models(models, corpus, SIZES, cache_dir=folder / "cache", console=Console(quiet=True))
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="demo")
    with ExitStack() as stack:
        network = stack.enter_context(Network.of(MACHINES))
        with inside(network.machines["s3"].namespace):
            # it has the same buckets as the session's
            server = ThreadedMotoServer(ip_address="0.0.0.0", port=7070, verbose=False)
            server.start()
            stack.callback(server.stop)
        hosts = folder / "hosts"
        hosts.write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{each.address} {name}\n" for name, each in network.machines.items())
        )
        runs, containers = {}, dict[str, Container]()
        for name in MACHINES[1:]:
            runs[name] = folder / name
            # which the file's volume brings to all
            copytree(models, runs[name] / "demo" / "models")
            if name == "student":
                wait_until_the_run_waits(containers["head"], runs["head"])
            containers[name] = Container(
                service(name), network.machines[name], hosts=hosts, runs=runs[name]
            )
            stack.callback(containers[name].kill)
        code = containers["head"].wait(timeout_s=500)
        store = network.machines["s3"]  # its counters are seen from the bridge
        sent, received = (link_bytes(store, counter) for counter in ("rx", "tx"))
        tmp = {name: each.tmp for name, each in containers.items()}
        yield Demo(
            code, "\n".join(each.words() for each in containers.values()), runs, tmp, sent, received
        )


def wait_until_the_run_waits(head: Container, runs: Path) -> None:
    """For machines: from then on it is sure that one joins later."""
    journal, deadline = JournalReader(runs / "demo" / "journal.jsonl"), monotonic() + PATIENCE_S
    while not any(isinstance(row, WaitEvent) for row in journal.new_events()):
        assert not head.has_ended(), head.words()
        assert monotonic() < deadline
        sleep(0.1)


def service(name: str) -> Service:
    """As the file has it; the head first tries what cannot work, and then has less to do."""
    found = Service.of(name, given=GIVEN)
    if name != "head":
        return found
    *shell, script = found.command
    begin, demo = script.rstrip().split("exec ")
    demo += "".join(f" --set '{each}'" for each in SMALLER)
    unshared = demo + " --set 'student.checkpoint_url = \"/runs/unshared\"'"
    return Service(
        [*shell, f"{begin}\n{unshared} && exit 99\nexec {demo}"], {**found.environment, **SECRETS}
    )


def link_bytes(hub: Machine, counter: str) -> dict[str, int]:
    """What the bridge has received from each machine ("rx"), or sent to it ("tx")."""
    with inside(hub.namespace):
        shown = subprocess.run(
            ["ip", "-json", "-statistics", "link"], check=True, capture_output=True, text=True
        )
    return {link["ifname"]: link["stats64"][counter]["bytes"] for link in json.loads(shown.stdout)}


def test_the_demo_ends_well_on_machines_that_share_nothing_but_a_bucket(demo: Demo) -> None:
    assert demo.exit_code == 0, demo.words
    rows = demo.rows
    assert isinstance(rows[-1], EndEvent)
    assert rows[-1].outcome == "done"
    assert [row.step for row in rows if isinstance(row, TrainEvent)] == list(range(1, 41))
    assert {row.model for row in rows if isinstance(row, EvalEvent)} == {"teacher", "student"}
    assert (demo.runs["head"] / "demo" / "report.html").stat().st_size > 10_000
    for name in ("teacher-a", "teacher-b", "student"):
        assert [path.name for path in (demo.runs[name] / "demo").iterdir()] == ["models"]


def test_every_target_crosses_the_teachers_links_once_and_the_students(demo: Demo) -> None:
    made = [row for row in demo.rows if isinstance(row, ChunkEvent)]
    num_bytes = sum(row.num_bytes for row in made)
    assert {row.replica for row in made} == {0, 1}
    # to the bucket, and not to the driver as well
    assert num_bytes < demo.sent["teacher-a"] + demo.sent["teacher-b"] < 2 * num_bytes
    assert demo.received["student"] > num_bytes


def test_a_run_waits_for_a_machine_that_joins_late(demo: Demo) -> None:
    first, *_, last = (row for row in demo.rows if isinstance(row, WaitEvent))
    assert "student: 1 needed (2 teachers and 1 student ranks), 0 in the cluster" in first.missing
    assert last.missing == ""


def test_checkpoints_in_a_directory_that_machines_do_not_share_are_refused_before_anything_starts(
    demo: Demo,
) -> None:
    teacher_a, teacher_b, student = (f"10.77.0.{number}" for number in (3, 4, 5))
    assert (
        "error: checkpoints go to /runs/unshared/student, which is not the same directory on "
        f"{teacher_a}, {teacher_b}, {student};" in demo.words
    )
    assert (
        "give student.checkpoint_url a bucket, or a directory that all machines mount" in demo.words
    )
    first, second = (row for row in demo.rows if isinstance(row, StartEvent))
    assert first.attempt + 1 == second.attempt
    assert not any(isinstance(row, TeacherEvent) and row.time < second.time for row in demo.rows)


def test_no_secret_of_any_machine_is_written_anywhere(demo: Demo, s3_endpoint: str) -> None:
    """Not to a journal, a config, W&B's files, a report, a chunk or a checkpoint, not to Ray's
    logs, and not to what the commands say."""
    bucket = boto3.resource("s3", endpoint_url=s3_endpoint).Bucket("demo")
    written = {
        path: path.read_bytes()
        for place in (*demo.runs.values(), *demo.tmp.values())
        for path in place.rglob("*")
        if path.is_file()
    }
    written |= {Path(each.key): each.get()["Body"].read() for each in bucket.objects.all()}
    written[Path("words")] = demo.words.encode()
    assert any(path.suffix == ".wandb" for path in written)
    assert any(path.name == "raylet.out" for path in written)
    assert any(path.suffix == ".safetensors" and "chunks" in path.parts for path in written)
    for secret in (*GIVEN.values(), *SECRETS.values()):
        assert [path for path, data in written.items() if secret.encode() in data] == []
