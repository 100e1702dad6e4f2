"""The client of a server with OpenAI's routes: its requests, their price, and patience.

It is not OpenAI's own client, which gives up after a few tries, does not wait for as long as it is
asked to, and does not say what a time-out may have cost.
"""

import json
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from email.utils import parsedate_to_datetime
from time import monotonic, time
from typing import Any, NamedTuple, Protocol, TypeVar

import httpx

from stillhouse.config import ServerSection
from stillhouse.errors import ServerError, StillhouseError, TeacherError
from stillhouse.retry import DEFAULT_PATIENCE, Patience, pauses
from stillhouse.servers.served import Served

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

BEFORE_A_RUN = Patience(end_after_s=30.0, last_pause_s=5.0)  # somebody waits for it
_CONNECT_S = 30.0
_MOST_WORDS = 500  # characters of an answer that are quoted
_LIST_BYTES = 64 << 20  # of a list of models at most
_BUSY = (429, 503)  # answered before any work, so not charged
_LATER = (408, 409, 425)  # another try may do, as after any 5xx
_OF_THE_PROMPT = (400, 413, 422)  # what one prompt may be at fault for
# of which no part can have reached a server
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_IS_JSON = {"Content-Type": "application/json"}


class Money(Protocol):
    """What requests are paid from; a `Ledger` is one. Amounts are in nanodollars."""

    def reserve(self, price: int) -> None: ...

    def give_back(self, price: int) -> None: ...

    def granted_usd(self) -> float:
        """What is spent, or reserved; 0 where there is no limit."""
        ...


class Free:
    """Money for requests that cost nothing."""

    def reserve(self, price: int) -> None: ...

    def give_back(self, price: int) -> None: ...

    def granted_usd(self) -> float:
        return 0.0


class Tokens(NamedTuple):
    """Numbers of tokens that are charged: of a prompt, and of what is written to it."""

    prompt: int
    written: int


@dataclass(frozen=True, slots=True)
class Access:
    """How one process may ask a server. Its key is in no repr."""

    api_key: str | None = field(default=None, repr=False)
    money: Money = field(default_factory=Free)
    # the model of the first answer of all, when it is told that of this process's first
    first: Callable[[Served], Served] = lambda found: found


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and the most that its answer may be."""

    route: str
    fields: dict[str, Any]
    most_tokens: Tokens
    most_bytes: int
    wanted: str  # what the server must be able to, for a refusal


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

    `table`: the config's that names it. `clock` is in seconds from any beginning, `wall` in unix
    seconds.
    """

    def __init__(
        self,
        section: ServerSection,
        *,
        table: str,
        access: Access,
        patience: Patience = DEFAULT_PATIENCE,
        clock: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ) -> None:
        api_key = access.api_key
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ServerError(
                f"the variable {section.api_key_env} holds no key: it has characters that no "
                "header may have; set it to the key alone, without a line's end"
            )
        self._section, self._table, self._patience = section, table, patience
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
        self._money, self._first_of = access.money, access.first
        self._first: Served | None = None

    def models(self) -> list[Model]:
        """The models that the server lists. Raises ServerError."""
        question = Question("models", {}, Tokens(0, 0), _LIST_BYTES, "a list of models")
        return self._insist(
            lambda: self._exchange("GET", question, read=self._models_of),
            threading.Event(),
        )

    def only_model(self) -> str:
        """The model that the server lists. Raises ServerError where there is not exactly one."""
        names = [model.name for model in self.models()]
        if len(names) != 1:
            raise ServerError(
                f"{self._section.base_url} lists {len(names)} models: "
                f"{', '.join(names[:20]) or 'none'}; wanted one: name it in "
                f"{self._table}.served_model"
            )
        return names[0]

    def ask(
        self, question: Question, *, read: Callable[[Any], _Answer], stop: threading.Event
    ) -> _Answer:
        """What `read` makes of the JSON of an answer by the section's model.

        The server is asked again, and paid again where it may have charged, for as long as that may
        help and `stop` is not set. Raises ServerError where no request can succeed, TeacherError
        where this one alone is at fault, and what `read` raises.
        """
        fields = {"model": self._section.served_model} | question.fields

        def of_the_same_model(body: Any) -> _Answer:
            self._require_same_model(body)
            return read(body)

        asked = replace(question, fields=fields)
        return self._insist(lambda: self._exchange("POST", asked, read=of_the_same_model), stop)

    def close(self) -> None:
        self._client.close()

    def _exchange(
        self, method: str, question: Question, *, read: Callable[[Any], _Answer]
    ) -> _Answer | _Later:
        """One request, with its worst price set aside before it is sent, and what it did not cost
        given back. Returns what `read` makes of the answer's JSON, or a _Later."""
        price = self._price(question.most_tokens)
        self._money.reserve(price)
        reply = self._reply(method, question)

        # not answered, or refused
        if isinstance(reply, _Later):
            if not reply.is_charged:
                self._money.give_back(price)
            return reply
        if reply.status_code != httpx.codes.OK:
            self._money.give_back(price)
            raise self._refusal(reply, wanted=question.wanted)

        # answered: parsed, a long answer takes a hundred times its bytes, so one at a time
        with self._reading:
            body = _json_of(reply)
            charged = _charged(body, otherwise=question.most_tokens)
            cost = self._price(charged)
            self._money.give_back(price - cost)
            if cost > price:
                raise ServerError(
                    f"the server charged {charged.prompt} tokens for a prompt and "
                    f"{charged.written} for what it wrote, where at most "
                    f"{question.most_tokens.prompt} and {question.most_tokens.written} were "
                    "possible, so no limit of costs can be kept; wanted one that adds nothing to a "
                    f"prompt: take another, or set the prices of {self._table} to 0"
                )
            return read(body)

    def _reply(self, method: str, question: Question) -> httpx.Response | _Later:
        """The server's reply, whole, or why there may be another one later."""
        url = f"{self._section.base_url}/{question.route}"
        # JSON in ASCII: a text may have halves of surrogate pairs
        data = json.dumps(question.fields).encode("ascii") if method == "POST" else None
        end = self._clock() + self._section.timeout_s
        try:
            with self._client.stream(method, url, content=data, headers=_IS_JSON) as reply:
                body = bytearray()
                for part in reply.iter_bytes():
                    body += part
                    if len(body) > question.most_bytes:
                        raise httpx.DecodingError(f"more than {question.most_bytes:,} bytes")
                    if self._clock() > end:
                        raise httpx.ReadTimeout("the answer takes too long")
            reply = httpx.Response(
                reply.status_code,
                headers={"Retry-After": reply.headers.get("Retry-After", "")},
                content=bytes(body),
                request=reply.request,
            )
        except httpx.InvalidURL as error:
            raise ServerError(f"{url} is no address ({error}); mend base_url") from None
        except _NOT_SENT as error:
            return _Later(_words_of(error), is_charged=False)
        except httpx.RequestError as error:
            return _Later(_words_of(error), is_charged=True)
        status = reply.status_code
        if status in _BUSY or status in _LATER or status >= 500:
            reason = f"status {status}: {_quoted(reply.text)}"
            return _Later(reason, is_charged=status not in _BUSY, after_s=self._asks_for(reply))
        return reply

    def _refusal(self, reply: httpx.Response, *, wanted: str) -> StillhouseError:
        """What a reply means that no other try can mend."""
        words = (
            f"the server refuses {reply.request.url}: status {reply.status_code}: "
            f"{_quoted(reply.text)}"
        )
        if reply.status_code in _OF_THE_PROMPT:
            return TeacherError(f"{words}; wanted {wanted}")
        return ServerError(
            f"{words}; check {self._table}: base_url, served_model, and the key in the variable "
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
        found = Served.by(body)
        first = self._first = self._first or self._first_of(found)  # one answer is read at a time
        for name, before in asdict(first).items():
            now = getattr(found, name)
            if now != before and None not in (now, before):
                raise ServerError(
                    f"the server has changed under the run: its answers' {name} is {now!r}, but it "
                    f"was {before!r}; what it said before stays. Serve that one again to go on, or "
                    f"name the new one, by served_model of {self._table} or by a revision: it is "
                    "another model"
                )

    def _models_of(self, body: Any) -> list[Model]:
        try:
            found = [(str(card["id"]), card.get("max_model_len")) for card in body["data"]]
            return [Model(name, most if type(most) is int else None) for name, most in found]
        except (KeyError, TypeError, AttributeError):
            raise ServerError(
                f"the server lists no models: {_quoted(str(body))}; wanted the address of OpenAI's "
                f"routes in {self._table}.base_url, such as http://10.0.0.5:8000/v1"
            ) from None

    def _price(self, tokens: Tokens) -> int:
        """Nanodollars, rounded up."""
        prompt_usd, written_usd = self._section.usd_in_and_out
        return math.ceil((tokens.prompt * prompt_usd + tokens.written * written_usd) * 1000)

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


def _charged(body: Any, *, otherwise: Tokens) -> Tokens:
    """What an answer says that it costs; where it does not, the most that it can. A mere sum counts
    as written, which is dearer than a prompt."""
    usage = body.get("usage") if isinstance(body, dict) else None
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    told = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    prompt, written, total = (each if type(each) is int and each >= 0 else None for each in told)
    if prompt is not None and written is not None:
        return Tokens(prompt, written)
    if total is not None:
        return Tokens(prompt or 0, max(0, total - (prompt or 0)))
    return otherwise


def _words_of(error: httpx.RequestError) -> str:
    return f"{type(error).__name__}: {error}"


def _quoted(text: str) -> str:
    return text.strip()[:_MOST_WORDS] or "(nothing)"
