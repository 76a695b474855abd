"""Read the files of a model's folder or hub id, without the libraries that run models: they take seconds to import."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from anysplade._common.arguments import near
from anysplade._common.files import beside, cache_folder, user_path
from anysplade._common.outputs import file_digest, read_record, write_record
from anysplade.data.external import hub_advice
from anysplade.data.names import BM25_NAMES, INDEX, has_checkpoint, held, is_built_in, misnamed, near_built_in
from anysplade.errors import ModelError, OutputError
from anysplade.model.backbones import BUNDLED

EXPORTED = "anysplade.json"  # describes a model that was exported to ONNX, which has no weights for torch
_LARGE = 2**20  # bytes; to hash smaller files takes no longer than to look up their hash
_SETTLED = 2.0  # seconds since a file was changed after which another change shows in its time
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model")


def resolve_model(name: str | Path) -> str:
    """A checkpoint folder or a hub id for ``from_pretrained``; raises ModelError if there is no such model.

    The names of bundled backbones become their folders.
    """
    if not isinstance(name, str | Path):
        kind = type(name).__name__
        raise ModelError(f"a {kind}, not a model's folder or hub id; save the model with save_pretrained, and name the folder")
    text = str(name).strip()
    if is_built_in(text, *BUNDLED):
        return str(BUNDLED[text])
    fix = "give a checkpoint's folder or a hub id like org/name"
    built_in = f"; built in are {', '.join((*BM25_NAMES, *BUNDLED))}"
    if not text:
        raise ModelError(f"an empty name: no such model folder; {fix}{built_in}")
    path = user_path(text)
    if (path / EXPORTED).is_file():
        raise ModelError(f"{path}: an exported model, which only searches; give the model that it was exported from")
    for folder in (path, path / "model"):  # the output of `train` has the model in model/
        if has_checkpoint(folder):
            return str(folder)
    if (kind := held(text)) is not None:
        own = (read_record(path / "index.json") or {}).get("model") if kind == INDEX else None
        raise ModelError(f"{text}: {kind}, not a model; {f'give its model, {own}' if own else fix}")
    if work := _unfinished(path):
        raise ModelError(f"{text}: has no model yet: its {work} is unfinished; the same command continues it")
    if path.is_dir():
        raise ModelError(f"{path}: no config.json in it, so it is no checkpoint; name the folder that holds one")
    hint = near_built_in(text) or near(text) or ("" if "/" in text else built_in)
    if path.exists() or text.count("/") > 1 or misnamed(text):
        raise ModelError(f"{text}: no such model folder; {fix}{hint}")
    _require_on_hub(text, hint)
    return text


def _unfinished(folder: Path) -> str:
    """The work that was interrupted before it wrote a model to this folder; empty if none was."""
    works = {"run.json": "training", "data/examples": "training", "options.json": "adaptation", "call.json": "distillation"}
    found = (work for name, work in works.items() if (folder / name).exists())
    parts = beside(folder, "{}.parts") if folder.name else folder
    return next(found, "training of a head" if (parts / "about.json").is_file() and not folder.exists() else "")


def _require_on_hub(name: str, hint: str) -> None:
    """Ask the hub once, because from_pretrained would retry for half a minute; ``hint`` names a similar model for the message."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # errors of the HTTP client, the hub and the validation have no common base
        reason = first_line(error).rstrip(".")
        raise ModelError(f"{name}: no such folder here, and not found on the hub: {reason}{hub_advice(error)}{hint}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def saved_file(source: str, name: str) -> Path | None:
    """A file by its path inside a model, downloaded if the source is a hub id; None if there is no such file."""
    path = Path(source, name)
    if path.is_file():
        return path
    if Path(source).is_dir():
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError):
        return None


def saved_json(source: str, name: str) -> Any:
    """The content of a JSON file of a model; None if there is no such file."""
    path = saved_file(source, name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def saved_kind(source: str) -> str | None:
    """The class of sentence-transformers that saved a model, such as "SparseEncoder"; None if none of them did."""
    if saved_file(source, "modules.json") is None:
        return None
    about = saved_json(source, "config_sentence_transformers.json") or {}
    return str(about.get("model_type", "SentenceTransformer"))


def fingerprint(source: str) -> str | None:
    """Hash of a folder's weights, configuration and tokenizer, or the commit of a model on the hub; None if neither is known."""
    folder = Path(source)
    if not folder.is_dir():
        found = saved_file(source, "modules.json") or saved_file(source, "config.json")
        return None if found is None else found.parent.name
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.suffix in _MODEL_FILES and path.is_file())
    for path in sorted(files):
        digest.update(str(path.relative_to(folder)).encode() + bytes.fromhex(_known_digest(path)))
    return digest.hexdigest()


def _known_digest(path: Path) -> str:
    """SHA-256 of a file, kept in the cache with what changes when the file does; without a cache, it is computed each time."""
    before = path.stat()
    if before.st_size < _LARGE:
        return file_digest(path)
    try:
        kept = cache_folder() / "fingerprints" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
        known = json.loads(kept.read_bytes())
        if known["state"] == _state(before):
            return str(known["sha256"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # it is not there, cannot be read, or is damaged
        pass
    digest = file_digest(path)
    state = _state(path.stat())
    if state == _state(before) and time.time() - before.st_mtime > _SETTLED:
        with contextlib.suppress(OSError, OutputError, RuntimeError):
            write_record(kept, {"path": str(path.resolve()), "state": state, "sha256": digest})
    return digest


def _state(status: os.stat_result) -> list[int]:
    """What tells that a file is the same as before, without reading it; the last is the time of a rename or copy over it."""
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
