"""OpenVINO beside torch: the same vectors, made once."""

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SpladePooling

import anysplade.model.fused as fused
import anysplade.model.runtimes as runtimes
from anysplade import Index, ModelError, OptionError, evaluate, load_encoder
from anysplade.cli import main
from anysplade.model.encoder import build_encoder
from anysplade.model.encoding import ModelQueries, encode
from anysplade.model.fused import fuse_pooling
from anysplade.model.modules import masked_lm
from anysplade.model.runtimes import for_inference, runtime_of
from tiny import WORDS, make_backbone

TEXTS = [" ".join(WORDS[: n % 60]) for n in (3, 50, 0, 7, 119, 1, 30, 2, 58)] + ["🙂", "not a word of it"]


@pytest.fixture(scope="module")
def encoder(backbone):
    return load_encoder(backbone, k=1, shift=0)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runtimes")


@pytest.mark.parametrize("architecture", ["albert", "bert", "distilbert", "modernbert", "mpnet", "roberta"])
def test_openvino_gives_torchs_vectors(architecture, tmp_path):
    encoder = load_encoder(make_backbone(architecture, tmp_path / "in"), k=1, shift=0.2)
    made = for_inference(encoder, "openvino", cache_folder=tmp_path)
    assert (runtime_of(made), runtime_of(encoder)) == ("openvino", "torch")
    for role in ("query", "document"):
        expected, got = (encode(model, TEXTS, role).toarray() for model in (encoder, made))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
        assert np.maximum(got, expected)[(got > 0) != (expected > 0)].max(initial=0) < 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_approximations_are_near(encoder, precision, cache_folder):
    made = for_inference(encoder, "openvino", precision, cache_folder)
    got, exact = (encode(model, TEXTS, "document").toarray() for model in (made, encoder))
    assert not np.array_equal(got, exact) or not runtimes.native_bfloat16("cpu")
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(exact, axis=1)
    assert ((got * exact).sum(axis=1) >= 0.98 * lengths).all()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_logits_of_a_dense_head_are_computed_in_the_precision(precision, encoder, cache_folder, monkeypatch):
    """With many tokens at a time, and where many terms are active; the vectors stay float32."""
    made = for_inference(encoder, "openvino", precision, cache_folder)
    assert made.in_bfloat16 == runtimes.native_bfloat16("cpu")
    assert not for_inference(encoder, "openvino", "float32", cache_folder).in_bfloat16
    seen, pool = [], fused.splade_pool
    monkeypatch.setattr(fused, "splade_pool", lambda *given: (seen.append(torch.is_autocast_enabled("cpu")), pool(*given))[1])
    few = encode(made, TEXTS[:2], "document")
    monkeypatch.setattr(made, "in_bfloat16", True)
    many = encode(made, TEXTS * 4, "document")
    assert seen[0] is False
    assert True in seen
    assert few.dtype == many.dtype == np.float32
    exact = encode(encoder, TEXTS * 4, "document").toarray()
    lengths = np.linalg.norm(many.toarray(), axis=1) * np.linalg.norm(exact, axis=1)
    assert ((many.toarray() * exact).sum(axis=1) >= 0.98 * lengths).all()


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_threads_encode_with_one_model(runtime, encoder, cache_folder):
    made = for_inference(encoder, runtime, cache_folder=cache_folder)
    parts = [TEXTS[start : start + 3] for start in range(len(TEXTS))]
    inputs = {"input_ids": torch.arange(8).reshape(1, 8)}

    def use(part):
        queries = ModelQueries(made)
        with torch.inference_mode():
            logits = masked_lm(encoder)(**inputs).logits  # the model's own, while others pool without them
        return encode(made, part, "document").toarray(), logits, queries.count_truncated(part), queries.tokens(part[0])

    alone = [use(part) for part in parts]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(use, parts * 12))
    for (vectors, logits, *others), (vectors_alone, logits_alone, *others_alone) in zip(together, alone * 12, strict=True):
        np.testing.assert_allclose(vectors, vectors_alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits, logits_alone)
        assert others == others_alone


def test_the_model_is_made_once_and_again_when_the_weights_change(backbone, tmp_path, monkeypatch):
    encoder = load_encoder(backbone, k=1, shift=0)
    made = []
    convert = runtimes._convert
    monkeypatch.setattr(runtimes, "_convert", lambda *given: made.append(given) or convert(*given))
    for _ in range(2):
        first = for_inference(encoder, "openvino", cache_folder=tmp_path)
    assert len(made) == 1
    with torch.no_grad():
        next(masked_lm(encoder).parameters()).mul_(1.5)
    second = for_inference(encoder, "openvino", cache_folder=tmp_path)
    assert len(made) == 2
    before, after = (encode(model, TEXTS, "document").toarray() for model in (first, second))
    assert np.abs(before - after).max() > 1e-3
    np.testing.assert_allclose(after, encode(encoder, TEXTS, "document").toarray(), atol=1e-4)
    for file in tmp_path.rglob("model.xml"):
        file.write_text("cut off")
    for_inference(encoder, "openvino", cache_folder=tmp_path)
    assert len(made) == 3
    (tmp_path / "file").write_text("")
    for_inference(encoder, "openvino", cache_folder=tmp_path / "file")  # a cache that cannot be written
    assert len(made) == 4


def test_buffers_of_every_kind_are_told_apart(backbone):
    encoder = load_encoder(backbone, k=1, shift=0)
    before = [runtimes._content(encoder, False)]
    for buffer in (
        *(torch.tensor(value) for value in (1.0, 2.0, 1, True)),
        *(torch.tensor([], dtype=dtype) for dtype in (torch.float32, torch.bool)),
        *(torch.arange(6).view(2, 3).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.bool)),
        torch.arange(6.0).view(2, 3).T,
        torch.zeros(1, dtype=torch.bfloat16).expand(5),
    ):
        masked_lm(encoder).register_buffer("scale", buffer)
        before.append(runtimes._content(encoder, False))
        assert runtimes._content(encoder, False) == before[-1]
    assert len(set(before)) == len(before)


def test_the_stock_weights_stay_and_can_be_saved(encoder, tmp_path):
    made = for_inference(encoder, "openvino", cache_folder=tmp_path)
    made.save_pretrained(str(tmp_path / "out"))
    stock = SparseEncoder(str(tmp_path / "out"))
    got = stock.encode_document(TEXTS, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(got, encode(encoder, TEXTS, "document").toarray(), atol=1e-5)
    assert not list((tmp_path / "out").rglob("*.xml"))


def test_queries_of_an_encoder_with_two_sides(backbone, tmp_path):
    encoder, _ = build_encoder(backbone, 1, 0, query_encoder="idf", idf_texts=TEXTS)
    made = for_inference(encoder, "openvino", cache_folder=tmp_path)
    for role in ("query", "document"):
        np.testing.assert_allclose(*(encode(model, TEXTS, role).toarray() for model in (made, encoder)), atol=1e-4)


def test_what_openvino_cannot_run(backbone, encoder, tmp_path, caplog, monkeypatch):
    other = SparseEncoder(modules=[Transformer(backbone), SparseAutoEncoder(32, hidden_dim=64)])
    unfused = load_encoder(backbone, k=1, shift=0, fused=False)
    for model in (other, unfused):
        with pytest.raises(OptionError, match="fused pooling"):
            for_inference(model, "openvino")
        assert for_inference(model) is model
    with pytest.raises(OptionError, match="int8 needs OpenVINO"):
        for_inference(unfused, "torch", "int8")
    monkeypatch.setattr(runtimes, "openvino_installed", lambda: True)
    monkeypatch.setattr(runtimes, "_TOLERANCE", 0.0)  # no model gives the same to the bit
    with pytest.raises(ModelError, match="hidden states differ"):
        for_inference(encoder, "openvino", cache_folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert for_inference(encoder, cache_folder=tmp_path) is encoder
    assert "hidden states differ" in caplog.text
    assert not list(tmp_path.rglob("model.xml"))


def test_sum_pooling_and_the_double_logarithm(backbone, tmp_path):
    for pooling, activation in (("sum", "relu"), ("max", "log1p_relu")):
        modules = [Transformer(backbone, transformer_task="fill-mask"), SpladePooling(pooling, activation_function=activation)]
        stock = SparseEncoder(modules=modules)
        expected = encode(stock, TEXTS, "document").toarray()
        assert fuse_pooling(stock)
        made = for_inference(stock, "openvino", cache_folder=tmp_path)
        np.testing.assert_allclose(encode(made, TEXTS, "document").toarray(), expected, atol=1e-3)


def test_every_command_takes_a_runtime_and_says_the_precision(backbone, collection_folder, tmp_path, capsys):
    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return json.loads(capsys.readouterr().out)

    values = {}
    for runtime, precision in (("torch", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"), ("openvino", "int8")):
        options = ["--runtime", runtime, "--precision", precision, "--json"]
        found = run("evaluate", backbone, collection_folder, *options)
        assert (found["runtime"], found["precision"]) == (runtime, precision)
        values[runtime, precision] = found["nDCG@10"]
        folder = tmp_path / f"{runtime}-{precision}"
        assert run("index", backbone, collection_folder, "--out", folder, *options)["precision"] == precision
        found = run("search", folder, WORDS[0], *options)
        assert found["precision"] == precision
        assert found["hits"]
    assert values["openvino", "float32"] == pytest.approx(values["torch", "float32"], abs=1e-6)


def test_an_index_is_the_same_by_either_runtime(backbone, collection_folder, tmp_path):
    rows = []
    for runtime in ("torch", "openvino"):
        with Index.build(backbone, collection_folder, tmp_path / runtime, runtime=runtime) as index:
            rows.append({d.id: dict(zip(d.terms.tolist(), d.weights.tolist(), strict=True)) for d in index.store})
    assert rows[0].keys() == rows[1].keys()
    for id_, row in rows[0].items():
        other = rows[1][id_]
        assert all(abs(row.get(term, 0) - other.get(term, 0)) < 1e-4 for term in row.keys() | other.keys())
    index = Index.build(backbone, collection_folder, tmp_path / "torch", runtime="openvino")  # no other index: nothing to do
    assert not any(index.changes)
    index.close()


def test_a_loaded_encoder_stays_as_it_is(encoder, collection_folder, monkeypatch):
    monkeypatch.setattr(runtimes, "openvino_installed", lambda: True)
    monkeypatch.setattr(runtimes, "_convert", None)
    assert evaluate(encoder, collection_folder).runtime == "torch"


def test_few_texts_are_encoded_by_torch(backbone, collection_folder, monkeypatch):
    monkeypatch.setattr(runtimes, "openvino_installed", lambda: True)
    assert evaluate(str(backbone), collection_folder).runtime == "torch"
    monkeypatch.setattr("anysplade.model.options._FEW_TEXTS", 2)
    assert evaluate(str(backbone), collection_folder).runtime == "openvino"


def test_openvino_sends_nothing_home():
    """Its telemetry sends an event at each import unless the module cannot be imported."""
    code = (
        "import sys; import anysplade.model.runtimes as r; r._import('openvino'); r._import('nncf');"
        "print([n for n in sys.modules if n.startswith('openvino_telemetry') and sys.modules[n]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
