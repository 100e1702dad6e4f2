"""The grader `judge`: a score that a model gives, asked for at a server with OpenAI's chat API."""

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any

import httpx

from stillhouse.config.graders import JudgeSection
from stillhouse.errors import ConfigError, GraderError
from stillhouse.graders.base import Failure, Sample
from stillhouse.graders.identity import identity_of
from stillhouse.retry import pauses

_BLANK = re.compile(r"\{(prompt|text|reference)\}")
_MOST_ANSWER_BYTES = 4 << 20
_IS_JSON = {"Content-Type": "application/json"}
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0
_NOT_YET = {408, 409, 425, 429, *range(500, 600)}
_WRONG_SETTINGS = {401, 403, 404, 405}


class Judge:
    """See `JudgeSection`. `transport` is httpx's, for a server that is reached in another way."""

    def __init__(
        self,
        section: JudgeSection,
        *,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], None] = sleep,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Raises ConfigError where `score_pattern` is no pattern with a group."""
        self._section, self._pause, self._clock = section, pause, clock
        self._pattern = _compiled(section.score_pattern)
        self._client = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=section.answer_s,
            transport=transport,
        )
        self._is_given_up = threading.Event()  # by one request, and so by all
        self._threads = ThreadPoolExecutor(section.max_in_flight, thread_name_prefix="judge")

    @property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self._section)

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        """Raises GraderError where the server gives no answer for as long as patience lasts, and
        ConfigError where it refuses the key, the model or the URL: no sample is at fault then."""
        self._is_given_up.clear()
        return list(self._threads.map(self._score, samples))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _score(self, sample: Sample) -> float:
        question = asked(self._section.template, sample)
        answer = self._answer(
            {
                "model": self._section.model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": self._section.max_tokens,
                "temperature": 0.0,
            }
        )
        if isinstance(answer, Failure):
            return answer
        *_, last = [None, *self._pattern.finditer(answer)]
        if last is None:
            return Failure("no score in the answer", answer)
        return _share(last[1], of=self._section.best_score)

    def _answer(self, request: Mapping[str, Any]) -> str | Failure:
        """What the judge says to a request, which is sent again while an answer may come yet."""
        url = f"{self._section.url}/chat/completions"
        # until when
        end = self._clock() + self._section.patience_s
        pauses_s = pauses(_FIRST_PAUSE_S, last_s=_LAST_PAUSE_S)
        while True:
            wait_s = next(pauses_s)
            # an answer, or why there is none yet
            try:
                status, headers, body = self._posted(url, request)
                if status == 200:
                    return _content(body)
                found = f"it answered {status}: {body[:200].decode(errors='replace')}"
                if status in _WRONG_SETTINGS:
                    raise ConfigError(
                        f"the judge's server {self._section.url} refuses: {found}; check url, "
                        "model and the key that api_key_env names"
                    )
                if status not in _NOT_YET:
                    return Failure(f"refused with {status}", found)
                wait_s = max(wait_s, _seconds(headers.get("retry-after", "")))
            except httpx.HTTPError as error:
                found = f"{type(error).__name__}: {error}"
            # again
            if self._is_given_up.is_set() or self._clock() + wait_s > end:
                self._is_given_up.set()
                raise GraderError(
                    f"the judge's server {self._section.url} gave no answer in "
                    f"{self._section.patience_s:.0f} s ({found}); start it, or raise patience_s, "
                    "and run again: what is graded already stays"
                )
            self._pause(wait_s)

    def _posted(self, url: str, request: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """An answer of a bounded length, in a bounded time."""
        end = self._clock() + self._section.answer_s
        data = json.dumps(request).encode("ascii")  # a text may have halves of surrogate pairs
        with self._client.stream("POST", url, content=data, headers=_IS_JSON) as answer:
            body = bytearray()
            for part in answer.iter_bytes():
                body += part
                if len(body) > _MOST_ANSWER_BYTES:
                    raise httpx.DecodingError("the answer is too long")
                if self._clock() > end:
                    raise httpx.ReadTimeout("the answer takes too long")
            return answer.status_code, answer.headers, bytes(body)


def asked(template: str, sample: Sample) -> str:
    """A template with the sample's texts in its blanks. A blank within such a text stays as it
    is."""
    texts = {"prompt": sample.prompt, "text": sample.text, "reference": sample.reference or ""}
    return _BLANK.sub(lambda blank: texts[blank[1]], template)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"score_pattern is {pattern!r}, which is no regular expression: {error}; correct it"
        ) from None
    if compiled.groups != 1:
        raise ConfigError(
            f"score_pattern is {pattern!r}, which has {compiled.groups} groups; wanted one, around "
            "the score"
        )
    return compiled


def _content(body: bytes) -> str | Failure:
    """The text of a chat completion."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        return Failure("no chat completion", repr(error))
    return content if isinstance(content, str) else Failure("no text in the answer", repr(content))


def _share(digits: str, *, of: float) -> float:
    """A score as a part of the best one."""
    try:
        share = float(digits) / of
    except (ValueError, TypeError):
        return Failure("no score in the answer", repr(digits))
    return share if 0.0 <= share <= 1.0 else Failure("a score out of range", digits)


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header; 0 where it has none, or a date."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
