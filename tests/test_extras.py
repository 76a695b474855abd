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


# Runs one command per line of its standard input, and answers with its exit code and what it wrote to standard error.
LOOP = f"""
import json, os, sys, tempfile
sys.modules.update(dict.fromkeys({[module for modules in MODULES.values() for module in modules]!r}))
from anysplade.cli import main
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as errors:
        os.dup2(errors.fileno(), 2)
        code = main(json.loads(line))
        sys.stderr.flush()
        errors.seek(0)
        print(json.dumps([code, errors.read()]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def run_core():
    """The command line in a process where no library of an extra can be imported: exit code and standard error."""
    with subprocess.Popen([sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(*arguments):
            process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def test_every_extra_is_in_all():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.search(r"\[(.*)\]", everything)[1].split(","))
    assert named == extras.keys() - {"all", "dev", "docs"}


def test_inspecting_rescaling_training_and_mining_by_a_model_need_no_extra(run_core, backbone, tmp_path):
    rows = [json.dumps({"query": a, "positive": f"{a} {b}"}) for a, b in pairwise(WORDS)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    for arguments in (
        ["inspect", backbone],
        ["rescale", backbone, "--out", tmp_path / "rescaled", "--k", "auto", "--shift", "auto"],
        ["train", backbone, tmp_path / "pairs.jsonl", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 4],
    ):
        code, errors = run_core(*arguments)
        assert code == 0, errors
    assert (tmp_path / "run" / "model" / "modules.json").is_file()
    code, errors = run_core(
        "mine", tmp_path / "pairs.jsonl", "--miner", tmp_path / "run", "--out", tmp_path / "mined.jsonl", "--margin", 0
    )
    assert code == 0, errors


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
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    run_core, arguments, extra, backbone, collection_folder, tmp_path
):
    code, errors = run_core(*arguments.format(model=backbone, data=collection_folder, tmp=tmp_path).split())
    assert code == 2, errors
    assert re.fullmatch(rf'anysplade: \w+ is not installed: pip install "anysplade\[{extra}\]"\n', errors)
    assert not any((tmp_path / name).exists() for name in ("run", "index", "study"))
