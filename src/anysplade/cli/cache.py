"""The command that shows and empties the cache."""

from datetime import datetime

from anysplade._common.progress import counted
from anysplade.cli.app import Result, command
from anysplade.cli.rendering import table
from anysplade.errors import OptionError


@command
def cache(*, prune: str | None = None, clear: bool = False) -> Result:
    """List what the cache keeps, the least recently used first, and remove it; all of it is made again when it is needed.

    Args:
        prune: a size such as 20GB: remove the least recently used until the cache is no larger; ANYSPLADE_CACHE_LIMIT=20GB does so
            after every command.
        clear: remove all that no running process uses.
    """
    from anysplade._common.cache import KINDS, cache_entries, parse_size, prune_cache
    from anysplade._common.files import cache_folder

    if prune is not None and clear:
        raise OptionError("`prune` keeps a part and `clear` keeps nothing; leave one out")
    limit = 0 if clear else None if prune is None else parse_size(prune)
    folder = cache_folder()
    removed = [] if limit is None else prune_cache(limit, folder)
    entries = cache_entries(folder)
    size = sum(entry.bytes for entry in entries)
    found = {"folder": str(folder), "bytes": size, "entries": [entry.to_dict() for entry in entries]}
    if limit is not None:
        found["removed"] = [entry.to_dict() for entry in removed]
    rows = [
        [
            KINDS[entry.kind],
            megabytes(entry.bytes),
            datetime.fromtimestamp(entry.last_use).strftime("%Y-%m-%d %H:%M") + (", in use" if entry.in_use else ""),
            entry.path,
        ]
        for entry in entries
    ]
    freed = "" if limit is None else f"; {counted(len(removed), 'folder')} removed, {megabytes(sum(one.bytes for one in removed))}"
    listed = [table(("what", "size", "last use", "where"), rows)] if rows else []
    return Result(found, [*listed, f"{megabytes(size)} in {folder}{freed}"])


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
