"""Arguments that were mistaken for each other, and names that are nearly right."""

from shlex import split as shlex_split

import pytest

from anysplade import load_collection, load_encoder, write_collection
from anysplade.cli import main
from anysplade.data.names import held, resolve
from anysplade.errors import DataError, ModelError
from anysplade.model.saved import resolve_model
from tiny import make_lexical


@pytest.fixture(scope="module")
def here(tmp_path_factory, collection_folder, static_index, teachers):
    """A working directory with one of each: splade, dense, cranfield, idx, run.trec."""
    folder = tmp_path_factory.mktemp("here")
    make_lexical(folder / "splade")
    make_lexical(folder / "trained run" / "model")
    write_collection(folder / "cranfield", load_collection(collection_folder))
    (folder / "idx").symlink_to(static_index)
    (folder / "dense").symlink_to(teachers["dense"])
    load_encoder(str(folder / "splade"), 1, 0).save_pretrained(str(folder / "sparse"))
    (folder / "run.trec").write_text("q0 Q0 d0 1 2.5 tag\n")
    (folder / "notes.txt").write_text("a text of six words here\n")
    (folder / "scores").mkdir()
    (folder / "scores" / "evaluation.json").write_text("{}")
    (folder / "empty").mkdir()
    for unfinished in ("begun/run.json", "changing/options.json", "growing.parts/about.json"):
        (folder / unfinished).parent.mkdir()
        (folder / unfinished).write_text("{}")
    return folder


@pytest.fixture
def refused(here, monkeypatch, capfd):
    """The one line that a command is refused with."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(here.rglob("*"))

    def run(*arguments):
        assert main(list(arguments)) == 2
        out, err = capfd.readouterr()
        assert (out, len(err.splitlines())) == ("", 1), err
        assert sorted(here.rglob("*")) == before  # nothing is in the way of the corrected command
        return err.strip()

    return run


@pytest.mark.parametrize(
    "name, kind",
    [
        ("splade", "a model"),
        ("sparse", "a model"),
        ("dense", "a dense model"),
        ("trained run", "a training run"),
        ("cranfield", "a collection"),
        ("cranfield/corpus.jsonl", "a corpus file"),
        ("idx", "an index"),
        ("run.trec", "a run file"),
        ("scores", "the results of an evaluation"),
        ("bert-tiny", "a model"),
        ("python-docs", "a collection"),
        ("nanobeir", "a collection"),
        ("nano-beir/scifact", "a collection"),
        ("bm25", "a ranking by words"),
        ("notes.txt", None),
        ("empty", None),
        ("nowhere", None),
        ("", None),
    ],
)
def test_what_a_name_holds(name, kind, here, monkeypatch):
    monkeypatch.chdir(here)
    assert held(name) == kind


@pytest.mark.parametrize(
    "command, message",
    [
        ("evaluate cranfield splade", "models come first: anysplade evaluate splade cranfield"),
        ("evaluate cranfield splade --metrics RR@10", "models come first: anysplade evaluate splade cranfield --metrics RR@10"),
        ("evaluate cranfield bm25", "models come first: anysplade evaluate bm25 cranfield"),
        ("evaluate cranfield org/on-the-hub", "models come first: anysplade evaluate org/on-the-hub cranfield"),
        ("evaluate splade cranfield run.trec", "models come first: anysplade evaluate splade run.trec cranfield"),
        (
            "index cranfield splade --out new",
            "cranfield is a collection, splade is a model; models come first: anysplade index splade",
        ),
        ("index cranfield/corpus.jsonl sparse --out new", "anysplade index sparse cranfield/corpus.jsonl --out new"),
        ("index python-docs bert-tiny --out new", "anysplade index bert-tiny python-docs --out new"),
        ("train cranfield splade --out new", "models come first: anysplade train splade cranfield --out new"),
        ("adapt cranfield splade --teacher dense --out new", "anysplade adapt splade cranfield --teacher dense --out new"),
        ("distil cranfield dense --out new", "models come first: anysplade distil dense cranfield --out new"),
        ("distil splade cranfield --out deep/new", "splade: not a dense model of sentence-transformers"),
        ("distil dense cranfeild --out deep/new", "did you mean cranfield?"),
        ("search heat idx", "idx is an index; the index comes first: anysplade search idx heat"),
        (
            "search splade heat",
            "no index there (index.json is missing), but a model; build one first",
        ),
        ("serve cranfield", "but a collection; build one first: anysplade index MODEL CORPUS --out INDEX"),
        ("search idxx heat", "no index there (index.json is missing); did you mean idx?"),
        ("index idx cranfield --out new", "idx: an index, not a model"),
        ("index bm25 cranfield --out new", "bm25: a ranking by words, not a model"),
        ("index run.trec cranfield --out new", "run.trec: a run file, not a model"),
        ("train run.trec cranfield --out new", "run.trec: a run file, not a model"),
        ("index splade idx --out new", "idx: an index, not a corpus"),
        ("index splade run.trec --out new", "run.trec: a run file, not a corpus"),
        ("evaluate splade idx", "idx: an index, not a collection"),
        ("evaluate splade sparse", "sparse: a model, not a collection"),
        ("compare run.trec run.trec --collection splade", "splade: a model, not a collection"),
        ("train splade dense --out new", "dense: a dense model, not training data"),
        ("mine splade --out new", "splade: a model, not training data"),
        ("mine cranfeild --out deep/new", "did you mean cranfield?"),
        ("evaluate spalde cranfield", "did you mean splade?"),
        ("evaluate Splade cranfield", "did you mean splade?"),
        ("evaluate ./spalde cranfield", "did you mean splade?"),
        ("evaluate splade cranfeild", "did you mean cranfield?"),
        ("index splade cranfeild/ --out deep/new", "did you mean cranfield?"),
        ("index splade cranfeild/corpus.jsonl --out new", "did you mean cranfield/corpus.jsonl?"),
        ("index splade cranfield/corpus.json --out new", "did you mean cranfield/corpus.jsonl?"),
        ("index splade ./cranfield/corpus.jsnl --out new", "did you mean cranfield/corpus.jsonl?"),
        ("evaluate 'trained rnu' cranfield", "did you mean trained run?"),
        ("index bert-tinny cranfield --out new", "did you mean bert-tiny?"),
        ("index splade python-doc --out deep/new", "did you mean python-docs?"),
        ("evaluate bm25 nanobier", "did you mean nanobeir?"),
        ("index splade nanobeir --out new", "stands for thirteen collections"),
        ("study mian --out new", "did you mean main?"),
        ("evaluate splade cranfield --metrics ndcg10", "did you mean nDCG@10?"),
        ("evaluate splade cranfield --metric RR@10", "Did you mean --metrics?"),
        ("train splade cranfield --out new --batchsize 3", "Did you mean --batch-size?"),
        ("train splade cranfield --out new --steps=ten", "--steps is 'ten': it must be a whole number or none"),
        ("train splade cranfield --out new --objective contrastiv", "did you mean contrastive?"),
        ("evalute splade cranfield", 'Did you mean "evaluate"?'),
        ("index ~nosuchuser/x cranfield --out new", "~nosuchuser/x: no such file or folder"),
        ("search ~nosuchuser/x heat", "~nosuchuser/x: no index there"),
        ("index splade cranfield --out ~nosuchuser/x", "~nosuchuser/x: no home folder of that name"),
        ("evaluate splade cranfield --out run.trec/x", "run.trec/x: cannot be written"),
        ("index splade cranfield --out deep/new --top-k 0", "--top-k is 0: it is at least 1"),
        ("rescale splade --out deep/new --k 0", "k is 0"),
        ("head splade --text cranfield --out deep/new", "has an MLM head already"),
        ("head dense --text cranfeild --out deep/new", "did you mean cranfield?"),
        ("adapt splade cranfeild --teacher dense --out deep/new", "did you mean cranfield?"),
        ("adapt splade cranfield --teacher idx --out deep/new", "idx: an index, not a model"),
        ("train splade cranfeild --out deep/new", "did you mean cranfield?"),
        ("search idx watch cpu use", "put it in quotation marks: anysplade search idx 'watch cpu use'"),
        ("encode 'watch cpu' splade", "splade is a model; the model comes first: anysplade encode splade 'watch cpu'"),
        ("encode idx heat", "idx: an index, not a model; give its model, "),
        ("adapt splade cranfield --out new", "adapt needs --teacher; see anysplade adapt --help"),
        ("train splade cranfield --output new", "--output: no such option of train; did you mean --out?"),
        ("train --out new", "train needs BACKBONE; see anysplade train --help"),
        ("train --config", "--config: give a YAML or TOML file after it"),
        ("compare run.trec run.trec cranfield", "compare needs --collection; write --collection cranfield"),
        ("compare run.trec run.trec --metrics RR@10", "compare needs --collection; see anysplade compare --help"),
        ("mine cranfield --out", "--out: give a value after it; see anysplade mine --help"),
        ("index splade cranfield more --out new", "more: more than index takes; put what has spaces in quotation marks"),
        ("rescale splade --out new --k two", "--k is 'two': it must be a number or none or 'auto'"),
        ("search idx heat --k two", "--k is 'two': it must be a whole number"),
        ("encode splade heat --role qurey", 'Did you mean "query"?'),
        ("index splade bad/nothere.jsonl --out new", "bad/nothere.jsonl: no such file; check the path"),
        ("index splade org/data.csv.gz --out new", "org/data.csv.gz: no such file; check the path"),
        ("evaluate splade cranfield/corpus.jsnol.gz", "cranfield/corpus.jsnol.gz: no such file"),
        ("compare rnu.trec run.trec --collection cranfield", "rnu.trec: no such file; did you mean run.trec?"),
        ("mine cranfield --out new --miner bm25 x/model.zip", "x/model.zip: no such file; check the path"),
        ("train splade cranfield --out new --dev x/dev.zip", "x/dev.zip: no such file; check the path"),
        ("evaluate bm52 cranfield", "bm52: no such name; did you mean bm25?"),
        ("inspect splayed", "built in are bm25, bm25-unstemmed, bert-tiny, modernbert-tiny"),
        ("evaluate bert-tniy cranfield", "bert-tniy: no such name; did you mean bert-tiny?"),
        ("evaluate splade cranfield/corpus.jsonl", "qrels/; name its folder: cranfield"),
        ("mine cranfield --out deep/new", "anysplade pairs cranfield --out PAIRS.jsonl makes some"),
        ("inspect splade --data cranfield", "anysplade pairs cranfield --out PAIRS.jsonl makes some"),
        ("index begun cranfield --out new", "begun: has no model yet: its training is unfinished; the same command continues it"),
        ("index changing cranfield --out new", "its adaptation is unfinished; the same command continues it"),
        ("train growing cranfield --out new", "its training of a head is unfinished; the same command continues it"),
        ("export idxx --to ciff --out deep/new", "did you mean idx?"),
    ],
)
def test_mistakes_name_what_was_meant(command, message, refused):
    assert message in refused(*shlex_split(command))


def test_the_corrected_command_can_be_pasted(refused):
    assert refused("search", "it's hot", "idx").endswith("""anysplade search idx 'it'"'"'s hot'""")
    assert refused("index", "cranfield", "trained run", "--out", "a b").endswith(
        "anysplade index 'trained run' cranfield --out 'a b'"
    )


def test_only_what_is_near_is_suggested(refused):
    for command in ("evaluate ./elsewhere cranfield", "index splade /no/such/corpus.jsonl --out new"):
        assert "did you mean" not in refused(*command.split())


@pytest.mark.parametrize("command", ["evaluate bm25 x/corpus.jsonl", "evaluate bm52 here", "index ~/nowhere here --out new"])
def test_a_name_for_nothing_costs_no_search(command, monkeypatch, capfd):
    monkeypatch.setattr("anysplade.model.saved._require_on_hub", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setattr("anysplade.evaluation.grid.evaluate_all", lambda *_, **__: pytest.fail("was called"))
    assert main(command.split()) == 2
    assert "no such" in capfd.readouterr().err


def test_a_file_that_is_missing_is_no_hub_id_in_python(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr("anysplade.model.saved._require_on_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"no such model folder; .*did you mean run\.trec"):
        resolve_model("rnu.trec")
    with pytest.raises(ModelError, match="did you mean bm25"):
        resolve_model("bm52")
    with pytest.raises(DataError, match=r"bad/nothere\.jsonl: no such corpus"):
        resolve("bad/nothere.jsonl", "corpus")
    assert resolve("org/bge-v1.5", "corpus").kind == "hub"


def test_words_without_quotation_marks_are_noted(here, monkeypatch, caplog):
    monkeypatch.chdir(here)
    caplog.set_level("INFO", "anysplade")
    assert main(["encode", "splade", "kabel", "lodan"]) == 0
    assert "2 texts of one word each; put a text of several words in quotation marks" in caplog.text


@pytest.mark.parametrize("command", ["evaluate", "compare", "search", "train", "mine", "adapt", "pairs"])
def test_no_option_empties_a_list(command, capfd):
    assert main([command, "--help"]) == 0
    assert "--empty" not in capfd.readouterr().out
