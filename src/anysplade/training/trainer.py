"""The encoder that a run starts from, and sentence-transformers' trainer with this package's loss and callbacks."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder, SparseEncoderTrainer
from sentence_transformers import SparseEncoderTrainingArguments as Arguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder.data_collator import SparseEncoderDataCollator
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from anysplade.data.collections import Pair
from anysplade.data.pairs import sample_pairs
from anysplade.errors import ModelError, OptionError
from anysplade.model.calibration import Calibration
from anysplade.model.encoder import build_encoder, is_saved_encoder
from anysplade.model.hardware import native_bfloat16
from anysplade.model.head import find_head, live_terms
from anysplade.model.modules import cut_in_training, has_static_queries, is_routed, masked_lm
from anysplade.model.options import Role
from anysplade.model.saved import resolve_model
from anysplade.training.batches import DistinctBatches
from anysplade.training.callbacks import DevEvaluator, EndsOnce, Estimate, MarkComplete, Patience, Progress, common_arguments
from anysplade.training.config import TrainingConfig, parse_objective
from anysplade.training.devices import processes, use_one_gpu
from anysplade.training.inputs import Inputs
from anysplade.training.level import batch_target
from anysplade.training.monitoring import Monitor
from anysplade.training.objectives import make_loss
from anysplade.training.observers import ObservedLoss
from anysplade.training.own_words import BatchPieces, OwnWordsLoss, piece_weights
from anysplade.training.regularization import ActiveDimsController
from anysplade.training.steps import Steps
from anysplade.training.teacher_scores import BatchTeacher

logger = logging.getLogger(__name__)

_PREPARATION = 7 * 24 * 3600  # seconds that processes wait for the first one, which mines and encodes for all
_DEV_METRIC = "eval_dev_nDCG@10"


def training_arguments(config: TrainingConfig, output: Path) -> Arguments:
    """The trainer's arguments. Creating them connects the processes that torchrun started."""
    gpu = torch.cuda.is_available()
    more: dict[str, Any] = {}
    if config.dev is not None:
        more = {"eval_strategy": "steps", "eval_steps": config.checkpoint_steps, "load_best_model_at_end": True}
        more |= {"metric_for_best_model": _DEV_METRIC, "greater_is_better": True}
    if config.batch_size % processes():
        raise OptionError(f"batch_size {config.batch_size} does not divide among {processes()} processes; choose a multiple")
    common = common_arguments(config.seed, config.checkpoint_steps)
    if processes() > 1:  # all processes share a batch, so their number changes nothing but the speed
        common["accelerator_config"]["split_batches"] = True
        more |= {"ddp_backend": "nccl" if gpu else "gloo", "ddp_timeout": _PREPARATION}
    contrastive = "contrastive" in parse_objective(config.objective)
    arguments = Arguments(
        output_dir=str(output / "checkpoints"),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,
        # In contrastive training a text that is twice in a batch would be its own negative.
        batch_sampler=BatchSamplers.NO_DUPLICATES if contrastive else BatchSamplers.BATCH_SAMPLER,
        dataloader_drop_last=True,  # a small batch has few negatives
        bf16=config.precision == "bfloat16",
        logging_nan_inf_filter=False,  # it waits for every loss; the monitor finds those that are not finite
        report_to=list(config.report_to) or "none",
        **common,
        **more,
    )
    device = use_one_gpu(arguments)
    if config.precision == "bfloat16" and device.type == "cpu" and not native_bfloat16("cpu"):
        logger.warning("this processor has no products of bfloat16 and emulates them slowly; `precision=float32` is faster here")
    return arguments


def start_texts(config: TrainingConfig, pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """The queries and documents, with their prompts, that the head is measured and calibrated on."""
    queries, documents = sample_pairs(pairs, config.seed)
    return [config.query_prompt + query for query in queries], [config.document_prompt + document for document in documents]


def start_encoder(config: TrainingConfig, pairs: Sequence[Pair], restarts: int) -> tuple[SparseEncoder, Calibration, list[int]]:
    """The encoder that a run starts from, the calibration of its head, and the lengths to set after the training.

    After a collapse, "auto" replaces numbers for k and shift; each further restart makes the calibration stronger.
    """
    set_seed(config.seed)
    queries, documents = start_texts(config, pairs)
    k, shift = config.k, config.shift
    if restarts and not (k == "auto" and shift == "auto"):
        k, shift, restarts = "auto", "auto", restarts - 1
    same = ("bias", "pooling", "double_log", "query_encoder", "attention", "fold", "mute")  # named alike in ``build_encoder``
    options: dict[str, Any] = {name: getattr(config, name) for name in same}
    options |= {"queries": queries, "documents": documents, "idf_texts": (pair.positive for pair in pairs)}
    encoder, calibration = build_encoder(config.backbone, k, shift, config.fused, strength=restarts, **options)
    lengths = cut_in_training(encoder, config.max_length, is_saved_encoder(resolve_model(config.backbone)))
    if config.query_active_dims is not None and has_static_queries(encoder):
        raise OptionError(f"{config.backbone}: a query's terms are its tokens, so query_active_dims cannot be met; leave it out")
    for role, prompt in (("query", config.query_prompt), ("document", config.document_prompt)):
        encoder.prompts[role] = prompt or encoder.prompts.get(role, "")  # a saved encoder keeps its prompts by default
    return encoder, calibration, lengths


def make_trainer(
    config: TrainingConfig, encoder: SparseEncoder, lengths: Sequence[int], inputs: Inputs, arguments: Arguments, progress: bool
) -> tuple[SparseEncoderTrainer, Monitor]:
    """The trainer, and the monitor that observes its batches; options that depend on the encoder are added to ``arguments``."""
    pairs, dataset = inputs.pairs, inputs.pairs.dataset
    if inputs.teacher is not None:  # it finds an example by its number, which takes the place of scores in the data
        dataset = pairs.numbered()
    documents = [name for name in dataset.column_names if name not in ("query", "label")]
    prompts = {role: encoder.prompts[role] or "" for role in ("query", "document")}
    if any(prompts.values()):
        arguments.prompts = {"query": prompts["query"]} | dict.fromkeys(documents, prompts["document"])
    if is_routed(encoder):
        arguments.router_mapping = {"query": "query"} | dict.fromkeys(documents, "document")
    model = masked_lm(encoder)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its old name
        enable({"use_reentrant": False})
    loss = make_loss(config, encoder, inputs.teacher)
    if config.head_learning_rate is not None:
        arguments.learning_rate_mapping = {_head_parameters(loss, model): config.head_learning_rate}
    contrastive = list(parse_objective(config.objective)) == ["contrastive"]
    pieces = BatchPieces(piece_weights(encoder, pairs))
    monitor = Monitor(encoder.get_embedding_dimension() or 0, config.on_collapse != "warn", contrastive, live_terms(model), pieces)
    loss.loss = ObservedLoss(loss.loss, monitor.see)
    if config.own_words:
        loss.loss = OwnWordsLoss(loss.loss, pieces, config.own_words)
    loss.register_forward_pre_hook(pieces.read)
    roles: tuple[tuple[Role, float | None], ...] = (("query", config.query_active_dims), ("document", config.document_active_dims))
    targets = [target and batch_target(encoder, pairs, lengths, role, target) for role, target in roles]
    # The controller replaces the ramp of regularizer weights that the trainer would add by itself.
    callbacks: list[TrainerCallback] = [ActiveDimsController(loss, *targets), MarkComplete()]
    if arguments.process_index == 0:
        callbacks.append(Progress() if progress else Estimate())
    if config.patience is not None:
        callbacks.append(Patience(early_stopping_patience=config.patience))
    dev = None if inputs.dev is None else DevEvaluator(inputs.dev)
    trainer = _Trainer(model=encoder, args=arguments, train_dataset=dataset, loss=loss, evaluator=dev, callbacks=callbacks)
    collator: Any = trainer.data_collator
    collator.teacher = inputs.teacher if arguments.world_size == 1 else None
    trainer.callback_handler.callbacks.insert(1, monitor)  # before the trackers, so that they report what it logs
    trainer.remove_callback(PrinterCallback)  # it would print to standard output, which is for the result
    return trainer, monitor


@dataclass
class _Collator(SparseEncoderDataCollator):
    """Replaces the examples' numbers by the teacher's scores of the batch, (queries, documents), while the device is still at work.

    With several processes, the loss does it, which knows the documents of all.
    """

    teacher: BatchTeacher | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(features)
        if self.teacher is not None:
            numbers = batch["label"].numpy()
            batch["label"] = torch.from_numpy(self.teacher.scores(numbers, numbers))
        return batch


class _Trainer(Steps, EndsOnce, SparseEncoderTrainer):
    data_collator_class = _Collator

    def get_batch_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.batch_sampler == BatchSamplers.NO_DUPLICATES:
            return DistinctBatches(*args, **kwargs)
        return super().get_batch_sampler(*args, **kwargs)


def _head_parameters(loss: nn.Module, model: PreTrainedModel) -> str:
    """A regular expression for the names of the decoder's weight and bias.

    Raises:
        ModelError: the weight is shared with the input embeddings, so it cannot have its own learning rate.
    """
    head = find_head(model)
    if head.decoder.weight is model.get_input_embeddings().weight:
        raise ModelError(
            f"{type(model).__name__}: the decoder is tied to the input embeddings, so they share a learning rate; "
            "choose a k other than 1, which unties it, or leave out `head_learning_rate`"
        )
    wanted = {id(tensor) for tensor in (head.decoder.weight, *head.biases)}
    return "|".join(f"^{re.escape(name)}$" for name, tensor in loss.named_parameters() if id(tensor) in wanted)
