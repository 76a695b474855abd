import numpy as np
import pytest
from scipy import sparse

from anysplade._common import row_file
from anysplade.search import exact


@pytest.mark.parametrize("k", [1, 2, 5, 30, 200])
def test_the_nearest_are_those_of_a_whole_ranking(k, monkeypatch):
    monkeypatch.setattr(exact, "_BLOCK", 200)  # two queries at a time
    generator = np.random.default_rng(k)
    queries, documents = (generator.integers(-3, 4, (rows, 2)).astype(np.float32) for rows in (5, 100))  # with ties
    for scores, (places, found) in zip(queries @ documents.T, exact.nearest(queries, documents, k), strict=True):
        order = np.argsort(-scores, kind="stable")[:k]
        assert places.tolist() == order.tolist()
        assert found.tolist() == scores[order].tolist()


def sparse_rows(generator, rows, width, integers):
    dense = generator.integers(0, 3, (rows, width)) if integers else generator.random((rows, width))
    dense[generator.random((rows, width)) < 0.7] = 0
    return sparse.csr_matrix(dense.astype(np.float32))


@pytest.mark.parametrize("k", [1, 3, 20, 500])
@pytest.mark.parametrize("integers", [True, False])  # with many ties, and without
def test_blocks_and_threads_change_nothing(k, integers, monkeypatch):
    monkeypatch.setattr(exact, "_DOCUMENTS", 32)
    monkeypatch.setattr(exact, "_NONZEROS", 200)
    monkeypatch.setattr(exact, "_QUERIES", 3)
    generator = np.random.default_rng(k)
    documents, queries = sparse_rows(generator, 300, 20, integers), sparse_rows(generator, 10, 20, integers)
    queries = sparse.vstack([queries, sparse.csr_matrix((1, 20), dtype=np.float32)], format="csr")  # the last one is empty
    expected = exact.Postings.from_documents(documents).top_rows(queries, k)
    for found, (places, scores) in zip(exact.top_rows(documents, queries, k, workers=2), expected, strict=True):
        assert found[0].tolist() == places.tolist()
        assert found[1].tolist() == scores.tolist()


def test_rows_in_files_are_those_in_memory(monkeypatch):
    blocks = [sparse_rows(np.random.default_rng(i), rows, 20, False) for i, rows in enumerate((3, 0, 7, 1))]
    for limit in (0, 20, 10_000):
        monkeypatch.setattr(row_file, "_IN_MEMORY", limit)
        rows = row_file.RowFile()
        for block in blocks:
            rows.append(block)
        whole = rows.matrix(20)
        assert isinstance(whole.data.base, np.memmap) == (limit < 100)
        assert (whole != sparse.vstack(blocks)).nnz == 0
        assert (whole[4].toarray() == blocks[2][1].toarray()).all()


@pytest.mark.parametrize("k", [1, 5, 200])
def test_a_document_of_several_rows_has_the_highest_score(k, monkeypatch):
    monkeypatch.setattr(exact, "_DOCUMENTS", 16)
    monkeypatch.setattr(exact, "_NONZEROS", 200)
    generator = np.random.default_rng(k)
    groups = np.cumsum([0, *generator.integers(1, 6, 100)])
    documents, queries = sparse_rows(generator, groups[-1], 20, True), sparse_rows(generator, 10, 20, True)
    scores = np.maximum.reduceat((queries @ documents.T).toarray(), groups[:-1], axis=1)
    found = exact.top_rows(documents, queries, k, groups=groups)
    dense = exact.nearest(queries.toarray(), documents.toarray(), k, groups)
    for row, one, other in zip(scores, found, dense, strict=True):
        places, best = exact.highest(row, k)
        assert one[0].tolist() == places.tolist()
        assert one[1].tolist() == best.tolist()
        assert other[0].tolist() == np.argsort(-row, kind="stable")[:k].tolist()
