"""Concurrent requests, computed together: a queue on the event loop and one thread that computes."""

import asyncio
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("rqsid.serve")


class ComputationFailed(Exception):
    """What was computed for one item raised, also when it was computed alone."""


@dataclass(eq=False)
class Job:
    item: Any
    future: asyncio.Future
    arrived: float


class Batcher:
    """
    Collects items until there are `max_batch`, or the oldest has waited `max_wait_s`, or the thread was busy for longer than
    that anyway; then computes them at once, in a thread of its own.

    If a batch raises, its items are computed one by one, so that an item that cannot be computed takes no others with it.

    Args:
        compute (callable):
            Takes a list of items, returns a list of their results. It is only ever called from one thread.
        max_batch (`int`):
            Most items of a batch.
        max_wait_s (`float`):
            Seconds that an item waits for others at most.
        on_batch (callable):
            Called on the event loop with the size of each batch.
    """

    def __init__(self, compute, max_batch, max_wait_s, on_batch):
        self.compute, self.max_batch, self.max_wait_s, self.on_batch = compute, max_batch, max_wait_s, on_batch
        self.waiting = deque()
        self.changed = asyncio.Event()
        self.is_closing = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self.loop_task = None

    def start(self):
        self.loop_task = asyncio.create_task(self._run())

    @property
    def is_running(self):
        return self.loop_task is not None and not self.loop_task.done()

    async def submit(self, item):
        """
        Waits for the result of an item. Cancelled, it leaves the queue and is not computed, unless it is already.

        Raises:
            `ComputationFailed`: if `compute` raised for this item; the log says what.
        """
        loop = asyncio.get_running_loop()
        job = Job(item, loop.create_future(), loop.time())
        self.waiting.append(job)
        self.changed.set()
        try:
            return await job.future
        finally:
            if job in self.waiting:
                self.waiting.remove(job)

    async def close(self):
        """Computes what is waiting, then ends the thread."""
        self.is_closing = True
        self.changed.set()
        await self.loop_task
        self.thread.shutdown()

    async def _run(self):
        loop = asyncio.get_running_loop()
        while self.waiting or not self.is_closing:
            await self._wait_for_batch(loop)
            batch = [self.waiting.popleft() for _ in range(min(self.max_batch, len(self.waiting)))]
            if not batch:
                continue
            self.on_batch(len(batch))
            results = await loop.run_in_executor(self.thread, self._compute, batch)
            for job, result in zip(batch, results, strict=True):
                if job.future.done():  # timed out or left in the meantime
                    continue
                if isinstance(result, Exception):
                    job.future.set_exception(ComputationFailed())
                else:
                    job.future.set_result(result)

    async def _wait_for_batch(self, loop):
        while len(self.waiting) < self.max_batch and not self.is_closing:
            left = self.waiting[0].arrived + self.max_wait_s - loop.time() if self.waiting else None
            if left is not None and left <= 0:
                return
            self.changed.clear()
            try:
                async with asyncio.timeout(left):
                    await self.changed.wait()
            except TimeoutError:
                return

    def _compute(self, batch):
        """In the thread. A result for each job, or the exception that it raised."""
        try:
            return self.compute([job.item for job in batch])
        except Exception as error:
            logger.exception("A batch of %d failed.", len(batch))
            if len(batch) == 1:
                return [error]
        return [None if job.future.cancelled() else self._compute([job])[0] for job in batch]
