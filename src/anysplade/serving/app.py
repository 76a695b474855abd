"""The web server: the application of pages and API, its middleware, and ``serve``."""

import asyncio
import contextlib
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anysplade import __version__
from anysplade._common.arguments import did_you_mean
from anysplade._common.tables import Tabular
from anysplade.errors import AnyspladeError, OptionError, UsageError
from anysplade.model.options import Precision, Runtime
from anysplade.search.fusion import Fusion
from anysplade.serving import api, pages
from anysplade.serving.api import ASCIIResponse
from anysplade.serving.batching import OverloadedError, Searcher, StoppedError

logger = logging.getLogger(__name__)

_CONNECTIONS = 1000  # at the same time
_STOP_SECONDS = 10  # for running requests when the server stops
_LOOPBACK = ("127.0.0.1", "[::1]", "localhost")
_STATIC = Path(__file__).with_name("static")
_PATHS = {  # that metrics name
    "/openapi.json",
    *(f"/static/{file.name}" for file in _STATIC.iterdir()),
    *(route.path for route in (*api.router.routes, *pages.router.routes) if isinstance(route, APIRoute)),
}
_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
     b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)  # fmt: skip


def create_app(searcher: Searcher, token: str | None = None, hosts: Sequence[str] | None = _LOOPBACK) -> FastAPI:
    """The application of pages and API, which starts and stops the searcher.

    Every request must send the token, as a bearer token or (from the pages) as a cookie. Hosts other than the given ones, of which
    IPv6 addresses are in brackets, are refused unless it is None: a web page elsewhere could let its own name point here to read
    the responses (DNS rebinding).
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        searcher.start()
        yield
        await searcher.stop()

    app = FastAPI(
        title="anysplade",
        version=__version__,
        docs_url=None,  # these pages load scripts from other servers, which the content security policy forbids
        redoc_url=None,
        lifespan=lifespan,
        responses=None if token is None else api.errors({401: "the token is missing or wrong"}),
        generate_unique_id_function=lambda route: route.name,
    )
    registry = CollectorRegistry()
    app.state.searcher, app.state.token, app.state.registry = searcher, token, registry
    app.include_router(api.router)
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=_STATIC))
    app.add_middleware(_OuterMiddleware, token=token, registry=registry, hosts=hosts)
    for error in (HTTPException, RequestValidationError, AnyspladeError):
        app.add_exception_handler(error, _error_response)
    if token is not None:  # the middleware checks it, so that FastAPI cannot describe it
        description = app.openapi()
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]

    batches = Histogram("anysplade_batch_size", "requests encoded together", buckets=(1, 2, 4, 8, 16, 32), registry=registry)
    searcher.on_batch = batches.observe
    Gauge("anysplade_waiting", "requests in the queue", registry=registry).set_function(lambda: searcher.waiting)
    Gauge("anysplade_documents", "documents in the index", registry=registry).set_function(lambda: searcher.documents)
    return app


async def _error_response(request: Request, error: Exception) -> Response:
    status, message, headers = 422, str(error), None
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = "/".join(str(part) for part in first["loc"][1:])[:100] or "the body"
        message = " ".join(f"{place}: {first['msg'].removeprefix('Value error, ')[:250]}".split())  # names can contain line breaks
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, dict(error.headers or {})
        if status == 405:
            message = f"{request.method} is not possible at {request.url.path[:100]}; send {headers.get('Allow', 'another method')}"
        elif message == "Not Found":
            message = f"there is no {request.url.path[:100]}{did_you_mean(request.url.path[:100], _PATHS)}"
    elif isinstance(error, OverloadedError | StoppedError):
        status, headers = 503, {"Retry-After": "1"}
    elif not isinstance(error, UsageError):
        logger.error("%s: %s", request.url.path, error)
        status, message = 500, "the server failed; its log has the reason"
    if _wants_html(request):
        return pages.html("message.html", request, status, headers, message=message, status_code=status)
    return ASCIIResponse({"error": message}, status, headers)


def _wants_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


class _OuterMiddleware:
    """Checks the token and the host name, adds headers to every response, and counts requests.

    Plain ASGI, because Starlette's BaseHTTPMiddleware runs the application in a task that is not cancelled with the request.
    """

    def __init__(self, app: ASGIApp, token: str | None, registry: CollectorRegistry, hosts: Sequence[str] | None) -> None:
        self.app, self.token, self.hosts = app, token, hosts
        self.requests = Counter("anysplade_requests", "requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram("anysplade_request_seconds", "time to the response", ["path"], registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        request, app = Request(scope), self.app
        host = re.sub(r":\d*$", "", request.headers.get("host", "").lower())  # without its port
        if not self._is_allowed(request):
            error = {"error": "the token is missing or wrong; send the header Authorization: Bearer TOKEN"}
            app = RedirectResponse("/login", 303) if _wants_html(request) else ASCIIResponse(error, 401)
        elif self.hosts is not None and host not in self.hosts:
            message = f"the host name {host[:100]!r} is not served; use {', '.join(self.hosts)}"
            app = await _error_response(request, HTTPException(400, message))
        try:
            await app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # uvicorn stops and cancels running requests; it would print a traceback
            if status is None:
                await ASCIIResponse({"error": "the server is stopping"}, 503)(scope, receive, send_with_headers)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"  # so that clients cannot add metrics without bound
            self.requests.labels(path, str(status or 500)).inc()
            self.seconds.labels(path).observe(time.perf_counter() - start)

    def _is_allowed(self, request: Request) -> bool:
        if request.url.path == "/login" or request.url.path.startswith("/static/"):
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else request.cookies.get(pages.COOKIE, "")
        return pages.token_matches(self.token, given)


@dataclass(frozen=True, repr=False)
class Served(Tabular):
    """The address of a server, and the number of requests that it answered."""

    index: str
    address: str
    requests: int


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dualstack = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" is IPv4 too
    try:
        listener = socket.create_server((host, port), family=family, backlog=_CONNECTIONS, dualstack_ipv6=dualstack)
    except (OSError, OverflowError, ValueError, TypeError) as error:  # the last three: an impossible port or host
        why = getattr(error, "strerror", None) or error
        raise OptionError(f"host {host}, port {port}: {why}; choose another port (0 to 65535) or host") from error
    # Inherited by connections, where asyncio leaves Nagle's algorithm on: responses would wait 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(
    index: str | Path,
    beside: str | None = None,
    *,
    model: str | Path | None = None,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    language: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    fuse: Fusion | None = None,
    rerank: str | Path | None = None,
    rerank_depth: int = 100,
) -> Served:
    """Serve an index until the process gets SIGINT or SIGTERM; running requests are finished first.

    Args:
        index, beside, model, runtime, precision: see ``Searcher``.
        language: of BM25's stemmer and stop words, by its English name or ISO 639-1 code; auto is that of most documents, none
            is neither.
        host: an address of this machine; an address that other machines can reach needs a token.
        port: 0 for any free port.
        token: see ``create_app``.
        fuse: fuse the rankings of the model and of BM25, as search does; a request can name another fusion.
        rerank: folder or hub id of a cross-encoder that ranks the first hits of every search.
        rerank_depth: number of hits that the cross-encoder scores.
    """
    name = f"[{host}]" if ":" in host else host
    if name not in _LOOPBACK and not token:
        raise OptionError(f"host {host}: other machines can reach this address; set a token, which every request must send")
    if token is not None and (len(token) < 16 or not token.isascii()):
        raise OptionError("the token can be guessed; it needs at least 16 ASCII characters")
    with _listen(host, port) as listener:
        options: dict[str, Any] = {"fuse": fuse, "rerank": rerank, "rerank_depth": rerank_depth}
        searcher = Searcher(index, beside, model, runtime=runtime, precision=precision, language=language, **options)
        app = create_app(searcher, token, _LOOPBACK if name in _LOOPBACK else None)
        address = f"http://{name}:{listener.getsockname()[1]}"
        logger.info("%s: %d documents at %s (stop with Ctrl+C)", index, searcher.documents, address)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_STOP_SECONDS,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=2**16,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops on it, and raises it again afterwards
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    samples = [sample for metric in app.state.registry.collect() for sample in metric.samples]
    return Served(str(index), address, int(sum(sample.value for sample in samples if sample.name == "anysplade_requests_total")))
