"""Commands that train and prepare training data: train, adapt, head, pairs, mine, score."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import RenderableType
from rich.text import Text

from anysplade._common.progress import counted, duration
from anysplade.cli.app import Out, Result, command, is_first_process
from anysplade.cli.rendering import evaluation_table, snippet
from anysplade.data.names import PAIR_KINDS
from anysplade.training.config import TrainingConfig, TrainingPrecision

if TYPE_CHECKING:
    from anysplade.training.head_training import HeadTraining
    from anysplade.training.run import TrainingResult

_Kinds = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


@dataclass(frozen=True)
class _TrainingOptions(TrainingConfig):
    output: Annotated[str, Parameter(name="--out")] = field(kw_only=True)
    report_to: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = field(default=(), kw_only=True)

    __doc__ = TrainingConfig.__doc__  # the help texts of the options


@command
def train(
    options: Annotated[_TrainingOptions, Parameter(name="*")],
    *,
    config: Annotated[Path | None, Parameter(name="--config")] = None,
) -> Result:
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
def head(
    encoder: str,
    /,
    *,
    text: str,
    out: Out,
    steps: int = 300,
    batch_size: int = 16,
    max_length: int = 96,
    learning_rate: float = 2e-3,
    encoder_learning_rate: float = 0.0,
    layer_decay: float = 0.7,
    seed: int = 0,
) -> Result:
    """Give an encoder an MLM head, so that it can be trained as SPLADE; after an interruption, the same command continues.

    Args:
        encoder: folder or hub id of a dense embedding model or an encoder.
        text: a corpus, or a text file with one text per line, to train the head on; ideally the texts to be searched.
        out: folder of the masked LM.
        steps: training steps.
        batch_size: texts per step.
        max_length: tokens of a piece of text; longer texts are cut into pieces.
        learning_rate: peak learning rate of the head.
        encoder_learning_rate: peak learning rate of the encoder's top layer; 0 leaves the encoder as it is.
        layer_decay: factor from a layer's learning rate to that of the layer below it.
        seed: seed of everything random.
    """
    from anysplade.training import head_training

    result = head_training.train_head(
        encoder,
        text,
        out,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        encoder_learning_rate=encoder_learning_rate,
        layer_decay=layer_decay,
        seed=seed,
        progress=is_first_process(),
    )
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
def adapt(
    model: str,
    corpus: str,
    /,
    *,
    teacher: str,
    out: Out,
    judged: str | None = None,
    split: str = "test",
    kinds: _Kinds = PAIR_KINDS,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    max_length: int | None = 256,
    precision: TrainingPrecision = "float32",
    seed: int = 0,
) -> Result:
    """Adapt a sparse encoder to a corpus without labels, at no more search cost; the result is kept only if it is better.

    Args:
        model: folder or hub id of a sparse encoder.
        corpus: the documents, in any form that index takes.
        teacher: folder or hub id of a dense model, sparse encoder or cross-encoder.
        out: a folder; its model/ is the adapted model, or the original if the adapted one is not better.
        judged: a collection to evaluate on; by default a tenth of the documents is held out for that.
        split: its qrels to read.
        kinds: kinds of training pairs: title, heading, sentence.
        steps: training steps.
        batch_size: queries per step.
        learning_rate: peak learning rate.
        max_length: tokens to cut a text to in training; the adapted model reads at least as many as the original.
        precision: number format of matrix products; bfloat16 is faster on machines with support.
        seed: seed of everything random.
    """
    from anysplade.training import adaptation

    result = adaptation.adapt(
        model,
        corpus,
        out,
        teacher=teacher,
        judged=judged,
        split=split,
        kinds=kinds,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        precision=precision,
        seed=seed,
        progress=is_first_process(),
    )
    rows = [{"model": name} | costs for name, costs in (("original", result.before), ("adapted", result.after))]
    metrics = [name for name in result.before if not name.endswith(("dims", "flops"))]
    return Result(
        result.to_dict(),
        [
            evaluation_table(rows, metrics),
            f"judged by {result.judged_by}: {result.reason}",
            f"kept: the {result.kept} model, in {result.model}"
            + (f"; the adapted one is in {out / 'adapted'}" if result.kept == "original" else ""),
            f"next: anysplade index {result.model} {corpus} --out INDEX",
        ],
    )


@command
def pairs(corpus: str, /, *, out: Out, kinds: _Kinds = PAIR_KINDS) -> Result:
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
def mine(
    data: str,
    /,
    *,
    out: Out,
    miner: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("bm25",),
    teacher: str | None = None,
    corpus: str | None = None,
    texts: str | None = None,
    negatives: int = 8,
    depth: int = 100,
    margin: float = 0.05,
) -> Result:
    """Find hard negatives for training examples; after an interruption, the same command continues.

    Args:
        data: training examples, in any form that train takes.
        out: the JSONL file to write.
        miner: bm25, or folder or hub id of a sparse encoder or dense model; several miners give candidates in turn.
        teacher: a dense model, sparse encoder or cross-encoder that separates likely answers from negatives; each miner itself by
            default.
        corpus: where to search (JSONL, BEIR folder); the data's own positives by default.
        texts: a collection with the texts of ids in the data.
        negatives: negatives per example.
        depth: length of the ranking to take them from.
        margin: a document that scores above (1 - margin) times the positive is likely an answer too, and left out.
    """
    from anysplade.training import mining

    mined = mining.mine(
        data,
        out,
        miner=miner[0] if len(miner) == 1 else miner,
        teacher=teacher,
        corpus=corpus,
        texts=texts,
        negatives=negatives,
        depth=depth,
        margin=margin,
        progress=is_first_process(),
    )
    line = f"{counted(mined.examples, 'example')} with {counted(negatives, 'negative')} each, in {out}"
    return Result(mined.to_dict() | {"out": str(out)}, [line])


@command
def score(data: str, /, *, teacher: str, out: Out, texts: str | None = None, max_length: int = 512) -> Result:
    """Score examples and their negatives with a teacher, for distillation; after an interruption, the same command continues.

    Args:
        data: training examples with negatives.
        teacher: folder or hub id of a cross-encoder, dense model or sparse encoder, or bm25.
        out: the JSONL file to write.
        texts: a collection with the texts of ids in the data.
        max_length: tokens to cut a query with a document to.
    """
    from anysplade.training import mining

    scored = mining.score(data, out, teacher=teacher, texts=texts, max_length=max_length, progress=is_first_process())
    return Result(scored.to_dict() | {"out": str(out)}, [f"{counted(scored.examples, 'example')} scored by {teacher}, in {out}"])
