"""Language models that are asked in words: a server that speaks OpenAI's protocol, or one in this process.

Knows prompts and answers, costs and limits; nothing of latents or dictionaries.

    base.py       a question, an answer, and what may be asked
    config.py     which model, how, and what it may cost
    opened.py     a judge as it is used: answers kept, costs limited
    asking.py     many questions at a time, until Ctrl-C
    endpoint.py   a server; replies.py reads what it says
    local.py      a Hugging Face model
    cache.py      every answer ever paid for, in one file
    budget.py     what was spent, what would be, and the limit
"""

from sememe.judge.asking import ask_all, run_each
from sememe.judge.base import Answer, Judge, Message, Question, SlotQuestion, Slots, Usage
from sememe.judge.budget import Preview, Tally
from sememe.judge.config import EndpointConfig, JudgeConfig, LocalConfig
from sememe.judge.opened import OpenJudge, open_judge

__all__ = [
    "Answer",
    "EndpointConfig",
    "Judge",
    "JudgeConfig",
    "LocalConfig",
    "Message",
    "OpenJudge",
    "Preview",
    "Question",
    "SlotQuestion",
    "Slots",
    "Tally",
    "Usage",
    "ask_all",
    "open_judge",
    "run_each",
]
