"""Data sets of ir_datasets and of the Hugging Face hub, loaded by id."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub.constants import HF_HOME

from anysplade._common.arguments import near
from anysplade._common.files import atomic_folder
from anysplade.errors import DataError


def has_ir_datasets() -> bool:
    """Whether ir_datasets, which comes with the extra "evaluation", is installed."""
    return importlib.util.find_spec("ir_datasets") is not None


@functools.cache
def _ir_datasets() -> tuple[Any, str]:
    """The library, and the reason why its data folder, which it creates when it is imported, cannot be created; empty if it can.

    With a temporary folder its ids are known in any case, and other names can be resolved.
    """
    try:
        home = Path(os.environ.get("IR_DATASETS_HOME", Path.home() / ".ir_datasets"))
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        reason = str(error)
    else:
        import ir_datasets

        return ir_datasets, ""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, HOME=folder, IR_DATASETS_HOME=folder):
        import ir_datasets
    return ir_datasets, reason


def ir_dataset(name: str) -> Any:
    """The ir_datasets dataset with an id; None if there is none or ir_datasets is not installed."""
    if not has_ir_datasets():
        return None
    library, reason = _ir_datasets()
    with contextlib.suppress(KeyError):
        dataset = library.load(name)
        if reason:
            raise DataError(f"{name}: ir_datasets has no data folder ({reason}); set IR_DATASETS_HOME to one that can be written")
        return dataset
    return None


def ir_names() -> list[str]:
    """All ids of ir_datasets; empty if it is not installed."""
    return list(_ir_datasets()[0].registry) if has_ir_datasets() else []


def hub_dataset(name: str, config: str | None, split: str | None = "train", streaming: bool = False) -> Any:
    """A dataset of the hub, or of a folder with the same layout; all splits by name if ``split`` is None."""
    with as_data_error(f"{name}:{config}" if config else name):
        import datasets

        cache = None
        if Path(name).is_dir():
            folder = Path(name).resolve()
            cache = _folder_cache(folder)
            if re.search(r"[*?[]|::", str(folder)):  # the library reads these as a pattern or a chain of file systems
                name = f"{cache}/files"
                if not Path(name).exists():
                    with atomic_folder(name) as links:
                        shutil.copytree(folder, links, copy_function=os.symlink, dirs_exist_ok=True)
        return datasets.load_dataset(name, config, split=split, streaming=streaming, cache_dir=cache)


def _folder_cache(folder: Path) -> str:
    """The cache folder for the rows of a dataset folder, by its path and files.

    The datasets library uses only the folder's last name as the key, so changed files or another folder with that name would
    get the old rows.
    """
    import datasets

    files = [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    key = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files])
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / hashlib.sha256(key.encode()).hexdigest()[:32])


@contextlib.contextmanager
def as_data_error(source: str | Path) -> Iterator[None]:
    """Turn any exception of a library into a one-line DataError that names the source."""
    try:
        yield
    except (DataError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        hint = near(str(source).partition(":")[0], *ir_names())
        raise DataError(f"{source}: cannot be read: {reason}{hub_advice(cause)}{hint}") from error


def hub_advice(error: BaseException) -> str:
    """The fix to append to a hub error's message if the hub's cache folder cannot be written; else empty."""
    path = error.filename if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else None
    return "; set HF_HOME to a folder that can be written" if path and str(path).startswith(HF_HOME) else ""
