"""Who is let in: what is too large, too slow or too much is refused before anything looks into it."""

import asyncio
import json


class Gate:
    """
    ASGI middleware that reads the body, up to a limit, counts who is inside, and only then calls the app.

    A `Content-Length` beyond the limit is refused before the body is read; a body without one, as soon as what has arrived is
    too much. Under overload most answers come from here, which is why they cost little.

    Args:
        app (callable):
            The ASGI app behind it.
        service ([`Service`]):
            Its `limits` are obeyed, and its `in_flight` counts the searches that are inside.
    """

    def __init__(self, app, service):
        self.app, self.service, self.limits = app, service, service.limits

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        max_bytes, body, more = self.limits.max_body_kb * 1000, bytearray(), True
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > max_bytes:
            return await refuse(send, 413, f"The body may have {max_bytes} bytes.", close=True)
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return await refuse(send, 499, "The client left.")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > max_bytes:
                        return await refuse(send, 413, f"The body may have {max_bytes} bytes.", close=True)
        except TimeoutError:
            return await refuse(send, 408, f"No body within {self.limits.timeout_s:g} seconds.", close=True)

        is_read = False

        async def receive_again():
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        if scope["path"] != "/search":
            return await self.app(scope, receive_again, send)
        if self.service.in_flight >= self.limits.max_requests:
            return await refuse(send, 429, "Too many searches at once.", retry_after=1)
        self.service.in_flight += 1
        try:
            await self.app(scope, receive_again, send)
        finally:
            self.service.in_flight -= 1


async def refuse(send, status, detail, close=False, retry_after=None):
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if close:  # what is left of the body must not be taken for the next request
        headers.append((b"connection", b"close"))
    if retry_after is not None:
        headers.append((b"retry-after", b"%d" % retry_after))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
