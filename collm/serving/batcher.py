"""Batches requests that arrive together into one engine call; engine calls run one at a time in a separate thread."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

from collm.engines.local import LocalEngine, Observer
from collm.errors import CollmError
from collm.models.policy import Policy
from collm.serving.wire import Refused
from collm.types import Completion, Request

WINDOW = 0.003
"""Seconds that the first request of a batch waits for more requests."""
BATCH = 64
"""Greatest number of requests in one engine call."""
QUEUE = 1024
"""Greatest number of waiting requests; further ones are refused with status 503."""
REMEMBERED = 1 << 21
"""Characters of text after which the chat template's cache of encoded texts is cleared."""

Waiting = tuple[Request, Observer | None, "asyncio.Future[Completion]"]


class Batcher:
    """Answers requests for one policy. most, queue: as BATCH and QUEUE."""

    def __init__(self, engine: LocalEngine, policy: Policy, *, most: int = BATCH, queue: int = QUEUE):
        self.engine, self.policy, self.most = engine, policy, most
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue(queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collm-engine")
        self._task: asyncio.Task[None] | None = None
        self._characters = 0
        tokens = policy.tokenizer.get_vocab()
        self.longest_text = 4 * policy.max_positions * max(map(len, tokens))
        """Upper bound of the characters of a history that fits the model; longer texts are refused without encoding them."""

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Stop; waiting requests are refused with status 503."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        while not self._queue.empty():
            *_, future = self._queue.get_nowait()
            if not future.done():
                future.set_exception(Refused(503, "the server is stopping; ask again when it is back", code="stopping"))
        self._thread.shutdown()

    async def answer(self, request: Request, observer: Observer | None = None) -> Completion:
        """The completion of one request. observer: called in the engine's thread. Raises Refused."""
        size = sum(len(message.text) if message.token_ids is None else 0 for message in request.messages)
        if size > self.longest_text:
            raise _too_long(
                f"a history of {size} characters cannot fit the model's {self.policy.max_positions} positions; send less text"
            )
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((request, observer, future))
        except asyncio.QueueFull:
            raise Refused(503, "too many requests are waiting; try again in a second", code="busy") from None
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(WINDOW)
            while len(batch) < self.most and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [waiting for waiting in batch if not waiting[2].done()]  # skips closed connections
            results = await loop.run_in_executor(self._thread, self._generate, batch)
            for (*_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Refused):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _generate(self, batch: list[Waiting]) -> list[Completion | Refused]:
        """Runs in the engine's thread. Returns one completion or refusal per request; never raises."""
        requests = [request for request, *_ in batch]
        observers = [_until_closed(observer, future) for _, observer, future in batch]
        results: list[Completion | Refused | None] = [self._check(request) for request in requests]
        sound = [i for i, refused in enumerate(results) if refused is None]
        try:
            completions = self.engine.generate([requests[i] for i in sound], [observers[i] for i in sound]) if sound else []
            for i, completion in zip(sound, completions, strict=True):
                failed = completion.finish_reason == "error"
                results[i] = Refused(500, completion.error, code="engine") if failed else completion
        except Exception as error:
            self._report(error)
            for i in sound:
                results[i] = Refused(500, "the engine failed; the server's log says why", code="engine")
        self._forget(requests)
        return [result or Refused(500, "no answer", code="engine") for result in results]

    def _check(self, request: Request) -> Refused | None:
        """The refusal of a request that cannot be answered, found before it joins a batch; None for a valid request."""
        try:
            length = len(self.policy.chat.encode(request.messages))
        except CollmError as error:
            return Refused(400, str(error), param="messages")
        except Exception as error:
            self._report(error)
            reason = (
                "the messages cannot be encoded by this model's chat template; send plain text as user and assistant in turn"
            )
            return Refused(400, reason, param="messages")
        if length + request.sampling.max_tokens > self.policy.max_positions:
            return _too_long(
                f"a history of {length} tokens and an answer of up to {request.sampling.max_tokens} exceed the model's "
                f"{self.policy.max_positions} positions; send fewer messages, or lower max_tokens"
            )
        return None

    def _forget(self, requests: list[Request]) -> None:
        """Clear the cache of encoded texts from time to time, so that memory stays bounded."""
        self._characters += sum(len(message.text) for request in requests for message in request.messages)
        if self._characters > REMEMBERED:
            self.policy.chat.forget()
            self._characters = 0

    @staticmethod
    def _report(error: Exception) -> None:
        """Print an error for the server's operator; callers do not see it."""
        traceback.print_exception(error, file=sys.stderr)


def _until_closed(observer: Observer | None, future: asyncio.Future[Completion]) -> Observer | None:
    """An observer that also ends an answer which nobody waits for."""
    return observer and (lambda *drawn: future.cancelled() or observer(*drawn))


def _too_long(reason: str) -> Refused:
    return Refused(400, reason, param="messages", code="context_length_exceeded")
