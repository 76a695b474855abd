"""Train an MLM head on plain text for an encoder that has none, such as a dense embedding model.

SPLADE takes a term's weight from the largest logit that the head gives it at any token. The loss has up to three parts. "named":
name visible tokens where they are. "bag": name a text's words, above all rare ones, with the largest logits. "masked": guess
masked tokens from their context (Devlin et al., arXiv 1810.04805). The encoder stays frozen, or is trained with the head, each
layer at a lower rate than the one above it.
"""

import logging
import math
import random
import shutil
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from anysplade._common.arguments import require
from anysplade._common.files import atomic_folder, beside, only_process, require_empty, user_path, writing
from anysplade._common.hashing import DataHash
from anysplade._common.outputs import damaged_file, digests, earlier_call, restored, write_record
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.corpus import read_texts
from anysplade.data.sampling import reservoir
from anysplade.errors import AnyspladeError, DataError, OptionError, OutputError
from anysplade.model.checkpoints import check_length
from anysplade.model.encoder import encoder_folder
from anysplade.model.options import checked_option
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.callbacks import last_checkpoint
from anysplade.training.devices import require_one_process, say_one_gpu
from anysplade.training.head_trainer import WEIGHTS, HeadTrainer, head_arguments
from anysplade.training.new_head import check_encoder, start_biases, token_counts, with_new_head

logger = logging.getLogger(__name__)

_COUNTED = 2000  # texts whose tokens are counted, for the decoder's bias and the rarity of tokens
_CHARACTERS = 6  # per token, to cut long texts; more than tokens have, so a piece reaches the token limit


@dataclass(frozen=True, repr=False)
class HeadTraining(Tabular):
    """Result of ``train_head``, stored in ``head.json`` next to the weights."""

    model: str  # folder of the new masked LM
    encoder: str  # folder or hub id of the original
    architecture: str  # class in transformers
    text: str  # source of the text, as given
    texts: int  # number of pieces of text
    data_hash: str  # SHA-256 of the pieces
    options: dict[str, Any]  # of ``train_head``, and the weights of the loss's parts
    seconds: float  # training time in this process
    losses: dict[str, list[float]]  # unweighted parts, each with its mean over the first and the last tenth of the steps
    provenance: dict[str, Any]  # versions, commit, hardware, command
    precision: str | None = None  # of the products: bfloat16 where the machine has it; older records lack it


def train_head(
    encoder: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    steps: int = 300,
    batch_size: int = 16,
    max_length: int = 96,
    learning_rate: float = 2e-3,
    encoder_learning_rate: float = 0.0,
    layer_decay: float = 0.7,
    seed: int = 0,
    checkpoint_steps: int = 100,
    progress: bool = False,
) -> HeadTraining:
    """Give an encoder an MLM head, tied to its input embeddings, and write it as a stock masked LM.

    An interrupted call continues from the last checkpoint when it is repeated; a finished one returns the stored result.

    Args:
        encoder: folder or hub id of a dense model of sentence-transformers, or of an encoder of transformers.
        text: a corpus (BEIR folder, JSONL, ...) or a text file with one text per line; the texts to be searched work best.
        output: folder for the masked LM.
        steps: training steps.
        batch_size: texts per step.
        max_length: tokens per piece of text; longer texts are cut into pieces.
        learning_rate: peak rate of the head.
        encoder_learning_rate: peak rate of the encoder's top layer; 0 freezes the encoder.
        layer_decay: factor from each layer's rate to that of the layer below.
        seed: seed of all random numbers.
        checkpoint_steps: steps between checkpoints.
        progress: show a progress bar.

    Raises:
        ModelError: the model is no encoder, has an MLM head already, or its architecture has none in transformers.
        DataError: there is no text.
        OutputError: the folder has other content.
        OptionError: an option is impossible.
        AnyspladeError: the training diverged.
    """
    for argument, given in (("encoder", encoder), ("text", text)):
        require(argument, given, (str, Path), "give its path, or its name on the hub")
    encoder, text, output = str(encoder), str(text), user_path(output)
    require_one_process("a head is trained")
    whole_numbers = {"steps": steps, "batch_size": batch_size, "max_length": max_length, "checkpoint_steps": checkpoint_steps}
    for name, value in whole_numbers.items():
        whole_numbers[name] = checked_option(name, value, int)
        if value < (low := 8 if name == "max_length" else 1):
            raise OptionError(f"{name} is {value}: it must be at least {low}")
    steps, batch_size, max_length, checkpoint_steps = whole_numbers.values()
    if not (0 < learning_rate < 1 and 0 <= encoder_learning_rate < 1 and 0 < layer_decay <= 1):
        raise OptionError(
            f"learning_rate {learning_rate}, encoder_learning_rate {encoder_learning_rate}, layer_decay {layer_decay}: "
            "rates must be between 0 and 1"
        )
    source = resolve_model(encoder)
    folder = encoder_folder(source)
    check_encoder(source, folder)
    pieces = sample_pieces(text, steps * batch_size, max_length * _CHARACTERS, seed)
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "max_length": max_length, "learning_rate": learning_rate}
    options |= {"encoder_learning_rate": encoder_learning_rate, "layer_decay": layer_decay, "seed": seed, "weights": dict(WEIGHTS)}
    data_hash = DataHash(pieces).hexdigest()
    about = {"fingerprint": fingerprint(source), "data_hash": data_hash, "options": options}
    parts = beside(output, "{}.parts")  # folder of the checkpoints until the output is written
    with only_process(parts):
        finished = _earlier_head(output, parts, about)
        if finished is not None:
            shutil.rmtree(parts, ignore_errors=True)  # from a process that was killed before it removed them
            logger.info("%s already has this head", output)
            return finished
        set_seed(seed)
        model, tokenizer = with_new_head(source, folder)
        check_length(model, max_length)
        write_record(parts / "about.json", about)
        counts = token_counts(model, tokenizer, pieces[:_COUNTED], max_length)
        start_biases(model, counts)
        trainer = HeadTrainer(model, tokenizer, pieces, counts, head_arguments(parts, options, checkpoint_steps), options, progress)
        checkpoint = last_checkpoint(parts)
        say_one_gpu("a head is trained")
        start = time.perf_counter()
        with writing(parts):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        log = trainer.state.log_history
        result = HeadTraining(
            model=str(output),
            encoder=encoder,
            architecture=type(model).__name__,
            text=text,
            texts=len(pieces),
            data_hash=data_hash,
            options=options,
            seconds=time.perf_counter() - start,
            losses={name: _first_and_last(log, f"{name}_loss") for name, weight in WEIGHTS.items() if weight},
            provenance=provenance(),
            precision="bfloat16" if trainer.args.bf16 else "float32",
        )
        if not all(math.isfinite(value) for values in result.losses.values() for value in values):
            raise AnyspladeError(
                f"{output}: the training diverged (losses {result.losses}); lower `learning_rate`, and remove {parts}"
            )
        with atomic_folder(output) as whole:
            model.eval().save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            write_record(whole / "head.json", about | result.to_dict() | {"files": digests(whole)})
        shutil.rmtree(parts)
        return result


def _earlier_head(output: Path, parts: Path, about: dict[str, Any]) -> HeadTraining | None:
    """The result of an earlier call with the same options, if it is finished."""
    inputs = {"fingerprint": "encoder", "data_hash": "text"}
    if not (output / "head.json").is_file():
        if earlier_call(parts / "about.json", about, inputs) is None:
            for checkpoint in parts.glob("checkpoint-*"):  # of unknown origin
                shutil.rmtree(checkpoint)
        require_empty(output)
        return None
    record = earlier_call(output / "head.json", about, inputs)
    damaged = "head.json" if record is None else damaged_file(output, record.get("files", {}))
    if record is None or damaged:
        raise OutputError(f"{output}: {damaged} is missing or damaged; remove the folder, and the same call makes it again")
    return restored(HeadTraining, record)


def sample_pieces(text: str, count: int, characters: int, seed: int) -> list[str]:
    """Draw ``count`` pieces of the texts of a source at random, in random order; only they are kept in memory.

    A text with more than ``characters`` is cut, at white space if it has some. If there are fewer pieces, all are returned.
    """
    draw = random.Random(seed)
    kept = reservoir((piece for one in read_texts(text) for piece in _pieces(one, characters)), count, draw)
    if not kept:
        raise DataError(f"{text}: no text in it; a head is trained on a corpus, or on a file with one text per line")
    draw.shuffle(kept)
    return kept


def _pieces(text: str, characters: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), characters, break_on_hyphens=False)


def _first_and_last(log: list[dict[str, float]], name: str) -> list[float]:
    """Mean of a logged value over the first and over the last tenth of the log."""
    values = [entry[name] for entry in log if name in entry]
    tenth = max(1, len(values) // 10)
    return [sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth]
