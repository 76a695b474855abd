"""Search and build with a trained model's vectors of real texts: end to end, and compared with other engines.

End to end: from the text of a query to the ten best documents with their texts. Cold: a fresh process opens the index, whose files
are in the system's cache. Warm: one client in the process, and 1 and 8 clients of a ``Searcher``.

Other engines: from the vector of a query to documents, all engines in turns. bm25s is there for scale: it searches the texts, and
its time includes tokenizing the query. Recall is against the exact product.

Everything but encoding the corpus runs on one thread. Each build has its own process, because memory from an earlier build makes
the next one faster. The floor is the bytes of the postings that a query reads, divided by the measured bandwidth of memory.
"""

import asyncio
import json
import lzma
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge
import torch
from scipy import sparse

from anysplade import for_inference, open_encoder
from anysplade.data.corpus import Document
from anysplade.data.rows import rows
from anysplade.evaluation.rankings import vector_folders
from anysplade.model.encoding import encode
from anysplade.search.bm25 import BM25
from anysplade.search.documents import EncodedDocument
from anysplade.search.index_model import describe_model
from anysplade.search.store import Store
from anysplade.serving.batching import Searcher
from harness import alternate, bandwidth, finish, parser, spread, summary

CLIENTS = {"Index.search": 0, "Searcher, 1 client": 1, "Searcher, 8 clients": 8}  # of a ``Searcher``, by what is measured
WORDS = 60  # approximate length of a passage
SEISMIC = [(5, 0.9), (10, 0.8), (24, 0.7), (1000, 0.5)]  # query_cut (number of query terms that are used), heap_factor
COLD = """
import json, sys, time
stamps = [float(sys.argv[1]), time.perf_counter()]
def stamp(value):
    stamps.append(time.perf_counter())
    return value
import torch
torch.set_num_threads(1)
from anysplade import Index
from anysplade.model.encoding import encode
stamp(None)
index = stamp(Index.load(sys.argv[2]))
queries = stamp(index.queries)
for query in sys.argv[3:]:
    vector = stamp(queries.encode([query]))
    stamp(index.search_vector(vector))
print(json.dumps(stamps))
"""
STAGES = ["python", "import", "opening", "model", "first encoding", "first search", "second encoding", "second search"]


def read_passages(path: Path, count: int) -> list[str]:
    """The first passages of a text: its paragraphs, with long ones cut into equal parts."""
    passages: list[str] = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for words in map(str.split, lines):
            parts = max(1, round(len(words) / WORDS))
            bounds = [len(words) * i // parts for i in range(parts + 1)]
            passages += [" ".join(words[start:end]) for start, end in pairwise(bounds) if start < end]
            if len(passages) >= count:
                return passages[:count]
    raise SystemExit(f"{path}: {len(passages):,} passages; --documents is {count:,}")


def row(matrix: sparse.csr_matrix, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Terms and weights of a row."""
    span = slice(matrix.indptr[i], matrix.indptr[i + 1])
    return matrix.indices[span], matrix.data[span]


def edge_vector(terms: np.ndarray, weights: np.ndarray) -> edge.SparseVector:
    return edge.SparseVector(terms.tolist(), weights.tolist())


def build_bare(folder: Path, documents: sparse.csr_matrix, texts: list[str]) -> edge.EdgeShard:
    folder.mkdir(parents=True)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(sparse_vectors={"splade": edge.EdgeSparseVectorParams()}))
    for start in range(0, len(texts), 1024):
        numbers = range(start, min(start + 1024, len(texts)))
        points = [edge.Point(i, {"splade": edge_vector(*row(documents, i))}, {}) for i in numbers]
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.flush()
    shard.optimize()
    shard.flush()
    return shard


def build_store(folder: Path, documents: sparse.csr_matrix, texts: list[str]) -> Store:
    Store.create(folder)
    store = Store(folder, documents.shape[1])
    store.put(EncodedDocument(str(i), Document("", text), *row(documents, i)) for i, text in enumerate(texts))
    store.optimize()
    return store


def timed_build(build: Callable[..., Any], folder: Path, documents: sparse.csr_matrix, texts: list[str]) -> float:
    """Seconds of a build in its own process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        seconds = process.submit(_seconds, build, folder, documents, texts).result()
    shutil.rmtree(folder)
    return seconds


def _seconds(build: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    built = build(*arguments)
    seconds = time.perf_counter() - start
    built.close()
    return seconds


# ------------------------------------------------------------------------------------ end to end


def cold(folder: Path, queries: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each stage of a fresh process, and of all stages until the first hits."""
    stages: list[np.ndarray] = []
    for turn in range(rounds):
        asked = [queries[(2 * turn + i) % len(queries)] for i in range(2)]
        command = [sys.executable, "-c", COLD, str(time.perf_counter()), str(folder), *asked]
        stages.append(np.diff(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)))
    seconds = {name: summary([float(taken[i]) for taken in stages]) for i, name in enumerate(STAGES)}
    return seconds | {"until the first hits": summary([float(taken[:6].sum()) for taken in stages])}


async def warm(folder: Path, queries: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Queries per second and latencies of ``Index.search``, with its parts, and of the clients of a ``Searcher``."""
    searcher = Searcher(folder)
    searcher.start()
    index = searcher.index
    parts: list[tuple[float, float]] = []
    latencies: dict[str, list[float]] = {name: [] for name in CLIENTS}
    rates: dict[str, list[float]] = {name: [] for name in CLIENTS}

    async def client(asked: list[str], taken: list[float]) -> None:
        for query in asked:
            start = time.perf_counter()
            await searcher.search(query, 10, False)
            taken.append(time.perf_counter() - start)

    for turn in range(rounds + 1):
        for name, clients in CLIENTS.items():
            taken: list[float] = []
            begin = time.perf_counter()
            if clients:
                await asyncio.gather(*(client(queries[i::clients], taken) for i in range(clients)))
            else:
                for query in queries:  # the parts of ``Index.search``
                    start = time.perf_counter()
                    vector = index.queries.encode([query])
                    middle = time.perf_counter()
                    index.search_vector(vector, 10)
                    end = time.perf_counter()
                    taken.append(end - start)
                    if turn:
                        parts.append((middle - start, end - middle))
            if turn:
                rates[name].append(len(queries) / (time.perf_counter() - begin))
                latencies[name] += taken
    await searcher.stop()
    result: dict[str, Any] = {name: {"qps": summary(rates[name])} | percentiles(latencies[name]) for name in CLIENTS}
    result["Index.search"] |= {
        "encoding": percentiles([encoding for encoding, _ in parts]),
        "searching": percentiles([searching for _, searching in parts]),
    }
    return result


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50_ms": 1000 * float(np.percentile(seconds, 50)), "p95_ms": 1000 * float(np.percentile(seconds, 95))}


# ----------------------------------------------------------------------------------- other engines

Engine = tuple[Callable[[int, int], Any], Callable[[Any], int]]  # hits of query i, at most k; the document of a hit


def ask(search: Callable[[int, int], Any], count: int, k: int) -> None:
    for i in range(count):
        search(i, k)


def rate(count: int, seconds: dict[str, float]) -> dict[str, float]:
    return {name: count / seconds[of] for name, of in (("median", "median"), ("lowest", "highest"), ("highest", "lowest"))}


class Stub:
    """A model for splade-index: it returns known vectors and has a vocabulary."""

    def __init__(self, documents: sparse.csr_matrix, queries: sparse.csr_matrix) -> None:
        self.documents = documents
        rows = [row(queries, i) for i in range(queries.shape[0])]
        self.queries = [torch.sparse_coo_tensor(terms[None], weights, queries.shape[1:]).coalesce() for terms, weights in rows]
        self.tokenizer = self

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.documents.shape[1])}

    def encode_document(self, *_: Any, **__: Any) -> torch.Tensor:
        coo = self.documents.tocoo()
        return torch.sparse_coo_tensor(np.stack([coo.row, coo.col]), coo.data, coo.shape).coalesce()

    def encode_query(self, texts: list[str], **_: Any) -> list[torch.Tensor]:
        return [self.queries[int(text) if text.isdigit() else 0] for text in texts]


def splade_index(documents: sparse.csr_matrix, queries: sparse.csr_matrix) -> dict[str, Engine]:
    """splade-index with numba, its fastest backend; empty if it is not installed."""
    try:
        from splade_index import SPLADE
    except ImportError:
        return {}
    index = SPLADE(backend="numba")
    index.index(Stub(documents, queries), [""] * documents.shape[0], show_progress=False)
    return {"splade-index, numba": (lambda i, k: index.retrieve([str(i)], k=k, show_progress=False, return_as="doc_ids")[0], int)}


def seismic(documents: sparse.csr_matrix, queries: sparse.csr_matrix) -> dict[str, Engine]:
    """Seismic (arXiv 2404.18812), which is approximate and has float16 weights; empty if pyseismic-lsr is not installed."""
    try:
        import seismic
    except ImportError:
        return {}
    string = seismic.get_seismic_string()
    dataset = seismic.SeismicDataset()
    for i in np.flatnonzero(np.diff(documents.indptr)):  # it rejects empty rows
        terms, weights = row(documents, i)
        dataset.add_document(str(i), terms.astype(string), weights)
    index = seismic.SeismicIndex.build_from_dataset(dataset)
    vectors = [row(queries, i) for i in range(queries.shape[0])]

    def engine(cut: int, factor: float) -> Engine:
        def search(i: int, k: int) -> Any:
            terms, weights = vectors[i]
            return index.search("", terms.astype(string), weights, k, cut, factor)

        return search, lambda hit: int(hit[2])

    return {f"Seismic, cut {cut}, heap factor {factor}": engine(cut, factor) for cut, factor in SEISMIC}


def recalls(engines: dict[str, Engine], documents: sparse.csr_matrix, queries: sparse.csr_matrix, k: int) -> dict[str, float]:
    """Share of the found documents that score at least as high as the exact k-th best, mean over queries; ties count."""
    shares: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(queries.shape[0]):
        scores = documents @ queries[i].toarray()[0].astype(np.float64)
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        possible = min(k, int((scores > 0).sum()))
        for name, (search, number) in engines.items():
            found = scores[[number(hit) for hit in search(i, k)]]
            hits = ((found > 0) & (found >= bound * (1 - 1e-5))).sum()
            shares[name].append(float(hits) / possible if possible else 1.0)
    return {name: float(np.mean(values)) for name, values in shares.items()}


def show(result: dict[str, Any]) -> None:
    """Print the result as tables on stderr."""

    def line(name: str, *cells: str) -> None:
        print(f"{name:38}" + "".join(f"{cell:>22}" for cell in cells), file=sys.stderr)

    line(f"{result['documents']:,} documents", f"{result['active_dims']:.1f} terms each")
    line("the queries", f"{result['query_active_dims']:.1f} terms each")
    line("\ncold", "seconds")
    for name, values in result["cold_seconds"].items():
        line(name, spread(values))
    line("\nwarm", "queries/s", "p50, ms", "p95, ms")
    for name, values in result["warm"].items():
        line(name, spread(values["qps"], 0), f"{values['p50_ms']:.2f}", f"{values['p95_ms']:.2f}")
        for part in ("encoding", "searching"):
            if part in values:
                line(f"  of which {part}", "", *(f"{value:.2f}" for value in values[part].values()))
    for k, engines in result["qps"].items():
        line(f"\nvectors given, {k}", "queries/s", "recall")
        for name, values in engines.items():
            line(name, spread(values, 0), f"{result['recall'][k][name]:.4f}" if name in result["recall"][k] else "")
    line("floor", f"{1 / result['floor_seconds_per_query']:.0f}")
    line("\nbuilding", "seconds")
    for name, values in result["build_seconds"].items():
        line(name, spread(values, 1))
    line("anysplade over bare", spread(result["build_over_bare"], 2))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--text", type=Path, required=True, help="an .xz file of texts, one paragraph per line")
    arguments.add_argument("--model", type=Path, required=True, help="folder of a trained SPLADE model")
    arguments.add_argument("--queries", type=Path, required=True, help="JSON lines with ``text``")
    arguments.add_argument("--cache", type=Path, required=True, help="folder that keeps the vectors by model and texts")
    arguments.add_argument("--documents", type=int, default=100_000)
    arguments.add_argument("--count", type=int, default=200, help="number of queries per round")
    options = arguments.parse_args()
    texts = read_passages(options.text, options.documents)
    asked = [row["text"] for _, row in islice(rows(options.queries), options.count)]
    folders = vector_folders(options.model, options.cache, "float32", None, {"document": texts, "query": asked})
    encoder = for_inference(open_encoder(options.model))
    documents = encode(encoder, texts, "document", cache=folders["document"], progress=True)
    queries = encode(encoder, asked, "query", cache=folders["query"])
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    try:
        builds = {"bare edge": build_bare, "anysplade": build_store}
        build: dict[str, list[float]] = {name: [] for name in builds}
        for _ in range(options.rounds):
            for name, make in builds.items():
                build[name].append(timed_build(make, work / "timed", documents, texts))

        build_store(work / "index", documents, texts).close()
        about = {"vocabulary": documents.shape[1], "complete": True, "precision": "float32", "top_k": None, "max_length": None}
        (work / "index" / "index.json").write_text(json.dumps(describe_model(str(options.model)) | about))
        started = cold(work / "index", asked, options.rounds)
        running = asyncio.run(warm(work / "index", asked, options.rounds))

        bare, store = build_bare(work / "bare", documents, texts), Store(work / "index", documents.shape[1])
        columns = documents.T.tocsr()
        bm25 = BM25(texts)
        vectors = [row(queries, i) for i in range(len(asked))]

        def on_bare(i: int, k: int) -> Any:
            nearest = edge.Query.Nearest(edge_vector(*vectors[i]), using="splade")
            return bare.query(edge.QueryRequest(query=nearest, limit=k))

        def on_store(i: int, k: int) -> list[int]:
            return [position for position, _ in store.search(*vectors[i], k)]

        def on_scipy(i: int, k: int) -> np.ndarray:
            scores = (queries[i] @ columns).toarray()[0]
            return np.argpartition(scores, len(scores) - k)[-k:]

        exact: dict[str, Engine] = {
            "bare edge": (on_bare, lambda hit: hit.id),
            "anysplade, ids": (lambda i, k: store.ids(on_store(i, k)), int),
            "anysplade, texts": (lambda i, k: store.documents(on_store(i, k)), lambda hit: int(hit.id)),
            "anysplade, exact": (lambda i, k: store.search(*vectors[i], k, exact=True), lambda hit: hit[0] - 1),
            "scipy": (on_scipy, int),
            **splade_index(documents, queries),
        }
        approximate = seismic(documents, queries)
        scale: dict[str, Engine] = {"bm25s, tokenizing included": (lambda i, k: bm25.top([asked[i]], k)[0][0], int)}

        qps: dict[str, dict[str, dict[str, float]]] = {}
        recall: dict[str, dict[str, float]] = {}
        for k, engines in ((10, exact | approximate), (1000, exact)):
            timed = engines if k > 10 else engines | scale
            asking = {name: partial(ask, search, len(asked), k) for name, (search, _) in timed.items()}
            qps[f"k {k}"] = {name: rate(len(asked), taken) for name, taken in alternate(asking, options.rounds).items()}
            recall[f"k {k}"] = recalls(engines, documents, queries, k)

        read = float(np.mean([np.diff(columns.indptr)[terms].sum() for terms, _ in vectors]))
        speed = bandwidth()
        ten = {name: values["median"] for name, values in qps["k 10"].items()}
        result = {
            "documents": documents.shape[0],
            "active_dims": documents.nnz / documents.shape[0],
            "query_active_dims": queries.nnz / queries.shape[0],
            "cold_seconds": started,
            "warm": running,
            "qps": qps,
            "recall": recall,
            "ids_over": {name: ten["anysplade, ids"] / value for name, value in ten.items()},
            "texts_over_bare": ten["anysplade, texts"] / ten["bare edge"],
            "build_seconds": {name: summary(values) for name, values in build.items()},
            "build_over_bare": summary([a / b for a, b in zip(build["anysplade"], build["bare edge"], strict=True)]),
            "postings_per_query": read,
            "bandwidth_gb_per_second": speed / 1e9,
            "floor_seconds_per_query": 8 * read / speed,
            "over_floor": 1 / ten["anysplade, ids"] / (8 * read / speed),
        }
        show(result)
        finish("search", options, result)
        store.close()
        bare.close()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
