"""A server of the tests' own that scores prompts by their ids, as vLLM's does, and writes, as any
with OpenAI's API does, on loopback.

It keeps a book of what it charges. It is busy, fails, is silent, breaks off, or changes its answers
where a test says so.

Shapes: D tokens of a prompt, V vocabulary.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import connection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Answer = dict[str, Any]


@dataclass(frozen=True)
class Teller:
    """How a server tells log-probabilities of what it writes. `names`: the bytes of each id;
    `prompt_ids`: of a request."""

    ids_of: Callable[[str], list[int]]
    names: Mapping[int, bytes]
    prompt_ids: Callable[[Answer], list[int]] = lambda _request: [5]
    end_id: int | None = None  # that is told as well, as vLLM's server does


class Fault(NamedTuple):
    """What is done with one request instead of an answer."""

    kind: Literal["status", "silent", "cut", "endless"]
    status: int = 500
    retry_after: str | None = None
    is_charged: bool = True


def busy(retry_after: str | None = None) -> Fault:
    return Fault("status", 429, retry_after, is_charged=False)


@dataclass(eq=False)
class PromptServer:
    """`logprobs_of`: the log-probabilities after each token of a prompt, [D, V]. `reply`: what is
    written to a request without `prompt_logprobs`, and why it ends."""

    logprobs_of: Callable[[list[int]], Tensor]
    reply: Callable[[Answer], tuple[str, str]] = lambda _request: ("", "stop")
    teller: Teller | None = None  # None: it tells nothing
    names: tuple[str, ...] = ("toy",)
    max_model_len: int | None = None
    key: str | None = None  # that a request must have
    # of the next requests, one each; None is an answer
    faults: deque[Fault | None] = field(default_factory=deque)
    # of an answer, before it is sent; and what happens before a request is looked at
    changed: Callable[[Answer], Answer] = lambda answer: answer
    arrived: Callable[[list[int]], None] = lambda _prompt: None
    requests: list[Answer] = field(default_factory=list)  # all, with their route
    num_charged: int = 0  # tokens
    num_now: int = 0  # requests that are being answered, and the most that ever were
    num_most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)  # at its end
    base_url: str = ""

    @property
    def prompts(self) -> list[list[int]]:
        """Of all requests."""
        return [request["prompt"] for request in self.requests]

    @contextmanager
    def running(self) -> Iterator["PromptServer"]:
        server = _Server(("127.0.0.1", 0), _Handler)
        server.behaviour = self
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.base_url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def scored(self, request: Answer) -> Answer:
        """vLLM's answer."""
        prompt, num_entries = request["prompt"], request["prompt_logprobs"]
        with self.lock:
            logprobs_DV = self.logprobs_of(prompt)
        top = logprobs_DV.topk(num_entries, dim=1)
        listed: list[Answer | None] = [None]
        for at, token in enumerate(prompt[1:]):
            ids = {token: float(logprobs_DV[at, token])}
            ids |= dict(zip(top.indices[at].tolist(), top.values[at].tolist(), strict=True))
            listed.append({str(each): {"logprob": value} for each, value in ids.items()})
        num_tokens = len(prompt) + 1
        usage = {"prompt_tokens": len(prompt), "total_tokens": num_tokens}
        return {
            "model": request["model"],
            "choices": [{"index": 0, "text": "", "prompt_logprobs": listed}],
            "usage": usage,
        }

    def written(self, request: Answer) -> Answer:
        """An answer that costs a token for each byte of its JSON, and ten around a prompt."""
        text, finish = self.reply(request)
        choice: Answer = {"index": 0, "finish_reason": finish}
        if request.get("logprobs") and self.teller is not None:
            choice["logprobs"] = self.told(request, text, finish, self.teller)
        is_chat = "messages" in request
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        num_asked, num_written = num_tokens_of(request), len(text.encode(errors="replace"))
        usage = {"prompt_tokens": num_asked, "completion_tokens": num_written}
        return {"model": request["model"], "choices": [choice | said], "usage": usage}

    def told(self, request: Answer, text: str, finish: str, teller: Teller) -> Answer:
        """Token by token: of a chat with bytes, of a text without."""
        # what was sampled, and the likeliest in the place of each
        prompt, ids = teller.prompt_ids(request), teller.ids_of(text)
        ids += [teller.end_id] if finish == "stop" and teller.end_id is not None else []
        is_chat = "messages" in request
        num_top = request["top_logprobs"] if is_chat else request["logprobs"]
        with self.lock:
            logprobs_NV = self.logprobs_of(prompt + ids)[len(prompt) - 1 : -1]
        top = logprobs_NV.topk(num_top, dim=1)
        sampled = [float(logprobs_NV[place, token]) for place, token in enumerate(ids)]
        tops = [
            [*zip(entries, values, strict=True)]
            for entries, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

        # in the form of either route
        names = {number: name.decode(errors="replace") for number, name in teller.names.items()}
        if not is_chat:
            return {
                "tokens": [names[token] for token in ids],
                "token_logprobs": sampled,
                "top_logprobs": [
                    {names[each]: value for each, value in [*pairs, (token, own)]}
                    for pairs, token, own in zip(tops, ids, sampled, strict=True)
                ],
            }

        def entry(token: int, logprob: float) -> Answer:
            name = teller.names[token]
            return {"token": names[token], "logprob": logprob, "bytes": [*name]}

        content = [
            entry(token, own) | {"top_logprobs": [entry(*pair) for pair in pairs]}
            for pairs, token, own in zip(tops, ids, sampled, strict=True)
        ]
        return {"content": content}


def killed_at_request(
    server: PromptServer, number: int, target: Callable[..., None], *arguments: object
) -> int | None:
    """The exit code of a process that runs `target`, and is killed when a request of this number
    arrives, from 1: it gets no answer."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)

    def arrived(_prompt: list[int]) -> None:
        if len(server.requests) == number:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            connection.wait([process.sentinel])  # it is not reaped here, in another thread

    server.arrived = arrived
    process.start()
    process.join()
    return process.exitcode


def num_tokens_of(request: Answer) -> int:
    """Of a prompt, as this server counts them."""
    if "prompt_logprobs" in request:
        return len(request["prompt"]) + 1
    asked = [message["content"] for message in request.get("messages", [])]
    return 10 + len("".join(asked or [request["prompt"]]).encode(errors="replace"))


def flat(prompt: list[int], *, vocab_size: int = 300) -> Tensor:
    """A distribution that depends on the token alone; no model has to be loaded for it."""
    ids_DV = torch.tensor(prompt)[:, None] * 31 + torch.arange(vocab_size) * 17
    return ((ids_DV % 101) / 25.0).log_softmax(dim=1)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    behaviour: PromptServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        here = self.server.behaviour
        cards = [{"id": name, "max_model_len": here.max_model_len} for name in here.names]
        self._answer(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        here = self.server.behaviour
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if here.key is not None and self.headers["Authorization"] != f"Bearer {here.key}":
            return self._answer(401, {"error": "this key is not known"})
        with here.lock:
            here.requests.append(request | {"route": self.path})
            fault = here.faults.popleft() if here.faults else None
            here.num_now += 1
            here.num_most = max(here.num_most, here.num_now)
            if fault is None or fault.is_charged:
                here.num_charged += num_tokens_of(request)
        try:
            here.arrived(request.get("prompt", []))
            return self._misbehave(fault) if fault else self._reply(request)
        finally:
            with here.lock:
                here.num_now -= 1

    def _reply(self, request: Answer) -> None:
        here = self.server.behaviour
        answer = here.scored if "prompt_logprobs" in request else here.written
        self._answer(200, here.changed(answer(request)))

    def _misbehave(self, fault: Fault) -> None:
        if fault.kind == "silent":
            self.server.behaviour.released.wait()
        if fault.kind == "endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            with suppress(OSError):
                while not self.server.behaviour.released.is_set():
                    self.wfile.write(bytes(1 << 20))
        if fault.kind != "status":
            self.close_connection = True
            return
        headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
        self._answer(fault.status, {"error": "not now"}, headers)

    def _answer(self, status: int, body: Answer, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quietly."""
