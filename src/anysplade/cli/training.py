"""Commands that train and prepare training data: train, adapt, head, pairs, mine, score."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anysplade._common.progress import counted
from anysplade.cli.app import Json, Out, Result, command, is_first_process
from anysplade.training.config import TrainingConfig, TrainingPrecision


@dataclass(frozen=True)
class _TrainingOptions(TrainingConfig):
    output: Annotated[str, Parameter(name="--out")] = field(kw_only=True)
    report_to: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = field(default=(), kw_only=True)

    __doc__ = TrainingConfig.__doc__  # what the command line shows


@command
def train(
    options: Annotated[_TrainingOptions, Parameter(name="*")],
    *,
    config: Annotated[Path | None, Parameter(name="--config")] = None,
    json: Json = False,
) -> Result:
    """Train a SPLADE encoder; after an interruption, the same command continues from the last checkpoint.

    Args:
        config: a YAML or TOML file with options by their names in Python; flags win over it.
    """
    from anysplade.cli import rendering as report
    from anysplade.training import run as training

    result = training.train(options, progress=is_first_process())
    return Result(result.to_dict(), report.training_lines(result))


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
    json: Json = False,
) -> Result:
    """Give an encoder an MLM head, so that it can be trained as SPLADE; after an interruption, the same command continues.

    Args:
        encoder: a dense embedding model's or an encoder's folder or hub id.
        text: what the head is trained on: a corpus, or a text file with one text a line; best what will be searched.
        out: the masked LM's folder.
        steps: of training.
        batch_size: texts a step.
        max_length: tokens of a piece of text; longer texts are cut into pieces.
        learning_rate: peak, of the head.
        encoder_learning_rate: peak, of the encoder's top layer; 0 leaves the encoder as it is.
        layer_decay: a layer's learning rate is so many times that of the layer above it.
        seed: of everything random.
    """
    from anysplade.cli import rendering as report
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
    return Result(result.to_dict(), report.head_training_lines(result))


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
    kinds: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("title", "heading", "sentence"),
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    max_length: int | None = 256,
    precision: TrainingPrecision = "float32",
    seed: int = 0,
    json: Json = False,
) -> Result:
    """Adapt a sparse encoder to a corpus without labels, at no more cost; what is not better is not kept.

    Args:
        model: a sparse encoder's folder or hub id.
        corpus: the documents, in any form that index takes.
        teacher: a dense model's, sparse encoder's or cross-encoder's folder or hub id.
        out: a folder; its model/ is the adapted model, or the original if the adapted one is not better.
        judged: a collection to judge by; a tenth of the documents is held out for that otherwise.
        split: which judgements of it.
        kinds: of training pairs: title, heading, sentence.
        steps: of training.
        batch_size: queries a step.
        learning_rate: peak.
        max_length: tokens a text is cut to in training; the adapted model reads at least what the original reads.
        precision: of the products; bfloat16 is faster where the machine has it.
        seed: of everything random.
    """
    from anysplade.cli import rendering as report
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
    return Result(result.to_dict(), report.adaptation_lines(result, corpus))


@command
def pairs(
    corpus: str,
    /,
    *,
    out: Out,
    kinds: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("title", "heading", "sentence"),
    json: Json = False,
) -> Result:
    """Make training pairs from documents alone: titles, headings and sentences stand for queries.

    Args:
        corpus: documents (JSONL, BEIR folder), an ir_datasets id, a hub dataset or python-docs.
        out: the JSONL file to write.
        kinds: of pairs: title, heading, sentence.
    """
    from anysplade.cli import rendering as report
    from anysplade.data.document_pairs import make_pairs

    made = make_pairs(corpus, out, kinds=kinds, progress=is_first_process())
    return Result(made.to_dict() | {"out": str(out)}, report.made_pairs_lines(made, out))


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
    json: Json = False,
) -> Result:
    """Find hard negatives for training examples; after an interruption, the same command continues.

    Args:
        data: training examples, in any form that train takes.
        out: the JSONL file to write.
        miner: bm25, or a sparse encoder's or dense model's folder or hub id; of several, each in turn gives a candidate.
        teacher: a dense model, sparse encoder or cross-encoder that tells likely answers from negatives; none: each miner itself.
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
        miner=miner[0] if len(miner) == 1 else miner,
        teacher=teacher,
        corpus=corpus,
        texts=texts,
        negatives=negatives,
        depth=depth,
        margin=margin,
        progress=is_first_process(),
    )
    return Result(
        mined.to_dict() | {"out": str(out)},
        [f"{counted(mined.examples, 'example')} with {counted(negatives, 'negative')} each, in {out}"],
    )


@command
def score(data: str, /, *, teacher: str, out: Out, texts: str | None = None, max_length: int = 512, json: Json = False) -> Result:
    """Have a teacher score examples with negatives, for distillation; after an interruption, the same command continues.

    Args:
        data: training examples with negatives.
        teacher: a cross-encoder's, dense model's or sparse encoder's folder or hub id, or bm25.
        out: the JSONL file to write.
        texts: where the ids in the data have their texts.
        max_length: tokens that a query with a document is cut to.
    """
    from anysplade.training import mining

    scored = mining.score(data, out, teacher=teacher, texts=texts, max_length=max_length, progress=is_first_process())
    return Result(scored.to_dict() | {"out": str(out)}, [f"{counted(scored.examples, 'example')} scored by {teacher}, in {out}"])
