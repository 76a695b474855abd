"""How often does adapt call a model better that is not, and how much does it miss and exaggerate?

simulate    thousands of decisions on random queries at several numbers of queries and sizes of the effect, by three designs:
            all       all queries decide, and the same ones report
            halves    one half decides, the other reports: what adapt does
            crossfit  all queries decide; each half reports the gain by the decision of the other half: 0 if it is against
shuffled    real runs of adapt whose teacher's scores are shuffled among the documents, so that there is nothing to learn:
            adapt_verdict.py shuffled --splade SPLADE --teacher DENSE --corpus data/cosqa --judged data/cosqa --out runs
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from anysplade import adapt
from anysplade.training.judging import CHEAPER_AND_NOT_WORSE, MARGIN, decide
from anysplade.training.teacher_scores import BatchTeacher
from experiments import parser, write_json

QUERIES = (20, 50, 100, 200, 500)
EFFECTS = (0.0, 0.2, 0.4)  # by which ranks get better, in standard deviations of a document's score
EQUAL, CHEAPER = (1.0, 1.0), (1.0, 0.8)  # FLOPS
FEWEST = 20  # decisions for a mean
LOSING = 0.02  # share of queries that lose everything, in the case that is the hardest for "not worse"


def ndcg(ranks: np.ndarray) -> np.ndarray:
    """nDCG@10 of queries with one relevant document at these ranks."""
    return np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)


def draw(generator: np.random.Generator, queries: int, effect: float) -> np.ndarray:
    """nDCG@10 before and after, (2, queries): queries are easy or hard, and the two rank alike but not equally."""
    hardness = generator.normal(1.0, 1.5, queries)  # logarithm of the rank
    noise = generator.normal(0.0, 0.7, (2, queries))
    return ndcg(np.floor(np.exp(np.maximum(hardness + noise - np.array([[0.0], [effect]]), 0))))


def rare_losses(generator: np.random.Generator, queries: int) -> np.ndarray:
    """Every query is answered as before, except a few that lose all: the mean loss is the margin."""
    before = np.full(queries, 0.5)
    return np.stack([before, np.where(generator.random(queries) < LOSING, 0.0, before)])


def designs(values: np.ndarray) -> dict[str, tuple[str, float]]:
    """The verdict and the reported difference of each design; the queries are in random order."""
    gains = values[1, ::2] - values[0, ::2], values[1, 1::2] - values[0, 1::2]
    whole, first, second = (decide(*part, EQUAL) for part in (values, values[:, ::2], values[:, 1::2]))
    everything = np.concatenate(gains)
    crossed = np.concatenate([second.keep * gains[0], first.keep * gains[1]])
    return {
        "all": (whole.verdict, float(everything.mean())),
        "halves": (first.verdict, float(gains[1].mean())),
        "crossfit": (whole.verdict, float(crossed.mean())),
    }


def simulate(decisions: int) -> list[dict[str, Any]]:
    rows = []
    for effect in EFFECTS:
        truth = float(np.diff(draw(np.random.default_rng(0), 2_000_000, effect).mean(axis=1))[0]) if effect else 0.0
        for queries in QUERIES:
            generator = np.random.default_rng(queries)
            found = [designs(draw(generator, queries, effect)) for _ in range(decisions)]
            for design in found[0]:
                gains = [gain for said, gain in (one[design] for one in found) if said == "better"]
                rows.append(
                    {
                        "effect": effect,
                        "true difference": truth,
                        "queries": queries,
                        "design": design,
                        "better": len(gains) / decisions,
                        "worse": sum(one[design][0] == "worse" for one in found) / decisions,
                        "reported difference if better": float(np.mean(gains)) if len(gains) >= FEWEST else None,
                    }
                )
    return rows


def not_worse(decisions: int) -> list[dict[str, Any]]:
    """How often half of the queries call a cheaper model not worse: with no effect, and at a true loss of 2 %."""
    rows, shift = [], loss_of(MARGIN)
    for queries in QUERIES:
        generator, half = np.random.default_rng(queries), (queries + 1) // 2
        cases = {
            "no effect": [draw(generator, half, 0.0) for _ in range(decisions)],
            "losses of 2 % among all queries": [draw(generator, half, shift) for _ in range(decisions)],
            "losses of 2 % among few queries": [rare_losses(generator, half) for _ in range(decisions)],
        }
        for case, drawn in cases.items():
            said = sum(decide(*one, CHEAPER).verdict == CHEAPER_AND_NOT_WORSE for one in drawn)
            rows.append({"case": case, "queries": queries, CHEAPER_AND_NOT_WORSE: said / decisions})
    return rows


def loss_of(share: float) -> float:
    """The effect by which the true mean is lower by this share, by bisection on the same random numbers."""
    low, high = -0.5, 0.0
    for _ in range(20):
        middle = (low + high) / 2
        before, after = draw(np.random.default_rng(0), 1_000_000, middle).mean(axis=1)
        low, high = (middle, high) if after < (1 - share) * before else (low, middle)
    return middle


def shuffled(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of adapt whose teacher's scores are permuted within every batch, for each query anew."""
    rows, scores = [], BatchTeacher.scores
    for seed in range(options.runs):
        generator = np.random.default_rng(seed)

        def permuted(self: BatchTeacher, queries: np.ndarray, documents: np.ndarray, by: Any = generator) -> np.ndarray:
            return by.permuted(scores(self, queries, documents), axis=1)

        with mock.patch.object(BatchTeacher, "scores", permuted):
            found = adapt(
                options.splade, options.corpus, options.out / f"shuffled-{seed}", teacher=options.teacher, judged=options.judged,
                steps=options.steps, batch_size=options.batch_size, max_length=options.max_length, seed=seed, progress=True,
            )  # fmt: skip
        row = {name: getattr(found, name) for name in ("verdict", "kept", "reason", "decision", "before", "after", "by_kind")}
        rows.append({"seed": seed} | row)
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("experiment", choices=["simulate", "shuffled"])
    arguments.add_argument("--decisions", type=int, default=2000)
    arguments.add_argument("--runs", type=int, default=5, help="of adapt")
    arguments.add_argument("--splade", help="folder of a published SPLADE")
    arguments.add_argument("--teacher", help="folder of a dense model")
    arguments.add_argument("--corpus", help="documents to adapt to")
    arguments.add_argument("--judged", help="a collection; held-out pairs without it")
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--batch-size", type=int, default=16)
    arguments.add_argument("--max-length", type=int, default=96)
    arguments.add_argument("--out", type=Path, help="folder for the runs of adapt")
    options = arguments.parse_args()
    if options.experiment == "simulate":
        result = {"verdicts": simulate(options.decisions), "not worse": not_worse(options.decisions)}
    else:
        rows = shuffled(options)
        result = {"runs": rows, "kept": sum(row["kept"] == "adapted" for row in rows)}
    print(json.dumps(result, indent=1))
    write_json(options.json, {"experiment": options.experiment, **result})


if __name__ == "__main__":
    main()
