"""The report of a directory of `generate`: what was written, how fast and by whom, and what was
lost; a resumed command counts nothing twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.htmlpages import Page
from stillhouse.errors import UserError
from stillhouse.report import write_report
from stillhouse.report.generation import headline, summarise_generation, work_of_writers
from stillhouse.tracking import (
    CostEvent,
    EndEvent,
    GenerationEvent,
    Journal,
    PoolEvent,
    RunEvent,
    SetAsideEvent,
    ShardEvent,
    WriterEvent,
)

START = GenerationEvent(
    attempt=1,
    command="stillhouse generate maths.toml",
    versions={"torch": "2.13.0"},
    writer="acme/writer-8b",
    recipe_fingerprint="0f" * 32,
    num_shards=4,
    num_prompts=40,
    samples=2,
    num_writers=3,
    bad_rows=7,
    time=1000.0,
)


def _shard(number: int, at: float, *, replica: int = 0, duplicate: bool = False) -> ShardEvent:
    return ShardEvent(number, 500, 9000, 15, 4, 1, 5.0, replica, duplicate, time=at)


def _pool(at: float, losses: int) -> PoolEvent:
    return PoolEvent(1, 4, 1, 4, 100.0, 0.0, 0, losses=losses, time=at)


FIRST = [
    START,
    WriterEvent(0, 3.0, "cuda", time=1004.0),
    WriterEvent(1, 3.5, "cuda", time=1004.5),
    _shard(0, 1010.0),
    _pool(1011.0, 1),
    _shard(1, 1012.0, replica=1),
    _shard(1, 1013.0, duplicate=True),
    _pool(1014.0, 2),
    EndEvent("interrupted", 15.0, "Ctrl-C", time=1015.0),
]
SECOND = [
    replace(START, attempt=2, time=2000.0),
    WriterEvent(0, 1.0, "cpu", time=2001.0),
    SetAsideEvent(2, [5], "too long", time=2002.0),
    _shard(2, 2010.0),
    _shard(3, 2015.0),
    _pool(2016.0, 1),
    CostEvent(12.5, 100.0, time=2017.0),
    EndEvent("done", 20.0, "", time=2020.0),
]


def _page(folder: Path, events: list[RunEvent], config: object = None) -> Page:
    folder.mkdir(exist_ok=True)
    for event in events:
        Journal(folder / "journal.jsonl").record(event)
    if config is not None:
        (folder / "generate.json").write_text(json.dumps(config))
    return Page(write_report(folder))


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([*FIRST, *SECOND], "All 4 shards are written: 2 samples of each of 40 prompts."),
        (
            [START, EndEvent("done", 1.0, "", time=1001.0)],
            "0 of the 4 shards were written from here",
        ),
        (FIRST, "Not all of 2 samples of each of 40 prompts are written yet: 2 of the 4 shards"),
        ([START], "Not all of 2 samples"),
    ],
)
def test_the_headline_says_what_is_written_and_where(events: list[RunEvent], words: str) -> None:
    summary = summarise_generation(events)
    assert summary is not None
    assert words in headline(summary)


def test_shards_tokens_and_losses_of_all_attempts_count_once_and_the_clock_stops_between_them() -> (
    None
):
    summary = summarise_generation([*FIRST, *SECOND])
    assert summary is not None
    assert [shard.shard for shard in summary.shards] == [0, 1, 2, 3]
    assert sum(each.amount for each in summary.tokens) == 2000
    assert (summary.run_s, summary.idle_s, summary.num_attempts) == (35.0, 985.0, 2)
    assert summary.resumed_at == [15.0]
    work = [
        (each.attempt, each.replica, each.device, each.num_shards, each.num_tokens)
        for each in work_of_writers(summary)
    ]
    assert work == [(1, 0, "cuda", 1, 500), (1, 1, "cuda", 1, 500), (2, 0, "cpu", 2, 1000)]


def test_the_page_tells_pace_writers_losses_and_facts(tmp_path: Path) -> None:
    config = {
        "prompts": {"dataset": "acme/sums"},
        "sampling": {"temperature": 0.7, "top_p": 0.9},
        "store": {"url": "s3://me:s3cr3t-0123456789@bucket/store"},
    }
    text = _page(tmp_path, [*FIRST, *SECOND], config).text
    for words in (
        "Stillhouse report · done All 4 shards are written",
        "Shards 4 of 4, 36 kB Samples 80 2 of each prompt Ended themselves 75.0 % 16 cut, 4 set",
        "Sampled tokens 2,000 25 a sample Writers, tokens/s 80 3 replicas asked for",
        "1, attempt 1 cuda 3.5 1 500 100 0, attempt 2 cpu 1.0 2 1,000 100",
        "3 leases lost with a writer; 1 shard made twice; 1 prompt set aside.",
        "Prompts 40 of acme/sums Bad rows 7; skipped Sampling temperature 0.7, top_p 0.9",
        "Cost 12.5 of 100 USD spent or reserved at its server",
        "Data set of a run rollouts://0f0f0f0f0f0f0f0f",
        "stillhouse generate maths.toml",
    ):
        assert words in text
    assert "s3cr3t" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([START], "attempt 1 has no end: running, or killed"),
        ([START, EndEvent("failed", 1.0, "no room", time=1001.0)], "ended with: no room"),
        (FIRST[:2], "No shard was written from this directory"),
        ([START], "No writer was ready"),
        ([START], "no readable generate.json"),
    ],
)
def test_what_there_is_not_is_said(tmp_path: Path, events: list[RunEvent], words: str) -> None:
    assert words in _page(tmp_path, events).text


def test_names_and_messages_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    start = replace(START, writer=evil, command=evil, versions={evil: evil})
    events = [start, WriterEvent(0, 1.0, evil, time=1001.0), EndEvent("failed", 1.0, evil)]
    page = _page(tmp_path, events, {"prompts": {"dataset": evil}})
    assert "script" not in page.tags
    assert page.text.count(evil) >= 6


def test_of_many_writers_those_that_wrote_most_have_a_line(tmp_path: Path) -> None:
    writers = [WriterEvent(n, 1.0, "cuda", time=1001.0) for n in range(40)]
    text = _page(tmp_path, [START, *writers, _shard(0, 1010.0, replica=39)]).text
    assert "39, attempt 1 cuda 1.0 1 500 100" in text
    assert "8 more writers wrote less." in text


def test_a_directory_of_neither_is_refused_with_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the directory of a run, or of `stillhouse generate`"):
        write_report(tmp_path)
