"""Hard negatives for training examples, and a teacher's scores for them.

Both write the JSONL that training reads. They work in blocks beside the output: killed and started again
they continue after the last whole block, and a finished output is not made twice.
"""

import functools
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from tqdm import tqdm

from anysplade._common.files import finished_record, record_path, write_whole
from anysplade._common.provenance import provenance
from anysplade.data.collections import Pair, read_corpus
from anysplade.data.pairs import load_pairs
from anysplade.errors import DataError, ModelError, OptionError
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import encode
from anysplade.model.head import check_weights
from anysplade.search.exact import Postings

logger = logging.getLogger(__name__)

_BLOCK = 512  # queries whose result is written at once


class Mined(NamedTuple):
    """The record that ``mine`` and ``score`` write beside the JSONL, to ``OUTPUT.json``."""

    examples: int  # written
    left_out: int  # examples with too few negatives
    about: dict[str, Any]  # options, hash of the data, provenance

    def to_dict(self) -> dict[str, Any]:
        return {"examples": self.examples, "left_out": self.left_out} | self.about


def mine(
    data: str,
    output: str | Path,
    *,
    miner: str = "bm25",
    corpus: str | None = None,
    texts: str | None = None,
    negatives: int = 8,
    depth: int = 100,
    margin: float = 0.05,
    progress: bool = False,
) -> Mined:
    """Find hard negatives: documents that a retriever ranks high and that are no positive of the query.

    A document that scores above ``1 - margin`` times the query's positive is left out: it is likely an answer
    that was not marked (positive-aware mining, arXiv 2407.15831). An example for which too few are found
    is left out, and counted.

    Args:
        data: training examples, in any form that ``read_pairs`` knows.
        output: a JSONL file.
        miner: ``"bm25"``, or a sparse encoder's folder or hub id.
        corpus: where to look; the positives of the data if None.
        texts: where the texts of ids in the data are.
        negatives: wanted of each example, the highest ranked.
        depth: of the ranking they are taken from.

    Raises:
        OutputError: the output exists and was made in another way.
        DataError, ModelError, OptionError: as the parts raise them.
    """
    if negatives < 1 or depth < negatives or not 0 <= margin < 1:
        raise OptionError(
            f"negatives {negatives}, depth {depth}, margin {margin}: take 1 or more of a depth no smaller, margin in [0, 1)"
        )
    _require_extra(miner)
    pairs = load_pairs(data, texts=texts, progress=progress)
    documents = list(dict.fromkeys(pair.positive for pair in pairs))
    if corpus is not None:
        documents = list(dict.fromkeys([*(d.full_text for d in read_corpus(corpus).values()), *documents]))
    position = {text: i for i, text in enumerate(documents)}
    positives: dict[str, set[int]] = {}
    for pair in pairs:
        positives.setdefault(pair.query, set()).add(position[pair.positive])
    options = {"data": data, "miner": miner, "corpus": corpus, "negatives": negatives, "depth": depth, "margin": margin}
    search = functools.cache(lambda: _searcher(miner, documents, depth, progress))  # a finished output needs none

    found_any = False

    def block(part: list[Pair]) -> Iterator[dict[str, Any]]:
        nonlocal found_any
        for pair, (found, scores) in zip(part, search()([pair.query for pair in part]), strict=True):
            found_any = found_any or len(found) > 0
            own = scores[found == position[pair.positive]]
            # A positive that is not ranked tells nothing about the others: the miner missed it.
            bound = (1 - margin) * own[0] if len(own) else np.inf
            keep = [
                int(d) for d, score in zip(found, scores, strict=True) if int(d) not in positives[pair.query] and score <= bound
            ]
            if len(keep) >= negatives:
                yield {"query": pair.query, "positive": pair.positive, "negatives": [documents[d] for d in keep[:negatives]]}

    mined = _in_blocks(Path(output).expanduser(), options, pairs, documents, block, progress, "mining")
    if mined is None:
        terms = "words" if miner == "bm25" else "active dims"
        raise DataError(
            f"{data}: no example has enough negatives"
            + (
                "; ask for fewer, look deeper, or give a larger `corpus`"
                if found_any
                else f": {miner} finds no document for any query, they have no {terms} in common; try another `miner` or `corpus`"
            )
        )
    return mined


def score(
    data: str,
    output: str | Path,
    *,
    teacher: str,
    texts: str | None = None,
    max_length: int | None = 512,
    batch_size: int = 32,
    progress: bool = False,
) -> Mined:
    """Have a teacher score each example's positive and negatives.

    Args:
        data: examples with negatives.
        output: a JSONL file.
        teacher: a cross-encoder's folder or hub id, which gives its raw logits; or ``"bm25"``.
        texts: where the texts of ids in the data are.
        max_length: tokens to which a query with a document is cut.
        batch_size: pairs of texts a forward pass of the teacher.

    Raises:
        ModelError: the teacher is no cross-encoder of one output, or gives NaN.
        OutputError, DataError: as ``mine``.
    """
    _require_extra(teacher)
    pairs = load_pairs(data, texts=texts, progress=progress)
    if not pairs[0].negatives:
        raise DataError(f"{data}: no negatives to score; anysplade mine finds some")
    documents = list(dict.fromkeys(text for pair in pairs for text in (pair.positive, *pair.negatives)))
    options = {"data": data, "teacher": teacher, "max_length": max_length}
    judge = functools.cache(lambda: _judge(teacher, documents, max_length, batch_size))

    def block(part: list[Pair]) -> Iterator[dict[str, Any]]:
        for pair, scores in zip(part, judge()(part), strict=True):
            if not np.isfinite(scores).all():
                raise ModelError(f"{teacher}: gives NaN or infinity for the query {pair.query[:60]!r}")
            row = {"query": pair.query, "positive": pair.positive, "negatives": pair.negatives}
            yield row | {"scores": [round(float(value), 5) for value in scores]}

    scored = _in_blocks(Path(output).expanduser(), options, pairs, documents, block, progress, "scoring")
    assert scored is not None  # each example has its scores
    return scored


# ------------------------------------------------------------------------------ miners and teachers

Search = Callable[[list[str]], list[tuple[np.ndarray, np.ndarray]]]  # queries to positions and scores, the best first


def _require_extra(name: str) -> None:
    """Raise ExtraError before the data are read if BM25 is asked for and its library is missing; models need no extra."""
    if name == "bm25":
        import_module("anysplade.evaluation.bm25")


def _searcher(miner: str, documents: list[str], depth: int, progress: bool) -> Search:
    if miner == "bm25":
        from anysplade.evaluation.bm25 import BM25

        bm25 = BM25(documents)
        return lambda queries: bm25.top(queries, depth)
    encoder = open_encoder(miner)
    postings = Postings.from_documents(encode(encoder, documents, "document", progress=progress))
    return lambda queries: postings.top_rows(encode(encoder, queries, "query"), depth)


def _judge(
    teacher: str, documents: list[str], max_length: int | None, batch_size: int
) -> Callable[[list[Pair]], Iterator[np.ndarray]]:
    if teacher == "bm25":
        from anysplade.evaluation.bm25 import BM25

        bm25, position = BM25(documents), {text: i for i, text in enumerate(documents)}
        return lambda part: (
            bm25.score(pair.query, np.array([position[text] for text in (pair.positive, *pair.negatives)])) for pair in part
        )
    try:
        model = CrossEncoder(teacher, max_length=max_length)
    except (OSError, ValueError) as error:
        raise ModelError(f"{teacher}: cannot be loaded as a cross-encoder: {str(error).splitlines()[0]}") from error
    check_weights(type(model.model), str(model.model.name_or_path), head="classification head")
    if model.num_labels != 1:
        raise ModelError(f"{teacher}: gives {model.num_labels} outputs a pair; a teacher gives one")

    def by_model(part: list[Pair]) -> Iterator[np.ndarray]:
        texts = [(pair.query, text) for pair in part for text in (pair.positive, *pair.negatives)]
        # Logits: a sigmoid would leave MarginMSE nothing to match and KL nothing to tell apart.
        scores = model.predict(texts, batch_size=batch_size, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return iter(np.asarray(scores).reshape(len(part), -1))

    return by_model


# --------------------------------------------------------------------------------------- in blocks


def _in_blocks(
    output: Path,
    options: dict[str, Any],
    pairs: Sequence[Pair],
    documents: Sequence[str],
    block: Callable[[list[Pair]], Iterator[dict[str, Any]]],
    progress: bool,
    task: str,
) -> Mined | None:
    """Write the rows of all blocks and return what was written; None, with nothing written, if no block gave a row."""
    parts = output.with_name(f"{output.name}.parts")
    digest = hashlib.sha256(json.dumps([list(pairs), list(documents)]).encode()).hexdigest()
    about = options | {"data_hash": digest}
    if (before := finished_record(output, about, parts)) is not None:
        return Mined(before.pop("examples"), before.pop("left_out"), before)
    write_whole(parts / "about.json", json.dumps(about, indent=2) + "\n")
    starts = range(0, len(pairs), _BLOCK)
    for start in tqdm(starts, desc=task, unit="block", disable=not progress, leave=False, file=sys.stderr):
        part = parts / f"{start:09}.jsonl"
        if not part.exists():
            rows = block(list(pairs[start : start + _BLOCK]))
            write_whole(part, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    lines = "".join((parts / f"{start:09}.jsonl").read_text(encoding="utf-8") for start in starts)
    count = lines.count("\n")
    if not count:
        shutil.rmtree(parts)
        return None
    mined = Mined(count, len(pairs) - count, about | {"provenance": provenance()})
    write_whole(output, lines)
    write_whole(record_path(output), json.dumps(mined.to_dict(), indent=2) + "\n")
    shutil.rmtree(parts)
    if mined.left_out:
        logger.info("%s: %d of %d examples left out for want of enough negatives", output, mined.left_out, len(pairs))
    return mined
