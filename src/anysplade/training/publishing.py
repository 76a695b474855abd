"""Publish a model on the Hugging Face hub, with a card that has its results, both effectiveness and cost."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from anysplade import __version__
from anysplade._common.arguments import near, require
from anysplade._common.files import user_path
from anysplade._common.outputs import damaged_file, read_record
from anysplade._common.progress import begin
from anysplade.errors import AnyspladeError, ModelError, OptionError, OutputError
from anysplade.evaluation.costs import COSTS
from anysplade.model.saved import fingerprint, resolve_model, saved_kind
from anysplade.training.card import published_card

logger = logging.getLogger(__name__)

# Beside a model, and where in them its digests are.
_RECORDS = {"run.json": "model", "adaptation.json": "files", "distillation.json": "files"}
# Files of a training's checkpoint, and hidden ones.
_LEFT_OUT = ["optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json", "complete"]
_LEFT_OUT += [".*", "*/.*"]
_REFUSED = {
    401: "the hub does not accept the token; log in again with: hf auth login",
    403: "you may not write there; name a repository of your own, or log in with a token that may write: hf auth login",
    404: "not there for you; name a repository of your own, or log in with a token that may write: hf auth login",
}


def push(model: str | Path, repo_id: str, *, private: bool = False, progress: bool = False) -> dict[str, Any]:
    """Upload a trained model to the Hugging Face hub, as a repository that loads with ``SparseEncoder(repo_id)``.

    The card on the hub is the model's own, with the evaluations of this model that lie in the run's folder (``evaluation.json``),
    as text and as the hub's ``model-index``, and with its use in other software. Files that the hub has already are not sent again.

    Args:
        model: the output of ``train``, ``adapt`` or ``distil``, or the folder of any saved ``SparseEncoder``.
        repo_id: name of the repository, ``org/name``; it is created if there is none.
        private: create a private repository; an existing one that is public is refused.
        progress: log what is uploaded.

    Returns:
        ``model``, ``repo_id``, ``url``, ``private``, ``commit``, ``changed`` (whether this call made the commit), and
        ``evaluations``, the names of their collections.

    Raises:
        ModelError: not a saved SparseEncoder, or it is unfinished or damaged.
        OptionError: ``repo_id`` is no name of a repository.
        OutputError: there is no token, or it may not write there, or the repository has something else.
        AnyspladeError: the hub cannot be reached.
    """
    require("repo_id", repo_id, str, "give the name of a repository, org/name")
    if repo_id.count("/") != 1:
        raise OptionError(f"`repo_id` is {repo_id!r}: give org/name")
    source = _saved_encoder(model)
    if get_token() is None:
        raise OutputError(f"{repo_id}: there is no token for the hub here; log in with: hf auth login (or set HF_TOKEN)")
    evaluations = _evaluations(source, user_path(model))
    api = HfApi(library_name="anysplade", library_version=__version__)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        shutil.copytree(source.resolve(), folder, copy_function=os.symlink)  # the model's own card stays as it is
        _write_card(folder, source, repo_id, evaluations)
        with _in_one_line(repo_id):
            url = api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the organization has it
            before = api.model_info(repo_id)
            _require_usable(before, private)
            begin(f"uploading {source} to {url}", progress)
            message = "Upload a model trained with anysplade"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=[*_LEFT_OUT])
    return {
        "model": str(source),
        "repo_id": repo_id,
        "url": str(url),
        "private": bool(before.private),
        "commit": commit.oid,
        "changed": commit.oid != before.sha,
        "evaluations": [evaluation["collection"] for evaluation in evaluations],
    }


def _saved_encoder(model: str | Path) -> Path:
    """The folder of a saved SparseEncoder; raises ModelError for anything else, and if it is unfinished or damaged."""
    if isinstance(model, str | Path) and not user_path(model).is_dir():
        raise ModelError(f"{model}: no such folder; give the output of train, or of a SparseEncoder's save_pretrained{near(model)}")
    source = Path(resolve_model(model))
    if (kind := saved_kind(str(source))) != "SparseEncoder":
        what = "not a model of sentence-transformers" if kind is None else f"a {kind}"
        raise ModelError(f"{source}: {what}, and only a SparseEncoder can be pushed; train it first: anysplade train {source} DATA")
    if not [*source.rglob("*.safetensors"), *source.rglob("pytorch_model*.bin")]:
        raise ModelError(f"{source}: has no weights; save the model again")
    for name, digests in _RECORDS.items():
        known = (read_record(source.parent / name) or {}).get(digests, {})
        if source.name == "model" and (damaged := damaged_file(source, known)):
            raise ModelError(f"{source / damaged}: missing or changed since it was written; make the model again")
    return source


def _evaluations(source: Path, run: Path) -> list[dict[str, Any]]:
    """The records of the model's evaluations in its run's folder, the newest of each collection and precision."""
    own, found = fingerprint(str(source)), {}
    if any((source.parent / name).is_file() for name in _RECORDS):  # the model was given, and not the run
        run = source.parent
    for path in sorted(run.rglob("evaluation.json"), key=lambda path: path.stat().st_mtime):
        record = read_record(path, "collection", "kind", "precision", *COSTS)
        if record is None or record["kind"] != "sparse":
            continue
        if record.get("model_fingerprint") != own:
            logger.warning("%s: of another model, or of this one before it changed; not in the card", path)
            continue
        found[record["collection"], record["precision"]] = record
    return [found[key] for key in sorted(found)]


def _write_card(folder: Path, source: Path, repo_id: str, evaluations: list[dict[str, Any]]) -> None:
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else f"# {repo_id}\n"
    try:
        card = published_card(card, repo_id, str(source), evaluations)
    except Exception as error:  # of YAML and the hub's library, which have no common base
        raise ModelError(f"{source / 'README.md'}: its metadata cannot be read: {_joined(error)}") from error
    path.unlink(missing_ok=True)  # a link
    path.write_text(card, encoding="utf-8")


def _require_usable(info: Any, private: bool) -> None:
    """Raise OutputError for a repository that a push must not write to."""
    files = {sibling.rfilename for sibling in info.siblings or []} - {".gitattributes", "README.md"}
    if files and "sparse-encoder" not in (info.tags or []):
        raise OutputError(f"{info.id}: has something else than a SparseEncoder; name another repository")
    if private and not info.private:
        raise OutputError(f"{info.id}: exists and is public; make it private in its settings on the hub, or name another one")


@contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    """Turn the errors of the hub into one line with the fix."""
    try:
        yield
    except AnyspladeError:
        raise
    except HFValidationError as error:
        raise OptionError(f"`repo_id` is {repo_id!r}: {_joined(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = _REFUSED.get(status, error.server_message or _joined(error))
        if status < 500 and status != 429:
            raise OutputError(f"{repo_id}: {why}") from error
        raise AnyspladeError(f"{repo_id}: the hub failed ({status}); run the same again later") from error
    except ValueError as error:  # of the card's metadata, by the hub
        raise ModelError(f"{repo_id}: {_joined(error)}") from error
    except Exception as error:  # errors of the HTTP clients have no common base
        raise AnyspladeError(f"{repo_id}: the hub cannot be reached: {_joined(error)}; run the same again to continue") from error


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
