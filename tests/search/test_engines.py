import json
import os
import re
import struct
import sys
import uuid
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from opensearchpy import OpenSearch
from qdrant_client import QdrantClient, models
from scipy import sparse
from scipy.stats import kendalltau

from anysplade import export_queries
from anysplade.data.corpus import Document
from anysplade.errors import AnyspladeError, DataError, ExtraError, OptionError, OutputError
from anysplade.search import remote
from anysplade.search.documents import EncodedDocument
from anysplade.search.engines import base, open_engine
from anysplade.search.engines.export import export_anserini, export_ciff
from anysplade.search.engines.opensearch import OpenSearchEngine
from anysplade.search.engines.qdrant import QdrantEngine
from anysplade.search.filters import explain_filter
from anysplade.search.hits import Hit
from anysplade.search.remote import RemoteIndex
from opensearch_server import Handler, RefusedError, Server

ABOUT = {"model": "org/model", "model_fingerprint": "aaaa", "vocabulary": 250_002, "format": 2}
VOCABULARY = 250_002


def encoded(id_, terms, weights, title="", text="", metadata=None):
    return EncodedDocument(id_, Document(title, text, metadata), np.array(terms, np.int32), np.array(weights, np.float32))


def from_rows(matrix, **fields):
    return [
        encoded(f"d{i}", row.indices, row.data, f"title {i}", f"text {i}", {"lang": "en" if i % 3 else "de", "year": 2000 + i % 5})
        for i, row in enumerate(matrix)
    ]


def random_rows(rows, terms, seed, vocabulary=VOCABULARY):
    """(rows, vocabulary) with ``terms`` nonzeros a row, most of them among 200 columns, so that rows meet."""
    rng = np.random.default_rng(seed)
    common = np.sort(rng.choice(vocabulary, 200, replace=False))
    indices = np.concatenate([np.sort(rng.choice(common, terms, replace=False)) for _ in range(rows)]).astype(np.int32)
    data = rng.gamma(1.0, 1.0, rows * terms).astype(np.float32) + np.float32(1e-3)
    return sparse.csr_matrix((data, indices, np.arange(0, rows * terms + 1, terms)), shape=(rows, vocabulary))


def scores_of(document_rows, query):
    return np.asarray((document_rows.astype(np.float64) @ query.astype(np.float64).T).todense()).ravel()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(base, "_PAUSES", (0.001,) * 5)


@pytest.fixture
def server(serve):
    return serve(Server())


@pytest.fixture(params=["qdrant", "opensearch"])
def engine(request):
    if request.param == "qdrant":
        made = QdrantEngine(QdrantClient(":memory:"), "docs")
    else:
        made = OpenSearchEngine.at("127.0.0.1", request.getfixturevalue("server").server_port, "docs")
    made.create(ABOUT)
    return made


@pytest.fixture
def opensearch(server):
    made = OpenSearchEngine.at("127.0.0.1", server.server_port, "docs")
    made.create(ABOUT)
    return made


# -------------------------------------------------------------------------------------------- both engines


def test_the_query_bodies_of_the_docs_find_what_search_finds(engine):
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    qdrant, opensearch = (json.loads(body) for body in re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    terms, weights = np.array([539, 688, 1014]), np.array([1.64, 2.158, 1.165])
    engine.upload(
        [encoded(f"d{i}", terms[:i], [1.0 + i] * i, metadata={"lang": lang}) for i, lang in enumerate(["en", "en", "fr", "de"])]
    )
    if isinstance(engine, QdrantEngine):
        qdrant |= {"query": models.SparseVector(**qdrant["query"]), "query_filter": models.Filter(**qdrant.pop("filter"))}
        found = [(point.payload["id"], point.score) for point in engine.client.query_points("docs", **qdrant).points]
    else:
        hits = engine.client.search(index="docs", body=opensearch)["hits"]["hits"]
        found = [(hit["_source"]["id"], hit["_score"]) for hit in hits]
    assert [id_ for id_, _ in found] == ["d3", "d1"]
    assert found == [
        (hit.id, pytest.approx(hit.score, rel=1e-6)) for hit in engine.search(terms, weights, 10, {"lang": ["en", "de"]})
    ]


def test_what_an_index_was_made_with_is_kept_and_held_to(engine):
    assert engine.about() == ABOUT | {"tagged": True}
    engine.create(ABOUT | {"model": "a copy elsewhere"})
    with pytest.raises(OutputError, match=r"another model .org/model.; choose another name"):
        engine.create(ABOUT | {"model_fingerprint": "bbbb"})
    with pytest.raises(OptionError, match="model_fingerprint"):
        engine.create({"model": "org/model"})


def test_an_index_that_others_made_is_refused(server):
    client = QdrantClient(":memory:")
    client.create_collection("theirs", vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT))
    plain = OpenSearch([{"host": "127.0.0.1", "port": server.server_port}])
    plain.indices.create(index="theirs", body={"mappings": {"properties": {}}})
    for engine in (QdrantEngine(client, "theirs"), OpenSearchEngine(plain, "theirs")):
        with pytest.raises(OutputError, match="another model"):
            engine.create(ABOUT)


def test_nothing_is_sent_to_what_does_not_exist(server):
    """OpenSearch would make an index by itself, with a mapping that no search understands."""
    for engine in (
        QdrantEngine(QdrantClient(":memory:"), "none"),
        OpenSearchEngine.at("127.0.0.1", server.server_port, "none"),
    ):
        with pytest.raises(DataError, match="create it first"):
            engine.upload([encoded("a", [1], [1])])
        with pytest.raises(DataError, match="create it first"):
            engine.search(np.array([1]), np.array([1.0]), 1)
        with pytest.raises(DataError, match="create it first"):
            engine.delete(["a"])


def test_upload_sends_what_is_new_or_changed(engine):
    documents = from_rows(random_rows(30, 10, seed=0))
    assert engine.upload(documents, batch=7) == 30
    assert engine.upload(iter(documents)) == 0
    assert engine.count() == 30
    weights = documents[3].weights.copy()
    weights[0] *= 2
    changes = {
        1: documents[1]._replace(content=documents[1].content._replace(text="other")),
        2: documents[2]._replace(content=documents[2].content._replace(metadata=None)),
        3: documents[3]._replace(weights=weights),
    }
    documents = [changes.get(i, document) for i, document in enumerate(documents)]
    assert engine.upload(documents) == 3
    assert engine.count() == 30
    found = {hit.id: hit for i in (1, 2) for hit in engine.search(documents[i].terms, documents[i].weights, 30)}
    assert found["d1"].text == "other"
    assert found["d2"].metadata is None


def test_upload_goes_on_after_a_fault(engine):
    documents = from_rows(random_rows(30, 10, seed=0))
    broken = [*documents[:20], documents[20]._replace(weights=documents[20].weights * np.nan), *documents[21:]]
    with pytest.raises(DataError, match="'d20'"):
        engine.upload(broken, batch=8)
    assert engine.upload(documents, batch=8) == 14


def test_of_an_id_that_stands_twice_the_last_stays(engine):
    first, last = encoded("a", [1], [1], text="first"), encoded("a", [1], [2], text="last")
    engine.upload([first])
    engine.upload([last, first])
    assert [hit.text for hit in engine.search(np.array([1]), np.array([1.0]), 5)] == ["first"]


def test_search_is_the_dot_product(engine):
    rows, queries = random_rows(300, 40, seed=1), random_rows(10, 12, seed=1)
    documents = from_rows(rows)
    engine.upload(documents)
    # rank_features cut a weight at its ninth bit; Qdrant adds float32.
    error = 2**-8 if isinstance(engine, OpenSearchEngine) else 1e-5
    for query in queries:
        exact = scores_of(rows, query)
        hits = engine.search(query.indices, query.data, 20)
        assert len(hits) == 20
        found = np.array([int(hit.id[1:]) for hit in hits])
        assert len(set(found)) == 20
        np.testing.assert_allclose([hit.score for hit in hits], exact[found], rtol=error)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        # No document that was left out is better than the last one found, by more than the error.
        assert np.delete(exact, found).max() <= exact[found].min() * (1 + 2 * error)
        assert hits[0] == Hit(
            f"d{found[0]}", hits[0].score, f"title {found[0]}", f"text {found[0]}", documents[found[0]].content.metadata
        )


def test_only_documents_with_a_shared_term_are_found(engine):
    engine.upload([encoded("a", [1, 250_001], [1, 2]), encoded("b", [2], [1]), encoded("empty", [], [])])
    assert engine.count() == 3
    assert [(hit.id, hit.score) for hit in engine.search(np.array([250_001]), np.array([2.0]), 10)] == [("a", 4)]
    assert engine.search(np.array([7]), np.array([1.0]), 10) == []
    assert engine.search(np.array([], np.int32), np.array([], np.float32), 10) == []
    engine.upload([encoded("a", [], [])])
    assert engine.search(np.array([1]), np.array([1.0]), 10) == []


def test_filter_is_equality_of_metadata(engine):
    metadata = [
        {"lang": "en", "year": 1999, "draft": True, "a.b": "x"},
        {"lang": "de", "year": 2000, "draft": False, "a.b": "y"},
        {"lang": ["fr", "it"], "year": 2001.0, "deep": {"er": " X"}, "long": "x" * 40_000},
        None,
    ]
    engine.upload([encoded(f"d{i}", [5], [4 - i], metadata=m) for i, m in enumerate(metadata)])

    def ids(filter):
        return [hit.id for hit in engine.search(np.array([5]), np.array([1.0]), 10, filter)]

    assert ids(None) == ids({}) == ["d0", "d1", "d2", "d3"]
    assert ids({"lang": "en"}) == ["d0"]
    assert ids({"lang": ["en", "de"]}) == ["d0", "d1"]
    assert ids({"lang": "it"}) == ["d2"]
    assert ids({"year": 2000}) == ["d1"]
    assert ids({"draft": True}) == ["d0"]
    assert ids({"a.b": "y"}) == ["d1"]
    assert ids({"lang": ["en", "de"], "year": [2000, 2001]}) == ["d1"]
    assert ids({"Lang": " EN"}) == ["d0"]
    assert ids({"year": ["1999", "2001"]}) == ["d0", "d2"]
    assert ids({"draft": "True"}) == ["d0"]
    assert ids({"deep.er": "x"}) == ["d2"]
    assert ids({"lang": ["xx", "yy"]}) == []
    assert explain_filter(engine, {"lang": ["xx", "yy"]}) == "no document has lang=xx or lang=yy"
    assert explain_filter(engine, {"lang": "it", "year": 1999}) == "no document has lang=it and year=1999 together"
    with pytest.raises(OptionError, match=r"filter 'none': no document has this name in its \"metadata\"; names there: .*deep.er"):
        ids({"none": "x"})
    for wrong in ({"lang": None}, {"lang": []}, {"lang": {"gt": 1}}, {"": "x"}):
        with pytest.raises(OptionError, match="filter"):
            ids(wrong)


def test_an_index_of_an_earlier_version_is_not_filtered_in_silence(engine, monkeypatch):
    monkeypatch.setattr(type(engine), "_about", lambda _: ABOUT)  # all that such an index has
    engine.upload([encoded("a", [5], [1])])
    assert [hit.id for hit in engine.search(np.array([5]), np.array([1.0]), 10)] == ["a"]
    with pytest.raises(DataError, match="earlier version, where filters find nothing; build it again"):
        engine.search(np.array([5]), np.array([1.0]), 10, {"lang": "en"})
    with pytest.raises(OutputError, match="made by an earlier version; choose another name"):
        engine.create(ABOUT)


def test_delete(engine):
    engine.upload([encoded(id_, [1], [1]) for id_ in ("a", "b", "c")])
    engine.delete(["b", "not there"])
    engine.delete([])
    assert engine.count() == 2
    assert {hit.id for hit in engine.search(np.array([1]), np.array([1.0]), 10)} == {"a", "c"}


HOSTILE = [
    " ",
    "🦜",
    "a/b?c=d&e#f",
    "..",
    "_id",
    '"',
    "x" * 512,
    "x" * 513,
    "é" * 400,
    "a\nb",
    "sha256:" + "0" * 64,
    str(uuid.uuid4()),
]


def test_any_text_is_an_id(engine):
    engine.upload([encoded(id_, [i], [1], title=id_) for i, id_ in enumerate(HOSTILE)])
    assert engine.count() == len(HOSTILE)
    for i, id_ in enumerate(HOSTILE):
        (hit,) = engine.search(np.array([i]), np.array([1.0]), 2)
        assert (hit.id, hit.title) == (id_, id_)
    assert engine.upload([encoded(id_, [i], [1], title=id_) for i, id_ in enumerate(HOSTILE)]) == 0
    engine.delete(HOSTILE)
    assert engine.count() == 0


@pytest.mark.parametrize(
    "terms, weights",
    [
        ([1, 2], [1.0]),
        ([1, 1], [1.0, 1.0]),
        ([2, 1], [1.0, 1.0]),
        ([-1, 1], [1.0, 1.0]),
        ([1, 2**31], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, 1.0]),
        ([1, 2], [1.0, np.nan]),
        ([1, 2], [1.0, np.inf]),
        ([1, 2], [1.0, 1e39]),
        ([1, 2], [1.0, 0.0]),
        ([1, 2], [1.0, -1.0]),
        ([[1, 2]], [[1.0, 1.0]]),
    ],
)
def test_malformed_vectors_are_refused_before_they_are_sent(engine, terms, weights):
    bad = EncodedDocument("bad one", Document("", ""), np.array(terms), np.array(weights))
    with pytest.raises(DataError, match="'bad one'") as error:
        engine.upload([encoded("good", [1], [1]), bad])
    assert "\n" not in str(error.value)
    assert engine.count() == 0
    with pytest.raises(DataError, match="query"):
        engine.search(np.array(terms), np.array(weights), 10)


def test_wrong_types_are_refused(engine):
    with pytest.raises(OptionError, match="`about` is a str"):
        engine.create("m")
    with pytest.raises(OptionError, match="`ids` is one str"):
        engine.delete("a")
    for bad, message in (
        (Document("", "x"), "`documents` is a Document; give a list of anysplade.EncodedDocument"),
        (encoded("a", [1], [1], text=None), "document 'a': \"text\" is null"),
        (encoded("a", [1], [1], metadata="lang=en"), "document 'a': \"metadata\" is not an object"),
        (encoded("", [1], [1]), "its id is empty"),
    ):
        with pytest.raises((DataError, OptionError), match=message):
            engine.upload([bad])


def test_what_json_cannot_hold_is_refused(engine):
    for bad in (
        encoded("bad", [1], [1], text="\ud800"),
        encoded("bad", [1], [1], metadata={"x": float("nan")}),
        encoded("bad", [1], [1], metadata={"x": object()}),
    ):
        with pytest.raises(DataError, match=r"'bad'.*JSON"):
            engine.upload([bad])
    for options in ({"batch": 0}, {"batch": -1}):
        with pytest.raises(OptionError, match="batch"):
            engine.upload([encoded("a", [1], [1])], **options)
    with pytest.raises(OptionError, match="`k` is 0"):
        engine.search(np.array([1]), np.array([1.0]), 0)


# ---------------------------------------------------------------------------------------------- OpenSearch


def test_the_mapping_is_as_documented(opensearch, server):
    (create,) = (json.loads(body) for method, path, body in server.requests if (method, path) == ("PUT", "/docs"))
    fields = create["mappings"]["properties"]
    assert fields["vector"] == {"type": "rank_features"}
    assert fields["metadata"] == {"type": "object", "enabled": False}
    opensearch.upload([encoded("a", [1, 40_000], [0.5, 2.0], "t", "x", {"lang": "en"})])
    bulk = next(body for _, path, body in server.requests if path == "/docs/_bulk")
    action, source = map(json.loads, bulk.splitlines())
    assert action == {"index": {"_id": "a"}}
    assert source.pop("hash")
    tags = {"names": ["lang"], "values": ["lang=en"]}
    assert source == {"id": "a", "title": "t", "text": "x", "metadata": {"lang": "en"}, "vector": {"1": 0.5, "40000": 2.0}} | tags


def test_a_long_query_keeps_its_largest_weights(opensearch):
    terms, weights = np.arange(2000), np.arange(1, 2001).astype(np.float32)
    opensearch.upload([encoded("all", terms, np.ones(2000), metadata={"lang": "en"}), encoded("small", [0], [1])])
    (hit,) = opensearch.search(terms, weights, 10)
    assert hit.score == weights[-1024:].sum()
    (hit,) = opensearch.search(terms, weights, 10, {"lang": "en"})
    assert hit.score == weights[-1023:].sum()


def test_a_busy_server_is_asked_again(opensearch, server):
    busy = (429, "rejected_execution_exception", "rejected execution of coordinating operation")
    server.faults = [("_mget", 503), ("_bulk", 429), ("_bulk", 429), ("_bulk", busy), ("_refresh", 503)]
    assert opensearch.upload([encoded("a", [1], [1]), encoded("b", [1], [1])]) == 2
    assert server.faults == []
    assert opensearch.count() == 2
    server.faults = [("_bulk", 429)] * 6
    with pytest.raises(AnyspladeError, match=r"429.*too many requests"):
        opensearch.upload([encoded("c", [1], [1])])


def test_what_the_server_refuses_is_not_sent_again(opensearch, server):
    server.faults = [("_bulk", 500)]
    with pytest.raises(AnyspladeError, match="500"):
        opensearch.upload([encoded("a", [1], [1])])
    before = len(server.requests)
    server.faults = [("_bulk", (400, "mapper_parsing_exception", "failed to parse field [vector]"))]
    with pytest.raises(AnyspladeError, match=r"400 document 'a'.*failed to parse field .vector.") as error:
        opensearch.upload([encoded("a", [1], [1]), encoded("b", [1], [1])])
    assert "\n" not in str(error.value)
    assert sum(path.endswith("_bulk") for _, path, _ in server.requests[before:]) == 1
    assert opensearch.upload([encoded("a", [1], [1]), encoded("b", [1], [1])]) == 1


def test_weights_that_lucene_refuses_count_for_nothing(opensearch):
    opensearch.upload([encoded("a", [1, 2], [1e-40, 1])])
    assert [hit.id for hit in opensearch.search(np.array([1, 2]), np.array([1.0, 1.0]), 5)] == ["a"]


# --------------------------------------------------------------------------------------- Qdrant over HTTP


class QdrantServer(ThreadingHTTPServer):
    """Knows one collection and takes points, at the third try."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        memory = QdrantClient(":memory:")
        QdrantEngine(memory, "docs").create(ABOUT)
        self.info = json.loads(memory.get_collection("docs").model_dump_json())
        self.requests, self.faults = [], []

    def answer(self, method, path, query, body):
        match method, path:
            case "GET", "/collections/docs/exists":
                result = {"exists": True}
            case "GET", "/collections/docs":
                result = self.info
            case "POST", "/collections/docs/points":
                assert set(json.loads(body)) == {"ids", "with_payload", "with_vector"}
                result = []
            case "PUT", "/collections/docs/points":
                assert query == {"wait": ["true"]}
                if self.faults:
                    refused = RefusedError(self.faults.pop(), "", "")
                    refused.answer = {"status": {"error": "no\nroom"}, "time": 0.0}
                    raise refused
                result = {"operation_id": 1, "status": "completed"}
        return {"result": result, "status": "ok", "time": 0.001}


def test_qdrant_over_http(serve):
    server = serve(QdrantServer())
    engine = QdrantEngine.at("127.0.0.1", server.server_port, "docs")
    assert engine.about() == ABOUT | {"tagged": True}
    server.faults = [429, 503]
    assert engine.upload([encoded("a/b", [3, 250_001], [0.5, 2], "t", "x", {"lang": "en"}), encoded("e", [], [])]) == 2
    puts = [json.loads(body)["points"] for method, _, body in server.requests if method == "PUT"]
    assert len(puts) == 3
    point, empty = puts[0]
    assert point["id"] == str(uuid.uuid5(uuid.NAMESPACE_OID, "a/b"))
    assert point["vector"] == {"splade": {"indices": [3, 250_001], "values": [0.5, 2]}}
    assert point["payload"].pop("hash")
    tags = {"names": ["lang"], "values": ["lang=en"]}
    assert point["payload"] == {"id": "a/b", "title": "t", "text": "x", "metadata": {"lang": "en"}} | tags
    assert empty["vector"] == {}
    for status, mend in ((400, "no room"), (401, "QDRANT_API_KEY")):
        server.faults = [status]
        with pytest.raises(AnyspladeError, match=mend) as error:
            engine.upload([encoded("a", [1], [1])])
        assert "\n" not in str(error.value)


def test_the_terms_of_a_hit_sum_to_its_score_but_for_the_rounding(opensearch, backbone, collection_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "open_engine", lambda address: OpenSearchEngine(opensearch.client, "tiny"))
    index = RemoteIndex.build(backbone, collection_folder, "opensearch://localhost/docs", tmp_path, top_k=8)
    hits = index.search("kabel lodan mifil", k=40, explain=True)
    assert len(hits) > 5
    for hit in hits:
        whole = sum(term.product for term in hit.terms)
        assert whole * (1 - 2**-8) * (1 - 1e-5) <= hit.score <= whole * (1 + 1e-5)


# ----------------------------------------------------------------------------------------------- addresses


def test_addresses(monkeypatch):
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    engine = open_engine("qdrants://host.example:7000/docs")
    assert (type(engine), engine.name) == (QdrantEngine, "docs")
    assert engine.client._client.rest_uri == "https://host.example:7000"
    assert engine.client._client._rest_headers["api-key"] == "secret"
    engine = open_engine("opensearchs://me:p%40ss@host.example/docs-1")
    assert (type(engine), engine.name) == (OpenSearchEngine, "docs-1")
    connection = engine.client.transport.hosts[0]
    assert (connection["host"], connection["port"]) == ("host.example", 9200)
    assert engine.client.transport.kwargs["http_auth"] == ("me", "p@ss")
    assert engine.client.transport.kwargs["use_ssl"]


@pytest.mark.parametrize(
    "address",
    ["docs", "http://localhost/docs", "qdrant://localhost:6333", "qdrant://localhost/a/b", "qdrant://localhost:x/docs",
     "opensearch://localhost/Docs", "opensearch://localhost/_docs", "opensearch://u:hunter2@localhost/*", "qdrant:///docs",
     "opensearch://u:hunter2/x@localhost/docs", "opensearch://u:12/hunter2@localhost/docs", "u:hunter2@localhost:9200/docs",
     "opensearch://u:hunter2 x@localhost/*", "qdrant://u:hunter2@localhost/docs", "qdrant://localhost/docs?x=1",
     "opensearch://u:hunter2@[::1/docs", "", "qdrantss://h/n"],
)  # fmt: skip
def test_malformed_addresses(address):
    with pytest.raises(OptionError, match=r"such as|QDRANT_API_KEY") as error:
        open_engine(address)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("kind, library", [("qdrant", "qdrant_client"), ("opensearch", "opensearchpy")])
def test_a_missing_library_is_named_with_its_extra(kind, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"anysplade.search.engines.{kind}")
    with pytest.raises(ExtraError, match=rf'pip install "anysplade\[{kind}\]"'):
        open_engine(f"{kind}://localhost/docs")


@pytest.mark.parametrize("scheme", ["qdrant", "opensearch"])
def test_a_server_that_is_not_there(scheme):
    engine = open_engine(f"{scheme}://127.0.0.1:9/docs")
    with pytest.raises(AnyspladeError, match="check its address") as error:
        engine.create(ABOUT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "variable",
    [
        pytest.param(variable, marks=pytest.mark.skipif(variable not in os.environ, reason=f"{variable} names no server"))
        for variable in ("QDRANT_URL", "OPENSEARCH_URL")
    ],
)
def test_a_real_server(variable):
    """QDRANT_URL=qdrant://localhost:6333, OPENSEARCH_URL=opensearch://user:password@localhost:9200: a new index is made there."""
    engine = open_engine(f"{os.environ[variable].rstrip('/')}/anysplade-test-{uuid.uuid4().hex}")
    engine.create(ABOUT)
    try:
        assert engine.about() == ABOUT | {"tagged": True}
        for check in (
            test_any_text_is_an_id,
            test_only_documents_with_a_shared_term_are_found,
            test_filter_is_equality_of_metadata,
            test_search_is_the_dot_product,
            test_what_an_index_was_made_with_is_kept_and_held_to,
        ):
            check(engine)
            engine.delete([*HOSTILE, "a", "b", "empty", *(f"d{i}" for i in range(300))])
            assert engine.count() == 0
    finally:
        if isinstance(engine, QdrantEngine):
            engine.client.delete_collection(engine.name)
        else:
            engine.client.indices.delete(index=engine.name)


# ------------------------------------------------------------------------------------------------- exports

TOKENS = ["the", "▁dog", "Ġcat", "  ", "", "twice", "twice", "ﬁ.sh", "🦜", "\ud800", "\n", "zebra"]
NAMES = ["the", "▁dog", "Ġcat", "[term:3]", "[term:4]", "[term:5]", "[term:6]", "ﬁ.sh", "🦜", "[term:9]", "[term:10]", "zebra"]


def small_rows(rows=50):
    rng = np.random.default_rng(3)
    dense = np.where(rng.random((rows, len(TOKENS))) < 0.5, rng.gamma(1, 1, (rows, len(TOKENS))), 0).astype(np.float32)
    dense[0] = 0  # a document without a term
    dense[:, 11] = 0  # a term without a document
    dense[1, 0] = 1e-6  # rounds to zero
    dense[2, 0] = 1000.0  # a long varint
    return sparse.csr_matrix(dense)


def quantized(rows, quantization=100):
    return np.rint(rows.toarray().astype(np.float64) * quantization).astype(int)


def test_anserini(tmp_path, monkeypatch):
    monkeypatch.setattr("anysplade.search.engines.export._DOCUMENTS_PER_FILE", 20)
    rows = small_rows()
    assert export_anserini(from_rows(rows), TOKENS, tmp_path / "out") == 50
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["0000.jsonl", "0001.jsonl", "0002.jsonl"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"d{i}" for i in range(50)]
    assert lines[1]["contents"] == "title 1 text 1"
    found = np.array([[line["vector"].get(name, 0) for name in NAMES] for line in lines])
    np.testing.assert_array_equal(found, quantized(rows))
    assert all(set(line["vector"]) <= set(NAMES) and 0 not in line["vector"].values() for line in lines)


def test_queries_for_anserini_rank_as_the_vectors_do(tmp_path):
    rows = small_rows()[3:]
    ids = [f"q{i}" for i in range(rows.shape[0])]
    assert export_queries(ids, rows, TOKENS, tmp_path / "queries.tsv") == len(ids)
    lines = [line.split("\t") for line in (tmp_path / "queries.tsv").read_text().splitlines()]
    assert [id_ for id_, _ in lines] == ids
    counts = np.array([[text.split().count(name) for name in NAMES] for _, text in lines])
    np.testing.assert_array_equal(counts, quantized(rows))
    with pytest.raises(DataError, match="query 'a b': an empty id, or one with white space"):
        export_queries(["a b"], rows[:1], TOKENS, tmp_path / "more.tsv")
    assert not (tmp_path / "more.tsv").exists()


def ciff_messages():
    """Google's reader of https://github.com/osirrc/ciff/blob/master/src/main/protobuf/CommonIndexFileFormat.proto."""
    kinds = {"int32": 5, "int64": 3, "double": 1, "string": 9, "Posting": 11}
    messages = {
        "Header": "int32 version, int32 num_postings_lists, int32 num_docs, int32 total_postings_lists, int32 total_docs, "
        "int64 total_terms_in_collection, double average_doclength, string description",
        "Posting": "int32 docid, int32 tf",
        "PostingsList": "string term, int64 df, int64 cf, Posting postings",
        "DocRecord": "int32 docid, string collection_docid, int32 doclength",
    }
    file = descriptor_pb2.FileDescriptorProto(name="ciff.proto", package="ciff", syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(", "), 1):
            kind, field_name = field.split()
            added = message.field.add(name=field_name, number=number, type=kinds[kind], label=3 if kind == "Posting" else 1)
            if kind == "Posting":
                added.type_name = ".ciff.Posting"
    return message_factory.GetMessages([file], pool=descriptor_pool.DescriptorPool())


def read_ciff(path):
    kinds, data, at = ciff_messages(), path.read_bytes(), 0

    def read(name):
        nonlocal at
        size, shift = 0, 0
        while True:
            byte = data[at]
            at, size, shift = at + 1, size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        message = kinds[f"ciff.{name}"].FromString(data[at : at + size])
        at += size
        return message

    header = read("Header")
    lists = [read("PostingsList") for _ in range(header.num_postings_lists)]
    records = [read("DocRecord") for _ in range(header.num_docs)]
    assert at == len(data)
    return header, lists, records


def test_ciff(tmp_path):
    rows = small_rows(400)
    assert export_ciff(from_rows(rows), TOKENS, tmp_path / "new" / "index.ciff") == 400
    header, lists, records = read_ciff(tmp_path / "new" / "index.ciff")
    exact = quantized(rows)
    used = [NAMES[term] for term in np.flatnonzero(exact.any(axis=0))]
    assert [postings.term for postings in lists] == sorted(used, key=str.encode)
    found = np.zeros_like(exact)
    for postings in lists:
        numbers = np.cumsum([posting.docid for posting in postings.postings])
        found[numbers, NAMES.index(postings.term)] = [posting.tf for posting in postings.postings]
        assert (postings.df, postings.cf) == (len(numbers), found[:, NAMES.index(postings.term)].sum())
    np.testing.assert_array_equal(found, exact)
    assert [(record.docid, record.collection_docid) for record in records] == [(i, f"d{i}") for i in range(400)]
    assert [record.doclength for record in records] == exact.sum(axis=1).tolist()
    assert (header.version, header.total_docs, header.total_postings_lists) == (1, 400, len(lists))
    assert header.total_terms_in_collection == exact.sum()
    assert header.average_doclength == exact.sum() / 400
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["index.ciff"]


def read_jsonl(folder):
    """Postings of Anserini's JSONL: {term: {document: impact}}."""
    postings = {}
    for line in map(json.loads, (folder / "0000.jsonl").read_text().splitlines()):
        for term, impact in line["vector"].items():
            postings.setdefault(term, {})[line["id"]] = impact
    return postings


def read_postings(path):
    """Postings of a CIFF, as ``read_jsonl`` gives them."""
    _, lists, records = read_ciff(path)
    ids = {record.docid: record.collection_docid for record in records}
    numbers = [np.cumsum([posting.docid for posting in one.postings]).tolist() for one in lists]
    return {
        one.term: {ids[number]: posting.tf for number, posting in zip(found, one.postings, strict=True)}
        for one, found in zip(lists, numbers, strict=True)
    }


@pytest.mark.parametrize(
    "export, name, read", [(export_anserini, "out", read_jsonl), (export_ciff, "out.ciff", read_postings)], ids=["jsonl", "ciff"]
)
def test_the_files_rank_as_the_exact_integers_do_and_nearly_as_the_floats(export, name, read, tmp_path):
    """Another scorer, term by term over the words of the files, as the engines that read them."""
    rng = np.random.default_rng(0)
    tokens = [f"t{term}" for term in range(200)]
    dense = np.where(rng.random((340, 200)) < 0.1, rng.gamma(2, 0.5, (340, 200)), 0).astype(np.float32)
    documents, queries = sparse.csr_matrix(dense[:300]), sparse.csr_matrix(dense[300:])
    export(from_rows(documents), tokens, tmp_path / name)
    export_queries([f"q{i}" for i in range(40)], queries, tokens, tmp_path / "queries.tsv")
    postings = read(tmp_path / name)
    exact = quantized(queries) @ quantized(documents).T
    floats = (queries @ documents.T).toarray()
    taus, shared = [], []
    for row, line in enumerate((tmp_path / "queries.tsv").read_text().splitlines()):
        scores = np.zeros(300, int)
        for word in line.split("\t")[1].split():
            for id_, impact in postings.get(word, {}).items():
                scores[int(id_[1:])] += impact
        np.testing.assert_array_equal(scores, exact[row])
        taus.append(kendalltau(scores, floats[row]).statistic)
        shared.append(len({*np.argsort(-scores)[:10]} & {*np.argsort(-floats[row])[:10]}) / 10)
    assert np.mean(taus) > 0.997
    assert np.mean(shared) == 1


@pytest.mark.parametrize("gap", [1, 127, 128, 2**14 - 1, 2**14, 2**21, 2**28, 2**31 - 1])
def test_varints_of_all_lengths(gap):
    from anysplade.search.engines.export import _postings

    message = ciff_messages()["ciff.PostingsList"].FromString(_postings(np.array([0, gap]), np.array([gap, 1])))
    assert [(posting.docid, posting.tf) for posting in message.postings] == [(0, gap), (gap, 1)]


@pytest.mark.parametrize("export", [export_anserini, export_ciff])
def test_exports_refuse_what_cannot_stand_there(export, tmp_path):
    out = tmp_path / "out"
    good = encoded("a", [1], [1])
    for documents, message in (
        ([good, good], "'a': duplicate id"),
        ([encoded("", [1], [1])], "white space"),
        ([encoded("a b", [1], [1])], "white space"),
        ([encoded("a", [12], [1])], "vocabulary of 12"),
        ([encoded("a", [1], [np.nan])], "'a'.*finite"),
        ([encoded("a", [1], [1e30])], "int32"),
        *([] if export is export_anserini else [([encoded("a", [1, 2], [2e7, 2e7])], "sum times 100")]),
    ):
        with pytest.raises(DataError, match=message):
            export(documents, TOKENS, out)
        assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"\[term:ID\]"):
        export([good], ["", "[term:0]"], out)
    with pytest.raises(OptionError, match="quantization"):
        export([good], TOKENS, out, quantization=0)
    assert export([], TOKENS, out) == 0
    out.mkdir(exist_ok=True) if export is export_anserini else out.unlink()
    (out / "x").mkdir(parents=True)
    with pytest.raises(OutputError):
        export([good], TOKENS, out)


def test_the_same_file_from_hand_written_bytes(tmp_path):
    """The format, spelled out once: two documents, one term."""
    export_ciff([encoded("a", [0], [1.0]), encoded("b", [0], [2.0])], ["x"], tmp_path / "f", quantization=1)
    said = b"anysplade; impacts are weights times 1"
    header = b"\x08\x01\x10\x01\x18\x02\x20\x01\x28\x02\x30\x03\x39" + struct.pack("<d", 1.5) + b"\x42" + bytes([len(said)]) + said
    postings = b"\x0a\x01x\x10\x02\x18\x03\x22\x04\x08\x00\x10\x01\x22\x04\x08\x01\x10\x02"
    records = [b"\x08\x00\x12\x01a\x18\x01", b"\x08\x01\x12\x01b\x18\x02"]
    expected = b"".join(bytes([len(message)]) + message for message in (header, postings, *records))
    assert (tmp_path / "f").read_bytes() == expected
