"""The command line: one command, one library call.

Results go to standard output, progress and logs to standard error. Exit code 0 is success, 2 a
mistake of the user's (one line says what and how to mend it), 1 a failure.
"""

import contextlib
import functools
import json as jsonlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console, RenderableType

from anysplade import __version__
from anysplade.errors import AnyspladeError, UsageError
from anysplade.options import BiasPolicy, Choice, Precision, TrainingConfig

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
        if json:
            print(jsonlib.dumps(shown.data, indent=2, ensure_ascii=False))
        else:
            console = Console(soft_wrap=True)
            for part in shown.text:
                console.print(part)

    app.command(run)
    return run


@_command
def inspect(model: str, /, *, data: str | None = None, svg: Path | None = None, json: Json = False) -> _Shown:
    """Measure a masked LM's head: what its scale will do, and the k and shift it wants.

    Args:
        model: a masked LM's folder or hub id.
        data: training pairs to probe with (BEIR folder, JSONL, python-docs); everyday texts otherwise.
        svg: a file for a picture of the logits before and after.
    """
    from anysplade import calibration, files, head, report

    loaded, tokenizer = head.load_masked_lm(model)
    queries, documents = calibration.probe_texts(data, progress=_watched())
    probe = head.measure_logits(loaded, tokenizer, queries, documents)
    measured = head.describe_head(loaded, probe, model)
    suggested = calibration.choose(probe)
    verdict = dict(zip(("raw", "calibrated"), suggested.verdicts or (None, None), strict=True))
    if svg is not None:
        files.write_whole(svg, report.logit_figure(suggested))
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
    from anysplade import calibration, files, head, report

    files.require_empty(out)
    loaded, tokenizer = head.load_masked_lm(model)
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
def train(config: Annotated[TrainingConfig, Parameter(name="*")], *, json: Json = False) -> _Shown:
    """Train a SPLADE encoder; interrupted and started again, it goes on from its last checkpoint."""
    from anysplade import report, training

    result = training.train(config, progress=_watched())
    return _Shown(result.to_dict(), report.training_lines(result))


@_command
def evaluate(
    model: str,
    collection: str,
    /,
    *,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    split: str = "test",
    precision: Precision = "float32",
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    json: Json = False,
) -> _Shown:
    """Measure a model on a collection: effectiveness and cost.

    Args:
        model: a sparse encoder's folder or hub id, or bm25.
        collection: a BEIR folder or python-docs.
        metrics: names of ir-measures; nDCG@10 RR@10 R@100 if none is given.
        split: which qrels.
        precision: of encoding; bfloat16 is faster where the machine has it, and approximate; auto is bfloat16 there.
        out: a folder for the TREC run and the JSON.
    """
    from anysplade import evaluation, report

    result = evaluation.evaluate(
        model,
        collection,
        metrics or evaluation.METRICS,
        split=split,
        precision=precision,
        output=out,
        progress=_watched(),
    )
    return _Shown(result.to_dict(), report.evaluation_table([result.to_dict()], list(result.metrics)))


@_command
def index(model: str, corpus: str, /, *, precision: Precision = "float32", out: Out, json: Json = False) -> _Shown:
    """Encode a corpus and write an index.

    Args:
        model: a sparse encoder's folder or hub id.
        corpus: a JSONL file, a BEIR folder or python-docs.
        precision: of encoding; bfloat16 is faster where the machine has it, and approximate; auto is bfloat16 there.
        out: the index's folder.
    """
    from anysplade.index import Index

    built = Index.build(model, corpus, out, precision=precision, progress=_watched())
    return _Shown(
        built.about | {"index": str(out)},
        [
            f"{len(built):,} documents, {built.about['document_active_dims']:.0f} active dims a document, in {out}",
            f'next: anysplade search {out} "your query"',
        ],
    )


@_command
def search(index: str, query: str, /, *, k: int = 10, json: Json = False) -> _Shown:
    """Search an index; each hit says which terms made its score.

    Args:
        index: an index's folder.
        query: the text to search for.
        k: how many hits at most.
    """
    from anysplade import report
    from anysplade.index import Index

    hits = Index.load(index).search(query, k=k, explain=True)
    return _Shown({"query": query, "hits": [hit.to_dict() for hit in hits]}, report.hit_lines(hits))


@_command
def demo(*, out: Out = Path("anysplade-demo"), json: Json = False) -> _Shown:
    """Run all of it on bundled parts, offline: calibrate, train, evaluate, index, search.

    Args:
        out: the folder for everything it makes; a second run reuses what is there.
    """
    from anysplade import report
    from anysplade.demo import run_demo

    result = run_demo(out, progress=_watched())
    return _Shown(result.to_dict(), report.demo_parts(result))


def _watched() -> bool:
    return sys.stderr.isatty()


def _quiet_libraries() -> None:
    """Keep standard error for anysplade's own progress and for warnings that ask for something."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anysplade").setLevel(logging.INFO)
    for library in ("sentence_transformers", "huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
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
    print(f"anysplade: {text}", file=sys.stderr)


if __name__ == "__main__":
    run()
