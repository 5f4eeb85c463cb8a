"""A server that speaks OpenAI's protocol, asked many questions at a time. Knows nothing of caches and prices.

Requests are sent again when the server is busy, ill, silent, or says something that is no answer; what a second try
cannot mend (a refused key, an unknown model, a prompt too long) ends at once, and so does a server that nobody ever
reached. The key is read from the environment when the first question is sent, and shown nowhere.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from sememe.config import sha256_of
from sememe.errors import JudgeError, ResourceError, nearest
from sememe.judge import replies
from sememe.judge.base import Answer, Question, SlotQuestion, Slots, Usage
from sememe.judge.budget import charge, tokens_at_most
from sememe.judge.config import EndpointConfig

__all__ = ["Endpoint"]

T = TypeVar("T")

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_CONNECT_SECONDS = 5.0
_FIRST_CONTACT_RETRIES = 1
"""How often a server that was never reached is tried again: a user who mistyped an address waits for the answer."""


class _Connection(NamedTuple):
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: Any
    free: asyncio.Semaphore


class _Again(Exception):
    """A failure that a second try may mend; `error` is what to say if it does not."""

    def __init__(self, error: JudgeError, wait: float | None = None, never_reached: bool = False) -> None:
        super().__init__()
        self.error, self.wait, self.never_reached = error, wait, never_reached


class Endpoint:
    """A `Judge` behind a URL.

    Args:
        config: Where it is, and how to ask it.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.name = f"{config.model} at {config.base_url}"
        self.fingerprint = sha256_of(config.identity())
        self.n_retries = 0
        self._connection: _Connection | None = None
        self._key: str | None = None
        self._jitter = random.Random(0)
        self._reached = False
        self._hopeless: JudgeError | None = None
        self._not_before = 0.0
        self._limit_field = "max_tokens"

    async def ask(self, question: Question) -> Answer:
        """Go on with a conversation.

        Raises:
            JudgeError: it cannot be reached, refuses, or keeps saying what is no answer.
            ResourceError: the package openai is missing.
        """
        fields: dict[str, Any] = {"temperature": question.temperature}
        if question.temperature > 0:
            fields["seed"] = question.seed
        if question.stop:
            fields["stop"] = list(question.stop)
        for name in self.config.leave_out:
            fields.pop(name, None)
        messages = [{"role": message.role, "content": message.content} for message in question.messages]

        async def send(client: Any) -> Any:
            return await client.chat.completions.with_raw_response.create(
                model=self.config.model,
                messages=messages,
                **{self._limit_field: question.max_tokens},
                **fields,
                extra_body=json.loads(self.config.extra_body or "null"),
            )

        text, finish, usage = await self._send(
            send, replies.chat, f"{self.config.base_url}/chat/completions", self.estimate(question)
        )
        if usage is None:
            usage = self.estimate(question)._replace(n_completion_tokens=self.count_tokens(text))
        return Answer(text, finish, usage)

    async def slots(self, question: SlotQuestion) -> Slots:
        """Distributions at places of a text, among the `n_log_probs` likeliest tokens of each.

        Of single tokens, as the server names them: `OpenJudge` tells choices apart that begin with the same token.

        Raises:
            JudgeError: as `ask`; or the server does not tell the log-probabilities of a prompt.
        """
        if self._separately(question):
            found = [await self._next_token(question.text[:slot]) for slot in question.slots]
            distributions = [top for top, _ in found]
            usage = Usage(
                sum(u.n_prompt_tokens for _, u in found),
                sum(u.n_completion_tokens for _, u in found),
                n_calls=len(found),
            )
        else:
            top_by_offset, told = await self._complete(
                question.text, True, lambda reply: replies.echoed(reply, question.text)
            )
            missing = [slot for slot in question.slots if slot not in top_by_offset]
            if missing:
                raise JudgeError(
                    "a token must begin at each place whose distribution is asked for",
                    f"none at character {missing[0]} of a prompt, for {self.name}",
                    "Ask with slots = 'one_by_one', or use a judge with another tokenizer.",
                )
            distributions = [top_by_offset[slot] for slot in question.slots]
            usage = told or self.estimate(question)
        return Slots(
            tuple(
                {choice: top[choice] for choice in question.choices if choice in top} for top in distributions
            ),
            usage,
        )

    def parts(self, question: SlotQuestion) -> list[SlotQuestion]:
        """Questions of one request each that come to the same: what an interrupted run keeps."""
        if not self._separately(question):
            return [question]
        return [SlotQuestion(question.text[:slot], (slot,), question.choices) for slot in question.slots]

    def count_tokens(self, text: str) -> int:
        """How many tokens a text costs at most; the server's tokenizer is not known here."""
        return tokens_at_most(text)

    def estimate(self, question: Question | SlotQuestion) -> Usage:
        """What a question will cost at most."""
        if isinstance(question, Question):
            # Four tokens around each message, three before the answer.
            prompt = sum(self.count_tokens(message.content) + 4 for message in question.messages) + 3
            return Usage(prompt, question.max_tokens)
        if self._separately(question):
            prompts = [self.count_tokens(question.text[:slot]) for slot in question.slots]
            return Usage(sum(prompts), len(prompts), n_calls=len(prompts))
        return Usage(self.count_tokens(question.text), 1)

    async def close(self) -> None:
        """Close the connections; a new question opens new ones."""
        connection, self._connection, self._hopeless = self._connection, None, None
        if connection is not None and connection.loop is asyncio.get_running_loop():
            await connection.client.close()

    # ---- one request ----------------------------------------------------------------------------------------

    def _separately(self, question: SlotQuestion) -> bool:
        """Whether each place has a request of its own; what follows the whole text needs no echo."""
        return self.config.slots == "one_by_one" or set(question.slots) == {len(question.text)}

    async def _next_token(self, prompt: str) -> tuple[Mapping[str, float], Usage]:
        top, told = await self._complete(prompt, False, replies.next_token)
        return top, told or Usage(self.count_tokens(prompt), 1)

    async def _complete(self, prompt: str, echo: bool, read: Callable[[Any], T]) -> T:
        """A completion of one token: more servers allow one than none."""

        async def send(client: Any) -> Any:
            return await client.completions.with_raw_response.create(
                model=self.config.model,
                prompt=prompt,
                max_tokens=1,
                temperature=0,
                logprobs=self.config.n_log_probs,
                **({"echo": True} if echo else {}),
            )

        return await self._send(
            send, read, f"{self.config.base_url}/completions", Usage(self.count_tokens(prompt), 1), slots=True
        )

    async def _send(
        self,
        send: Callable[[Any], Any],
        read: Callable[[Any], T],
        place: str,
        expected: Usage,
        slots: bool = False,
    ) -> T:
        """One request, and again until it is answered or there is no use in it."""
        connection = self._open()
        async with connection.free:
            tries = 0
            while True:
                while (left := self._not_before - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                if self._hopeless is not None:
                    error = self._hopeless
                    raise JudgeError(error.rule, error.value, error.remedy)
                try:
                    return await self._once(connection.client, send, read, place, expected, slots)
                except _Again as failure:
                    wait = self._wait_after(failure, tries)
                    tries += 1
                    self.n_retries += 1
                    await asyncio.sleep(wait)

    def _wait_after(self, failure: _Again, tries: int) -> float:
        """Seconds until the next try; raises the failure's error when there shall be none."""
        config = self.config
        allowed = (
            min(config.max_retries, _FIRST_CONTACT_RETRIES) if failure.never_reached else config.max_retries
        )
        if tries >= allowed:
            error = failure.error
            last = JudgeError(error.rule, f"{error.value} (tried {tries + 1} times)", error.remedy)
            raise (self._end(last) if failure.never_reached else last) from None
        if failure.wait is not None:
            if failure.wait > config.max_wait_seconds:
                error = JudgeError(
                    f"a server must be ready again within max_wait_seconds = {config.max_wait_seconds:g}",
                    f"{config.base_url}, which asks to wait {failure.wait:.0f} seconds",
                    "Run again later: every answer so far is kept. Or raise max_wait_seconds.",
                )
                raise self._end(error) from None
            # The server speaks of itself, not of one question: nobody asks before.
            self._not_before = max(self._not_before, time.monotonic() + failure.wait)
            return 0.0
        first = min(config.backoff_seconds, 0.2) if failure.never_reached else config.backoff_seconds
        return float(min(first * 2**tries, config.max_wait_seconds) * self._jitter.uniform(0.5, 1.0))

    async def _once(
        self,
        client: Any,
        send: Callable[[Any], Any],
        read: Callable[[Any], T],
        place: str,
        expected: Usage,
        slots: bool,
    ) -> T:
        import openai

        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                response = await send(client)
                body = response.http_response.text
        except (TimeoutError, openai.APITimeoutError):
            charge(expected)  # it may have been answered, and billed, all the same
            raise _Again(
                JudgeError(
                    f"{place} must answer within timeout_seconds = {self.config.timeout_seconds:g}",
                    "no answer",
                    "See whether the server is well; raise timeout_seconds, or lower concurrency.",
                )
            ) from None
        except openai.APIConnectionError as error:
            raise _Again(self._unreachable(error), never_reached=not self._reached) from None
        except openai.APIStatusError as error:
            self._reached = True
            raise await self._status(client, error, place, slots) from None
        self._reached = True
        reply = None
        try:
            reply = replies.parsed(body, response.http_response.headers.get("content-type", ""))
            return read(reply)
        except replies.NotAnAnswer as error:
            charge(replies.usage(reply) or expected)
            raise _Again(
                JudgeError(
                    f"{error.rule} in the answer of {place}",
                    self._clean(error.value),
                    "See what the server says, and whether base_url leads to its OpenAI-compatible interface.",
                )
            ) from None
        except replies.NoLogProbs as error:
            charge(replies.usage(reply) or expected)
            raise self._no_log_probs(self._clean(str(error))) from None

    def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if self._connection is None or self._connection.loop is not loop:
            try:
                import openai
            except ImportError:
                raise ResourceError(
                    "the package openai must be installed to ask a server",
                    "none",
                    "pip install 'sememe[llm]', or ask a local model.",
                ) from None
            seconds = self.config.timeout_seconds
            self._hopeless = None
            self._key = self._key_from_environment()
            timeout = openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
            # A proxy of the environment leads away from this machine, whatever NO_PROXY says.
            here = urlsplit(self.config.base_url).hostname in ("localhost", "127.0.0.1", "::1")
            client = openai.AsyncOpenAI(
                base_url=self.config.base_url,
                api_key=self._key or "none",
                max_retries=0,
                timeout=timeout,
                http_client=openai.DefaultAsyncHttpxClient(timeout=timeout, trust_env=False)
                if here
                else None,
            )
            self._connection = _Connection(loop, client, asyncio.Semaphore(self.config.concurrency))
        return self._connection

    def _key_from_environment(self) -> str | None:
        name = self.config.key_variable
        key = os.environ.get(name, "").strip()
        if not key:
            if name != type(self.config).model_fields["key_variable"].default:
                raise JudgeError(
                    f"the environment variable {name} must hold the server's key",
                    "nothing",
                    f"Set {name}, or leave key_variable out where none is needed.",
                )
            return None
        if not key.isascii() or not key.isprintable() or " " in key:
            raise JudgeError(
                f"the key in {name} must be one word of printable ASCII characters",
                "something else (not shown)",
                "Copy it again.",
            )
        return key

    # ---- what went wrong ------------------------------------------------------------------------------------

    async def _status(self, client: Any, error: Any, place: str, slots: bool) -> Exception:
        status, said = int(error.status_code), self._said(error)
        if status in (401, 403):
            variable = self.config.key_variable
            return self._end(
                JudgeError(
                    f"{self.config.base_url} must accept the key in {variable}",
                    f"HTTP {status}: {said}" + ("" if self._key else f" ({variable} is not set)"),
                    f"Set {variable} to a key that it accepts and that may use {self.config.model}.",
                )
            )
        if status == 404:
            if slots and await self._models(client) is not None:
                return self._no_log_probs(f"HTTP 404: {said}")
            return self._end(await self._not_found(client, said))
        # llama.cpp refuses with HTTP 500: "Only no echo is supported".
        names_it = re.search(r"\b(echo|logprobs?)\b", said, re.IGNORECASE) is not None
        if slots and (names_it or status in (400, 405, 422, 501)):
            return self._no_log_probs(f"HTTP {status}: {said}")
        if status == 429 and "insufficient_quota" in f"{error.body}":
            return self._end(
                JudgeError(
                    f"the account at {self.config.base_url} must have credit",
                    f"HTTP 429: {said}",
                    "Top it up and run again: every answer so far is kept.",
                )
            )
        if status == 400 and "'max_tokens'" in said and "'max_completion_tokens'" in said:
            # OpenAI's newer models know the same under another name only.
            self._limit_field = "max_completion_tokens"
            return _Again(self._refused(place, status, said), wait=0.0)
        if status in _AGAIN or status >= 500:
            remedy = "Run again later: every answer so far is kept."
            if status == 429:
                remedy += " Or lower concurrency."
            ill = JudgeError(f"{place} must answer with HTTP 200", f"HTTP {status}: {said}", remedy)
            return _Again(ill, wait=_retry_after(error.response.headers))
        return self._refused(place, status, said)

    def _end(self, error: JudgeError) -> JudgeError:
        """Let nobody else ask: it would end the same way. Until `close`."""
        self._hopeless = error
        return error

    def _refused(self, place: str, status: int, said: str) -> JudgeError:
        return JudgeError(
            f"{place} must accept what it is sent",
            f"HTTP {status}: {said}",
            "Change what it names: a shorter prompt, fields to leave_out, another model.",
        )

    async def _not_found(self, client: Any, said: str) -> JudgeError:
        known = await self._models(client)
        model = self.config.model
        if known is None:
            return JudgeError(
                f"{self.config.base_url} must be the root of an OpenAI-compatible interface",
                f"HTTP 404: {said}",
                "Mend base_url: it mostly ends in /v1.",
            )
        return JudgeError(
            f"the server at {self.config.base_url} must serve the model {model}",
            f"HTTP 404: {said}",
            nearest(model, known) if known else "Load one there first.",
        )

    async def _models(self, client: Any) -> list[str] | None:
        """Names of the models that are served; None if the server does not say."""
        try:
            response = await client.models.with_raw_response.list(timeout=_CONNECT_SECONDS)
            return replies.models(replies.parsed(response.http_response.text, ""))
        except Exception:  # only asked to explain another error
            return None

    def _no_log_probs(self, value: str) -> JudgeError:
        if self.config.slots == "one_by_one":
            return JudgeError(
                f"{self.name} must tell log-probabilities of the next token (logprobs of /completions)",
                value,
                "Lower n_log_probs if it names that; else use a server that tells them (vLLM, llama.cpp), a local "
                "model, or a scorer that needs none.",
            )
        return JudgeError(
            f"{self.name} must tell log-probabilities of a prompt (echo and logprobs of /completions)",
            value,
            "Lower n_log_probs if it names that; else ask with slots = 'one_by_one', use vLLM or a local model, or a "
            "scorer that needs none.",
        )

    def _unreachable(self, error: Exception) -> JudgeError:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return JudgeError(
            f"a server must be reachable at {self.config.base_url}",
            (self._clean(str(cause)) or type(cause).__name__),
            "Start it, or mend base_url.",
        )

    def _said(self, error: Any) -> str:
        """The server's own words."""
        body = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("error") or body.get("detail") or body
        return self._clean(str(body or error.response.text or "nothing more"))

    def _clean(self, text: str) -> str:
        """One short line, without the key or what looks like one."""
        if self._key:
            text = text.replace(self._key, "[key]")
        text = re.sub(r"\b(sk-|Bearer\s+)\S+", "[key]", text)
        text = " ".join(text.split()).rstrip(".")
        return text if len(text) <= 200 else text[:197] + "..."


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait as the server asks: a number or a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        told = headers.get(name)
        if told is None:
            continue
        try:
            return max(float(told) * unit, 0.0)
        except ValueError:
            pass
        try:
            return max(email.utils.parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
        except ValueError:
            pass
    return None
