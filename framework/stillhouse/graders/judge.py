"""The grader `judge`: a score that a model gives, asked for at a server with OpenAI's chat API."""

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.config.graders import JudgeSection
from stillhouse.errors import ConfigError, TeacherError
from stillhouse.graders.base import Failure, Sample
from stillhouse.graders.identity import identity_of
from stillhouse.retry import Patience
from stillhouse.servers.chat import chat_question, reply_of
from stillhouse.servers.client import Access, Question, Server
from stillhouse.servers.desk import all_answers

_BLANK = re.compile(r"\{(prompt|text|reference)\}")


class Judge:
    """See `JudgeSection`."""

    def __init__(self, section: JudgeSection, access: Access) -> None:
        """Raises ConfigError where `score_pattern` is no pattern with a group."""
        self._section = section
        self._pattern = _compiled(section.score_pattern)
        self._server = Server(
            section,
            table=f"the grader {section.title}",
            access=access,
            patience=Patience(end_after_s=section.patience_s),
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self._section)

    def grade(self, samples: Sequence[Sample]) -> list[float]:
        """Raises ServerError where the server gives no answer for as long as patience lasts, or
        refuses the key, the model or the address, and where the limit of costs has no room: no
        sample is at fault then."""
        return all_answers(self._score, samples, num_threads=self._section.max_in_flight)

    def close(self) -> None:
        self._server.close()

    def _score(self, sample: Sample, stop: threading.Event) -> float:
        # what the judge says
        try:
            reply = self._server.ask(self._question(sample), read=reply_of, stop=stop)
        except TeacherError as error:  # at this one alone
            return Failure("refused", str(error))
        if not reply.text:
            return Failure("no text in the answer", reply.finish)

        # the score in it
        *_, last = [None, *self._pattern.finditer(reply.text)]
        if last is None:
            return Failure("no score in the answer", reply.text)
        return _share(last[1], of=self._section.best_score)

    def _question(self, sample: Sample) -> Question:
        messages = [{"role": "user", "content": asked(self._section.template, sample)}]
        fields: dict[str, Any] = {"max_tokens": self._section.max_tokens, "temperature": 0.0}
        return chat_question(messages, **(fields | self._section.request))


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


def _share(digits: str, *, of: float) -> float:
    """A score as a part of the best one."""
    try:
        share = float(digits) / of
    except (ValueError, TypeError):
        return Failure("no score in the answer", repr(digits))
    return share if 0.0 <= share <= 1.0 else Failure("a score out of range", digits)
