"""Hard negatives for training examples, and a teacher's scores for them.

Both write the JSONL that training reads, block by block in a folder next to the output. An interrupted call continues after the
last whole block; a finished output is not made again.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from anysplade._common.arguments import require
from anysplade._common.files import beside, only_process, user_path, write_atomic
from anysplade._common.hashing import DataHash
from anysplade._common.outputs import earlier_call, file_digest, finished_record, record_path, write_record
from anysplade._common.progress import bar
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Pair
from anysplade.data.corpus import read_corpus
from anysplade.data.names import is_built_in
from anysplade.data.pairs import load_pairs
from anysplade.errors import DataError, ModelError, OptionError
from anysplade.model.options import checked_batch_tokens, checked_option
from anysplade.search.exact import Postings, nearest
from anysplade.training.teacher_cache import VectorCache, open_vector_cache
from anysplade.training.teachers import open_teacher

logger = logging.getLogger(__name__)

_BLOCK = 512  # examples per block

Found = tuple[np.ndarray, np.ndarray]  # positions of documents and their scores, the best first
Search = Callable[[list[str]], list[Found]]  # what is found for each of several queries
Block = Callable[[list[Pair]], Iterator[dict[str, Any]]]  # rows to write for a block of examples


@dataclass(frozen=True, repr=False)
class Mined(Tabular):
    """Result of ``mine`` and ``score``, stored next to the JSONL in ``OUTPUT.json``."""

    examples: int  # number of written examples
    left_out: int  # number of examples with too few negatives
    about: dict[str, Any]  # options, hash of the data, provenance

    def to_dict(self) -> dict[str, Any]:
        return {"examples": self.examples, "left_out": self.left_out} | self.about


def mine(
    data: str,
    output: str | Path,
    *,
    miner: str | Sequence[str] = "bm25",
    teacher: str | None = None,
    corpus: str | None = None,
    texts: str | None = None,
    negatives: int = 8,
    depth: int = 100,
    margin: float = 0.05,
    max_length: int | None = None,
    precision: str = "float32",
    language: str = "auto",
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Mined:
    """Find hard negatives: documents that retrievers rank high and that are not relevant to the query.

    A document that scores above ``1 - margin`` times the query's positive is left out, because it probably answers the query too
    (positive-aware mining, arXiv 2407.15831). The teacher gives the scores; without one, the miner itself does. Examples
    for which too few negatives are found are left out and counted.

    Args:
        data: training examples, in any form that ``read_pairs`` can read.
        output: a JSONL file.
        miner: ``"bm25"``, or the folder or hub id of a sparse encoder or dense model; several take turns.
        teacher: a dense model, sparse encoder or cross-encoder that tells probable answers from negatives; if None, the miner.
        corpus: documents to search (JSONL, BEIR folder); if None, the positives of the data.
        texts: source of the texts, if the data have ids.
        negatives: number of negatives per example, the highest ranked ones.
        depth: length of the ranking that they are taken from.
        margin: documents that score above ``1 - margin`` times the positive are left out as probable answers; in [0, 1).
        max_length: tokens after which models truncate a text; if None, each model's own limit.
        precision: of the models' matrix products, float32 or bfloat16.
        language: of BM25's stemmer and stop words, by its English name or ISO 639-1 code; auto is that of most documents, none
            is neither.
        batch_tokens: tokens that go through a sparse encoder together; by default 1,024 on a CPU, more on a GPU.
        progress: show progress bars.

    Raises:
        OutputError: the output exists and was made from other data or with other options.
        DataError, ModelError, OptionError: the data, a model or an option cannot be used.
    """
    negatives, depth = checked_option("negatives", negatives, int), checked_option("depth", depth, int)
    batch_tokens = checked_batch_tokens(batch_tokens)
    if negatives < 1 or depth < negatives or not 0 <= margin < 1:
        raise OptionError(
            f"negatives {negatives}, depth {depth}, margin {margin}: negatives must be 1 to depth, and margin in [0, 1)"
        )
    require("miner", miner, (str, list, tuple), "give bm25, or a model's folder or hub id, or a list of these")
    miners = [miner] if isinstance(miner, str) else list(dict.fromkeys(miner))
    if not miners:
        raise OptionError("no miner; name bm25 or a model")
    if teacher == "bm25":
        raise OptionError("bm25 cannot be the teacher of mining: it would recognize probable answers by their words; name a model")
    _require_extra(*miners)
    pairs = load_pairs(data, texts=texts, progress=progress)
    searched = [] if corpus is None else [document.full_text for document in read_corpus(corpus).values()]
    documents = list(dict.fromkeys([*searched, *(pair.positive for pair in pairs)]))
    position = {text: i for i, text in enumerate(documents)}
    positives: dict[str, set[int]] = {}
    for pair in pairs:
        positives.setdefault(pair.query, set()).add(position[pair.positive])
    words = _bm25_language(documents, language, *miners)
    named = miner if isinstance(miner, str) else miners
    options: dict[str, Any] = {"data": data, "miner": named, "corpus": corpus, "negatives": negatives}
    options |= {"depth": depth, "margin": margin}
    given = {"teacher": teacher, "max_length": max_length, "precision": None if precision == "float32" else precision}
    options |= {name: value for name, value in given.items() if value is not None} | _written(words)
    output = user_path(output)

    # Models are opened when they are first needed; a finished output needs none.
    @functools.cache
    def vectors_of(model: str) -> VectorCache:
        opened = open_teacher(model, max_length=max_length, precision=precision, batch_tokens=batch_tokens)
        cache = open_vector_cache(opened, _parts_of(output) / "teacher", progress)
        cache.ensure_cached(documents, "document")
        cache.ensure_cached([pair.query for pair in pairs], "query")
        return cache

    @functools.cache
    def searches() -> list[Search]:
        return [_searcher(name, vectors_of, documents, depth, words) for name in miners]

    found_any = False

    def candidates(part: list[Pair]) -> list[list[int]]:
        """Candidates for each pair, miners taking turns; without a teacher, only those below the miner's bound."""
        nonlocal found_any
        ranked: list[list[list[int]]] = [[] for _ in part]
        for search in searches():
            for rankings, pair, (found, scores) in zip(ranked, part, search([pair.query for pair in part]), strict=True):
                found_any = found_any or len(found) > 0
                own = scores[found == position[pair.positive]]
                # If the positive is not ranked, the miner missed it, and there is no bound.
                bound = _bound(own[0], margin) if len(own) and teacher is None else np.inf
                rankings.append([int(d) for d in found[scores <= bound] if int(d) not in positives[pair.query]])
        return [list(dict.fromkeys(d for d in chain(*zip_longest(*rankings)) if d is not None)) for rankings in ranked]

    def block(part: list[Pair]) -> Iterator[dict[str, Any]]:
        chosen = candidates(part)
        if teacher is not None:
            chosen = _below_the_positive(part, chosen, documents, vectors_of(teacher), negatives, margin)
        for pair, taken in zip(part, chosen, strict=True):
            if len(taken) >= negatives:
                yield {"query": pair.query, "positive": pair.positive, "negatives": [documents[d] for d in taken[:negatives]]}

    with only_process(_parts_of(output)):
        mined = _in_blocks(output, options, pairs, documents, block, progress, f"mining negatives with {' and '.join(miners)}")
    if mined is None:
        reason = "; ask for fewer, look deeper, or give a larger `corpus`"
        if not found_any:
            terms = "words" if miners == ["bm25"] else "active dims"
            reason = f": {', '.join(miners)} finds no document for any query, they have no {terms} in common"
            reason += "; try another `miner` or `corpus`"
        raise DataError(f"{data}: no example has enough negatives{reason}")
    return mined


def score(
    data: str,
    output: str | Path,
    *,
    teacher: str,
    texts: str | None = None,
    max_length: int | None = 512,
    batch_size: int = 32,
    language: str = "auto",
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Mined:
    """Score each example's positive and negatives with a teacher.

    Args:
        data: examples with negatives.
        output: a JSONL file.
        teacher: folder or hub id of a cross-encoder, whose raw logits are used, a dense model or a sparse encoder; or ``"bm25"``.
        texts: source of the texts, if the data have ids.
        max_length: tokens after which a query with a document is truncated.
        batch_size: texts, or pairs of texts, per forward pass of the teacher.
        language: as in ``mine``, if the teacher is BM25.
        batch_tokens: tokens that go through a sparse encoder together; by default 1,024 on a CPU, more on a GPU.
        progress: show progress bars.

    Raises:
        ModelError: the model cannot teach, is a cross-encoder with several outputs, or gives NaN.
        OutputError, DataError: as in ``mine``.
    """
    _require_extra(teacher)
    pairs = load_pairs(data, texts=texts, progress=progress)
    if not pairs[0].negatives:
        raise DataError(f"{data}: no negatives to score; anysplade mine finds some")
    documents = list(dict.fromkeys(text for pair in pairs for text in (pair.positive, *pair.negatives)))
    words = _bm25_language(documents, language, teacher)
    options: dict[str, Any] = {"data": data, "teacher": teacher, "max_length": max_length} | _written(words)
    batch_tokens = checked_batch_tokens(batch_tokens)
    output = user_path(output)

    @functools.cache
    def judge() -> Callable[[list[tuple[str, str]]], np.ndarray]:
        if teacher == "bm25":
            return _scorer_by_words(documents, words)
        opened = open_teacher(teacher, max_length=max_length, batch_size=batch_size, batch_tokens=batch_tokens)
        return open_vector_cache(opened, _parts_of(output) / "teacher").scores

    def block(part: list[Pair]) -> Iterator[dict[str, Any]]:
        read = [(pair.query, text) for pair in part for text in (pair.positive, *pair.negatives)]
        for pair, scores in zip(part, judge()(read).reshape(len(part), -1), strict=True):
            row = {"query": pair.query, "positive": pair.positive, "negatives": pair.negatives}
            yield row | {"scores": [round(float(value), 5) for value in scores]}

    with only_process(_parts_of(output)):
        scored = _in_blocks(output, options, pairs, documents, block, progress, f"scoring with {teacher}")
    assert scored is not None  # each example has its scores
    return scored


def _bound(positive: float, margin: float) -> float:
    """The score above which a document is probably an answer; it is below the positive's score even if that is negative."""
    return float(positive - margin * abs(positive))


def _below_the_positive(
    part: list[Pair], candidates: list[list[int]], documents: list[str], judge: VectorCache, negatives: int, margin: float
) -> list[list[int]]:
    """The first candidates of each pair that the teacher scores below the positive; it scores a few at a time, as needed."""
    own = judge.scores([(pair.query, pair.positive) for pair in part])
    chosen: list[list[int]] = [[] for _ in part]
    start, end = 0, negatives
    while True:
        unfinished = [i for i, taken in enumerate(chosen) if len(taken) < negatives]
        judged = [(i, document) for i in unfinished for document in candidates[i][start:end]]
        if not judged:
            return chosen
        for (i, document), given in zip(judged, judge.scores([(part[i].query, documents[d]) for i, d in judged]), strict=True):
            if given <= _bound(own[i], margin):
                chosen[i].append(document)
        start, end = end, 3 * end


# ------------------------------------------------------------------------------ miners and teachers


def _require_extra(*models: str) -> None:
    """Raise ExtraError, before the data are read, if BM25 is among the models and its library is not installed."""
    if any(is_built_in(name, "bm25") for name in models):
        import_module("anysplade.search.bm25")


def _bm25_language(documents: list[str], language: str, *models: str) -> str:
    """The language that BM25 reads the documents in, told by them if it is "auto"; "english" if BM25 is not among the models."""
    if "bm25" not in models:
        return "english"
    from anysplade.search.bm25 import language_of

    return language_of(documents, language)


def _written(language: str) -> dict[str, str]:
    """The option of the record; English is left out, so that outputs of versions without the option are still known."""
    return {} if language == "english" else {"language": language}


def _searcher(miner: str, vectors_of: Callable[[str], VectorCache], documents: list[str], depth: int, language: str) -> Search:
    """The search of a miner, which is BM25 or a model with vectors of the documents."""
    if miner == "bm25":
        from anysplade.search.bm25 import BM25

        bm25 = BM25(documents, language=language)
        return lambda queries: bm25.top(queries, depth)
    cache = vectors_of(miner)
    if cache.teacher.kind == "cross-encoder":
        raise ModelError(f"{miner}: a cross-encoder cannot search; mine with bm25, a sparse or a dense model")
    rows = cache.vectors(documents, "document").astype(np.float32)
    if cache.teacher.kind == "sparse":
        postings = Postings.from_documents(rows)
        return lambda queries: postings.top_rows(cache.vectors(queries, "query"), depth)
    return lambda queries: nearest(cache.vectors(queries, "query").astype(np.float32), rows, depth)


def _scorer_by_words(documents: list[str], language: str) -> Callable[[list[tuple[str, str]]], np.ndarray]:
    """A function that gives BM25's scores of pairs of a query and one of the documents, (pairs,)."""
    from anysplade.search.bm25 import BM25

    bm25, position = BM25(documents, language=language), {text: i for i, text in enumerate(documents)}

    def scores(pairs: list[tuple[str, str]]) -> np.ndarray:
        groups = [(query, [position[text] for _, text in group]) for query, group in groupby(pairs, key=lambda pair: pair[0])]
        return np.concatenate([bm25.score(query, np.array(places)) for query, places in groups])

    return scores


# --------------------------------------------------------------------------------------- in blocks


def _parts_of(output: Path) -> Path:
    """The folder of the blocks until the output is written."""
    return beside(output, "{}.parts")


def _in_blocks(
    output: Path, options: dict[str, Any], pairs: list[Pair], documents: list[str], block: Block, progress: bool, task: str
) -> Mined | None:
    """Write the rows of all blocks; None, with nothing written, if there are no rows."""
    parts = _parts_of(output)
    about = options | {"data_hash": DataHash(chain(pairs, documents)).hexdigest()}
    started = parts / "about.json"
    if started.exists() and earlier_call(started, about, {"data_hash": "data"}) is None:
        for file in (started, *parts.glob("*.jsonl")):  # of unknown origin
            file.unlink()
    if not started.exists() and (record := finished_record(output, about)) is not None:
        return Mined(record.pop("examples"), record.pop("left_out"), record)
    blocks = []
    with bar(task, "example", len(pairs), progress) as shown:
        for start in range(0, len(pairs), _BLOCK):
            written = _written_part(parts, start)
            part = pairs[start : start + _BLOCK]
            if written is None:
                written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in block(part)).encode()
                write_record(started, about)  # not earlier: a call that fails at once leaves nothing
                write_atomic(parts / f"{start:09}-{hashlib.sha256(written).hexdigest()}.jsonl", written)
            blocks.append(written)
            shown.update(len(part))
    count = sum(written.count(b"\n") for written in blocks)
    if not count:
        shutil.rmtree(parts)
        return None
    write_atomic(output, b"".join(blocks))
    about |= {"sha256": file_digest(output), "provenance": provenance()}
    mined = Mined(count, len(pairs) - count, about)
    write_record(record_path(output), mined.to_dict())
    shutil.rmtree(parts)
    if mined.left_out:
        logger.warning("%d of %d examples left out, which have too few hard negatives", mined.left_out, len(pairs))
    return mined


def _written_part(parts: Path, start: int) -> bytes | None:
    """The rows of a block that an earlier call wrote; None if it wrote none, or they are damaged."""
    for part in parts.glob(f"{start:09}-*.jsonl"):
        if part.stem.endswith(file_digest(part)):
            return part.read_bytes()
        logger.warning("%s: is damaged; it is made again", part)
        part.unlink()
    return None
