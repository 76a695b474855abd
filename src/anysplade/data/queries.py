"""Queries, read from tables, TREC topics, ir_datasets and the hub."""

import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from anysplade.data.corpus import ID_NAMES, documents_by_id, hub_rows, source_file
from anysplade.data.names import QUERY_FILES, TOPIC_FORMATS, Source, resolve
from anysplade.data.rows import Place, Row, lines, plain_name, rows
from anysplade.errors import DataError

QUERY_NAMES = ("text", "query", "question", "contents", "body")  # of the column of texts; the first one that a row has is used


def load_queries(source: str | Path | Source) -> dict[str, str]:
    """Load queries by id, judged or not.

    Args:
        source: a file (JSONL, TSV, CSV, Parquet, TREC topics), a folder or zip that contains one, an ir_datasets id, or a hub
            dataset with the config ``queries``.

    Raises:
        DataError: there are none, or a row is malformed.
    """
    resolved = resolve(source, "queries")
    if resolved.kind == "ir_datasets" and resolved.at.has_queries():
        return {query.query_id: query.default_text() for query in resolved.at.queries_iter()}
    if resolved.kind == "hub":
        return _texts_by_id(hub_rows(resolved, "queries"), f"{resolved.at}:queries")
    if resolved.kind not in ("file", "folder"):
        raise DataError(f"{source}: has no queries; give a file or folder of queries, or an ir_datasets id with some")
    file = source_file(resolved, QUERY_FILES, "queries.jsonl")
    text = ""
    if plain_name(file).endswith(TOPIC_FORMATS):
        with lines(file) as numbered:
            text = "\n".join(line for _, line in numbered)
    has_tags = text.lstrip().startswith("<")
    queries = _texts_by_id(_topics(text, file) if has_tags else rows(file, ID_NAMES), file)
    if not queries:
        raise DataError(f"{file}: no query in it; each row needs _id and text")
    return queries


def _texts_by_id(numbered: Iterable[Row], source: object) -> dict[str, str]:
    return {id_: document.text for id_, document in documents_by_id(numbered, source, QUERY_NAMES)}


def _topics(text: str, path: Place) -> Iterator[Row]:
    """Numbers and queries of TREC topics in SGML, whose inner tags are often not closed, or in XML."""
    text = re.sub(r"<!\[CDATA\[(.*?)\]\]>", lambda found: html.escape(found[1]), text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    if "<!ENTITY" in text:
        raise DataError(f"{path}: declares entities of its own, which are not read; write their text in the topics")
    begun, ended = (len(re.findall(rf"<{end}(?:top|topic)\b", text, re.IGNORECASE)) for end in ("", "/"))
    if begun > ended:
        raise DataError(f"{path}: {begun} topics begin and {ended} end; the file is cut off, or an end tag is missing")
    for topic in re.finditer(r"<(top|topic)\b([^>]*)>(.*?)</\1\s*>", text, re.DOTALL | re.IGNORECASE):
        _, attributes, content = topic.groups()
        number = re.search(r"\b(?:number|num|id)\s*=\s*[\"']?\s*([^\s\"'>]+)", attributes, re.IGNORECASE) or re.search(
            r"<(?:num|number|id|identifier)\b[^>]*>\s*(?:Number:)?\s*([^\s<]+)", content, re.IGNORECASE
        )
        tags = (rf"<{tag}\b[^>]*>(?:(.*?)</{tag}\s*>|([^<]*))" for tag in ("query", "title"))
        parts = filter(None, (re.search(tag, content, re.DOTALL | re.IGNORECASE) for tag in tags))
        query = next((part[1] or part[2] or "" for part in parts), None if "<" in content else content)
        if not number or query is None:
            raise DataError(
                f"{path}: a topic without a number, or a <title> or <query>; add both: {' '.join(topic[0].split())[:60]!r}"
            )
        plain = html.unescape(re.sub("<[^>]*>", " ", query))
        row = {"_id": html.unescape(number[1]), "text": " ".join(plain.split()).removeprefix("Topic:").lstrip()}
        yield text.count("\n", 0, topic.start()) + 1, row
