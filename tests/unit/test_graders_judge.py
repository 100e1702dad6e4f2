"""A judge is asked at a server with OpenAI's chat API. A bad answer costs its sample; a server that
is away is waited for, and then an error, so that no verdict is lost to it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from helpers.graders import samples, section
from stillhouse.config.graders import JudgeSection
from stillhouse.errors import ConfigError, GraderError
from stillhouse.graders import Sample, graded, make_grader
from stillhouse.graders.judge import Judge, asked

TEMPLATE = "Grade {text} as an answer to {prompt}; right is {reference}."


def judging(url: str, **values: Any) -> JudgeSection:
    made = section(kind="judge", url=url, model="m", template=TEMPLATE, **values)
    assert isinstance(made, JudgeSection)
    return made


def completion(content: object) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


@contextmanager
def server(answer: Callable[[dict[str, Any]], str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat server on loopback, by what it says to a request; and the requests, with their
    headers."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, **request, "key": self.headers["Authorization"]})
            body = json.dumps(completion(answer(request))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
        http.shutdown()
        thread.join()


def test_a_judge_at_a_server_scores_each_sample() -> None:
    def answer(request: dict[str, Any]) -> str:
        text = request["messages"][0]["content"].split()[1]
        return f"Not a score: 1. Thinking of {text}.\nScore: {text}"

    texts = ["10", "2.5", "0", "11", "none", "5\ud800"]
    with (
        server(answer) as (url, requests),
        closing(make_grader(judging(url), api_key="secret")) as grader,
    ):
        found = graded(grader, samples(texts, "7"))
    assert found.scores == (1.0, 0.25, 0.0, 0.0, 0.1, 0.5)
    assert found.failures == {"a score out of range": 1}
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert {request["key"] for request in requests} == {"Bearer secret"}
    questions = {request["messages"][0]["content"] for request in requests}
    assert "Grade 2.5 as an answer to a question; right is 7." in questions
    assert {(request["model"], request["temperature"]) for request in requests} == {("m", 0.0)}


def test_a_text_cannot_fill_the_blanks_of_the_template() -> None:
    sample = Sample("{reference}", "{prompt} {text}", "7")
    assert asked(TEMPLATE, sample) == (
        "Grade {prompt} {text} as an answer to {reference}; right is 7."
    )


class Scripted:
    """Answers in turn: a status with a body, or an error; and the pauses between them."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.pauses, self.now = [*answers], list[float](), 0.0

    def respond(self, _request: httpx.Request) -> httpx.Response:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, headers, body = answer
        return httpx.Response(status, headers=headers, json=body)

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def grade(self, num_samples: int = 1, **values: Any) -> tuple[float, ...]:
        judge = Judge(
            judging("http://judge/v1", max_in_flight=1, **values),
            transport=httpx.MockTransport(self.respond),
            pause=self.pause,
            clock=lambda: self.now,
        )
        with closing(judge):
            return graded(judge, samples(["x"] * num_samples)).scores


GOOD: tuple[int, dict[str, str], Any] = (200, {}, completion("score: 5"))


def test_what_may_pass_is_waited_for() -> None:
    script = Scripted(
        (429, {"Retry-After": "7"}, {}),
        (500, {}, {}),
        httpx.ReadTimeout("slow"),
        httpx.ConnectError("refused"),
        GOOD,
    )
    assert script.grade() == (0.5,)
    assert script.pauses == [7.0, 1.0, 2.0, 4.0]


def test_a_server_that_stays_away_is_an_error_and_no_score() -> None:
    script = Scripted((503, {}, {"error": "loading"}))
    with pytest.raises(GraderError, match=r"no answer in 60 s \(it answered 503: .*loading"):
        script.grade(9, patience_s=60)
    assert sum(script.pauses) <= 60  # the first request's: no other waits as long again
    with pytest.raises(GraderError, match="ConnectError: refused"):
        Scripted(httpx.ConnectError("refused")).grade()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_key_model_or_url_that_is_refused_is_the_users_to_correct(status: int) -> None:
    with pytest.raises(ConfigError, match=f"it answered {status}.*api_key_env"):
        Scripted((status, {}, {})).grade()


@pytest.mark.parametrize(
    "bad",
    [
        (400, {}, {"error": "too long"}),
        (200, {}, {"choices": []}),
        (200, {}, [1]),
        (200, {}, completion(None)),
        (200, {}, completion("I will not.")),
        (200, {}, completion("score: 99")),
    ],
)
def test_a_bad_answer_costs_its_sample_alone(bad: Any) -> None:
    assert Scripted(bad, GOOD).grade(2) == (0.0, 0.5)
    with pytest.raises(GraderError, match="failed on all 2 samples"):
        Scripted(bad).grade(2)


@pytest.mark.parametrize(("pattern", "words"), [("(", "no regular"), (r"\d+", "0 groups")])
def test_a_pattern_that_finds_no_score_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Scripted(GOOD).grade(score_pattern=pattern)


def test_an_answer_without_an_end_is_not_kept() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(1 << 20)

    def respond(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=endless())

    judge = Judge(
        judging("http://judge/v1", patience_s=1e-3), transport=httpx.MockTransport(respond)
    )
    with closing(judge), pytest.raises(GraderError, match="the answer is too long"):
        judge.grade(samples(["x"]))
