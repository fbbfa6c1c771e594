"""One compute thread for any number of clients, interleaving replies token by token.

Replies are not batched, so a reply does not depend on the server's load. Waiting requests are held
in a bounded queue; a reply whose client has disconnected is dropped at its next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from slm_lora.adapters.multi import AdapterSet
from slm_lora.data.prompts import Prompt
from slm_lora.errors import SlmLoraError
from slm_lora.evaluation.generation import Generation, Sampling, reference_loss


class BusyError(SlmLoraError):
    """The queue is full."""


@dataclass(eq=False)
class GenerationRequest:
    """A requested reply: read its `pieces` first, then ``finished`` and the token counts.

    Attributes:
        prompt_tokens: number of prompt tokens.
        reply_tokens: number of tokens generated so far.
        finished: ``stop`` or ``length`` once the pieces have ended.
    """

    prompt_tokens: int
    reply_tokens: int = 0
    finished: str = ""
    _cancelled: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)

    async def pieces(self) -> AsyncIterator[str]:
        """Stream the text. Closing the iterator cancels the computation.

        Raises:
            SlmLoraError: the computation failed.
        """
        try:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop computing at the next token; the pieces end at once."""
        self._cancelled = True
        self._put(None)

    def _put(self, piece: str | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop has ended: the server is shutting down
            self._cancelled = True


class Engine:
    """Computes replies of a base and its adapters in a separate thread."""

    def __init__(
        self,
        variants: AdapterSet,
        *,
        max_tokens: int = 1024,
        max_active: int = 8,
        max_waiting: int = 64,
    ) -> None:
        """
        Args:
            variants: the base and its adapters.
            max_tokens: upper limit on the tokens of a reply.
            max_active: replies computed in turns; each holds a key-value cache.
            max_waiting: replies in the queue besides the active ones; more are rejected.
        """
        self.variants = variants
        self.max_tokens = max_tokens
        self._max_active, self._max_waiting = max_active, max_waiting
        self._waiting: deque[Callable[[], _Work | None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, variant: str, prompt: Sequence[int], sampling: Sampling) -> GenerationRequest:
        """Queue a reply; call it inside the event loop that reads its pieces.

        Raises:
            BusyError: the queue is full.
        """
        request = GenerationRequest(len(prompt))

        def start() -> _Work | None:
            if request._cancelled:
                return None
            try:
                return _Work(Generation(self.variants, variant, prompt, sampling), request)
            except Exception as error:
                request._put(error)
                return None

        self._enqueue(start)
        return request

    async def loss(self, variant: str, template_variant: str, prompt: Prompt) -> float | None:
        """Loss of a prompt's reference answer in nats per token; see `reference_loss`.

        Raises:
            BusyError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[float | None] = loop.create_future()

        def resolve(setter: Callable[..., None], value: object) -> None:
            if not future.done():
                setter(value)

        def compute() -> None:
            try:
                value = reference_loss(self.variants, variant, template_variant, prompt)
                loop.call_soon_threadsafe(resolve, future.set_result, value)
            except Exception as error:
                loop.call_soon_threadsafe(resolve, future.set_exception, error)

        self._enqueue(compute)
        return await future

    def close(self) -> None:
        """Stop computing; unfinished replies end where they are."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def _enqueue(self, start: Callable[[], _Work | None]) -> None:
        with self._wake:
            if len(self._waiting) >= self._max_waiting:
                raise BusyError("the request queue is full; try again in a moment")
            self._waiting.append(start)
            self._wake.notify()

    def _run(self) -> None:
        active: deque[_Work] = deque()
        while True:
            with self._wake:
                while not (active or self._waiting or self._closed):
                    self._wake.wait()
                if self._closed:
                    break
                starts = [
                    self._waiting.popleft()
                    for _ in range(min(len(self._waiting), self._max_active - len(active)))
                ]
            active.extend(work for start in starts if (work := start()) is not None)
            if active:
                work = active.popleft()
                if work.advance():
                    active.append(work)
        for work in active:
            work.request._put(None)


@dataclass
class _Work:
    """A reply in progress and the request that receives it."""

    generation: Generation
    request: GenerationRequest

    def advance(self) -> bool:
        """Compute one token; return whether the reply is unfinished."""
        if self.request._cancelled:
            return False
        try:
            if piece := self.generation.advance():
                self.request._put(piece)
        except Exception as error:
            self.request._put(error)
            return False
        self.request.reply_tokens = len(self.generation.ids)
        if not self.generation.finished:
            return True
        self.request.finished = self.generation.finished
        self.request._put(None)
        return False
