"""Published models, in a hub of the test's own: what it receives, and what it refuses."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SparseEncoder

from anysplade import (
    AnyspladeError,
    ModelError,
    OptionError,
    OutputError,
    TrainingConfig,
    UsageError,
    evaluate,
    load_encoder,
    push,
    train,
)
from anysplade.cli import main
from hub_server import TOKEN, hub  # noqa: F401  (a fixture)
from processes import run_commands
from tiny import make_backbone, make_static

REPO = "me/tiny-splade"
COSTS = {"query_active_dims", "document_active_dims", "flops"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone, collection_folder):
    """A run with evaluations of its model, of BM25 and of another model."""
    run = tmp_path_factory.mktemp("trained") / "run"
    options = {"steps": 4, "batch_size": 4, "checkpoint_steps": 2, "dev": str(collection_folder), "dev_split": "test"}
    train(TrainingConfig(backbone, str(collection_folder), output=str(run), query_prompt="kabel: ", **options))
    evaluate(run, collection_folder, ["nDCG@10", "RR@10"], output=run / "evaluation")
    evaluate("bm25", collection_folder, output=run / "bm25")
    evaluate(backbone, collection_folder, output=run / "untrained")
    return run


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def results(card):
    """The metrics of each entry of the model-index, by the name of its dataset."""
    found = {}
    for result in ModelCard(card).data.eval_results or []:
        found.setdefault(result.dataset_name, {})[result.metric_type] = result.metric_value
    return found


def test_a_run_is_published_with_both_columns(run, hub, caplog, capsys):  # noqa: F811
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    pushed = push(run, REPO)
    published = hub.repositories[REPO]
    assert pushed["changed"]
    assert pushed["commit"] == published.commits[-1] != published.commits[0]
    assert (pushed["url"], pushed["private"], pushed["evaluations"]) == (f"{hub.url}/{REPO}", False, ["tiny"])
    assert published.files.keys() - {".gitattributes"} == {
        path.relative_to(run / "model").as_posix() for path in (run / "model").rglob("*") if path.is_file()
    }
    assert published.files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    card = published.files["README.md"].decode()
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    metrics = {"nDCG@10", "RR@10"} | COSTS
    assert results(card)["tiny"] == {name: evaluation[name] for name in metrics}
    assert results(card).keys() == {"tiny", "tiny, test"}  # the latter is the dev collection
    assert results(card)["tiny, test"].keys() > COSTS
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert {"sentence-transformers", "sparse-encoder", "splade", "loss:SpladeLoss"} < set(data.tags)
    assert "| collection | nDCG@10 | RR@10 | query active dims | document active dims | FLOPS |" in card
    calibration = json.loads((run / "run.json").read_text())["calibration"]
    assert f"(k = {calibration['k']:g}, shift = {calibration['shift']:g})" in card
    assert f'SparseEncoder("{REPO}")' in card
    assert "sparse_encoder_model_id" not in card
    assert card.index("## Results") < card.index("## Use it elsewhere") < card.index("## How it was made")
    for name in ("text-embeddings-inference", "vLLM", "FastEmbed", "Qdrant", "OpenSearch", "`kabel: ` (query)"):
        assert name in card
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        warning == f"{run / 'untrained' / 'evaluation.json'}: of another model, or of this one before it changed; not in the card"
    )
    assert TOKEN not in caplog.text + "".join(capsys.readouterr()) + json.dumps(pushed) + str(published.files)


def test_a_repeated_push_changes_only_what_has_changed(run, hub):  # noqa: F811
    first = push(run, REPO)
    again = push(run, REPO)
    published = hub.repositories[REPO]
    assert again == first | {"changed": False}
    assert len(published.commits) == 2
    shutil.rmtree(run / "evaluation")
    assert push(run, REPO)["evaluations"] == []
    assert len(published.commits) == 3
    assert results(published.files["README.md"].decode()).keys() == {"tiny, test"}


def test_a_published_model_can_be_published_again(run, hub, tmp_path):  # noqa: F811
    push(run, REPO)
    for name, content in hub.repositories[REPO].files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert SparseEncoder(str(tmp_path / "copy")).encode("kabel").shape
    assert push(tmp_path / "copy", REPO)["changed"]  # this folder has no evaluation, so its table goes
    card = hub.repositories[REPO].files["README.md"].decode()
    assert "## Results" not in card
    assert results(card).keys() == {"tiny, test"}
    assert card.count("## Use it elsewhere") == 1
    assert push(tmp_path / "copy", REPO)["changed"] is False


def test_large_files_go_where_the_hub_wants_them(run, hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    hub.large_files = True
    push(run, REPO)
    (stored,) = hub.stored.values()
    assert stored == hub.repositories[REPO].files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert push(run, REPO)["changed"] is False


def test_any_saved_encoder_is_published_and_nothing_is_made_up(tmp_path, hub):  # noqa: F811
    encoder = load_encoder(make_backbone("modernbert", tmp_path / "backbone"), k=2, shift=0.5)
    encoder.save_pretrained(str(tmp_path / "plain"), create_model_card=False)
    (tmp_path / "plain" / ".env").write_text("SECRET=1")
    (tmp_path / "plain" / "optimizer.pt").write_text("")
    push(tmp_path / "plain", "me/plain", private=True)
    assert hub.repositories["me/plain"].private
    assert not {".env", "optimizer.pt"} & hub.repositories["me/plain"].files.keys()
    card = hub.repositories["me/plain"].files["README.md"].decode()
    assert ModelCard(card).data.eval_results is None
    assert "## Results" not in card
    assert "The MLM head was calibrated: logits / 2 - 0.5 (k = 2, shift = 0.5)." in card
    assert "FastEmbed" in card
    assert "vLLM" not in card  # it knows BERT alone
    assert "text-embeddings-inference" not in card
    push(make_static(tmp_path), "me/static")
    card = hub.repositories["me/static"].files["README.md"].decode()
    assert "Qdrant" in card
    assert "OpenSearch" not in card


def test_what_the_card_says_runs(run, hub, monkeypatch):  # noqa: F811
    push(run, REPO)
    card = hub.repositories[REPO].files["README.md"].decode()
    added = card[card.index("## Use it elsewhere") : card.index("## How it was made")]
    code = re.findall(r"^```python\n(.*?)^```$", added, re.MULTILINE | re.DOTALL)[0]
    names = {}
    exec(code.replace(REPO, str(run / "model")), names)
    assert len(names["point"].indices) == len(names["point"].values) > 0
    for command in re.findall(r"anysplade (export [^`\n]+)", added):
        assert main([*command.split(), "--help"]) == 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda run: shutil.rmtree(run / "model"), ModelError, "has no model yet: its training is unfinished; the same command"),
        (lambda run: (run / "model" / "model.safetensors").unlink(), ModelError, "has no weights; save the model again"),
        (
            lambda run: (run / "model" / "config.json").write_text("{}"),
            ModelError,
            "config.json: missing or changed since",
        ),
        (
            lambda run: (run / "model" / "modules.json").unlink(),
            ModelError,
            "not a model of sentence-transformers, and",
        ),
        (lambda run: (run / "model" / "README.md").write_text("---\na: [\n---\n"), ModelError, "README.md: its metadata cannot be"),
        (lambda run: shutil.rmtree(run), ModelError, "no such folder"),
    ],
)
def test_what_is_no_finished_model_is_refused(change, error, message, run, hub):  # noqa: F811
    change(run)
    with pytest.raises(error, match=re.escape(message)) as raised:
        push(run, REPO)
    assert "\n" not in str(raised.value)
    assert not hub.repositories


def test_other_models_are_refused(teachers, hub):  # noqa: F811
    with pytest.raises(ModelError, match="a SentenceTransformer, and only a SparseEncoder can be pushed"):
        push(teachers["dense"], REPO)
    with pytest.raises(ModelError, match="not a model of sentence-transformers"):
        push(teachers["lexical"], REPO)
    assert not hub.requests


def test_a_model_without_a_token_is_refused(run, hub, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match=f"^{REPO}: there is no token for the hub here; log in with: hf auth login"):
        push(run, REPO)
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", "hf_wrongtoken")
    with pytest.raises(OutputError, match=f"^{REPO}: the hub does not accept the token; log in again") as raised:
        push(run, REPO)
    assert "hf_wrongtoken" not in str(raised.value)


def test_a_repository_of_another_kind_or_owner_is_refused(run, hub, teachers):  # noqa: F811
    with pytest.raises(OutputError, match=r"^you/model: you may not write there; name a repository of your own"):
        push(run, "you/model")
    push(run, REPO)
    hub.repositories["you/model"] = hub.repositories[REPO]  # it exists, and is not ours
    with pytest.raises(OutputError, match=r"^you/model: you may not write there"):
        push(run, "you/model")
    with pytest.raises(OutputError, match=f"^{REPO}: exists and is public; make it private"):
        push(run, REPO, private=True)
    dense = (Path(teachers["dense"]) / "README.md").read_bytes()
    hub.repositories[REPO].files |= {"README.md": dense, "pytorch_model.bin": b""}
    with pytest.raises(OutputError, match=f"^{REPO}: has something else than a SparseEncoder; name another"):
        push(run, REPO)
    for name in ("datasets/me/data", "tiny", "me/a b", ""):
        with pytest.raises(OptionError, match="`repo_id` is"):
            push(run, name)


@pytest.mark.parametrize(
    "fault, message",
    [(("create", 500), "the hub failed (500); run the same again"), (("create", 429), "the hub failed (429)")],
)
def test_a_failure_of_the_hub_is_one_line(fault, message, run, hub):  # noqa: F811
    hub.fault = fault
    with pytest.raises(AnyspladeError, match=re.escape(message)) as raised:
        push(run, REPO)
    assert not isinstance(raised.value, UsageError)


def test_no_network_is_one_line(run, hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(AnyspladeError, match=f"^{REPO}: the hub cannot be reached: .*; run the same again to continue$"):
        push(run, REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AnyspladeError, match=f"^{REPO}: the hub cannot be reached: .*offline"):
        push(run, REPO)


def test_the_command(run, hub):  # noqa: F811
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    calls = (["push", run, REPO, "--private"], ["push", run, REPO, "--json"], ["push", run, "you/model"])
    done, again, refused = run_commands(*calls, env=environment)
    assert (done.returncode, done.stdout) == (
        0,
        f"{run / 'model'} is in {hub.url}/{REPO} (private), with the results on tiny\n",
    )
    assert TOKEN not in done.stderr
    assert json.loads(again.stdout)["changed"] is False
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1].startswith("anysplade: you/model: you may not write there")
