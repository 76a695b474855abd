"""Exported models, each read as its consumer reads it: FastEmbed's own classes, transformers.js, and onnxruntime for the others."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import EsmTokenizer

from anysplade import ModelError, OptionError, OutputError, load_encoder, open_encoder
from anysplade.model.encoding import ModelQueries, encode
from anysplade.model.export import OUTPUTS, export_checkpoint, export_onnx
from anysplade.model.fused import hidden_states
from anysplade.model.head import DEAD
from anysplade.model.modules import cut_within, masked_lm
from anysplade.model.onnx_queries import OnnxQueries, exported
from processes import run_python
from tiny import WORDS, make_backbone, make_static

onnxruntime = pytest.importorskip("onnxruntime")

# It asks for an older huggingface-hub than transformers, and runs with a newer one.
WITHOUT_FASTEMBED = "needs pip install --no-deps fastembed loguru mmh3 py-rust-stemmers"

TEXTS = ["kabel lodan mifil", "", "😀 kabel", "\ud800 lodan", "[SEP] kabel [PAD]", " ".join(WORDS)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Calibrated encoders by architecture, each exported once: the model's folder and the export's."""
    made = {}

    def export(architecture, form="logits", **changes):
        key = "-".join([architecture, form, *changes.values()])
        if key not in made:
            folder = tmp_path_factory.mktemp("exports")
            encoder = load_encoder(make_backbone(architecture, folder / "backbone"), k=2, shift=0.1, fused=False)
            encoder = SparseEncoder(modules=[encoder[0], SpladePooling(**changes)], prompts={"query": "kabel: ", "document": ""})
            if architecture == "roberta":
                encoder.prompts, encoder.default_prompt_name, encoder.max_active_dims = {"all": "lodan "}, "all", 9
                encoder.tokenizer.truncation_side = "left"
            if architecture == "distilbert":
                encoder.max_seq_length = 16
            encoder.save_pretrained(str(folder / "model"))
            about = export_onnx(folder / "model", folder / "onnx", form, quantize=form == "logits")
            made[key] = folder / "model", folder / "onnx", about
        return made[key]

    return export


@pytest.mark.parametrize(
    "architecture, form, changes",
    [
        ("bert", "logits", {}),
        ("bert", "vector", {"pooling_strategy": "sum"}),
        ("bert", "terms", {"activation_function": "log1p_relu"}),
        ("roberta", "logits", {"pooling_strategy": "sum", "activation_function": "log1p_relu"}),
        ("modernbert", "vector", {}),
        ("distilbert", "terms", {}),
    ],
)
def test_an_exported_model_gives_the_vectors_of_torch(architecture, form, changes, exports):
    model, onnx, about = exports(architecture, form, **changes)
    assert about["largest_difference"] < 1e-4
    session = onnxruntime.InferenceSession(onnx / "model.onnx")
    assert tuple(output.name for output in session.get_outputs()) == OUTPUTS[form]
    queries = OnnxQueries(onnx)
    expected = encode(open_encoder(model), TEXTS, "query").toarray()
    np.testing.assert_allclose(queries.encode(TEXTS).toarray(), expected, atol=1e-5)
    assert queries.encode([]).shape == (0, expected.shape[1])
    torch_queries = ModelQueries(open_encoder(model))
    assert queries.count_truncated(TEXTS) == torch_queries.count_truncated(TEXTS)
    assert queries.term_names == torch_queries.term_names
    assert [queries.tokens(text) for text in TEXTS] == [torch_queries.tokens(text) for text in TEXTS]


def test_texts_are_cut_where_the_encoder_cuts_them(exports):
    model, onnx, _ = exports("bert")
    queries, encoder = OnnxQueries(onnx), open_encoder(model)
    long = ["kabel lodan " * 50_000]
    np.testing.assert_allclose(queries.encode(long).toarray(), encode(encoder, long, "query").toarray(), atol=1e-5)
    assert queries.count_truncated([*long, "kabel"]).texts == 1


@pytest.mark.parametrize("max_length", [8, 40, 1000])
def test_the_length_of_an_index_replaces_that_of_the_model(max_length, exports):
    model, onnx, _ = exports("distilbert", "terms")
    queries, encoder = OnnxQueries(onnx, max_length=max_length), cut_within(open_encoder(model), max_length)
    assert queries.count_truncated(TEXTS) == ModelQueries(encoder).count_truncated(TEXTS)
    np.testing.assert_allclose(queries.encode(TEXTS).toarray(), encode(encoder, TEXTS, "query").toarray(), atol=1e-5)


def test_threads_share_the_queries_of_an_export(exports):
    queries = OnnxQueries(exports("bert")[1])
    texts = [f"{word} kabel" for word in WORDS[:40]]
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(lambda text: queries.encode([text]).toarray(), texts))
    np.testing.assert_array_equal(np.vstack(rows), queries.encode(texts).toarray())


def test_queries_need_no_torch(exports):
    _, onnx, _ = exports("bert")
    code = (
        "import sys; from anysplade.model.onnx_queries import OnnxQueries; "
        f"print(OnnxQueries({str(onnx)!r}).encode(['kabel']).nnz); "
        "print([name for name in ('torch', 'transformers', 'sentence_transformers') if name in sys.modules])"
    )
    dims, loaded = run_python("-c", code).stdout.splitlines()
    assert int(dims) > 0
    assert loaded == "[]"


def test_fastembed_gives_the_same_vectors(exports):
    """FastEmbed pools logits itself, with one logarithm and the maximum."""
    fastembed = pytest.importorskip("fastembed", reason=WITHOUT_FASTEMBED)
    model, onnx, _ = exports("bert")
    texts = ["kabel lodan mifil", "kabel " * 100, ""]
    theirs = fastembed.SparseTextEmbedding("prithivida/Splade_PP_en_v1", specific_model_path=str(onnx), local_files_only=True)
    expected = encode(open_encoder(model), texts, "document").toarray()
    for found, right in zip(theirs.embed(texts), expected, strict=True):
        vector = np.zeros_like(right)
        vector[found.indices] = found.values
        np.testing.assert_allclose(vector, right, atol=1e-5)


def test_fastembed_reads_the_weights_of_queries(tmp_path):
    kind = pytest.importorskip("fastembed.sparse.if_splade", reason=WITHOUT_FASTEMBED).IfSplade
    model = make_static(tmp_path)
    export_onnx(model, tmp_path / "onnx")
    theirs = kind(kind._list_supported_models()[0].model, specific_model_path=str(tmp_path / "onnx"), local_files_only=True)
    encoder = open_encoder(model)
    texts = ["kabel lodan", "mifil kabel kabel"]
    expected = encode(encoder, texts, "query").toarray()
    for found, right in zip(theirs.query_embed(texts), expected, strict=True):
        vector = np.zeros_like(right)
        vector[found.indices] = found.values
        np.testing.assert_allclose(vector, right, atol=1e-6)


def test_int8_is_an_approximation_that_says_so(exports):
    _, onnx, _ = exports("bert")
    exact, rounded = OnnxQueries(onnx), OnnxQueries(onnx, "int8")
    assert (exact.precision, rounded.precision) == ("float32", "int8")
    first, second = exact.encode(TEXTS[:1]).toarray(), rounded.encode(TEXTS[:1]).toarray()
    assert 0 < abs(first - second).max() < 0.1 * first.max()
    with pytest.raises(OptionError, match="precision is bfloat16"):
        OnnxQueries(onnx, "bfloat16")


@pytest.mark.network
def test_transformers_js_gives_the_same_vectors(exports, tmp_path):
    """npm installs it; the logits are pooled as its users do."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    model, onnx, _ = exports("bert")
    shutil.copytree(onnx, tmp_path / "onnx")
    subprocess.run(["npm", "install", "--ignore-scripts", "@huggingface/transformers@4"], cwd=tmp_path, check=True)
    texts = ["kabel lodan mifil", "kabel"]
    (tmp_path / "encode.mjs").write_text(
        "import { AutoTokenizer, AutoModelForMaskedLM, env } from '@huggingface/transformers';\n"
        f"env.allowRemoteModels = false; env.localModelPath = {json.dumps(str(tmp_path) + '/')};\n"
        "const tokenizer = await AutoTokenizer.from_pretrained('onnx');\n"
        "const model = await AutoModelForMaskedLM.from_pretrained('onnx', { subfolder: '', dtype: 'fp32' });\n"
        f"for (const text of {json.dumps(texts)}) {{\n"
        "  const { logits } = await model(await tokenizer(text));\n"
        "  const [, length, size] = logits.dims, vector = new Array(size).fill(0);\n"
        "  for (let i = 0; i < length * size; i++) vector[i % size] = Math.max(vector[i % size], logits.data[i]);\n"
        "  console.log(JSON.stringify(vector.map(Math.log1p)));\n"
        "}\n"
    )
    done = subprocess.run(["node", "encode.mjs"], cwd=tmp_path, check=True, capture_output=True, text=True)
    got = np.array([json.loads(line) for line in done.stdout.splitlines()])
    np.testing.assert_allclose(got, encode(open_encoder(model), texts, "document").toarray(), atol=1e-5)


def test_what_cannot_be_exported_says_why(exports, tmp_path, monkeypatch):
    model, _, _ = exports("bert")
    with pytest.raises(OptionError, match="`form` is 'dense'"):
        export_onnx(model, tmp_path / "onnx", "dense")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="full"):
        export_onnx(model, tmp_path / "full")

    def fail(*_, **__):
        raise RuntimeError("advice") from RuntimeError("no such operator\nand a page of advice")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"cannot be exported to ONNX: no such operator$"):
        export_onnx(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(ModelError, match="no exported model in it"):
        OnnxQueries(tmp_path / "onnx")
    assert exported(tmp_path) is None


def copied(network):
    """In place of torch's exporter: the network of another model."""
    return lambda module, args, path, **_: shutil.copy(network, path)


def test_a_network_that_differs_from_the_model_is_refused(exports, tmp_path, monkeypatch):
    model, onnx, _ = exports("bert")
    monkeypatch.setattr(torch.onnx, "export", copied(onnx / "model.onnx"))
    encoder = open_encoder(model, fused=False)
    bias = masked_lm(encoder).get_output_embeddings().bias.data
    for change, error in ((0.01, "differs from torch by 0.01"), (float("nan"), "NaN or infinity; its training diverged")):
        bias[5], bias[7] = DEAD, bias[7] + change  # a term that is switched off allows no larger difference of the others
        encoder.save_pretrained(str(tmp_path / f"{change}"))
        with pytest.raises(ModelError, match=error):
            export_onnx(tmp_path / f"{change}", tmp_path / "out")
    (tmp_path / "damaged").write_bytes(b"damaged")
    monkeypatch.setattr(torch.onnx, "export", copied(tmp_path / "damaged"))
    with pytest.raises(ModelError, match=r"BertForMaskedLM cannot be exported to ONNX: .*$"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_other_software_cannot_read_is_refused(tmp_path):
    model = make_backbone("bert", tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"split_special_tokens": True}))
    with pytest.raises(ModelError, match=r"in another way than tokenizer\.json"):
        export_onnx(model, tmp_path / "onnx")
    make_backbone("esm", tmp_path / "slow")
    for file in (tmp_path / "slow").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(["<pad>", "<cls>", "<eos>", "<unk>", "<mask>", *WORDS]))
    EsmTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "slow")
    with pytest.raises(ModelError, match="EsmTokenizer, is written in Python"):
        export_onnx(tmp_path / "slow", tmp_path / "onnx")


@pytest.mark.parametrize("export", [export_onnx, export_checkpoint])
def test_an_export_into_its_model_is_refused(export, tmp_path):
    model = make_backbone("bert", tmp_path / "model")
    with pytest.raises(OutputError, match="in the folder of the model"):
        export(model, tmp_path / "model" / "onnx")
    assert not (tmp_path / "model" / "onnx").exists()


@pytest.mark.parametrize(
    "file, content, error",
    [
        ("model.onnx", "damaged", "cannot be opened"),
        ("model.onnx", None, "no model.onnx in it; export the model again"),
        ("tokenizer.json", None, "no tokenizer.json in it"),
        ("tokenizer.json", "{}", "cannot be opened"),
        ("anysplade.json", "{", "is damaged"),
        ("anysplade.json", "[]", "is damaged"),
        ("anysplade.json", '{"format": 1}', "is damaged"),
        ("anysplade.json", '{"format": 2}', "another version of anysplade"),
    ],
)
def test_a_damaged_export_is_one_line(file, content, error, exports, tmp_path):
    shutil.copytree(exports("bert")[1], tmp_path / "onnx")
    if content is None:
        (tmp_path / "onnx" / file).unlink()
    else:
        (tmp_path / "onnx" / file).write_text(content)
    with pytest.raises(ModelError, match=error) as raised:
        OnnxQueries(tmp_path / "onnx")
    assert "\n" not in str(raised.value)


def test_an_export_is_no_model(exports):
    with pytest.raises(ModelError, match="an exported model, which only searches"):
        open_encoder(exports("bert")[1])


def test_the_queries_of_an_export_without_quantized_network(exports):
    with pytest.raises(ModelError, match=r"no model_quantized\.onnx in it; export the model with `quantize`"):
        OnnxQueries(exports("distilbert", "terms")[1], "int8")


# ------------------------------------------------------------ servers that read the checkpoint, and cannot be installed here


def tei_bert(tensors):
    """text-embeddings-inference: the decoder's weight if the file has it, else the embeddings; the bias of the predictions."""
    embeddings = tensors["bert.embeddings.word_embeddings.weight"]
    return tensors.get("cls.predictions.decoder.weight", embeddings), tensors["cls.predictions.bias"]


def vllm_bert(tensors):
    return tensors["cls.predictions.decoder.weight"], tensors["cls.predictions.decoder.bias"]


def tei_roberta(tensors):
    return tensors["lm_head.decoder.weight"], tensors["lm_head.bias"]


def tei_distilbert(tensors):
    embeddings = tensors["distilbert.embeddings.word_embeddings.weight"]
    return tensors.get("vocab_projector.weight", embeddings), tensors["vocab_projector.bias"]


@pytest.mark.parametrize("k", [1, 2], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "architecture, read", [("bert", tei_bert), ("bert", vllm_bert), ("roberta", tei_roberta), ("distilbert", tei_distilbert)]
)
def test_servers_read_the_same_vectors_from_an_exported_checkpoint(architecture, read, k, tmp_path):
    encoder = load_encoder(make_backbone(architecture, tmp_path / "backbone"), k=k, shift=0.1)
    with torch.no_grad():  # as after training: the bias that makes the logits has changed
        masked_lm(encoder).get_output_embeddings().bias.add_(torch.linspace(-0.1, 0.1, encoder.get_embedding_dimension()))
    encoder.save_pretrained(str(tmp_path / "model"))
    export_checkpoint(tmp_path / "model", tmp_path / "out")
    weight, bias = read(load_file(tmp_path / "out" / "model.safetensors"))
    expected = encode(open_encoder(tmp_path / "model"), TEXTS[:1], "document").toarray()
    features = encoder.preprocess(TEXTS[:1])
    with torch.no_grad():
        hidden = hidden_states(masked_lm(encoder).eval(), **{name: features[name] for name in ("input_ids", "attention_mask")})
        got = (hidden @ weight.T + bias).amax(dim=1).relu().log1p().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(encode(open_encoder(tmp_path / "out"), TEXTS[:1], "document").toarray(), expected, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"cls_token_id", "sep_token_id"} & config.keys()  # vLLM would leave these tokens out of the pooling
