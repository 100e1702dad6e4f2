"""The report's section on rollouts: counts, reasons, scores, and samples whose text is hostile."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.htmlpages import Page
from helpers.journals import START as RUN_START
from stillhouse.pipeline.run_dir import keep_account
from stillhouse.report import write_report
from stillhouse.sequences.account import Account
from stillhouse.sequences.source import Part
from stillhouse.tracking import Journal
from stillhouse.tracking.samples import Grading, SampleAccount, ShownSample

ROLLOUTS = "rollouts:///runs/store/0123456789abcdef"
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> \u202e\x1b[31m\x00 &"
SEEN = r"<script>alert('x')</script><img src=x onerror=alert(1)> \u202e\x1b[31m\x00 &"
START = replace(
    RUN_START,
    command="stillhouse run maths.toml",
    versions={},
    corpus_targets={ROLLOUTS: 2000},
)
KEPT = ShownSample(12, 0, "how much is 2 + 2?", "It is 4", "ended", {"number": 1.0}, None)
DROPPED = replace(
    KEPT, sample_number=1, text="It is 5", scores={"number": 0.25}, reason="samples: a low score"
)
ACCOUNT = SampleAccount(
    num_prompts=700,
    num_ended=1500,
    num_cut=500,
    num_set_aside=100,
    num_tokens=65_432,
    num_kept=1050,
    drops={"samples: a low score": 840, "samples: cut": 210},
    gradings={"number": Grading(2100, 0.512, 1050, (1000, 0, 0, 0, 50, 0, 0, 0, 0, 1050))},
    kept=[KEPT],
    dropped=[DROPPED],
)


def page_of(run_dir: Path, accounts: Mapping[str, SampleAccount | None]) -> Page:
    run_dir.mkdir(exist_ok=True)
    Journal(run_dir / "journal.jsonl").record(START)
    keep_account(
        run_dir, [Part(name, Account(samples=each), 1, 1) for name, each in accounts.items()]
    )
    return Page(write_report(run_dir))


def test_the_page_tells_what_was_written_what_is_kept_and_why_the_rest_is_not(
    tmp_path: Path,
) -> None:
    text = page_of(tmp_path, {ROLLOUTS: ACCOUNT}).text
    for words in (
        "2,100 samples of 700 prompts, 65,432 sampled tokens: 1,500 ended themselves, 500 were "
        "cut, and 100 were set aside. 1,050 are kept",
        "Share Kept 1,050 50.0 % a low score 840 40.0 % cut 210 10.0 %",
        "number 2,100 0.512 50.0 %",
        "Kept Prompt 12, sample 0: ended number 1.00 how much is 2 + 2? It is 4",
        "Dropped Prompt 12, sample 1: ended number 0.25 a low score how much is 2 + 2? It is 5",
    ):
        assert words in text


def test_the_text_of_a_sample_can_neither_run_nor_hide_nor_turn(tmp_path: Path) -> None:
    evil = ShownSample(0, 0, EVIL, EVIL, "ended", {EVIL: 1.0}, EVIL)
    account = replace(
        ACCOUNT,
        kept=[evil],
        dropped=[evil],
        drops={EVIL: 1},
        gradings={EVIL: Grading(1, 1.0, 1, (0,) * 9 + (1,))},
    )
    page = page_of(tmp_path, {EVIL: account, ROLLOUTS: ACCOUNT})
    assert not page.tags & {"script", "img"}
    assert page.text.count(SEEN) >= 10
    assert not {*"\u202e\x1b\x00"} & {*page.text}


def test_secrets_stay_out_of_the_samples_and_of_the_page(tmp_path: Path) -> None:
    evil = replace(KEPT, text="password = 's3cr3t-0123456789'")
    page_of(tmp_path, {"rollouts://s3://me:s3cr3t-0123456789@b/0f": replace(ACCOUNT, kept=[evil])})
    for name in ("samples.json", "report.html"):
        assert "s3cr3t" not in (tmp_path / name).read_text()


@pytest.mark.parametrize("damage", [None, b"", b"[]", b'{"data_sets": 3}', b"\xff"])
def test_without_the_file_or_with_a_damaged_one_the_page_says_so(
    tmp_path: Path, damage: bytes | None
) -> None:
    assert "wrote to be trained on" in page_of(tmp_path, {ROLLOUTS: ACCOUNT}).text
    (tmp_path / "samples.json").unlink()
    if damage is not None:
        (tmp_path / "samples.json").write_bytes(damage)
    assert "has no samples.json that can be read" in Page(write_report(tmp_path)).text


def test_a_bit_that_flipped_in_the_file_is_found(tmp_path: Path) -> None:
    page_of(tmp_path, {ROLLOUTS: ACCOUNT})
    path = tmp_path / "samples.json"
    path.write_bytes(path.read_bytes().replace(b"1050", b"1051", 1))
    assert "has no samples.json that can be read" in Page(write_report(tmp_path)).text


def test_a_run_on_text_that_people_wrote_has_no_such_section(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl").record(replace(START, corpus_targets={"acme/chats": 2000}))
    (tmp_path / "samples.json").write_bytes(b"of an earlier command")
    keep_account(tmp_path, [Part("acme/chats", Account(), 1, 1)])
    assert not (tmp_path / "samples.json").exists()
    assert "wrote to be trained on" not in Page(write_report(tmp_path)).text


def test_each_data_set_of_a_mixture_has_its_part(tmp_path: Path) -> None:
    other = replace(ACCOUNT, num_prompts=3)
    text = page_of(tmp_path, {ROLLOUTS: ACCOUNT, "acme/chats": None, "rollouts://b": other}).text
    assert "store/0123456789abcdef 2,100 samples of 700 prompts" in text
    assert "b 2,100 samples of 3 prompts" in text
