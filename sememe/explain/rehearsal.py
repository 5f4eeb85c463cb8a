"""What an explanation run would ask, without asking: a judge that notes questions and gives an answer of usual length.

Later questions hold earlier answers, so where these are not known yet the cost is an estimate.
"""

from __future__ import annotations

import asyncio

from sememe.judge import Answer, OpenJudge, Preview, Question, SlotQuestion, Slots, Usage
from sememe.judge.cache import key_of

__all__ = ["Rehearsal"]

USUAL = "words about a kind of thing, in particular where they come after certain other words of the same sentence"


class Rehearsal:
    """A `Judge` that sends nothing. What was answered before is answered so again.

    Args:
        judge: The one that would be asked.
    """

    def __init__(self, judge: OpenJudge) -> None:
        self.judge = judge
        self.name, self.fingerprint = f"rehearsal of {judge.name}", judge.fingerprint
        self.questions: list[Question | SlotQuestion] = []

    async def ask(self, question: Question) -> Answer:
        """Note it."""
        self.questions.append(question)
        key = key_of(self.fingerprint, question)
        found = self.judge.cache.get(key)
        # Different for each question, as real answers are: what follows from them is asked for each, too.
        return found if isinstance(found, Answer) else Answer(f"{USUAL} {key[:8]}")

    async def slots(self, question: SlotQuestion) -> Slots:
        """Note it."""
        self.questions.append(question)
        return Slots(tuple({} for _ in question.slots))

    def count_tokens(self, text: str) -> int:
        """As the judge counts."""
        return self.judge.count_tokens(text)

    def estimate(self, question: Question | SlotQuestion) -> Usage:
        """As the judge estimates."""
        return self.judge.estimate(question)

    async def close(self) -> None:
        """Nothing is open but the file of answers, which `preview` still reads."""

    def preview(self) -> Preview:
        """What was asked would cost this much, at most."""
        try:
            return self.judge.preview(self.questions)
        finally:
            asyncio.run(self.judge.close())
