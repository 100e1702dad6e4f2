"""The store over HTTP: against a server that speaks S3, and against one that refuses, stalls and
contradicts itself on demand."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from helpers.chunks import make_chunk, small_recipe
from stillhouse.errors import ChunkError, StoreError
from stillhouse.store import (
    ChunkMissing,
    ChunkStore,
    StoreForbidden,
    StoreUnavailable,
    list_recipes,
    pack_chunk,
    sweep,
    verify_store,
)
from stillhouse.store.object_store import Blobs

RECIPE = small_recipe()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def speak_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def choose(endpoint: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    return choose


@pytest.fixture
def bucket(moto: str, speak_to: Callable[[str], None], request: pytest.FixtureRequest) -> str:
    speak_to(moto)
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:60].strip("-")
    s3_client(moto).create_bucket(Bucket=name)
    return name


def s3_client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="an-id",
        aws_secret_access_key="a-secret",
        region_name="us-east-1",
    )


@pytest.fixture
def store(bucket: str) -> ChunkStore:
    return ChunkStore.create(f"s3://{bucket}/deep/er", RECIPE)


def test_a_chunk_is_published_found_fetched_and_listed(store: ChunkStore) -> None:
    chunk = make_chunk(RECIPE, 1)
    with pytest.raises(ChunkMissing, match="chunk 1 is not in s3://"):
        store.fetch_rows(1, [0])
    ref = store.publish(chunk)
    assert (store.exists(0), store.exists(1), store.published()) == (False, True, {1})
    np.testing.assert_array_equal(store.fetch(1).targets_NB, chunk.targets_NB)
    np.testing.assert_array_equal(
        store.fetch_rows(1, [3, 0]).sequences.token_ids_SL, chunk.sequences.token_ids_SL[[3, 0]]
    )
    assert list_recipes(store.url) == [(RECIPE.fingerprint[:16], RECIPE, 1, ref.num_bytes)]
    assert [finding.problem for finding in verify_store(store.url)] == [None, None]


def test_creating_again_finds_what_is_there(store: ChunkStore) -> None:
    store.publish(make_chunk(RECIPE, 0))
    assert ChunkStore.create(store.url + "/", RECIPE).published() == {0}


def test_the_second_publisher_loses_and_of_eight_at_once_one_wins(store: ChunkStore) -> None:
    assert not store.publish(make_chunk(RECIPE, 0, seed=1)).duplicate
    assert store.publish(make_chunk(RECIPE, 0, seed=2)).duplicate
    chunks = [make_chunk(RECIPE, 1, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(store.publish, chunks))
    winners = [chunk for chunk, ref in zip(chunks, refs, strict=True) if not ref.duplicate]
    assert len(winners) == 1
    np.testing.assert_array_equal(
        store.fetch(1).sequences.token_ids_SL, winners[0].sequences.token_ids_SL
    )


def test_a_damaged_chunk_is_named_quarantined_and_published_anew(
    store: ChunkStore, bucket: str, moto: str
) -> None:
    data = bytearray(pack_chunk(make_chunk(RECIPE, 0), RECIPE))
    data[-1] ^= 1
    s3_client(moto).put_object(Bucket=bucket, Key=f"deep/er/{store.key(0)}", Body=bytes(data))
    with pytest.raises(ChunkError, match="row 3 hashes to"):
        store.fetch_rows(0, [3])
    assert [finding.number for finding in verify_store(store.url) if finding.problem] == [0]
    assert store.quarantine(0)
    assert store.published() == set()
    assert len(sweep(store.url, older_than_s=0.0, now=0.0).quarantined) == 1
    assert not store.publish(make_chunk(RECIPE, 0)).duplicate
    assert store.fetch_rows(0, [3]).number == 0


@pytest.mark.parametrize("length", [0, 7, 100, 1500, -1])
def test_a_chunk_that_was_cut_short_is_refused_even_with_its_index_known(
    store: ChunkStore, bucket: str, moto: str, length: int
) -> None:
    data = pack_chunk(make_chunk(RECIPE, 0), RECIPE)
    s3, key = s3_client(moto), f"deep/er/{store.key(0)}"
    s3.put_object(Bucket=bucket, Key=key, Body=data)
    store.fetch_rows(0, [1])
    s3.put_object(Bucket=bucket, Key=key, Body=data[:length])
    for reader in (store, ChunkStore(store.url, RECIPE)):
        with pytest.raises(ChunkError, match="chunk 0"):
            reader.fetch_rows(0, [0, 3])
        with pytest.raises(ChunkError, match="chunk 0"):
            reader.fetch(0)


def test_a_missing_permission_and_a_missing_bucket_say_what_to_do(
    store: ChunkStore, bucket: str, moto: str
) -> None:
    denial = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:PutObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    s3_client(moto).put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denial]})
    )
    with pytest.raises(
        StoreError, match="permission denied: check the credentials and their rights"
    ) as caught:
        store.publish(make_chunk(RECIPE, 0))
    assert type(caught.value) is StoreForbidden
    assert "Debug source" not in str(caught.value)
    with pytest.raises(StoreError, match="there is no such bucket: create it, or correct the name"):
        ChunkStore.create("s3://nobody-made-this-bucket/a", RECIPE)
    with pytest.raises(StoreError, match="there is no such bucket"):
        list_recipes("s3://nobody-made-this-bucket/a")


class Wayward(ThreadingHTTPServer):
    """It obeys conditional puts and ranges, and does first what its `script` says: answer a status,
    nothing, or half of an object."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WaywardHandler)
        self.objects: dict[str, bytes] = {}
        self.script: list[int | str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.released = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what these tests are about."""


class WaywardHandler(BaseHTTPRequestHandler):
    server: Wayward

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.misbehave():
            return
        if self.headers["If-None-Match"] == "*" and self.path in self.server.objects:
            self.answer(412)
        else:
            self.server.objects[self.path] = body
            self.answer(200, ETag='"1"')

    def do_GET(self) -> None:
        if self.misbehave():
            return
        data = self.server.objects.get(self.path)
        wanted = self.headers["Range"]
        if data is None:
            self.answer(404)
        elif wanted is None:
            self.answer(200, data, ETag='"1"')
        else:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            content_range: dict[str, Any] = {
                "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            }
            self.answer(
                206,
                part,
                ETag='"1"',
                **content_range,
            )

    do_HEAD = do_GET

    def misbehave(self) -> bool:
        self.server.requests.append((self.command, self.headers["Range"]))
        if not self.server.script:
            return False
        match self.server.script.pop(0):
            case int(status):
                self.answer(status)
            case "silence":
                self.server.released.wait(20)
            case "half":
                data = self.server.objects[self.path]
                self.answer(200, data[: len(data) // 2], length=len(data), ETag='"1"')
                self.close_connection = True
        return True

    def answer(
        self, status: int, body: bytes = b"", *, length: int | None = None, **headers: Any
    ) -> None:
        self.send_response(status)
        length = len(body) if length is None else length
        for name, value in {
            **headers,
            "Content-Length": str(length),
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quietly."""


@pytest.fixture
def wayward(speak_to: Callable[[str], None]) -> Iterator[Wayward]:
    server = Wayward()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    speak_to(f"http://127.0.0.1:{server.server_port}")
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_conflict_that_nobody_won_is_tried_again(wayward: Wayward) -> None:
    store = ChunkStore("s3://bucket", RECIPE)
    wayward.script = [409, 404, 409]
    assert not store.publish(make_chunk(RECIPE, 0)).duplicate
    assert store.fetch(0).number == 0


def test_a_store_that_always_contradicts_itself_is_given_up(wayward: Wayward) -> None:
    wayward.script = [409, 404] * 10
    with pytest.raises(StoreUnavailable, match="says that it exists, and that it does not"):
        ChunkStore("s3://bucket", RECIPE).publish(make_chunk(RECIPE, 0))


def test_a_busy_store_is_asked_again(wayward: Wayward) -> None:
    wayward.script = [503, 503, 500]
    assert not ChunkStore("s3://bucket", RECIPE).publish(make_chunk(RECIPE, 0)).duplicate


def test_an_answer_that_breaks_off_is_read_to_its_end(wayward: Wayward) -> None:
    store = ChunkStore("s3://bucket", RECIPE)
    store.publish(make_chunk(RECIPE, 0))
    wayward.script = ["half"]
    np.testing.assert_array_equal(store.fetch(0).targets_NB, make_chunk(RECIPE, 0).targets_NB)


def test_a_silent_store_is_given_up_in_time(wayward: Wayward) -> None:
    wayward.script = ["silence"] * 10
    began = monotonic()
    with pytest.raises(StoreUnavailable, match="cannot be reached, or is too busy"):
        Blobs("s3://bucket", patience_s=0.5).create("a", b"x")
    assert monotonic() - began < 5


def test_an_unreachable_store_is_given_up_in_time(speak_to: Callable[[str], None]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        speak_to(f"http://127.0.0.1:{closed.getsockname()[1]}")
        began = monotonic()
        with pytest.raises(StoreUnavailable, match="cannot be reached, or is too busy"):
            Blobs("s3://bucket", patience_s=0.5).read("a")
        assert monotonic() - began < 5


def test_rows_are_fetched_by_few_requests_for_their_bytes_alone(wayward: Wayward) -> None:
    recipe = small_recipe(sequence_length=600, num_sequences=64, chunk_sequences=64, k=16)
    store = ChunkStore("s3://bucket", recipe)
    chunk = make_chunk(recipe)
    store.publish(chunk)
    wayward.requests.clear()
    store.fetch_rows(0, [1])
    store.fetch_rows(0, [60, 61])
    assert [method for method, _ in wayward.requests] == ["GET"] * len(wayward.requests)
    assert len(wayward.requests) <= 5
    asked = [
        tuple(int(number) for number in wanted.removeprefix("bytes=").split("-"))
        for _, wanted in wayward.requests
        if wanted is not None
    ]
    assert len(asked) == len(wayward.requests)
    assert asked[0][0] == 0
    assert all(first > 0 for first, _ in asked[1:])
    (size,) = (len(data) for data in wayward.objects.values())
    assert size > 1_000_000
    assert sum(last - first + 1 for first, last in asked) < size // 2


def test_a_stream_larger_than_a_part_is_put_in_parts_and_deleted_with_its_folder(
    bucket: str,
) -> None:
    blobs, data = Blobs(f"s3://{bucket}/root"), bytes(range(256)) * (40 << 12)
    blobs.stream("folder/large", lambda write: write(data))
    for key in ("folder/deep/er", "other/small", "top"):
        blobs.stream(key, lambda write: write(b"x"))
    assert b"".join(blobs.pieces("folder/large")) == data
    assert (blobs.names(), blobs.folders()) == (["top"], ["folder", "other"])
    assert (blobs.folders("folder"), blobs.folders("fold")) == (["folder/deep"], [])
    for _ in range(2):
        blobs.delete_under("folder")
        blobs.delete("top")
    assert (blobs.names(), blobs.folders()) == ([], ["other"])
    with pytest.raises(FileNotFoundError):
        list(blobs.pieces("folder/large"))
