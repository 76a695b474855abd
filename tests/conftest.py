import functools
import gc
import logging

import jinja2
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertForSequenceClassification, BertModel

from anysplade import Index, load_encoder
from anysplade._common.figures import draw
from opensearch_server import serve  # noqa: F401  (a fixture)
from tiny import make_backbone, make_collection, make_lexical, make_static, make_tokenizer


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """A worker process that dies ends the run with an error, and so does a test that takes too long, which ends its worker.

    By default xdist (3.8) starts another worker, gives the files that the dead one had finished to the others as empty work, and
    waits forever for its end; no test runs then, so no timeout of a test sees it.
    """
    if getattr(config.option, "maxworkerrestart", "0") is None:
        config.option.maxworkerrestart = "0"


def pytest_collection_finish():
    """Each training collects garbage, which takes longer than its steps where all libraries are searched for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A BERT of 0.1 M random parameters with a tokenizer: seconds to train, nothing to download."""
    return make_backbone("bert", tmp_path_factory.mktemp("backbone") / "bert")


@pytest.fixture(scope="session")
def collection_folder(tmp_path_factory):
    """A BEIR folder: 40 documents, 20 queries, training pairs."""
    return make_collection(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """The folders of three small models that can teach, with random weights, and of two that they were made from."""
    folder, tokenizer = tmp_path_factory.mktemp("teachers"), make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    options = sizes | {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 64}
    BertModel(BertConfig(**options)).save_pretrained(folder / "body")
    tokenizer.save_pretrained(folder / "body")
    body = Transformer(str(folder / "body"))
    pooled = [body, Pooling(body.get_embedding_dimension())]
    SentenceTransformer(modules=pooled, prompts={"query": "kabel ", "document": ""}).save_pretrained(str(folder / "dense"))
    BertForSequenceClassification(BertConfig(num_labels=1, **options)).save_pretrained(folder / "cross-encoder")
    tokenizer.save_pretrained(folder / "cross-encoder")
    load_encoder(make_lexical(folder / "lexical"), 1, 0).save_pretrained(str(folder / "sparse"))
    return {kind: str(folder / kind) for kind in ("dense", "sparse", "cross-encoder", "body", "lexical")}


@pytest.fixture(scope="session")
def static_index(tmp_path_factory, collection_folder):
    """The folder of an index of 40 documents, whose model has a weight a token for queries."""
    folder = tmp_path_factory.mktemp("static")
    Index.build(make_static(folder), collection_folder, folder / "index").close()
    return folder / "index"


@pytest.fixture(scope="session", autouse=True)
def quick_cards():
    """Model cards take half the time of a short training: their template is compiled once, and their figure is not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.lru_cache(jinja2.Environment.compile))
        patch.setattr("anysplade.training.card.draw", lambda *_: "<svg/>")
        yield


@pytest.fixture
def drawn_cards(monkeypatch):
    """Model cards have their figure, as outside the tests."""
    monkeypatch.setattr("anysplade.training.card.draw", draw)


@pytest.fixture(scope="session", autouse=True)
def first_logging():
    """The level and the formatters before any command was run, also by a fixture of a module."""
    return logging.getLogger("anysplade").level, {handler: handler.formatter for handler in logging.getLogger().handlers}


@pytest.fixture(autouse=True)
def logging_is_as_before(first_logging):
    """The command line sets up logging for its process; the next test in this one may be of the library."""
    level, formatters = first_logging
    logging.getLogger("anysplade").setLevel(level)
    for handler in logging.getLogger().handlers:
        if handler in formatters:
            handler.setFormatter(formatters[handler])


@pytest.fixture(autouse=True)
def openvino_is_asked_for(monkeypatch):
    """Tests run on torch unless they name a runtime: making a model for OpenVINO takes a second, and most make one of their own."""
    monkeypatch.setattr("anysplade.model.runtimes.openvino_installed", lambda: False)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Vectors that the command keeps go nowhere near the user's."""
    monkeypatch.setenv("ANYSPLADE_CACHE", str(tmp_path_factory.mktemp("cache")))
