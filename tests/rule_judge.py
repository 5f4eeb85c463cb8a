"""A judge that answers by a rule, as functions from prompts to answers: for a server, or as a `Judge` in this process.

It explains a neuron by listing the tokens that it was shown active, and answers every scorer's question by whether
those tokens are there. So a latent that follows its token scores 1, and one that fires at random scores about 0.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sememe.judge import Answer, Question, SlotQuestion, Slots, Usage

__all__ = ["RuleJudge", "chat", "reply", "top"]


def _unescaped(token: str) -> str:
    return token.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r").replace("\\\\", "\\")


def described(text: str) -> list[str]:
    """The tokens that an explanation of this judge lists."""
    found = re.findall(r"the tokens (\[.*?\])(?=\n|$|\.)", text)
    return [str(token) for token in json.loads(found[-1])] if found else []


def explain(user: str) -> str:
    """Lists the tokens with an activation of at least 1."""
    tokens = {_unescaped(t) for t, n in re.findall(r"^([^\n\t]+)\t(\d+)$", user, re.M) if int(n) > 0}
    tokens |= {_unescaped(t) for t, n in re.findall(r'"((?:[^"\n]|(?<=")")+?)": (\d+)', user) if int(n) > 0}
    return "the tokens " + json.dumps(sorted(tokens))


def reply(system: str, user: str) -> str:
    """The answer to any question of `sememe explain`."""
    if "what the neuron is looking for" in system:
        return explain(user)
    if "categories" in system:
        return "1"
    if "does not belong" in system:
        texts = re.split(r"(?:^|\n\n)(?=\d+\. )", user.rsplit("\n\nThe number", 1)[0])[1:]
        marks = [{m.strip() for m in re.findall(r"<<(.*?)>>", text, re.S)} for text in texts]
        alone = [not any(a & b for j, b in enumerate(marks) if j != i) for i, a in enumerate(marks)]
        return str(alone.index(True) + 1) if True in alone else "none"
    if "have in common" in system or "group is about" in system:
        return "things of one kind"
    tokens = described(user)
    if "You write" in system:
        return json.dumps([f"x{token} x" for token in (tokens or ["nothing"])] * 5)
    if "list of tokens" in system.replace("\n", " "):
        listed = re.findall(r"^\d+\. '(.*)'$", user, re.M)
        return json.dumps([int(_unescaped(token) in tokens) for token in listed])
    texts = re.split(r"\n\n(?=Text \d+: )", user.rsplit("\n\nAnswer with", 1)[0])[1:]
    texts = [text.split(": ", 1)[1] for text in texts]
    if "marked" in system:
        texts = [" ".join(re.findall(r"<<(.*?)>>", text, re.S)) for text in texts]
    return json.dumps([int(any(token in text for token in tokens)) for text in texts])


def top(prompt: str, token: str, before: str) -> dict[str, float]:
    """Log-probabilities at a token of a simulator's prompt: 10 on the tokens described, 0 elsewhere."""
    words = described(prompt.rsplit("behavior:", 1)[-1].split("\nActivations", 1)[0])
    line = before.rsplit("\n", 1)[-1].removesuffix("\t")
    return {"10": -0.05, "0": -3.0} if _unescaped(line) in words else {"0": -0.05, "10": -3.0, "the": -4.0}


def chat(request: dict[str, Any]) -> str:
    """For a server."""
    said = {message["role"]: message["content"] for message in request["messages"]}
    return reply(said.get("system", ""), said["user"])


class RuleJudge:
    """The same as a `Judge`; keeps every question. `answer` replaces what it says to all but explanations."""

    name, fingerprint = "rule", "rule"

    def __init__(self, answer: str | None = None, explanation: str | None = None) -> None:
        self.answer, self.explanation = answer, explanation
        self.asked: list[Question | SlotQuestion] = []

    async def ask(self, question: Question) -> Answer:
        self.asked.append(question)
        system, user = question.messages[0].content, question.messages[-1].content
        if "what the neuron is looking for" in system:
            return Answer(reply(system, user) if self.explanation is None else self.explanation)
        return Answer(reply(system, user) if self.answer is None else self.answer)

    async def slots(self, question: SlotQuestion) -> Slots:
        self.asked.append(question)
        if self.answer is not None:
            return Slots(tuple({} for _ in question.slots))
        tops = [top(question.text, "unknown", question.text[:at]) for at in question.slots]
        return Slots(tuple({k: v for k, v in found.items() if k in question.choices} for found in tops))

    def count_tokens(self, text: str) -> int:
        return len(text) // 4

    def estimate(self, question: Question | SlotQuestion) -> Usage:
        return Usage(100, 10)

    async def close(self) -> None:
        return None
