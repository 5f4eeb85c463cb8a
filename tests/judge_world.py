"""What the judge's tests share: questions, a text with places, a judge for a server of the test."""

from __future__ import annotations

import pytest
from judge_server import Reply, last_user

from sememe.errors import (
    JudgeError,
)
from sememe.judge import (
    EndpointConfig,
    Message,
    Question,
    ask_all,
    open_judge,
)

TEXT = "Rate each:\nthe\tunknown\ncat\tunknown\n12\tunknown\n"
PLACES = tuple(i for i in range(len(TEXT)) if TEXT.startswith("unknown", i))
CHOICES = tuple(str(i) for i in range(11))


def question(text="how many?", **changes):
    return Question((Message("user", text),), **changes)


def questions(n):
    return [question(f"question {i}") for i in range(n)]


def endpoint_for(server, folder, **options):
    """A judge for a server, quick to try again, with its answers in a folder of the test."""
    defaults = {
        "base_url": server.url,
        "model": "small",
        "answers": folder / "answers.sqlite",
        "backoff_seconds": 0.01,
        "timeout_seconds": 10,
    }
    return open_judge(EndpointConfig(**(defaults | options)))


def failing(judge, asked=None):
    """The error of a question."""
    with pytest.raises(JudgeError) as caught:
        ask_all(judge, [asked or question()])
    return str(caught.value)


def slowly(request):
    return Reply(body={"choices": [{"message": {"content": last_user(request)}}]}, seconds=0.01)
