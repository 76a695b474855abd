"""The pairs that ``distil`` trains on, with hard negatives by BM25, and those that it holds out to compare by."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from anysplade.data.collections import Collection, Pair
from anysplade.data.corpus import Document, read_corpus
from anysplade.data.document_pairs import make_pairs
from anysplade.data.pairs import read_pairs
from anysplade.data.rows import rows as read_rows
from anysplade.data.text import stable_hash
from anysplade.errors import OptionError
from anysplade.training.made_pairs import PAIRS, TRAINING, chosen_to_hold, hold_out, rows_to_train_on, write_rows
from anysplade.training.mining import mine

EXAMPLES, MINED = "examples.jsonl", "mined.jsonl"  # files in the output: the sampled pairs, without and with negatives

_SPARE = 8  # more negatives than needed, at most, since some are of the query's own document


def write_examples(
    corpus: str, output: Path, options: Mapping[str, Any], given: Collection | None, progress: bool
) -> tuple[Collection, dict[str, int]]:
    """Write the pairs to train on to ``EXAMPLES``; returns the collection to compare by, and the number of pairs by kind.

    There are at most as many pairs as the training reads, chosen by their hash. A made query's document lacks the part that the
    query was made from: BM25, which is added to the model's score, finds that by itself.
    """
    if options["pairs"] is None:
        found = make_pairs(corpus, output / PAIRS, kinds=options["kinds"], progress=progress).pairs
        if given is None:
            collection, _, held = hold_out(corpus, output, read_corpus(corpus, progress=progress), options["kinds"], progress)
        else:
            collection, held = given, set()
        rows: Iterable[Mapping[str, str]] = rows_to_train_on(output, held)
    else:
        pairs = list(read_pairs(options["pairs"], negatives=0, progress=progress))
        found = {"given": len(pairs)}
        if given is None:
            collection, pairs = hold_out_pairs(pairs, read_corpus(corpus, progress=progress), options["pairs"])
        else:
            collection = given
        rows = ({"query": pair.query, "positive": pair.positive} for pair in pairs)
    most = options["steps"] * options["batch_size"]
    kept = heapq.nsmallest(most, rows, key=lambda row: (stable_hash(f"{row['query']}\n{row['positive']}"), row["query"]))
    if len(kept) < options["batch_size"]:
        raise OptionError(f"`batch_size` is {options['batch_size']}: there are {len(kept)} pairs to train on; make it smaller")
    write_rows(output / EXAMPLES, kept)
    return collection, found


def hold_out_pairs(pairs: Sequence[Pair], documents: Mapping[str, Document], name: str) -> tuple[Collection, list[Pair]]:
    """A collection of one query for each of a tenth of the positives, and the pairs that share neither query nor positive with it.

    A positive that is no document of the corpus becomes one.
    """
    held = chosen_to_hold((pair.positive for pair in pairs), name)
    asked: dict[str, str] = {}  # held positives by query
    for pair in pairs:
        if pair.positive in held:
            held.discard(pair.positive)
            asked.setdefault(pair.query, pair.positive)
    ids = {document.text: id_ for id_, document in documents.items()}
    ids |= {document.full_text: id_ for id_, document in documents.items()}
    corpus, numbers = dict(documents), count()
    relevant: dict[str, dict[str, int]] = {query: {} for query in asked}
    for pair in pairs:
        if pair.query in relevant:
            if pair.positive not in ids:
                ids[pair.positive] = next(id_ for number in numbers if (id_ := f"positive {number}") not in corpus)
                corpus[ids[pair.positive]] = Document("", pair.positive)
            relevant[pair.query][ids[pair.positive]] = 1
    queries = {f"query {number}": query for number, query in enumerate(asked)}
    judged = f"{len(queries)} held-out pairs of {name}"
    collection = Collection(judged, corpus, queries, {id_: relevant[query] for id_, query in queries.items()})
    taken = {pair.positive for pair in pairs if pair.query in asked}
    return collection, [pair for pair in pairs if pair.query not in asked and pair.positive not in taken]


def add_negatives(output: Path, negatives: int, progress: bool) -> int:
    """Write the pairs of ``EXAMPLES`` with hard negatives by BM25 to ``TRAINING``; returns their number.

    A negative is never of the query's own document, which can have several pairs. Pairs with too few negatives are left out.
    """
    rows = [row for _, row in read_rows(output / EXAMPLES)]
    if negatives:
        of_document = Counter(row["document_id"] for row in rows if "document_id" in row)
        spare = min(_SPARE, max(of_document.values(), default=1) - 1)
        mine(str(output / EXAMPLES), output / MINED, negatives=negatives + spare, progress=progress)
        document = {row["positive"]: row.get("document_id", row["positive"]) for row in rows}
        mined = (row for _, row in read_rows(output / MINED))
        others = ((row, [text for text in row["negatives"] if document[text] != document[row["positive"]]]) for row in mined)
        rows = [row | {"negatives": texts[:negatives]} for row, texts in others if len(texts) >= negatives]
    write_rows(output / TRAINING, rows)
    return len(rows)
