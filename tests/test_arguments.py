"""What a notebook user gets nearly right is an error with the fix, before any work."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

import anysplade
from anysplade import Document, Index, UsageError
from tiny import make_lexical


@pytest.fixture(scope="module")
def parts(tmp_path_factory, collection_folder):
    """What the calls below need, by name."""
    folder = tmp_path_factory.mktemp("parts")
    model, index = make_lexical(folder / "splade"), folder / "index"
    Index.build(model, {"a": Document("", "kabel lodan")}, index).close()
    with Index.load(index) as opened:
        yield {
            "model": model,
            "encoder": anysplade.load_encoder(model, 1, 0),
            "masked": AutoModelForMaskedLM.from_pretrained(model),
            "data": str(collection_folder),
            "collection": anysplade.load_collection(collection_folder),
            "index": opened,
            "evaluation": anysplade.evaluate("bm25", collection_folder),
            "out": folder / "deep" / "out",
            "document": Document("", "kabel lodan"),
            **{name: getattr(anysplade, name) for name in anysplade.__all__ if name != "__version__" and name not in ("score",)},
        }


@pytest.mark.parametrize(
    "call, message",
    [
        ("evaluate('bm25', data, [7])", "`metrics` is a int; give names"),
        ("evaluate('bm25', data, 'ndcg10')", "did you mean nDCG@10?"),
        ("evaluate('bm25', ['cranfield'])", "`collection` is a list; give a path or a name"),
        ("evaluate(7, data)", "a int, not a model's folder"),
        ("evaluate_all('bm25', [7])", "`collections` is a int; give names, paths"),
        ("evaluate(['bm25', model], data)", "`model` is a list; give one model, or several to anysplade.evaluate_all"),
        ("compare([evaluation])", "no two are of the same collection"),
        ("compare([evaluation, evaluation], 'deb')", "`collections` is a str; give collections by name"),
        ("export_anserini('index2', 'x', out)", "`documents` is a str; give index.store"),
        ("export_ciff('index2', 'x', out)", "`documents` is a str; give index.store"),
        ("export_queries('ab', None, [], out)", "`ids` is one str, so each letter would be a id; give a list: [id]"),
        ("index.delete('ab')", "`ids` is one str, so each letter would be a id; give a list: [id]"),
        ("index.delete([1])", "`ids`: item 1 is a int"),
        ("index.delete(None)", "`ids` is a NoneType; give a list: [id]"),
        ("index.queries.encode('ab')", "`texts` is one str"),
        ("index.search('')", "the query is empty; give a text"),
        ("index.search(' \\n')", "the query is empty; give a text"),
        ("compare(7)", "`evaluations` is a int; give a list"),
        ("index.search(['a', 'b'])", "`query` is a list; give one text"),
        ("index.search(None)", "`query` is a NoneType; give one text"),
        ("index.search('kabel', k='10')", "`k` is '10': it must be a whole number"),
        ("index.search('kabel', k=0)", "`k` is 0: it is at least 1"),
        ("index.search('kabel', k=2.5)", "`k` is 2.5: it must be a whole number"),
        ("open_index(index)", "`place` is a Index; give an index's folder or address"),
        ("Index.load(index)", "`folder` is a Index; give an index's folder"),
        ("Index.build(encoder, data, out)", "a SparseEncoder, not a model's folder"),
        ("Index.build(model, ['a text'], out)", "documents are a list"),
        ("Index.build(model, collection, out)", "documents are a Collection"),
        ("calibrate(model, None)", "`model` is a str; give a loaded masked LM"),
        ("calibrate(model, None, k=8, shift=0)", "`model` is a str; give a loaded masked LM"),
        ("rescale_head(model)", "`model` is a str; give a loaded masked LM"),
        ("rescale_head(encoder, 1, 0)", "`model` is a SparseEncoder; give a loaded masked LM"),
        ("fold_head(model, None)", "`model` is a str; give a loaded masked LM"),
        ("inspect_head(encoder)", "a SparseEncoder, not a model's folder"),
        ("load_encoder(masked)", "a BertForMaskedLM, not a model's folder"),
        ("open_encoder(encoder)", "a SparseEncoder, not a model's folder"),
        ("for_inference(model)", "`encoder` is a str; give a SparseEncoder; anysplade.open_encoder opens one"),
        ("encode(model, ['a'], 'query')", "`encoder` is a str"),
        ("terms(None, model)", "`encoder` is a str"),
        ("load_collection(['cranfield'])", "`collection` is a list; give a path or a name"),
        ("load_collection(collection)", "`collection` is a Collection; give a path or a name"),
        ("read_corpus({'a': document})", "`corpus` is a dict; give a path or a name"),
        ("load_pairs([('query', 'positive')])", "`training_data` is a list; give a path or a name"),
        ("list(read_pairs(None))", "`training_data` is a NoneType"),
        ("make_pairs({'a': document}, out)", "`corpus` is a dict; give a path or a name"),
        ("write_collection(collection, out)", "`folder` is a Collection; the folder comes first"),
        ("write_collection(out, {'a': document})", "`collection` is a dict; give an anysplade.Collection"),
        ("mine(data, out, miner=[])", "no miner; name bm25 or a model"),
        ("mine(data, out, miner=encoder)", "`miner` is a SparseEncoder"),
        ("mine([('query', 'positive')], out)", "`training_data` is a list"),
        ("train({'backbone': model, 'data': data})", "`config` is a dict; give anysplade.TrainingConfig"),
        ("train(model, data)", "`config` is a str; give anysplade.TrainingConfig"),
        ("TrainingConfig(encoder, data, output='x')", "backbone is SparseEncoder"),
        ("run_study('main')", "`config` is a str; give anysplade.StudyConfig"),
        ("train_head(encoder, data, out)", "`encoder` is a SparseEncoder"),
        ("train_head(model, ['a text'], out)", "`text` is a list"),
        ("adapt(encoder, data, out, teacher=model)", "a SparseEncoder, not a model's folder"),
        ("adapt(model, {'a': document}, out, teacher=model)", "`corpus` is a dict; give a path or a name"),
        ("adapt(model, data, out, teacher=encoder)", "a SparseEncoder, not a model's folder"),
    ],
)
def test_inputs_that_are_nearly_right(call, message, parts):
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        eval(call, dict(parts))
    assert "\n" not in str(raised.value)
    assert not Path(parts["out"]).parent.exists()
