"""The inputs of a training run: examples, dev collection and teacher, and the files by which a change is noticed."""

import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sentence_transformers import SparseEncoderTrainingArguments as Arguments

from anysplade._common.files import user_path
from anysplade._common.outputs import file_digest, read_record, record_path
from anysplade.data.collections import Collection, Pair, data_hash, load_collection
from anysplade.data.names import PYTHON_DOCS
from anysplade.data.pairs import Part, read_pairs, read_parts
from anysplade.data.python_docs import PACKAGES
from anysplade.data.stored_pairs import MixedFormsError, StoredPairs
from anysplade.errors import AnyspladeError, OptionError
from anysplade.model.encoder import check_foldable, is_saved_encoder, open_encoder
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.batches import check_batch_size
from anysplade.training.config import TrainingConfig, parse_objective
from anysplade.training.mining import mine
from anysplade.training.objectives import check_examples
from anysplade.training.teacher_scores import BatchTeacher, prepare_teacher
from anysplade.training.teachers import teacher_kind

logger = logging.getLogger(__name__)

DATA = "data"  # folder in the output for the examples and the teacher's scores, until the run is finished
_MINED = 2  # hard negatives per example that are mined by default
_CHECKED = 1000  # examples that are checked before the others are read


@dataclass
class Inputs:
    """What a run reads, checked."""

    pairs: StoredPairs
    dev: Collection | None
    hashes: dict[str, str | None]  # SHA-256 of data and dev collection, and fingerprints of backbone and teacher
    teacher: BatchTeacher | None = None  # computed after all checks


def read_inputs(config: TrainingConfig, output: Path, arguments: Arguments, progress: bool) -> Inputs:
    """Check the models, and read the dev collection and the examples."""
    backbone = resolve_model(config.backbone)
    asked_length = None if config.max_length == TrainingConfig.max_length else config.max_length  # the default may be too long
    open_encoder(backbone, False, asked_length)  # an unusable model is an error before the data are read
    check_foldable(backbone, config.fold, config.mute)
    teacher = None if config.teacher is None else resolve_model(config.teacher)
    if teacher is not None:
        teacher_kind(teacher)
    dev = None if config.dev is None else load_collection(config.dev, config.dev_split, progress=progress)
    pairs = _stored_examples(config, output, arguments, progress)
    hashes = {
        "data": pairs.data_hash,
        "backbone": fingerprint(backbone),
        "dev": None if dev is None else data_hash(dev),
        "teacher": None if teacher is None else fingerprint(teacher),
    }
    return Inputs(pairs, dev, hashes)


def _stored_examples(config: TrainingConfig, output: Path, arguments: Arguments, progress: bool) -> StoredPairs:
    """The checked examples; the first process stores them in the output folder, and the others open them there."""
    folder = output / DATA / "examples"
    if arguments.process_index:
        if not folder.exists():
            raise AnyspladeError(f"{output}: the first process could not prepare the examples; its own message says why")
        return StoredPairs(folder)
    parts, mining = _example_parts(config, progress)
    if mining:
        mined = _mined(config, output, progress)
        parts = read_parts(mined)
    first: list[Part] = []
    while sum(map(len, first)) < _CHECKED and (part := next(parts, None)) is not None:
        first.append(part)
    checked = list(islice(chain.from_iterable(first), _CHECKED))
    check_examples(config, checked)
    if len(checked) < 2:
        fix = "; no hard negatives were found for the others, so try `negatives=0`" if mining else ""
        raise OptionError(f"{config.data}: one pair is too few to train on; in-batch negatives need at least 2{fix}")
    try:
        pairs = StoredPairs.write(chain(first, parts), folder)
    except MixedFormsError:  # a few of the rows have lists of ids; all are stored as texts
        pairs = StoredPairs.write(read_pairs(mined) if mining else read_examples(config, progress)[0], folder)
    contrastive = "contrastive" in parse_objective(config.objective)
    try:
        check_batch_size(pairs.dataset, config.batch_size, arguments.world_size, contrastive, config.data)
    except OptionError:
        shutil.rmtree(folder)
        with suppress(OSError):  # not empty: mined negatives stay for the next call
            folder.parent.rmdir()
        raise
    return pairs


def read_examples(config: TrainingConfig, progress: bool = False) -> tuple[Iterator[Pair], bool]:
    """The examples in the data, and whether hard negatives have to be mined for them."""
    parts, mining = _example_parts(config, progress)
    return chain.from_iterable(parts), mining


def _example_parts(config: TrainingConfig, progress: bool) -> tuple[Iterator[Part], bool]:
    """``read_examples`` in parts."""
    may_mine = config.teacher is not None and config.negatives != 0
    reading = partial(read_parts, config.data, texts=config.texts, progress=progress)
    parts = reading(negatives=None if may_mine else config.negatives)
    if not may_mine:
        return parts, False
    first = next(parts)
    if first[0].negatives and config.negatives is not None:
        return reading(negatives=config.negatives), False
    return chain([first], parts), not first[0].negatives


def _mined(config: TrainingConfig, output: Path, progress: bool) -> Path:
    """Mine hard negatives with BM25 and a model: the backbone if it is a sparse encoder, otherwise the teacher.

    A trained backbone already separates random negatives from positives and would learn nothing from them. The file's name has a
    hash of everything that the negatives depend on, so another call in this folder does not reuse them by mistake.
    """
    assert config.teacher is not None
    if is_saved_encoder(resolve_model(config.backbone)):
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
    contents = {name: file_digest(Path(name)) for name in input_files(config, output) if Path(name).is_file()}
    decisive = json.dumps([config.data, options, contents])
    file = output / DATA / f"mined-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}.jsonl"
    if file.exists() and (read_record(record_path(file)) or {}).get("sha256") != file_digest(file):
        logger.warning("%s: is damaged; it is made again", file)
        file.unlink()
    mine(config.data, file, **options, progress=progress)
    return file


def batch_teacher(config: TrainingConfig, output: Path, pairs: StoredPairs, process: int, progress: bool) -> BatchTeacher | None:
    """The teacher's scores of the examples, None without a teacher; process 0 computes them, and the others open them."""
    if config.teacher is None:
        return None
    folder = output / DATA / "teacher"
    if process and not folder.exists():
        raise AnyspladeError(f"{output}: the first process could not prepare the teacher; its own message says why")
    return prepare_teacher(
        config.teacher, pairs, folder, max_length=config.max_length, precision=config.precision, progress=progress
    )


def input_files(config: TrainingConfig, output: Path) -> dict[str, list[Any]]:
    """Size and modification time of the files that a run reads; while they are unchanged, the contents are not read again.

    The files are those of the data, texts, dev collection, backbone and teacher. For ``python-docs`` the versions of the packages
    count instead. Names on the hub or in ir_datasets are assumed to be unchanged.
    """
    found: dict[str, list[Any]] = {}
    for source in (config.data, config.texts, config.dev, config.backbone, config.teacher):
        path = user_path(source or "").resolve()
        if source == PYTHON_DOCS:
            found |= {d.name: [d.version] for package in PACKAGES for d in importlib.metadata.distributions(name=package)}
        if source is None or not path.exists():
            continue
        texts_of_ids = [path.parent / "corpus.jsonl", *path.parent.glob("queries.*"), *path.parent.glob("topics.*")]
        for file in (path, *texts_of_ids) if path.is_file() else path.rglob("*"):
            if file.is_file() and output.resolve() not in file.parents:
                found[str(file)] = [file.stat().st_size, file.stat().st_mtime_ns]
    return dict(sorted(found.items()))
