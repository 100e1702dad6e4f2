"""What a store answers decides, by status and error code, whether it is waited for; and one that
keeps no promise is found at the start."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.chunks import small_recipe
from helpers.rangeserver import RangeServer, Refusal
from helpers.s3 import s3_environment
from helpers.world import TinyWorld
from stillhouse.errors import StoreError
from stillhouse.pipeline.verbs import run, train
from stillhouse.store import ChunkStore, StoreForbidden, StoreUnavailable
from stillhouse.store.object_store import Blobs

BUSY, EXPIRED, INVALID = (
    "cannot be reached, or is too busy",
    "the credentials have expired",
    "the credentials are not valid",
)
REFUSED, UNKNOWN = "refuses the request as it stands", "does not know this request"
NO_BUCKET, CLOCK, RIGHTS = "there is no such bucket", "clock is wrong", "permission denied"

ANSWERS = [
    (400, "ExpiredToken", StoreError, EXPIRED),
    (400, "InvalidToken", StoreError, INVALID),
    (403, "InvalidAccessKeyId", StoreError, INVALID),
    (403, "SignatureDoesNotMatch", StoreError, INVALID),
    (403, "RequestTimeTooSkewed", StoreError, CLOCK),
    (403, "AccessDenied", StoreForbidden, RIGHTS),
    (401, "", StoreError, INVALID),
    (404, "NoSuchBucket", StoreError, NO_BUCKET),
    (404, "ContainerNotFound", StoreError, NO_BUCKET),
    (400, "InvalidArgument", StoreError, REFUSED),
    (402, "PaymentRequired", StoreError, REFUSED),
    (418, "Teapot", StoreError, REFUSED),
    (405, "MethodNotAllowed", StoreError, UNKNOWN),
    (411, "MissingContentLength", StoreError, REFUSED),
    (413, "EntityTooLarge", StoreError, "no object of this size"),
    (501, "NotImplemented", StoreError, UNKNOWN),
    (301, "", StoreError, "set AWS_REGION"),  # obstore quotes no body of it
    (400, "RequestTimeout", StoreUnavailable, BUSY),
    (408, "", StoreUnavailable, BUSY),
    (425, "", StoreUnavailable, BUSY),
    (429, "TooManyRequests", StoreUnavailable, BUSY),
    (500, "InternalError", StoreUnavailable, BUSY),
    (502, "", StoreUnavailable, BUSY),
    (503, "SlowDown", StoreUnavailable, BUSY),
    (504, "", StoreUnavailable, BUSY),
    (507, "XMinioStorageFull", StoreUnavailable, "quota spent"),
    (
        404,
        "NoSuchUpload",
        StoreUnavailable,
        BUSY,
    ),  # its parts are gone: the whole stream is put again
    (400, "BadDigest", StoreUnavailable, "is not whole"),
]

CALLS: dict[str, Callable[[Blobs], object]] = {
    "read": lambda blobs: blobs.read("a"),
    "read a large object": lambda blobs: list(blobs.pieces("a")),
    "create": lambda blobs: blobs.create("a", b"x"),
    "stream": lambda blobs: blobs.stream("a", lambda write: write(b"x")),
    "list": lambda blobs: list(blobs.under("a")),
    "list names": lambda blobs: blobs.names(),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    with RangeServer().running() as server:
        for name, value in s3_environment(server.endpoint).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.parametrize(("status", "code", "kind", "advice"), ANSWERS)
def test_an_answer_means_the_same_to_every_call(
    server: RangeServer, status: int, code: str, kind: type[StoreError], advice: str
) -> None:
    """Through obstore, whose texts quote the server's body and dump its own settings: here both are
    full of misleading words."""
    server.refusal = Refusal(status, code)
    # what is not waited for costs no time
    blobs = Blobs("s3://bucket/root", patience_s=0.25 if kind is StoreUnavailable else 1.0)
    with ThreadPoolExecutor(len(CALLS)) as pool:
        answers = {name: pool.submit(call, blobs) for name, call in CALLS.items()}
    verdicts = {name: answer.exception() for name, answer in answers.items()}
    assert {name: type(verdict) for name, verdict in verdicts.items()} == dict.fromkeys(CALLS, kind)
    assert [
        name
        for name, verdict in verdicts.items()
        if advice not in str(verdict) or code not in str(verdict)
    ] == []
    # it stands in the body
    assert not any("timed out" in str(verdict) for verdict in verdicts.values())


def test_a_bare_refusal_of_a_look_is_permanent(server: RangeServer) -> None:
    """An answer to HEAD has no body, so no code: expired credentials are a plain 400 there."""
    server.refusal = Refusal(400, "ExpiredToken")
    with pytest.raises(StoreError, match="no credentials have expired") as caught:
        Blobs("s3://bucket/root", patience_s=1.0).stat("a")
    assert type(caught.value) is StoreError


def test_a_store_that_replaces_what_it_should_keep_is_refused_at_start_and_left_clean(
    server: RangeServer,
) -> None:
    server.honours_conditions = False
    with pytest.raises(
        StoreError, match=r"If-None-Match: \*.*Use a store that honours conditional writes"
    ):
        ChunkStore.create("s3://bucket/root", small_recipe())
    assert server.objects == {}


def test_a_store_that_keeps_what_it_has_is_tried_without_a_trace(server: RangeServer) -> None:
    store = ChunkStore.create("s3://bucket/root", small_recipe())
    ChunkStore.create("s3://bucket/root", small_recipe())
    assert list(server.objects) == [f"/bucket/root/{store.folder}/recipe.json"]


@pytest.mark.parametrize("verb", [run, train])
def test_a_run_whose_checkpoints_would_be_replaced_is_refused_before_it_starts(
    server: RangeServer, tiny_world: TinyWorld, tmp_path: Path, verb: Callable[..., None]
) -> None:
    server.honours_conditions = False
    plan = tiny_world.plan(tmp_path / "run", student={"checkpoint_url": "s3://bucket/checkpoints"})
    with pytest.raises(
        StoreError, match=r"s3://bucket/checkpoints replaces an object.*If-None-Match: \*"
    ):
        verb(plan)
    assert server.objects == {}
    assert not (tmp_path / "run" / "journal.jsonl").exists()
