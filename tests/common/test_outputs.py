import json
from dataclasses import dataclass

import pytest

from anysplade import OutputError
from anysplade._common.outputs import damaged_file, digests, earlier_call, is_whole, read_record, require_unused, restored


def test_damage(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/b", "c", "README.md"):
        (tmp_path / name).write_text(name)
    known = digests(tmp_path, without=["README.md"])
    assert list(known) == ["a/b", "c"]
    (tmp_path / "README.md").unlink()
    assert damaged_file(tmp_path, known) is None
    (tmp_path / "a" / "b").write_text("B")
    assert damaged_file(tmp_path, known) == "a/b"
    (tmp_path / "a" / "b").unlink()
    assert damaged_file(tmp_path, known) == "a/b"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff\xfe", b'{"b": 1}', b"null"])
def test_a_damaged_record_is_said_and_not_used(content, tmp_path, caplog):
    assert read_record(tmp_path / "record.json", "a") is None
    assert not caplog.text
    (tmp_path / "record.json").write_bytes(content)
    assert read_record(tmp_path / "record.json", "a") is None
    assert "record.json: is damaged and not used" in caplog.text
    (tmp_path / "record.json").write_text('{"a": 1}')
    assert read_record(tmp_path / "record.json", "a") == {"a": 1}


def test_a_folder_with_other_content_is_refused(tmp_path):
    require_unused(tmp_path / "new", "lock")
    (tmp_path / "lock").touch()
    require_unused(tmp_path, "lock", "data")
    with pytest.raises(OutputError, match="not empty"):
        require_unused(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not empty"):
        require_unused(tmp_path, "lock", "data")
    with pytest.raises(OutputError, match="is a file"):
        require_unused(tmp_path / "thesis.tex", "lock")


def test_an_earlier_call_with_other_options_is_refused(tmp_path, caplog):
    record, about = tmp_path / "about.json", {"options": {"seed": 0, "name": "a"}, "depth": 7, "hash": "x"}
    assert earlier_call(record, about) is None
    record.write_text(json.dumps(about | {"more": 1}))
    assert earlier_call(record, about, {"hash": "text"}) == about | {"more": 1}
    with pytest.raises(OutputError, match=r"other options \(seed 0, now 1; name 'a', now 'b'; depth 7, now None\); choose another"):
        earlier_call(record, {"options": {"seed": 1, "name": "b"}, "depth": None, "hash": "y"}, {"hash": "text"})
    with pytest.raises(OutputError, match="another text, or by another version; choose another"):
        earlier_call(record, about | {"hash": "y"}, {"hash": "text"})
    with pytest.raises(OutputError, match="new None, now 3"):
        earlier_call(record, about | {"new": 3})
    record.write_text("{")
    assert earlier_call(record, about) is None
    assert "about.json: is damaged" in caplog.text


def test_a_damaged_folder_is_named(tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    known = digests(tmp_path / "folder")
    assert is_whole(tmp_path / "folder", known)
    assert not caplog.text
    (tmp_path / "folder" / "a").write_text("b")
    assert not is_whole(tmp_path / "folder", known)
    assert "folder/a: is missing or damaged; it is made again" in caplog.text
    assert not is_whole(tmp_path / "gone", {})
    assert "gone: is missing or damaged" in caplog.text


def test_a_result_is_restored_without_the_other_entries():
    @dataclass
    class Result:
        steps: int
        length: int | None = None

    assert restored(Result, {"steps": 3, "files": {}}) == Result(3)
    assert restored(Result, {"steps": 3, "length": 5}) == Result(3, 5)
