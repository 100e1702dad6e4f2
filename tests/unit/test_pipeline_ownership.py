"""One command uses a run directory and its checkpoints: a second is refused by name, and a killed
one stands in nobody's way."""

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic, sleep
from uuid import uuid4

import boto3
import pytest

from helpers.holders import holding, kill
from helpers.sealing import sealed_json
from stillhouse.checkpoint.fence import newest_owner, owner_key, owner_numbers, require_owner
from stillhouse.errors import CheckpointError, ConfigError
from stillhouse.pipeline.holder import Holder, Record
from stillhouse.pipeline.ownership import Lease, locked, owned
from stillhouse.store.object_store import Blobs

SHORT = Lease(lease_s=0.3, renew_every_s=0.05, look_every_s=0.02)
PATIENCE_S = 60.0


def here(run_dir: Path = Path("/runs/second")) -> Holder:
    return Holder.here("stillhouse run second.toml", run_dir, now=0.0)


def elsewhere() -> Holder:
    """A process of another machine: whether it lives cannot be seen from here."""
    return replace(here(Path("/runs/first")), host="faraway", pid=4711, machine="another boot")


def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < deadline
        sleep(0.01)


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where checkpoints go."""
    if request.param == "directory":
        return str(tmp_path / "commits")
    bucket = f"owner-{uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=request.getfixturevalue("s3_endpoint")).create_bucket(
        Bucket=bucket
    )
    return f"s3://{bucket}/commits"


def test_a_second_command_is_refused_by_name_and_after_a_kill_the_next_begins_at_once(
    tmp_path: Path,
) -> None:
    """In the same run directory, and in another whose checkpoints go to the same place."""
    run_dir, url, said = tmp_path / "first", str(tmp_path / "commits"), list[str]()
    with holding(run_dir, url) as process:
        with pytest.raises(
            ConfigError,
            match=rf"in use by process {process.pid} on {socket.gethostname()} \(`stillhouse run "
            r"first\.toml`",
        ):
            locked(here(run_dir)).__enter__()
        with pytest.raises(
            ConfigError,
            match=rf"in use by process {process.pid} on .* in the run directory {run_dir}\. Two "
            r"commands",
        ):
            owned(url, here(), say=said.append)
        kill(process)
        with locked(here(run_dir)), owned(url, here(), say=said.append) as owner:
            assert owner.number == 2
    assert said == []  # nothing was waited for


def test_a_lock_is_free_again_when_its_block_ends_and_names_its_new_holder(tmp_path: Path) -> None:
    with locked(here(tmp_path / "run")):
        pass
    with (
        locked(here(tmp_path / "run")),
        pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "),
    ):
        locked(here(tmp_path / "run")).__enter__()


def test_a_run_directory_that_cannot_be_made_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"cannot make .*lock: Not a directory; name another --run-dir"
    ):
        locked(here(tmp_path / "file" / "run")).__enter__()


def test_an_owner_that_said_goodbye_is_followed_at_once(place: str) -> None:
    said = list[str]()
    with owned(place, elsewhere(), say=said.append, lease=SHORT) as first:
        assert first.number == 1
    with owned(place, here(), say=said.append) as second:
        assert second.number == 2
        assert owner_numbers(Blobs(place)) == [2]
    assert said == []


def test_an_owner_elsewhere_that_gives_signs_of_life_keeps_its_checkpoints(place: str) -> None:
    said = list[str]()
    with owned(place, elsewhere(), say=said.append, lease=SHORT) as first:
        with pytest.raises(
            ConfigError,
            match=r"in use by process 4711 on faraway .* in the run directory /runs/first",
        ):
            owned(place, here(), say=said.append, lease=replace(SHORT, lease_s=PATIENCE_S))
        assert not first.is_lost()
    assert len(said) == 1
    assert "process 4711 on faraway" in said[0]
    assert "waits up to 60 s for a sign of it" in said[0]


def test_an_owner_elsewhere_that_is_silent_is_followed_when_its_lease_is_over_and_finds_out(
    place: str,
) -> None:
    silent = replace(SHORT, renew_every_s=PATIENCE_S)
    owned(place, elsewhere(), say=print, lease=silent)  # killed before its first heartbeat
    began = monotonic()
    sleeper = owned(place, replace(elsewhere(), token="sleeper"), say=print, lease=SHORT)
    assert monotonic() - began >= SHORT.lease_s
    with owned(place, here(), say=print, lease=SHORT) as owner, sleeper:  # it wakes up too late
        until(sleeper.is_lost)
        with pytest.raises(
            CheckpointError,
            match=r"belong to another command now, which owner-00000003\.json names",
        ):
            sleeper.require()
        assert not owner.is_lost()
    assert newest_owner(Blobs(place)) == owner.number == 3
    record = Record.parsed(bytes(Blobs(place).read(owner_key(3))))
    assert record.holder is not None
    assert record.holder.run_dir == "/runs/second"


def test_of_claimants_that_race_for_a_place_one_wins(place: str) -> None:
    """First for that of a silent owner, then for each that is given back: whoever is inside is
    alone."""
    owned(place, elsewhere(), say=print)
    inside, won, lock = [0], list[int](), threading.Lock()
    crowded = list[int]()

    def claim() -> None:
        for _ in range(3):
            while True:
                with suppress(ConfigError), owned(place, here(), say=print, lease=SHORT) as owner:
                    with lock:
                        inside[0] += 1
                        crowded.extend([inside[0]] if inside[0] > 1 else [])
                        won.append(owner.number)
                    sleep(0.001)
                    with lock:
                        inside[0] -= 1
                    break
                sleep(0.005)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert crowded == []
    assert won == sorted(won)
    assert len(set(won)) == 12


def test_a_group_may_commit_until_a_newer_owner_is_there(place: str) -> None:
    blobs = Blobs(place)
    require_owner(blobs, 1)
    blobs.create(owner_key(1), b"")
    require_owner(blobs, 1)
    blobs.create(owner_key(2), b"")
    with pytest.raises(CheckpointError, match="It commits nothing more"):
        require_owner(blobs, 1)
    require_owner(blobs, 2)


def test_a_record_that_is_damaged_is_believed_in_nothing_and_waited_for(tmp_path: Path) -> None:
    owned(str(tmp_path), here(), say=print)
    path = tmp_path / owner_key(1)
    path.write_bytes(path.read_bytes().replace(b'"pid": ', b'"pid": 9'))
    said = list[str]()
    with owned(str(tmp_path), here(), say=said.append, lease=SHORT) as owner:
        assert owner.number == 2
    assert "belong to another command, whose record cannot be read" in said[0]


@pytest.mark.parametrize(
    "change",
    [
        {"since": "noon"},
        {"since": 1e300},
        {"since": float("nan")},
        {"pid": "../self"},
        {"pid": 1.0},
        {"host": 5},
        {"machine": None},
        {"born": []},
    ],
)
def test_a_record_whose_values_are_no_holders_is_believed_in_nothing(
    change: dict[str, object],
) -> None:
    values = {**asdict(here()), "released": True, **change}
    record = Record.parsed(json.dumps(sealed_json(values)).encode())
    assert (record.holder, record.more) == (None, {})
    assert record.words() == "another command, whose record cannot be read"


def test_a_pid_that_was_given_again_is_another_process() -> None:
    own = here()
    assert own.state() == "alive"
    assert replace(own, born="1").state() == "gone"
    assert replace(own, pid=2**22 + 1).state() == "gone"  # above what Linux gives
    assert replace(own, machine="another boot").state() == "unknown"
    assert replace(own, machine="").state() == "unknown"


def test_a_planted_record_with_the_last_number_is_refused_in_words(place: str) -> None:
    Blobs(place).create(owner_key(99_999_999), b"planted")
    with pytest.raises(
        ConfigError,
        match=r"owner-99999999\.json under .* has the highest number .* Delete it where no "
        r"command uses these",
    ):
        owned(place, here(), say=print, lease=SHORT)
    assert owner_numbers(Blobs(place)) == [99_999_999]
