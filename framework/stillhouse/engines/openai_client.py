"""The client of a server that scores prompts: its requests, their price, and patience.

It is not OpenAI's own client, which gives up after a few tries, does not wait for as long as it is
asked to, and does not say what a time-out may have cost.
"""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import monotonic, time
from typing import Any, Protocol, TypeVar

import httpx

from stillhouse.config import ScoringSection
from stillhouse.engines.openai_scores import Document, Scores, scores_of
from stillhouse.errors import ServerError, StillhouseError, TeacherError
from stillhouse.retry import DEFAULT_PATIENCE, Patience, pauses

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_CONNECT_S = 30.0
_MOST_WORDS = 500  # characters of an answer that are quoted
_BUSY = (429, 503)  # answered before any work, so not charged
_OF_THE_PROMPT = (400, 413, 422)  # what one document may be at fault for
# of which no part can have reached a server
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class Money(Protocol):
    """What requests are paid from; a `Ledger` is one. Amounts are in nanodollars."""

    def reserve(self, price: int) -> None: ...

    def give_back(self, price: int) -> None: ...


class Free:
    """Money for requests that cost nothing."""

    def reserve(self, price: int) -> None: ...

    def give_back(self, price: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a server lists."""

    name: str
    max_tokens: int | None  # of a prompt and its answer together; None where it is not said


@dataclass(frozen=True, slots=True)
class _Later:
    """A try that failed, of which another may not."""

    reason: str
    is_charged: bool  # whether it may be
    after_s: float | None = None  # that the server asks to wait


class Server:
    """A server, asked by many threads of one process. Its key is in no repr and in no message.

    `clock` is in seconds from any beginning, `wall` in unix seconds.
    """

    def __init__(
        self,
        section: ScoringSection,
        *,
        api_key: str | None,
        patience: Patience = DEFAULT_PATIENCE,
        clock: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ServerError(
                f"the variable {section.api_key_env} holds no key: it has characters that no "
                "header may have; set it to the key alone, without a line's end"
            )
        self._section, self._patience = section, patience
        self._clock, self._wall = clock, wall
        self._client = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(section.timeout_s, connect=min(_CONNECT_S, section.timeout_s)),
            # A connection that is kept may be closed as a request is sent on it, and then nobody
            # knows whether that is charged.
            limits=httpx.Limits(max_connections=section.max_in_flight, max_keepalive_connections=0),
        )
        self._reading = threading.Lock()
        self._answered_at = clock()  # the last time
        self._first: tuple[str, str | None] | None = None  # the model and system of its answers

    def models(self) -> list[Model]:
        """The models that the server lists. Raises ServerError."""

        def send() -> list[Model] | _Later:
            return self._exchange("GET", "models", None, num_tokens=0, money=Free(), read=_models)

        return self._insist(send, threading.Event())

    def score(
        self,
        document: Document,
        *,
        num_entries: int,
        vocab_size: int,
        money: Money,
        stop: threading.Event,
    ) -> Scores:
        """The scores of a document: see `openai_scores`.

        The server is asked again, and paid again where it may have charged, for as long as that may
        help and `stop` is not set. Raises ServerError where no request can succeed, TeacherError
        where this document alone is at fault.
        """
        request = {
            "model": self._section.served_model,
            "prompt": document.token_ids_D.tolist(),
            "prompt_logprobs": num_entries,
            "max_tokens": 1,  # none is not allowed
            "temperature": 1.0,
        }

        def read(body: Any) -> Scores:
            self._require_same_model(body)
            return scores_of(body, document, num_entries=num_entries, vocab_size=vocab_size)

        def send() -> Scores | _Later:
            num_tokens = len(document.token_ids_D) + 1
            return self._exchange(
                "POST", "completions", request, num_tokens=num_tokens, money=money, read=read
            )

        return self._insist(send, stop)

    def _exchange(
        self,
        method: str,
        route: str,
        request: Any,
        *,
        num_tokens: int,
        money: Money,
        read: Callable[[Any], _Answer],
    ) -> _Answer | _Later:
        """One request, with its worst price set aside before it is sent, and what it did not cost
        given back. Returns what `read` makes of the answer's JSON, or a _Later."""
        price = self._price(num_tokens)
        money.reserve(price)
        reply = self._reply(method, route, request)

        # not answered, or refused
        if isinstance(reply, _Later):
            if not reply.is_charged:
                money.give_back(price)
            return reply
        if reply.status_code != httpx.codes.OK:
            money.give_back(price)
            raise self._refusal(reply)

        # answered: parsed, a long prompt takes a hundred times its bytes, so one at a time
        with self._reading:
            body = _json_of(reply)
            charged = _num_charged(body, otherwise=num_tokens)
            money.give_back(price - self._price(charged))
            if charged > num_tokens and price > 0:
                raise ServerError(
                    f"the server charged {charged} tokens for a prompt of {num_tokens - 1} ids and "
                    "one token more, so no limit of costs can be kept; wanted one that adds "
                    "nothing to a prompt: take another, or set usd_per_million_tokens to 0"
                )
            return read(body)

    def _reply(self, method: str, route: str, request: Any) -> httpx.Response | _Later:
        """The server's reply, or why there may be another one later."""
        url = f"{self._section.base_url}/{route}"
        try:
            reply = self._client.request(method, url, json=request)
        except httpx.InvalidURL as error:
            raise ServerError(f"{url} is no address ({error}); mend base_url") from None
        except _NOT_SENT as error:
            return _Later(_words_of(error), is_charged=False)
        except httpx.RequestError as error:
            return _Later(_words_of(error), is_charged=True)
        status = reply.status_code
        if status in _BUSY or status == httpx.codes.REQUEST_TIMEOUT or status >= 500:
            reason = f"status {status}: {_quoted(reply.text)}"
            return _Later(reason, is_charged=status not in _BUSY, after_s=self._asks_for(reply))
        return reply

    def _refusal(self, reply: httpx.Response) -> StillhouseError:
        """What a reply means that no other try can mend."""
        words = (
            f"the server refuses {reply.request.url}: status {reply.status_code}: "
            f"{_quoted(reply.text)}"
        )
        if reply.status_code in _OF_THE_PROMPT:
            return TeacherError(f"{words}; wanted log-probabilities for a prompt of token ids")
        return ServerError(
            f"{words}; check teacher.openai: base_url, served_model, and the key in the variable "
            f"{self._section.api_key_env}"
        )

    def _insist(self, send: Callable[[], _Answer | _Later], stop: threading.Event) -> _Answer:
        """What `send` returns, which is repeated while it returns a _Later."""
        began, told = self._clock(), False
        pauses_s = pauses(self._patience.first_pause_s, last_s=self._patience.last_pause_s)
        while True:
            answer = send()
            if not isinstance(answer, _Later):
                self._answered_at = self._clock()
                return answer

            # wait for as long as the server asks, or ever longer
            pause_s, lasted_s = next(pauses_s), self._clock() - began
            pause_s = pause_s if answer.after_s is None else max(pause_s, answer.after_s)
            if lasted_s + pause_s > self._patience.end_after_s:
                raise self._given_up(answer, lasted_s, pause_s, began)
            if lasted_s >= self._patience.tell_after_s and not told:
                told = True
                _log.warning("the server has not answered for %.0f s: %s", lasted_s, answer.reason)
            if stop.wait(pause_s):
                raise ServerError("this request is given up, since another one failed")

    def _given_up(
        self, last: _Later, lasted_s: float, pause_s: float, began: float
    ) -> StillhouseError:
        words = (
            f"{self._section.base_url} has not answered for {lasted_s:.0f} s, and the next try "
            f"would be in {pause_s:.0f} s, last: {last.reason}; it is given up after "
            f"{self._patience.end_after_s:.0f} s"
        )
        if self._answered_at > began:  # other requests meanwhile
            return TeacherError(f"{words}, while it answers others")
        return ServerError(
            f"{words}. All that was published stays: mend the server, and run again to go on from "
            "there"
        )

    def _require_same_model(self, body: Any) -> None:
        """Raise ServerError unless an answer is of the model that gave the first one."""
        values = body if isinstance(body, dict) else {}
        found = (str(values.get("model", "")), values.get("system_fingerprint"))
        first = self._first = self._first or found  # one answer is read at a time
        for name, before, now in zip(("model", "system_fingerprint"), first, found, strict=True):
            if now != before and None not in (now, before):
                raise ServerError(
                    f"the server has changed under the run: its answers' {name} is {now!r}, but it "
                    f"was {before!r}; what it said before stays. Serve that one again to go on, or "
                    "name the new one in teacher.openai.served_model or teacher.revision: it is "
                    "another teacher"
                )

    def _price(self, num_tokens: int) -> int:
        """Nanodollars, rounded up."""
        return math.ceil(num_tokens * self._section.usd_per_million_tokens * 1000)

    def _asks_for(self, reply: httpx.Response) -> float | None:
        """The seconds of Retry-After, which is a number or a date."""
        text = reply.headers.get("Retry-After", "")
        try:
            return max(0.0, float(text))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - self._wall())
        except (ValueError, TypeError):
            return None


def _json_of(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except (ValueError, RecursionError):
        raise ServerError(
            f"{reply.request.url} answers no JSON: {_quoted(reply.text)}; wanted the address of "
            "OpenAI's routes, such as http://10.0.0.5:8000/v1"
        ) from None


def _models(body: Any) -> list[Model]:
    try:
        found = [(str(card["id"]), card.get("max_model_len")) for card in body["data"]]
        return [Model(name, most if type(most) is int else None) for name, most in found]
    except (KeyError, TypeError, AttributeError):
        raise ServerError(
            f"the server lists no models: {_quoted(str(body))}; wanted the address of OpenAI's "
            "routes in teacher.openai.base_url, such as http://10.0.0.5:8000/v1"
        ) from None


def _num_charged(body: Any, *, otherwise: int) -> int:
    usage = body.get("usage") if isinstance(body, dict) else None
    found = usage.get("total_tokens") if isinstance(usage, dict) else None
    return found if type(found) is int and found >= 0 else otherwise


def _words_of(error: httpx.RequestError) -> str:
    return f"{type(error).__name__}: {error}"


def _quoted(text: str) -> str:
    return text.strip()[:_MOST_WORDS] or "(nothing)"
