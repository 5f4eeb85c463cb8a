"""A language model in this process, asked several questions at a time. Knows nothing of caches and limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from sememe import lm
from sememe.config import sha256_of
from sememe.errors import JudgeError, ModelError, ResourceError
from sememe.judge.base import Answer, Question, SlotQuestion, Slots, Usage
from sememe.judge.budget import tokens_at_most
from sememe.judge.config import LocalConfig

__all__ = ["LocalJudge"]

T = TypeVar("T")


class _Waiting(NamedTuple):
    question: Question
    answer: asyncio.Future[Answer]


class LocalJudge:
    """A `Judge` that is a model of `sememe.lm`. It is loaded when the first question comes.

    Questions that wait together are answered together, those with a temperature one by one: their answers depend on
    their seed alone then. The model computes on a thread of its own, so that Ctrl-C finds somebody at home.

    Args:
        config: Which model, and how to run it.
    Raises:
        ModelError: there is no such model.
    """

    def __init__(self, config: LocalConfig) -> None:
        self.config = config
        self.name = f"{config.model} (local)"
        known = lm.fingerprint_of(_model_config(config))
        self.fingerprint = sha256_of(["local", known, config.dtype])
        self._model: lm.LanguageModel | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sememe-local-judge")
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, question: Question) -> Answer:
        """Go on with a conversation.

        Raises:
            JudgeError: it does not fit the model's context, or the model has no chat template.
            ResourceError: the device's memory does not hold it.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(question, loop.create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done() or self._worker.get_loop() is not loop:
            self._worker = loop.create_task(self._work())
        return await waiting.answer

    async def slots(self, question: SlotQuestion) -> Slots:
        """Distributions at places of a text: exact, for choices of several tokens too.

        Raises:
            JudgeError: it does not fit the model's context, or a place is inside a token.
            ResourceError: the device's memory does not hold it.
        """

        def compute() -> Slots:
            model = self._loaded()
            found = lm.choice_log_probs(model, question.text, question.slots, question.choices)
            return Slots(tuple(found), Usage(self.count_tokens(question.text)))

        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: _as_judge(compute))

    def count_tokens(self, text: str) -> int:
        """How many tokens a text is; before the model is loaded, how many at most."""
        if self._model is None:
            return tokens_at_most(text)
        return len(self._model.tokenizer(text, add_special_tokens=False).input_ids)

    def estimate(self, question: Question | SlotQuestion) -> Usage:
        """What a question will cost at most."""
        if isinstance(question, Question):
            prompt = sum(self.count_tokens(message.content) + 4 for message in question.messages) + 3
            return Usage(prompt, question.max_tokens)
        return Usage(self.count_tokens(question.text))

    async def close(self) -> None:
        """Nobody waits any more. The model stays loaded."""
        worker, self._worker = self._worker, None
        self._waiting.clear()
        if worker is not None and worker.get_loop() is asyncio.get_running_loop():
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    # ---- inside ---------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Answer what waits, until nothing does."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # whoever asks at this moment comes into the first batch
        while self._waiting:
            batch = self._next_batch()
            if not batch:
                continue
            questions = [waiting.question for waiting in batch]

            def given_up(batch: list[_Waiting] = batch) -> bool:
                return all(waiting.answer.cancelled() for waiting in batch)

            def compute(
                questions: list[Question] = questions, given_up: Callable[[], bool] = given_up
            ) -> list[Answer | JudgeError]:
                return self._answers(questions, given_up)

            try:
                answers = await loop.run_in_executor(self._thread, lambda c=compute: _as_judge(c))  # type: ignore[misc]
            except Exception as error:
                answers = [error] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

    def _next_batch(self) -> list[_Waiting]:
        """The first that waits and others like it; none if nobody waits for an answer any more."""
        self._waiting = [waiting for waiting in self._waiting if not waiting.answer.cancelled()]
        if not self._waiting:
            return []
        first = self._waiting[0].question
        size = 1 if first.temperature > 0 else self.config.batch_size
        alike = [
            waiting
            for waiting in self._waiting
            if (waiting.question.temperature, waiting.question.max_tokens, waiting.question.stop)
            == (first.temperature, first.max_tokens, first.stop)
        ][:size]
        taken = {id(waiting) for waiting in alike}
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in taken]
        return alike

    def _answers(self, questions: list[Question], given_up: Callable[[], bool]) -> list[Answer | JudgeError]:
        model, first = self._loaded(), questions[0]
        found: list[Answer | JudgeError | None] = [None] * len(questions)
        prompts: dict[int, list[int]] = {}
        for index, question in enumerate(questions):
            try:
                prompts[index] = _prompt(model, question)
            except (JudgeError, ModelError) as error:
                found[index] = JudgeError(error.rule, error.value, error.remedy)
        if prompts:
            completions = lm.complete(
                model,
                list(prompts.values()),
                first.max_tokens,
                temperature=first.temperature,
                seed=first.seed,
                stop=first.stop,
                given_up=given_up,
            )
            for (index, prompt), done in zip(prompts.items(), completions, strict=True):
                found[index] = Answer(done.text, done.finish, Usage(len(prompt), done.n_tokens))
        return [answer for answer in found if answer is not None]

    def _loaded(self) -> lm.LanguageModel:
        if self._model is None:
            self._model = lm.load(_model_config(self.config))
        return self._model


def _model_config(config: LocalConfig) -> lm.ModelConfig:
    return lm.ModelConfig(
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        revision=config.revision,
    )


def _prompt(model: lm.LanguageModel, question: Question) -> list[int]:
    prompt = lm.chat_ids(model, question.messages)
    length = len(prompt) + question.max_tokens
    if model.context_length is not None and length > model.context_length:
        raise JudgeError(
            f"prompt and answer must fit the context of {model.context_length} tokens of {model.name}",
            f"{len(prompt)} and {question.max_tokens} tokens",
            "Show fewer or shorter examples, or name a model with a longer context.",
        )
    return prompt


def _as_judge(compute: Callable[[], T]) -> T:
    """What the language model refuses, as a judge's error."""
    try:
        return compute()
    except ModelError as error:
        raise JudgeError(error.rule, error.value, error.remedy) from error
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "the device's memory must hold the questions answered at a time",
            str(error).splitlines()[0].rstrip("."),
            "Lower batch_size, or name a smaller model.",
        ) from None
