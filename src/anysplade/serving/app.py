"""A search page and an HTTP API over an index."""

import asyncio
import contextlib
import hmac
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jsonschema
import numpy as np
import uvicorn
from jinja2 import Environment, PackageLoader
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from scipy import sparse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anysplade import __version__
from anysplade.errors import AnyspladeError, OptionError, UsageError
from anysplade.model.calibration import choose, logit_figure
from anysplade.model.encoder import is_saved_encoder, masked_lm, term_names
from anysplade.model.encoding import encode
from anysplade.model.head import describe_head, measure_logits
from anysplade.model.options import Role
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.search.documents import Hit
from anysplade.search.index import Index
from anysplade.serving.batching import OverloadedError, Searcher, StoppedError

logger = logging.getLogger(__name__)

MAX_BODY = 2**20  # bytes
MAX_TEXT = 10_000  # characters of a query or a text
MAX_TEXTS = 64  # of a call of /encode
MAX_K = 1000
_BODY_SECONDS = 10  # for a client to send its body
_CONNECTIONS = 1000
_GRACE = 10  # seconds for requests that are under way when the server stops
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_COOKIE = "anysplade-token"
_SNIPPET = 600  # characters of a document on the page
_SHOWN = 24  # terms of an expansion
_PAGE_K = 10
_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
     b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)  # fmt: skip
_STATIC = {"page.css": "text/css", "page.js": "text/javascript"}

# ------------------------------------------------------------------------------ description of the API

_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
_SCALAR = {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}]}
_TERM = {
    "type": "object",
    "required": ["term", "query_weight", "document_weight", "product"],
    "properties": {"term": {"type": "string"}} | {n: {"type": "number"} for n in ("query_weight", "document_weight", "product")},
}
_HIT = {
    "type": "object",
    "required": ["id", "score", "title", "text"],
    "properties": {
        "id": {"type": "string"},
        "score": {"type": "number"},
        "title": {"type": "string"},
        "text": {"type": "string"},
        "metadata": {"type": "object"},
        "terms": {"type": "array", "items": _TERM},
    },
}
_REQUESTS: dict[str, dict[str, Any]] = {
    "/search": {
        "type": "object",
        "required": ["query"],
        "additionalProperties": False,
        "properties": {
            "query": _TEXT,
            "k": {"type": "integer", "minimum": 1, "maximum": MAX_K, "default": _PAGE_K},
            "explain": {"type": "boolean", "default": False, "description": "with the terms that made each score"},
            "filter": {
                "type": "object",
                "description": "metadata that hits must have: a value, or a list for any of several",
                "propertyNames": {"minLength": 1, "pattern": r'^[^"\\]+$'},
                "additionalProperties": {"anyOf": [*_SCALAR["anyOf"], {"type": "array", "items": _SCALAR, "minItems": 1}]},
            },
        },
    },
    "/encode": {
        "type": "object",
        "required": ["texts"],
        "additionalProperties": False,
        "properties": {
            "texts": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_TEXTS},
            "role": {"type": "string", "enum": ["query", "document"], "default": "query"},
        },
    },
    "/explain": {
        "type": "object",
        "required": ["query", "id"],
        "additionalProperties": False,
        "properties": {"query": _TEXT, "id": {"type": "string", "maxLength": MAX_TEXT}},
    },
}
_ANSWERS: dict[str, dict[str, Any]] = {
    "/search": {
        "type": "object",
        "required": ["query", "hits"],
        "properties": {"query": {"type": "string"}, "hits": {"type": "array", "items": _HIT}},
    },
    "/encode": {
        "type": "object",
        "required": ["vectors"],
        "properties": {
            "vectors": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "number"}}},
        },
    },
    "/explain": {
        "type": "object",
        "required": ["id", "score", "terms"],
        "properties": {"id": {"type": "string"}, "score": {"type": "number"}, "terms": {"type": "array", "items": _TERM}},
    },
}
_SAYS = {
    "/search": "The best documents for a query: scores above 0, best first.",
    "/encode": "Sparse vectors of texts: a weight by term.",
    "/explain": "The terms that make a document's score for a query.",
}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_FAILURES = {
    400: "the body is no JSON or no UTF-8",
    408: "the body did not come in time",
    413: f"the body is larger than {MAX_BODY:,} bytes",
    415: "the content type is not application/json",
    422: "a field is missing, unknown or out of bounds",
    503: "too many requests wait; try again in a moment",
}
_CLOSED = {503: "the index is not being searched any more"}


def openapi(token: bool) -> dict[str, Any]:
    """The API's description, OpenAPI 3.1; requests are validated against it."""

    def answers(schema: dict[str, Any], more: dict[int, str]) -> dict[str, Any]:
        failures = more | ({401: "the token is missing or wrong"} if token else {})
        return {"200": {"description": "the answer", "content": {"application/json": {"schema": schema}}}} | {
            str(code): {"description": said, "content": {"application/json": {"schema": _ERROR}}} for code, said in failures.items()
        }

    paths: dict[str, Any] = {}
    for path, schema in _REQUESTS.items():
        failures = _FAILURES | ({404: "there is no such document"} if path == "/explain" else {})
        paths[path] = {
            "post": {
                "operationId": path[1:],
                "summary": _SAYS[path],
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": answers(_ANSWERS[path], failures),
            }
        }
    fields = {
        "status": {"const": "ok"},
        "documents": {"type": "integer"},
        "model": {"type": "string"},
        "version": {"type": "string"},
    }
    health = {"type": "object", "required": list(fields), "properties": fields}
    paths["/health"] = {"get": {"operationId": "health", "summary": "Is the index open?", "responses": answers(health, _CLOSED)}}
    described: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "anysplade", "version": __version__}, "paths": paths}
    if token:
        described |= {
            "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
            "security": [{"token": []}],
        }
    return described


# ------------------------------------------------------------------------------------------- the app


def create_app(searcher: Searcher, token: str | None = None, hosts: Sequence[str] | None = _LOOPBACK) -> Starlette:
    """The page and the API.

    Args:
        token: what every request must carry, as a bearer token or, from the page, as a cookie.
        hosts: names that this server goes by; others are refused, so that no page elsewhere reaches it by a name
            of its own. None for any.
    """
    return _Site(searcher, token).app(hosts)


class _Site:
    """The handlers, with what they share."""

    def __init__(self, searcher: Searcher, token: str | None) -> None:
        self.searcher = searcher
        self.token = token
        self.templates = Environment(
            loader=PackageLoader("anysplade.serving"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self.registry = CollectorRegistry()
        self.requests = Counter("anysplade_requests", "requests answered", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("anysplade_request_seconds", "time to the answer", ["path"], registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32)
        batches = Histogram("anysplade_batch_size", "requests encoded together", buckets=sizes, registry=self.registry)
        waiting = Gauge("anysplade_waiting", "requests that wait", registry=self.registry)
        waiting.set_function(lambda: searcher.waiting)
        documents = Gauge("anysplade_documents", "documents in the index", registry=self.registry)
        documents.set_function(lambda: searcher.documents)
        searcher.on_batch = batches.observe
        self._validators = {path: jsonschema.Draft202012Validator(schema) for path, schema in _REQUESTS.items()}

    def app(self, hosts: Sequence[str] | None) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/results", self.results),
            Route("/inspect", self.inspect),
            Route("/compare", self.compare),
            Route("/head", self.head),
            Route("/head.svg", self.head_figure),
            Route("/cost", self.cost),
            Route("/login", self.login, methods=["GET", "POST"]),
            *(Route(f"/static/{name}", _static(name)) for name in _STATIC),
            Route("/search", self.search, methods=["POST"]),
            Route("/encode", self.encode, methods=["POST"]),
            Route("/explain", self.explain, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.description),
        ]
        self.known = {route.path for route in routes}
        middleware = [Middleware(_Outermost, self)]
        if hosts is not None:
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=["localhost" if h == "::1" else h for h in hosts]))

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.searcher.start()
            yield
            await self.searcher.stop()

        handlers: dict[Any, Any] = dict.fromkeys((HTTPException, AnyspladeError), self.failed)
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)

    # ------------------------------------------------------------------------------------------ API

    async def search(self, request: Request) -> Response:
        asked = await self.read(request)
        k = int(asked.get("k", _PAGE_K))
        hits = await self.searcher.search(asked["query"], k, asked.get("explain", False), asked.get("filter"))
        return _json({"query": asked["query"], "hits": [hit.to_dict() for hit in hits]})

    async def encode(self, request: Request) -> Response:
        asked = await self.read(request)
        rows = await self.searcher.encode(asked["texts"], asked.get("role", "query"))
        vectors = await self.searcher.call(lambda: [dict(self._terms(rows[i])) for i in range(rows.shape[0])])
        return _json({"vectors": vectors})

    async def explain(self, request: Request) -> Response:
        asked = await self.read(request)
        terms = await self.searcher.explain(asked["query"], asked["id"])
        if terms is None:
            raise HTTPException(404, f"no document {asked['id'][:80]!r}")
        return _json({"id": asked["id"], "score": sum(t.product for t in terms), "terms": [asdict(t) for t in terms]})

    async def health(self, request: Request) -> Response:
        if not self.searcher.running:
            raise StoppedError
        about = self.searcher.index.about
        return _json(
            {"status": "ok", "documents": self.searcher.documents, "model": _named(about["model"]), "version": __version__}
        )

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def description(self, request: Request) -> Response:
        return _json(openapi(self.token is not None))

    async def read(self, request: Request) -> dict[str, Any]:
        """The body, as its path wants it; what is wrong with it is said with a status of its own."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send the body as application/json")
        body = await _body(request)
        try:
            asked = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is no JSON: {str(error)[:100]}") from None
        wrong = jsonschema.exceptions.best_match(self._validators[request.url.path].iter_errors(asked))
        if wrong is not None:
            where = "/".join(str(part) for part in wrong.absolute_path)
            raise HTTPException(422, f"{where or 'the body'}: {wrong.message[:200]}")
        try:
            json.dumps(asked, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise HTTPException(422, "a text has half a character in it (a lone surrogate)") from None
        return dict(asked)

    async def failed(self, request: Request, error: Exception) -> Response:
        status, said, headers = 422, str(error), None
        if isinstance(error, HTTPException):
            status, said, headers = error.status_code, error.detail, dict(error.headers or {})
        elif isinstance(error, OverloadedError | StoppedError):
            status, headers = 503, {"Retry-After": "1"}
        elif not isinstance(error, UsageError):
            logger.error("%s: %s", request.url.path, error)
            status, said = 500, "the server failed; its log says why"
        if "text/html" in request.headers.get("accept", ""):
            page = self.render("message.html", request, message=said, status=status)
            return Response(page, status, headers, media_type="text/html")
        return _json({"error": said}, status, headers)

    # ----------------------------------------------------------------------------------------- pages

    def render(self, template: str, request: Request, **more: Any) -> bytes:
        searcher = self.searcher
        shared = {
            "path": request.url.path,
            "limit": MAX_TEXT,
            "index": searcher.folder.name,
            "model": _named(searcher.index.about["model"]),
            "documents": searcher.documents,
            "beside": searcher.beside,
        }
        return (
            self.templates.get_template(template).render(shared | more).encode("utf-8", "replace")
        )  # ids can hold half a character

    def html(self, template: str, request: Request, **more: Any) -> Response:
        return Response(self.render(template, request, **more), media_type="text/html")

    async def page(self, request: Request) -> Response:
        return self.html("search.html", request, **await self.found(request))

    async def results(self, request: Request) -> Response:
        """The part of the page that changes as one types."""
        return self.html("results.html", request, **await self.found(request))

    async def found(self, request: Request) -> dict[str, Any]:
        query, k = _asked_text(request, "q"), _asked_k(request)
        if not query.strip():
            return {"query": "", "hits": None, "k": k}
        start = time.perf_counter()
        hits, vector = await self.searcher.search_and_encode(query, k)
        seconds = time.perf_counter() - start
        shown, expansion = await self.searcher.call(lambda: ([self._shown(hit) for hit in hits], self._expansion(vector, query)))
        return {"query": query, "k": k, "hits": shown, "seconds": seconds, "expansion": expansion}

    async def inspect(self, request: Request) -> Response:
        text = _asked_text(request, "text")
        role: Role = "document" if request.query_params.get("role") == "document" else "query"
        expansion = None
        if text.strip():
            row = await self.searcher.encode([text], role)
            expansion = await self.searcher.call(lambda: self._expansion(row, text, whole=True))
        return self.html("inspect.html", request, text=text, role=role, expansion=expansion)

    async def compare(self, request: Request) -> Response:
        if self.searcher.beside is None:
            raise HTTPException(404, "nothing to compare with: start the server with another index, or bm25, after the first")
        query = _asked_text(request, "q")
        sides, both = None, set[str]()
        if query.strip():
            (ours, _), theirs = await asyncio.gather(
                self.searcher.search_and_encode(query, _PAGE_K), self.searcher.search_beside(query, _PAGE_K)
            )
            both = {hit.id for hit in ours} & {hit.id for hit in theirs}
            columns = await self.searcher.call(lambda: [[self._shown(hit) for hit in hits] for hits in (ours, theirs)])
            sides = [(self.searcher.folder.name, columns[0]), (Path(self.searcher.beside).name, columns[1])]
        return self.html("compare.html", request, query=query, sides=sides, both=both)

    async def head(self, request: Request) -> Response:
        return self.html("head.html", request, **(await self.searcher.once("head", self._head))[0])

    async def head_figure(self, request: Request) -> Response:
        return Response((await self.searcher.once("head", self._head))[1], media_type="image/svg+xml")

    async def cost(self, request: Request) -> Response:
        return self.html("cost.html", request, **await self.searcher.once("cost", self._cost))

    async def login(self, request: Request) -> Response:
        if request.method == "GET":
            return self.html("login.html", request)
        form = (await _body(request)).decode("utf-8", "replace")
        given = parse_qs(form).get("token", [""])[0]
        if not self.allows(given):
            return Response(self.render("login.html", request, wrong=True), 401, media_type="text/html")
        answer = RedirectResponse("/", 303)
        if self.token is not None:
            answer.set_cookie(_COOKIE, self.token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return answer

    def allows(self, given: str) -> bool:
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())

    # --------------------------------------------------------------- what only the searcher's thread does

    def _terms(self, row: sparse.csr_matrix) -> list[tuple[str, float]]:
        names = term_names(self.searcher.index.encoder)
        pairs = [(names[term], float(weight)) for term, weight in zip(row.indices, row.data, strict=True)]
        return sorted(pairs, key=lambda pair: -pair[1])

    def _expansion(self, row: sparse.csr_matrix, text: str, whole: bool = False) -> dict[str, Any]:
        """The terms of a text's vector, those that stand in it apart from those that were added."""
        encoder = self.searcher.index.encoder
        names = term_names(encoder)
        own = {names[token] for token in encoder.tokenizer(text, truncation=True)["input_ids"]}
        terms = [{"term": name, "weight": weight, "added": name not in own} for name, weight in self._terms(row)]
        shown = terms if whole else terms[:_SHOWN]
        return {"terms": shown, "more": len(terms) - len(shown), "highest": terms[0]["weight"] if terms else 1.0}

    def _shown(self, hit: Hit) -> dict[str, Any]:
        """A hit for the page: its text in pieces, with the product of the term that a piece is a token of."""
        products = {match.term: match.product for match in hit.terms or []}
        text = hit.text[:_SNIPPET]
        encoder = self.searcher.index.encoder
        pieces: list[tuple[str, float | None]] = []
        at = 0
        if products and text:
            marked = encoder.tokenizer(text, return_offsets_mapping=True, truncation=True, add_special_tokens=False)
            names = term_names(encoder)
            for token, (start, end) in zip(marked["input_ids"], marked["offset_mapping"], strict=True):
                name = names[token]
                if name in products and start >= at and end > start:
                    pieces += [(text[at:start], None), (text[start:end], products[name])]
                    at = end
        pieces.append((text[at:], None))
        highest = max(products.values(), default=1.0)
        return {"hit": hit, "pieces": [piece for piece in pieces if piece[0]], "cut": len(hit.text) > _SNIPPET, "highest": highest}

    # ------------------------------------------------- what is found out once, off the searcher's thread

    async def _head(self, index: Index) -> tuple[dict[str, Any], str]:
        """The head report of the index's model, and its picture.

        Searches wait for the measuring alone, which needs the model and takes as long as encoding the 48 short probe texts.
        """
        encoder = index.encoder
        model = masked_lm(encoder)
        probe = await self.searcher.call(lambda: measure_logits(model, encoder.tokenizer, PROBE_QUERIES, PROBE_DOCUMENTS))

        def describe() -> tuple[dict[str, Any], str]:
            suggested = choose(probe, trained=is_saved_encoder(str(model.name_or_path)))
            report = describe_head(model, probe, _named(index.about["model"]))
            return {"report": report, "suggested": suggested}, logit_figure(suggested)

        return await self.searcher.aside(describe)

    async def _cost(self, index: Index) -> dict[str, Any]:
        """What the index costs, counted in a pass over all of it."""
        vectors = await self.searcher.call(lambda: encode(index.encoder, list(PROBE_QUERIES), "query"))
        names = await self.searcher.call(lambda: term_names(index.encoder))

        def count() -> dict[str, Any]:
            frequency = np.zeros(index.about["vocabulary"], np.int64)
            documents = 0
            for document in self.searcher.every_document(index):
                frequency[document.terms] += 1
                documents += 1
            postings = int(frequency.sum())
            order = np.argsort(-frequency, kind="stable")[:_SHOWN]
            return {
                "count": documents,
                "postings": postings,
                "dims": postings / max(1, documents),
                "query_dims": vectors.nnz / len(PROBE_QUERIES),
                "touched": float(frequency[vectors.indices].sum() / len(PROBE_QUERIES)),
                "bytes": sum(path.stat().st_size for path in index.folder.rglob("*") if path.is_file()),
                "used": int((frequency > 0).sum()),
                "vocabulary": len(frequency),
                "frequent": [(names[i], int(frequency[i]) / max(1, documents)) for i in order if frequency[i]],
            }

        return await self.searcher.aside(count)


# --------------------------------------------------------------------------------------------- helpers


class _Outermost:
    """Headers of every answer, the token, and what is counted."""

    def __init__(self, app: ASGIApp, site: _Site) -> None:
        self.app, self.site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status, begun = 500, False
        path = scope["path"] if scope["path"] in self.site.known else "other"

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        request = Request(scope)
        try:
            if self.site.token is not None and not self._may(request):
                wants_page = "text/html" in request.headers.get("accept", "")
                refused = (
                    RedirectResponse("/login", 303)
                    if wants_page
                    else _json({"error": "the token is missing or wrong: send Authorization: Bearer TOKEN"}, 401)
                )
                await refused(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        except asyncio.CancelledError:  # uvicorn's, for what is not done in time when it stops; it would print a traceback
            if not begun:
                await _json({"error": "the server is being stopped"}, 503)(scope, receive, answer)
        finally:
            self.site.requests.labels(path, str(status)).inc()
            self.site.seconds.labels(path).observe(time.perf_counter() - start)

    def _may(self, request: Request) -> bool:
        if request.url.path == "/login" or request.url.path.startswith("/static/"):
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else request.cookies.get(_COOKIE, "")
        return self.site.allows(given)


def _named(model: str) -> str:
    """A hub id as it is; of a folder its name, and its run's where that is only "model"."""
    path = Path(model)
    return model if not path.is_absolute() else "/".join(path.parts[-2:]) if path.name == "model" else path.name


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, media_type="application/json")  # in ASCII: texts may hold anything


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY:
                    raise HTTPException(413, f"the body is larger than {MAX_BODY:,} bytes")
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {_BODY_SECONDS} seconds", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None
    return b"".join(parts)


def _asked_text(request: Request, name: str) -> str:
    text = request.query_params.get(name, "")
    if len(text) > MAX_TEXT:
        raise HTTPException(422, f"the text has {len(text):,} characters; {MAX_TEXT:,} at most")
    return text


def _asked_k(request: Request) -> int:
    given = request.query_params.get("k", str(_PAGE_K))
    if not (given.isascii() and given.isdigit() and len(given) < 6 and 1 <= int(given) <= MAX_K):
        raise HTTPException(422, f"k is {given[:20]!r}: a whole number from 1 to {MAX_K}")
    return int(given)


def _static(name: str) -> Callable[[Request], Awaitable[Response]]:
    content = files("anysplade.serving").joinpath("static", name).read_bytes()

    async def handler(request: Request) -> Response:
        return Response(content, media_type=_STATIC[name])

    return handler


# ---------------------------------------------------------------------------------------------- serving


@dataclass(frozen=True)
class Served:
    """What a server did, when it has stopped."""

    index: str
    address: str
    requests: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _listen(host: str, port: int) -> socket.socket:
    # Named as TCP, or asyncio leaves Nagle's algorithm on, and every answer waits 40 ms for the client's acknowledgement.
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(_CONNECTIONS)
    except OSError:
        bound.close()
        raise
    return bound


def serve(
    index: str | Path,
    beside: str | None = None,
    *,
    model: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
) -> Served:
    """Serve an index until the process is told to stop (SIGINT or SIGTERM); requests under way are answered first.

    Args:
        beside: another index, or bm25, for the page that compares.
        model: where the first index's model lies, if it was moved.
        host: an address of this machine; one that others reach needs a token.
        port: 0 for any that is free.

    Raises:
        OptionError: another address without a token, or a port that is taken.
        DataError, ModelError: as ``Index.load`` and loading its model do.
    """
    if host not in _LOOPBACK and not token:
        raise OptionError(f"--host {host}: others can reach this address, so it needs --token, which every request must carry")
    if token is not None and (len(token) < 16 or not token.isascii()):
        raise OptionError("--token: at least 16 ASCII characters, or it can be guessed")
    try:
        bound = _listen(host, port)
    except OSError as error:
        raise OptionError(f"--host {host} --port {port}: {error.strerror or error}; choose another --port") from error
    with bound:
        searcher = Searcher(index, beside, model)
        site = _Site(searcher, token)
        named = f"[{host}]" if ":" in host else host
        address = f"http://{named}:{bound.getsockname()[1]}"
        logger.info("%s: %d documents at %s (stop with Ctrl+C)", index, searcher.documents, address)
        config = uvicorn.Config(
            site.app(_LOOPBACK if host in _LOOPBACK else None),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=2**16,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops on it, and sends it again afterwards
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[bound])
    counted = [sample for metric in site.requests.collect() for sample in metric.samples if sample.name.endswith("_total")]
    return Served(str(index), address, int(sum(sample.value for sample in counted)))
