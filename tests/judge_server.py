"""A small server on 127.0.0.1 that speaks OpenAI's protocol: chat completions, completions with echo, models.

What it answers is a Python function from the request to a reply, so a test can be any model, or any trouble:

    with JudgeServer(chat=lambda request: "4") as server:
        judge = open_judge(EndpointConfig(base_url=server.url, model="m", answers=folder / "answers.sqlite"))

`script` comes before `chat` and `top`: a list of replies, one per request, until it is used up; None there means the
usual answer. Requests are counted and kept.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

__all__ = ["HTML", "JudgeServer", "Reply", "Seen", "last_user"]

HTML = "<!doctype html><html><body><h1>Welcome to nginx</h1></body></html>"


class Reply(NamedTuple):
    """A reply as it is sent, whatever the protocol says.

    `body` is JSON data, or a text that is sent as it is.
    """

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = {}
    seconds: float = 0.0
    """How long it takes."""


class Seen(NamedTuple):
    """A request as it came."""

    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]
    at: float
    """By the monotonic clock."""


def last_user(request: dict[str, Any]) -> str:
    """What the user said last."""
    return str(next(m["content"] for m in reversed(request["messages"]) if m["role"] == "user"))


def tokens_of(text: str, split_digits: bool = False) -> list[str]:
    """Words, numbers (or single digits) and single other characters: together they are the text."""
    return re.findall(r"[^\W\d_]+|\d|." if split_digits else r"[^\W\d_]+|\d+|.", text, re.S)


def even_top(text: str, token: str, before: str) -> dict[str, float]:
    """Zero to ten, all alike."""
    return {str(number): -math.log(11) for number in range(11)}


class JudgeServer:
    """The server, while the context lasts.

    Args:
        chat: From a chat request to the answer's text, to a dictionary that replaces parts of the choice
            (finish_reason, message), or to a `Reply`.
        top: Of a completion: from (prompt, token, text before the token) to the log-probabilities by token there.
        key: If given, requests must bear it.
        models: What it serves; None serves whatever it is asked for.
        script: Replies to the first requests.
        echo: Whether completions repeat their prompt with log-probabilities (llama.cpp does not).
        shape: Of a completion's log-probabilities: OpenAI's first one, or that of chats (llama.cpp).
        first_token: A token that stands before every prompt and counts in the offsets, as some servers' `<s>`.
        usage: Whether it says what a request cost.
        split_digits: Whether each digit is a token, as with Qwen2.5, Gemma or SmolLM2; `top` is to name single ones.
    """

    def __init__(
        self,
        chat: Callable[[dict[str, Any]], Any] = lambda request: "yes",
        top: Callable[[str, str, str], dict[str, float]] = even_top,
        *,
        key: str | None = None,
        models: Sequence[str] | None = None,
        script: Sequence[Reply | None] = (),
        echo: bool = True,
        shape: str = "completion",
        first_token: str = "",
        usage: bool = True,
        split_digits: bool = False,
    ) -> None:
        self.chat, self.top, self.key, self.models = chat, top, key, models
        self.script = list(script)
        self.echo, self.shape, self.first_token, self.usage = echo, shape, first_token, usage
        self.split_digits = split_digits
        self.seen: list[Seen] = []
        self.running, self.most_at_once = 0, 0

    @property
    def n_requests(self) -> int:
        """Completions and chat completions so far."""
        return len(self.seen)

    def __enter__(self) -> Self:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes),
            host="127.0.0.1",
            port=0,
            log_level="critical",
            lifespan="off",
            ws="none",
        )
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(config, started)), name="judge-server", daemon=True
        )
        self._thread.start()
        assert started.wait(timeout=30), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(timeout=10)

    async def _serve(self, config: uvicorn.Config, started: threading.Event) -> None:
        """uvicorn's own end takes a fifth of a second, which many small tests would feel."""
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        started.set()
        await self._closing.wait()
        for listening in server.servers:
            listening.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()

    async def _answered(self, request: Request, usual: Callable[[dict[str, Any]], Any]) -> Response:
        body = await request.json()
        self.seen.append(Seen(request.url.path, body, dict(request.headers), time.monotonic()))
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                given = request.headers.get("authorization", "nothing")
                return _sent(Reply(401, _error(f"Incorrect API key provided: {given}", "invalid_api_key")))
            reply = self.script.pop(0) if self.script else None
            if reply is None and self.models is not None and body.get("model") not in self.models:
                reply = Reply(
                    404, _error(f"The model `{body.get('model')}` does not exist", "model_not_found")
                )
            if reply is None:
                found = usual(body)
                reply = found if isinstance(found, Reply) else Reply(body=found)
            await asyncio.sleep(reply.seconds)
            return _sent(reply)
        finally:
            self.running -= 1

    async def _chat(self, request: Request) -> Response:
        def usual(body: dict[str, Any]) -> Any:
            found = self.chat(body)
            if isinstance(found, Reply):
                return found
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            if isinstance(found, dict):
                choice |= {"message": {"role": "assistant", "content": ""}} | found
            else:
                choice["message"] = {"role": "assistant", "content": found}
            n_prompt = sum(len(tokens_of(m["content"])) for m in body["messages"])
            text = choice["message"].get("content") or ""
            return self._whole("chat.completion", body, choice, n_prompt, len(tokens_of(text)))

        return await self._answered(request, usual)

    async def _completions(self, request: Request) -> Response:
        return await self._answered(request, self._completed)

    def _completed(self, body: dict[str, Any]) -> Any:
        prompt, n = str(body["prompt"]), body.get("logprobs")
        if body.get("echo") and not self.echo:
            return Reply(400, _error("Only no echo is supported", "invalid_request_error"))
        tokens = [*([self.first_token] if self.first_token else []), *tokens_of(prompt, self.split_digits)]
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token)
        tops: list[Any] = []
        for i, token in enumerate(tokens):
            before = (
                prompt[: offsets[i] - len(self.first_token)] if offsets[i] >= len(self.first_token) else ""
            )
            tops.append(None if i == 0 else _likeliest(self.top(prompt, token, before), n))
        after = _likeliest(self.top(prompt, "", prompt), n)
        said = max(after, key=lambda token: after[token]) if after else ""
        if not body.get("echo"):
            tokens, offsets, tops = [], [], []
        log_probs: dict[str, Any] | None = {
            "tokens": [*tokens, said],
            "text_offset": [*offsets, at],
            "token_logprobs": [None] * len(tokens) + [0.0],
            "top_logprobs": [*tops, after],
        }
        if self.shape == "chat":
            listed = [{"token": token, "logprob": value} for token, value in after.items()]
            log_probs = {"content": [{"token": said, "logprob": 0.0, "top_logprobs": listed}]}
        choice = {
            "index": 0,
            "text": (prompt if body.get("echo") else "") + said,
            "finish_reason": "length",
            "logprobs": log_probs if n else None,
        }
        return self._whole("text_completion", body, choice, len(tokens_of(prompt)), 1)

    def _whole(self, kind: str, body: dict[str, Any], choice: Any, n_prompt: int, n_completion: int) -> Any:
        told = {
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_completion,
                "total_tokens": n_prompt + n_completion,
            }
        }
        return {
            "id": f"{kind}-{self.n_requests}",
            "object": kind,
            "created": 0,
            "model": body.get("model"),
            "choices": [choice],
        } | (told if self.usage else {})

    async def _models(self, request: Request) -> Response:
        data = [{"id": name, "object": "model"} for name in self.models or ()]
        return JSONResponse({"object": "list", "data": data})


def _likeliest(top: Mapping[str, float], n: int | None) -> dict[str, float]:
    return dict(sorted(top.items(), key=lambda item: -item[1])[: n or 0])


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "code": code}}


def _sent(reply: Reply) -> Response:
    body = reply.body
    if body is None:
        body = _error(f"trouble {reply.status}", "trouble")
    if isinstance(body, str):
        headers = {"content-type": "text/html"} | dict(reply.headers)
        return Response(body, reply.status, headers)
    return Response(
        json.dumps(body), reply.status, {"content-type": "application/json"} | dict(reply.headers)
    )
