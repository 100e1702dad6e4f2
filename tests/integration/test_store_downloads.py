"""Large objects are read whole from an object store, however long that takes, wherever an answer
breaks off, and whatever a proxy cuts."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import xxhash

from helpers.checkpoints import FILES, make
from helpers.chunks import make_chunk, small_recipe
from helpers.faults import FaultyS3, Matches
from helpers.rangeserver import RangeServer, sparse_file
from helpers.s3 import s3_environment
from stillhouse.checkpoint.choice import choose, newest
from stillhouse.checkpoint.integrity import fetch, verify
from stillhouse.checkpoint.manifest import Commit, Origin
from stillhouse.errors import ChunkError, StoreError
from stillhouse.store import ChunkStore, StoreUnavailable, pack_chunk
from stillhouse.store.object_store import Blobs

RECIPE = small_recipe()
LARGE_BYTES, PATIENCE_S = 300_000_000, 0.3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    with RangeServer().running() as server:
        for name, value in s3_environment(server.endpoint).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    with FaultyS3(s3_endpoint) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Path) -> str:
    name = f"downloads-{xxhash.xxh3_64_hexdigest(str(tmp_path).encode())}"
    boto3.client("s3", endpoint_url=s3_endpoint, **KEYS).create_bucket(Bucket=name)
    return name


KEYS = {
    "aws_access_key_id": "an-id",
    "aws_secret_access_key": "a-secret",
    "region_name": "us-east-1",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_file(tmp_path_factory.mktemp("large") / "large", LARGE_BYTES)


def committed(path: Path) -> Commit:
    digest = xxhash.xxh3_64(path.read_bytes()).hexdigest()
    return Commit(1, "a", 1, Origin(1, "ab" * 32, {}), {"large.pt": (LARGE_BYTES, digest)})


def test_a_checkpoint_file_that_takes_many_times_a_requests_patience_is_read_whole(
    server: RangeServer, large: Path, tmp_path: Path
) -> None:
    """A request's limits are 0.3 s and 0.6 s here, instead of 30 s and 60 s; each range takes
    longer, and most break off on the way."""
    commit = committed(large)
    server.objects[f"/bucket/root/{commit.folder}/large.pt"] = large
    server.bytes_per_s, server.breaks_off_after = 14e6, 13_000_000
    assert (
        fetch(Blobs("s3://bucket/root", patience_s=PATIENCE_S), commit, ["large.pt"], into=tmp_path)
        == ""
    )
    assert (tmp_path / commit.folder / "large.pt").stat().st_size == LARGE_BYTES
    # what came before an answer broke off is not asked for again
    assert server.bytes_sent < 1.05 * LARGE_BYTES
    assert max(request.end - request.start for request in server.asked) <= 16 << 20


def test_a_file_that_stops_coming_is_given_up_and_not_condemned(
    server: RangeServer, large: Path
) -> None:
    commit = committed(large)
    server.objects[f"/bucket/root/{commit.folder}/large.pt"] = large
    server.silent_from = 1_000_000
    with pytest.raises(StoreUnavailable, match="cannot be reached, or is too busy"):
        verify(Blobs("s3://bucket/root", patience_s=PATIENCE_S), commit, commit.files)


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1000, 1001, 5000, 8500])
def test_pieces_are_the_object_whatever_its_size_among_ranges(
    server: RangeServer, num_bytes: int
) -> None:
    data = np.random.default_rng(num_bytes).bytes(num_bytes)
    server.objects["/bucket/a"] = data
    assert b"".join(Blobs("s3://bucket").pieces("a", range_bytes=1000)) == data


def test_an_object_that_is_not_there_is_told_from_one_that_is_empty(server: RangeServer) -> None:
    server.objects["/bucket/empty"] = b""
    blobs = Blobs("s3://bucket")
    assert list(blobs.pieces("empty")) == []
    with pytest.raises(FileNotFoundError):
        list(blobs.pieces("absent"))


def reads(name: str) -> Matches:
    return lambda request: request.method == "GET" and name in request.path


def test_a_truncated_answer_condemns_no_chunk(proxy: FaultyS3, bucket: str) -> None:
    store = ChunkStore.create(f"s3://{bucket}/store", RECIPE)
    store.publish(make_chunk(RECIPE, 0))
    proxy.truncate(reads("0000000000.safetensors"), times=1)
    assert not store.quarantine(0)
    assert store.published() == {0}
    proxy.truncate(reads("0000000000.safetensors"), times=1)
    np.testing.assert_array_equal(store.fetch(0).targets_NB, make_chunk(RECIPE, 0).targets_NB)
    proxy.truncate(reads("0000000000.safetensors"), times=1)
    np.testing.assert_array_equal(
        store.fetch_rows(0, [2]).sequences.token_ids_SL,
        make_chunk(RECIPE, 0).sequences.token_ids_SL[[2]],
    )


def test_a_truncated_answer_moves_no_recipe(proxy: FaultyS3, bucket: str) -> None:
    store = ChunkStore.create(f"s3://{bucket}/store", RECIPE)
    proxy.truncate(reads("recipe.json"), times=1)
    assert not store.restore_recipe()
    proxy.truncate(reads("recipe.json"), times=1)
    assert ChunkStore.create(store.url, RECIPE).published() == set()


@pytest.mark.usefixtures("proxy")
def test_a_chunk_that_is_really_damaged_is_condemned(bucket: str, s3_endpoint: str) -> None:
    store = ChunkStore.create(f"s3://{bucket}/store", RECIPE)
    data = pack_chunk(make_chunk(RECIPE, 0), RECIPE)
    client = boto3.client("s3", endpoint_url=s3_endpoint, **KEYS)
    client.put_object(
        Bucket=bucket, Key=f"store/{store.key(0)}", Body=data[:-1] + bytes([data[-1] ^ 1])
    )
    with pytest.raises(ChunkError, match="row 3 hashes to"):
        store.fetch_rows(0, [3])
    assert store.quarantine(0)
    assert store.published() == set()


@pytest.mark.parametrize("name", ["step-00000020.json", *(name for name in FILES if FILES[name])])
def test_a_truncated_answer_condemns_no_checkpoint(proxy: FaultyS3, bucket: str, name: str) -> None:
    url = f"s3://{bucket}/checkpoints"
    _, last = make(url, 10, 20)
    proxy.truncate(reads(name), times=1)
    assert newest(url) == last


def test_a_store_that_refuses_to_be_read_condemns_no_checkpoint(
    proxy: FaultyS3, bucket: str
) -> None:
    url = f"s3://{bucket}/checkpoints"
    make(url, 10, 20)
    proxy.refuse(
        lambda request: request.method == "GET" and "step-00000020.a" in request.path, status=403
    )
    with pytest.raises(StoreError, match="permission denied"):
        choose(Blobs(url), lambda commit: verify(Blobs(url), commit, commit.files))


def test_a_truncated_answer_about_a_part_keeps_no_commit_back(proxy: FaultyS3, bucket: str) -> None:
    url = f"s3://{bucket}/checkpoints"
    proxy.truncate(reads("part-00000-of-00002.json"), times=1)
    (made,) = make(url, 10)
    assert newest(url) == made
