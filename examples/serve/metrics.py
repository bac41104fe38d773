"""What /metrics tells, in the text format of Prometheus."""

import time
from bisect import bisect_left
from collections import Counter

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    def __init__(self, bounds):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0

    def observe(self, value):
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name, help):
        yield f"# HELP {name} {help}"
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Changed by the event loop's thread only, so that nothing here needs a lock."""

    def __init__(self):
        self.statuses, self.seconds, self.batch_sizes = Counter(), Histogram(SECONDS), Histogram(SIZES)

    def text(self, queue_depth, in_flight, catalog=None):
        lines = ["# HELP rqsid_requests_total Searches by HTTP status; 499: the client left before the answer."]
        lines.append("# TYPE rqsid_requests_total counter")
        lines += [f'rqsid_requests_total{{status="{code}"}} {count}' for code, count in sorted(self.statuses.items())]
        for name, help, value in (
            ("rqsid_queue_depth", "Searches that wait for a batch.", queue_depth),
            ("rqsid_requests_in_flight", "Searches admitted and not yet answered.", in_flight),
        ):
            lines += [f"# HELP {name} {help}", f"# TYPE {name} gauge", f"{name} {value}"]
        lines += self.batch_sizes.lines("rqsid_batch_size", "Searches computed together.")
        lines += self.seconds.lines("rqsid_request_seconds", "From arrival to answer, of searches answered with 200.")
        if catalog is not None:
            lines += ["# HELP rqsid_catalog_info The catalogue that is served.", "# TYPE rqsid_catalog_info gauge"]
            lines.append(f'rqsid_catalog_info{{version="{catalog.version}",id="{catalog.version_id}"}} 1')
        return "\n".join(lines) + "\n"


class CountSearches:
    """ASGI middleware, the outermost one: counts also what the others refuse."""

    def __init__(self, app, metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/search":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), None

        async def send_counted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        finally:
            # Without a status it raised, which becomes a 500 further out, or the client left while it sent its body.
            self.metrics.statuses[status or 500] += 1
            if status == 200:
                self.metrics.seconds.observe(time.perf_counter() - started)
