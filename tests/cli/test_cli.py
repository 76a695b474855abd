import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SparseEncoder
from transformers import AutoModelForMaskedLM

from anysplade import Document, Index, TrainingConfig
from anysplade._common import progress
from anysplade.cli import app
from anysplade.cli.app import _as_typed, main
from anysplade.cli.config import config_file
from processes import drop_privileges, room_for, run_command, run_python
from tiny import WORDS, make_backbone, make_lexical, make_static
from vocabularies import byte_level, make_cased

OPTIONS = ["--steps", "4", "--batch-size", "4", "--max-length", "16"]


@pytest.fixture
def call(capfd):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def call_json(call):
    def run(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def test_work_shows_itself_in_a_pipe(collection_folder, teachers, tmp_path, capsys, caplog, monkeypatch):
    """A line for each phase, none twice, and one JSON document; on few texts only what is not counted has one."""
    caplog.set_level("INFO", "anysplade")
    model, data, run = teachers["sparse"], str(collection_folder), tmp_path / "run"
    train = ["train", model, data, "--teacher", model, "--out", str(run), *OPTIONS, "--json"]
    index = ["index", str(run / "model"), data, "--out", str(tmp_path / "index"), "--json"]
    said = {}
    for few, command in ((False, train), (False, index), (True, [*train[:5], "--out", str(tmp_path / "few"), *OPTIONS, "--json"])):
        monkeypatch.setattr(progress, "_MANY", 1000 if few else 1)
        caplog.clear()
        assert main(command) == 0
        json.loads(capsys.readouterr().out)
        said[command[0], few] = caplog.messages
        assert len(set(caplog.messages)) == len(caplog.messages)
    options = f"teacher {model}, objective contrastive + teacher, steps 4, batch_size 4, max_length 16"
    head = f"{model}: a sparse encoder already, so its head stays as it is; numbers for k and shift change it"
    language = "bm25: no stemmer and no stop words, because the language of the texts is unclear or has none; see `language`"
    assert [line for line in said["train", False] if "left out" not in line] == [
        language,
        f"mining negatives with bm25 and {model}: 40 examples",
        f"encoding document texts with {model}: 40 texts",
        f"encoding query texts with {model}: 40 texts",
        f"training {model} on {data} with {options}; {run}/options.yaml has all options",
        head,
        "training: 4 steps",
        "counting the active dims of queries: 40 texts",
        "counting the active dims of documents: 40 texts",
    ]
    assert said["index", False] == ["encoding documents: 40 documents"]
    few = [line for line in said["train", True] if "left out" not in line]
    assert few == [language, said["train", False][-5].replace("/run/", "/few/"), head]
    assert main(["train", "--config", str(run / "options.yaml"), "--json"]) == 0
    assert f"{run} already has this run's result" in caplog.text


def test_texts_that_are_cut_are_said(collection_folder, tmp_path, capsys, caplog):
    model = make_lexical(tmp_path / "model")
    caplog.set_level("INFO", "anysplade")
    index = ["index", model, str(collection_folder), "--out", str(tmp_path / "index"), "--max-length", "8"]
    assert main(index) == 0
    assert "40 of 40 documents were cut at 8 tokens" in caplog.text
    assert main(["search", str(tmp_path / "index"), "kabel lodan", "--json"]) == 0
    assert "queries were cut" not in caplog.text
    assert main(["search", str(tmp_path / "index"), "kabel " * 20, "--json"]) == 0
    assert "1 of 1 queries were cut at 8 tokens, and what follows cannot be found; --max-length raises" in caplog.text
    capsys.readouterr()
    with Index.load(tmp_path / "index") as opened:
        assert opened.encoder.max_seq_length == 8
        opened.add({"new": Document("", "kabel " * 20)})
    assert main([*index[:-1], "9"]) == 2
    assert "another max_length" in capsys.readouterr().err
    found = []
    for length in ([], ["--max-length", "8"]):
        caplog.clear()
        assert main(["evaluate", model, str(collection_folder), "--json", *length]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert ("40 of 40 documents were cut at 8 tokens" in caplog.text) == bool(length)
    assert found[0]["cut"] == {"document": {"count": 0, "max_length": 64}, "query": {"count": 0, "max_length": 64}}
    assert found[1]["cut"]["document"] == {"count": 40, "max_length": 8}
    assert found[0]["document_active_dims"] > 11 > 6 >= found[1]["document_active_dims"]  # vectors of another length are not taken

    nowhere = str(tmp_path / "broken.jsonl")  # the length is looked at first
    (tmp_path / "broken.jsonl").write_text("{")
    out = ["--out", str(tmp_path / "other")]
    for command in (["train", model, nowhere, *out], ["index", model, nowhere, *out], ["evaluate", model, str(collection_folder)]):
        assert main([*command, "--max-length", "65"]) == 2
        assert f"{model}: has positions for 64 tokens, and --max-length is 65; give at most 64" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    described = tmp_path / "index" / "index.json"  # earlier versions recorded any length
    described.write_text(json.dumps(json.loads(described.read_text()) | {"max_length": 1000}))
    with Index.load(tmp_path / "index") as opened:
        assert opened.encoder.max_seq_length == 64
        assert opened.search("kabel lodan")
        opened.add({"newer": Document("", "kabel " * 20)})


def test_half_characters_stop_nothing(backbone, collection_folder, call, call_json, tmp_path, caplog):
    """JSON and a command line can hold lone surrogates: in texts, ids and what is asked."""
    folder = tmp_path / "c"
    shutil.copytree(collection_folder, folder)
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "x\\ud83d", "title": "\\ud83d", "text": "kabel \\udc00"}\n')
    queries = (folder / "queries.jsonl").read_text().replace('"text": "', '"text": "\\udfff ')
    (folder / "queries.jsonl").write_text(queries)
    with open(folder / "pairs.jsonl", "a") as file:
        file.write('{"query": "lodan \\ud800", "positive": "\\ud800 kabel"}\n')
    call_json("inspect", backbone, "--data", folder)
    call_json("train", backbone, folder, "--out", tmp_path / "run", "--k", 1, "--shift", 0, *OPTIONS)
    for model in (tmp_path / "run", "bm25"):
        call_json("evaluate", model, folder, "--out", tmp_path / f"scores-{model == 'bm25'}")
    caplog.clear()
    call_json("index", tmp_path / "run", folder, "--out", tmp_path / "index")
    assert caplog.text.count("half a character") == 1  # though the file is read twice
    code, out, err = call("search", tmp_path / "index", "kabel \udcff", "--k", 41, "--json")
    assert (code, err.count("argument 3: not UTF-8")) == (0, 1)
    found = json.loads(out)
    assert found["query"] == "kabel \udcff"
    assert "x\ufffd" in {hit["id"] for hit in found["hits"]}
    mined = tmp_path / "mined.jsonl"
    assert call("mine", folder, "--corpus", folder, "--out", mined, "--negatives", 1, "--margin", 0)[0] == 0


def test_half_characters_from_python_are_shown(backbone, call, call_json, tmp_path):
    """An index keeps them; JSON has them escaped, and so has what a person reads."""
    Index.build(backbone, {"x\ud83d": Document("", "kabel \udc00")}, tmp_path / "index").close()
    found = call_json("search", tmp_path / "index", "kabel")
    assert (found["hits"][0]["id"], found["hits"][0]["text"]) == ("x\ud83d", "kabel \udc00")
    code, out, _ = call("search", tmp_path / "index", "kabel")
    assert code == 0
    assert "x\\ud83d" in out


def test_arguments_in_an_encoding_without_these_characters(tmp_path):
    """Refused before anything else, since another query would be searched; ASCII is in every encoding."""
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    for arguments, message in (
        (["search", tmp_path, "café"], "anysplade: argument 3: not text in this system's encoding, ascii; set PYTHONUTF8=1"),
        (["search", tmp_path / "modèle", "cafe"], "anysplade: argument 2: not text in this system's encoding"),
        (["search", tmp_path, "cafe"], "no index there"),
    ):
        command = [sys.executable, "-m", "anysplade", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert message in done.stderr


def test_names_are_shown_as_they_are(backbone, collection_folder, call, tmp_path):
    """Brackets and colons of a name are no markup."""
    folder, out = tmp_path / "c[bold]", tmp_path / "a[b]:smile:"
    shutil.copytree(collection_folder, folder)
    code, shown, _ = call("rescale", backbone, "--out", out)
    assert code == 0
    assert out.name in shown
    code, shown, _ = call("evaluate", "bm25", folder, collection_folder, "--metrics", "RR@10")
    assert (code, shown.count("c[bold]")) == (0, 1)


def test_output_in_an_encoding_without_these_characters(tmp_path):
    """Escaped instead of a traceback; what is JSON stays JSON."""
    Index.build(make_static(tmp_path), {"é中😀": Document("", "kabel é中😀")}, tmp_path / "index").close()
    command = [sys.executable, "-m", "anysplade", "search", str(tmp_path / "index"), "kabel"]
    options = {"capture_output": True, "env": os.environ | {"PYTHONIOENCODING": "ascii"}, "timeout": 120}
    found = json.loads(subprocess.run([*command, "--json"], check=True, **options).stdout)
    assert found["hits"][0]["id"] == "é中😀"
    assert b"kabel" in subprocess.run(command, check=True, **options).stdout


def test_a_cased_vocabulary_is_folded(call, call_json, tmp_path):
    cased = make_cased("modernbert", tmp_path / "cased", byte_level())
    done = call_json("rescale", cased, "--fold", "case", "--mute", "--out", tmp_path / "folded")
    assert (done["k"], done["shift"], done["folding"]["by"]) == (1, 0, "case")
    assert done["live"] == done["vocabulary"] - done["folding"]["folded"] - done["folding"]["muted"]
    assert "terms folded into others by case" in call("inspect", tmp_path / "folded")[1]
    AutoModelForMaskedLM.from_pretrained(tmp_path / "folded")


def test_from_backbone_to_search(backbone, collection_folder, call, call_json, tmp_path):
    inspected = call_json("inspect", backbone, "--data", collection_folder)
    assert inspected["architecture"] == "BertForMaskedLM"
    assert inspected["suggested"]["k"] > 0
    assert set(inspected["verdict"]) == {"raw", "calibrated"}

    rescaled = call_json("rescale", backbone, "--out", tmp_path / "rescaled", "--k", 4, "--shift", 0.5)
    assert (rescaled["k"], rescaled["shift"]) == (4, 0.5)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "rescaled").config.anysplade["k"] == 4

    trained = call_json("train", backbone, collection_folder, "--out", tmp_path / "run", "--k", 1, "--shift", 0, *OPTIONS)
    assert trained["model"] == str(tmp_path / "run" / "model")

    for model in (tmp_path / "run" / "model", tmp_path / "run"):  # the run's folder will do
        evaluated = call_json("evaluate", model, collection_folder, "--metrics", "RR@10", "P@1", "--out", tmp_path / "scores")
        assert {"RR@10", "P@1", "query_active_dims", "document_active_dims", "flops"} <= evaluated.keys()
    assert json.loads((tmp_path / "scores" / "evaluation.json").read_text())["RR@10"] == evaluated["RR@10"]

    indexed = call_json("index", tmp_path / "run" / "model", collection_folder, "--out", tmp_path / "index")
    assert indexed["documents"] == 40
    found = call_json("search", tmp_path / "index", "kabel lodan", "--k", 3)
    assert len(found["hits"]) == 3
    assert sum(term["product"] for term in found["hits"][0]["terms"]) == pytest.approx(found["hits"][0]["score"])

    code, out, _ = call("search", tmp_path / "index", "kabel lodan", "--k", 3)
    assert code == 0
    assert found["hits"][0]["id"] in out
    code, out, _ = call("evaluate", "bm25", collection_folder)
    assert (code, "nDCG@10" in out, "FLOPS" in out) == (0, True, True)
    for command in (
        ["inspect", backbone, "--svg", tmp_path / "head.svg"],
        ["train", backbone, collection_folder, "--out", tmp_path / "run", "--k", 1, "--shift", 0, *OPTIONS],
    ):
        code, out, _ = call(*command)
        assert code == 0
        assert out
    assert "above zero" in (tmp_path / "head.svg").read_text()


def test_the_trained_model_loads_where_anysplade_is_not(backbone, collection_folder, call_json, tmp_path):
    model = call_json("train", backbone, collection_folder, "--out", tmp_path / "run", *OPTIONS)["model"]
    code = (
        "import sys, json; sys.modules['anysplade'] = None\n"  # an import of it raises
        "from sentence_transformers import SparseEncoder\n"
        f"print(json.dumps(SparseEncoder({model!r}).encode(['kabel lodan'], convert_to_sparse_tensor=False).tolist()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    here = SparseEncoder(model).encode(["kabel lodan"], convert_to_sparse_tensor=False).tolist()
    assert json.loads(out)[0] == pytest.approx(here[0], abs=1e-6)


@pytest.fixture
def broken(collection_folder, tmp_path):
    """Copies of the collection, each with one thing wrong."""

    def copy(name, **files):
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True)
        for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
            content = files.get(file, (collection_folder / file).read_text())
            if content is not None:
                (folder / file).write_text(content)
        return folder

    copy("no-corpus", **{"corpus.jsonl": None})
    copy("empty-corpus", **{"corpus.jsonl": ""})
    copy("unknown-id", **{"qrels/test.tsv": "q0\td0\t0\nq1\tdoc-77\t1\n"})
    return tmp_path


@pytest.mark.parametrize(
    "command, message",
    [
        ("inspect ./nowhere", "no such file or folder; check the path"),
        ("inspect nobody/no-such-model", "not found on the hub"),
        ("inspect {data}", "a collection, not a model"),
        ("rescale {model} --out {data}", "not empty"),
        ("rescale {model} --out {tmp}/new --k 0", "k is 0"),
        ("rescale {model} --out {tmp}/new --k nan", "k is nan"),
        ("rescale {model} --out {tmp}/new --k eight", "eight"),
        ("rescale {model} --out {tmp}/new --fold case", "one form of each word already (uncased)"),
        ("train {model} {data} --out {tmp}/new --fold case", "one form of each word already (uncased)"),
        ("train ./nowhere {data} --out {tmp}/new", "no such file or folder"),
        ("train {model} ./nowhere --out {tmp}/new", "no such file or folder"),
        ("train {model} {data} --out {data}", "not empty"),
        ("train {model} {data} --out {tmp}/new --batch-size 0", "batch_size is 0"),
        ("train {model} {data}", "train needs --out; see anysplade train --help"),
        ("evaluate ./nowhere {data}", "no such file or folder"),
        ("evaluate {model} {tmp}/no-corpus", "no corpus.jsonl in it"),
        ("evaluate {model} {tmp}/empty-corpus", "the corpus is empty"),
        ("evaluate {model} {tmp}/unknown-id", "no document of the corpus is judged above 0"),
        ("evaluate {model} {data} --metrics ndgc@10", "did you mean nDCG@10"),
        ("evaluate {model} {data} --split dev", "no qrels/dev.tsv"),
        ("index {model} {tmp}/empty-corpus --out {tmp}/new", "the corpus is empty"),
        ("search {data} kabel", "no index there"),
        ("serach {data} kabel", "search"),
        ("evaluate {model} {data} --metircs RR", "--metrics"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(command, message, backbone, collection_folder, broken, call):
    filled = command.format(model=backbone, data=collection_folder, tmp=broken)
    code, out, err = call(*filled.split(), "--json")
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert message in lines[0]
    assert not (broken / "new").exists()


def test_help_is_quick_and_on_standard_output(call):
    code, out, _ = call("--help")
    assert code == 0
    for command in ("inspect", "rescale", "train", "evaluate", "index", "search", "demo"):
        assert command in out
        assert call(command, "--help")[0] == 0


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_options_from_a_file_and_flags_that_win(suffix, backbone, collection_folder, call_json, tmp_path):
    options = {"backbone": backbone, "data": str(collection_folder), "output": str(tmp_path / "run"), "steps": 3, "batch_size": 4}
    lines = [
        f"{name}: {json.dumps(value)}" if suffix == "yaml" else f"{name} = {json.dumps(value)}" for name, value in options.items()
    ]
    (tmp_path / f"options.{suffix}").write_text("\n".join([*lines, "fused: false" if suffix == "yaml" else "fused = false"]))
    result = call_json("train", "--config", tmp_path / f"options.{suffix}", "--steps", 2, "--max-length", 16)
    assert (result["config"]["steps"], result["config"]["batch_size"], result["config"]["fused"]) == (2, 4, False)
    # What a run leaves beside its model is a file for the next one.
    again = call_json("train", "--config", tmp_path / "run" / "options.yaml", "--out", tmp_path / "again")
    assert again["config"] == result["config"] | {"output": str(tmp_path / "again")}


def parsed_config(*arguments):
    """What ``train`` would be called with."""
    app.config = config_file(["train", *arguments])
    _, bound, _ = app.parse_args(["train", *arguments], exit_on_error=False, print_error=False)
    options = bound.args[0] if bound.args else bound.kwargs["options"]
    return TrainingConfig(**asdict(options))


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])) | st.sampled_from(  # PyYAML reads some breaks as spaces
    ["null", "none", "1e3", "[1]", '{"a": 1}', "--seed", "true", "query: "]
)
PLAIN = {int: st.integers(2, 10**9), float: st.floats(1, 1e9), str: TEXT}
OWN = {  # where an option allows less than its type
    "objective": st.sampled_from(["contrastive", "kl + 0.05*margin-mse"]),
    "warmup_ratio": st.floats(0, 0.99),
    "patience": st.none(),  # needs dev
    "query_encoder": st.just("mlm"),  # the others allow no query_active_dims
    "report_to": st.lists(TEXT, max_size=3).map(tuple),
}


def values(kind):
    if get_origin(kind) in (Union, UnionType):
        return st.one_of(*map(values, get_args(kind)))
    return PLAIN[kind] if kind in PLAIN else st.from_type(kind)


OPTIONS_BY_NAME = {
    name: OWN[name] if name in OWN else values(kind) for name, kind in get_type_hints(TrainingConfig).items() if name != "_"
}


@settings(deadline=None)
@given(st.fixed_dictionaries(OPTIONS_BY_NAME).map(lambda one: one if one["teacher"] is None else one | {"objective": "auto"}))
def test_a_printed_configuration_is_the_file_of_the_same_configuration(tmp_path_factory, options):
    config = TrainingConfig(**options)
    file = tmp_path_factory.getbasetemp() / "printed.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert parsed_config("--config", str(file)) == config


def test_each_option_that_can_be_none_is_none_from_a_file(tmp_path):
    nullable = [field.name for field in fields(TrainingConfig) if type(None) in getattr(field.type, "__args__", ())]
    assert "max_length" in nullable
    required = "backbone: b\ndata: d\noutput: o\n"
    for name in nullable:
        (tmp_path / "options.yaml").write_text(f"{required}{name}: null\n")
        assert getattr(parsed_config("--config", str(tmp_path / "options.yaml")), name) is None
    (tmp_path / "options.yaml").write_text(required)
    assert parsed_config("--config", str(tmp_path / "options.yaml")).max_length == 256
    assert parsed_config("--config", str(tmp_path / "options.yaml"), "--max-length", "none").max_length is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz: 3", "no option 'stepz'; did you mean steps?"),
        ("steps: many", "many"),
        ("- 1", "contains no options"),
        ("", "contains no options"),
        ("plain words", "contains no options"),
        ("steps: [", "options.yaml"),
        ("seed: 1\nquery_prompt: query: ", "options.yaml:2: mapping values are not allowed here; put a text in quotes"),
        ("seed: 1\n\tsteps: 3", "options.yaml:2: "),
        ("dev: !!python/object/apply:os.getcwd []", "options.yaml:1: the tag tag:yaml.org,2002:python/object/apply:os.getcwd"),
        ("dev: !mine x", "options.yaml:1: the tag !mine"),
        ("dev: *there", "options.yaml:1: found undefined alias"),
        ("\0\1", "options.yaml: cannot be read"),
        ("seed: " + "[" * 1000, "options.yaml: cannot be read"),
        ("steps: 2.5", "options.yaml: steps is '2.5': it must be a whole number or none"),
        ("negatives: 0.4", "negatives is '0.4': it must be a whole number"),
        ("seed: yes", "seed is 'yes': it must be a whole number"),
        ("seed: 1e-3", "seed is '1e-3'"),
        ("learning_rate: fast", "learning_rate is 'fast': it must be a number"),
        ("mute: maybe", "mute is 'maybe': it must be true or false"),
        ("fold: upper", "fold is 'upper': it must be 'none' or 'case' or 'stem'"),
        ("k: automatic", "k is 'automatic': it must be a number or 'auto'"),
        ("seed: [1, 2]", "seed is ['1', '2']: it must be a whole number"),
        ("query_prompt: {query: x}", "query_prompt is {'query': 'x'}: it must be a text"),
        ("query_prompt:", "query_prompt is None: it must be a text"),
        ("report_to: [[wandb]]", "report_to is [['wandb']]: it must be a list of texts"),
        ("seed: 1\nmute: true\nseed: 2", "seed is given twice"),
    ],
)
def test_a_faulty_file_of_options(text, message, backbone, collection_folder, call, tmp_path):
    (tmp_path / "options.yaml").write_text(text)
    code, out, err = call("train", backbone, collection_folder, "--out", tmp_path / "run", "--config", tmp_path / "options.yaml")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    code, _, err = call("train", backbone, collection_folder, "--out", tmp_path / "run", "--config", tmp_path / "nowhere.yaml")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "text", ["steps = 2.5", "steps = true", "steps = 2\nsteps = 3", "steps = 1979-05-27", "[steps]\na = 1", "steps"]
)
def test_a_faulty_toml_file(text, call, tmp_path):
    (tmp_path / "options.toml").write_text(text)
    code, out, err = call("train", "bert-tiny", "python-docs", "--out", tmp_path / "run", "--config", tmp_path / "options.toml")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "options.toml: " in err


def test_a_value_of_a_file_is_read_as_at_the_command_line(tmp_path):
    """YAML alone would make 8 of 010, True of yes, 45,000 of 12:30:00 and a text of 1e-3."""
    texts = (
        "seed: 010\nsteps: 20.0\nquery_prompt: yes\ndocument_prompt: 12:30:00\nlearning_rate: 1e-3\ndev_split: 0x1F\nmute: yes\n"
    )
    (tmp_path / "options.yaml").write_text(f"backbone: b\ndata: 2020\noutput: o\n{texts}report_to: wandb\n", encoding="utf-8-sig")
    config = parsed_config("--config", str(tmp_path / "options.yaml"))
    assert (config.data, config.seed, config.steps, config.mute) == ("2020", 10, 20, True)
    assert (config.query_prompt, config.document_prompt, config.dev_split) == ("yes", "12:30:00", "0x1F")
    assert (config.learning_rate, config.report_to) == (1e-3, ("wandb",))
    flags = ["--seed", "010", "--steps", "20.0", "--mute", "--learning-rate", "1e-3"]
    flagged = parsed_config("b", "2020", "--out", "o", *flags)
    assert (flagged.seed, flagged.steps, flagged.mute, flagged.learning_rate) == (10, 20, True, 1e-3)


@pytest.mark.parametrize(
    "command",
    [
        "search nowhere kabel --k 2.5",
        "index nowhere nowhere --out new --top-k 3.5",
        "train nowhere nowhere --out new --steps 2.5",
        "train nowhere nowhere --out new --max-length 15.9",
        "mine nowhere --out new --negatives 0.4",
        "head nowhere --text nowhere --out new --batch-size .5",
        "adapt nowhere nowhere --teacher nowhere --out new --seed -0.5",
        "study main --out new --seeds 1.5",
    ],
)
def test_a_fraction_is_no_whole_number(command, call):
    code, out, err = call(*command.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"{command.split()[-1]} is no whole number" in err


def test_mine_and_score(collection_folder, call_json, call, tmp_path):
    mined = call_json("mine", collection_folder, "--out", tmp_path / "mined.jsonl", "--negatives", 2, "--margin", 0)
    scored = call_json("score", tmp_path / "mined.jsonl", "--teacher", "bm25", "--out", tmp_path / "scored.jsonl")
    assert mined["examples"] == scored["examples"] > 0
    code, out, _ = call("score", tmp_path / "mined.jsonl", "--teacher", "bm25", "--out", tmp_path / "scored.jsonl")
    assert code == 0
    assert "examples scored by bm25" in out


def test_pairs_from_documents_are_trained_on(backbone, call_json, call, tmp_path):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "pairs.jsonl"
    texts = [
        " ".join(f"{word}{i}" for word in ("kabel", "locor", "midan", "nufil", "pegor", "rahan", "sojim", "tukop"))
        for i in range(8)
    ]
    corpus.write_text(
        "".join(json.dumps({"_id": str(i), "title": f"kabel {i}", "text": text}) + "\n" for i, text in enumerate(texts))
    )
    made = call_json("pairs", corpus, "--out", out, "--kinds", "title", "heading")
    assert made["pairs"] == {"title": 8, "heading": 0}
    assert made["out"] == str(out)
    code, text, _ = call("pairs", corpus, "--kinds", "heading", "title", "--out", out)
    assert code == 0
    assert "8 pairs from 8 documents (8 title, 0 heading)" in text
    assert "left out, heading: without heading: 8" in text
    assert text.rstrip().endswith(f"next: anysplade train MODEL {out} --out RUN")
    assert call("train", backbone, out, "--out", tmp_path / "run", "--steps", 1, "--batch-size", 4)[0] == 0
    code, _, err = call("pairs", corpus, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "choose another --out" in err


def test_a_model_is_adapted(teachers, collection_folder, call_json, call, tmp_path):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "run"
    generator = random.Random(0)
    texts = [" ".join(generator.choices(generator.sample(WORDS, 9), k=24)) for _ in range(100)]
    corpus.write_text("".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    options = ["--teacher", teachers["dense"], "--judged", collection_folder, "--steps", 2, "--batch-size", 4, "--max-length", 32]
    adapted = call_json("adapt", teachers["sparse"], corpus, "--out", out, *options)
    assert adapted["kept"] in ("original", "adapted")
    code, text, _ = call("adapt", teachers["sparse"], corpus, "--out", out, *options)
    assert code == 0
    assert f"kept: the {adapted['kept']} model, in {out}/model" in text
    assert (f"the adapted one is in {out}/adapted" in text) == (adapted["kept"] == "original")
    assert "FLOPS" in text
    code, _, err = call("adapt", teachers["sparse"], corpus, "--out", out, *options[2:], "--teacher", teachers["sparse"])
    assert (code, err.count("\n")) == (2, 1)


@pytest.fixture
def indexed(backbone, tmp_path):
    rows = [
        {"_id": "a", "text": "kabel lodan", "metadata": {"lang": "en", "year": 2024}},
        {"_id": "b", "text": "kabel mifil", "metadata": {"lang": "de", "year": 2025}},
        {"_id": "c", "text": "nugor", "top": "level"},
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["index", backbone, str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "index"), "--top-k", "20"]) == 0
    return tmp_path / "index"


def test_filters(indexed, call_json, call):
    def ids(*filters):
        return {hit["id"] for hit in call_json("search", indexed, "kabel", "--filter", *filters)["hits"]}

    assert ids("lang=en") == {"a"}
    assert ids("lang=en", "lang=de") == {"a", "b"}
    assert ids("lang=de", "year=2025") == {"b"}
    assert ids("lang=de", "year=2024") == set()
    assert ids("LANG= De", "year= 2025 ") == {"b"}
    assert call("search", indexed, "kabel", "--filter", "lang=xx")[:2] == (0, "no document has lang=xx\n")
    assert call_json("search", indexed, "kabel", "--filter", "lang=xx", "--exact")["note"] == "no document has lang=xx"
    found = call_json("search", indexed, "kabel", "--filter", "lang=de", "year=2024")
    assert found["note"] == "no document has lang=de and year=2024 together"
    for name in ("lan", "top", "lang.en"):
        code, _, err = call("search", indexed, "kabel", "--filter", f"{name}=level")
        assert code == 2
        assert err == f'anysplade: filter {name!r}: no document has this name in its "metadata"; names there: lang, year\n'
    assert call_json("search", indexed, "kabel", "--filter", "lang=en", "--exact")["hits"][0]["id"] == "a"
    code, _, err = call("search", indexed, "kabel", "--filter", "lang")
    assert (code, err.count("\n")) == (2, 1)


def test_the_index_command_twice_does_nothing_twice(indexed, backbone, call_json, tmp_path):
    before = (indexed / "index.json").stat().st_mtime_ns
    again = call_json("index", backbone, tmp_path / "corpus.jsonl", "--out", indexed, "--top-k", 20)
    assert again["documents"] == 3
    assert (indexed / "index.json").stat().st_mtime_ns == before


def test_exports(indexed, call_json, tmp_path):
    written = call_json("export", indexed, "--to", "lucene", "--out", tmp_path / "anserini")
    assert written["documents"] == 3
    rows = [json.loads(line) for path in (tmp_path / "anserini").iterdir() for line in path.read_text().splitlines()]
    assert {row["id"] for row in rows} == {"a", "b", "c"}
    queries = tmp_path / "topics.tsv"
    queries.write_text("1\tkabel lodan\n2\tmifil\n")
    written = call_json("export", indexed, "--to", "ciff", "--out", tmp_path / "index.ciff", "--queries", queries)
    assert (written["documents"], written["queries"]) == (3, 2)
    lines = (tmp_path / "index.ciff.queries.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["1", "2"]
    with Index.load(indexed) as index:
        vector = index.queries.encode(["kabel lodan"])
        counts = {index.queries.term_names[t]: round(w * 100) for t, w in zip(vector.indices, vector.data.tolist(), strict=True)}
    assert Counter(lines[0].split("\t")[1].split()) == Counter({name: count for name, count in counts.items() if count})


def test_a_head_that_is_wider_than_the_vocabulary(collection_folder, call_json, tmp_path):
    backbone = make_backbone("bert", tmp_path / "padded", vocab_size=160)
    padding = {f"[term:{term}]" for term in range(149, 160)}
    call_json("index", backbone, collection_folder, "--out", tmp_path / "index")
    hits = call_json("search", tmp_path / "index", "kabel lodan", "--k", 40)["hits"]
    matched = [term["term"] for hit in hits for term in hit["terms"]]
    assert padding & set(matched)
    assert None not in matched
    call_json("export", tmp_path / "index", "--to", "lucene", "--out", tmp_path / "anserini")
    call_json("export", tmp_path / "index", "--to", "ciff", "--out", tmp_path / "index.ciff")
    lines = [json.loads(line) for line in (tmp_path / "anserini" / "0000.jsonl").read_text().splitlines()]
    with Index.load(tmp_path / "index") as index:
        assert [len(line["vector"]) for line in lines] == [(document.weights >= 0.005).sum() for document in index.store]
    for names in ([backbone], [backbone, backbone]):
        assert call_json("evaluate", *names, collection_folder, "--metrics", "RR@10", "--out", tmp_path / f"scores{len(names)}")
    assert any(term.encode() in (tmp_path / "index.ciff").read_bytes() for term in padding)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--out FOLDER or --to"),
        (["--to", "lucene://host/name"], "not an address of an engine"),
        (["--to", "qdrant://127.0.0.1:1/name"], "refused; check its address"),
    ],
)
def test_where_an_index_cannot_go(options, message, backbone, collection_folder, call):
    code, out, err = call("index", backbone, collection_folder, *options)
    assert code in (1, 2)
    assert message in err
    assert err.strip().count("\n") == 0
    assert not out


def test_a_changed_corpus_is_said(indexed, backbone, call, call_json, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows = [{"_id": "d", "text": "lodan"}, rows[0] | {"text": "mifil"}, rows[1]]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = call_json("index", backbone, corpus, "--out", indexed, "--top-k", 20)
    assert {name: found[name] for name in ("documents", "added", "replaced", "deleted")} == {
        "documents": 3, "added": 1, "replaced": 1, "deleted": 1
    }  # fmt: skip
    code, out, _ = call("index", backbone, corpus, "--out", indexed, "--top-k", 20)
    assert code == 0
    assert out.startswith("3 documents (0 added, 0 replaced, 0 deleted), ")


def test_a_model_that_was_moved_is_named(backbone, call, call_json, tmp_path):
    shutil.copytree(backbone, tmp_path / "model")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "kabel"}\n')
    call_json("index", tmp_path / "model", tmp_path / "corpus.jsonl", "--out", tmp_path / "index")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    for command in (
        ("search", tmp_path / "index", "kabel"),
        ("export", tmp_path / "index", "--to", "ciff", "--out", tmp_path / "c"),
    ):
        code, _, err = call(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "name it with --model" in err
        assert call_json(*command, "--model", tmp_path / "elsewhere")


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    said = run_command("rescale", "bert-tiny", "--out", tmp_path / "locked" / "out", preexec_fn=drop_privileges)
    assert said.returncode == 2
    assert said.stderr == (
        f"anysplade: {tmp_path}/locked/out: cannot be written: Permission denied; name another place, or make this one writable\n"
    )


def test_a_full_disk_is_one_line(backbone, call, tmp_path):
    command = ["rescale", backbone, "--out", tmp_path / "out"]
    with room_for(100_000):
        code, _, err = call(*command)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{tmp_path / 'out'}: cannot be written: File too large; make room" in err
    assert not list(tmp_path.iterdir())
    assert call(*command)[0] == 0


def test_options_are_named_as_they_are_typed(call, backbone, collection_folder, tmp_path):
    """The library says `top_k`; the command line says --top-k."""
    code, _, err = call("index", backbone, collection_folder, "--out", tmp_path / "index", "--top-k", 0)
    assert code == 2
    assert "--top-k is 0: it is at least 1" in err
    assert _as_typed("lower `batch_size=16` or `max_length`, in another `output` than `data`, with `with_bm25`") == (
        "lower --batch-size 16 or --max-length, in another --out than DATA, with --with-bm25"
    )


@pytest.mark.parametrize("more", [[], ["--exact"]])
def test_a_search_by_token_imports_no_library_that_runs_models(more, static_index):
    """They take seconds; the search itself takes a tenth of one."""
    code = """
import sys
from anysplade.cli import main
assert main(["search", *sys.argv[1:]]) == 0
print({"torch", "transformers", "sentence_transformers", "datasets"} & set(sys.modules))
"""
    done = run_python("-c", code, static_index, "kabel lodan", *more)
    assert done.stderr == ""
    assert done.stdout.startswith(" 1. ")
    assert done.stdout.endswith("set()\n")


def test_encode_shows_words(call, call_json):
    code, out, _ = call("encode", "bert-tiny", "Compute the laminarization", "numpy", "--k", 3, "--role", "query")
    assert code == 0
    assert "laminarization" in out  # whose pieces are terms
    assert out.count("active dims") == 2
    found = call_json("encode", "bert-tiny", "Compute the laminarization", "")
    first = found["texts"][0]
    assert first["active_dims"] == len(first["terms"]) > 3
    assert all(len(term["ids"]) == 1 for term in first["terms"])
    assert found["vocabulary"] == 8192
    code, _, err = call("encode", "bert-tiny")
    assert (code, err.count("\n")) == (2, 1)
    assert "no text given" in err


@pytest.mark.parametrize("more, code", [([], 141), (["--json"], 141), (["--help"], 1)])
def test_output_that_nobody_reads(more, code, static_index):
    """As with ``| head -1``, which is gone after the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "anysplade", "search", static_index, "kabel lodan", *more]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writing)
    assert (done.stderr, done.returncode) == (b"", code)


@pytest.mark.parametrize("closed, more", [([1], []), ([0, 1, 2], ["--json"]), ([0, 1, 2], ["--help"])])
def test_standard_streams_that_are_closed(closed, more, static_index, tmp_path):
    """No file that is opened later gets what is printed."""
    code = "import os, sys; [os.close(int(n)) for n in sys.argv[1]]; os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    numbers = "".join(map(str, closed))
    done = run_python("-c", code, numbers, "-m", "anysplade", "search", static_index, "kabel lodan", *more)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_output_that_cannot_be_written(static_index):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "anysplade", "search", static_index, "kabel lodan"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.stderr, done.returncode) == ("anysplade: [Errno 28] No space left on device\n", 1)


def test_an_interruption_while_nobody_reads_the_output():
    code = (
        "from anysplade.cli.app import _print\ntry:\n    _print('x' * 10**6)\nexcept KeyboardInterrupt:\n    raise SystemExit(130)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1) == b"x"  # and no more: the pipe is full
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


def test_an_interrupted_command_says_that_it_can_be_continued(monkeypatch, call):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("anysplade.data.document_pairs.make_pairs", interrupted)
    code, out, err = call("pairs", "python-docs", "--out", "new.jsonl")
    assert (code, out) == (130, "")
    assert err == "anysplade: interrupted; run the same command again to continue where possible\n"


def test_muting_alone_folds_nothing(backbone, call, tmp_path):
    code, out, _ = call("rescale", backbone, "--mute", "--out", tmp_path / "muted")
    assert code == 0
    assert "folded" not in out
    assert "terms of punctuation and special tokens muted: " in out
