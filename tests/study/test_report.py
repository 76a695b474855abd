import re
import shutil
import subprocess
from html.parser import HTMLParser

import html5lib
import pytest

from anysplade.study.arms import Arm
from anysplade.study.report import write_report

METRICS = ("nDCG@10", "RR@10", "R@100")
HOSTILE = "<script>alert(1)</script>"


def row(backbone, arm, value, axis=None):
    found = dict.fromkeys((*METRICS, "query_active_dims", "document_active_dims", "flops"), value)
    start = {"mean_row_norm": 1 + value}
    return {
        "backbone": backbone,
        "key": {"raw": Arm.RAW, "auto": Arm.AUTO}.get(arm, Arm.LEVEL if "level" in (axis or {}) else Arm.FIXED),
        "arm": arm,
        "axis": axis or {},
        "cells": [f"{backbone}{arm}{axis}".encode().hex()[-12:]],
        "runs": 1,
        "k": 1.0,
        "shift": 0.0,
        "findings": ["dead vocabulary"],
        "before": start,
        "after": start,
        "results": {"docs": found | {f"{name} sd": 0.01 for name in found}},
    }


def study():
    made = {
        "commit": "c" * 40,
        "versions": {"torch": "2"},
        "hardware": {"machine": "x86_64", "cpus": 2, "gpus": []},
        "command": "anysplade",
    }
    settings = {"backbones": ["a"], "collections": ["docs"], "data": "pairs", "seeds": 1, "training": {"steps": 2}}
    rows = [row("a", "raw", 0.1), row("a", "k=8", 0.2), row("a", "auto", 0.3), row(HOSTILE, "raw", 0.2)]
    line = [row("a", f"k={k}", k / 10, {"k": float(k)}) for k in (1, 2, 4)]
    grid = [row("a", f"k={k}, {level}", k / 10, {"k": float(k), "level": level}) for k in (1, 2) for level in (0.1, 0.01)]
    names = ("loss", "document_active_dims", "gradient_norm", "score_std")
    curves = [
        {"backbone": "a", "key": arm, "arm": arm, "curves": {name: [[[0, 2.0], [1, 1.0]]] for name in names}}
        for arm in ("raw", "auto")
    ]
    test = {
        "backbone": "a",
        "collection": "docs",
        "against": "raw",
        "difference": 0.1,
        "noise": 0.02,
        "p_corrected": 0.01,
        "flops": 1.0,
        "flops of the other": 2.0,
    }
    every = {
        "norm": {"rows": rows},
        "tradeoff": {"rows": [row("a", arm, w / 9, {"weight": w}) for arm in ("raw", "auto") for w in (1, 2)]},
        "dynamics": {"rows": rows, "curves": curves},
        "sensitivity": {"rows": [*line, *grid, row("a", "auto", 0.3)]},
        "controls": {"rows": rows},
        "main": {"rows": rows, "tests": [test]},
    }
    studies = {
        name: {"settings": settings, "provenance": made, "conclusions": [f"a & b <{name}>"], **part} for name, part in every.items()
    }
    cells = {
        hash_: {
            "seed": 0,
            "results": {"docs": {"nDCG@10": 0.1}},
            "k": 1.0,
            "shift": 0.0,
            "seconds": 3.0,
            "commands": ["anysplade train"],
        }
        | made
        for part in every.values()
        for one in part["rows"]
        for hash_ in one["cells"]
    }
    return {
        "studies": studies,
        "cells": cells,
        "bm25": {"docs": dict.fromkeys(METRICS, 0.5)},
        "failed": {},
        "report": "report.html",
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(study(), folder)
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


def test_the_same_again(out, tmp_path):
    write_report(study(), tmp_path)
    for path in out.rglob("*.*"):
        assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium, of Debian's package")
def test_opens_in_a_browser_without_a_word(out):
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=400,800", "--dump-dom"]
    shown = subprocess.run(
        ["chromium", *arguments, f"file://{out}/report.html"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "What the numbers say" in shown.stdout
    assert "CONSOLE" not in shown.stderr


def test_rows_that_failed_leave_holes(tmp_path):
    """A map without one of its cells, a backbone without its line, the first backbone without a row of the legend."""
    content = study()
    rows = content["studies"]["sensitivity"]["rows"]
    content["studies"]["sensitivity"]["rows"] = [row for row in rows if row["axis"] not in ({"k": 1.0, "level": 0.1}, {"k": 2.0})]
    content["studies"]["main"]["rows"] = [row for row in content["studies"]["main"]["rows"] if row["key"] != Arm.RAW]
    content["studies"]["dynamics"]["curves"].pop()
    write_report(content, tmp_path)
    assert (tmp_path / "report.html").exists()
