"""Searching and building: anysplade's index beside bare Qdrant Edge, splade-index and scipy, on one thread.

Documents are synthetic: 118 terms each, drawn as often as the queries use them; queries are published SPLADE-v3
vectors (JSON lines with ``vector``, a weight by token). Every engine answers the same queries in turns. Each build has a
process of its own: in one that built before, memory that was used already makes the next build faster. The floor
is the bytes of the postings that a query reads over the measured bandwidth of memory.
"""

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge
import torch
from scipy import sparse

from anysplade.data.collections import Document
from anysplade.search.documents import EncodedDocument
from anysplade.search.exact import Postings
from anysplade.search.store import Store
from harness import finish, parser, summary

VOCABULARY = 30_522
ACTIVE = 118  # terms of a document
TEXT = "A passage of about the length that MS MARCO's have, so that fetching texts costs what it does there. " * 4


def read_queries(path: Path, count: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Query vectors, and how often each term is used."""
    vectors = [json.loads(line)["vector"] for line in path.read_text(encoding="utf-8").splitlines()]
    names = sorted({name for vector in vectors for name in vector})
    ids = {name: i for i, name in enumerate(names)}
    used = np.ones(VOCABULARY)
    for vector in vectors:
        used[[ids[name] for name in vector]] += 1
    queries = []
    for vector in vectors[:count]:
        terms = np.array(sorted(ids[name] for name in vector), np.int32)
        weight = {ids[name]: value / 100 for name, value in vector.items()}
        queries.append((terms, np.array([weight[term] for term in terms.tolist()], np.float32)))
    return queries, used / used.sum()


def make_documents(count: int, share: np.ndarray, seed: int = 0) -> sparse.csr_matrix:
    generator = np.random.default_rng(seed)
    rows = []
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        drawn = generator.choice(VOCABULARY, (size, 2 * ACTIVE), p=share)
        rows += [np.sort(np.unique(row)[generator.permutation(len(np.unique(row)))][:ACTIVE]) for row in drawn]
    indptr = np.cumsum([0, *map(len, rows)])
    data = generator.gamma(2.0, 0.4, indptr[-1]).astype(np.float32) + np.float32(0.01)
    return sparse.csr_matrix((data, np.concatenate(rows).astype(np.int32), indptr), shape=(count, VOCABULARY))


def edge_points(documents: sparse.csr_matrix, start: int, end: int) -> list[edge.Point]:
    points = []
    for i in range(start, end):
        row = slice(documents.indptr[i], documents.indptr[i + 1])
        points.append(
            edge.Point(i, {"splade": edge.SparseVector(documents.indices[row].tolist(), documents.data[row].tolist())}, {})
        )
    return points


def build_bare(folder: Path, documents: sparse.csr_matrix) -> edge.EdgeShard:
    folder.mkdir(parents=True)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(sparse_vectors={"splade": edge.EdgeSparseVectorParams()}))
    for start in range(0, documents.shape[0], 1024):
        shard.update(edge.UpdateOperation.upsert_points(edge_points(documents, start, min(start + 1024, documents.shape[0]))))
    shard.flush()
    shard.optimize()
    shard.flush()
    return shard


def build_store(folder: Path, documents: sparse.csr_matrix) -> Store:
    Store.create(folder)
    store = Store(folder, VOCABULARY)

    def encoded() -> Any:
        for i in range(documents.shape[0]):
            row = slice(documents.indptr[i], documents.indptr[i + 1])
            yield EncodedDocument(f"document-{i}", Document("", TEXT), documents.indices[row], documents.data[row])

    store.put(encoded())
    store.optimize()
    return store


def timed_build(build: Callable[[Path, sparse.csr_matrix], Any], folder: Path, documents: sparse.csr_matrix) -> float:
    """Seconds, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_seconds, build, folder, documents).result()


def _seconds(build: Callable[[Path, sparse.csr_matrix], Any], folder: Path, documents: sparse.csr_matrix) -> float:
    start = time.perf_counter()
    built = build(folder, documents)
    seconds = time.perf_counter() - start
    built.close()
    return seconds


class Stub:
    """What splade-index asks of a model: vectors that are there already, and a vocabulary."""

    def __init__(self, documents: sparse.csr_matrix, queries: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.documents, self.queries = documents, queries
        self.tokenizer = self

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY)}

    def encode_document(self, *_: Any, **__: Any) -> torch.Tensor:
        coo = self.documents.tocoo()
        return torch.sparse_coo_tensor(np.stack([coo.row, coo.col]), coo.data, coo.shape).coalesce()

    def encode_query(self, texts: list[str], **_: Any) -> torch.Tensor:
        dense = torch.zeros(len(texts), VOCABULARY)
        for row, text in enumerate(texts):
            terms, weights = self.queries[int(text) if text.isdigit() else 0]
            dense[row, torch.from_numpy(terms).long()] = torch.from_numpy(weights)
        return dense.to_sparse_csr()


def splade_index(documents: sparse.csr_matrix, queries: list[tuple[np.ndarray, np.ndarray]]) -> Callable[[int, int], Any] | None:
    """splade-index with numba, its fastest; None where it is not installed."""
    try:
        from splade_index import SPLADE
    except ImportError:
        return None
    index = SPLADE(backend="numba")
    index.index(Stub(documents, queries), [""] * documents.shape[0], show_progress=False)
    return lambda i, k: index.retrieve([str(i)], k=k, show_progress=False, return_as="doc_ids")


def bandwidth() -> float:
    """Bytes a second that one core reads: the sum of an array that no cache holds."""
    array = np.ones(2**26)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def recall(found: list[int], scores: np.ndarray, k: int) -> float:
    """Of the k best by the exact product, ties aside: how many of those found score as high as the k-th."""
    bound = np.partition(scores, len(scores) - k)[len(scores) - k]
    possible = min(k, int((scores > 0).sum()))
    return sum(scores[d] >= bound * (1 - 1e-5) for d in found) / possible


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--queries", type=Path, required=True)
    arguments.add_argument("--documents", type=int, default=300_000)
    arguments.add_argument("--count", type=int, default=200, help="queries of a round")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    queries, share = read_queries(options.queries, options.count)
    documents = make_documents(options.documents, share)
    work = Path(tempfile.mkdtemp())
    try:
        build: dict[str, list[float]] = {"bare edge": [], "anysplade": []}
        for turn in range(5):
            for name, make in (("bare edge", build_bare), ("anysplade", build_store)):
                build[name].append(timed_build(make, work / f"{name}-{turn}", documents))
                shutil.rmtree(work / f"{name}-{turn}")
        bare, store = build_bare(work / "bare", documents), build_store(work / "store", documents)

        def on_bare(i: int, k: int) -> list[int]:
            vector = edge.SparseVector(queries[i][0].tolist(), queries[i][1].tolist())
            return [p.id for p in bare.query(edge.QueryRequest(query=edge.Query.Nearest(vector, using="splade"), limit=k))]

        columns = documents.T.tocsr()

        def on_scipy(i: int, k: int) -> np.ndarray:
            terms, weights = queries[i]
            scores = (sparse.csr_matrix((weights, terms, [0, len(terms)]), shape=(1, VOCABULARY)) @ columns).toarray()[0]
            return np.argpartition(scores, len(scores) - k)[-k:]

        engines: dict[str, Callable[[int, int], Any]] = {
            "bare edge": on_bare,
            "anysplade, positions": lambda i, k: store.search(*queries[i], k),
            "anysplade, ids": lambda i, k: store.ids([position for position, _ in store.search(*queries[i], k)]),
            "anysplade, texts": lambda i, k: store.documents([position for position, _ in store.search(*queries[i], k)]),
            "anysplade exact": lambda i, k: store.search(*queries[i], k, exact=True),
            "scipy": on_scipy,
        }
        other = splade_index(documents, queries)
        if other is not None:
            engines["splade-index, numba"] = other

        qps: dict[str, dict[str, Any]] = {}
        for k in (10, 1000):
            times: dict[str, list[float]] = {name: [] for name in engines}
            for turn in range(options.rounds + 1):
                for name, engine in engines.items():
                    count = options.count if "scipy" not in name else max(1, options.count // 4)
                    start = time.perf_counter()
                    for i in range(count):
                        engine(i, k)
                    if turn:
                        times[name].append(count / (time.perf_counter() - start))
            qps[f"k {k}"] = {name: summary(values) for name, values in times.items()}

        postings = Postings.from_documents(documents)
        exact = []
        for k in (10, 1000):
            found = []
            for i in range(min(50, options.count)):
                dense = np.zeros(VOCABULARY, np.float64)
                dense[queries[i][0]] = queries[i][1]
                scores = documents @ dense
                found.append(recall([position - 1 for position, _ in store.search(*queries[i], k)], scores, k))
            exact.append(float(np.mean(found)))
        read = float(np.mean([(postings.indptr[terms + 1] - postings.indptr[terms]).sum() for terms, _ in queries]))
        speed = bandwidth()
        ten = qps["k 10"]
        finish(
            "search",
            options,
            {
                "documents": documents.shape[0],
                "active_dims": documents.nnz / documents.shape[0],
                "query_active_dims": float(np.mean([len(terms) for terms, _ in queries])),
                "build_seconds": {name: summary(values) for name, values in build.items()},
                "build_over_bare": summary(
                    [ours / bare for ours, bare in zip(build["anysplade"], build["bare edge"], strict=True)]
                ),
                "qps": qps,
                "ids_over_bare": ten["anysplade, ids"]["median"] / ten["bare edge"]["median"],
                "texts_over_bare": ten["anysplade, texts"]["median"] / ten["bare edge"]["median"],
                "ids_over_scipy": ten["anysplade, ids"]["median"] / ten["scipy"]["median"],
                "ids_over_splade_index": ten["anysplade, ids"]["median"] / ten["splade-index, numba"]["median"] if other else None,
                "recall@10": exact[0],
                "recall@1000": exact[1],
                "postings_per_query": read,
                "bandwidth_gb_per_second": speed / 1e9,
                "floor_seconds_per_query": 8 * read / speed,
                "over_floor": 1 / ten["anysplade, ids"]["median"] / (8 * read / speed),
            },
        )
        store.close()
        bare.close()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
