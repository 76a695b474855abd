"""Relevance judgements (qrels), read from BEIR and TREC files, ir_datasets and the hub: grades by query id and document id."""

import math
from typing import Any

from anysplade.data.external import hub_dataset
from anysplade.data.names import Source
from anysplade.data.rows import Place, find_file, lines, plain_name, trec_columns
from anysplade.errors import DataError

Qrels = dict[str, dict[str, int]]


def find_qrels(folder: Place, split: str) -> tuple[Place | None, bool]:
    """The file with a split's judgements, and whether it is BEIR's ``qrels/SPLIT.tsv`` and not one of TREC's."""
    beir = find_file(folder / "qrels", [f"{split}.tsv"])
    trec = [f"qrels.{split}.txt", f"qrels.{split}.tsv", "qrels.txt", "qrels.tsv", "qrels.trec", "qrels"]
    return (beir, True) if beir else (find_file(folder, trec), False)


def read_qrels(source: Source, split: str) -> Qrels:
    """The judgements of a collection in a folder, in ir_datasets or on the hub; an id of ir_datasets names its split already."""
    if source.kind == "ir_datasets":
        return dict(source.at.qrels_dict())
    return _hub_qrels(str(source.at), split) if source.kind == "hub" else _folder_qrels(source.at, split)


def _folder_qrels(folder: Place, split: str) -> Qrels:
    """The judgements in a folder, with BEIR's three columns or TREC's four."""
    path, is_beir = find_qrels(folder, split)
    if path is None:
        files = (folder / "qrels").iterdir() if (folder / "qrels").is_dir() else ()
        splits = sorted(plain_name(file).removesuffix(".tsv") for file in files)
        raise DataError(f"{folder}: no qrels/{split}.tsv (splits found: {', '.join(splits) or 'none'}); choose one with `split`")
    qrels: Qrels = {}
    with lines(path) as numbered:
        for number, line in numbered:
            parts = line.split("\t") if is_beir else trec_columns(line)
            if not line.strip() or (number == 1 and parts[-1].strip().lower() in ("score", "relevance", "rel")):
                continue
            if len(parts) != (3 if is_beir else 4):
                form = "query-id, corpus-id, score, separated by tabs" if is_beir else "query, iteration, document, grade"
                raise DataError(f"{path}:{number}: {len(parts)} columns; a line is {form}")
            _add_judgement(qrels, parts[0], parts[-2], parts[-1].strip(), f"{path}:{number}")
    if not qrels:
        raise DataError(f"{path}: no judgement in it; each line is query-id, corpus-id, score")
    return qrels


def _hub_qrels(name: str, split: str) -> Qrels:
    """The judgements of a hub dataset, in its config qrels or default; if it has only one split, that is used."""
    try:
        judged = hub_dataset(name, "qrels", split=None)
    except DataError:
        judged = hub_dataset(name, "default", split=None)
    judgements = judged[split] if split in judged else next(iter(judged.values())) if len(judged) == 1 else None
    if judgements is None:
        raise DataError(f"{name}: no split {split!r} (splits found: {', '.join(judged)}); choose one with `split`")
    qrels: Qrels = {}
    for number, row in enumerate(judgements, 1):
        place = f"{name}, judgement {number}"
        if not {"query-id", "corpus-id"} <= row.keys():
            raise DataError(f"{place}: no query-id and corpus-id (columns: {', '.join(row)}); give its columns these names")
        _add_judgement(qrels, str(row["query-id"]), str(row["corpus-id"]), row.get("score", 1), place)
    return qrels


def _add_judgement(qrels: Qrels, query_id: str, document_id: str, grade: Any, place: str) -> None:
    """Add a judgement; its grade must be a whole number, which may be written ``1.0``, and agree with an earlier one."""
    try:
        value = float(grade)
    except (TypeError, ValueError):
        value = math.nan
    if not value.is_integer():
        raise DataError(f"{place}: the score {str(grade)[:40]!r} is not a whole number; give 0, 1 or another")
    before = qrels.setdefault(query_id, {}).setdefault(document_id, int(value))
    if before != value:
        raise DataError(
            f"{place}: {document_id[:80]!r} has the grade {value:g} for the query {query_id[:80]!r}, and {before} before; keep one"
        )
