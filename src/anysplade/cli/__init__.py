"""The command line: one command, one library call.

Results go to standard output, progress and logs to standard error. Exit code 0 is success, 2 a
mistake of the user's (one line says what and how to mend it), 1 a failure.
"""

import contextlib
import difflib
import functools
import io
import json as jsonlib
import logging
import os
import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict
from rich.console import Console, RenderableType

from anysplade import __version__
from anysplade._common.files import READ_ONLY
from anysplade.errors import AnyspladeError, OptionError, OutputError, UsageError, without_credentials
from anysplade.model.options import BiasPolicy, Choice, Precision
from anysplade.training.config import TrainingConfig

app = App(
    name="anysplade",
    help="Train a SPLADE sparse retriever on any masked language model.",
    version=__version__,
    result_action="return_value",
)

Json = Annotated[bool, Parameter(negative="", help="One JSON document on standard output instead of text.")]
Out = Annotated[Path, Parameter(name="--out")]


@dataclass(frozen=True)
class _Shown:
    """What a command found: as JSON, and for a person."""

    data: dict[str, Any]
    text: list[RenderableType]


def _command(function: Callable[..., _Shown]) -> Callable[..., None]:
    """Register a command. Whatever the libraries print goes to standard error."""

    @functools.wraps(function)
    def run(*args: Any, json: bool = False, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            _quiet_libraries()
            shown = function(*args, json=json, **kwargs)
        if not _first_process():
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # half characters, and what a terminal's encoding lacks
        if json:
            print(_as_json(shown.data))
        else:
            console = Console(soft_wrap=True)
            for part in shown.text:
                console.print(part)

    app.command(run)
    return run


def _as_json(data: dict[str, Any]) -> str:
    """JSON in the characters that standard output can take: as they are, or else escaped."""
    text = jsonlib.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return jsonlib.dumps(data, indent=2)
    return text


@_command
def inspect(model: str, /, *, data: str | None = None, svg: Path | None = None, json: Json = False) -> _Shown:
    """Measure a masked LM's head: what its scale will do, and the k and shift it wants.

    Args:
        model: a masked LM's or sparse encoder's folder or hub id.
        data: training pairs to probe with (BEIR folder, JSONL, python-docs); everyday texts otherwise.
        svg: a file for a picture of the logits before and after.
    """
    from anysplade._common import files
    from anysplade.cli import rendering as report
    from anysplade.model import calibration, encoder, head

    loaded, tokenizer, trained = encoder.open_masked_lm(model)
    queries, documents = calibration.probe_texts(data, progress=_watched())
    probe = head.measure_logits(loaded, tokenizer, queries, documents)
    measured = head.describe_head(loaded, probe, model)
    suggested = calibration.choose(probe, trained=trained)
    verdict = dict(zip(("raw", "calibrated"), suggested.verdicts or (None, None), strict=True))
    if svg is not None:
        files.write_whole(svg, calibration.logit_figure(suggested))
    return _Shown(
        measured.to_dict() | {"suggested": suggested.to_dict(), "verdict": verdict}, report.head_tables(measured, suggested)
    )


@_command
def rescale(
    model: str,
    /,
    *,
    out: Out,
    k: Choice = 8.0,
    shift: Choice = 0.0,
    bias: BiasPolicy = "scale",
    data: str | None = None,
    json: Json = False,
) -> _Shown:
    """Write a stock checkpoint whose MLM logits are logits / k - shift.

    Args:
        model: a masked LM's folder or hub id.
        out: the new checkpoint's folder.
        k: divides the head; "auto" measures what it wants.
        shift: lowers the logits by way of the bias; "auto" likewise.
        bias: whether k divides the decoder's bias too ("scale") or not ("keep").
        data: training pairs to probe with for "auto"; everyday texts otherwise.
    """
    from anysplade._common import files
    from anysplade.cli import rendering as report
    from anysplade.model import calibration, head

    files.require_empty(out)
    loaded, tokenizer = head.load_masked_lm(model, dtype="auto")
    texts = calibration.probe_texts(data, progress=_watched()) if "auto" in (k, shift) else ((), ())
    chosen = calibration.calibrate(loaded, tokenizer, *texts, k=k, shift=shift, bias=bias)
    head.rescale_head(loaded, chosen.k, chosen.shift, bias)
    with files.whole_folder(out) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    written = head.describe_head(loaded, None, str(out))
    return _Shown(
        written.to_dict() | {"k": chosen.k, "shift": chosen.shift, "bias_policy": bias, "out": str(out)},
        report.rescaled_lines(written, chosen, out),
    )


@_command
def train(
    options: Annotated[TrainingConfig, Parameter(name="*")],
    *,
    config: Annotated[Path | None, Parameter(name="--config")] = None,
    json: Json = False,
) -> _Shown:
    """Train a SPLADE encoder; interrupted and started again, it goes on from its last checkpoint.

    Args:
        config: a YAML or TOML file with options by their names in Python; flags win over it.
    """
    from anysplade.cli import rendering as report
    from anysplade.training import run as training

    result = training.train(options, progress=_watched())
    return _Shown(result.to_dict(), report.training_lines(result))


@_command
def mine(
    data: str,
    /,
    *,
    out: Out,
    miner: str = "bm25",
    corpus: str | None = None,
    texts: str | None = None,
    negatives: int = 8,
    depth: int = 100,
    margin: float = 0.05,
    json: Json = False,
) -> _Shown:
    """Find hard negatives for training examples; interrupted and started again, it goes on.

    Args:
        data: training examples, in any form that train takes.
        out: the JSONL file to write.
        miner: bm25, or a sparse encoder's folder or hub id.
        corpus: where to look (JSONL, BEIR folder); the data's own positives otherwise.
        texts: where the ids in the data have their texts.
        negatives: wanted of each example.
        depth: of the ranking they are taken from.
        margin: a document that scores above (1 - margin) times the positive is likely an answer too, and left out.
    """
    from anysplade.training import mining

    mined = mining.mine(
        data,
        out,
        miner=miner,
        corpus=corpus,
        texts=texts,
        negatives=negatives,
        depth=depth,
        margin=margin,
        progress=_watched(),
    )
    return _Shown(mined.to_dict() | {"out": str(out)}, [f"{mined.examples:,} examples with {negatives} negatives each, in {out}"])


@_command
def score(data: str, /, *, teacher: str, out: Out, texts: str | None = None, max_length: int = 512, json: Json = False) -> _Shown:
    """Have a teacher score examples with negatives, for distillation; interrupted and started again, it goes on.

    Args:
        data: training examples with negatives.
        teacher: a cross-encoder's folder or hub id, or bm25.
        out: the JSONL file to write.
        texts: where the ids in the data have their texts.
        max_length: tokens that a query with a document is cut to.
    """
    from anysplade.training import mining

    scored = mining.score(data, out, teacher=teacher, texts=texts, max_length=max_length, progress=_watched())
    return _Shown(scored.to_dict() | {"out": str(out)}, [f"{scored.examples:,} examples scored by {teacher}, in {out}"])


@_command
def evaluate(
    *names: str,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    split: str = "test",
    seeds: bool = False,
    curve: bool = False,
    precision: Precision = "float32",
    max_length: int | None = None,
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    cache: Path | None = None,
    json: Json = False,
) -> _Shown:
    """Measure models on collections: effectiveness and cost, and with several models how sure the differences are.

    Args:
        names: models and then collections. A model is a sparse encoder's folder or hub id, a masked LM as it is,
            bm25, or a TREC run file; a collection is a BEIR folder or zip, a TREC folder, an ir_datasets id, a
            hub dataset, nanobeir or python-docs.
        metrics: names of ir-measures; nDCG@10 RR@10 R@100 R@1000 if none is given.
        split: which qrels.
        seeds: the models are seeds of one: show mean and standard deviation.
        curve: prune documents and queries to their largest weights, and show what that costs and saves.
        precision: of encoding; bfloat16 is faster where the machine has it, and approximate; auto is bfloat16 there.
        max_length: tokens a text is cut to, up to the model's positions; what it was trained with if not given.
        out: a folder for TREC runs, values by query, figures and the JSON.
        cache: a folder for vectors, which are not computed twice; that of ANYSPLADE_CACHE or the user's if not given.
    """
    from anysplade._common import files
    from anysplade.cli import rendering as report
    from anysplade.evaluation import comparisons as comparison
    from anysplade.evaluation import evaluations as evaluation

    measured = metrics or list(evaluation.METRICS)
    found = comparison.evaluate_all(
        names,
        measured,
        split=split,
        seeds=seeds,
        curves=curve,
        precision=precision,
        max_length=max_length,
        output=out,
        cache=cache or evaluation.default_cache(),
        progress=_watched(),
    )
    if out is not None and found.curves:
        files.write_whole(out / "curve.svg", report.curve_figure(found.curves, measured[0]))
    return _Shown(found.to_dict(), report.evaluations_parts(found, measured))


@_command
def compare(
    *runs: str,
    collection: str,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    split: str = "test",
    json: Json = False,
) -> _Shown:
    """Compare run files on a collection: each against the first, with paired tests and the queries that changed most.

    Args:
        runs: TREC run files, two or more; anything else that evaluate takes as a model will do.
        collection: what the runs were made on.
        metrics: names of ir-measures; nDCG@10 RR@10 R@100 R@1000 if none is given.
        split: which qrels.
    """
    from anysplade.cli import rendering as report
    from anysplade.evaluation import comparisons as comparison
    from anysplade.evaluation import evaluations as evaluation

    if len(runs) < 2:
        raise OptionError(f"{len(runs)} runs: name two or more, the first is what the others are compared with")
    measured = metrics or list(evaluation.METRICS)
    found = comparison.evaluate_all(
        [*runs, collection], measured, split=split, cache=evaluation.default_cache(), progress=_watched()
    )
    return _Shown(found.to_dict(), report.evaluations_parts(found, measured))


@_command
def index(
    model: str,
    corpus: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    to: str | None = None,
    precision: Precision = "float32",
    top_k: int | None = None,
    max_length: int | None = None,
    workers: int = 1,
    ray: bool = False,
    json: Json = False,
) -> _Shown:
    """Encode a corpus and write an index; interrupted, or when the corpus changed, the same command brings it up to date.

    Args:
        model: a sparse encoder's folder or hub id.
        corpus: a file (JSONL, CSV, TSV, Parquet), or any collection that evaluate takes.
        out: the index's folder.
        to: a server instead: qdrant://host:6333/name or opensearch://host:9200/name.
        precision: of encoding; bfloat16 is faster where the machine has it, and approximate; auto is bfloat16 there.
        top_k: keep only the so many largest weights of each document: an approximation, recorded.
        max_length: tokens a text is cut to, up to the model's positions; what it was trained with if not given.
        workers: processes that encode, each with the model.
        ray: encode on a Ray cluster, workers at once.
    """
    from anysplade.evaluation.evaluations import default_cache
    from anysplade.search.index import Index
    from anysplade.search.remote import RemoteIndex

    if (out is None) == (to is None):
        raise OptionError("say where the index goes: --out FOLDER or --to qdrant://host:6333/name")
    options: dict[str, Any] = {"precision": precision, "top_k": top_k, "max_length": max_length}
    options |= {"workers": workers, "ray": ray, "progress": _watched()}
    if to is not None:
        work = default_cache()
        if work is None:
            raise OutputError(f"--to {without_credentials(to)}: the encoded corpus needs a folder; set ANYSPLADE_CACHE to one")
        sent = RemoteIndex.build(model, corpus, to, work, **options)
        found = {"documents": len(sent), "sent": sent.sent, "left_over": sent.left_over, "index": sent.address}
        lines: list[RenderableType] = [
            f"{len(sent):,} documents ({sent.sent:,} sent now), at {sent.address}",
            f'next: anysplade search {sent.address} "your query"',
        ]
        return _Shown(sent.about | found, lines)
    assert out is not None
    with Index.build(model, corpus, out, **options) as built:
        found = built.describe() | built.changes._asdict() | {"index": str(out)}
    changed = "{added:,} added, {replaced:,} replaced, {deleted:,} deleted".format_map(found)
    return _Shown(
        found,
        [
            f"{found['documents']:,} documents ({changed}), {found['document_active_dims']:.0f} active dims a document, in {out}",
            f'next: anysplade search {out} "your query"',
        ],
    )


@_command
def search(
    index: str,
    query: str,
    /,
    *,
    k: int = 10,
    filter: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    exact: bool = False,
    model: str | None = None,
    json: Json = False,
) -> _Shown:
    """Search an index; each hit says which terms made its score.

    Args:
        index: an index's folder, or its address on a server.
        query: the text to search for.
        k: how many hits at most.
        filter: metadata that hits must have, as name=value; a name twice means any of its values.
        exact: search the vectors in memory, in float64, instead of the engine.
        model: where the index's model lies, if it was moved.
    """
    from anysplade.cli import rendering as report
    from anysplade.search.remote import open_index

    wanted: dict[str, list[Any]] = {}
    for condition in filter or []:
        name, equals, value = condition.partition("=")
        if not name or not equals:
            raise OptionError(f"filter {condition!r}: give name=value, such as lang=en")
        with contextlib.suppress(ValueError):  # numbers and true are what they are in JSON; the rest is text
            value = jsonlib.loads(value)
        wanted.setdefault(name, []).append(value)
    hits = open_index(index, model).search(query, k=k, explain=True, filter=wanted or None, exact=exact)
    return _Shown({"query": query, "hits": [hit.to_dict() for hit in hits]}, report.hit_lines(hits))


@_command
def serve(
    index: str,
    beside: str | None = None,
    /,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    json: Json = False,
) -> _Shown:
    """Serve a search page and an HTTP API over an index, until stopped.

    Args:
        index: an index's folder.
        beside: another index's folder, or bm25, for the page that compares.
        model: where the index's model lies, if it was moved.
        host: an address of this machine; one that others reach needs a token.
        port: 0 for any that is free.
        token: what every request must carry; ANYSPLADE_TOKEN, if that is set.
    """
    from anysplade.serving import app as server

    served = server.serve(index, beside, model=model, host=host, port=port, token=token or os.environ.get("ANYSPLADE_TOKEN"))
    return _Shown(served.to_dict(), [f"{served.requests:,} requests answered"])


@_command
def size(
    model: str,
    /,
    *,
    documents: str,
    corpus: str | None = None,
    sample: int = 500,
    qps: float = 100.0,
    memory: float = 32.0,
    json: Json = False,
) -> _Shown:
    """Tell what an index will need: bytes, postings a query, queries a second a core, shards, hours of encoding.

    Args:
        model: a sparse encoder's folder or hub id.
        documents: how many, such as 100M.
        corpus: texts like those that will be indexed; a collection brings its queries too.
        sample: documents, and queries, that are encoded to measure.
        qps: queries a second wanted.
        memory: GiB of a machine, for postings.
    """
    from anysplade.cli import rendering as report
    from anysplade.search import sizing

    options: dict[str, Any] = {"corpus": corpus, "sample": sample, "qps": qps, "memory_gib": memory, "progress": _watched()}
    found = sizing.size(model, sizing.parse_count(documents), **options)
    return _Shown(found.to_dict(), report.size_lines(found))


@_command
def export(
    index: str,
    /,
    *,
    format: Literal["anserini", "ciff"],
    out: Out,
    quantization: int = 100,
    model: str | None = None,
    json: Json = False,
) -> _Shown:
    """Write an index's vectors for Lucene: Anserini's JSONL, or the Common Index File Format.

    Args:
        index: an index's folder.
        format: anserini (a folder of JSONL files) or ciff (one file).
        out: the folder or file to write.
        quantization: weights are written as whole numbers, times this.
        model: where the index's model lies, if it was moved.
    """
    from anysplade.model.encoder import term_names
    from anysplade.search.engines import export as exporting
    from anysplade.search.index import Index

    with Index.load(index, model) as opened:
        write = exporting.export_anserini if format == "anserini" else exporting.export_ciff
        count = write(opened.store, term_names(opened.encoder), out, quantization)
    return _Shown({"documents": count, "out": str(out), "format": format}, [f"{count:,} documents in {out}"])


@_command
def study(
    name: str,
    /,
    *,
    out: Out,
    backbones: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    data: str = "python-docs",
    collections: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    seeds: int = 3,
    k: float = 8.0,
    training: Path | None = None,
    workers: int | None = None,
    json: Json = False,
) -> _Shown:
    """Run the paper's experiments with their controls and error bars; interrupted and started again, it goes on.

    Args:
        name: norm, tradeoff, dynamics, sensitivity, controls or main; all for all six.
        out: folder of the cells and of the report.
        backbones: masked LMs, folders or hub ids; the two bundled ones if none is given.
        data: training examples, in any form that train takes.
        collections: what is evaluated, the first one in-domain; python-docs if none is given.
        seeds: trainings of every row.
        k: the paper's; the main study also has its half and its double.
        training: a YAML or TOML file with train's options for all cells; what suits the bundled backbones otherwise.
        workers: cells at a time; one for every GPU, or for every core.
    """
    from anysplade.cli import rendering as report
    from anysplade.study.plan import StudyConfig
    from anysplade.study.run import run_study

    options: dict[str, Any] = {"output": str(out), "data": data, "seeds": seeds, "k": k, "workers": workers}
    if backbones:
        options["backbones"] = tuple(backbones)
    if collections:
        options["collections"] = tuple(collections)
    if training is not None:
        options["training"] = _read_options(training, "--training", apart=("backbone", "data", "output", "k", "shift", "seed"))
    result = run_study(StudyConfig(name, **options), progress=_watched())
    return _Shown(result.to_dict(), report.study_lines(result))


@_command
def demo(*, out: Out = Path("anysplade-demo"), json: Json = False) -> _Shown:
    """Run all of it on bundled parts, offline: calibrate, train, evaluate, index, search.

    Args:
        out: the folder for everything it makes; a second run reuses what is there.
    """
    from anysplade.cli import rendering as report
    from anysplade.cli.demo import run_demo

    for told in ("training.run", "data.pairs", "model.encoding"):  # six runs' options, columns and cut texts; warnings stay
        logging.getLogger(f"anysplade.{told}").setLevel(logging.WARNING)
    result = run_demo(out, progress=_watched())
    return _Shown(result.to_dict(), report.demo_parts(result))


def _first_process() -> bool:
    """Of those that torchrun started, one speaks."""
    return os.environ.get("RANK", "0") == "0"


def _config_file(arguments: Sequence[str]) -> list[Dict]:
    """The file that ``train --config`` names, as a source of options.

    Raises:
        OptionError: it cannot be read, or has an option that does not exist.
    """
    named = [i for i, argument in enumerate(arguments) if argument == "--config" or argument.startswith("--config=")]
    if list(arguments[:1]) != ["train"] or not named:
        return []
    argument, following = arguments[named[-1]], arguments[named[-1] + 1 : named[-1] + 2]
    path = Path(argument.partition("=")[2] if "=" in argument else "".join(following)).expanduser()
    options = _read_options(path, "--config")
    given = {"out" if name == "output" else name.replace("_", "-"): value for name, value in options.items()}
    return [Dict(data=given, use_commands_as_keys=False, source=str(path))]


def _read_options(path: Path, flag: str, apart: Sequence[str] = ()) -> dict[str, Any]:
    """Options of ``train`` by their names in Python, from a YAML or TOML file.

    Raises:
        OptionError: it cannot be read, or has an option that does not exist or is one of ``apart``.
    """
    known = {field.name for field in fields(TrainingConfig)} - {"_", *apart}
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        options = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{flag} {path}: cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{flag} {path}: {error}") from error
    if not isinstance(options, dict) or not options:
        raise OptionError(f"{flag} {path}: holds no options; each line is one, such as batch_size: 32")
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            said = "is set by the command itself" if name in apart else f"did you mean {near[0]}?" if near else ""
            raise OptionError(f"{flag} {path}: no option {name!r}" + (f"; {said}" if said else ""))
    return options


def _watched() -> bool:
    return sys.stderr.isatty() and _first_process()


class _Formatter(logging.Formatter):
    """Nothing that is logged, by libraries neither, has a password or a token in it."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def _quiet_libraries() -> None:
    """Keep standard error for anysplade's own progress and for warnings that ask for something."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that ask nobody; anysplade's own say when they are shown
    warnings.simplefilter("ignore", FutureWarning)  # of one library to another
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anysplade").setLevel(logging.INFO if _first_process() else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(message)s"))
    for library in ("sentence_transformers", "huggingface_hub", "httpx", "httpx2", "opensearch", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app.config = _config_file(arguments)
        app(arguments, exit_on_error=False, print_error=False)
    except (CycloptsError, UsageError) as error:
        _complain(error)
        return 2
    except (AnyspladeError, OSError, MemoryError) as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        print("anysplade: interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    return 0


def run() -> None:
    """Entry point of the ``anysplade`` command."""
    sys.exit(main())


def _complain(error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        allow = "; allow it, or name another place" if error.errno in READ_ONLY else ""
        text = f"{error.filename}: {error.strerror}{allow}"
    text = without_credentials(text)
    print(f"anysplade: {text}", file=sys.stderr)


if __name__ == "__main__":
    run()
