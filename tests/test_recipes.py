"""Every recipe runs as it stands, on small stand-ins of the data that it names."""

import json
from pathlib import Path

import pytest
import yaml

from anysplade.cli import main
from tiny import WORDS, make_repository

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
N = 24


@pytest.fixture
def stand_ins(tmp_path):
    """By the name that the recipe has: texts, ids, and what mine and score write."""
    texts = [f"{WORDS[i]} {WORDS[i + 1]} {WORDS[i + 2]}" for i in range(2 * N)]
    make_repository(
        tmp_path / "msmarco-bm25",
        {"triplet": {"query": WORDS[:N], "positive": texts[:N], "negative": texts[N:]}},
    )
    ids = [str(i) for i in range(2 * N)]
    make_repository(
        tmp_path / "msmarco",
        {
            "queries": {"query_id": ids[:N], "query": WORDS[:N]},
            "corpus": {"passage_id": ids, "passage": texts},
            "bert-ensemble-margin-mse": {
                "query_id": ids[:N],
                "positive_id": ids[:N],
                "negative_id": ids[N:],
                "score": [4.0 + i / 7 for i in range(N)],
            },
        },
    )
    rows = [
        {"query": WORDS[i], "positive": texts[i], "negatives": texts[i + 1 : i + 9], "scores": [8.0, *(float(j) for j in range(8))]}
        for i in range(N)
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "sentence-transformers/msmarco-bm25:triplet": f"{tmp_path}/msmarco-bm25:triplet",
        "sentence-transformers/msmarco:bert-ensemble-margin-mse": f"{tmp_path}/msmarco:bert-ensemble-margin-mse",
        "scored.jsonl": f"{tmp_path}/scored.jsonl",
        "mined.jsonl": f"{tmp_path}/scored.jsonl",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, backbone, collection_folder, teachers, stand_ins, tmp_path, capsys):
    options = yaml.safe_load(recipe.read_text())
    assert f"anysplade train --config recipes/{recipe.name}" in recipe.read_text()
    data = stand_ins.get(options["data"], str(collection_folder))
    command = ["train", backbone, data, "--config", str(recipe), "--out", str(tmp_path / "run")]
    command += ["--steps", "2", "--batch-size", "4", "--max-length", "16", "--checkpoint-steps", "2", "--json"]
    if "dev" in options:
        command += ["--dev", str(collection_folder)]
    if "teacher" in options:
        command += ["--teacher", teachers["dense"]]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    for name, value in options.items():
        if f"--{name.replace('_', '-')}" not in command and name not in ("backbone", "data", "output"):
            assert result["config"][name] == value
