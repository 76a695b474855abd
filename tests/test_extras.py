"""A missing extra is one line, training needs only ``train``, and searching with an exported model needs no torch."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from anysplade import Index, ModelError, OptionError, export_onnx, load_encoder
from anysplade.serving.batching import Searcher
from processes import run_python
from tiny import WORDS, no_encoder

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
# What the extras bring beside ``train``, by the names that are imported.
MODULES = {
    "evaluation": ["bm25s", "ir_datasets", "ir_measures", "matplotlib", "Stemmer"],
    "search": ["bm25s", "onnxruntime", "qdrant_edge", "Stemmer"],
    "serve": ["fastapi", "prometheus_client", "starlette", "uvicorn"],
    "qdrant": ["qdrant_client"],
    "opensearch": ["opensearchpy"],
    "onnx": ["onnx", "onnxscript"],
    "openvino": ["openvino", "nncf"],
    "ray": ["ray"],
}


TRAIN = ["accelerate", "datasets", "pandas", "sentence_transformers", "sklearn", "torch", "transformers"]
WITHOUT_TRAIN = f"""
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name in {TRAIN!r}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Missing)
from anysplade.cli import run
run()
"""

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
    assert named == extras.keys() - {"all", "dev", "docs", "train"}


def test_inspecting_rescaling_training_and_mining_by_a_model_need_no_other_extra(run_core, backbone, tmp_path):
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
        ("mine {data} --out {tmp}/mined.jsonl", "search"),
        ("train {model} {data} --out {tmp}/run --steps 2 --dev {data} --dev-split test", "evaluation"),
        ("index {model} {data} --out {tmp}/index", "search"),
        ("index {model} {data} --to qdrant://localhost/docs", "search"),
        ("index {model} {data} --to opensearch://localhost/docs", "search"),
        ("search {tmp}/index kabel", "search"),
        ("serve {tmp}/index", "serve"),
        ("export {model} --to onnx --out {tmp}/onnx", "onnx"),
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


def test_without_torch_an_exported_model_searches_and_the_rest_is_one_line(backbone, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"_id": word, "text": f"{word} {WORDS[0]}"}) + "\n" for word in WORDS[:9])
    )
    model = tmp_path / "model"
    load_encoder(backbone, k=2, shift=0).save_pretrained(str(model))
    with Index.build(model, tmp_path / "docs.jsonl", tmp_path / "index") as index:
        expected = index.search(WORDS[3], k=5)
    export_onnx(model, tmp_path / "onnx", "vector")

    def run(*arguments):
        return run_python("-c", WITHOUT_TRAIN, *arguments)

    found = run("search", tmp_path / "index", WORDS[3], "--model", tmp_path / "onnx", "--k", 5, "--json")
    assert found.returncode == 0, found.stderr
    hits = json.loads(found.stdout)["hits"]
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-4)
    for arguments, extra, more in (
        (["search", tmp_path / "index", "kabel"], "train", ", or give its model, exported to ONNX, as --model"),
        (["train", backbone, tmp_path / "docs.jsonl", "--out", tmp_path / "run"], "train", ""),
        (["export", model, "--to", "onnx", "--out", tmp_path / "out"], "onnx", ""),
    ):
        refused = run(*arguments)
        assert refused.returncode == 2
        line = rf'anysplade: .*is not installed: pip install "anysplade\[{extra}\]"{more}\n'
        assert re.fullmatch(line, refused.stderr), refused.stderr
    openvino = Index.load(tmp_path / "index", tmp_path / "onnx", runtime="openvino")
    with openvino as index, pytest.raises(OptionError, match="runtime is openvino"):
        index.search("kabel")
    shutil.copytree(tmp_path / "index", tmp_path / "other")
    with no_encoder():
        searcher = Searcher(tmp_path / "index", str(tmp_path / "other"), tmp_path / "onnx")
        assert [hit.id for hit in searcher.other.search(WORDS[3], k=5)] == [hit.id for hit in expected]


def test_an_exported_model_must_be_the_one_of_the_index(backbone, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "docs.jsonl").write_text(json.dumps({"_id": "a", "text": "kabel"}) + "\n")
    export_onnx(backbone, tmp_path / "onnx")
    load_encoder(backbone, k=2, shift=0).save_pretrained(str(tmp_path / "model"))
    with Index.build(tmp_path / "model", tmp_path / "docs.jsonl", tmp_path / "index"):
        pass
    with Index.load(tmp_path / "index", tmp_path / "onnx") as index, pytest.raises(ModelError, match="another model"):
        index.search("kabel")
