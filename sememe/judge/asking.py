"""Many questions at a time, from a program that is not asynchronous itself. Knows no protocol and no cost."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

from sememe.errors import LimitError
from sememe.judge.base import Answer, Judge, Question, SlotQuestion, Slots
from sememe.judge.budget import Tally
from sememe.progress import Progress, track

__all__ = ["ask_all", "run_each"]

T = TypeVar("T")
R = TypeVar("R")

_LAST_SECONDS = 2.0
"""How long what is under way may go on after a failure."""


def ask_all(
    judge: Judge,
    questions: Sequence[Question | SlotQuestion],
    *,
    description: str = "ask",
    in_flight: int = 64,
) -> list[Answer | Slots]:
    """Answers to questions, in their order. Arguments and errors as `run_each`."""

    async def one(question: Question | SlotQuestion) -> Answer | Slots:
        return await (judge.ask(question) if isinstance(question, Question) else judge.slots(question))

    return run_each(judge, one, questions, description=description, unit="questions", in_flight=in_flight)


def run_each(
    judge: Judge,
    function: Callable[[T], Awaitable[R]],
    items: Sequence[T],
    *,
    description: str,
    unit: str,
    in_flight: int = 64,
) -> list[R]:
    """What an asynchronous function that asks a judge gives for each item, with a progress bar.

    The first failure ends the others: those that wait for a server a moment later, and those of a judge that may spend
    no more when the answers under way, which are paid for, have come. So does Ctrl-C, at once; what was answered
    is in the judge's cache, and the same call goes on from there. The judge's connections are closed at the end.

    Works inside a notebook's running event loop too, on a thread of its own.

    Args:
        judge: Who is asked.
        function: Of one item; may ask several questions one after the other.
        items: What it is called with.
        description: For the progress bar.
        unit: What an item is, in the plural.
        in_flight: Most items at a time; the judge has its own limit on requests.
    Returns:
        One result per item, in their order.
    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM came.
        Exception: the first that the function raised.
    """
    with track(description, len(items), unit) as progress:
        results: list[R] = _run(lambda: _each(judge, function, items, progress, in_flight))
        return results


async def _each(
    judge: Judge,
    function: Callable[[T], Awaitable[R]],
    items: Sequence[T],
    progress: Progress,
    in_flight: int,
) -> list[R]:
    results: list[R | None] = [None] * len(items)
    waiting = iter(enumerate(items))
    failures: list[Exception] = []

    async def work() -> None:
        for index, item in waiting:
            try:
                results[index] = await function(item)
            except Exception as error:
                failures.append(error)
            if failures:
                return
            progress.note = _spent(judge)
            progress.advance()

    workers = [asyncio.create_task(work()) for _ in range(min(in_flight, len(items)))]
    try:
        left = set(workers)
        while left and not (failures and not isinstance(failures[-1], LimitError)):
            _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        if left:
            await asyncio.wait(left, timeout=_LAST_SECONDS)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await judge.close()
    if failures:
        raise failures[0]
    return cast("list[R]", results)


def _spent(judge: Judge) -> str:
    """What a judge that counts has spent so far, for the progress bar."""
    tally = getattr(judge, "tally", None)
    if not isinstance(tally, Tally):
        return ""
    parts = [f"{tally.n_calls:,} calls", f"{tally.n_from_cache:,} from the cache"]
    parts += [f"{tally.n_retries:,} sent again"] if tally.n_retries else []
    parts += [f"{tally.price:.4g} spent"] if tally.price is not None else []
    return ", ".join(parts)


def _run(make: Callable[[], Any]) -> Any:
    """A coroutine run to its end; Ctrl-C and SIGTERM cancel it."""
    if not _on_a_loop():
        return asyncio.run(_terminable(make))
    outcome: list[Any] = []
    loop_and_task: list[Any] = []

    async def noted() -> Any:
        loop_and_task.extend((asyncio.get_running_loop(), asyncio.current_task()))
        return await make()

    def beside() -> None:
        try:
            outcome.append((asyncio.run(noted()), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=beside, name="sememe-judge")
    thread.start()
    try:
        thread.join()
    except BaseException:
        if loop_and_task:
            loop_and_task[0].call_soon_threadsafe(loop_and_task[1].cancel)
        thread.join()
        raise
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _terminable(make: Callable[[], Any]) -> Any:
    """asyncio itself turns Ctrl-C into a cancellation; here SIGTERM becomes one too."""
    task, terminated = asyncio.current_task(), []

    def stop() -> None:
        terminated.append(True)
        assert task is not None
        task.cancel()

    loop = asyncio.get_running_loop()
    main = threading.current_thread() is threading.main_thread()
    if main:
        with contextlib.suppress(NotImplementedError):  # an event loop without signals
            loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        return await make()
    except asyncio.CancelledError:
        if terminated:
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(signal.SIGTERM)
