"""Train a sparse encoder: one config, sentence-transformers' trainer.

The output folder holds ``model`` (the trained ``SparseEncoder``), ``checkpoints`` (stock ones too),
``run.json`` (what was asked for and the calibration, written before the first step) and
``training.json`` (the result, written when all is done).
"""

import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from anysplade._common.arguments import require
from anysplade._common.files import (
    atomic_folder,
    damaged_file,
    digests,
    file_digest,
    only_process,
    read_record,
    record_path,
    user_path,
    write_atomic,
    writing,
)
from anysplade._common.progress import begin
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection, Pair, data_hash, load_collection
from anysplade.data.names import PYTHON_DOCS
from anysplade.data.pairs import read_pairs, sample_pairs
from anysplade.data.python_docs import PACKAGES
from anysplade.data.stored_pairs import StoredPairs
from anysplade.errors import AnyspladeError, CollapseError, ModelError, OptionError, OutputError
from anysplade.model.calibration import Calibration
from anysplade.model.encoder import build_encoder, check_foldable, is_saved_encoder, open_encoder
from anysplade.model.head import find_head, live_terms
from anysplade.model.modules import cut_in_training, has_static_queries, is_routed, masked_lm, set_lengths, splade_modules
from anysplade.model.options import Role
from anysplade.model.pooling import native_bfloat16
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.batches import DistinctBatches, check_batch_size
from anysplade.training.callbacks import (
    DevEvaluator,
    EndsOnce,
    Estimate,
    MarkComplete,
    Patience,
    Progress,
    check_trackers,
    last_checkpoint,
    step_of,
)
from anysplade.training.card import write_card
from anysplade.training.config import TrainingConfig, parse_objective
from anysplade.training.level import active_dims, batch_target, trim_level, warn_of_missed_targets
from anysplade.training.mining import mine
from anysplade.training.monitoring import Monitor
from anysplade.training.objectives import check_examples, make_loss
from anysplade.training.observers import ObservedLoss
from anysplade.training.regularization import ActiveDimsController
from anysplade.training.teachers import BatchTeacher, prepare_teacher, teacher_kind

logger = logging.getLogger(__name__)

_OPTIONS = "options.yaml"  # all of them, as `--config` reads them
_DATA = "data"  # the folder of the training examples, and of what the teacher says of them, during a run
_MINED = 2  # hard negatives of an example that has none, where a teacher tells the false ones
_PREPARATION = 7 * 24 * 3600  # seconds that processes wait for the first one, which mines and encodes for all
_RESTARTS = 3  # with on_collapse="recalibrate", each from a more strongly calibrated head
_CHECKED = 1000  # examples that are looked at before the others are read
_DEV_METRIC = "eval_dev_nDCG@10"


@dataclass(frozen=True, repr=False)
class TrainingResult(Tabular):
    """What a finished run leaves; lies in ``training.json``."""

    model: str  # folder of the trained encoder
    config: dict[str, Any]  # every option
    calibration: dict[str, Any]  # a ``Calibration`` as JSON
    pairs: int  # training examples
    data_hash: str  # SHA-256 of the examples
    processes: int  # that trained together
    steps: int  # optimiser steps
    best_step: int | None  # whose model was kept, with a dev collection
    resumed_from: int  # the step that this process started at: 0 unless the run was interrupted
    seconds: float  # of training in this process
    query_active_dims: float  # of the finished model, over up to 200 training pairs
    document_active_dims: float  # likewise
    level_trim: float  # taken from the decoder's bias after the last step, to meet a target of active dims
    dev: dict[str, Any] | None  # the finished model on the dev collection: effectiveness and cost
    log: list[dict[str, float]]  # the trainer's own log: loss, its parts, learning rate
    monitoring: dict[str, Any]  # findings (what went wrong) and observations (what the batches' vectors were like)
    restarts: list[dict[str, Any]]  # calibration and findings of the attempts that were given up
    provenance: dict[str, Any]  # versions, commit, hardware, command
    ranking_loss: dict[str, dict[str, float]] | None = None  # its mean over the first and the last tenth of the steps
    max_seq_length: int | None = None  # tokens of a document that the finished model reads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(config: TrainingConfig, progress: bool = False) -> TrainingResult:
    """Train a SPLADE encoder as the config says.

    Called again with the same config after an interruption, it continues from the last whole checkpoint;
    finished, it returns the recorded result and does nothing, unless the data, the dev collection or the backbone are
    others now, which is an error. What was damaged in between is said and made again. Started by ``torchrun``, all processes
    train one model and share each batch.

    Raises:
        OutputError: the output folder holds another run, or something else; another process trains there; the disk is full.
        ModelError, DataError, OptionError: as ``load_encoder`` and ``read_pairs`` do, before the first step.
        CollapseError: with ``on_collapse="stop"``, or when the restarts collapsed too.
    """
    require("config", config, TrainingConfig, "give anysplade.TrainingConfig(backbone, data, output=folder)")
    return train_as(config, progress, _label(config))


def train_as(config: TrainingConfig, progress: bool, label: str) -> TrainingResult:
    """``train``, with the line that says what begins."""
    check_trackers(config.report_to)
    output = user_path(config.output)
    with only_process(output) if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _train(config, output, progress, label)


def _train(config: TrainingConfig, output: Path, progress: bool, label: str) -> TrainingResult:
    """``train``, in a folder that no other run writes to."""
    if config.dev is not None:  # imported here, since it needs the extra; a missing one is told before hours of training
        from anysplade.evaluation.evaluations import evaluate
    asked = json.loads(json.dumps(asdict(config)))
    arguments = _arguments(config, output)
    with arguments.main_process_first(local=False):
        recorded, finished = _claim(output, asked)
        files = _files(config, output)
        if finished is not None and recorded.get("files") == files:
            logger.info("%s holds this run's result already", output)
            return finished
        backbone = resolve_model(config.backbone)
        open_encoder(backbone, False, _asked_length(config))  # an unusable model is an error before the data are read
        check_foldable(backbone, config.fold, config.mute)
        guide = None if config.teacher is None else resolve_model(config.teacher)
        if guide is not None:
            teacher_kind(guide)
        dev = None if config.dev is None else load_collection(config.dev, config.dev_split, progress=progress)
        pairs = _examples(config, output, arguments, progress)
        hashes = {
            "data": pairs.data_hash,
            "backbone": fingerprint(backbone),
            "dev": None if dev is None else data_hash(dev),
            "teacher": None if guide is None else fingerprint(guide),
        }
        known = recorded.get("hashes", {"data": recorded.get("data_hash", pairs.data_hash)})
        changed = [name for name, value in known.items() if value != hashes[name]]
        if finished is not None and arguments.process_index == 0:
            shutil.rmtree(output / _DATA)
        if changed:
            what = {"data": "training data", "dev": "dev collection"}.get(changed[0], changed[0])
            source = getattr(config, changed[0])
            raise OutputError(
                f"{output}: the {what} changed since this run began ({source}); choose another `output`, as for a run that an "
                "older version began"
            )
        if finished is not None:
            if arguments.process_index == 0:
                write_atomic(output / "run.json", json.dumps(recorded | {"files": files, "hashes": hashes}, indent=2) + "\n")
            logger.info("%s holds this run's result already", output)
            return finished

        teacher = None if config.teacher is None else _teacher(config, output, arguments, pairs, not recorded, progress)
    logger.info("%s", label)
    restarts: list[dict[str, Any]] = recorded.get("restarts", [])
    while True:
        begin(f"probing the head of {config.backbone}", progress and not is_saved_encoder(backbone))
        encoder, calibration, lengths = _encoder(config, pairs, len(restarts))
        run = {"config": asked, "calibration": calibration.to_dict(), "hashes": hashes, "files": files, "restarts": restarts}
        with arguments.main_process_first(local=False):
            if arguments.process_index == 0:
                if not recorded:
                    shutil.rmtree(output / "checkpoints", ignore_errors=True)
                write_atomic(output / "run.json", json.dumps(run, indent=2) + "\n")
                write_atomic(output / _OPTIONS, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))
            checkpoint = last_checkpoint(output / "checkpoints")
        trainer, monitor = _trainer(config, encoder, lengths, pairs, arguments, dev, teacher, progress)
        start = time.perf_counter()
        with writing(output):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start
        if not monitor.collapsed or config.on_collapse == "warn":
            break
        with arguments.main_process_first(local=False):
            _give_up_or_restart(config, output, run, monitor, write=arguments.process_index == 0)
        del encoder, trainer, monitor
        gc.collect()  # they refer to each other, and the next ones need the memory

    done, asked_for = trainer.state.global_step, trainer.state.max_steps
    if done < asked_for and config.patience is None:  # the trainer ends so when the batches run out, and says nothing
        raise AnyspladeError(f"{output}: the training ended at step {done} of {asked_for}; no model was written")
    if arguments.process_index == 0:
        set_lengths(encoder, lengths)  # from here on all is measured as an index will have it
        begin("measuring the trained model on training texts", progress, len(pairs))
        trim = trim_level(encoder, pairs, (config.query_active_dims, config.document_active_dims))
        dims = active_dims(encoder, pairs)
        warn_of_missed_targets(config, dims)
        best = trainer.state.best_model_checkpoint
        result = TrainingResult(
            model=str(output / "model"),
            config=asked,
            calibration=calibration.to_dict(),
            pairs=len(pairs),
            data_hash=pairs.data_hash,
            processes=arguments.world_size,
            steps=trainer.state.global_step,
            best_step=None if best is None else step_of(Path(best)),
            resumed_from=0 if checkpoint is None else step_of(checkpoint),
            seconds=seconds,
            query_active_dims=dims[0],
            document_active_dims=dims[1],
            level_trim=trim,
            dev=None if dev is None else evaluate(encoder, dev, progress=progress).to_dict(),
            log=trainer.state.log_history,
            monitoring=monitor.to_dict(),
            restarts=restarts,
            provenance=provenance(),
            ranking_loss=_ranking_loss(trainer.state.log_history),
            max_seq_length=splade_modules(encoder)[0].max_seq_length,
        )
        shutil.rmtree(output / "model", ignore_errors=True)  # of a run that ended between this line and the record
        with atomic_folder(output / "model") as folder:
            encoder.save_pretrained(str(folder))
            write_card(folder, result.to_dict())
        run["model"] = digests(output / "model", without=("README.md", "training.svg"))
        write_atomic(output / "run.json", json.dumps(run, indent=2) + "\n")
        write_atomic(output / "training.json", json.dumps(result.to_dict(), indent=2) + "\n")
        shutil.rmtree(output / _DATA)
    if arguments.world_size > 1:
        torch.distributed.barrier()
    recorded_result = _recorded_result(output)
    assert recorded_result is not None  # it was written just now
    return recorded_result


def _label(config: TrainingConfig) -> str:
    """What is trained, and the options that differ from the defaults."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.default is not MISSING}
    chosen = [f"{f.name} {given[f.name]}" for f in fields(config) if f.name in given and given[f.name] != f.default]
    options = f" with {', '.join(chosen)}" if chosen else ""
    return f"training {config.backbone} on {config.data}{options}; {user_path(config.output) / _OPTIONS} has all options"


def _examples(config: TrainingConfig, output: Path, arguments: SparseEncoderTrainingArguments, progress: bool) -> StoredPairs:
    """The training examples, checked and kept beside the run, where all its processes read them."""
    folder = output / _DATA / "examples"
    if arguments.process_index:
        if not folder.exists():
            raise AnyspladeError(f"{output}: the first process could not prepare the examples; it says why")
        return StoredPairs(folder)
    read, mining = read_examples(config, progress)
    if mining:
        read = read_pairs(_mined(config, output, progress))
    first = list(islice(read, _CHECKED))
    check_examples(config, first)
    if len(first) < 2:
        mined = "; hard negatives were found for no other, so try `negatives=0`" if mining else ""
        raise OptionError(f"{config.data}: one pair is too few to train on; in-batch negatives need at least 2{mined}")
    pairs = StoredPairs.write(chain(first, read), folder)
    contrastive = arguments.batch_sampler == BatchSamplers.NO_DUPLICATES
    try:
        check_batch_size(pairs.dataset, config.batch_size, arguments.world_size, contrastive, config.data)
    except OptionError:
        shutil.rmtree(folder)
        with suppress(OSError):  # mined negatives stay
            folder.parent.rmdir()
        raise
    return pairs


def read_examples(config: TrainingConfig, progress: bool = False) -> tuple[Iterator[Pair], bool]:
    """The examples as the data has them, and whether hard negatives are still to be mined for them."""
    may_mine = config.teacher is not None and config.negatives != 0
    reading = partial(read_pairs, config.data, texts=config.texts, progress=progress)
    read = reading(negatives=None if may_mine else config.negatives)
    if not may_mine:
        return read, False
    first = next(read)
    if first.negatives and config.negatives is not None:
        return reading(negatives=config.negatives), False
    return chain([first], read), not first.negatives


def _mined(config: TrainingConfig, output: Path, progress: bool) -> Path:
    """The examples with hard negatives of BM25 and of a model: the backbone if it retrieves already, else the teacher.

    A model that retrieves tells random negatives from positives as it is, and would learn nothing of them. The file's name
    depends on all that the negatives do, so that none of another call in this folder is taken for them.
    """
    assert config.teacher is not None
    backbone = resolve_model(config.backbone)
    if is_saved_encoder(backbone):
        miners = ["bm25", config.backbone]
    else:
        miners = ["bm25"] + [config.teacher] * (teacher_kind(resolve_model(config.teacher)) != "cross-encoder")
    options: dict[str, Any] = {
        "miner": miners,
        "teacher": config.teacher,
        "texts": config.texts,
        "negatives": config.negatives or _MINED,
        "max_length": config.max_length,
        "precision": config.precision,
    }
    contents = {name: file_digest(Path(name)) for name in _files(config, output) if Path(name).is_file()}
    decisive = json.dumps([config.data, options, contents])
    file = output / _DATA / f"mined-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}.jsonl"
    if file.exists() and (read_record(record_path(file)) or {}).get("sha256") != file_digest(file):
        logger.warning("%s: is damaged; it is made again", file)
        file.unlink()
    mined = mine(config.data, file, **options, progress=progress)
    if mined.left_out:
        logger.warning(
            "%s: %d examples left out, for which too few hard negatives were found; `negatives=0` trains on all",
            config.data,
            mined.left_out,
        )
    return file


def _teacher(
    config: TrainingConfig, output: Path, arguments: SparseEncoderTrainingArguments, pairs: StoredPairs, new: bool, progress: bool
) -> BatchTeacher:
    """What the teacher has to say of the examples, computed by the first process and read by all."""
    assert config.teacher is not None
    folder = output / _DATA / "teacher"
    if arguments.process_index and not folder.exists():
        raise AnyspladeError(f"{output}: the first process could not prepare the teacher; it says why")
    if new and not arguments.process_index:  # of a call with other data or another teacher
        shutil.rmtree(folder, ignore_errors=True)
    return prepare_teacher(
        config.teacher, pairs, folder, max_length=config.max_length, precision=config.precision, progress=progress
    )


def start_texts(config: TrainingConfig, pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """The queries and documents, with their prompts, that the head is measured and calibrated on."""
    queries, documents = sample_pairs(pairs, config.seed)
    return [config.query_prompt + query for query in queries], [config.document_prompt + document for document in documents]


def _encoder(config: TrainingConfig, pairs: Sequence[Pair], restarts: int) -> tuple[SparseEncoder, Calibration, list[int]]:
    """The encoder to start from, and how far it is to read after the training.

    After a collapse numbers for k and shift give way to "auto", and that to a stronger one.
    """
    set_seed(config.seed)
    queries, documents = start_texts(config, pairs)
    k, shift = config.k, config.shift
    if restarts and not (k == "auto" and shift == "auto"):
        k, shift, restarts = "auto", "auto", restarts - 1
    encoder, calibration = build_encoder(
        config.backbone,
        k,
        shift,
        config.fused,
        bias=config.bias,
        queries=queries,
        documents=documents,
        strength=restarts,
        pooling=config.pooling,
        double_log=config.double_log,
        query_encoder=config.query_encoder,
        idf_texts=(pair.positive for pair in pairs),
        attention=config.attention,
        fold=config.fold,
        mute=config.mute,
    )
    lengths = cut_in_training(encoder, config.max_length, is_saved_encoder(resolve_model(config.backbone)))
    if config.query_active_dims is not None and has_static_queries(encoder):
        raise OptionError(f"{config.backbone}: its queries have a weight a token, so query_active_dims cannot be met; leave it out")
    for role, prompt in (("query", config.query_prompt), ("document", config.document_prompt)):
        # A model that is trained on keeps its prompts unless others are given.
        encoder.prompts[role] = prompt or encoder.prompts.get(role, "")
    return encoder, calibration, lengths


def _asked_length(config: TrainingConfig) -> int | None:
    """A length that must be had; the default is taken as far as the model's positions go."""
    return None if config.max_length == TrainingConfig.max_length else config.max_length


def _give_up_or_restart(config: TrainingConfig, output: Path, run: dict[str, Any], monitor: Monitor, write: bool) -> None:
    """Record a collapse; clear the way for a new start, or raise CollapseError."""
    findings = [asdict(finding) for finding in monitor.findings]
    worst = next(finding for finding in monitor.findings if finding.collapse)
    evidence = f"{worst.name} at step {worst.step} ({worst.evidence})"
    if config.on_collapse == "stop" or len(run["restarts"]) == _RESTARTS:
        if write:
            write_atomic(output / "run.json", json.dumps(run | {"collapsed": findings}, indent=2) + "\n")
        raise CollapseError(f"{output}: the training collapsed: {evidence}; {worst.fix}")
    run["restarts"].append({"k": run["calibration"]["k"], "shift": run["calibration"]["shift"], "findings": findings})
    if write:
        write_atomic(output / "run.json", json.dumps(run, indent=2) + "\n")
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    logger.warning("%s; starting again from the beginning, calibrated more strongly", evidence)


def _ranking_loss(log: list[dict[str, float]]) -> dict[str, dict[str, float]] | None:
    """The ranking loss without the regularizers: its mean over the first and over the last tenth of the steps, ten at least.

    One batch says little, and the regularizers' weights begin at 0, so that the first and the last total are no two
    values of one thing. A logged value is the mean since the one before.
    """
    logged: list[tuple[int, int, float]] = []  # after this step, to this step, the mean in between
    for entry in log:
        if "loss" in entry:
            parts = (value for name, value in entry.items() if name.endswith("_loss") and not name.endswith("regularizer_loss"))
            logged.append((logged[-1][1] if logged else 0, int(entry["step"]), sum(parts)))
    if not logged:
        return None
    last = logged[-1][1]
    span = max(10, last // 10)
    parts_of = {
        "first": [part for part in logged if part[1] <= span] or logged[:1],
        "last": [part for part in logged if part[0] >= last - span] or logged[-1:],
    }
    return {
        name: {
            "from_step": part[0][0] + 1,
            "to_step": part[-1][1],
            "mean": sum((end - start) * value for start, end, value in part) / (part[-1][1] - part[0][0]),
        }
        for name, part in parts_of.items()
    }


def _claim(output: Path, asked: dict[str, Any]) -> tuple[dict[str, Any], TrainingResult | None]:
    """What ``run.json`` says of this very run, nothing of a new one; and the result if it is finished and its model is whole.

    Raises:
        OutputError: the folder holds another run, or something else.
        CollapseError: the run collapsed before.
    """
    if not (output / "run.json").exists():
        if output.exists() and (not output.is_dir() or {path.name for path in output.iterdir()} - {_DATA, "lock"}):
            raise OutputError(f"{output}: holds something that is no run of anysplade; choose another `output`")
        return {}, None
    result = _recorded_result(output)
    run = read_record(output / "run.json", "config", "calibration")
    digests_known = None if run is None else run.get("model", {})  # a run of an earlier version has none
    if run is None and result is not None:  # the result has the same
        run = {name: getattr(result, name) for name in ("config", "calibration", "restarts", "data_hash")}
    if run is None:
        logger.warning("%s: nothing says what its checkpoints are of; it starts again from the beginning", output)
        return {}, None
    recorded = run["config"]
    different = [f"{name} {recorded.get(name)!r}, now {asked[name]!r}" for name in asked if recorded.get(name) != asked[name]]
    if different:
        raise OutputError(f"{output}: a run with other options ({'; '.join(different)}); use another `output` or remove it")
    if "collapsed" in run:
        raise CollapseError(f"{output}: this run collapsed before; change the options and choose another `output`")
    if result is None:
        return run, None
    if digests_known is None:
        damaged: str | None = "its description in run.json"
    else:
        damaged = damaged_file(output / "model", digests_known) if (output / "model").is_dir() else "the folder"
    if damaged is not None:
        logger.warning("%s: %s is missing or damaged; it is made again", output / "model", damaged)
    return run, result if damaged is None else None


def _files(config: TrainingConfig, output: Path) -> dict[str, list[Any]]:
    """Size and time of the files that a run reads: what has the same need not be read again to be known for the same.

    Those of the data, of its texts, of the dev collection, of the backbone and of the teacher; of ``python-docs`` the packages'
    versions. Datasets and models that go by a name alone, of the hub or of ir_datasets, are taken for unchanged.
    """
    found: dict[str, list[Any]] = {}
    for source in (config.data, config.texts, config.dev, config.backbone, config.teacher):
        path = user_path(source or "").resolve()
        if source == PYTHON_DOCS:
            found |= {d.name: [d.version] for package in PACKAGES for d in importlib.metadata.distributions(name=package)}
        if source is None or not path.exists():
            continue
        beside = [path.parent / "corpus.jsonl", *path.parent.glob("queries.*"), *path.parent.glob("topics.*")]  # texts of ids
        for file in (path, *beside) if path.is_file() else path.rglob("*"):
            if file.is_file() and output.resolve() not in file.parents:
                found[str(file)] = [file.stat().st_size, file.stat().st_mtime_ns]
    return dict(sorted(found.items()))


def _recorded_result(output: Path) -> TrainingResult | None:
    known = fields(TrainingResult)
    record = read_record(output / "training.json", *(field.name for field in known if field.default is MISSING))
    if record is None:
        return None
    return TrainingResult(**{field.name: record[field.name] for field in known if field.name in record})


def _arguments(config: TrainingConfig, output: Path) -> SparseEncoderTrainingArguments:
    """The trainer's arguments. Made first: this is where processes that torchrun started find each other."""
    gpu = torch.cuda.is_available()
    more: dict[str, Any] = {}
    if config.dev is not None:
        more = {
            "eval_strategy": "steps",
            "eval_steps": config.checkpoint_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": _DEV_METRIC,
            "greater_is_better": True,
        }
    several = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % several:
        raise OptionError(f"batch_size {config.batch_size} does not divide among {several} processes; choose a multiple")
    if several > 1:  # a batch is that of all processes, so that their number changes nothing but the speed
        more |= {"accelerator_config": {"split_batches": True}, "ddp_backend": "nccl" if gpu else "gloo"}
        more["ddp_timeout"] = _PREPARATION
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,
        seed=config.seed,
        data_seed=config.seed,
        # In contrastive training a text twice in a batch would be its own negative.
        batch_sampler=BatchSamplers.NO_DUPLICATES
        if "contrastive" in parse_objective(config.objective)
        else BatchSamplers.BATCH_SAMPLER,
        dataloader_drop_last=True,  # a small batch has few negatives
        bf16=config.precision == "bfloat16",
        save_strategy="steps",
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        use_cpu=not gpu and not torch.backends.mps.is_available(),
        **more,
    )
    device = arguments.device  # joins the other processes
    if (gpus := arguments.n_gpu) > 1:
        logger.info("one of %d GPUs is used; `torchrun --nproc-per-node %d -m anysplade train ...` trains on all", gpus, gpus)
        arguments._n_gpu = 1  # transformers would copy the model to all, and the copies' pooling would read the first one's weights
    if config.precision == "bfloat16" and device.type == "cpu" and not native_bfloat16("cpu"):
        logger.warning("this processor has no products of bfloat16 and emulates them slowly; `precision=float32` is faster here")
    return arguments


def _trainer(
    config: TrainingConfig,
    encoder: SparseEncoder,
    lengths: Sequence[int],
    pairs: StoredPairs,
    arguments: SparseEncoderTrainingArguments,
    dev: Collection | None,
    teacher: BatchTeacher | None,
    progress: bool,
) -> tuple[SparseEncoderTrainer, Monitor]:
    dataset = pairs.dataset
    if teacher is not None:  # the label is the example's number; what scores the data has are not used
        dataset = dataset.remove_columns([name for name in dataset.column_names if name == "label"])
        dataset = dataset.add_column("label", list(range(len(dataset))))
    documents = [name for name in pairs.dataset.column_names if name not in ("query", "label")]
    prompts = {role: encoder.prompts[role] or "" for role in ("query", "document")}
    if any(prompts.values()):
        arguments.prompts = {"query": prompts["query"]} | dict.fromkeys(documents, prompts["document"])
    if is_routed(encoder):
        arguments.router_mapping = {"query": "query"} | dict.fromkeys(documents, "document")
    if config.gradient_checkpointing:
        model = masked_lm(encoder)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its old name
        enable({"use_reentrant": False})
    loss = make_loss(config, encoder, teacher)
    if config.head_learning_rate is not None:
        arguments.learning_rate_mapping = {_head_parameters(loss, masked_lm(encoder)): config.head_learning_rate}
    monitor = Monitor(
        encoder.get_embedding_dimension() or 0,
        stop=config.on_collapse != "warn",
        contrastive=list(parse_objective(config.objective)) == ["contrastive"],
        live=live_terms(masked_lm(encoder)),
    )
    loss.loss = ObservedLoss(loss.loss, monitor.see)
    roles: tuple[tuple[Role, float | None], ...] = (("query", config.query_active_dims), ("document", config.document_active_dims))
    targets = [target and batch_target(encoder, pairs, lengths, role, target) for role, target in roles]
    main = arguments.process_index == 0
    callbacks: list[TrainerCallback] = [
        # Stands for the ramp that the trainer would add by itself.
        ActiveDimsController(loss, *targets),
        MarkComplete(),
    ]
    if main:
        callbacks.append(Progress() if progress else Estimate())
    if config.patience is not None:
        callbacks.append(Patience(early_stopping_patience=config.patience))
    trainer = _Trainer(
        model=encoder,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        evaluator=None if dev is None else DevEvaluator(dev),
        callbacks=callbacks,
    )
    trainer.callback_handler.callbacks.insert(1, monitor)  # before the trackers, which then get what it logs
    trainer.remove_callback(PrinterCallback)  # writes to standard output, which belongs to the result
    return trainer, monitor


class _Trainer(EndsOnce, SparseEncoderTrainer):
    def get_batch_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.batch_sampler == BatchSamplers.NO_DUPLICATES:
            return DistinctBatches(*args, **kwargs)
        return super().get_batch_sampler(*args, **kwargs)


def _head_parameters(loss: nn.Module, model: PreTrainedModel) -> str:
    """A pattern for the names of the decoder's weight and bias.

    Raises:
        ModelError: the weight is the input embeddings' too, so that it cannot have a learning rate of its own.
    """
    head = find_head(model)
    if head.decoder.weight is model.get_input_embeddings().weight:
        raise ModelError(
            f"{type(model).__name__}: the decoder is tied to the input embeddings, so its learning rate is theirs; "
            "choose a k other than 1, which unties it, or leave out `head_learning_rate`"
        )
    wanted = {id(tensor) for tensor in (head.decoder.weight, *head.biases)}
    return "|".join(f"^{re.escape(name)}$" for name, tensor in loss.named_parameters() if id(tensor) in wanted)
