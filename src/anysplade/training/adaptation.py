"""Adapt a retrieval model to a corpus without labels, and keep the result only if a test speaks for it.

Queries are made from the documents, and hard negatives are mined with BM25 and the model. A teacher recognizes false negatives and
scores the batches. The targets of the training are the model's own active dims. The adapted weights are a mean of the original
and the trained ones (Wortsman et al., arXiv 2109.01903).
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SparseEncoder

from anysplade._common.files import atomic_folder, default_cache, only_process, user_path
from anysplade._common.outputs import digests, restored, write_record
from anysplade._common.progress import counted
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection, Pair, data_hash, load_collection
from anysplade.data.document_pairs import make_pairs
from anysplade.data.names import PAIR_KINDS
from anysplade.data.pairs import load_pairs
from anysplade.data.stored_corpus import open_corpus
from anysplade.errors import OutputError
from anysplade.evaluation.comparisons import compare
from anysplade.evaluation.costs import COSTS
from anysplade.evaluation.evaluations import Evaluation, evaluate
from anysplade.model.encoder import open_encoder
from anysplade.model.modules import has_static_queries
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.card import CARD_FILES
from anysplade.training.config import TrainingConfig, TrainingPrecision
from anysplade.training.devices import require_one_process, say_one_gpu
from anysplade.training.judging import METRIC, by_kind, halves, judge, reason
from anysplade.training.level import active_dims, flops, trim_flops
from anysplade.training.made_pairs import (
    PAIRS,
    TRAINING,
    earlier_record,
    hold_out,
    nothing_left_by_mistakes,
    rows_to_train_on,
    write_rows,
)
from anysplade.training.run import train_as
from anysplade.training.teachers import open_sparse, teacher_kind, without_advice

logger = logging.getLogger(__name__)

_NEGATIVES = 4  # hard negatives per query
_TRAINED = 0.7  # weight of the trained model in the mean; the original has the rest
_TRIMMED = 0.85  # of the original's FLOPS on training texts, as a limit; below 1 because other texts may cost more
_TRAINING = ("teacher", "steps", "batch_size", "learning_rate", "max_length", "precision", "seed")  # options passed to ``train``


@dataclass(frozen=True, repr=False)
class Adaptation(Tabular):
    """Result of ``adapt``, stored in ``adaptation.json``."""

    model: str  # folder of the kept model
    kept: str  # "adapted" or "original"
    verdict: str  # "better", "cheaper and not worse", "no difference shown" or "worse", of the deciding half of the queries
    reason: str  # one sentence
    judged_by: str  # name of the collection, or held-out pairs and their kinds
    judged_hash: str  # SHA-256 of its content
    decision: dict[str, Any]  # the test on the deciding half
    before: dict[str, Any]  # effectiveness and cost of the original, on the other half, which decided nothing
    after: dict[str, Any]  # the same of the adapted model
    comparison: dict[str, Any]  # of the two, paired by query, on the same half
    by_kind: dict[str, dict[str, Any]]  # the same half by kind of held-out pairs; empty for a judged collection
    pairs: dict[str, int]  # number of pairs made from the documents, by kind
    options: dict[str, Any]  # of ``adapt``
    seconds: float  # time in this process
    provenance: dict[str, Any]  # versions, commit, hardware, command

    def _rows(self) -> list[dict[str, Any]]:
        models = (("original", self.before), ("adapted", self.after))
        return [{"model": name, "kept": name == self.kept} | values for name, values in models]


def adapt(
    model: str,
    corpus: str,
    output: str | Path,
    *,
    teacher: str,
    judged: str | None = None,
    split: str = "test",
    kinds: Sequence[str] = PAIR_KINDS,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    max_length: int | None = 256,
    precision: TrainingPrecision = "float32",
    seed: int = 0,
    progress: bool = False,
) -> Adaptation:
    """Adapt a sparse encoder to the documents of a corpus, without labels and without making retrieval more expensive.

    One half of the judging queries, by the hash of their ids, decides by a paired test whether the adapted model is kept: if it
    is better at no more cost, or cheaper and, by the interval, less than 2 % worse. The other half, which nothing was chosen on,
    gives the reported numbers. Without a judged collection, the queries are of all kinds of pairs.

    An interrupted call continues when it is repeated with the same options; a finished one returns the stored result.

    Args:
        model: folder or hub id of a sparse encoder, or of a published SPLADE.
        corpus: the documents; anything that can be indexed.
        output: a folder; its ``model`` is the adapted model, or the original if the adapted one is not kept.
        teacher: a dense model, sparse encoder or cross-encoder.
        judged: a collection to compare the two models on; if None, a tenth of the documents is held out for that,
            with one query of any kind made from each.
        split: judgements of the collection to use.
        kinds: kinds of pairs; see ``make_pairs``.
        steps: training steps.
        batch_size: queries per step, each with its document and four hard negatives.
        learning_rate: peak learning rate.
        max_length: tokens per text in training; the adapted model reads at least as far as the original.
        precision: of the matrix products in training and of the teacher; bfloat16 is faster where the hardware supports it.
        seed: seed of all random numbers.
        progress: show progress bars.

    Raises:
        ModelError: the model is no sparse encoder, or the teacher cannot teach.
        DataError: no pairs can be made, or there are too few documents to hold some out.
        OutputError: the folder has other content.
        OptionError: an option is impossible, or there are several processes.
    """
    require_one_process("a model is adapted")
    output = user_path(output)
    source, teacher_source = resolve_model(model), resolve_model(teacher)
    teacher_kind(teacher_source)
    options = {
        "model": model, "corpus": corpus, "teacher": teacher, "judged": judged, "split": split, "kinds": list(kinds),
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "max_length": max_length,
        "precision": precision, "seed": seed,
    }  # fmt: skip
    about = {"options": options, "fingerprints": [fingerprint(source), fingerprint(teacher_source)]}
    with only_process(output):
        return _adapt(source, output, about, progress)


def _adapt(source: str, output: Path, about: dict[str, Any], progress: bool) -> Adaptation:
    """``adapt``, in a folder that no other process writes to."""
    options = about["options"]
    corpus, judged, split, kinds = (options[name] for name in ("corpus", "judged", "split", "kinds"))
    finished = _earlier_adaptation(output, about)
    if finished is not None:
        make_pairs(corpus, output / PAIRS, kinds=kinds, progress=progress)  # raises OutputError if the corpus changed
        if judged is not None and data_hash(load_collection(judged, split, progress=progress)) != finished.judged_hash:
            raise OutputError(
                f"{output}: the collection {judged} changed since it judged the models, or an older version judged them; "
                "choose another `output`"
            )
        logger.info("%s already has this adaptation", output)
        return finished
    start = time.perf_counter()
    data = output / TRAINING
    config = TrainingConfig(  # raises OptionError before anything is written
        str(output / "original"),
        str(data),
        output=str(output / "training"),
        objective="teacher",
        negatives=_NEGATIVES,
        checkpoint_steps=max(1, min(500, options["steps"])),
        **{name: options[name] for name in _TRAINING},
    )
    given = None if judged is None else load_collection(judged, split, progress=progress)
    if given is not None:
        halves(given, {})  # raises DataError before anything is written
    begun = (output / "options.json").exists()
    write_record(output / "options.json", about)
    with nothing_left_by_mistakes(output, begun):
        made = make_pairs(corpus, output / PAIRS, kinds=kinds, progress=progress)
        collection, of_kind = _write_training(corpus, output, given, kinds, progress)
        deciding, reporting = halves(collection, of_kind)
        shutil.rmtree(output / "original", ignore_errors=True)  # from an interrupted call
        with atomic_folder(output / "original") as folder:
            open_sparse(source).save_pretrained(str(folder))
        original, pairs = open_encoder(output / "original"), load_pairs(data)
        queries, documents = _targets(original, pairs)
        config = replace(config, query_active_dims=queries, document_active_dims=documents)
        say_one_gpu("a model is adapted")
        with without_advice():
            trained = train_as(config, progress, f"training {counted(options['steps'], 'step')} on {counted(len(pairs), 'pair')}")
    shutil.rmtree(output / "adapted", ignore_errors=True)
    _write_adapted(Path(trained.model), output, pairs, _TRIMMED * flops(original, pairs))
    decided, reported = (_evaluate_both(output, half, progress) for half in (deciding, reporting))
    decision = judge(decided)
    compared = compare(reported)[0]
    summaries = [found.metrics | {name: getattr(found, name) for name in COSTS} for found in reported]
    kept = "adapted" if decision.keep else "original"
    shutil.rmtree(output / "model", ignore_errors=True)
    with atomic_folder(output / "model") as folder:
        shutil.copytree(output / kept, folder, dirs_exist_ok=True)
    result = Adaptation(
        model=str(output / "model"),
        kept=kept,
        verdict=decision.verdict,
        reason=reason(decision, compared, reported),
        judged_by=collection.name,
        judged_hash=data_hash(collection),
        decision=json.loads(json.dumps(asdict(decision))),  # equal to the stored one
        before=summaries[0],
        after=summaries[1],
        comparison=json.loads(json.dumps(compared.to_dict())),
        by_kind=by_kind(reported, of_kind),
        pairs=made.pairs,
        options=options,
        seconds=time.perf_counter() - start,
        provenance=provenance(),
    )
    files = {"files": digests(output / "model", without=CARD_FILES)}
    write_record(output / "adaptation.json", about | result.to_dict() | files)
    return result


def _targets(encoder: SparseEncoder, pairs: Sequence[Pair]) -> tuple[float | None, float]:
    """The model's active dims on the training texts; None for queries whose terms are their tokens."""
    queries, documents = active_dims(encoder, pairs)
    return None if has_static_queries(encoder) else max(1.0, queries), max(1.0, documents)


def _write_adapted(trained: Path, output: Path, pairs: Sequence[Pair], most: np.ndarray) -> None:
    """Write the weighted mean of the two models, trimmed to at most ``most`` FLOPS, (2,), by kind of queries.

    Queries made from documents differ from those of users, on which the trained model alone is worse and varies more with the seed.
    """
    original, encoder = open_encoder(output / "original"), open_encoder(trained)
    with torch.no_grad():
        for before, after in zip(original.parameters(), encoder.parameters(), strict=True):
            after.lerp_(before, 1 - _TRAINED)
    trim_flops(encoder, pairs, most)
    with atomic_folder(output / "adapted") as folder:
        encoder.save_pretrained(str(folder))
        for name in CARD_FILES:
            if (trained / name).exists():
                shutil.copy(trained / name, folder)


def _evaluate_both(output: Path, collection: Collection, progress: bool) -> list[Evaluation]:
    """The original and the adapted model on a half of the queries; the vectors of the documents are computed once."""
    folders, cache = (output / "original", output / "adapted"), default_cache()
    return [evaluate(folder, collection, [METRIC], cache=cache, progress=progress) for folder in folders]


def _write_training(
    corpus: str, output: Path, given: Collection | None, kinds: Sequence[str], progress: bool
) -> tuple[Collection, dict[str, str]]:
    """Write the pairs to train on to ``TRAINING``: the made queries with their full documents.

    A shortened document, without the words of its query, would teach the model to expand what it can match. In a full document
    the query's words are an easy match, but what is learned is the teacher's order of the other documents.

    Returns the collection to judge by and the kinds of its queries. If none is ``given``, documents are held out for it.
    """
    documents = open_corpus(corpus, progress=progress)
    collection, of_kind, held = hold_out(corpus, output, documents, kinds, progress) if given is None else (given, {}, set())
    training = (
        {"query": row["query"], "positive": documents[row["document_id"]].full_text, "document_id": row["document_id"]}
        for row in rows_to_train_on(output, held)
    )
    write_rows(output / TRAINING, training)
    return collection, of_kind


def _earlier_adaptation(output: Path, about: dict[str, Any]) -> Adaptation | None:
    """The result of an earlier call with the same options, if it is finished and its model is undamaged."""
    record = earlier_record(output, "options.json", "adaptation.json", about, {"fingerprints": "model or teacher"})
    if record is None or "verdict" not in record:  # of an older version that judged and reported on the same queries
        return None
    return restored(Adaptation, record)
