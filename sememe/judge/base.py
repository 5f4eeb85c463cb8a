"""What a language model may be asked, and what it answers. Knows no server and no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

__all__ = ["Answer", "Judge", "Message", "Question", "SlotQuestion", "Slots", "Usage"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(NamedTuple):
    """A conversation that the model goes on with."""

    messages: tuple[Message, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class SlotQuestion(NamedTuple):
    """A text with places at which the model's own distribution over a few tokens is read; nothing is generated.

    This is how OpenAI's simulator is asked: all positions of an excerpt in one prompt, each place a token that says
    "unknown", and read there what the model would have said instead.
    """

    text: str
    slots: tuple[int, ...]
    """Where, as offsets of characters into `text` (its end is one): the distribution is that of what begins there."""
    choices: tuple[str, ...]
    """What may stand there, e.g. "0" ... "10"."""


class Usage(NamedTuple):
    """What a question cost. Of an answer from the cache: what it cost when it was asked."""

    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0
    from_cache: bool = False
    n_calls: int = 1
    """Requests; more than one only where the places of a text are read one by one."""


class Answer(NamedTuple):
    """What the model said: as it came, cut off or empty included."""

    text: str
    finish: str = "stop"
    """Why it ended: stop, length, or what the server named."""
    usage: Usage = Usage()


class Slots(NamedTuple):
    """What the model would have said at each slot."""

    log_probs: tuple[Mapping[str, float], ...]
    """Of each slot, by choice: natural logarithms, not renormalised. Choices outside what is known are absent."""
    usage: Usage = Usage()


@runtime_checkable
class Judge(Protocol):
    """A language model that answers. Its methods may be awaited many at a time; it keeps its own limits."""

    name: str
    """Model and where it runs, as written into artifacts; never a key."""
    fingerprint: str
    """What the answers depend on: model and settings."""

    async def ask(self, question: Question) -> Answer:
        """Go on with a conversation.

        Raises:
            JudgeError: it cannot be reached, refuses, or the limit of what may be spent is reached.
        """
        ...

    async def slots(self, question: SlotQuestion) -> Slots:
        """Distributions at places of a text.

        Raises:
            JudgeError: as `ask`; or it does not tell the log-probabilities of a prompt.
        """
        ...

    def count_tokens(self, text: str) -> int:
        """About how many tokens a text costs."""
        ...

    def estimate(self, question: Question | SlotQuestion) -> Usage:
        """About what a question will cost at most, as if nothing were cached."""
        ...

    async def close(self) -> None:
        """Let go of connections; it may be asked again after. Awaited on the loop on which it was asked."""
        ...
