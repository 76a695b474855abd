"""What folding a cased vocabulary gains and saves.

Needs backbones with a cased vocabulary (``pretrain.py --vocabulary bpe``).

rows     for each backbone, how near the logits of a folded dimension come to the largest logit of its terms (an exact fold), how
         SPLADE training starts, and how good it is after a short training; on other texts than rows were made from. The rules:
         first: the row of the lowest id, as in ``fold_head``; mean: of the group's rows; frequent: the row of the term that the
         head expects most often; prior: the rows weighted by how often the head expects them; ridge: fitted to the largest logit by
         least squares
pooling  time of pooling with a folded head and with the same head with all rows
words    for each backbone, folded and not, and for its --twin: the share of the words in the texts of --collections that are one
         entry, and in how many ways a word is written
merge    the vectors of a model that was trained with the unfolded vocabulary, when the weights of a word's forms are summed or only
         the largest one is kept: active dims saved, and nDCG@10
compare  the ways to one dimension per word at equal active dims, three seeds, paired tests against the unfolded cased vocabulary:
         folded, and what needs pretraining: --twin, a backbone pretrained with an uncased vocabulary, and --moved, the cased one
         moved to it (``pretrain.py --move``). Trainings are kept in --out, so an interrupted run resumes
"""

import argparse
import json
import re
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anysplade import TrainingConfig, evaluate, load_pairs, train
from anysplade.data.collections import Collection, load_collection
from anysplade.data.pairs import sample_pairs
from anysplade.evaluation.measures import measure, parse_metrics
from anysplade.evaluation.rankings import Ranker
from anysplade.evaluation.significance import holm, paired_p
from anysplade.model.calibration import choose
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.folding import fold_head, plan_folding
from anysplade.model.fused import hidden_states
from anysplade.model.head import find_head, live_terms, untie_head
from anysplade.model.measuring import measure_logits
from anysplade.model.pooling import splade_pool
from anysplade.search.exact import Postings
from anysplade.study.aggregate import per_query
from anysplade.study.cells import METRIC
from anysplade.study.plan import Cell
from experiments import NEVER, named, over_seeds, parser, run_groups, write_json
from harness import alternate

RULES = ("first", "mean", "frequent", "prior", "ridge")
LENGTH = 64  # tokens after which probe texts are cut
TOKENS = 4000  # number of tokens to which rows are fitted
TRAINING: dict[str, Any] = {
    "steps": 150, "batch_size": 32, "learning_rate": 8e-4, "max_length": 64, "checkpoint_steps": NEVER,
    "query_active_dims": 16, "document_active_dims": 64,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "as is": {}, "case": {"fold": "case"}, "stem": {"fold": "stem"}, "muted": {"fold": "case", "mute": True},
}  # fmt: skip
RIDGE = 1e-2  # share of the mean square of a hidden dimension


@torch.inference_mode()
def tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Hidden states before the decoder, (tokens, width)."""
    rows = []
    for start in range(0, len(texts), 16):
        given = tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
        rows.append(hidden_states(model, **inputs)[given["attention_mask"].bool()])
    return torch.cat(rows)


def groups_of(terms: np.ndarray) -> dict[int, Tensor]:
    """The terms of each dimension that has several terms, by the id of the dimension."""
    order = np.argsort(terms, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(terms[order])) + 1)
    return {int(terms[part[0]]): torch.from_numpy(part) for part in parts if len(part) > 1 and terms[part[0]] >= 0}


def folded_row(rule: str, weight: Tensor, bias: Tensor, hidden: Tensor, prior: Tensor, group: Tensor) -> Tensor:
    """The row of a group followed by its bias, (width + 1,)."""
    rows = torch.cat([weight[group], bias[group, None]], dim=1)
    if rule == "first":
        return rows[group.argmin()]
    if rule == "mean":
        return rows.mean(dim=0)
    if rule == "frequent":
        return rows[prior[group].argmax()]
    if rule == "prior":
        return (prior[group] / prior[group].sum()) @ rows
    ones = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
    largest = (ones @ rows.T).amax(dim=1)
    gram = ones.T @ ones
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, ones.T @ largest)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    pairs = load_pairs(options.data)
    fitted = sample_pairs(pairs, 1)
    queries, documents = sample_pairs(pairs, 0)
    found = []
    for backbone in options.backbones:
        model, tokenizer = load_masked_lm(backbone)
        head = find_head(model)
        assert head.bias is not None
        weight, bias = head.decoder.weight.detach().clone(), head.bias.clone()
        trained = [effectiveness(backbone, options, seed) for seed in range(options.seeds)]
        found.append({"backbone": Path(backbone).name, "rule": "not folded", "trained": trained})
        groups = groups_of(plan_folding(tokenizer, len(weight), options.by, mute=False)[1])
        tokenizer = fold_head(model, tokenizer, options.by)
        hidden = tokens(model, tokenizer, [*fitted[0], *fitted[1]])[:TOKENS].clone()
        others = tokens(model, tokenizer, [*queries, *documents])[:TOKENS]
        prior = (hidden @ weight.T + bias).softmax(dim=1).mean(dim=0)
        untie_head(model)  # the input embeddings must not change with the rows
        for rule in RULES:
            head = find_head(model)
            errors, spread = [], []
            with torch.inference_mode():
                for kept, group in groups.items():
                    row = folded_row(rule, weight, bias, hidden, prior, group)
                    head.decoder.weight[kept], head.biases[0].view(-1)[kept] = row[:-1], row[-1]
                    largest = (others @ weight[group].T + bias[group]).amax(dim=1)
                    errors.append(float((others @ row[:-1] + row[-1] - largest).square().mean()))
                    spread.append(float(largest.var()))
            start = choose(measure_logits(model, tokenizer, queries, documents))
            assert start.after is not None
            with TemporaryDirectory() as work:
                model.save_pretrained(f"{work}/folded")
                tokenizer.save_pretrained(f"{work}/folded")
                trained = [effectiveness(f"{work}/folded", options, seed) for seed in range(options.seeds)]
            found.append(
                {
                    "backbone": Path(backbone).name, "rule": rule, "groups": len(groups),
                    "explained": 1 - statistics.mean(errors) / statistics.mean(spread),
                    "k": start.k, "shift": start.shift, "start_loss": start.after.start_loss,
                    "query_active_dims": start.after.query_active_dims, "document_active_dims": start.after.document_active_dims,
                    "document_similarity": start.after.document_similarity, "trained": trained,
                }
            )  # fmt: skip
    return found


def effectiveness(backbone: str, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """nDCG@10 and cost after a short training on --data."""
    with TemporaryDirectory() as work:
        result = train(TrainingConfig(backbone, options.data, output=f"{work}/run", seed=seed, **TRAINING))
        found = evaluate(result.model, options.collections[0], [METRIC], depth=10, max_length=128)
    return found.metrics | {"document_active_dims": found.document_active_dims, "flops": found.flops}


def pooling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The texts are random hidden states; the level is the one of calibration: 0.1 % of the logits are above zero."""
    found = []
    for backbone in options.backbones:
        model, tokenizer = load_masked_lm(backbone)
        fold_head(model, tokenizer, options.by, mute=True)
        live, weight = live_terms(model), find_head(model).decoder.weight.detach().clone()
        assert live is not None
        for batch, length, training in ((16, 128, True), (16, 128, False), (1, 16, False)):
            hidden, mask = torch.randn(batch, length, weight.shape[1]), torch.ones(batch, length)
            level = np.quantile((hidden[0] @ weight[live].T).numpy(), 0.999)
            bias = torch.full((len(weight),), -float(level))
            variants = {
                name: partial(pool, hidden, weight, bias, mask, terms, training) for name, terms in (("all", None), ("live", live))
            }
            seconds = alternate(variants, options.rounds)
            found.append(
                {
                    "backbone": Path(backbone).name, "batch": batch, "length": length,
                    "what": "forward and backward" if training else "encoding", "terms": len(weight), "live": len(live),
                    "share": len(live) / len(weight), "ratio": seconds["live"]["median"] / seconds["all"]["median"],
                    "seconds": seconds,
                }
            )  # fmt: skip
    return found


def pool(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, live: Tensor | None, training: bool) -> None:
    leaf = weight.detach().requires_grad_() if training else weight
    with torch.set_grad_enabled(training):
        vectors = splade_pool(hidden, leaf, bias, mask, live=live)
        if training:
            vectors.sum().backward()


def words(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for place, backbone in enumerate(options.backbones):
        cased = AutoTokenizer.from_pretrained(backbone)
        ways = {"as is": cased, "case": plan_folding(cased, len(cased), "case", mute=False)[0]}
        if place < len(options.twin):
            ways["twin"] = AutoTokenizer.from_pretrained(options.twin[place])
        for collection in options.collections:
            texts = [document.full_text for document in load_collection(collection).corpus.values()]
            for way, tokenizer in ways.items():
                written = [pair for text in texts[:1000] for pair in writings(tokenizer, text[:1000])]
                forms: dict[str, set[tuple[int, ...]]] = {}
                for word, ids in written:
                    forms.setdefault(word, set()).add(ids)
                row = {"backbone": Path(backbone).name, "collection": Path(collection).name, "way": way}
                row["words_of_one_entry"] = statistics.mean(len(ids) == 1 for _, ids in written)
                found.append(row | {"ways_a_word_is_written": statistics.mean(map(len, forms.values()))})
    return found


def writings(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The words of a text in lower case, each with the vocabulary entries that it is written with."""
    given = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    entries = list(zip(given["input_ids"], given["offset_mapping"], strict=True))
    return [
        (word[0].lower(), tuple(id_ for id_, (start, end) in entries if end > word.start() and start < word.end()))
        for word in re.finditer(r"[^\W_]+", text)
    ]


def merge(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for backbone in options.backbones:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        _, terms = plan_folding(tokenizer, len(tokenizer), options.by, mute=False)
        with TemporaryDirectory() as work:
            given = {"max_length": 128, "precision": options.precision, "steps": options.steps}
            model = train(TrainingConfig(backbone, options.data, output=f"{work}/run", **TRAINING | given)).model
            for name in options.collections:
                collection = load_collection(name)
                evaluation = evaluate(model, collection, [METRIC], max_length=128)
                assert evaluation.vectors
                queries, documents = evaluation.vectors
                for how, merged in (("sum", summed), ("max", largest)):
                    pair = merged(queries, terms), merged(documents, terms)
                    found.append(
                        {
                            "backbone": Path(backbone).name, "collection": Path(name).name, "merged": how,
                            METRIC: [evaluation.metrics[METRIC], ndcg(*pair, collection)],
                            "query_active_dims": [queries.nnz / queries.shape[0], pair[0].nnz / queries.shape[0]],
                            "document_active_dims": [documents.nnz / documents.shape[0], pair[1].nnz / documents.shape[0]],
                        }
                    )  # fmt: skip
    return found


def summed(vectors: sparse.csr_matrix, terms: np.ndarray) -> sparse.csr_matrix:
    """Vectors in which a term has the sum of the weights of its forms."""
    rows = np.arange(len(terms))
    return vectors @ sparse.csr_matrix((np.ones(len(terms), np.float32), (rows, terms)), shape=(len(terms), len(terms)))


def largest(vectors: sparse.csr_matrix, terms: np.ndarray) -> sparse.csr_matrix:
    """Vectors in which a term has the largest weight of its forms."""
    entries = vectors.tocoo()
    columns = terms[entries.col]
    order = np.lexsort((entries.data, columns, entries.row))
    row, column, weight = entries.row[order], columns[order], entries.data[order]
    last = np.append((row[1:] != row[:-1]) | (column[1:] != column[:-1]), True)
    return sparse.csr_matrix((weight[last], (row[last], column[last])), shape=vectors.shape)


def ndcg(queries: sparse.csr_matrix, documents: sparse.csr_matrix, collection: Collection) -> float:
    ranker = Ranker(collection, 10)
    run = ranker.as_run(Postings.from_documents(documents).top_rows(queries, ranker.hits))
    return measure(parse_metrics(METRIC), collection.qrels, run)[0][METRIC]


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    given = TRAINING | {"k": "auto", "shift": "auto", "steps": options.steps, "max_length": 128, "precision": options.precision}
    groups: dict[tuple[str, str], Cell] = {}  # by backbone and way
    for place, backbone in enumerate(options.backbones):
        ways = {name: (backbone, changes) for name, changes in WAYS.items() if name in options.ways}
        ways |= {name: (others[place], {}) for name in ("twin", "moved") if place < len(others := getattr(options, name))}
        for name, (base, changes) in ways.items():
            groups[Path(backbone).name, name] = Cell(base, options.data, given | changes)
    records = run_groups(groups, options.seeds, options.collections, options.out, options.workers)
    found = []
    for (backbone, way), seeds in records.items():
        for collection in options.collections:
            results = [record.results[collection] for record in seeds]
            row = {"backbone": backbone, "way": way, "collection": Path(collection).name} | over_seeds(list(map(named, results)))
            if way != "as is":
                base_results = [record.results[collection] for record in records[backbone, "as is"]]
                row["difference"] = row[METRIC] - statistics.mean(result.ndcg for result in base_results)
                row["p"] = paired_p(per_query(base_results), per_query(results))
            row["collapsed"] = sum(any(finding["collapse"] for finding in record.findings) for record in seeds)
            found.append(row)
    corrected = iter(holm([row["p"] for row in found if "p" in row]))
    return [row | ({"p_corrected": next(corrected)} if "p" in row else {}) for row in found]


def main() -> None:
    experiments = {"rows": rows, "pooling": pooling, "words": words, "merge": merge, "compare": compare}
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("what", choices=experiments)
    add("--backbones", nargs="+", required=True)
    add("--by", choices=("case", "stem"), default="case")
    add("--data", default="python-docs", help="training pairs; rows are fitted to their texts and judged on them")
    add("--seeds", type=int, default=3, help="rows, compare: number of trainings for each; rows: 0 for none")
    add("--rounds", type=int, default=9)
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="compare: which foldings")
    add("--twin", nargs="+", default=[], help="words, compare: for each backbone, one pretrained with an uncased vocabulary")
    add("--moved", nargs="+", default=[], help="compare: for the first backbones, the same moved to an uncased vocabulary")
    add("--collections", nargs="+", default=["python-docs"], help="to evaluate on, the first one in-domain; rows: only the first")
    add("--steps", type=int, default=150, help="merge, compare: of the training")
    add("--precision", default="float32", choices=("float32", "bfloat16"), help="merge, compare: of the training")
    add("--out", type=Path, default=Path("folding"), help="compare: folder of the trainings")
    options = arguments.parse_args()
    found = experiments[options.what](options)
    print(json.dumps(found, indent=1))
    write_json(options.json, {"what": options.what, "rows": found})


if __name__ == "__main__":
    main()
