"""The core works without any extra, and a missing extra is one line."""

import json
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from tiny import WORDS

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
# What the extras bring and the core does not, by the names that are imported.
MODULES = {
    "evaluation": ["bm25s", "ir_datasets", "ir_measures", "matplotlib", "Stemmer"],
    "search": ["qdrant_edge"],
    "serve": ["fastapi", "prometheus_client", "starlette", "uvicorn"],
    "qdrant": ["qdrant_client"],
    "opensearch": ["opensearchpy"],
    "openvino": ["openvino", "nncf"],
    "ray": ["ray"],
}


def run_core(*arguments):
    """The command line in a process where no library of an extra can be imported."""
    missing = [module for modules in MODULES.values() for module in modules]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); from anysplade.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_every_extra_is_in_all():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.search(r"\[(.*)\]", everything)[1].split(","))
    assert named == extras.keys() - {"all", "dev", "docs"}


def test_inspecting_rescaling_training_and_mining_by_a_model_need_no_extra(backbone, tmp_path):
    rows = [json.dumps({"query": a, "positive": f"{a} {b}"}) for a, b in pairwise(WORDS)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    for arguments in (
        ["inspect", backbone],
        ["rescale", backbone, "--out", tmp_path / "rescaled", "--k", "auto", "--shift", "auto"],
        ["train", backbone, tmp_path / "pairs.jsonl", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 4],
    ):
        done = run_core(*arguments)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "modules.json").is_file()
    done = run_core("mine", tmp_path / "pairs.jsonl", "--miner", tmp_path / "run", "--out", tmp_path / "mined.jsonl", "--margin", 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, extra",
    [
        ("inspect {model} --svg {tmp}/head.svg", "evaluation"),
        ("evaluate {model} {data}", "evaluation"),
        ("mine {data} --out {tmp}/mined.jsonl", "evaluation"),
        ("train {model} {data} --out {tmp}/run --steps 2 --dev {data} --dev-split test", "evaluation"),
        ("index {model} {data} --out {tmp}/index", "search"),
        ("index {model} {data} --to qdrant://localhost/docs", "search"),
        ("index {model} {data} --to opensearch://localhost/docs", "search"),
        ("search {tmp}/index kabel", "search"),
        ("serve {tmp}/index", "serve"),
        ("study norm --out {tmp}/study --backbones {model} --data {data} --collections {data}", "evaluation"),
        ("demo --out {tmp}/demo", "(evaluation|search)"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(arguments, extra, backbone, collection_folder, tmp_path):
    done = run_core(*arguments.format(model=backbone, data=collection_folder, tmp=tmp_path).split())
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf'anysplade: \w+ is not installed: pip install "anysplade\[{extra}\]"\n', done.stderr)
    assert not any((tmp_path / name).exists() for name in ("run", "index", "study"))
