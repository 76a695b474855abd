import logging

import pytest

from anysplade import Index
from opensearch_server import serve  # noqa: F401  (a fixture)
from tiny import make_backbone, make_collection, make_static


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A BERT of 0.1 M random parameters with a tokenizer: seconds to train, nothing to download."""
    return make_backbone("bert", tmp_path_factory.mktemp("backbone") / "bert")


@pytest.fixture(scope="session")
def collection_folder(tmp_path_factory):
    """A BEIR folder: 40 documents, 20 queries, training pairs."""
    return make_collection(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def static_index(tmp_path_factory, collection_folder):
    """The folder of an index of 40 documents, whose model has a weight a token for queries."""
    folder = tmp_path_factory.mktemp("static")
    Index.build(make_static(folder), collection_folder, folder / "index").close()
    return folder / "index"


@pytest.fixture(autouse=True)
def logging_is_as_before():
    """The command line sets up logging for its process; the next test in this one may be of the library."""
    logger = logging.getLogger("anysplade")
    level, formatters = logger.level, [(handler, handler.formatter) for handler in logging.getLogger().handlers]
    yield
    logger.setLevel(level)
    for handler, formatter in formatters:
        handler.setFormatter(formatter)


@pytest.fixture(autouse=True)
def openvino_is_asked_for(monkeypatch):
    """Tests run on torch unless they name a runtime: making a model for OpenVINO takes a second, and most make one of their own."""
    monkeypatch.setattr("anysplade.model.runtimes.openvino_installed", lambda: False)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Vectors that the command keeps go nowhere near the user's."""
    monkeypatch.setenv("ANYSPLADE_CACHE", str(tmp_path_factory.mktemp("cache")))
