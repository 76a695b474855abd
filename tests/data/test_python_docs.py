import pytest

from anysplade import DataError
from anysplade.data.collections import load_python_docs
from anysplade.data.python_docs import Docstring, split_entries


def docstring(name, summary, rest):
    return Docstring(name, f"{summary}\n\n{rest}")


LONG = " ".join(f"word{i}" for i in range(40))


def test_python_docs_leaves_out_what_would_make_the_task_easy_or_void():
    other = " ".join(f"other{i}" for i in range(40))
    entries = [
        docstring("p.a.b.f", "Find the root of it.", LONG),
        docstring("p.a.b.near_copy", "Something else it is.", LONG + " and more"),
        docstring("p.a.b.same_query", "Find the root of it", other),
        docstring("p.a.b.inside", "The answer stands here.", other + " the answer stands here " + other),
        docstring("p.a.c._private", "A summary of private things.", other),  # p.a.c is held out, p.a.b is not
        docstring("p.a.b.short", "A summary of short things.", "too short"),
        Docstring("p.a.b.wrapped", f"A summary that goes\non in the next line.\n\n{other}"),
    ]
    train, test = split_entries(entries)
    assert [entry.name for entry in train + test] == ["p.a.b.f"]


def test_python_docs_keeps_near_copies_out_of_training():
    """Test documents come first, so that of two alike the one in training goes."""
    train, test = split_entries(
        [docstring("p.a.b.f", "Find the root of it.", LONG), docstring("p.a.c.g", "Quite another summary.", LONG)]
    )
    assert [entry.name for entry in test] == ["p.a.c.g"]
    assert train == []


def test_python_docs_of_the_environment():
    collection, pairs = load_python_docs(("networkx",))
    assert (collection, pairs) == load_python_docs(("networkx",))
    assert len(collection.corpus) > 100
    assert len(pairs) > 100
    for query_id, text in collection.queries.items():
        (document_id,) = collection.qrels[query_id]
        assert text.lower() not in collection.corpus[document_id].text.lower()
    held_out = {".".join(name.split(".")[:3]) for name in collection.corpus}
    assert all(Docstring(module, "").held_out for module in held_out)
    documents = {document.text for document in collection.corpus.values()}
    assert not documents & {pair.positive for pair in pairs}


def test_python_docs_of_a_package_that_is_not_there():
    with pytest.raises(DataError, match="package 'no-such-package' is not installed"):
        load_python_docs(("no-such-package",))
