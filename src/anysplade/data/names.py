"""The meaning of names: which data set, model, index or file a path or an id stands for."""

import contextlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anysplade._common.arguments import did_you_mean, near, require
from anysplade._common.files import user_path, warn_once
from anysplade.data.external import has_ir_datasets, ir_dataset, ir_names
from anysplade.data.rows import TABLE_FORMATS, find_file, lines, plain_name, trec_columns
from anysplade.errors import DataError

# Names that are built in and stand for no file or folder.
PYTHON_DOCS = "python-docs"
NANO_BEIR = "nanobeir"  # thirteen collections
BM25_NAMES = ("bm25", "bm25-unstemmed")
BACKBONES = ("bert-tiny", "modernbert-tiny")  # bundled
PAIR_KINDS: tuple[str, ...] = ("title", "heading", "sentence")  # of ``make_pairs``

# File names in the folder of a collection; BEIR's come first.
CORPUS_FILES = tuple(f"{name}{form}" for name in ("corpus", "collection", "docs", "msmarco-docs") for form in TABLE_FORMATS)
TOPIC_FORMATS = (".trec", ".txt", ".xml")  # tables, or topics in TREC's format; the content tells
QUERY_FILES = tuple(f"{name}{form}" for name in ("queries", "topics") for form in (*TABLE_FORMATS, *TOPIC_FORMATS))

# Kinds of things that ``held`` returns.
MODEL, INDEX, COLLECTION, CORPUS_FILE = "a model", "an index", "a collection", "a corpus file"
DATA = (COLLECTION, CORPUS_FILE)

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE = re.compile(r"\.(jsonl|json|csv|tsv|trec|run|parquet|txt|xml|ya?ml|gz|bz2|zst|xz|zip)$", re.IGNORECASE)


class Source(NamedTuple):
    """The result of ``resolve``."""

    kind: Literal["file", "folder", "hub", "ir_datasets", "python-docs"]
    name: str
    at: Any = None  # path of a file or folder, also inside a zip archive; folder or hub id; dataset of ir_datasets; None
    config: str | None = None  # of a hub dataset

    def __str__(self) -> str:
        return self.name


def resolve(name: str | Path | Source, wanted: str, split: str = "test") -> Source:
    """Find the source that the name of a corpus, a collection, training data, queries or texts stands for.

    These are tried in order: ``"python-docs"``, unless it is a Path; an existing file or folder, where a folder with a README
    and without a corpus is a hub dataset and a zip archive is the folder in it; an ir_datasets id, which can lack its last
    part, the split; a hub id, ``org/name`` or ``org/name:config``.

    Args:
        name: a Source is returned as it is.
        wanted: "corpus", "collection", "training data", "queries" or "texts".
        split: the last part to try for an ir_datasets id that lacks it.
    """
    if isinstance(name, Source):
        return name
    require(wanted.replace(" ", "_"), name, (str, Path), "give a path or a name")
    text = str(name)
    forms = "a BEIR folder or zip" if wanted == "collection" else "a file, a BEIR folder or zip"
    fix = f"give {forms}, an ir_datasets id, a hub dataset or {PYTHON_DOCS!r}"
    if isinstance(name, str) and is_built_in(name, PYTHON_DOCS):
        return Source("python-docs", text)
    if text == NANO_BEIR:
        raise DataError(f"{text}: stands for thirteen collections, which only evaluate takes; name one, such as nano-beir/scifact")
    path = user_path(text)
    if path.exists() and (kind := held(path)) not in (None, *DATA) and find_file(path, ["pairs.jsonl"]) is None:
        raise DataError(f"{text}: {kind}, not {'' if wanted in ('training data', 'texts') else 'a '}{wanted}; {fix}")
    if path.is_file():
        return Source("folder", text, _zip_folder(path)) if path.suffix.lower() == ".zip" else Source("file", text, path)
    if path.is_dir():
        is_hub = (path / "README.md").is_file() and find_file(path, CORPUS_FILES) is None
        return Source("hub" if is_hub else "folder", text, path)
    known = [dataset for id_ in (text, f"{text}/{split}") if (dataset := ir_dataset(id_)) is not None]
    if known:
        usable = (dataset for dataset in known if wanted in ("corpus", "texts") or _is_judged(dataset))
        return Source("ir_datasets", text, next(usable, known[0]))
    hub_name, _, config = text.partition(":")
    if config and user_path(hub_name).is_dir():
        return Source("hub", text, user_path(hub_name), config)
    if _HUB_ID.fullmatch(hub_name) and not _FILE.search(hub_name):
        return Source("hub", text, hub_name, config or None)
    hint = near(text, PYTHON_DOCS, NANO_BEIR, *ir_names())  # slow: thousands of names
    missing = "" if has_ir_datasets() else '; ir_datasets ids need: pip install "anysplade[evaluation]"'
    raise DataError(f"{text or 'an empty name'}: no such {wanted}; {fix}{missing}{hint}")


def _is_judged(dataset: Any) -> bool:
    return dataset.has_queries() and (dataset.has_qrels() or dataset.has_docpairs())


def _zip_folder(path: Path) -> zipfile.Path:
    """The folder in a zip archive: its root, or the only folder at its root."""
    try:
        root = zipfile.Path(zipfile.ZipFile(path))
    except zipfile.BadZipFile:
        raise DataError(f"{path}: not a zip archive, or a damaged one; download it again") from None
    inside = [entry for entry in root.iterdir() if not entry.name.startswith(("_", "."))]  # ignores __MACOSX
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else root


def is_built_in(name: object, *built_in: str) -> bool:
    """Whether a name is one of these built-in names; warns if a file or folder has the same name."""
    if name not in built_in:
        return False
    if Path(str(name)).exists():
        warn_once(f"{name}: read as the built-in name, not as the file or folder here; write ./{name} for that")
    return True


def misnamed(name: str | Path) -> str:
    """Why a name stands for nothing, neither here nor on the hub; empty if it may stand for something.

    It is a path to nothing, or nearly a built-in name. Ids of ir_datasets can have more than one slash, ids of the hub cannot.
    """
    text = str(name)
    if not text or "://" in text or any(user_path(path).exists() for path in (text, text.rpartition(":")[0]) if path):
        return ""  # the latter of FOLDER:CONFIG
    if text.startswith(("/", ".", "~")) or _FILE.search(text):
        return f"no such file{'' if _FILE.search(text) else ' or folder'}{near(text) or '; check the path'}"
    hint = near_built_in(text)
    return f"no such name{hint}" if hint and held(text) is None else ""


def near_built_in(text: str) -> str:
    """The end of an error message that suggests the built-in name that is nearest; empty if none is near."""
    return "" if "/" in text else did_you_mean(text, (*BM25_NAMES, *BACKBONES, PYTHON_DOCS, NANO_BEIR), cutoff=0.75)


def held(name: str | Path) -> str | None:
    """The kind of thing that a path or a name stands for, with its article; None if unknown here, as for hub ids."""
    text = str(name)
    if text in BACKBONES:
        return MODEL
    if text in BM25_NAMES:
        return "a ranking by words"
    if text == PYTHON_DOCS or text.lower() == NANO_BEIR:
        return COLLECTION
    path = user_path(text)
    if path.is_dir():
        return _held_in(path)
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return COLLECTION
        return CORPUS_FILE if plain_name(path).endswith(TABLE_FORMATS) else "a run file" if _is_run(path) else None
    return COLLECTION if any(ir_dataset(id_) is not None for id_ in (text, f"{text}/test")) else None


def _held_in(folder: Path) -> str | None:
    if find_file(folder, CORPUS_FILES) is not None:
        return COLLECTION
    if (folder / "index.json").is_file():
        return INDEX
    if has_checkpoint(folder):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no such file, or a damaged one
            about = json.loads((folder / "config_sentence_transformers.json").read_bytes())
            return "a dense model" if about.get("model_type", "SentenceTransformer") == "SentenceTransformer" else MODEL
        return MODEL
    if has_checkpoint(folder / "model"):
        return "a training run"
    return "the results of an evaluation" if (folder / "evaluation.json").is_file() else None


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder contains a model."""
    return any((folder / name).is_file() for name in ("config.json", "modules.json"))


def _is_run(path: Path) -> bool:
    with contextlib.suppress(DataError, OSError, ValueError), lines(path) as numbered:
        columns = trec_columns(next((line for _, line in numbered if line.strip()), ""))
        _ = [float(column) for column in columns[3:5]]  # rank and score
        return len(columns) == 6
    return False
