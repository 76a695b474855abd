import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from anysplade import DataError, Index, ModelError, OptionError, OutputError, load_collection, load_encoder
from anysplade.evaluation import evaluate
from anysplade.index import Postings


@pytest.fixture
def built(backbone, collection_folder, tmp_path):
    load_encoder(backbone, k=1, shift=0).save_pretrained(str(tmp_path / "model"))
    return Index.build(tmp_path / "model", collection_folder, tmp_path / "index")


@settings(max_examples=60, deadline=None)
@given(
    documents=st.integers(1, 30),
    vocabulary=st.integers(1, 20),
    density=st.floats(0, 1),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    levels=st.integers(1, 4),
)
def test_top_is_the_dense_product(documents, vocabulary, density, k, seed, levels):
    generator = np.random.default_rng(seed)
    matrix = generator.integers(0, levels + 1, (documents, vocabulary)) * (generator.random((documents, vocabulary)) < density)
    query = generator.integers(0, levels + 1, vocabulary) * 0.5
    terms = np.flatnonzero(query)
    postings = Postings.from_documents(sparse.csr_matrix(matrix.astype(np.float32)))
    found, scores = postings.top(terms, query[terms].astype(np.float32), k)
    expected = matrix @ query
    order = [d for d in np.argsort(-expected, kind="stable") if expected[d] > 0][:k]  # ties in corpus order
    assert found.tolist() == order
    assert np.array_equal(scores, expected[order])
    for term in range(vocabulary):
        assert postings.weight(term, 0) == matrix[0, term]


def test_search_and_explain(built, tmp_path):
    index = Index.load(tmp_path / "index")
    assert len(index) == 40
    hits = index.search("kabel lodan mifil", k=5, explain=True)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits == built.search("kabel lodan mifil", k=5, explain=True)
    for hit in hits:
        assert sum(match.product for match in hit.terms) == pytest.approx(hit.score, rel=1e-9)
        assert [m.product for m in hit.terms] == sorted((m.product for m in hit.terms), reverse=True)
        for match in hit.terms:
            assert match.product == match.query_weight * match.document_weight
    vectors = index.encoder.encode(["kabel lodan mifil", hits[0].text], convert_to_sparse_tensor=False)
    assert hits[0].score == pytest.approx(float(vectors[0] @ vectors[1]), rel=1e-4)
    assert built.search("kabel", k=3)[0].terms is None


def test_index_and_evaluation_agree(built, collection_folder, tmp_path):
    run = evaluate(tmp_path / "model", collection_folder).run
    for query_id, text in load_collection(collection_folder).queries.items():
        assert {hit.id: pytest.approx(hit.score, rel=1e-5) for hit in built.search(text, k=1000)} == run[query_id]


def test_more_hits_than_documents(built):
    assert len(built.search("kabel", k=1000)) <= 40
    with pytest.raises(OptionError, match="at least 1"):
        built.search("kabel", k=0)


def test_mistakes(built, backbone, collection_folder, tmp_path):
    with pytest.raises(OutputError, match="not empty"):
        Index.build(backbone, collection_folder, tmp_path / "index")
    with pytest.raises(DataError, match="no index there"):
        Index.load(tmp_path)
    (tmp_path / "index" / "weights.npy").write_bytes(b"torn")
    with pytest.raises(DataError, match="damaged"):
        Index.load(tmp_path / "index")


def test_another_model_in_the_place_of_the_old_is_noticed(built, backbone, tmp_path):
    load_encoder(backbone, k=3, shift=0).save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ModelError, match="changed since"):
        Index.load(tmp_path / "index").search("kabel")


def test_a_failed_build_leaves_nothing(backbone, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"_id": "a", "text": "kabel"}\n{"_id": "b"}\n')
    with pytest.raises(DataError):
        Index.build(backbone, tmp_path / "bad.jsonl", tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
