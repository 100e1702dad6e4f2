"""What is bought of a server is paid once, and never more than was allowed, whatever dies."""

import json
import multiprocessing
import os
import random
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from helpers.buying import (
    RECIPE,
    Moment,
    MortalBlobs,
    buy_until_killed,
    desk_of,
    documents,
    price_of,
)
from helpers.chunks import make_chunk
from helpers.placereader import canonical
from helpers.promptserver import Fault, PromptServer, busy, flat
from stillhouse.engines.openai_scores import Document, Scores
from stillhouse.errors import ServerError, StoreError
from stillhouse.servers.answers import answers_of
from stillhouse.servers.ledger import Ledger
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs

PURCHASES = f"{RECIPE.fingerprint[:16]}/purchases"
USD = 1_000_000_000  # nanodollars
ON_ARRIVAL = None  # the moment at which the server has a request, and has not answered


@pytest.fixture
def server() -> Iterator[PromptServer]:
    with PromptServer(flat).running() as running:
        yield running


def test_a_limit_is_granted_once_whoever_asks(tmp_path: Path) -> None:
    """Threads with a ledger each, as processes have, which race for every grant."""
    ledgers = [
        Ledger(Blobs(str(tmp_path)), "f", limit_usd=100.0, setting="limit_usd") for _ in range(4)
    ]
    taken = [0] * len(ledgers)

    refused = []

    def take(own: int) -> None:
        try:
            while True:
                ledgers[own].reserve(7 * USD)
                taken[own] += 7
        except ServerError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(own,)) for own in range(len(ledgers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 98
    assert len(refused) == len(ledgers)
    assert "the next request needs 7 USD more" in refused[0]
    assert "is 100, 98 are spent or reserved" in refused[0]
    assert Ledger(Blobs(str(tmp_path)), "f", limit_usd=1.0, setting="limit_usd").granted_usd() == 98


def test_what_a_request_did_not_cost_is_spent_on_the_next(tmp_path: Path) -> None:
    ledger = Ledger(Blobs(str(tmp_path)), "f", limit_usd=10.0, setting="limit_usd")
    for _ in range(30):
        ledger.reserve(8 * USD)
        ledger.give_back(8 * USD)
    ledger.reserve(8 * USD)
    with pytest.raises(ServerError):
        ledger.reserve(3 * USD)
    ledger.reserve(2 * USD)  # the refusal took nothing


def test_a_damaged_grant_is_not_guessed_at(tmp_path: Path) -> None:
    Ledger(Blobs(str(tmp_path)), "f", limit_usd=10.0, setting="limit_usd").reserve(5)
    (grant,) = tmp_path.glob("f/purchases/grants/*.json")
    assert json.loads(grant.read_bytes())["nanodollars"] == 5
    grant.write_bytes(grant.read_bytes().replace(b":5,", b":4,"))
    with pytest.raises(StoreError, match=r"0000000000.json is damaged.*write it anew"):
        Ledger(Blobs(str(tmp_path)), "f", limit_usd=10.0, setting="limit_usd").reserve(5)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Which import what buyers need once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.buying"])
    return context


@pytest.mark.parametrize(
    "moment",
    [
        Moment("grants", 3, is_done=False),
        Moment("grants", 3, is_done=True),
        ON_ARRIVAL,
        Moment("answers", 3, is_done=False),
        Moment("answers", 3, is_done=True),
    ],
    ids=str,
)
def test_a_killed_buyer_costs_no_more_than_it_had_reserved_and_nothing_kept_is_bought_again(
    server: PromptServer,
    tmp_path: Path,
    processes: multiprocessing.context.ForkServerContext,
    moment: Moment | None,
) -> None:
    wanted = documents(0)
    total = sum(map(price_of, wanted))
    limit = total + max(map(price_of, wanted))  # of the one that may be lost

    # one that is killed
    arguments = (str(tmp_path), server.base_url, float(limit), moment)
    buyer = processes.Process(target=buy_until_killed, args=arguments)
    if moment is ON_ARRIVAL:

        def kill(_prompt: list[int]) -> None:
            if len(server.prompts) == 3:
                assert buyer.pid is not None
                os.kill(buyer.pid, signal.SIGKILL)

        server.arrived = kill
    buyer.start()
    buyer.join(60)
    assert buyer.exitcode == -signal.SIGKILL
    kept = {path.stem for path in tmp_path.glob(f"{PURCHASES}/answers/0000000000/*.json")}
    num_asked = len(server.prompts)
    assert 2 <= len(kept) <= num_asked < len(wanted)

    # and another one after it
    desk = desk_of(Blobs(str(tmp_path)), server.base_url, limit_usd=float(limit))
    found = desk.scores_of_all(wanted, num_threads=2)
    asked_again = server.prompts[num_asked:]
    missing = [each.token_ids_D.tolist() for each in wanted if each.digest not in kept]
    assert sorted(asked_again) == sorted(missing)
    assert server.num_charged <= granted_usd(tmp_path) <= limit
    undisturbed = desk_of(Blobs("memory://"), server.base_url, limit_usd=None)
    assert_equal(found, undisturbed.scores_of_all(wanted, num_threads=1))


def granted_usd(folder: Path) -> float:
    return Ledger(
        Blobs(str(folder)), RECIPE.fingerprint[:16], limit_usd=1.0, setting="limit_usd"
    ).granted_usd()


def assert_equal(found: list[Scores], wanted: list[Scores]) -> None:
    for one, other in zip(found, wanted, strict=True):
        for array, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, same)


class Killed(BaseException):
    """What ends a buyer that is a thread here."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("seed", range(6))
def test_a_limit_is_kept_whatever_fails_and_in_whatever_order(
    server: PromptServer, tmp_path: Path, seed: int
) -> None:
    """Three buyers at a time, some of which are killed at a random put, of a server that is busy,
    fails, breaks off, and charges for much of that."""
    draw = random.Random(seed)
    limit = draw.choice([60.0, 100.0, 150.0])
    faults = [None, None, None, busy(), Fault("status", 500), Fault("cut"), Fault("silent")]
    server.faults.extend(draw.choices(faults, [4, 4, 4, 4, 4, 4, 1], k=400))
    wanted, refusals = documents(0, 1), []

    def buy(moment: Moment, order: list[Document], num_grants: int) -> None:
        blobs = MortalBlobs(str(tmp_path), moment, kill)
        desk = desk_of(
            blobs, server.base_url, limit_usd=limit, num_grants=num_grants, timeout_s=0.5
        )
        try:
            desk.scores_of_all(order, num_threads=3)
        except ServerError as error:
            refusals.append(str(error))
        except Killed:
            pass

    for _ in range(4):
        buyers = []
        for _ in range(3):
            place = draw.choice(["grants", "answers"])
            moment = Moment(place, draw.randint(1, 9), is_done=draw.random() < 0.5)
            arguments = moment, draw.sample(wanted, len(wanted)), draw.choice([3, 1000])
            buyers.append(threading.Thread(target=buy, args=arguments))
        for buyer in buyers:
            buyer.start()
        for buyer in buyers:
            buyer.join()
    assert server.num_charged <= granted_usd(tmp_path) <= limit
    # the money was what stopped them, and most of it was used
    assert any("raise max_cost_usd" in each for each in refusals)
    assert server.num_charged > limit / 4


def test_answers_go_once_their_chunk_is_published(tmp_path: Path, server: PromptServer) -> None:
    blobs = Blobs(str(tmp_path))
    desk_of(blobs, server.base_url, limit_usd=None).scores_of_all(documents(0, 1), num_threads=2)
    store = ChunkStore(blobs, RECIPE)
    store.publish(make_chunk(RECIPE, 1))
    answers_of(store).tidy()
    kept = {path.parent.name for path in tmp_path.glob(f"{PURCHASES}/answers/*/*")}
    assert kept == {"0000000000"}


def test_purchases_are_as_the_page_on_the_format_says(tmp_path: Path, server: PromptServer) -> None:
    document = documents(0)[0]
    desk = desk_of(Blobs(str(tmp_path)), server.base_url, limit_usd=500.0)
    (scores,) = desk.scores_of_all([document], num_threads=1)
    ids, places = document.token_ids_D.tolist(), document.targets_T.tolist()
    numbers = [len(ids), *ids, len(places), *places]
    digest = xxhash.xxh3_128_hexdigest(struct.pack(f"<{len(numbers)}i", *numbers))
    for key, names in {
        f"answers/0000000000/{digest}.json": ("label_logprobs", "logprobs", "token_ids"),
        "grants/0000000000.json": ("nanodollars",),
    }.items():
        values = json.loads(data := (tmp_path / PURCHASES / key).read_bytes())
        assert data == canonical(values)
        assert values.pop("xxh3") == xxhash.xxh3_64_hexdigest(canonical(values))
        assert (set(values), values["version"]) == ({*names, "version"}, 1)
        if "token_ids" in values:
            assert values["token_ids"] == scores.token_ids_TK.tolist()
        else:
            assert values["nanodollars"] == price_of(document) * USD


def test_a_damaged_answer_is_bought_again(tmp_path: Path, server: PromptServer) -> None:
    desk = desk_of(Blobs(str(tmp_path)), server.base_url, limit_usd=None)
    document = documents(0)[0]
    before = desk.scores_of_all([document], num_threads=1)
    (answer,) = tmp_path.glob(f"{PURCHASES}/answers/*/*")
    answer.write_bytes(answer.read_bytes()[:-9])
    assert_equal(desk.scores_of_all([document], num_threads=1), before)
    assert len(server.prompts) == 2


def test_a_server_that_charges_more_than_it_may_is_left(
    tmp_path: Path, server: PromptServer
) -> None:
    server.changed = lambda answer: answer | {"usage": {"total_tokens": 10_000}}
    desk = desk_of(Blobs(str(tmp_path)), server.base_url, limit_usd=500.0)
    with pytest.raises(ServerError, match="charged 0 tokens for a prompt and 10000 for what"):
        desk.scores_of_all(documents(0), num_threads=1)
    assert len(server.prompts) == 1
