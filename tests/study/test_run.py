import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from types import SimpleNamespace

import pytest

from anysplade.cli import main
from anysplade.data.collections import load_collection
from anysplade.errors import ModelError, OutputError
from anysplade.model.queries import Cut, log_cut
from anysplade.study.cells import read_cell
from anysplade.study.pipeline import run_study
from anysplade.study.plan import PAPER, Cell, StudyConfig
from anysplade.study.run import run_cells
from anysplade.study.timing import estimate
from tiny import make_backbone, make_collection
from vocabularies import byte_level, make_cased

TRAINING = {"steps": 2, "batch_size": 4, "max_length": 16, "learning_rate": 1e-3}


class Here(Executor):
    """Runs cells in this process, where the libraries are loaded."""

    def __init__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module", autouse=True)
def small_studies():
    """Fewer rows, and one process; test_a_cell_that_fails_is_reported_and_the_others_run has the processes that users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anysplade.study.plan.LEVELS", (0.01,))
        patch.setattr("anysplade.study.plan.WEIGHTS", (1, 100))
        patch.setattr("anysplade.study.run.ProcessPoolExecutor", Here)
        yield


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr("anysplade.study.run.ProcessPoolExecutor", ProcessPoolExecutor)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    make_backbone("bert", folder / "small-bert")
    make_collection(folder / "collection")
    (folder / "training.yaml").write_text("\n".join(f"{name}: {value}" for name, value in TRAINING.items()))
    return folder


def arguments(place, name, out="out"):
    given = ["study", name, "--out", str(place / out), "--backbones", str(place / "small-bert")]
    given += ["--data", str(place / "collection"), "--collections", str(place / "collection")]
    return [*given, "--training", str(place / "training.yaml"), "--seeds", "1", "--workers", "2"]


@pytest.fixture(scope="module")
def written(place):
    """The study.json of all six studies, run by the command."""
    assert main(arguments(place, "all")) == 0
    return json.loads((place / "out" / "study.json").read_text())


def test_all_six(written, place):
    assert list(written["studies"]) == list(PAPER)
    assert not written["unstemmed"]
    assert not written["failed"]
    for study in written["studies"].values():
        assert study["rows"]
        assert study["conclusions"]
        for row in study["rows"]:
            assert all(cell in written["cells"] for cell in row["cells"])
            assert row["results"][str(place / "collection")]["flops"] >= 0
    for cell in written["cells"].values():
        assert cell["commands"]
        assert cell["versions"]["torch"]
        assert "per_query" not in cell["results"][str(place / "collection")]
    arms = {row["arm"]: row for row in written["studies"]["controls"]["rows"]}
    same = [arms[name]["after"]["start_loss"] for name in ("k=8", "1/8 folded into the LayerNorm, tied", "runtime scalar 1/8")]
    assert same == pytest.approx([same[0]] * 3, rel=1e-4)  # one function at the start
    assert arms["W/8, LayerNorm x8"]["after"]["start_loss"] == pytest.approx(arms["raw"]["after"]["start_loss"], rel=1e-4)
    assert arms["W/8, LayerNorm x8"]["after"]["mean_row_norm"] == pytest.approx(arms["raw"]["after"]["mean_row_norm"] / 8, rel=1e-4)


def test_a_plan_trains_nothing_and_tells_what_is_done(written, place, capsys):
    assert main([*arguments(place, "main", "new"), "--plan", "--json"]) == 0
    new = json.loads(capsys.readouterr().out)
    assert not (place / "new").exists()
    assert [row["head"] for row in new["rows"]] == ["raw", "k=4", "k=8", "k=16", "auto"]
    assert (new["cells"], new["done"], new["workers"], new["seconds"]) == (5, 0, 2, None)
    before = sorted(path for path in (place / "out").rglob("*"))
    given = arguments(place, "all")
    given[given.index("--seeds") + 1] = "2"
    assert main([*given, "--plan", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more["done"] == len(written["cells"]) < more["cells"]
    assert all(row["done"] == 1 <= row["seeds"] for row in more["rows"])
    assert more["seconds"] > 0
    assert sorted(path for path in (place / "out").rglob("*")) == before
    assert main([*arguments(place, "main"), "--plan"]) == 0
    assert "5 trainings, 5 of them done; 0 to run" in capsys.readouterr().out
    given[given.index("--collections") + 1] = str(place / "nowhere")
    assert main([*given, "--plan"]) == 2


@pytest.mark.slow  # its rows and cells are tested one by one
def test_folding(place, capsys):
    cased = make_cased("modernbert", place / "cased", byte_level())
    given = arguments(place, "folding", "folding")
    given.insert(given.index(str(place / "small-bert")), cased)
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(row["backbone"], row["arm"]) for row in found["studies"]["folding"]["rows"]]
    arms = ["auto", "by case and stem", "by case, punctuation muted"]
    assert rows == [("cased", arm) for arm in ("auto", "by case", *arms[1:])] + [("small-bert", arm) for arm in arms]
    (collection,) = found["bm25"]
    assert found["unstemmed"].keys() == {collection}
    assert len(found["studies"]["folding"]["tests"]) == 5
    assert "BM25 without stemming" in (place / "folding" / "report.html").read_text()


def test_a_rerun_does_only_what_is_missing(written, place, capsys):
    cells = sorted((place / "out" / "cells").iterdir())
    times = {path: path.stat().st_mtime_ns for path in cells}
    lost = cells[3]
    lost.unlink()
    assert main([*arguments(place, "all"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    changed = [path for path in cells if path.stat().st_mtime_ns != times[path]]
    assert changed == [lost]
    for name, study in written["studies"].items():
        assert again["studies"][name]["conclusions"] == study["conclusions"]
        assert [row["results"] for row in again["studies"][name]["rows"]] == [row["results"] for row in study["rows"]]


@pytest.mark.slow  # a minute: training itself is killed and resumed in test_training
def test_killed_and_called_again(place, written):
    """The parent dies; the cells that are done are kept, and the numbers are those of an undisturbed study."""
    code = "import sys; from anysplade.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments(place, "norm", "killed")], start_new_session=True)
    cells = place / "killed" / "cells"
    while not (cells.is_dir() and any(cells.glob("*.json"))):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert main(arguments(place, "norm", "killed")) == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there
    rows = json.loads((place / "killed" / "study.json").read_text())["studies"]["norm"]["rows"]
    assert [row["results"] for row in rows] == [row["results"] for row in written["studies"]["norm"]["rows"]]


def test_studies_of_a_folder_are_kept_together(place, written):
    shutil.copytree(place / "out", place / "beside")
    (place / "beside" / "study.json").unlink()
    for name in ("norm", "dynamics"):
        assert main(arguments(place, name, "beside")) == 0
    kept = json.loads((place / "beside" / "study.json").read_text())
    assert list(kept["studies"]) == ["norm", "dynamics"]


def test_a_cell_that_fails_is_reported_and_the_others_run(place, tmp_path, processes):
    broken = make_backbone("modernbert", tmp_path / "no-bias", decoder_bias=False)  # a level cannot be shifted there
    options = TRAINING | {"shift": 0.0, "seed": 0}
    lost = Cell(broken, str(place / "collection"), options | {"k": 1.0}, level=0.01)
    fine = Cell(broken, str(place / "collection"), options | {"k": 2.0})
    records, failed = run_cells([lost, fine], (str(place / "collection"),), tmp_path, 2)
    assert list(records) == [fine.hash]
    assert list(failed) == [lost.hash]
    assert "no bias" in failed[lost.hash]
    assert read_cell(tmp_path, fine, (str(place / "collection"),))


def test_a_failed_arm_is_named(place, tmp_path):
    broken = make_backbone("modernbert", tmp_path / "no-bias", decoder_bias=False)  # a level cannot be shifted there
    given = arguments(place, "sensitivity", "failed")
    given[given.index("--backbones") + 1] = broken
    assert main(given) == 0
    study = json.loads((place / "failed" / "study.json").read_text())
    conclusions = study["studies"]["sensitivity"]["conclusions"]
    for line, k in zip(conclusions, (1, 2, 4, 8), strict=False):
        assert line.startswith(f"no-bias, k={k}, level 1.00%: 1 of 1 trainings failed (")
        assert "no bias" in line
    assert "k alone is best" in conclusions[4]
    assert "trainings failed" in (place / "failed" / "report.md").read_text()
    study["studies"]["sensitivity"]["rows"][0].pop("key")
    (place / "failed" / "study.json").write_text(json.dumps(study))
    assert main(given) == 2


def test_mistakes(place, tmp_path, capsys):
    assert main(arguments(place, "everything")) == 2
    assert "is not a study; choose one of norm" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("k: 3\n")
    given = arguments(place, "norm")
    given[given.index("--training") + 1] = str(tmp_path / "bad.yaml")
    assert main(given) == 2
    assert "no option 'k'; the command itself sets it" in capsys.readouterr().err
    given = arguments(place, "norm", out="mistake")
    given[given.index("--data") + 1] = str(tmp_path / "nowhere")
    assert main(given) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (place / "mistake").exists()


def test_a_second_study_in_the_folder_waits(place, written):
    from filelock import FileLock

    with FileLock(place / "out" / "lock"), pytest.raises(OutputError, match="another process works there now"):
        run_study(StudyConfig("norm", output=str(place / "out")))


def test_names_in_the_report_are_short(written, place):
    text = (place / "out" / "report.html").read_text()
    body = re.sub(r"<code>.*?</code>", "", text, flags=re.DOTALL)
    assert "small-bert" in body
    assert str(place) not in body


@pytest.mark.parametrize("fails", [False, True])
def test_a_rehearsal_says_nothing_about_its_own_texts(fails, place, tmp_path, caplog, monkeypatch):
    def rehearsed(*_, **__):
        log_cut(Cut(100, 32, 256), 100, "documents")
        logging.getLogger("anysplade.training.run").warning("4 steps")
        if fails:
            raise ModelError("no such model")
        return SimpleNamespace(seconds={"encoding": 1.0})

    caplog.set_level("INFO", "anysplade")
    levels = [logging.getLogger(name).level for name in ("anysplade.training", "anysplade.model.queries")]
    trained = SimpleNamespace(seconds=1.0, model="", pairs=40, config={"max_length": 32}, max_seq_length=None)
    monkeypatch.setattr("anysplade.study.timing.train", lambda _: trained)
    monkeypatch.setattr("anysplade.study.timing.evaluate", rehearsed)
    folder = str(place / "collection")
    config = StudyConfig("norm", output=str(tmp_path), backbones=("a",), data=folder, collections=(folder,), training=TRAINING)
    try:
        assert estimate([Cell("a", folder, {})], config, tmp_path, {folder: load_collection(folder)}) > 0
        assert not fails
    except ModelError:
        assert fails
    assert caplog.messages == []
    assert [logging.getLogger(name).level for name in ("anysplade.training", "anysplade.model.queries")] == levels
