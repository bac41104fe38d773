"""The HTTP side: what a request may hold, who is let in, and what becomes of those who are not."""

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

from batching import Batcher, ComputationFailed
from engine import RequestRefused
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from gate import Gate
from metrics import CountSearches, Metrics
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

logger = logging.getLogger("rqsid.serve")


@dataclass
class Limits:
    max_batch: int = field(default=16, metadata={"help": "Most searches computed together."})
    max_wait_ms: float = field(default=5.0, metadata={"help": "Longest that a search waits for others to join it."})
    max_requests: int = field(default=128, metadata={"help": "Searches admitted at once; further ones get 429."})
    timeout_s: float = field(default=5.0, metadata={"help": "After that a search gets 504 and is not computed."})
    max_top_k: int = field(default=20, metadata={"help": "Most products of an answer."})
    max_text: int = field(default=1000, metadata={"help": "Characters of a query, and of a profile."})
    max_history: int = field(default=200, metadata={"help": "Products of a history."})
    max_filter_ids: int = field(default=1000, metadata={"help": "Ids in `only`, and in `exclude`."})
    max_body_kb: int = field(default=256, metadata={"help": "Kilobytes of a request."})

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "max_wait_ms"):
                raise ValueError(f"{name}={value} must be positive.")


def request_model(limits):
    """Strict: no number where a string belongs, no misspelt field."""
    Text = Annotated[str, Field(max_length=limits.max_text)]
    Word = Annotated[str, Field(max_length=100)]
    ProductId = Annotated[str, Field(min_length=1, max_length=200)]
    FilterIds = Annotated[list[ProductId], Field(max_length=limits.max_filter_ids)]
    Profile = Annotated[dict[Word, Word | int | FiniteFloat], Field(max_length=50)]
    strict = ConfigDict(strict=True, extra="forbid")

    class Filters(BaseModel):
        model_config = strict
        segment: Word | None = None
        only: FilterIds | None = None
        exclude: FilterIds | None = None

    class SearchRequest(BaseModel):
        model_config = strict
        profile: Text | Profile | None = None
        history: Annotated[list[ProductId], Field(max_length=limits.max_history)] | None = None
        query: Text | None = None
        top_k: int = Field(default=min(10, limits.max_top_k), ge=1, le=limits.max_top_k)
        filters: Filters = Filters()
        ignore_unknown: bool = False

    return SearchRequest


class Service:
    """
    Everything that the server holds, on `app.state.service`.

    Args:
        load (callable):
            Returns a [`SearchEngine`]; called in the thread that searches, after the server has started to listen.
        limits ([`Limits`]):
            Of requests and batches.
    """

    def __init__(self, load, limits):
        self.load, self.limits, self.metrics = load, limits, Metrics()
        self.engine, self.error, self.in_flight = None, None, 0
        self.on_failure = lambda: None
        self.batcher = Batcher(
            self._search, limits.max_batch, limits.max_wait_ms / 1000, self.metrics.batch_sizes.observe
        )

    def _search(self, queries):
        return self.engine.search(queries)

    @property
    def is_ready(self):
        return self.engine is not None and self.batcher.is_running

    async def start(self):
        self.batcher.start()
        try:
            self.engine = await asyncio.get_running_loop().run_in_executor(self.batcher.thread, self.load)
            logger.info("Ready.")
        except Exception as error:
            self.error = error
            self.on_failure()

    async def answer(self, body, receive):
        """Answers one request, unless it takes too long or its client leaves."""
        if not self.is_ready:
            raise HTTPException(503, "The model is being loaded.", {"Retry-After": "5"})
        work, client = asyncio.create_task(self._work(body)), asyncio.create_task(has_left(receive))
        try:
            await asyncio.wait({work, client}, timeout=self.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if client.done():
                raise HTTPException(499, "The client left.")
            raise HTTPException(504, f"No answer within {self.limits.timeout_s:g} seconds.")
        finally:
            # Takes the search out of the queue.
            work.cancel()
            client.cancel()

    async def _work(self, body):
        example = body.model_dump(include={"profile", "history", "query"}, exclude_none=True)
        filters = body.filters.model_dump()
        try:
            # In a thread: to restrict a trie of millions of SIDs takes a while.
            query = await asyncio.to_thread(
                self.engine.prepare, example, body.top_k, ignore_unknown=body.ignore_unknown, **filters
            )
            products = [] if query.trie is None else await self.batcher.submit(query)
        except RequestRefused as error:
            raise HTTPException(422, readable(error)) from None
        except ComputationFailed:
            raise HTTPException(500, "The search failed. The server's log says why.") from None
        return {"products": products, "ignored": query.ignored, "history_left_out": query.history_left_out}


async def has_left(receive):
    # The body was read before: what comes now is that the client hung up.
    while (await receive())["type"] != "http.disconnect":
        pass


def readable(error):
    """Text that fits into an answer, whatever a client put into what it complains about."""
    return str(error)[:1000].encode("utf-8", "replace").decode()


def create_app(load, limits):
    @asynccontextmanager
    async def lifespan(app):
        starting = asyncio.create_task(app.state.service.start())
        yield
        await starting
        await app.state.service.batcher.close()

    app = FastAPI(title="rqsid search", lifespan=lifespan)
    app.state.service = service = Service(load, limits)
    SearchRequest = request_model(limits)
    # The last one added is the outermost.
    app.add_middleware(Gate, service=service)
    app.add_middleware(CountSearches, metrics=service.metrics)

    @app.exception_handler(RequestValidationError)
    async def refuse(request, error):
        # FastAPI's own handler echoes the input, which may be large, or something that JSON cannot hold.
        found = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()[:5]]
        return JSONResponse({"detail": readable("; ".join(found))}, status_code=422)

    @app.post("/search")
    async def search(body: SearchRequest, request: Request):
        return JSONResponse(await service.answer(body, request.receive))

    @app.get("/health")
    async def health():
        return {"status": "alive"}

    @app.get("/ready")
    async def ready():
        if not service.is_ready:
            return JSONResponse({"status": "loading"}, status_code=503)
        return {"status": "ready", "catalog_version": service.engine.tokenizer.catalog.version_id}

    @app.get("/metrics")
    async def metrics():
        catalog = service.engine.tokenizer.catalog if service.engine else None
        text = service.metrics.text(len(service.batcher.waiting), service.in_flight, catalog)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app
