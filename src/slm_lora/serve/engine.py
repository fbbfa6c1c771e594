"""One thread that computes, for any number of clients: replies take turns, a token each.

Every reply is computed alone, so its text is the one it would have on an idle server. Waiting
ones stand in a bounded queue; a reply whose client has gone is dropped at its next token.
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
    """A reply that was asked for; read its `pieces`, then ``finished`` and the counts.

    Attributes:
        prompt_tokens: of the prompt.
        reply_tokens: so far.
        finished: ``stop`` or ``length``, when the pieces have ended.
    """

    prompt_tokens: int
    reply_tokens: int = 0
    finished: str = ""
    _cancelled: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes. Whoever stops reading has the computation stopped.

        Raises:
            SlmLoraError: what went wrong in computing.
        """
        try:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for the rest."""
        self._cancelled = True

    def _tell(self, piece: str | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop has ended: the server is shutting down
            self._cancelled = True


class Engine:
    """Computes replies of a base and its adapters in a thread of its own."""

    def __init__(
        self,
        variants: AdapterSet,
        *,
        most_tokens: int = 1024,
        at_once: int = 8,
        most_waiting: int = 64,
    ) -> None:
        """
        Args:
            variants: the base and its adapters.
            most_tokens: of any reply, whatever is asked.
            at_once: replies that take turns; each holds a key-value cache.
            most_waiting: replies in the queue besides; more are refused.
        """
        self.variants = variants
        self.most_tokens = most_tokens
        self._at_once, self._most_waiting = at_once, most_waiting
        self._waiting: deque[Callable[[], _Work | None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, variant: str, prompt: Sequence[int], sampling: Sampling) -> GenerationRequest:
        """Ask for a reply; call it inside the event loop that reads the request.

        Raises:
            BusyError: the queue is full.
        """
        generation = GenerationRequest(len(prompt))

        def begin() -> _Work | None:
            if generation._cancelled:
                return None
            try:
                return _Work(Generation(self.variants, variant, prompt, sampling), generation)
            except Exception as error:
                generation._tell(error)
                return None

        self._enqueue(begin)
        return generation

    async def loss(self, variant: str, asked_as: str, prompt: Prompt) -> float | None:
        """Loss of a prompt's reference answer, in nats a token; see `reference_loss`.

        Raises:
            BusyError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[float | None] = loop.create_future()

        def tell(set_it: Callable[..., None], value: object) -> None:
            if not found.done():
                set_it(value)

        def compute() -> None:
            try:
                value = reference_loss(self.variants, variant, asked_as, prompt)
                loop.call_soon_threadsafe(tell, found.set_result, value)
            except Exception as error:
                loop.call_soon_threadsafe(tell, found.set_exception, error)

        self._enqueue(compute)
        return await found

    def close(self) -> None:
        """Stop computing; what is not finished ends where it is."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def _enqueue(self, begin: Callable[[], _Work | None]) -> None:
        with self._wake:
            if len(self._waiting) >= self._most_waiting:
                raise BusyError("too many requests are waiting; try again in a moment")
            self._waiting.append(begin)
            self._wake.notify()

    def _run(self) -> None:
        active: deque[_Work] = deque()
        while True:
            with self._wake:
                while not (active or self._waiting or self._closed):
                    self._wake.wait()
                if self._closed:
                    break
                begins = [
                    self._waiting.popleft()
                    for _ in range(min(len(self._waiting), self._at_once - len(active)))
                ]
            active.extend(work for begin in begins if (work := begin()) is not None)
            if active:
                work = active.popleft()
                if work.advance():
                    active.append(work)
        for work in active:
            work.generation._tell(None)


@dataclass
class _Work:
    """A reply on its way to its request."""

    reply: Generation
    generation: GenerationRequest

    def advance(self) -> bool:
        """One token; whether there is more to do."""
        if self.generation._cancelled:
            return False
        try:
            if piece := self.reply.advance():
                self.generation._tell(piece)
        except Exception as error:
            self.generation._tell(error)
            return False
        self.generation.reply_tokens = len(self.reply.ids)
        if not self.reply.finished:
            return True
        self.generation.finished = self.reply.finished
        self.generation._tell(None)
        return False
