"""What a server's replies say, read with suspicion. Knows JSON and OpenAI's fields; no connection, no config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sememe.judge.base import Usage

__all__ = ["NoLogProbs", "NotAnAnswer", "chat", "echoed", "models", "next_token", "parsed", "usage"]


class NotAnAnswer(Exception):
    """A reply that does not follow the protocol.

    Args:
        rule: What must hold, with the place in the reply.
        value: What was found.
    """

    def __init__(self, rule: str, value: str) -> None:
        super().__init__(rule, value)
        self.rule, self.value = rule, value


class NoLogProbs(Exception):
    """A proper reply without the log-probabilities that were asked for."""


def parsed(body: str, content_type: str) -> Any:
    """A reply's JSON.

    Raises:
        NotAnAnswer: it is none.
    """
    try:
        return json.loads(body)
    except ValueError:
        shown = repr(" ".join(body.split())[:80]) if body.strip() else "nothing"
        kind = content_type.split(";")[0] or "no content type"
        raise NotAnAnswer("JSON must stand", f"{kind}, {shown}") from None


def chat(reply: Any) -> tuple[str, str, Usage | None]:
    """Text, reason of the end and cost of a chat completion; an empty text is one.

    Raises:
        NotAnAnswer: it is no chat completion.
    """
    choice = _at(reply, "choices", 0)
    message = _at(reply, "choices", 0, "message")
    if not isinstance(message, dict) or not ({"content", "refusal", "tool_calls"} & set(message)):
        raise NotAnAnswer("choices[0].message.content must stand", _shown(message))
    text = message.get("content")
    if text is None:
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise NotAnAnswer("choices[0].message.content must be a text", _shown(text))
    finish = choice.get("finish_reason")
    return text, finish if isinstance(finish, str) else "unknown", usage(reply)


def echoed(reply: Any, prompt: str) -> tuple[dict[int, Mapping[str, float]], Usage | None]:
    """Of a completion that repeats its prompt: the likeliest tokens where each token begins, by its offset.

    Some servers count a token before the text (`<s>`) into the offsets; it is taken off again.

    Raises:
        NotAnAnswer: it is no completion.
        NoLogProbs: it repeats nothing, or tells no log-probabilities of it.
    """
    log_probs = _log_probs(reply)
    if not {"tokens", "text_offset", "top_logprobs"} <= set(log_probs):
        raise NoLogProbs(f"log-probabilities with {', '.join(sorted(log_probs))} only")
    tokens, offsets, top = log_probs["tokens"], log_probs["text_offset"], log_probs["top_logprobs"]
    if not (isinstance(tokens, list) and isinstance(offsets, list) and isinstance(top, list)):
        raise NotAnAnswer("choices[0].logprobs must hold lists", _shown(log_probs))
    if not len(tokens) == len(offsets) == len(top) or not all(isinstance(o, int) for o in offsets):
        raise NotAnAnswer(
            "choices[0].logprobs must hold lists of one length",
            f"{len(tokens)} tokens, {len(offsets)} offsets, {len(top)} distributions",
        )
    if not offsets or offsets[-1] - offsets[0] < len(prompt) // 2:
        raise NoLogProbs("log-probabilities of the answer alone")
    before = "".join(map(str, tokens)).find(prompt)
    shift = offsets[0] + max(before, 0)
    found: dict[int, Mapping[str, float]] = {}
    for i, (offset, distribution) in enumerate(zip(offsets, top, strict=True)):
        if isinstance(distribution, dict):
            # A token that is no whole character may have no width; the first at a place is the one that begins there.
            found.setdefault(offset - shift, _finite(distribution, f"choices[0].logprobs.top_logprobs[{i}]"))
    return found, usage(reply)


def next_token(reply: Any) -> tuple[Mapping[str, float], Usage | None]:
    """The likeliest next tokens after a prompt, of a completion of one token.

    llama.cpp answers with the fields of a chat completion, which is read as well.

    Raises:
        NotAnAnswer: it is no completion.
        NoLogProbs: it tells no log-probabilities.
    """
    log_probs = _log_probs(reply)
    if isinstance(log_probs.get("content"), list) and log_probs["content"]:
        first = log_probs["content"][0]
        listed = first.get("top_logprobs") if isinstance(first, dict) else None
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and {"token", "logprob"} <= set(entry) for entry in listed
        ):
            raise NotAnAnswer("choices[0].logprobs.content[0].top_logprobs must be a list", _shown(first))
        place = "choices[0].logprobs.content[0].top_logprobs"
        return _finite({entry["token"]: entry["logprob"] for entry in listed}, place), usage(reply)
    top = log_probs.get("top_logprobs")
    if not isinstance(top, list) or not top or not isinstance(top[0], dict):
        raise NoLogProbs(f"log-probabilities with {', '.join(sorted(log_probs)) or 'nothing'} only")
    return _finite(top[0], "choices[0].logprobs.top_logprobs[0]"), usage(reply)


def models(reply: Any) -> list[str]:
    """Names of the models a server has.

    Raises:
        NotAnAnswer: it is no such list.
    """
    data = _at(reply, "data")
    if not isinstance(data, list):
        raise NotAnAnswer("data must be a list", _shown(data))
    return [str(model["id"]) for model in data if isinstance(model, dict) and "id" in model]


def _log_probs(reply: Any) -> dict[str, Any]:
    choice = _at(reply, "choices", 0)
    if "text" not in choice:
        raise NotAnAnswer("choices[0].text must stand", _shown(choice))
    log_probs = choice.get("logprobs")
    if not log_probs:
        raise NoLogProbs("none")
    if not isinstance(log_probs, dict):
        raise NotAnAnswer("choices[0].logprobs must be an object", _shown(log_probs))
    return log_probs


def _finite(distribution: dict[str, Any], place: str) -> dict[str, float]:
    """Log-probabilities by token; what has no probability at all is left out."""
    found = {}
    for token, value in distribution.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise NotAnAnswer(f"{place} must hold numbers", _shown(value))
        if value > 1e-3:
            raise NotAnAnswer(f"{place} must hold logarithms of probabilities, at most 0", _shown(value))
        if value > -math.inf:
            found[token] = float(value)
    return found


def usage(reply: Any) -> Usage | None:
    """What a reply says that it cost."""
    told = reply.get("usage") if isinstance(reply, dict) else None
    if not isinstance(told, dict):
        return None
    prompt, completion = told.get("prompt_tokens"), told.get("completion_tokens", 0)
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    return Usage(prompt, completion)


def _at(reply: Any, *path: str | int) -> Any:
    """What lies at a place of a reply; the error names the first part of it that is missing."""
    here, name = reply, ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
        inside = (
            (isinstance(here, dict) and part in here)
            if isinstance(part, str)
            else (isinstance(here, list) and len(here) > part)
        )
        if not inside:
            raise NotAnAnswer(f"{name} must stand", _shown(here))
        here = here[part]
    if path == ("choices", 0) and not isinstance(here, dict):
        raise NotAnAnswer("choices[0] must be an object", _shown(here))
    return here


def _shown(value: Any) -> str:
    """A value, or what an error in the place of an answer says."""
    if isinstance(value, dict) and "error" in value:
        inside = value["error"]
        return f"an error: {inside.get('message', inside) if isinstance(inside, dict) else inside}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
