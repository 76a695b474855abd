"""Make a sparse encoder of a dense model and of documents without labels, and compare both, with BM25 and without.

The model gets an MLM head and is trained by contrast on pairs with hard negatives by BM25. It is meant to be searched with BM25
added to its score, so it has to learn what words do not tell. The dense model does not teach: on other queries than those trained
on, that gained nothing.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from anysplade._common.arguments import require
from anysplade._common.files import atomic_folder, default_cache, only_process, user_path
from anysplade._common.hashing import DataHash
from anysplade._common.outputs import digests, restored, write_record
from anysplade._common.progress import counted
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection, data_hash, load_collection
from anysplade.data.corpus import iter_corpus
from anysplade.data.names import PAIR_KINDS
from anysplade.data.pairs import read_pairs
from anysplade.errors import ModelError, OptionError
from anysplade.evaluation.comparisons import compare
from anysplade.evaluation.costs import COSTS, OWN_WORDS
from anysplade.evaluation.evaluations import Evaluation, evaluate
from anysplade.evaluation.fusion import evaluate_fused, evaluate_lexical
from anysplade.model.dense import is_dense
from anysplade.model.encoder import encoder_folder
from anysplade.model.options import checked_option
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.card import CARD_FILES
from anysplade.training.config import TrainingConfig, TrainingPrecision
from anysplade.training.devices import require_one_process, say_one_gpu
from anysplade.training.distillation_pairs import add_negatives, write_examples
from anysplade.training.estimates import Speed, measure_speed
from anysplade.training.head_training import train_head
from anysplade.training.judging import METRIC, size_of
from anysplade.training.made_pairs import TRAINING, earlier_record, nothing_left_by_mistakes
from anysplade.training.new_head import check_encoder
from anysplade.training.run import train_as
from anysplade.training.teachers import without_advice

logger = logging.getLogger(__name__)

_BEGUN, _DONE = "call.json", "distillation.json"  # records in the output: of the options, and of the result
_INPUTS = {
    "fingerprint": "dense model", "corpus_hash": "corpus", "pairs_hash": "training pairs", "collection_hash": "judged collection",
}  # fmt: skip
_HEAD: dict[str, Any] = {"steps": 300, "batch_size": 16}  # of the head's training
_CHECKPOINT = 100  # steps between checkpoints
_TRAINING = ("steps", "batch_size", "learning_rate", "max_length", "precision", "seed", "negatives")  # passed to ``train``
_TARGETS = ("query_active_dims", "document_active_dims")  # passed too

SpeedOf = Callable[[], Speed]  # measures it when it is first needed


@dataclass(frozen=True, repr=False)
class Distillation(Tabular):
    """Result of ``distil``, stored in ``distillation.json``."""

    model: str  # folder of the sparse encoder
    rows: list[dict[str, Any]]  # name, effectiveness and cost of what was compared
    verdict: str  # of sparse + BM25 against BM25: "better", "no difference shown" or "worse"
    reason: str  # one sentence
    comparison: dict[str, Any]  # the test, paired by query
    judged_by: str  # name of the collection, or held-out pairs and their kinds
    judged_hash: str  # SHA-256 of its content
    queries: int  # number of its queries
    pairs: dict[str, int]  # number of pairs made from the documents, by kind, or of the given ones
    trained_on: int  # number of pairs in the training
    options: dict[str, Any]  # of ``distil``
    seconds: float  # time in this process
    provenance: dict[str, Any]  # versions, commit, hardware, command

    def _rows(self) -> list[dict[str, Any]]:
        return self.rows


def distil(
    dense: str,
    corpus: str,
    output: str | Path,
    *,
    pairs: str | None = None,
    judged: str | None = None,
    split: str = "test",
    kinds: Sequence[str] = PAIR_KINDS,
    steps: int = 400,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    max_length: int = 96,
    query_active_dims: float = 14,
    document_active_dims: float = 70,
    negatives: int = 1,
    lexical: float = 3.0,
    precision: TrainingPrecision = "float32",
    seed: int = 0,
    progress: bool = False,
) -> Distillation:
    """Make a sparse encoder of a dense model, for documents without labels: a head, pairs, a training and a comparison.

    The model gets an MLM head (``train_head``), pairs are made from the documents (``make_pairs``) and get hard negatives by BM25
    (``mine``), and the training is contrastive (``train``). It is compared with the dense model, with BM25, with itself and BM25
    added, and with the fusion of the dense model and BM25, a bound of what it could give. The queries choose nothing, so their
    numbers are unbiased. All documents are read in memory.

    An interrupted call continues when it is repeated with the same options; a finished one returns the stored result.

    Args:
        dense: folder or hub id of a dense model of sentence-transformers.
        corpus: the documents; anything that can be indexed.
        output: a folder; its ``model`` is the sparse encoder.
        pairs: your own training pairs instead of made ones, in any form that ``train`` takes; their negatives are not used.
        judged: a collection to compare on; if None, a tenth of the documents with pairs is held out for that.
        split: judgements of the collection to use.
        kinds: kinds of pairs to make; see ``make_pairs``.
        steps: training steps.
        batch_size: pairs per step.
        learning_rate: peak learning rate.
        max_length: tokens per text in both trainings; the model reads what its backbone reads, up to 512.
        query_active_dims: target for the mean number of terms in a query.
        document_active_dims: the same for documents.
        negatives: hard negatives per pair, by BM25.
        lexical: BM25's weight in the sum with the model's score, in the comparison.
        precision: of the matrix products in training; bfloat16 is faster where the hardware supports it.
        seed: seed of all random numbers.
        progress: show progress bars, and say what each stage will take before it begins.

    Raises:
        ModelError: the model is not dense, or cannot get an MLM head.
        DataError: no pairs can be made, or there are too few to hold some out.
        OutputError: the folder has other content, or the corpus, the pairs or the collection changed.
        OptionError: an option is impossible, or there are several processes.
    """
    require_one_process("a model is distilled")
    require("corpus", corpus, (str, Path), "give a path or a name")
    output, source = user_path(output), resolve_model(dense)
    if not is_dense(source):
        raise ModelError(f"{dense}: not a dense model of sentence-transformers; others are for: anysplade train {dense} DATA")
    check_encoder(source, encoder_folder(source))
    max_length = checked_option("max_length", max_length, int)
    lexical = checked_option("lexical", lexical, float)
    if not 0 < lexical < math.inf:
        raise OptionError(f"`lexical` is {lexical:g}: BM25's weight in the sum is a finite number above 0, such as 3")
    options: dict[str, Any] = {
        "dense": str(dense), "corpus": str(corpus), "pairs": None if pairs is None else str(pairs),
        "judged": None if judged is None else str(judged), "split": split, "kinds": list(kinds), "steps": steps,
        "batch_size": batch_size, "learning_rate": learning_rate, "max_length": max_length,
        "query_active_dims": query_active_dims, "document_active_dims": document_active_dims, "negatives": negatives,
        "lexical": lexical, "precision": precision, "seed": seed,
    }  # fmt: skip
    config = TrainingConfig(  # raises OptionError before anything is written
        str(output / "head"),
        str(output / TRAINING),
        output=str(output / "training"),
        checkpoint_steps=max(1, min(_CHECKPOINT, steps)),
        **{name: options[name] for name in (*_TRAINING, *_TARGETS)},
    )
    with only_process(output):
        return _distil(source, output, config, options, progress)


def _distil(source: str, output: Path, config: TrainingConfig, options: dict[str, Any], progress: bool) -> Distillation:
    """``distil``, in a folder that no other process writes to."""
    start = time.perf_counter()
    corpus, judged = options["corpus"], options["judged"]
    given = None if judged is None else load_collection(judged, options["split"], progress=progress)
    corpus_hash, documents = _hash_corpus(corpus, progress)
    about = {
        "options": options,
        "fingerprint": fingerprint(source),
        "corpus_hash": corpus_hash,
        "pairs_hash": None if options["pairs"] is None else DataHash(read_pairs(options["pairs"], negatives=0)).hexdigest(),
        "collection_hash": None if given is None else data_hash(given),
    }
    record = earlier_record(output, _BEGUN, _DONE, about, _INPUTS)
    if record is not None:
        logger.info("%s already has this model", output)
        return restored(Distillation, record)
    begun = (output / _BEGUN).exists()
    write_record(output / _BEGUN, about)
    speed = cache(lambda: measure_speed(source, corpus, options["max_length"], options["precision"]))
    with nothing_left_by_mistakes(output, begun):
        made_of = f"made of {counted(documents, 'document')}" if options["pairs"] is None else f"of {options['pairs']}"
        _say(progress, f"1 of 4: pairs {made_of}, with {counted(options['negatives'], 'negative')} each by BM25, without a model")
        collection, made = write_examples(corpus, output, options, given, progress)
        trained_on = add_negatives(output, options["negatives"], progress)
        _train_head(source, output, options, speed, progress)
        trained = _train(config, output, trained_on, speed, progress)
    shutil.rmtree(output / "model", ignore_errors=True)
    with atomic_folder(output / "model") as folder:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
    if progress:
        size = f"{counted(len(collection.queries), 'query')} over {counted(len(collection.corpus), 'document')}"
        _say(progress, f"4 of 4: comparison, {size}, {speed().of_comparison(len(collection.corpus), len(collection.queries))}")
    found = _compared(source, output / "model", collection, options["lexical"], progress)
    bm25, summed = found["bm25"], found[_summed(options["lexical"])]
    comparison = compare([bm25, summed])[0]
    result = Distillation(
        model=str(output / "model"),
        rows=[_row(name, evaluation) for name, evaluation in found.items()],
        verdict=str(comparison.verdict),
        reason=f"{_summed(options['lexical'])} against bm25 on {collection.name}: {comparison.verdict} in {METRIC}, "
        f"{bm25.metrics[METRIC]:.3f} → {summed.metrics[METRIC]:.3f} "
        f"({size_of(comparison.difference, comparison.interval, comparison.p)})",
        comparison=json.loads(json.dumps(comparison.to_dict())),  # equal to the stored one
        judged_by=collection.name,
        judged_hash=data_hash(collection),
        queries=len(collection.queries),
        pairs=made,
        trained_on=trained_on,
        options=options,
        seconds=time.perf_counter() - start,
        provenance=provenance(),
    )
    files = {"files": digests(output / "model", without=CARD_FILES)}
    write_record(output / _DONE, about | result.to_dict() | files)
    return result


def _hash_corpus(corpus: str, progress: bool) -> tuple[str, int]:
    """SHA-256 of the documents in their order, and their number."""
    digest, count = DataHash(), 0
    for id_, document in iter_corpus(corpus, progress=progress):
        digest.add((id_, document.title, document.text))
        count += 1
    return digest.hexdigest(), count


def _say(progress: bool, stage: str) -> None:
    if progress:
        logger.info("%s", stage)


def _train_head(source: str, output: Path, options: dict[str, Any], speed: SpeedOf, progress: bool) -> None:
    if progress and not (output / "head" / "head.json").exists():
        size = f"{counted(_HEAD['steps'], 'step')} of {counted(_HEAD['batch_size'], 'text')}"
        _say(progress, f"2 of 4: a head, {size}, {speed().of_head(_HEAD['steps'] * _HEAD['batch_size'])}")
    given: dict[str, Any] = {"max_length": options["max_length"], "seed": options["seed"]}
    train_head(source, options["corpus"], output / "head", **_HEAD, **given, progress=progress)


def _train(config: TrainingConfig, output: Path, pairs: int, speed: SpeedOf, progress: bool) -> str:
    """Train; returns the folder of the encoder."""
    assert config.steps is not None
    assert config.negatives is not None
    begins = progress and not (output / "training" / "training.json").exists()
    takes = f", {speed().of_training(config.steps * config.batch_size, config.negatives)}" if begins else ""
    size = f"{counted(config.steps, 'step')} of {counted(config.batch_size, 'pair')} with {counted(config.negatives, 'negative')}"
    say_one_gpu("a model is distilled")
    with without_advice():
        return train_as(config, progress, f"3 of 4: training, {size} each, from {counted(pairs, 'pair')}{takes}").model


# ------------------------------------------------------------------------------------ the comparison


def _summed(weight: float) -> str:
    return f"sparse + {weight:g} × bm25"


def _compared(dense: str, model: Path, collection: Collection, weight: float, progress: bool) -> dict[str, Evaluation]:
    """The evaluations by the name that the table shows."""
    models: tuple[str | Path, ...] = (dense, "bm25", model)
    kept = default_cache()
    of_dense, of_bm25, of_sparse = (evaluate(one, collection, [METRIC], cache=kept, progress=progress) for one in models)
    return {
        "dense": of_dense,
        "bm25": of_bm25,
        "sparse": of_sparse,
        _summed(weight): evaluate_lexical(of_sparse, collection, weight),
        "dense and bm25, fused (wsum)": evaluate_fused([of_dense, of_bm25], collection, "wsum"),
    }


def _row(name: str, evaluation: Evaluation) -> dict[str, Any]:
    return {"model": name} | evaluation.metrics | {column: getattr(evaluation, column) for column in (*COSTS, *OWN_WORDS)}
