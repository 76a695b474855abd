"""The HTML pages: search, terms, compare, head, cost and the login form."""

import asyncio
import hmac
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, PackageLoader
from scipy import sparse

from anysplade._common.extras import extra
from anysplade._common.progress import counted
from anysplade.model.options import Role
from anysplade.model.probe import PROBE_QUERIES
from anysplade.model.queries import Queries
from anysplade.model.terms import join_terms
from anysplade.model.vocabulary import split_words
from anysplade.search.hits import Hit, join_matches, query_words
from anysplade.search.index import Index
from anysplade.serving.api import DEFAULT_K, MAX_K, MAX_TEXT, CurrentSearcher, read_body, short_name
from anysplade.serving.batching import Searcher

COOKIE = "anysplade-token"
_SNIPPET = 600  # characters shown of a document
_TERMS = 24  # terms shown of a query, and of the list of the most frequent terms
_TEMPLATES = Environment(loader=PackageLoader("anysplade.serving"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
_TEMPLATES.filters["counted"] = counted

_Text = Annotated[str, Query(max_length=MAX_TEXT)]
_K = Annotated[int, Query(ge=1, le=MAX_K)]

router = APIRouter(include_in_schema=False)
_page = partial(router.api_route, methods=["GET", "HEAD"])


def html(template: str, request: Request, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> Response:
    """A page from a template."""
    searcher: Searcher = request.app.state.searcher
    model = short_name(searcher.index.about["model"])
    text = _TEMPLATES.get_template(template).render(values, path=request.url.path, searcher=searcher, model=model, limit=MAX_TEXT)
    return HTMLResponse(text.encode("utf-8", "replace"), status, headers)  # ids can contain lone surrogates


@_page("/")
@_page("/results")
async def _search(request: Request, searcher: CurrentSearcher, q: _Text = "", k: _K = DEFAULT_K) -> Response:
    template = "results.html" if request.url.path == "/results" else "search.html"
    if not q.strip():
        return html(template, request, query="", results=None)
    start = time.perf_counter()
    hits, row = await searcher.search_and_encode(q, k)
    seconds = time.perf_counter() - start
    queries = searcher.index.queries
    results, expansion = await searcher.run(lambda: (_results(queries, q, hits), _expansion(queries, row, q)))
    return html(template, request, query=q, results=results, seconds=seconds, expansion=expansion, term_limit=_TERMS)


@_page("/terms")
async def _terms(request: Request, searcher: CurrentSearcher, text: _Text = "", role: Role = "query") -> Response:
    expansion = None
    if text.strip():
        row = await searcher.encode([text], role)
        expansion = await searcher.run(lambda: _expansion(searcher.index.queries, row, text))
    return html("terms.html", request, text=text, role=role, expansion=expansion)


@_page("/compare")
async def _compare(request: Request, searcher: CurrentSearcher, q: _Text = "") -> Response:
    if searcher.beside is None:
        raise HTTPException(404, "there is nothing to compare with; start the server with a second index, or bm25")
    columns, shared_ids = None, set[str]()
    if q.strip():
        (left, _), right = await asyncio.gather(searcher.search_and_encode(q, DEFAULT_K), searcher.search_beside(q, DEFAULT_K))
        shared_ids = {hit.id for hit in left} & {hit.id for hit in right}
        lists = await searcher.run(lambda: [_results(searcher.index.queries, q, hits) for hits in (left, right)])
        columns = [(searcher.folder.name, lists[0]), (Path(searcher.beside).name, lists[1])]
    return html("compare.html", request, query=q, columns=columns, shared_ids=shared_ids)


@_page("/head")
async def _head(request: Request, searcher: CurrentSearcher) -> Response:
    values, _ = await searcher.cached("head", partial(_measure_head, searcher))
    return html("head.html", request, **values)


@_page("/head.svg")
async def _head_figure(searcher: CurrentSearcher) -> Response:
    _, figure = await searcher.cached("head", partial(_measure_head, searcher))
    return Response(figure, media_type="image/svg+xml")


@_page("/cost")
async def _cost(request: Request, searcher: CurrentSearcher) -> Response:
    return html("cost.html", request, **await searcher.cached("cost", partial(_measure_cost, searcher)))


@_page("/login")
async def _login_form(request: Request) -> Response:
    return html("login.html", request)


@router.post("/login")
async def _login(request: Request) -> Response:
    token: str | None = request.app.state.token
    form = parse_qs((await read_body(request)).decode("utf-8", "replace"))  # FastAPI needs another package to read forms
    if not token_matches(token, form.get("token", [""])[0]):
        return html("login.html", request, 401, wrong=True)
    response = RedirectResponse("/", 303)
    if token is not None:
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response


def token_matches(token: str | None, given: str) -> bool:
    """Whether a client gave the token, compared in constant time; True if the server needs none."""
    return token is None or hmac.compare_digest(given.encode(), token.encode())


def _expansion(queries: Queries, row: sparse.csr_matrix, text: str) -> dict[str, Any]:
    """The words in the vector of a text, (1, vocabulary), and whether the model added them."""
    names, tokens = queries.term_names, queries.tokens(text)
    given = {token for token, _, _ in queries.tokens(text, special_tokens=True)}
    weights = zip(row.indices.tolist(), row.data.tolist(), strict=True)
    words = join_terms(weights, names, split_words(text, tokens, names))
    terms = [{"term": word.term, "weight": word.weight, "added": given.isdisjoint(word.ids)} for word in words]
    return {"terms": terms, "highest": terms[0]["weight"] if terms else 1.0}


def _results(queries: Queries, query: str, hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The hits for the templates: each with its text in pieces, and the words that it shares with the query."""
    words = query_words(queries, query)
    return [_pieces(queries, hit) | {"hit": hit, "matches": join_matches(hit.terms or [], words)} for hit in hits]


def _pieces(queries: Queries, hit: Hit) -> dict[str, Any]:
    """The text of a hit in pieces; a token of a shared term is a piece with the product of the term."""
    products = {match.term: match.product for match in hit.terms or [] if not match.lexical}
    text = hit.text[:_SNIPPET]
    pieces: list[tuple[str, float | None]] = []
    done = 0
    if products and text:
        names = queries.term_names
        for token, start, end in queries.tokens(text):
            term = names[token]
            if term in products and start >= done and end > start:
                pieces += [(text[done:start], None), (text[start:end], products[term])]
                done = end
    pieces.append((text[done:], None))
    return {"pieces": [piece for piece in pieces if piece[0]], "cut": len(hit.text) > _SNIPPET}


async def _measure_head(searcher: Searcher, index: Index) -> tuple[dict[str, Any], str]:
    """The head report of the model, and the histogram as SVG; both need torch.

    Searches wait only for the logits, which take as long as encoding the 48 short probe texts.
    """
    with extra("train"):
        from anysplade.serving.head_page import describe_logits, measure_index

    measured = await searcher.run(partial(measure_index, index))
    return await searcher.run_second(partial(describe_logits, *measured, short_name(index.about["model"])))


async def _measure_cost(searcher: Searcher, index: Index) -> dict[str, Any]:
    """The size of the index and its postings, from a pass over all documents."""
    queries, names = await searcher.run(lambda: (index.encode_queries(PROBE_QUERIES), index.term_names))

    def count() -> dict[str, Any]:
        frequency = np.zeros(len(names), np.int64)
        documents = 0
        for document in searcher.read_documents(index):
            frequency[document.terms] += 1
            documents += 1
        postings = int(frequency.sum())
        return {
            "count": documents,
            "postings": postings,
            "document_dims": postings / max(1, documents),
            "query_dims": queries.nnz / len(PROBE_QUERIES),
            "query_postings": float(frequency[queries.indices].sum() / len(PROBE_QUERIES)),
            "bytes": sum(path.stat().st_size for path in index.folder.rglob("*") if path.is_file()),
            "used": int((frequency > 0).sum()),
            "vocabulary": len(frequency),
            "frequent": [
                (names[term], int(frequency[term]) / max(1, documents))
                for term in np.argsort(-frequency, kind="stable")[:_TERMS]
                if frequency[term]
            ],
        }

    return await searcher.run_second(count)
