"""The HTTP API: requests, responses and handlers, from which FastAPI derives the OpenAPI description."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import generate_latest
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from scipy import sparse
from starlette.requests import ClientDisconnect

from anysplade import __version__
from anysplade._common.arguments import did_you_mean
from anysplade.errors import OptionError
from anysplade.model.options import Role
from anysplade.search.filters import check_filter
from anysplade.search.fusion import Fusion
from anysplade.search.hits import Hit, Hits, TermMatch, check_query
from anysplade.serving.batching import Searcher, StoppedError

MAX_BODY = 2**20  # bytes
MAX_TEXT = 10_000  # characters of a query, a text, an id or a value of a filter
MAX_TEXTS = 64  # in one request to /encode
MAX_K = 1000
MAX_NAMES = 32  # in a filter
MAX_VALUES = 1000  # per name in a filter
DEFAULT_K = 10
_BODY_SECONDS = 10  # for a client to send its body


def _checked_by(check: Callable[[Any], object], kind: type) -> BeforeValidator:
    """Check values of a type before pydantic, whose messages say less about how to fix them."""

    def validate(value: Any) -> Any:
        if isinstance(value, kind):
            check(value)
        return value

    return BeforeValidator(validate)


_Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
_Query = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=r"\S"), _checked_by(check_query, str)]
_Value = Annotated[str, Field(max_length=MAX_TEXT)] | int | Annotated[float, Field(allow_inf_nan=False)] | bool
_Values = Annotated[  # the tags limit the errors to the kind that was sent
    Annotated[_Value, Tag("value")] | Annotated[list[_Value], Field(min_length=1, max_length=MAX_VALUES), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "value"),
]


class _Body(BaseModel, extra="forbid", strict=True):
    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Name the field that an unknown one may mean; pydantic only says that extra inputs are not permitted."""
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                hint = did_you_mean(name[:80], cls.model_fields) or f"; fields: {', '.join(cls.model_fields)}"
                raise ValueError(f"no field {name[:80]!r}{hint}")
        return values


class SearchRequest(_Body):
    """A query."""

    query: _Query
    k: Annotated[int, Field(ge=1, le=MAX_K)] = DEFAULT_K
    explain: Annotated[bool, Field(description="return the terms that add up to each score")] = False
    filter: Annotated[
        dict[_Text, _Values],
        Field(
            max_length=MAX_NAMES,
            description="metadata that a hit must have: a value by name, or a list of values of which one must match; numbers and "
            "bools equal their texts; case and surrounding blanks do not matter",
        ),
        _checked_by(check_filter, dict),
    ] = {}
    fuse: Annotated[
        Fusion | None,
        Field(description="fuse the model's ranking with BM25's, if the index has BM25; by default as the server was started"),
    ] = None


class EncodeRequest(_Body):
    """Texts to encode."""

    texts: Annotated[list[_Text], Field(min_length=1, max_length=MAX_TEXTS)]
    role: Role = "query"


class ExplainRequest(_Body):
    """A query and the id of a document."""

    query: _Query
    id: Annotated[str, Field(max_length=MAX_TEXT)]


class SearchResponse(BaseModel):
    """Hits, best first."""

    query: str
    hits: list[Hit]
    note: Annotated[str | None, Field(description="without hits: the name or value of the filter that no document has")] = None


class Vector(BaseModel):
    """A sparse vector, the highest weight first. Qdrant takes ids and weights, OpenSearch takes names and weights."""

    indices: Annotated[list[int], Field(description="ids of the terms in the model's vocabulary")]
    values: Annotated[list[float], Field(description="their weights")]
    terms: Annotated[list[str], Field(description="their names")]


class EncodeResponse(BaseModel):
    """A vector for each text."""

    vectors: list[Vector]


class ExplainResponse(BaseModel):
    """The score of a document, before any fusion, and the terms that add up to it, the largest product first."""

    id: str
    score: float
    terms: list[TermMatch]


class HealthResponse(BaseModel):
    """The served index."""

    status: Literal["ok"]
    documents: int
    model: str
    version: str


class ErrorResponse(BaseModel):
    """The reason for an error, in one line."""

    error: str


def errors(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Error responses for FastAPI, from descriptions by status."""
    return {status: {"model": ErrorResponse, "description": text} for status, text in descriptions.items()}


_POST_ERRORS = {
    400: "the body is not JSON or not UTF-8",
    408: f"the body did not arrive within {_BODY_SECONDS} seconds",
    413: f"the body is larger than {MAX_BODY:,} bytes",
    415: "the content type is not application/json, or the body is compressed",
    422: "a field is missing, unknown or invalid",
    503: "too many requests are waiting, try again in a moment; or the server is stopping",
}


class ASCIIResponse(JSONResponse):
    """JSON in ASCII: ids and texts of documents can contain lone surrogates, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


async def read_body(request: Request) -> bytes:
    """The body of a request, with limits of size and time. (FastAPI 0.115 limits neither, later versions only the size.)"""
    encodings = ",".join(request.headers.getlist("content-encoding")).lower().replace(" ", "").split(",")
    if compressed := ", ".join(encoding for encoding in encodings if encoding not in ("", "identity")):
        message = f"the body is encoded as {compressed[:100]}; send it as it is, without Content-Encoding"
        raise HTTPException(415, message, {"Accept-Encoding": "identity"})
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"the body is larger than {MAX_BODY:,} bytes; send less at once")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS} seconds", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the client disconnected") from None
    return bytes(body)


class _JSONRequest(Request):
    """A request with a JSON body. FastAPI alone sets no limits, accepts NaN, and answers an empty body with 422."""

    async def body(self) -> bytes:
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send the body as application/json")
        self._body = await read_body(self)  # where Starlette looks for it: the stream can be read only once
        if not self._body:
            raise HTTPException(400, "the body is empty; send JSON")
        return self._body

    async def json(self) -> Any:
        try:
            return json.loads((await self.body()).decode(), parse_constant=_refuse_constant, parse_float=_parse_float)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not JSON: {str(error)[:100]}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _parse_float(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value  # 5.0 is an integer in JSON Schema, and thus in the OpenAPI description


class _JSONRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JSONRequest(request.scope, request.receive))

        return handle


async def _get_searcher(request: Request) -> Searcher:
    return request.app.state.searcher


CurrentSearcher = Annotated[Searcher, Depends(_get_searcher)]
router = APIRouter(route_class=_JSONRoute)


@router.post("/search", response_model=SearchResponse, responses=errors(_POST_ERRORS))
async def search(searcher: CurrentSearcher, body: SearchRequest) -> Response:
    """The best documents for a query: scores above 0, best first."""
    searcher.check(body.k, body.fuse)
    try:
        hits = await searcher.search(body.query, body.k, body.explain, body.filter, body.fuse)
    except OptionError as error:  # no document has a name of the filter, but a later one may have it
        hits = Hits(note=str(error))
    found = {"query": body.query, "hits": [hit.to_dict() for hit in hits]}
    return ASCIIResponse(found if hits.note is None else found | {"note": hits.note})


@router.post("/encode", response_model=EncodeResponse, responses=errors(_POST_ERRORS))
async def encode(searcher: CurrentSearcher, body: EncodeRequest) -> Response:
    """Sparse vectors of texts: ids, weights and names of the terms."""
    rows = await searcher.encode(body.texts, body.role)
    names = await searcher.run(lambda: searcher.index.queries.term_names)
    return ASCIIResponse({"vectors": [_vector(names, row) for row in rows]})


@router.post("/explain", response_model=ExplainResponse, responses=errors(_POST_ERRORS | {404: "there is no such document"}))
async def explain(searcher: CurrentSearcher, body: ExplainRequest) -> Response:
    """The terms that add up to the score of a document for a query."""
    terms = await searcher.explain(body.query, body.id)
    if terms is None:
        raise HTTPException(404, f"no document {body.id[:80]!r}")
    return ASCIIResponse({"id": body.id, "score": sum(t.product for t in terms), "terms": [asdict(t) for t in terms]})


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=HealthResponse, responses=errors({503: "the index cannot be searched any more"}))
async def health(searcher: CurrentSearcher) -> Response:
    """Whether the index can be searched."""
    if not searcher.running:
        raise StoppedError
    model = short_name(searcher.index.about["model"])
    return ASCIIResponse({"status": "ok", "documents": searcher.documents, "model": model, "version": __version__})


@router.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type="text/plain; version=0.0.4")


def _vector(names: Sequence[str], row: sparse.csr_matrix) -> dict[str, list[Any]]:
    """A vector, (1, vocabulary), as ``Vector``."""
    order = np.argsort(-row.data, kind="stable")
    terms = row.indices[order].tolist()
    return {"indices": terms, "values": row.data[order].tolist(), "terms": [names[term] for term in terms]}


def short_name(model: str) -> str:
    """A hub id; or the name of a folder, with the name of its parent if it is only "model"."""
    path = Path(model)
    return model if not path.is_absolute() else "/".join(path.parts[-2:]) if path.name == "model" else path.name
