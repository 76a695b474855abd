"""Training examples from one row of data: which columns it has, and what they mean.

A row is a line of JSON or a row of a table. Its columns are recognized by their names:

- pairs and triples: ``query``, ``positive``, ``negative``; several negatives are ``negative_1``, ``negative_2``, ...
  or a list; each positive in a list gives an example
- judged: ``query``, ``document``, ``label``; a label of 0 or below means not relevant, and the row is left out
- scored: ``scores`` of the positives and then of each negative, or ``score``, the margin to the one negative
- lists: ``query``, ``documents``, ``scores``; the document with the highest score is the positive. With ``labels``,
  documents above 0 are positives and the others negatives
- ids instead of texts: ``query_id``, ``positive_id``, ``negative_ids``, ``doc_ids``; the texts are in a collection
- MS MARCO: ``query`` and ``passages`` with ``passage_text`` and ``is_selected``, which marks the positives

This covers the formats of FlagEmbedding, sentence-transformers, Tevatron and DPR.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from anysplade._common.progress import counted
from anysplade.data.collections import Pair
from anysplade.data.lookup import Lookup
from anysplade.data.text import replace_surrogates, shown
from anysplade.errors import DataError

# Names that the column of each role can have; the first one that a row has is used. "... id" are roles of ids instead of texts.
_NAMES = {
    "query": ("query", "anchor", "question", "query_text"),
    "query id": ("query_id", "qid", "query-id"),
    "positive": (
        *("positive", "positives", "pos", "positive_passages", "positive_ctxs"),
        *("document", "passage", "answer", "response"),
    ),
    "positive id": ("positive_id", "positive_ids", "pos_id", "positive_document_ids", "doc_id", "corpus-id"),
    "negative": ("negative", "negatives", "neg", "negs", "negative_passages", "hard_negative_ctxs", "negative_ctxs"),
    "negative id": ("negative_id", "negative_ids", "neg_id", "neg_ids", "negative_document_ids"),
    "documents": ("documents", "passages"),
    "documents id": ("doc_ids", "document_ids", "passage_ids"),
    "scores": ("scores", "score"),
    "label": ("labels", "label"),
    "positive scores": ("positive_scores", "pos_scores"),
    "negative scores": ("negative_scores", "neg_scores"),
}
_SCORE_ROLES: tuple[str, ...] = ("scores", "label", "positive scores", "negative scores")
_ALL_NAMES = {name for names in _NAMES.values() for name in names}
_NUMBERED = re.compile(r"(negative|neg)_\d+")
_OBVIOUS = {"query", "positive", "negative", "negatives", "scores", "kind", "document_id"}  # columns that are not worth a log line

Columns = dict[str, list[str]]  # names of the columns of each role; only numbered negatives have several


def select_passages(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MS MARCO as documents with labels; any other row unchanged."""
    passages = row.get("passages")
    if isinstance(passages, list) and passages and all(isinstance(p, dict) and "is_selected" in p for p in passages):
        passages = {name: [p.get(name) for p in passages] for name in ("passage_text", "is_selected")}
    if not isinstance(passages, dict) or not {"passage_text", "is_selected"} <= passages.keys():
        return row
    documents = {"documents": passages["passage_text"], "labels": passages["is_selected"]}  # one list per column
    return {name: value for name, value in row.items() if name != "passages"} | documents


def recognized(row: Mapping[str, Any]) -> set[str]:
    """The columns of a row whose names have a role."""
    return {name for name in row if name in _ALL_NAMES or _NUMBERED.fullmatch(name)}


def difference(now: set[str], before: set[str]) -> str:
    """The first missing and the first new column, for a message."""
    missing, new = sorted(before - now), sorted(now - before)
    return " and ".join([f'"{name}" is missing' for name in missing[:1]] + [f'"{name}" is new here' for name in new[:1]])


def find_columns(row: dict[str, Any], place: str) -> Columns:
    """The names of the columns of each role; a query and a positive, or a list of documents with scores, are required."""
    columns = {role: [name] for role, names in _NAMES.items() if (name := next((name for name in names if name in row), None))}
    if numbered := sorted(filter(_NUMBERED.fullmatch, row), key=lambda name: int(name.rpartition("_")[2])):
        columns["negative"] = numbered
    if not {"query", "query id"} & columns.keys():
        raise _no_column("query", row, place)
    if not {"positive", "positive id", "documents", "documents id"} & columns.keys():
        raise _no_column("positive", row, place)
    if {"documents", "documents id"} & columns.keys():
        if not {"scores", "label"} & columns.keys():
            raise _no_column("scores", row, place)
    elif {"negative", "negative id"} & columns.keys():  # sentence-transformers calls the scores of negatives "label"
        if "label" in columns:
            columns.setdefault("scores", columns.pop("label"))
    elif "scores" in columns:  # the score of one document, without negatives to compare it with, says whether it is relevant
        columns.setdefault("label", columns.pop("scores"))
    if len({"positive scores", "negative scores"} & columns.keys()) == 1:  # useless without the other
        columns = {role: names for role, names in columns.items() if role not in ("positive scores", "negative scores")}
    return columns


def _no_column(role: str, row: dict[str, Any], place: str) -> DataError:
    names = ", ".join(_NAMES[role] + (_NAMES["label"] if role == "scores" else ()))
    given = ", ".join(name[:40] for name in row) or "none"
    ids = f" (or, for ids, {', '.join(_NAMES[f'{role} id'])})" if f"{role} id" in _NAMES else ""
    return DataError(f"{place}: no column for the {role} (columns: {given}); name it one of {names}{ids}")


def describe_columns(columns: Columns, row: dict[str, Any]) -> str | None:
    """The role of each column, for the log; None if the names of the columns say it."""
    if row.keys() <= _OBVIOUS:
        return None
    labels = [
        role if names == [role] else f'{role} from "{names[0]}"' if len(names) == 1 else f'{role} from "{names[0]} ... {names[-1]}"'
        for role, names in columns.items()
    ]
    unused = [name for name in row if not any(name in names for names in columns.values())]
    return f"columns: {', '.join(labels)}" + (f"; not used: {', '.join(unused)}" if unused else "")


# Positives; the score of each in a list, which is empty if there is none; negatives; and their scores, or the margins to them.
_Sides = tuple[list[str], list[list[float]], list[str], list[float]]


def row_pairs(row: dict[str, Any], columns: Columns, lookup: Lookup, place: str, limit: int | None) -> Iterator[Pair]:
    """The examples of a row, one per positive, with at most ``limit`` negatives each; none if the row is judged not relevant."""

    def texts(role: str) -> list[str]:
        if role in columns:
            return [_text(value, role, name, lookup, place) for name in columns[role] for value in _listed(row[name])]
        return [lookup.text(role, id_, place) for name in columns.get(f"{role} id", ()) for id_ in _listed(row[name])]

    queries = texts("query")
    if len(queries) != 1:
        raise DataError(f"{place}: {len(queries)} queries; give each row one")
    scores = {role: _scores(row, columns[role][0], place) for role in _SCORE_ROLES if role in columns}
    if max(scores.get("label") or [1]) <= 0:
        return
    if {"documents", "documents id"} & columns.keys():
        sides = _split_documents(texts("documents"), scores.get("scores"), scores.get("label"), place)
    else:
        sides = _match_scores(texts("positive"), texts("negative"), scores, place)
    positives, positive_scores, negatives, negative_scores = sides
    count = len(negatives) if limit is None else limit
    if len(negatives) < count:
        raise DataError(f"{place}: {len(negatives)} negatives, but `negatives` is {count}; lower it, or add negatives")
    for positive, score in zip(positives, positive_scores, strict=True):
        pair_scores = (*score, *negative_scores[:count]) if count else ()
        yield Pair(queries[0], positive, tuple(negatives[:count]), pair_scores or None)


def _split_documents(documents: list[str], scores: list[float] | None, labels: list[float] | None, place: str) -> _Sides:
    """The documents of a list: positives by their labels, or else the one with the highest score."""
    values = labels if scores is None else scores
    assert values is not None  # ``find_columns`` requires one of them
    if not documents or any(given is not None and len(given) != len(documents) for given in (scores, labels)):
        raise DataError(f"{place}: {len(documents)} documents and {len(values)} scores; give each document one")
    count = 1 if labels is None else sum(label > 0 for label in labels)
    ranked = sorted(range(len(documents)), key=lambda i: (labels is not None and labels[i] <= 0, -values[i]))
    texts, own = [documents[i] for i in ranked], [values[i] for i in ranked]
    return texts[:count], [[score] for score in own[:count]], texts[count:], own[count:]


def _match_scores(positives: list[str], negatives: list[str], given: dict[str, list[float]], place: str) -> _Sides:
    """The positives that have no label or one above 0, and the negatives, each with its score."""
    if not positives:
        raise DataError(f"{place}: no positive; give each row at least one")
    scores, labels = given.get("scores"), given.get("label")
    if not negatives:
        labels, scores = scores if labels is None else labels, None
        if labels is not None:
            if len(labels) not in (1, len(positives)):
                raise DataError(f"{place}: {len(labels)} labels for {len(positives)} positives; give each positive one")
            labels = labels * len(positives) if len(labels) == 1 else labels
            positives = [text for text, label in zip(positives, labels, strict=True) if label > 0]
    positive_scores, negative_scores = given.get("positive scores"), given.get("negative scores")
    if positive_scores is not None and negative_scores is not None:
        if (len(positive_scores), len(negative_scores)) != (len(positives), len(negatives)):
            raise DataError(
                f"{place}: {len(positive_scores)} and {len(negative_scores)} scores for {len(positives)} positives and "
                f"{len(negatives)} negatives; give each one"
            )
    elif scores is not None:
        if len(scores) == len(positives) + len(negatives):
            positive_scores, negative_scores = scores[: len(positives)], scores[len(positives) :]
        elif len(positives) == 1 and len(scores) == len(negatives):
            negative_scores = scores  # margins
        else:
            which = f"{len(scores)} scores for {counted(len(positives), 'positive')} and {counted(len(negatives), 'negative')}"
            raise DataError(f"{place}: {which}; give one each, the positive's first, or the margin of each negative")
    own = [[] for _ in positives] if positive_scores is None else [[score] for score in positive_scores]
    return positives, own, negatives, negative_scores or []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, role: str, name: str, lookup: Lookup, place: str) -> str:
    if isinstance(value, dict):  # a passage with a title
        title, text = value.get("title") or "", value.get("text", value.get("contents"))
        value = f"{title} {text}".strip() if isinstance(title, str) and isinstance(text, str) else None
    if isinstance(value, int) and not isinstance(value, bool) and lookup.given:
        return lookup.text(role, value, place)
    if not isinstance(value, str):
        fix = "for ids name the collection of their texts with `texts`"
        raise DataError(f'{place}: "{name}" is {shown(value)}, not a string; {fix}')
    if not value.strip():
        raise DataError(f'{place}: "{name}" is empty; give it a text or remove the row')
    if lookup.given and lookup.find(role, value) is not None:
        raise DataError(f'{place}: "{name}" is {value[:80]!r}, an id of `texts`; name the column "{_NAMES[f"{role} id"][0]}"')
    return replace_surrogates(value)


def _scores(row: dict[str, Any], name: str, place: str) -> list[float]:
    scores = []
    for value in _listed(row[name]):
        try:
            score = math.nan if isinstance(value, bool) else float(value)  # cells of CSV and TSV are strings
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f'{place}: "{name}" has {shown(value)}; give finite numbers')
        scores.append(score)
    return scores
