"""Commands that train and prepare training data: train, adapt, distil, head, pairs, mine, score, push."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import RenderableType
from rich.text import Text

from anysplade._common.progress import counted, duration
from anysplade.cli.app import Result, command, is_first_process
from anysplade.cli.library import options_of
from anysplade.cli.rendering import evaluation_table, snippet
from anysplade.data.names import PAIR_KINDS
from anysplade.training.config import TrainingConfig

if TYPE_CHECKING:
    from anysplade.training.head_training import HeadTraining
    from anysplade.training.run import TrainingResult


@dataclass(frozen=True)
class _TrainingOptions(TrainingConfig):
    output: Annotated[str, Parameter(name="--out")] = field(kw_only=True)

    __doc__ = TrainingConfig.__doc__  # the help texts of the options


@command
def train(options: Annotated[_TrainingOptions, Parameter(name="*")], *, config: Path | None = None) -> Result:
    """Train a SPLADE encoder; after an interruption, the same command continues from the last checkpoint.

    Args:
        config: a YAML or TOML file with options by their names in Python; options of the command line override it.
    """
    from anysplade.training import run as training

    result = training.train(options, progress=is_first_process())
    return Result(result.to_dict(), training_lines(result))


def training_lines(result: "TrainingResult") -> list[RenderableType]:
    """What was trained, the loss at both ends, and where the model is."""
    means = [
        f"{part['mean']:.3g} over steps {part['from_step']}-{part['to_step']}" for part in (result.ranking_loss or {}).values()
    ]
    chance = next((seen["chance"] for seen in result.monitoring["observations"]), None)  # None unless the loss is contrastive
    guessing = "" if chance is None else f" (guessing: {chance:.3g})"
    loss = f"; ranking loss {', '.join(dict.fromkeys(means))}{guessing}" if means else ""
    resumed = f", resumed at step {result.resumed_from}" if result.resumed_from else ""
    return [
        f"k={result.calibration['k']:g}, shift={result.calibration['shift']:g}; "
        f"{counted(result.steps, 'step')} on {counted(result.pairs, 'pair')} in {duration(result.seconds)}{resumed}{loss}",
        f"model: {result.model}" + (f", which reads {result.max_seq_length:,} tokens of a text" if result.max_seq_length else ""),
        f"next: anysplade evaluate {result.model} COLLECTION",
    ]


@command
@options_of("training.head_training", "train_head", without=("checkpoint_steps",))
def head(encoder: str, /, *, text: str, out: Path, **options: Any) -> Result:
    """Give an encoder an MLM head, so that it can be trained as SPLADE; after an interruption, the same command continues."""
    from anysplade.training import head_training

    result = head_training.train_head(encoder, text, out, **options, progress=is_first_process())
    return Result(result.to_dict(), head_training_lines(result))


def head_training_lines(result: "HeadTraining") -> list[RenderableType]:
    """What the head was trained on, its loss before and after, and where the model is."""
    losses = ", ".join(f"{name} {first:.2f} → {last:.2f}" for name, (first, last) in result.losses.items())
    return [
        f"{result.architecture}: {counted(result.options['steps'], 'step')} on {counted(result.texts, 'text')} in "
        f"{duration(result.seconds)}; loss: {losses}",
        f"model: {result.model}",
        f"next: anysplade train {result.model} DATA --out RUN",
    ]


@command
@options_of("training.adaptation", "adapt")
def adapt(model: str, corpus: str, /, *, teacher: str, out: Path, kinds: tuple[str, ...] = PAIR_KINDS, **options: Any) -> Result:
    """Adapt a sparse encoder to a corpus without labels, at no more search cost; the result is kept only if a test allows it.

    Args:
        kinds: kinds of training pairs: title, heading, sentence.
    """
    from anysplade.training import adaptation

    result = adaptation.adapt(model, corpus, out, teacher=teacher, kinds=kinds, **options, progress=is_first_process())
    rows = [{"model": name} | costs for name, costs in (("original", result.before), ("adapted", result.after))]
    metrics = [name for name in result.before if not name.endswith(("dims", "flops"))]
    return Result(
        result.to_dict(),
        [
            evaluation_table(rows, metrics),
            f"verdict, judged by {result.judged_by}: {result.reason}",
            *_kind_lines(result.by_kind),
            f"kept: the {result.kept} model, in {result.model}"
            + (f"; the adapted one is in {out / 'adapted'}" if result.kept == "original" else ""),
            f"next: anysplade index {result.model} {corpus} --out INDEX",
        ],
    )


def _kind_lines(by_kind: dict[str, dict[str, Any]]) -> list[str]:
    """The metric of each kind of held-out pairs, in one line if there are several."""
    shown = [f"{kind} {part['before']:.3f} → {part['after']:.3f} ({part['queries']})" for kind, part in by_kind.items()]
    return [f"by kind of pair (queries): {', '.join(shown)}"] if len(shown) > 1 else []


@command
@options_of("training.distillation", "distil")
def distil(dense: str, corpus: str, /, *, out: Path, kinds: tuple[str, ...] = PAIR_KINDS, **options: Any) -> Result:
    """Make a sparse encoder of a dense model, for documents without labels; after an interruption, the same command continues.

    Args:
        kinds: kinds of pairs to make: title, heading, sentence.
    """
    from anysplade.training import distillation

    result = distillation.distil(dense, corpus, out, kinds=kinds, **options, progress=is_first_process())
    metrics = [name for name in result.rows[0] if name != "model" and not name.endswith(("dims", "flops", "words"))]
    return Result(
        result.to_dict(),
        [
            evaluation_table(result.rows, metrics),
            Text(result.reason),
            f"model: {result.model}, trained on {counted(result.trained_on, 'pair')}",
            f"next: anysplade index {result.model} {corpus} --lexical {options['lexical']:g} --out INDEX",
        ],
    )


@command
def pairs(corpus: str, /, *, out: Path, kinds: tuple[str, ...] = PAIR_KINDS) -> Result:
    """Make training pairs from documents alone: titles, headings and sentences stand for queries.

    Args:
        corpus: documents (JSONL, BEIR folder), an ir_datasets id, a hub dataset or python-docs.
        out: the JSONL file to write.
        kinds: kinds of pairs: title, heading, sentence.
    """
    from anysplade.data.document_pairs import in_words, make_pairs

    made = make_pairs(corpus, out, kinds=kinds, progress=is_first_process())
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in made.pairs.items())
    count, documents = counted(sum(made.pairs.values()), "pair"), counted(made.documents, "document")
    lines = [f"{count} from {documents} ({by_kind}), in {out}"]
    for part, found in made.left_out.items():
        if described := in_words(found):
            lines.append(f"left out, {part}: {described}")
    for row in made.examples:
        lines += [f"{row['kind']}: {snippet(row['query'])}", f"    {snippet(row['positive'])}"]
    lines.append(f"next: anysplade train MODEL {out} --out RUN")
    return Result(made.to_dict() | {"out": str(out)}, [*map(Text, lines)])


@command
@options_of("training.mining", "mine", without=("max_length", "precision"))
def mine(data: str, /, *, out: Path, miner: tuple[str, ...] = ("bm25",), **options: Any) -> Result:
    """Find hard negatives for training examples; after an interruption, the same command continues.

    Args:
        data: training examples, in any form that train takes.
        miner: bm25, or folder or hub id of a sparse encoder or dense model; several miners give candidates in turn.
    """
    from anysplade.training import mining

    mined = mining.mine(data, out, miner=miner[0] if len(miner) == 1 else miner, **options, progress=is_first_process())
    line = f"{counted(mined.examples, 'example')} with {counted(options['negatives'], 'negative')} each, in {out}"
    return Result(mined.to_dict() | {"out": str(out)}, [line])


@command
@options_of("training.mining", "score", without=("batch_size",))
def score(data: str, /, *, teacher: str, out: Path, **options: Any) -> Result:
    """Score examples and their negatives with a teacher, for distillation; after an interruption, the same command continues."""
    from anysplade.training import mining

    scored = mining.score(data, out, teacher=teacher, **options, progress=is_first_process())
    return Result(scored.to_dict() | {"out": str(out)}, [f"{counted(scored.examples, 'example')} scored by {teacher}, in {out}"])


@command
def push(model: str, repo_id: str, /, *, private: Annotated[bool, Parameter(negative="")] = False) -> Result:
    """Publish a trained model on the Hugging Face hub, with a card that has its results and its use in other software.

    Args:
        model: the output of train, adapt or distil, or the folder of any saved SparseEncoder.
        repo_id: name of the repository, ORG/NAME; it is created if there is none.
        private: create a private repository; an existing one that is public is refused.
    """
    from anysplade.training import publishing

    pushed = publishing.push(model, repo_id, private=private, progress=is_first_process())
    results = f"with the results on {', '.join(pushed['evaluations'])}" if pushed["evaluations"] else "without results"
    what = f"{pushed['model']} is in" if pushed["changed"] else "nothing has changed since the last push to"
    lines = [f"{what} {pushed['url']}{' (private)' if pushed['private'] else ''}, {results}"]
    if not pushed["evaluations"] and pushed["model"] != str(Path(model)):  # it is in a run's folder
        lines.append(f"next: anysplade evaluate {model} COLLECTION --out {Path(model) / 'evaluation'}, and push again")
    return Result(pushed, [*map(Text, lines)])
