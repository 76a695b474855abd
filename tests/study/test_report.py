import re
import shutil
import subprocess
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import html5lib
import pytest

from anysplade.study.arms import Arm, Axis
from anysplade.study.cells import Scores, Start
from anysplade.study.report import write_report
from anysplade.study.results import (
    Baseline,
    CellSummary,
    Curves,
    Means,
    PairedTest,
    RowCurves,
    RowResult,
    Settings,
    Study,
    StudyResult,
    read_results,
)

HOSTILE = "<script>alert(1)</script>"
RESULTS = Path(__file__).parents[2] / "results"


def row(backbone, arm, value, **axis):
    values = {field.name: 1.0 for field in fields(Start)} | {"logit_percentiles": {}, "histogram": {}}
    start = Start(**values | {"mean_row_norm": 1 + value})
    return RowResult(
        backbone=backbone,
        key={"raw": Arm.RAW, "auto": Arm.AUTO}.get(arm, Arm.LEVEL if "level" in axis else Arm.FIXED),
        arm=arm,
        axis=Axis(**axis),
        cells=[f"{backbone}{arm}{axis}".encode().hex()[-12:]],
        runs=1,
        k=1.0,
        shift=0.0,
        temperature=1.0,
        findings=["dead vocabulary"],
        before=start,
        after=start,
        results={"docs": Means(*[value, 0.01] * 6)},
    )


def result():
    machine = {"versions": {"torch": "2"}, "hardware": {"machine": "x86_64", "cpus": 2, "gpus": []}}
    settings = Settings(("a",), "pairs", ("docs",), 1, 8.0, {"steps": 2})
    rows = [row("a", "raw", 0.1), row("a", "k=8", 0.2), row("a", "auto", 0.3), row(HOSTILE, "raw", 0.2)]
    line = [row("a", f"k={k}", k / 10, k=float(k)) for k in (1, 2, 4)]
    grid = [row("a", f"k={k}, {level}", k / 10, k=float(k), level=level) for k in (1, 2) for level in (0.1, 0.01)]
    curves = [RowCurves("a", arm, arm, Curves(*[[[(0, 2.0), (1, 1.0)]]] * 6)) for arm in (Arm.RAW, Arm.AUTO)]
    test = {"backbone": "a", "collection": "docs", "flops": 1.0, "flops_of_other": 2.0}
    parts = {
        "norm": {"rows": rows},
        "tradeoff": {"rows": [row("a", arm, w / 9, weight=w) for arm in ("raw", "auto") for w in (1, 2)]},
        "dynamics": {"rows": rows, "curves": curves},
        "sensitivity": {"rows": [*line, *grid, row("a", "auto", 0.3)]},
        "controls": {"rows": rows},
        "main": {
            "rows": rows,
            "tests": [
                PairedTest(**test, key=Arm.RAW, against="raw", difference=0.1, p=0.01, noise=0.02, p_corrected=0.01),
                PairedTest(**test, key=Arm.FIXED, against="k=8", difference=0.505, p=4e-14, noise=0.58, p_corrected=4e-14),
            ],
        },
    }
    provenance = machine | {"commit": "c" * 40, "command": "anysplade"}
    studies = {
        name: Study(settings=settings, provenance=provenance, conclusions=[f"a & b <{name}>"], **part)
        for name, part in parts.items()
    }
    scores = {"docs": Scores(*[0.1] * 6, 3, 4, "hash")}
    cells = {
        hash_: CellSummary(1.0, 0.0, 1.0, ["anysplade train"], 3.0, None, "hash", 0, scores, [], "c" * 40, **machine)
        for study in studies.values()
        for row in study.rows
        for hash_ in row.cells
    }
    return StudyResult(studies, cells, {"docs": Baseline(0.5, 0.5, 0.5)}, {}, "report.html")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(result(), folder)
    return folder


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.sources, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name == "href":
                self.links.append(value)
            elif name in ("src", "srcset", "action"):
                self.sources.append(value)


def test_valid_self_contained_and_linked(out):
    text = (out / "report.html").read_text()
    html5lib.HTMLParser(strict=True).parse(text)
    seen = Seen()
    seen.feed(text)
    assert len(seen.ids) == len(set(seen.ids))
    assert not seen.sources
    assert "script" not in seen.tags
    assert all(link.startswith("#") or link == "data:," for link in seen.links)
    assert {link[1:] for link in seen.links if link.startswith("#")} <= set(seen.ids)
    assert not re.search(r"url\((?!#)", text)
    assert "&lt;script&gt;" in text


def test_markdown_shows_the_figures(out):
    text = (out / "report.md").read_text()
    named = re.findall(r"\(figures/(.*?)\)", text)
    assert sorted(named) == sorted(path.name for path in (out / "figures").iterdir())
    assert "| 0.100 ± 0.010 |" in text
    assert "| nDCG@10 ± sd | RR@10 ± sd |" in text  # one meaning of ± in a table
    assert "| difference in nDCG@10 ± half of its 95 % interval | p, Holm | counts |" in text
    assert "| a | docs | auto | raw | +0.100 ± 0.020 | 0.01 | yes | 1.00 | 2.00 |" in text
    assert "| a | docs | auto | k=8 | +0.505 ± 0.580 | 4e-14 | no | 1.00 | 2.00 |" in text


def test_the_same_again(out, tmp_path):
    write_report(result(), tmp_path)
    for path in out.rglob("*.*"):
        assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium, of Debian's package")
def test_opens_in_a_browser_without_messages(out):
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=400,800", "--dump-dom"]
    shown = subprocess.run(
        ["chromium", *arguments, f"file://{out}/report.html"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "Conclusions" in shown.stdout
    assert "CONSOLE" not in shown.stderr


def test_rows_that_failed_leave_gaps(tmp_path):
    """A map without one of its cells, a backbone without its line, the first backbone without a row of the legend."""
    content = result()
    studies = content.studies
    kept = [row for row in studies["sensitivity"].rows if row.axis not in (Axis(k=1.0, level=0.1), Axis(k=2.0))]
    studies["sensitivity"] = replace(studies["sensitivity"], rows=kept)
    studies["main"] = replace(studies["main"], rows=[row for row in studies["main"].rows if row.key != Arm.RAW])
    studies["dynamics"].curves.pop()
    write_report(content, tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["study", "study-squad"])
def test_a_committed_result_gives_its_report(name, tmp_path):
    write_report(read_results(RESULTS / name / "study.json"), tmp_path)
    assert (tmp_path / "report.md").read_text() == (RESULTS / name / "report.md").read_text()
    assert sorted(path.name for path in tmp_path.glob("figures/*")) == sorted(
        path.name for path in (RESULTS / name).glob("figures/*")
    )
