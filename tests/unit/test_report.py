"""Promises of the report: an honest verdict, one self-contained page, and nothing unescaped."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from helpers.damage import fill, small_disk
from helpers.journals import START
from helpers.sealing import sealed_line
from stillhouse.errors import StoreUnavailable, UserError
from stillhouse.report import write_report
from stillhouse.report.figures import heldout_panels, pace_panels, training_panels
from stillhouse.report.summary import (
    Interval,
    Summary,
    data_waits,
    per_second,
    summarise,
    teacher_tokens,
    verdict,
    window_waits,
)
from stillhouse.report.words import same_power
from stillhouse.tracking import (
    ChunkEvent,
    EndEvent,
    EvalEvent,
    HeldoutEvent,
    Journal,
    PoolEvent,
    Role,
    RunEvent,
    TrainEvent,
)

TEACHER = EvalEvent("teacher", 0, 4096, 3.05, None, 1.0, 0.02, 1.0, time=1300.0)
STUDENT = EvalEvent("student", 10, 4096, 3.41, 0.31, 0.712, 0.03, 0.785, time=1301.0)
CONTROL = EvalEvent("control", 10, 4096, 3.78, 0.62, 0.601, 0.05, 0.644, time=1302.0)


def _training(role: Role, steps: range, begin: float, *, num_tokens: int = 200) -> list[TrainEvent]:
    return [
        TrainEvent(
            role,
            s,
            2.0 / s,
            1.5 / s,
            3.0 + 1 / s,
            0.7,
            1e-4,
            num_tokens,
            4.0,
            1.0,
            50.0,
            world_size=2,
            time=begin + 4.0 * (i + 1),
        )
        for i, s in enumerate(steps)
    ]


def _chunk(number: int, at: float, *, duplicate: bool = False) -> ChunkEvent:
    return ChunkEvent(number, 250, 44_000, 5.0, 0, 0.97, 3e-6, 4e-4, duplicate, time=at)


def _pool(published: int, at: float, wait_s: float) -> PoolEvent:
    return PoolEvent(published, 8, 3, 4, 50.0, wait_s, 0, time=at)


CHUNKS: list[RunEvent] = [_chunk(i, 1005.0 + 5 * i) for i in range(8)]
POOL: list[RunEvent] = [_pool(i, 1005.0 + 5 * i, 2.0 * i) for i in range(8)]
TRAINED = [*_training("student", range(1, 11), 1050.0), *_training("control", range(1, 11), 1100.0)]
WHOLE = [
    START,
    *CHUNKS,
    *POOL,
    *TRAINED,
    TEACHER,
    STUDENT,
    CONTROL,
    EndEvent("done", 305.0, "", time=1305.0),
]


def _summary(*rows: RunEvent) -> Summary:
    summary = summarise(list(rows))
    assert summary is not None
    return summary


def _run_dir(path: Path, rows: list[RunEvent], config: Mapping[str, object] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    for row in rows:
        Journal(path / "journal.jsonl").record(row)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


class _Text(HTMLParser):
    """The words of a page as a reader sees them, and its tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [*TRAINED, TEACHER, STUDENT, CONTROL],
            "The distilled student reaches a held-out cross-entropy of 3.41 nats a token, against "
            "3.78 for the same student trained on "
            "the text alone (teacher: 3.05): 51\N{NARROW NO-BREAK SPACE}% of the gap closed, at "
            "equal tokens.",
        ),
        (
            [*TRAINED, TEACHER, replace(STUDENT, cross_entropy=3.81), CONTROL],
            "The distilled student did worse than the same student trained on the text alone "
            "(teacher: 3.05): "
            "a held-out cross-entropy of 3.81 against 3.78 nats a token, at equal tokens.",
        ),
        (
            [*TRAINED, TEACHER, replace(STUDENT, cross_entropy=3.782), CONTROL],
            "Distillation made no difference: the student and the same student trained on the "
            "text alone (teacher: 3.05) "
            "both reach 3.78 nats a token held out, at equal tokens.",
        ),
        (
            [*TRAINED, replace(STUDENT, cross_entropy=3.772), CONTROL],
            "The distilled student reaches a held-out cross-entropy of 3.772 nats a token, "
            "against 3.780 for the same student trained "
            "on the text alone, at equal tokens.",
        ),
        (
            [*TRAINED, TEACHER, STUDENT],
            "The distilled student reaches a held-out cross-entropy of 3.41 nats a token "
            "(teacher: 3.05), and KL(teacher ‖ student) is "
            "0.31. No control was evaluated, so this does not show what distillation gained over "
            "training on the text alone.",
        ),
        (
            TRAINED[:4],
            "Training stands at step 4 of 10 (divergence from the teacher 0.38 nats a token), and "
            "nothing was evaluated yet.",
        ),
        (
            TRAINED,
            "The student was trained for all of its 10 steps (divergence from the teacher 0.15 "
            "nats a token at the last), "
            "and not evaluated yet.",
        ),
        (CHUNKS[:3], "No step was taken yet; 3 of 8 chunks came out of this run's teachers."),
    ],
    ids=[
        "better",
        "worse",
        "equal",
        "nearly equal, no teacher",
        "no control",
        "halfway",
        "no evaluation",
        "no step",
    ],
)
def test_the_verdict_says_what_the_rows_show(rows: list[RunEvent], says: str) -> None:
    assert verdict(_summary(START, *rows)) == says


def test_the_page_of_a_student_of_the_text_alone_names_no_teacher(tmp_path: Path) -> None:
    scores = replace(STUDENT, kl=None, agreement=None, acceptance=None)
    rows = [replace(START, teacher=None, control=False), *CHUNKS, *TRAINED[:10], scores]
    summary = _summary(*rows)
    said = verdict(summary)
    assert said == (
        "The student, trained on the text alone, reaches a held-out cross-entropy of 3.41 nats a "
        "token."
    )
    page = _Text(write_report(_run_dir(tmp_path / "run", rows)).read_text()).text
    assert said in page
    assert "Student, text alone" in page
    assert "Teacher none: the text itself" in page
    for words in ("distilled", "No control", "speculative decoding"):
        assert words not in page


def test_the_verdict_never_calls_unequal_tokens_equal() -> None:
    unequal = [
        *_training("student", range(1, 11), 1050.0),
        *_training("control", range(1, 11), 1100.0, num_tokens=260),
    ]
    assert "at unequal tokens: 2,000 for the student, 2,600 for the control" in verdict(
        _summary(START, *unequal, STUDENT, CONTROL)
    )
    assert "does not hold" in verdict(_summary(START, STUDENT, CONTROL))


def test_the_verdict_knows_a_student_past_its_teacher_and_a_teacher_with_nothing_to_teach() -> None:
    past = replace(STUDENT, cross_entropy=3.01)
    assert "the whole gap closed, and no worse than its teacher" in verdict(
        _summary(START, *TRAINED, TEACHER, past, CONTROL)
    )
    weak = replace(TEACHER, cross_entropy=3.9)
    assert "% of the gap" not in verdict(_summary(START, *TRAINED, weak, STUDENT, CONTROL))


def test_an_evaluation_halfway_is_called_that() -> None:
    assert "The distilled student after 6 of 10 steps reaches" in verdict(
        _summary(START, *TRAINED, replace(STUDENT, step=6))
    )


def test_a_resumed_run_counts_steps_and_chunks_once_and_stops_its_clock_between_attempts() -> None:
    again = replace(START, attempt=2, time=9000.0, command="stillhouse train runs/x")
    rows = [
        START,
        _chunk(0, 1005.0),
        *_training("student", range(1, 6), 1010.0),
        again,
        _chunk(0, 9003.0, duplicate=True),
        _chunk(1, 9004.0),
        *_training("student", range(4, 11), 9010.0),
    ]
    summary = _summary(*rows)
    assert [row.step for row in summary.student] == list(range(1, 11))
    assert [row.chunk for row in summary.chunks] == [0, 1]
    assert summary.run_s == pytest.approx(30.0 + 38.0)
    assert summary.idle_s == pytest.approx(9000.0 - 1030.0)
    assert summary.resumed_at == [pytest.approx(30.0)]
    assert summary.commands == ["stillhouse run configs/demo.toml", "stillhouse train runs/x"]
    assert summary.end is None


def test_rates_spread_each_amount_over_its_time_and_lose_nothing() -> None:
    intervals = [Interval(0.0, 4.0, 8.0), Interval(3.0, 5.0, 2.0), Interval(9.0, 9.0, 5.0)]
    assert per_second(intervals, np.array([0.0, 2.0, 4.0, 10.0])).tolist() == pytest.approx(
        [2.0, 2.5, 1.0]
    )


def test_waiting_is_read_off_what_grew_in_each_attempt() -> None:
    again = replace(START, attempt=2, time=2000.0)
    summary = _summary(
        START,
        _pool(1, 1010.0, 3.0),
        _pool(2, 1020.0, 8.0),
        again,
        _pool(3, 2010.0, 4.0),
        *_training("student", range(1, 3), 2010.0),
    )
    assert window_waits(summary) == [
        Interval(0.0, 10.0, 3.0),
        Interval(10.0, 20.0, 5.0),
        Interval(20.0, 30.0, 4.0),
    ]
    assert data_waits(summary) == [Interval(30.0, 34.0, 1.0), Interval(34.0, 38.0, 1.0)]
    assert teacher_tokens(summary) == []


def test_the_page_is_one_file_that_asks_nothing_of_the_network(tmp_path: Path) -> None:
    path = write_report(_run_dir(tmp_path, WHOLE, {"corpus": {"dataset": "acme/text"}}))
    assert path == tmp_path / "report.html"
    page = _Text(path.read_text(encoding="utf-8"))
    references = [
        value
        for name, value in page.attributes
        if name.split(":")[-1] in {"src", "href", "srcset", "data", "action"}
    ]
    assert all(value is not None and value.startswith("#") for value in references)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 9
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".partial"]


def test_the_page_tells_the_runs_figures(tmp_path: Path) -> None:
    config = {
        "corpus": {"dataset": "acme/text", "split": "train"},
        "student": {"divergence": "forward_kl", "divergence_weight": 1.0},
    }
    text = _Text(
        write_report(_run_dir(tmp_path, WHOLE, config)).read_text(encoding="utf-8")
    ).text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert verdict(_summary(*WHOLE)).replace("\N{NARROW NO-BREAK SPACE}", " ") in text
    assert "Student, distilled 10 3.410 30.27 0.310 71.2 % 3.0 % 78.5 %" in text
    assert "Kept mass 97.0 % mean of 2,000 tokens" in text
    assert "Codec KL 3·10⁻⁶ nats; worst token 4·10⁻⁴" in text
    assert "Student, tokens/s 50 2 ranks, ZeRO 2" in text
    assert "int32 ids and float16 values, k = 64 384 768 kB 2.2 ×" in text
    assert "float16 over the whole vocabulary 303,872 608 MB 1,727 ×" in text
    assert "1.0 × forward_kl" in text
    assert "ray 2.60.0, torch 2.13.0" in text
    assert "0f" * 32 in text
    assert "stillhouse run configs/demo.toml" in text


ASKED = replace(START, learning_rate=3e-3, min_learning_rate=0.0, warmup_steps=5)
LAST_ASKED = {
    "student": {"learning_rate": 3e-5, "warmup_steps": 7, "epochs": 99, "global_batch_sequences": 8}
}


def _facts(folder: Path, *rows: RunEvent) -> str:
    """The words of a page whose config was asked for after all these rows."""
    return _Text(
        write_report(_run_dir(folder, list(rows), LAST_ASKED)).read_text(encoding="utf-8")
    ).text


def test_the_page_tells_the_schedule_that_was_trained_and_not_the_one_that_was_asked_for_last(
    tmp_path: Path,
) -> None:
    again = replace(
        ASKED,
        attempt=2,
        learning_rate=3e-5,
        warmup_steps=7,
        world_size=4,
        total_steps=8,
        time=2000.0,
    )
    idle = "nothing left to train: 10 steps are committed, and 8 are asked for"
    text = _facts(tmp_path, ASKED, *TRAINED, again, EndEvent("done", 1.0, idle, time=2001.0))
    assert (
        "Optimiser AdamW, sequences a step 8 Schedule learning rate 0.003, warm-up steps 5, then "
        "a cosine to 0 at step 10 Steps" in text
    )
    assert "Steps 10 taken, 8 asked for last" in text
    assert "Ranks 2, DeepSpeed" in text
    assert "2 ranks, ZeRO 2" in text
    assert idle in text
    assert "for all of its 10 steps" in text


def test_the_page_tells_the_steps_of_each_schedule_where_it_changed(tmp_path: Path) -> None:
    """Steps 5 and 6 were lost and taken again; the control was trained by the second attempt alone,
    on one rank."""
    again = replace(ASKED, attempt=2, learning_rate=1e-3, time=2000.0)
    control = [replace(row, world_size=1) for row in _training("control", range(1, 11), 2100.0)]
    text = _facts(
        tmp_path,
        ASKED,
        *_training("student", range(1, 7), 1050.0),
        again,
        *_training("student", range(5, 11), 2050.0),
        *control,
    )
    words = "learning rate {}, warm-up steps 5, then a cosine to 0 at step 10"
    both = f"steps 1 to 4: {words.format('0.003')}; steps 5 to 10: {words.format('0.001')}"
    assert (
        f"Schedule of the student {both} Schedule of the control {words.format('0.001')} Steps"
        in text
    )
    assert "learning rate 3e-05" not in text


def test_the_page_of_a_journal_without_schedules_tells_the_learning_rates_of_its_steps(
    tmp_path: Path,
) -> None:
    late = _training("student", range(5, 11), 1050.0)
    assert (
        "Schedule learning rate up to 0.0001 (the journal does not hold its schedule) Steps"
        in _facts(tmp_path / "whole", START, *TRAINED)
    )
    assert (
        "Schedule steps 1 to 4: not in this journal; steps 5 to 10: learning rate up to 0.0001"
        in _facts(tmp_path / "late", START, *late)
    )


def test_before_the_first_step_the_page_tells_what_was_asked_for(tmp_path: Path) -> None:
    assert "then a cosine to 0 at step 10; no step was taken yet Steps 10, and" in _facts(
        tmp_path, ASKED
    )


def test_the_page_tells_each_data_sets_share_of_a_mixture_and_the_rows_that_were_skipped(
    tmp_path: Path,
) -> None:
    one = replace(START, corpus_targets={"acme/chats": 2000})
    assert "mixture" not in _facts(tmp_path / "one", one)
    assert "Bad rows" not in _facts(tmp_path / "one", one)
    two = replace(
        START,
        corpus_targets={"acme/chats": 1500, "/data/of/us/code.jsonl": 500},
        bad_rows={"/data/of/us/code.jsonl": 1234},
    )
    text = _facts(tmp_path / "two", two).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "Share acme/chats 1,500 75.0 % us/code.jsonl 500 25.0 %" in text
    assert "Bad rows 1,234 of us/code.jsonl; skipped, and listed in bad_rows.jsonl" in text


def test_the_page_follows_the_readers_light_or_dark(tmp_path: Path) -> None:
    page = write_report(_run_dir(tmp_path, WHOLE)).read_text(encoding="utf-8")
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert "prefers-color-scheme: dark" in page
    assert all("var(--ink-soft)" in svg for svg in svgs)
    assert not [colour for svg in svgs for colour in re.findall(r"#[0-9a-f]{6}\b", svg)]


def test_names_and_messages_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    start = replace(
        START, student=evil, teacher=f'"{evil}', command=f"run {evil}", versions={evil: evil}
    )
    rows = [start, *CHUNKS, EndEvent("failed", 1.0, f"cannot load {evil}", time=1060.0)]
    page = _Text(
        write_report(_run_dir(tmp_path, rows, {"corpus": {"dataset": evil}})).read_text(
            encoding="utf-8"
        )
    )
    assert "script" not in page.tags
    assert page.text.count(evil) >= 7


def test_secrets_in_config_or_message_stay_out_of_the_page(tmp_path: Path) -> None:
    config = {"store": {"url": "s3://me:s3cr3t-0123456789@bucket"}, "api_key": "s3cr3t-0123456789"}
    page = write_report(
        _run_dir(
            tmp_path,
            [START, EndEvent("failed", 1.0, "token=s3cr3t-0123456789", time=1001.0)],
            config,
        )
    ).read_text()
    assert "(redacted)" in page
    assert "s3cr3t" not in page


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [
                START,
                *CHUNKS[:4],
                *POOL[:4],
                *TRAINED[:3],
                EndEvent("interrupted", 70.0, "notice of preemption", time=1070.0),
            ],
            "notice of preemption",
        ),
        ([START, *CHUNKS[:4], *TRAINED[:3]], "attempt 1 has no end: running, or killed"),
        (
            [START, *TRAINED, TEACHER, STUDENT, CONTROL],
            "No chunk was computed in this run: every target came from the store.",
        ),
        ([START, *CHUNKS, *POOL], "No step was taken in this run."),
        (
            [START, EndEvent("failed", 1.0, "the teacher failed its check", time=1001.0)],
            "the teacher failed its check",
        ),
        ([START], "there is no pace to show"),
    ],
    ids=["interrupted", "killed", "cached", "produced only", "failed at once", "just begun"],
)
def test_a_run_that_lacks_something_is_reported_all_the_same(
    tmp_path: Path, rows: list[RunEvent], says: str
) -> None:
    text = _Text(write_report(_run_dir(tmp_path, rows)).read_text(encoding="utf-8")).text
    assert says in text
    assert "no readable config.json" in text


def test_a_journal_cut_off_in_a_line_is_reported(tmp_path: Path) -> None:
    _run_dir(tmp_path, [START, *TRAINED[:3]])
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "train", "ti')
    assert "Training stands at step 3 of 10" in write_report(tmp_path).read_text(encoding="utf-8")


def test_what_a_later_version_wrote_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_dir(tmp_path, [START, *TRAINED])
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(
            sealed_line(kind="weather", time=1090.0) * 2
            + sealed_line(kind="repair", time=1091.0, chunk=3, mood="glad")
        )
    words = "2 rows of a newer version left out; 1 row shown without values of a newer version"
    assert (
        f"Of the journal: {words}."
        in _Text(write_report(tmp_path).read_text(encoding="utf-8")).text
    )
    assert capsys.readouterr().err == f"note: {words}\n"
    _run_dir(tmp_path / "without", [START, *TRAINED])
    assert "newer version" not in write_report(tmp_path / "without").read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""


def test_a_report_for_which_there_is_no_room_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", num_bytes=64 << 10) as disk:
        _run_dir(disk, [START, *TRAINED])
        fill(disk / "ballast")
        with pytest.raises(
            StoreUnavailable, match=r"cannot write report\.html in .*free some space"
        ):
            write_report(disk)
        assert not (disk / "report.html").exists()


def test_targets_of_a_few_bytes_are_reported(tmp_path: Path) -> None:
    text = _Text(
        write_report(
            _run_dir(tmp_path, [replace(START, num_targets=2, bytes_per_token=66), *TRAINED])
        ).read_text("utf-8")
    ).text
    assert "66 132 B 1.0" in text.replace("\N{NARROW NO-BREAK SPACE}", " ")


def test_models_are_named_without_the_directories_above_them(tmp_path: Path) -> None:
    start = replace(
        START,
        teacher="/home/ada/secret project/models/teacher",
        student="/home/ada/secret project/models/student",
    )
    page = write_report(_run_dir(tmp_path, [start, *TRAINED])).read_text("utf-8")
    data = {"corpus": {"dataset": "/home/ada/data/texts.jsonl"}}
    assert "<td>data/texts.jsonl</td>" in write_report(
        _run_dir(tmp_path / "data", [START], data)
    ).read_text("utf-8")
    assert "<title>models/student from models/teacher · Stillhouse report</title>" in page
    assert "Teacher <b>models/teacher</b> → student <b>models/student</b>" in page
    assert "secret project" not in page
    assert "acme/teacher" in write_report(_run_dir(tmp_path / "hub", [START, *TRAINED])).read_text(
        "utf-8"
    )


def test_a_run_in_which_neither_side_waited_says_so_without_an_empty_chart() -> None:
    still = [_pool(i, 1005.0 + 5 * i, 0.0) for i in range(8)]
    busy = [replace(step, data_wait_s=0.01) for step in TRAINED if isinstance(step, TrainEvent)]
    waits = pace_panels(_summary(START, *CHUNKS, *still, *busy))[1]
    assert waits.svg == ""
    assert "(student, for chunks; teachers, for the window) was under 1 %" in waits.caption
    assert "<svg" in pace_panels(_summary(START, *CHUNKS, *POOL, *TRAINED))[1].svg


def test_the_ticks_of_one_axis_have_one_power_of_ten() -> None:
    ticks = [same_power(value, largest=1.5e-3) for value in (0.0, 2e-4, 1e-3, 1.4e-3)]
    assert ticks == ["0", "0.2·10⁻³", "1·10⁻³", "1.4·10⁻³"]


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to report"):
        write_report(tmp_path)


def test_the_size_of_a_figure_does_not_grow_with_the_run() -> None:
    long = _summary(
        replace(START, total_steps=20_000), *_training("student", range(1, 20_001), 1000.0)
    )
    panels = training_panels(long)
    assert all(len(panel.svg) < 40_000 for panel in panels)
    assert all("Each point is the mean of 67 steps." in panel.caption for panel in panels)


@pytest.mark.parametrize(
    ("constant", "title"),
    [
        (True, "Divergence from the teacher, with a constant, nats a token"),
        (False, "Divergence from the teacher, nats a token"),
    ],
)
def test_a_loss_with_a_constant_is_named_so(constant: bool, title: str) -> None:
    summary = _summary(replace(START, loss_constant=constant), *TRAINED[:3])
    panel = training_panels(summary)[0]
    assert panel.title == title
    assert ("does not fall to 0" in panel.caption) == constant
    assert ("with a constant" in verdict(summary)) == constant


def test_held_out_scores_are_curves_of_both_roles_and_of_one_text() -> None:
    """Of the text that was scored last, and each step once."""

    def scored(role: Role, step: int, kl: float, *, num_tokens: int = 4096) -> HeldoutEvent:
        return HeldoutEvent(role, step, num_tokens, 3.0 + kl, kl, 0.5, 0.02, 0.6, 1.0)

    summary = _summary(
        *(START, *TRAINED),
        scored("student", 0, 9.0, num_tokens=100),
        *(scored("student", step, 1.0 / step) for step in (2, 4, 6)),
        *(scored("student", 6, 0.125), scored("control", 2, 0.75)),
    )
    assert [(each.step, each.kl) for each in summary.heldout["student"]] == [
        (2, 0.5),
        (4, 0.25),
        (6, 0.125),
    ]
    kl, cross_entropy = heldout_panels(summary)
    assert kl.title.startswith("Held-out KL")
    assert [name for name, _ in kl.legend] == ["student", "control"]
    assert "4,096 held-out target tokens" in cross_entropy.caption
    assert "nearest" not in kl.caption
    worse = _summary(START, scored("student", 2, 0.25), scored("student", 4, 0.5))
    assert "nearest to its teacher after step 2: 0.250." in heldout_panels(worse)[0].caption
    assert heldout_panels(_summary(*WHOLE)) == []


def test_a_loss_that_is_not_finite_does_not_spoil_the_figures(tmp_path: Path) -> None:
    broken = replace(TRAINED[3], loss=float("nan"), divergence=float("nan"), grad_norm=float("inf"))
    text = write_report(_run_dir(tmp_path, [START, *TRAINED[:3], broken])).read_text(
        encoding="utf-8"
    )
    assert not [
        path for path in re.findall(r' d="([^"]*)"', text) if "nan" in path or "inf" in path
    ]
    assert text.count("<svg") == 7
