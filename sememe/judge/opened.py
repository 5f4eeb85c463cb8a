"""A judge as it is used: answers kept on disk, costs counted and limited. Knows no protocol."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar, runtime_checkable

from sememe.errors import JudgeError
from sememe.judge.base import Answer, Judge, Question, SlotQuestion, Slots, Usage
from sememe.judge.budget import Budget, Preview, Prices, Tally
from sememe.judge.cache import AnswerCache, key_of
from sememe.judge.config import EndpointConfig, LocalConfig
from sememe.judge.endpoint import Endpoint
from sememe.judge.spelled import at_most, rounds, spellings, told_apart
from sememe.paths import cache_dir

__all__ = ["OpenJudge", "open_judge"]

Q = TypeVar("Q", Question, SlotQuestion)
A = TypeVar("A", Answer, Slots)


@runtime_checkable
class _Divides(Protocol):
    """A judge that may send several requests for one question, and names single tokens only."""

    def parts(self, question: SlotQuestion) -> list[SlotQuestion]:
        """Questions of one request each, about one or more of the places in their order, that come to the same."""
        ...


class OpenJudge:
    """A judge that is asked nothing twice and keeps to its limits; itself a `Judge`.

    The same question asked twice at a time is sent once.

    Args:
        judge: Who answers.
        cache: Where answers are kept.
        budget: What may be spent.
    """

    def __init__(self, judge: Judge, cache: AnswerCache, budget: Budget) -> None:
        self.judge, self.cache, self.budget = judge, cache, budget
        self.name, self.fingerprint = judge.name, judge.fingerprint
        # A lock is forgotten with the last question that waits for it.
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    @property
    def tally(self) -> Tally:
        """What was asked and spent so far."""
        return self.budget.tally._replace(n_retries=getattr(self.judge, "n_retries", 0))

    async def ask(self, question: Question) -> Answer:
        """Go on with a conversation.

        Raises:
            JudgeError: it cannot be reached, or refuses.
            LimitError: the limit of what may be spent is reached.
        """
        return await self._kept(question, self.judge.ask, Answer)

    async def slots(self, question: SlotQuestion) -> Slots:
        """Distributions at places of a text.

        A choice of several tokens ("10" where digits are single tokens) is told from the one it begins with by one
        more question for each place that names that one.

        Raises:
            JudgeError: as `ask`; or it does not tell the log-probabilities of a prompt; or a choice is more than one
                token longer than any other.
            LimitError: the limit of what may be spent is reached.
        """
        answers = await self._together(self.parts(question))
        named = [of_place for answer in answers for of_place in answer.log_probs]
        joint, left = [dict(of_place) for of_place in named], [dict(of_place) for of_place in named]
        if isinstance(self.judge, _Divides):
            for choice in rounds(question, named):
                spelled = spellings(question, joint, choice)
                after = await self._together([one.question for one in spelled])
                told_apart(spelled, [answer.log_probs[0] for answer in after], joint, left)
                answers += after
        used = [answer.usage for answer in answers]
        usage = Usage(
            sum(one.n_prompt_tokens for one in used),
            sum(one.n_completion_tokens for one in used),
            from_cache=all(one.from_cache for one in used),
            n_calls=sum(one.n_calls for one in used),
        )
        return Slots(tuple(_in_order(of_place, question.choices) for of_place in left), usage)

    async def _together(self, questions: Iterable[SlotQuestion]) -> list[Slots]:
        """Answers to questions of one request each."""
        asked = [self._kept(question, self.judge.slots, Slots) for question in questions]
        # All of them: what is under way when one fails is paid for, and kept.
        found = await asyncio.gather(*asked, return_exceptions=True)
        answers: list[Slots] = []
        for one in found:
            if isinstance(one, BaseException):
                raise one
            answers.append(one)
        return answers

    def parts(self, question: SlotQuestion) -> list[SlotQuestion]:
        """Questions of one request each that come to the same."""
        return self.judge.parts(question) if isinstance(self.judge, _Divides) else [question]

    def count_tokens(self, text: str) -> int:
        """About how many tokens a text costs."""
        return self.judge.count_tokens(text)

    def estimate(self, question: Question | SlotQuestion) -> Usage:
        """About what a question will cost at most, as if nothing were cached."""
        return self.judge.estimate(question)

    def preview(self, questions: Iterable[Question | SlotQuestion]) -> Preview:
        """What asking some questions would cost, without asking any. Cached ones cost nothing."""
        n = n_free = n_calls = n_prompt = n_completion = 0
        seen: set[str] = set()
        for question in self._sent(questions):
            n += 1
            key = key_of(self.fingerprint, question)
            if key in seen or self.cache.get(key) is not None:
                n_free += 1
                continue
            seen.add(key)
            usage = self.estimate(question)
            n_calls += usage.n_calls
            n_prompt += usage.n_prompt_tokens
            n_completion += usage.n_completion_tokens
        prices = self.budget.prices
        price = None if prices is None else prices.of(Usage(n_prompt, n_completion))
        return Preview(n, n_free, n_calls, n_prompt, n_completion, price)

    def _sent(self, questions: Iterable[Question | SlotQuestion]) -> Iterator[Question | SlotQuestion]:
        for question in questions:
            if isinstance(question, SlotQuestion):
                yield from self.parts(question)
                if isinstance(self.judge, _Divides):
                    yield from self._besides(question)
            else:
                yield question

    def _besides(self, question: SlotQuestion) -> list[SlotQuestion]:
        """What will be asked to tell choices apart: exactly where the answers are known, else all that may be."""
        known = [self.cache.get(key_of(self.fingerprint, part)) for part in self.parts(question)]
        named = [of_place for slots in known if isinstance(slots, Slots) for of_place in slots.log_probs]
        if len(named) < len(question.slots):
            return at_most(question)
        joint, left = [dict(of_place) for of_place in named], [dict(of_place) for of_place in named]
        out: list[SlotQuestion] = []
        for choice in rounds(question, named):
            spelled = spellings(question, joint, choice)
            out += [one.question for one in spelled]
            after = [self.cache.get(key_of(self.fingerprint, one.question)) for one in spelled]
            there = [slots.log_probs[0] for slots in after if isinstance(slots, Slots)]
            if len(there) == len(spelled):
                told_apart(spelled, there, joint, left)
        return out

    async def close(self) -> None:
        """Let go of connections and of the file of answers; it may be asked again after."""
        self.cache.close()
        await self.judge.close()

    async def _kept(self, question: Q, ask: Callable[[Q], Awaitable[A]], kind: type[A]) -> A:
        key = _key(self.fingerprint, question)
        lock = self._asking.setdefault(key, asyncio.Lock())
        async with lock:
            found = self.cache.get(key)
            if isinstance(found, kind):
                self.budget.from_cache()
                return found
            async with self.budget.spending(self.judge.estimate(question)) as paid:
                answer = await ask(question)
                paid.append(answer.usage)
                self.cache.put(key, answer)
                return answer


def _in_order(log_probs: Mapping[str, float], choices: Iterable[str]) -> dict[str, float]:
    return {choice: log_probs[choice] for choice in choices if choice in log_probs}


def _key(fingerprint: str, question: Question | SlotQuestion) -> str:
    try:
        return key_of(fingerprint, question)
    except UnicodeEncodeError as error:
        raise JudgeError(
            "a question must be valid Unicode",
            f"half a character at {error.start}",
            "Decode bytes with errors='replace'.",
        ) from None


def open_judge(config: EndpointConfig | LocalConfig) -> OpenJudge:
    """A language model to ask. Nothing is loaded and no server is met before the first question.

    Raises:
        ModelError: a local model is not there.
    """
    if isinstance(config, EndpointConfig):
        judge: Judge = Endpoint(config)
        prices = None
        if config.prompt_price is not None and config.completion_price is not None:
            prices = Prices(config.prompt_price, config.completion_price)
        budget = Budget(prices, config.max_price, config.max_calls)
    else:
        from sememe.judge.local import LocalJudge

        judge, budget = LocalJudge(config), Budget(max_calls=config.max_calls)
    path = config.answers if config.answers is not None else cache_dir() / "judge" / "answers.sqlite"
    return OpenJudge(judge, AnswerCache(path.expanduser()), budget)
