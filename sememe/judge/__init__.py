"""Language models that are asked in words: a server that speaks OpenAI's protocol, or one in this process.

Knows prompts and answers, costs and limits; nothing of latents or dictionaries.

    base.py       a question, an answer, and what may be asked
"""

from sememe.judge.base import Answer, Judge, Question, SlotQuestion, Slots, Usage

__all__ = ["Answer", "Judge", "Question", "SlotQuestion", "Slots", "Usage"]
