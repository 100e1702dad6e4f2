"""Who joins the ranks' group and sends a pickle, or anything else that is no JSON, is refused in
words: nothing of it is run."""

import ast
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import stillhouse
from helpers import peers
from helpers.bombs import Bomb
from helpers.ranks import RankGroup

Ranks = dict[int, RankGroup]


@pytest.mark.parametrize("meet", [peers.gathers_from, peers.is_told, peers.names_an_attempt])
def test_a_pickle_from_a_peer_is_refused_and_not_opened(
    rank_groups: Ranks, meet: Callable[[bytes], str], tmp_path: Path
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "it-ran"))
    assert any(
        f"sent {len(bomb)} bytes that are no JSON" in words
        for words in rank_groups[2].call(meet, bomb)
    )
    assert not (tmp_path / "it-ran").exists()
    assert_in_step(rank_groups[2])


def test_a_rank_that_joins_a_group_as_it_restores_is_not_believed(
    rank_groups: Ranks, tmp_path: Path
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "it-ran"))
    words, _ = rank_groups[2].call(peers.restores, bomb, tmp_path / "checkpoints")
    assert not (tmp_path / "it-ran").exists()
    assert f"rank 1 sent {len(bomb)} bytes that are no JSON" in words
    assert_in_step(rank_groups[2])


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 200_000, b"9" * 5_000, b"nan"])
@pytest.mark.parametrize("meet", [peers.gathers_from, peers.is_told])
def test_what_is_no_json_is_refused(
    rank_groups: Ranks, meet: Callable[[bytes], str], data: bytes
) -> None:
    assert any("bytes that are no JSON" in words for words in rank_groups[2].call(meet, data))
    assert_in_step(rank_groups[2])


def test_messages_have_a_longest_length_on_every_rank(rank_groups: Ranks) -> None:
    for gathered, told, *within in rank_groups[2].call(peers.too_long, 1000):
        assert gathered.startswith(
            "rank 0 wants to send 500 bytes, of 1000 in all; at least 1 of each rank and at most "
            "999 in all are taken."
        )
        assert told.startswith(
            "rank 0 wants to send 1000 bytes, of 1000 in all; at least 1 of each rank and at most "
            "999 in all are taken."
        )
        assert within == ["", ""]


def test_pickles_are_opened_in_two_places_of_the_framework_and_in_no_collective() -> None:
    """Arguments that Ray brought, which asks for the cluster's token; and checkpoints, by the
    restricted unpickler. numpy must be asked."""
    opens = {"load", "loads", "Unpickler", "read_pickle", "unsafe_load", "full_load"}
    of = {
        "torch",
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "yaml",
        "marshal",
        "shelve",
        "pandas",
        "pd",
    }
    found = set()
    for path in sorted(Path(stillhouse.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in of
                and node.attr in opens
            ):
                found.add((path.name, f"{node.value.id}.{node.attr}"))
            if isinstance(node, ast.ImportFrom) and node.module in of:
                found |= {
                    (path.name, f"{node.module}.{name.name}")
                    for name in node.names
                    if name.name in opens
                }
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.add((path.name, "allow_pickle"))
            name = (
                node.attr
                if isinstance(node, ast.Attribute)
                else node.id
                if isinstance(node, ast.Name)
                else ""
            )
            if "_object" in name and name.startswith(
                ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
            ):
                found.add((path.name, name))
    assert found == {("unpickling.py", "torch.load"), ("workers.py", "pickle.loads")}


def assert_in_step(group: RankGroup) -> None:
    """The ranks still answer one another in turn."""
    (first, said), (second, _) = group.call(peers.exchange, "after")
    assert first == second
    assert said == first[0]
