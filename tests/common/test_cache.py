import os
import subprocess
import sys

import pytest

from anysplade import OptionError
from anysplade._common.cache import cache_entries, mark_used, parse_size, prune_cache, release, size_limit
from anysplade.cli import main
from anysplade.model import saved

NAMES = [letter * 32 for letter in "abc"]


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A cache with three entries of 1,000 bytes, the first the oldest, and a folder that is not anysplade's."""
    monkeypatch.setenv("ANYSPLADE_CACHE", str(tmp_path))
    for age, (kind, name) in enumerate(zip(("vectors", "teachers", "shards"), NAMES, strict=True)):
        folder = tmp_path / kind / name
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(bytes(1000))
        for path in (folder / "part", folder):
            os.utime(path, (10_000 + age, 10_000 + age))
    (tmp_path / "vectors" / "mine").mkdir()
    yield tmp_path
    release()


def test_the_least_recently_used_goes_first(filled):
    assert [(entry.kind, entry.bytes, entry.last_use) for entry in cache_entries()] == [
        ("vectors", 1000, 10_000),
        ("teachers", 1000, 10_001),
        ("shards", 1000, 10_002),
    ]
    mark_used(filled / "vectors" / NAMES[0])
    release()
    assert [entry.kind for entry in prune_cache(1500)] == ["teachers", "shards"]
    assert [entry.kind for entry in cache_entries()] == ["vectors"]
    assert (filled / "vectors" / "mine").is_dir()


def test_what_another_process_uses_stays(filled):
    used = filled / "vectors" / NAMES[0]
    code = "import sys, pathlib; from anysplade._common.cache import mark_used; mark_used(pathlib.Path(sys.argv[1]));"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); input()", used], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline()
    assert [entry.in_use for entry in cache_entries()].count(True) == 1
    assert len(prune_cache(0)) == 2
    assert (used / "part").is_file()
    holder.communicate(b"\n")  # it ends, and the system releases what it held
    assert [entry.path for entry in prune_cache(0)] == [str(used)]


def test_an_interrupted_removal_leaves_no_half(filled, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("anysplade._common.cache.shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_cache(0)
    assert [entry.kind for entry in cache_entries()] == ["teachers", "shards"]
    assert list(filled.glob("vectors/.removed-*"))
    assert prune_cache(2000) == []
    assert not list(filled.glob("vectors/.removed-*"))


@pytest.mark.parametrize("text, size", [("20GB", 20 * 10**9), ("1.5 GiB", 3 * 2**29), ("7", 7), ("500kb", 500_000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "20 apples", "1e3"])
def test_a_malformed_size_is_an_error(text, monkeypatch):
    with pytest.raises(OptionError, match="is no size; such as 20GB"):
        parse_size(text)
    monkeypatch.setenv("ANYSPLADE_CACHE_LIMIT", text)
    if text:
        with pytest.raises(OptionError, match="ANYSPLADE_CACHE_LIMIT: "):
            size_limit()


def test_the_command_lists_and_removes(filled, capsys, monkeypatch):
    assert main(["cache"]) == 0
    assert "vectors of evaluated collections" in capsys.readouterr().out
    assert main(["cache", "--prune", "2kB"]) == 0
    assert "1 folder removed, 0.0 MB" in capsys.readouterr().out
    assert main(["cache", "--prune", "2kB", "--clear"]) == 2
    assert main(["cache", "--clear"]) == 0
    assert cache_entries() == []
    monkeypatch.setenv("ANYSPLADE_CACHE", str(filled / "none"))
    assert main(["cache", "--clear"]) == 0


def test_the_limit_holds_after_a_command(filled, monkeypatch):
    monkeypatch.setenv("ANYSPLADE_CACHE_LIMIT", "1kB")
    mark_used(filled / "vectors" / NAMES[0])
    assert main(["cache"]) == 0
    assert [entry.kind for entry in cache_entries()] == ["vectors"]


@pytest.mark.parametrize("cache", ["", "a file"])
def test_the_hash_of_a_large_file_is_kept(cache, tmp_path, monkeypatch):
    """And computed again if the file changes; where the cache cannot be written, it is computed each time."""
    model, hashed = tmp_path / "model", []
    model.mkdir()
    weights = model / "model.safetensors"
    if cache:
        (tmp_path / cache).touch()
    monkeypatch.setenv("ANYSPLADE_CACHE", str(tmp_path / (cache or "cache")))
    monkeypatch.setattr(saved, "file_digest", lambda path, real=saved.file_digest: hashed.append(path.name) or real(path))

    def fingerprint(content, time):
        weights.write_bytes(content * 2**20)
        os.utime(weights, (time, time))
        return [saved.fingerprint(str(model)) for _ in range(2)]

    first = fingerprint(b"a", 10_000)
    assert len(hashed) == (2 if cache else 1)
    second = fingerprint(b"b", 10_000)  # the same size and time, as of a copy that keeps times
    assert first[0] == first[1] != second[0] == second[1]
