"""The demo: two bundled backbones with three calibrations each, a table, an index and three searches."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from anysplade._common.files import require_empty, user_path
from anysplade._common.outputs import earlier_call, write_record
from anysplade._common.progress import duration
from anysplade.cli.rendering import evaluation_table, hit_lines
from anysplade.data.collections import load_collection, load_python_docs, write_collection
from anysplade.data.pairs import load_pairs
from anysplade.data.python_docs import PACKAGES
from anysplade.evaluation.evaluations import evaluate
from anysplade.model.backbones import BUNDLED
from anysplade.model.options import Choice
from anysplade.search.hits import Hit, query_words
from anysplade.search.index import Index
from anysplade.training.config import TrainingConfig
from anysplade.training.run import train

logger = logging.getLogger(__name__)

CALIBRATIONS: dict[str, tuple[Choice, Choice]] = {
    "none": (1.0, 0.0),  # the standard recipe
    "scale": ("auto", 0.0),  # the paper's recipe: k alone
    "auto": ("auto", "auto"),  # scale and level
}
SETTINGS: dict[str, Any] = {  # chosen to show the difference within minutes on two cores
    "batch_size": 16,
    "query_regularizer_weight": 3e-4,
    "document_regularizer_weight": 3e-4,
    "max_length": 96,  # for evaluations and the index too: whole documents would take far longer
    "checkpoint_steps": 60,
    "seed": 0,
}
RUNS: dict[str, dict[str, Any]] = {  # the same for all three calibrations of a backbone
    "bert-tiny": {"steps": 60, "learning_rate": 1e-3},
    "modernbert-tiny": {"steps": 120, "learning_rate": 6e-4},
}
METRICS = ("RR@10", "nDCG@10")
_DEPTH = 100  # documents per ranking
QUERIES = (
    "solve a system of linear equations",
    "shortest path between two nodes of a graph",
    "fill missing values in a table",
)
_INDEXED = ("modernbert-tiny", "auto")


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo: a row per model, three searches, and the paths of the indexed model and the index."""

    rows: list[dict[str, Any]]
    collection: dict[str, Any]
    settings: dict[str, Any]
    searches: list[tuple[str, list[Hit]]]
    words: dict[str, dict[str, str]]  # by query: words that the tokenizer split, by the term of each piece
    model: str
    index: str
    command: str  # how anysplade was called
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        searches = [{"query": query, "hits": [hit.to_dict() for hit in hits]} for query, hits in self.searches]
        return asdict(self) | {"searches": searches}


def run_demo(
    output: str | Path, steps: int | None = None, packages: Sequence[str] = PACKAGES, progress: bool = False
) -> DemoResult:
    """Train and evaluate each bundled backbone raw, scaled and calibrated, index one of the models and search; or continue."""
    start = time.perf_counter()
    output = user_path(output)
    runs = {name: run | ({"steps": steps} if steps else {}) for name, run in RUNS.items()}
    settings = SETTINGS | {"runs": runs}
    made, asked = output / "settings.json", {"settings": settings, "packages": list(packages)}
    if earlier_call(made, asked) is None:
        require_empty(output)
        write_record(made, asked)

    folder = output / "collection"
    if not folder.exists():
        logger.info("reading the docstrings of %s", ", ".join(packages))
        write_collection(folder, *load_python_docs(packages, progress=progress))
    collection = load_collection(folder)
    reading: dict[str, Any] = {"max_length": SETTINGS["max_length"], "progress": progress}
    rows = []
    for backbone in BUNDLED:
        for name, (k, shift) in CALIBRATIONS.items():
            run = output / f"{backbone}-{name}"
            logger.info("%s, calibration %s: training and evaluating", backbone, name)
            options = {"data": str(folder), "output": str(run), "k": k, "shift": shift} | runs[backbone] | SETTINGS
            trained = train(TrainingConfig(backbone, **options), progress=progress)
            if not (run / "evaluation.json").exists():
                evaluate(trained.model, collection, METRICS, output=run, depth=_DEPTH, **reading)
            row = {"backbone": backbone, "calibration": name, "k": trained.calibration["k"], "shift": trained.calibration["shift"]}
            row |= {"findings": trained.monitoring["findings"]}
            rows.append(row | json.loads((run / "evaluation.json").read_text()))
    bm25 = evaluate("bm25", collection, METRICS, depth=_DEPTH).to_dict()
    rows.append({"backbone": "bm25", "calibration": None, "k": None, "shift": None, "findings": []} | bm25)

    best, where = output / "-".join(_INDEXED), output / "index"
    index = Index.load(where) if where.exists() else Index.build(best / "model", folder, where, **reading)
    command, on_path = Path(sys.argv[0]), shutil.which("anysplade")
    counts = {"documents": len(collection.corpus), "queries": len(collection.queries), "training_pairs": len(load_pairs(folder))}
    result = DemoResult(
        rows=rows,
        collection={"packages": list(packages)} | counts,
        settings=settings,
        searches=[(query, index.search(query, k=3, explain=True)) for query in QUERIES],
        words={query: query_words(index.queries, query) for query in QUERIES},
        model=str(best / "model"),
        index=str(where),
        command="anysplade" if on_path and Path(on_path).resolve() == command.resolve() else str(command),
        seconds=time.perf_counter() - start,
    )
    write_record(output / "demo.json", result.to_dict())
    return result


def demo_parts(result: DemoResult) -> list[RenderableType]:
    """The data, the settings, the table of the models, what the monitor found, and the searches."""
    collection, runs = result.collection, result.settings["runs"]
    parts: list[RenderableType] = [
        f"Docstrings of {', '.join(collection['packages'])}: {collection['training_pairs']:,} training pairs; "
        f"{collection['queries']:,} held-out queries over {collection['documents']:,} documents.",
        "Trained on {batch_size} pairs per step, texts cut to {max_length} tokens: ".format(**result.settings)
        + "; ".join(f"{name} {run['steps']} steps, learning rate {run['learning_rate']:g}" for name, run in runs.items()),
        evaluation_table(result.rows, METRICS, ["backbone", "calibration", "k", "shift"]),
    ]
    named = [
        f"{row['backbone']} {row['calibration']}: {f['name']} at step {f['step']}" for row in result.rows for f in row["findings"]
    ]
    if named:
        parts.append("\nProblems that the monitor named during training: " + "; ".join(named) + ".")
    for query, hits in result.searches:
        parts += [Text(f"\n{query}", style="bold"), *hit_lines(hits, result.words[query])]
    parts.append(
        Text(
            f"\nmodel: {result.model}\nindex: {result.index}\nall done in {duration(result.seconds)}; next:\n\n"
            f'  {result.command} search {result.index} "sort an array in descending order"\n\n'
            f"  from sentence_transformers import SparseEncoder\n"
            f"  model = SparseEncoder({result.model!r})"
        )
    )
    return parts
