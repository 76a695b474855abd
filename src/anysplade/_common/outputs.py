"""Records of outputs: what an earlier call made, whether it is undamaged, and whether this call may use it."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from anysplade._common.files import beside, require_empty, write_atomic
from anysplade.errors import OutputError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def digests(folder: Path, without: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of each file in a folder, by relative path; files with a name in ``without`` are left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in without)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_file(folder: Path, known: Mapping[str, str]) -> str | None:
    """The first file that is missing or does not match its digest; None if there is none."""
    files = ((name, folder / name, digest) for name, digest in known.items())
    return next((name for name, path, digest in files if not path.is_file() or file_digest(path) != digest), None)


def read_record(path: Path, *needed: str) -> dict[str, Any] | None:
    """A JSON object with the ``needed`` names; None if there is no such file or, with a warning, if it is damaged."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if isinstance(found, dict) and found.keys() >= set(needed):
        return found
    logger.warning("%s: is damaged and not used", path)
    return None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object that ``read_record`` reads."""
    write_atomic(path, json.dumps(record, indent=2) + "\n")


def record_path(output: Path) -> Path:
    """The path of an output's record: ``OUTPUT.json`` in the same folder."""
    return beside(output, "{}.json")


def finished_record(output: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an output that was made from the data and options in ``about``; None if it must still be made."""
    if not output.exists():
        return None
    before = read_record(record_path(output)) or {}
    if {name: before.get(name) for name in about} != about:
        raise OutputError(
            f"{output}: exists and was not made from the same data and options, or by an older version; choose another `output`"
        )
    if before.get("sha256", digest := file_digest(output)) != digest:
        raise OutputError(f"{output}: was changed after it was written; remove it and run the same again to make it anew")
    return before


def require_unused(output: Path, *unfinished: str) -> None:
    """Raise OutputError unless a folder is new, empty, or has nothing but these files and folders of an unfinished call."""
    if not output.is_dir() or {path.name for path in output.iterdir()} - set(unfinished):
        require_empty(output)


def earlier_call(
    record: Path, asked: Mapping[str, Any], others: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The record of an earlier call, which must have asked for the same; None if there is none or it is damaged.

    Args:
        asked: the options of this call by name, or groups of them, as JSON stores them.
        others: entries of ``asked`` that are no options, and what they are called in a message: ``{"data_hash": "text"}``.
        defaults: what an option that the record lacks had in the version that wrote it, by name.
    """
    found = read_record(record)
    if found is None:
        return None
    others, defaults = others or {}, defaults or {}
    now, before = (_flat({name: values.get(name) for name in asked if name not in others}) for values in (asked, found))
    different = [
        f"{name} {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if before.get(name, defaults.get(name)) != value
    ]
    changed = [called for name, called in others.items() if found.get(name) != asked[name]]
    if different or changed:
        what = f"other options ({'; '.join(different)})" if different else f"another {' and '.join(changed)}, or by another version"
        raise OutputError(f"{record.parent}: was made with {what}; choose another `output` or remove this one")
    return found


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, with the members of each group in its place."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def is_whole(folder: Path, known: Mapping[str, str]) -> bool:
    """Whether a folder has the files of these ``digests``; a warning names the first that is missing or damaged."""
    damaged = damaged_file(folder, known) if folder.is_dir() else ""
    if damaged is not None:
        logger.warning("%s: is missing or damaged; it is made again", folder / damaged)
    return damaged is None


def restored(kind: type[Result], record: Mapping[str, Any]) -> Result:
    """The result, a dataclass, that a record holds among other entries; older records may lack fields that have defaults."""
    return kind(**{field.name: record[field.name] for field in fields(kind) if field.name in record})  # type: ignore[arg-type]
