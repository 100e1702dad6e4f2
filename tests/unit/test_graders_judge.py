"""A judge is asked at a server with OpenAI's chat API. A bad answer costs its sample; a server that
is away is waited for, and then an error, so that no verdict is lost to it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helpers.graders import samples, section
from helpers.promptserver import Answer, Fault, PromptServer, busy, flat
from stillhouse.config.graders import JudgeSection
from stillhouse.errors import ConfigError, GraderError, ServerError
from stillhouse.graders import Sample, graded, make_grader
from stillhouse.graders.judge import asked
from stillhouse.servers.access import access_of
from stillhouse.servers.client import Access
from stillhouse.store.object_store import Blobs

TEMPLATE = "Grade {text} as an answer to {prompt}; right is {reference}."


@pytest.fixture
def server() -> Iterator[PromptServer]:
    with PromptServer(flat, reply=lambda _request: ("score: 5", "stop")).running() as running:
        yield running


def judging(server: PromptServer, **values: Any) -> JudgeSection:
    given = {"base_url": server.base_url, "served_model": "m", "template": TEMPLATE}
    made = section(kind="judge", **(given | values))
    assert isinstance(made, JudgeSection)
    return made


def scores(
    server: PromptServer, num_samples: int = 1, access: Access | None = None, **values: Any
) -> tuple[float, ...]:
    with closing(make_grader(judging(server, **values), access=access)) as judge:
        return graded(judge, samples(["x"] * num_samples)).scores


def test_a_judge_at_a_server_scores_each_sample(server: PromptServer) -> None:
    def reply(request: Answer) -> tuple[str, str]:
        text = request["messages"][0]["content"].split()[1]
        return f"Not a score: 1. Thinking of {text}.\nScore: {text}", "stop"

    server.reply, server.key = reply, "secret"
    texts = ["10", "2.5", "0", "11", "none", "5\ud800"]
    grader = make_grader(judging(server, request={"effort": "low"}), access=Access("secret"))
    with closing(grader):
        found = graded(grader, samples(texts, "7"))
    assert found.scores == (1.0, 0.25, 0.0, 0.0, 0.1, 0.5)
    assert found.failures == {"a score out of range": 1}
    for request in server.requests:
        assert (request["route"], request["model"]) == ("/v1/chat/completions", "m")
        assert (request["temperature"], request["effort"]) == (0.0, "low")
    questions = {request["messages"][0]["content"] for request in server.requests}
    assert "Grade 2.5 as an answer to a question; right is 7." in questions


def test_a_text_cannot_fill_the_blanks_of_the_template() -> None:
    sample = Sample("{reference}", "{prompt} {text}", "7")
    assert asked(TEMPLATE, sample) == (
        "Grade {prompt} {text} as an answer to {reference}; right is 7."
    )


def test_what_may_pass_is_waited_for(server: PromptServer) -> None:
    server.faults.extend([busy("0.1"), Fault("silent")])
    assert scores(server, timeout_s=0.3) == (0.5,)
    assert len(server.requests) == 3


def test_a_server_that_stays_away_is_an_error_and_no_score(server: PromptServer) -> None:
    server.faults.extend([busy("60")] * 9)
    with pytest.raises(ServerError, match=r"next try would be in 60 s.*status 429"):
        scores(server, 9, patience_s=1.0, max_in_flight=1)
    assert len(server.requests) == 1  # no other waits as long again
    away = judging(server, base_url="http://127.0.0.1:9/v1", patience_s=0.1)
    with closing(make_grader(away)) as judge, pytest.raises(ServerError, match="ConnectError"):
        judge.grade(samples(["x"]))


def test_an_answer_without_an_end_is_not_kept(server: PromptServer) -> None:
    server.faults.append(Fault("endless"))
    with pytest.raises(ServerError, match=r"more than [\d,]+ bytes"):
        scores(server, patience_s=0.1)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_key_model_or_url_that_is_refused_is_the_users_to_correct(
    server: PromptServer, status: int
) -> None:
    server.faults.append(Fault("status", status))
    with pytest.raises(ServerError, match=f"status {status}.*the grader judge.*OPENAI_API_KEY"):
        scores(server)


@pytest.mark.parametrize("bad", ["", "I will not.", "score: 99"])
def test_a_bad_answer_costs_its_sample_alone(server: PromptServer, bad: str) -> None:
    replies = iter([(bad, "stop"), ("score: 5", "stop"), *[(bad, "stop")] * 2])
    server.reply = lambda _request: next(replies)
    assert scores(server, 2, max_in_flight=1) == (0.0, 0.5)
    with pytest.raises(GraderError, match="failed on all 2 samples"):
        scores(server, 2)


def test_a_question_that_is_refused_costs_its_sample_alone(server: PromptServer) -> None:
    server.faults.append(Fault("status", 400))
    assert scores(server, 2, max_in_flight=1) == (0.0, 0.5)


def test_an_answer_that_is_no_completion_is_an_error(server: PromptServer) -> None:
    server.changed = lambda _answer: {"model": "m", "choices": []}
    with pytest.raises(ServerError, match="no completion"):
        scores(server, 2)


@pytest.mark.parametrize(("pattern", "words"), [("(", "no regular"), (r"\d+", "0 groups")])
def test_a_pattern_that_finds_no_score_is_refused(
    server: PromptServer, pattern: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        scores(server, score_pattern=pattern)


def test_a_limit_of_costs_is_kept_by_all_commands_together(
    server: PromptServer, tmp_path: Path
) -> None:
    prices = {"usd_per_million_output_tokens": 1e6, "max_tokens": 20, "max_in_flight": 1}
    limited = prices | {"max_cost_usd": 100.0}

    def access() -> Access:
        judge = judging(server, **limited)
        return access_of(judge, Blobs(str(tmp_path)), "judges/j", table="the grader judge")

    assert scores(server, 9, access(), **limited) == (0.5,) * 9  # of 8 tokens each
    with pytest.raises(ServerError, match=r"the grader judge\.max_cost_usd, which is 100"):
        scores(server, 9, access(), **limited)
    assert 72 < access().money.granted_usd() <= 100
    assert len(server.requests) * 8 <= 100
