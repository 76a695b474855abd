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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from anysplade._common.arguments import require
from anysplade._common.files import beside, only_process, user_path, whole_file, write_atomic
from anysplade._common.outputs import earlier_call, file_digest, finished_record, record_path, write_record
from anysplade._common.progress import bar
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Pair
from anysplade.data.corpus import empty_corpus, iter_corpus
from anysplade.data.names import is_built_in
from anysplade.errors import DataError, ModelError, OptionError
from anysplade.model.options import checked_batch_tokens, checked_option
from anysplade.search.exact import Postings
from anysplade.training.dense_mining import nearest_in_blocks
from anysplade.training.mining_data import Documents, Positives, data_digest, scratch_folder, store_examples
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
    named = miner if isinstance(miner, str) else miners
    options: dict[str, Any] = {"data": data, "miner": named, "corpus": corpus, "negatives": negatives}
    options |= {"depth": depth, "margin": margin}
    given = {"teacher": teacher, "max_length": max_length, "precision": None if precision == "float32" else precision}
    options |= {name: value for name, value in given.items() if value is not None}
    output = user_path(output)

    with only_process(_parts_of(output)), scratch_folder(_parts_of(output)) as scratch, ExitStack() as opened_searches:
        pairs = store_examples(data, texts, scratch, progress)
        searched = () if corpus is None else _texts_of(corpus)
        known = Documents(chain(searched, (pair.positive for pair in pairs)), scratch)
        documents, positives = known.texts, Positives(pairs, known)
        words = _bm25_language(documents, language, *miners)
        options |= _written(words)

        # Models are opened when they are first needed; a finished output needs none.
        @functools.cache
        def vectors_of(model: str) -> VectorCache:
            opened = open_teacher(model, max_length=max_length, precision=precision, batch_tokens=batch_tokens)
            cache = open_vector_cache(opened, _parts_of(output) / "teacher", progress)
            cache.ensure_cached(documents, "document")
            cache.ensure_cached(_Queries(pairs), "query")
            return cache

        @functools.cache
        def searches() -> list[Search]:
            return [opened_searches.enter_context(_searcher(name, vectors_of, documents, depth, words)) for name in miners]

        found_any = False

        def candidates(part: list[Pair]) -> list[list[int]]:
            """Candidates for each pair, miners taking turns; without a teacher, only those below the miner's bound."""
            nonlocal found_any
            ranked: list[list[list[int]]] = [[] for _ in part]
            own_positives = {pair.query: positives.of(pair.query) for pair in part}
            for search in searches():
                for rankings, pair, (found, scores) in zip(ranked, part, search([pair.query for pair in part]), strict=True):
                    found_any = found_any or len(found) > 0
                    own = scores[found == known.number(pair.positive)]
                    # If the positive is not ranked, the miner missed it, and there is no bound.
                    bound = _bound(own[0], margin) if len(own) and teacher is None else np.inf
                    rankings.append([int(d) for d in found[scores <= bound] if int(d) not in own_positives[pair.query]])
            return [list(dict.fromkeys(d for d in chain(*zip_longest(*rankings)) if d is not None)) for rankings in ranked]

        def block(part: list[Pair]) -> Iterator[dict[str, Any]]:
            chosen = candidates(part)
            if teacher is not None:
                chosen = _below_the_positive(part, chosen, documents, vectors_of(teacher), negatives, margin)
            for pair, taken in zip(part, chosen, strict=True):
                if len(taken) >= negatives:
                    yield {"query": pair.query, "positive": pair.positive, "negatives": [documents[d] for d in taken[:negatives]]}

        task = f"mining negatives with {' and '.join(miners)}"
        mined = _in_blocks(output, options, pairs, documents, block, progress, task)
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
    options: dict[str, Any] = {"data": data, "teacher": teacher, "max_length": max_length}
    batch_tokens = checked_batch_tokens(batch_tokens)
    output = user_path(output)

    with only_process(_parts_of(output)), scratch_folder(_parts_of(output)) as scratch:
        pairs = store_examples(data, texts, scratch, progress)
        if not pairs[0].negatives:
            raise DataError(f"{data}: no negatives to score; anysplade mine finds some")
        documents = Documents((text for pair in pairs for text in (pair.positive, *pair.negatives)), scratch)
        words = _bm25_language(documents.texts, language, teacher)
        options |= _written(words)

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

        scored = _in_blocks(output, options, pairs, documents.texts, block, progress, f"scoring with {teacher}")
    assert scored is not None  # each example has its scores
    return scored


def _bound(positive: float, margin: float) -> float:
    """The score above which a document is probably an answer; it is below the positive's score even if that is negative."""
    return float(positive - margin * abs(positive))


def _below_the_positive(
    part: list[Pair], candidates: list[list[int]], documents: Sequence[str], judge: VectorCache, negatives: int, margin: float
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


def _bm25_language(documents: Sequence[str], language: str, *models: str) -> str:
    """The language that BM25 reads the documents in, told by them if it is "auto"; "english" if BM25 is not among the models."""
    if "bm25" not in models:
        return "english"
    from anysplade.search.bm25 import language_of

    return language_of(documents, language)


def _written(language: str) -> dict[str, str]:
    """The option of the record; English is left out, so that outputs of versions without the option are still known."""
    return {} if language == "english" else {"language": language}


@contextmanager
def _searcher(
    miner: str, vectors_of: Callable[[str], VectorCache], documents: Sequence[str], depth: int, language: str
) -> Iterator[Search]:
    """The search of a miner, which is BM25 or a model with vectors of the documents."""
    if miner == "bm25":
        from anysplade.search.bm25 import BM25

        bm25 = BM25(documents, language=language)
        yield lambda queries: bm25.top(queries, depth)
        return
    cache = vectors_of(miner)
    if cache.teacher.kind == "cross-encoder":
        raise ModelError(f"{miner}: a cross-encoder cannot search; mine with bm25, a sparse or a dense model")
    if cache.teacher.kind == "sparse":
        postings = Postings.from_documents(cache.vectors(documents, "document").astype(np.float32))
        yield lambda queries: postings.top_rows(cache.vectors(queries, "query"), depth)
    else:
        rows, device = cache.mapped_vectors(documents, "document"), cache.teacher.model.device.type
        yield lambda queries: nearest_in_blocks(cache.vectors(queries, "query"), rows, depth, device)


def _scorer_by_words(documents: Documents, language: str) -> Callable[[list[tuple[str, str]]], np.ndarray]:
    """A function that gives BM25's scores of pairs of a query and one of the documents, (pairs,)."""
    from anysplade.search.bm25 import BM25

    bm25 = BM25(documents.texts, language=language)

    def scores(pairs: list[tuple[str, str]]) -> np.ndarray:
        groups = [
            (query, [documents.number(text) for _, text in group]) for query, group in groupby(pairs, key=lambda pair: pair[0])
        ]
        return np.concatenate([bm25.score(query, np.array(places)) for query, places in groups])

    return scores


# --------------------------------------------------------------------------------------- in blocks


def _parts_of(output: Path) -> Path:
    """The folder of the blocks until the output is written."""
    return beside(output, "{}.parts")


def _in_blocks(
    output: Path,
    options: dict[str, Any],
    pairs: Sequence[Pair],
    documents: Sequence[str],
    block: Block,
    progress: bool,
    task: str,
) -> Mined | None:
    """Write the rows of all blocks; None, with nothing written, if there are no rows."""
    parts = _parts_of(output)
    about = options | {"data_hash": data_digest(pairs, documents)}
    started = parts / "about.json"
    if started.exists() and earlier_call(started, about, {"data_hash": "data"}) is None:
        for file in (started, *parts.glob("*.jsonl")):  # of unknown origin
            file.unlink()
    if not started.exists() and (record := finished_record(output, about)) is not None:
        return Mined(record.pop("examples"), record.pop("left_out"), record)
    earlier: dict[str, list[Path]] = {}  # blocks of an interrupted call, by the number of their first example
    for part in parts.glob("*.jsonl"):
        earlier.setdefault(part.stem.partition("-")[0], []).append(part)
    written: list[Path] = []
    count = 0
    with bar(task, "example", len(pairs), progress) as shown:
        for start in range(0, len(pairs), _BLOCK):
            examples = list(pairs[start : start + _BLOCK])
            path, rows = _whole_part(earlier.get(f"{start:09}", []))
            if path is None:
                content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in block(examples)).encode()
                write_record(started, about)  # not earlier: a call that fails at once leaves nothing
                path, rows = parts / f"{start:09}-{hashlib.sha256(content).hexdigest()}.jsonl", content.count(b"\n")
                write_atomic(path, content)
            written.append(path)
            count += rows
            shown.update(len(examples))
    if not count:
        shutil.rmtree(parts)
        return None
    with whole_file(output) as whole:
        for path in written:
            whole.write(path.read_bytes())
    about |= {"sha256": file_digest(output), "provenance": provenance()}
    mined = Mined(count, len(pairs) - count, about)
    write_record(record_path(output), mined.to_dict())
    shutil.rmtree(parts)
    if mined.left_out:
        logger.warning("%d of %d examples left out, which have too few hard negatives", mined.left_out, len(pairs))
    return mined


def _whole_part(parts: Sequence[Path]) -> tuple[Path | None, int]:
    """The undamaged file among those of a block, and the number of its rows; None if there is none."""
    for part in parts:
        content = part.read_bytes()
        if part.stem.endswith(hashlib.sha256(content).hexdigest()):
            return part, content.count(b"\n")
        logger.warning("%s: is damaged; it is made again", part)
        part.unlink()
    return None, 0


def _texts_of(corpus: str) -> Iterator[str]:
    """The texts of a corpus, which must have some."""
    is_empty = True
    for _, document in iter_corpus(corpus):
        is_empty = False
        yield document.full_text
    if is_empty:
        raise empty_corpus(corpus)


class _Queries(Sequence[str]):
    """The queries of examples."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i: Any) -> Any:
        return [pair.query for pair in self._pairs[i]] if isinstance(i, slice) else self._pairs[i].query
