"""The check for a machine with a GPU runs to its end, with sizes for a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM


@pytest.mark.filterwarnings("ignore")
def test_the_check_of_a_gpu_measures_every_part(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    # Stock modules make all logits, so the size of the vocabulary decides how long this takes.
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = BertForMaskedLM, BertConfig(vocab_size=2000, pad_token_id=0, **sizes)
    monkeypatch.setitem(importlib.import_module("backbones").GEOMETRIES, "bert-tiny", small)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    importlib.import_module("gpu").main()
    result = json.loads(out.read_text())
    for part in ("correctness", "head", "step", "encoding"):
        assert result[part], part
    exact = {name: errors for name, errors in result["correctness"].items() if "float32" in name}
    assert exact
    assert all(max(errors[:-1]) < 1e-4 and errors[-1] for errors in exact.values())
    assert "encoding, bert-tiny" in capsys.readouterr().err
