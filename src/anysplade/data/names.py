"""What a path or a name holds, and which one was meant, for messages about arguments that are mistaken for each other."""

import contextlib
import json
from pathlib import Path

from anysplade._common.arguments import did_you_mean, nearest
from anysplade._common.files import user_path
from anysplade.data.sources import (
    BACKBONES,
    BM25_NAMES,
    CORPUS_FILES,
    FORMS,
    NANO_BEIR,
    PYTHON_DOCS,
    find_file,
    ir_dataset,
    lines,
    plain_name,
    trec_columns,
)
from anysplade.errors import DataError

MODEL, DENSE_MODEL, TRAINING_RUN = "a model", "a dense model", "a training run"
COLLECTION, CORPUS_FILE = "a collection", "a corpus file"
DATA = (COLLECTION, CORPUS_FILE)
INDEX, RUN, BM25 = "an index", "a run file", "a ranking by words"


def held(name: str | Path) -> str | None:
    """What a path or a name holds, with its article; None if that is nothing, or not known here, as what is on the hub."""
    text = str(name)
    for kind, built_in in ((MODEL, BACKBONES), (BM25, BM25_NAMES), (COLLECTION, (PYTHON_DOCS, NANO_BEIR))):
        if text in built_in:
            return kind
    path = user_path(text)
    if path.is_dir():
        return _held_in(path)
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return COLLECTION
        return CORPUS_FILE if plain_name(path).endswith(FORMS) else RUN if _is_run(path) else None
    return COLLECTION if any(ir_dataset(id_) is not None for id_ in (text, f"{text}/test")) else None


def _held_in(folder: Path) -> str | None:
    if find_file(folder, CORPUS_FILES) is not None:
        return COLLECTION
    if (folder / "index.json").is_file():
        return INDEX
    inside = next((at for at in (folder, folder / "model") if has_checkpoint(at)), None)
    if inside is None:
        return "the results of an evaluation" if (folder / "evaluation.json").is_file() else None
    if inside != folder:
        return TRAINING_RUN
    with contextlib.suppress(OSError, ValueError, AttributeError):  # absent or damaged
        about = json.loads((folder / "config_sentence_transformers.json").read_bytes())
        return DENSE_MODEL if about.get("model_type", "SentenceTransformer") == "SentenceTransformer" else MODEL
    return MODEL


def has_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "modules.json"))


def _is_run(path: Path) -> bool:
    with contextlib.suppress(DataError, OSError, ValueError), lines(path) as numbered:
        columns = trec_columns(next((line for _, line in numbered if line.strip()), ""))
        _ = [float(column) for column in columns[3:5]]  # rank and score
        return len(columns) == 6
    return False


def near(name: str | Path, *built_in: str) -> str:
    """The end of a message about a name that stands for nothing: "; did you mean X?", or empty if nothing is really near.

    X is one of the built-in names, or what lies where the path ends to exist.
    """
    text = str(name)
    path = user_path(text)
    if not text or path.exists():
        return ""
    if hint := did_you_mean(text.rstrip("/"), (known for known in built_in if known != text)):
        return hint
    with contextlib.suppress(OSError, StopIteration):
        folder = next(parent for parent in path.parents if parent.is_dir())
        missing, *rest = path.relative_to(folder).parts
        beside = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        found = nearest(missing, beside)
        if found is not None:
            whole = (folder / found).joinpath(*rest)
            return f"; did you mean {whole if whole.exists() else folder / found}?"
    return ""
