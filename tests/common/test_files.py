import errno
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from anysplade import OutputError
from anysplade._common import files
from anysplade._common.files import atomic_folder, make_folder, only_process, whole_file, write_atomic
from processes import drop_privileges, room_for, run_python
from tiny import make_tokenizer


def test_a_folder_appears_when_all_is_written(tmp_path):
    with atomic_folder(tmp_path / "out") as work:
        (work / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "out") as work:
            (work / "a").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target, message in ((tmp_path, "not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(OutputError, match=message), atomic_folder(target):
            pass


def test_a_file_is_replaced_whole(tmp_path):
    write_atomic(tmp_path / "new" / "a", "one")
    write_atomic(tmp_path / "new" / "a", "two")
    assert (tmp_path / "new" / "a").read_text() == "two"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_folder_is_not_written_over(tmp_path):
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        write_atomic(tmp_path, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_the_permissions_that_the_system_gives(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(os, "umask")  # it is the whole process's: other threads would make files that everybody may write
            with atomic_folder(tmp_path / "out"):
                pass
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


def test_where_nothing_can_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(OutputError, match=r"cannot be written: .*name another place"), atomic_folder(place):
            pass
        with pytest.raises(OutputError, match=r"cannot be written: .*name another place"):
            write_atomic(place, "text")


@pytest.mark.parametrize(
    "place",
    ["/proc/x", "/proc/x/y", "/sys/x", "/dev/null/x", "long" * 70, "long" * 70 + "/x", "loop/x", "zero\0byte", "\0/x", "nowhere/x"],
)
def test_a_place_where_the_system_makes_nothing(place, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone/too")
    for make in (lambda path: write_atomic(path, "text"), lambda path: atomic_folder(path).__enter__(), make_folder):
        with pytest.raises(
            OutputError, match=f"^{re.escape(str(tmp_path / place))}: cannot be written: .+; name another place, or "
        ):
            make(tmp_path / place)


def test_no_room_for_a_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    with pytest.raises(OutputError, match="out: cannot be written: Disk quota exceeded; make room, or name another place"):
        make_folder(tmp_path / "out")


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for device in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OutputError, match="is a device or a pipe; name a file"):
            write_atomic(device, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line(tmp_path):
    def fill():
        with whole_file(tmp_path / "file"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="file: cannot be written: No space left on device; make room"):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_one_process_alone(tmp_path):
    refused = pytest.raises(OutputError, match="run: another process works there now")
    with only_process(tmp_path / "run"), refused, only_process(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # nothing was written to it
    with only_process(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_killed_process_keeps_nothing(tmp_path):
    code = "import os, sys; from pathlib import Path; from anysplade._common.files import only_process as only\n"
    killed = run_python("-c", f"{code}with only(Path(sys.argv[1])): os.kill(os.getpid(), 9)", tmp_path)
    assert (killed.returncode, [path.name for path in tmp_path.iterdir()]) == (-9, ["lock"])
    with only_process(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_where_nobody_may_write_there_is_nothing_to_keep(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o555)
    code = "import sys; from pathlib import Path; from anysplade._common.files import only_process as only\n"
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        done = run_python("-c", f"{code}with only(Path(sys.argv[1])): pass", folder, preexec_fn=drop_privileges)
        assert (done.returncode, done.stderr) == (0, "")


WAYS = {
    "safetensors": lambda folder: save_file({"weight": torch.zeros(9000)}, folder / "file"),
    "torch": lambda folder: torch.save({str(i): torch.zeros(9000) for i in range(9)}, folder / "file"),
    "torch, one tensor": lambda folder: torch.save(torch.zeros(9000), folder / "file"),
    "tokenizers": lambda folder: make_tokenizer().save_pretrained(folder),
    "text": lambda folder: (folder / "file").write_text("x" * 9000),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_library_finds_no_room_says_so_in_one_line(way, tmp_path):
    def fill():
        with atomic_folder(tmp_path / "out") as folder:
            WAYS[way](folder)

    with pytest.raises(OutputError, match=r"out: cannot be written: .*; make room, or name another place$"), room_for(1000):
        fill()
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_read_is_not_what_cannot_be_written(tmp_path):
    (tmp_path / "corpus").touch()
    with pytest.raises(PermissionError), whole_file(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "corpus"))


def test_a_path_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.user_path("~/x") == tmp_path / "home" / "x"
    assert str(files.user_path("~nosuchuser9/x")) == "~nosuchuser9/x"
    (tmp_path / "~x.jsonl").touch()
    assert files.user_path("~x.jsonl").is_file()
    assert files.user_path(".").name == tmp_path.name


@pytest.mark.parametrize("target", [".", "/", ""])
def test_a_file_needs_a_name(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        files.write_atomic(target, "x")


def test_an_error_of_something_else_stays_what_it_is(tmp_path):
    for error in (TimeoutError("timed out"), ConnectionResetError(104, "reset"), FileNotFoundError(2, "gone", "/elsewhere/x")):
        with pytest.raises(type(error)), files.writing(tmp_path / "out"):
            raise error


def test_nothing_lies_beside_the_root():
    with pytest.raises(OutputError, match="/: is the root of a file system; name a file or folder in it"):
        files.beside(files.user_path("/"), "{}.parts")
