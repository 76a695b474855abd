"""Write a SPLADE encoder for other software: as ONNX, or as a checkpoint with every tensor under every name that a server reads.

A folder with ONNX has ``model.onnx``, the tokenizer, ``config.json``, and ``anysplade.json``, which describes the model.
With it, anysplade searches without torch.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from sentence_transformers import SparseEncoder
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import LARGE_INTEGER

from anysplade._common.extras import extra
from anysplade._common.files import atomic_folder, require_empty, user_path
from anysplade._common.outputs import write_record
from anysplade.errors import ModelError, OptionError, OutputError
from anysplade.model.checkpoints import usable_positions
from anysplade.model.encoder import open_encoder
from anysplade.model.fused import unfuse_pooling
from anysplade.model.head import DEAD, untie_head
from anysplade.model.modules import has_static_queries, is_routed, is_splade, masked_lm, splade_modules
from anysplade.model.onnx_queries import FORMAT, MODEL, QUANTIZED, read_tokenizer
from anysplade.model.options import Form, Role
from anysplade.model.saved import EXPORTED, fingerprint, first_line, resolve_model
from anysplade.model.tokenizing import prompt_of

OUTPUTS: dict[str, tuple[str, ...]] = {
    "logits": ("logits",),
    "vector": ("output",),  # the name that OpenSearch reads
    "terms": ("output_idx", "output_weights"),  # the names that Anserini reads
}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TOLERANCE = 1e-4  # relative to the largest output: two orders of adding float32 numbers differ by less
_TEXTS = ("A text of several words, in Upper case: naïve!", "", " ", "[SEP] </s> <mask>", "words " * 20_000)  # read by both
# Batches and lengths that the result is checked with, if the model reads as many tokens; none is the traced one. Some models
# compute long texts, or a text as long as a setting, in another way.
_SHAPES = ((1, 2), (3, 37), (2, 8), (1, 64), (1, 128), (1, 512), (1, 1024))


def export_onnx(model: str | Path, out: str | Path, form: Form = "logits", quantize: bool = False) -> dict[str, Any]:
    """Write a SPLADE model as a folder for ONNX Runtime, and check its outputs against torch.

    Args:
        model: folder or hub id of a SPLADE encoder or masked LM; of an encoder without a model for queries, the document side.
        out: the folder; must be empty or not exist.
        form: the output: ``"logits"``, (batch, length, vocabulary), which FastEmbed, Vespa and transformers.js pool themselves;
            ``"vector"``, (batch, vocabulary), for OpenSearch; ``"terms"``, the ids and weights of one text, for Anserini.
        quantize: also write ``model_quantized.onnx``, whose matrix products are in int8: an approximation.

    Returns:
        The content of ``anysplade.json``: form, model and its fingerprint, pooling, prompts, length, and the largest difference.

    Raises:
        ModelError: not a SPLADE model, or ONNX cannot express it.
        OptionError: ``form`` is unknown.
        OutputError: ``out`` is not empty or cannot be written.
        ExtraError: ``anysplade[onnx]`` is not installed.
    """
    if form not in get_args(Form):
        raise OptionError(f"`form` is {form!r}; give {', '.join(map(repr, get_args(Form)))}")
    with extra("onnx"):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    source = _source(model, out)
    encoder = open_encoder(source)
    if not is_splade(encoder) or (is_routed(encoder) and not has_static_queries(encoder)):
        raise ModelError(f"{source}: not one masked LM with SPLADE pooling, and only that can be exported to ONNX")
    unfuse_pooling(encoder)
    transformer, pooling = splade_modules(encoder)
    tokenizer: Any = transformer.tokenizer
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ModelError(f"{source}: its tokenizer, {kind}, is written in Python; other software needs one with tokenizer.json")
    length = transformer.max_seq_length
    features = transformer.preprocess(["a text of several words", "words"])
    inputs = {name: features[name] for name in _INPUTS if name in features}
    module = _Output(transformer.model, form, pooling).eval()
    about: dict[str, Any] = {
        "format": FORMAT,
        "form": form,
        "inputs": list(inputs),
        "model": source,
        "model_fingerprint": fingerprint(source),
        "vocabulary": len(transformer.model.get_output_embeddings().weight),
        "pooling": pooling.pooling_strategy,
        "double_log": pooling.activation_function == "log1p_relu",
        "max_length": None if length is None or length >= LARGE_INTEGER else length,
        "positions": usable_positions(transformer.model),
        "truncation_side": tokenizer.truncation_side,
        "max_active_dims": encoder.max_active_dims,
        "prompts": dict(encoder.prompts or {}),
        "query_prompt": prompt_of(encoder, "query") or "",
        "static_queries": has_static_queries(encoder),
    }
    with atomic_folder(out) as work:
        tokenizer.save_pretrained(work)
        _check_tokenizer(encoder, read_tokenizer(work, about), source)
        _convert(module, inputs, work / MODEL, source)
        about["largest_difference"] = _difference(module, inputs, work / MODEL, source, about["max_length"] or about["positions"])
        if quantize:
            _quantize(work / MODEL, work / QUANTIZED)
        transformer.model.config.save_pretrained(work)
        write_record(work / "special_tokens_map.json", tokenizer.special_tokens_map)  # transformers 5 leaves it out
        if isinstance(tokenizer.backend_tokenizer.model, WordPiece):
            entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
            (work / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in entries), encoding="utf-8")
        if has_static_queries(encoder):
            write_record(work / "idf.json", _query_weights(encoder))
        write_record(work / EXPORTED, about)
    return about


def export_checkpoint(model: str | Path, out: str | Path) -> None:
    """Write a SPLADE encoder as a folder of sentence-transformers whose decoder has its own weight and bias in the file.

    A head that shares its weight with the embeddings is saved without it, and vLLM (BERT) and text-embeddings-inference (RoBERTa)
    read the decoder only by its own names. The vectors are the same; the file is larger by one (vocabulary, width) matrix.

    Args:
        model: folder or hub id of a SPLADE encoder or masked LM.
        out: the folder; must be empty or not exist.

    Raises:
        ModelError: not a SPLADE model.
        OutputError: ``out`` is not empty or cannot be written.
    """
    encoder = open_encoder(_source(model, out), fused=False)
    untie_head(masked_lm(encoder))
    with atomic_folder(out) as work:
        encoder.save_pretrained(str(work))


def _source(model: str | Path, out: str | Path) -> str:
    """The folder or hub id of a model; raises OutputError if ``out`` has content, or is inside the model."""
    source, target = resolve_model(model), user_path(out)
    require_empty(target)
    if Path(source).is_dir() and target.resolve().is_relative_to(Path(source).resolve()):
        raise OutputError(
            f"{target}: in the folder of the model, whose files tell an index that it is the same model; give another"
        )
    return source


def _check_tokenizer(encoder: SparseEncoder, tokenizer: Tokenizer, source: str) -> None:
    """Raise ModelError if the tokenizer of an export gives other inputs than the encoder."""
    reader = splade_modules(encoder)[0]
    for role in ("document",) if has_static_queries(encoder) else get_args(Role):
        prompt = prompt_of(encoder, role)
        for text in _TEXTS:
            features, read = reader.preprocess([text], prompt=prompt, task=role), tokenizer.encode((prompt or "") + text)
            got = {"input_ids": read.ids, "attention_mask": read.attention_mask, "token_type_ids": read.type_ids}
            if any(features[name][0].tolist() != values for name, values in got.items() if name in features):
                kind = type(reader.tokenizer).__name__
                about = f"{kind} reads the {role} {text[:40]!r} in another way than tokenizer.json, which other software reads"
                raise ModelError(f"{source}: {about}; save the model with settings that tokenizer.json can hold")


class _Output(nn.Module):
    """A masked LM, with the pooling of SPLADE for the forms that need it."""

    def __init__(self, model: PreTrainedModel, form: Form, pooling: Any) -> None:
        super().__init__()
        self.model, self.form = model, form
        self.sums = pooling.pooling_strategy == "sum"
        self.logs = 2 if pooling.activation_function == "log1p_relu" else 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        if self.form == "logits":
            return logits
        weights = logits.relu() * attention_mask.unsqueeze(-1)
        if not self.sums:
            weights = weights.amax(dim=1)
        for _ in range(self.logs):
            weights = weights.log1p()
        if self.sums:
            weights = weights.sum(dim=1)
        if self.form == "vector":
            return weights
        ids = weights[0].nonzero()[:, 0]
        return ids, weights[0][ids]


def _convert(module: _Output, inputs: dict[str, Tensor], path: Path, source: str) -> None:
    """Write a module as one ONNX file with free batch and length."""
    model = module.model
    before = model.config._attn_implementation
    free: dict[int, Any] = {1: torch.export.Dim("length", max=2**20)}
    if module.form != "terms":  # of one text
        free[0] = torch.export.Dim("batch", max=2**20)
    given = tuple(tensor[:1] for tensor in inputs.values()) if module.form == "terms" else tuple(inputs.values())
    try:
        model.set_attn_implementation("eager")  # ONNX has no operator of fused attention with a mask
        with _quiet(), torch.no_grad():  # its result is checked
            torch.onnx.export(
                module,
                (),
                path,
                kwargs=dict(zip(inputs, given, strict=True)),
                input_names=list(inputs),
                output_names=list(OUTPUTS[module.form]),
                dynamic_shapes=dict.fromkeys(inputs, free),
                dynamo=True,
                external_data=False,
            )
    except Exception as error:  # a conversion can raise any type of error
        raise _inexpressible(source, module, error.__cause__ or error) from error  # the message of the outer one is advice
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def _difference(module: _Output, inputs: dict[str, Tensor], path: Path, source: str, longest: int | None) -> float:
    """The largest difference from torch, for batches and lengths that were not traced; raises ModelError if it is too large."""
    import onnxruntime

    ids, largest = inputs["input_ids"], 0.0
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4  # errors are raised too
    try:
        session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a base class that onnxruntime does not name
        raise _inexpressible(source, module, error) from error
    for batch, length in _SHAPES:
        if length > (longest or length):
            break
        if module.form == "terms":
            batch = 1
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1:, length // 2 :] = 0
        repeated = ids.flatten()[torch.arange(batch * length) % ids.numel()].view(batch, length)
        known = {"input_ids": repeated, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
        given = {name: known[name] for name in inputs}
        try:
            expected = _dense(module(**given), module)
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        except Exception as error:
            raise _inexpressible(source, module, error) from error
        got = _dense(tuple(map(torch.from_numpy, outputs)), module)
        if not expected.isfinite().all():
            raise ModelError(f"{source}: the model gives NaN or infinity; its training diverged")
        if module.form == "logits":
            expected, got = expected[mask.bool()], got[mask.bool()]
        living = expected > DEAD / 2  # the precision of switched-off terms is low, and of no interest
        expected, got = expected[living], got[living]
        difference = float((got - expected).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ModelError(f"{source}: its export to ONNX differs from torch by {difference:.2g}; please report the model")
        largest = max(largest, difference)
    return largest


def _inexpressible(source: str, module: _Output, error: BaseException) -> ModelError:
    """The error for an architecture whose export fails, or fails in ONNX Runtime."""
    reason = first_line(error).removeprefix("[ONNXRuntimeError] : 1 : FAIL : ")[:200]
    return ModelError(f"{source}: {type(module.model).__name__} cannot be exported to ONNX: {reason}")


def _dense(output: Any, module: _Output) -> Tensor:
    """An output of any form as one tensor."""
    if module.form != "terms":
        tensor: Tensor = output if isinstance(output, Tensor) else output[0]
        return tensor
    ids, weights = output
    return torch.zeros(module.model.get_output_embeddings().weight.shape[0]).index_put((ids,), weights)


def _quantize(path: Path, target: Path) -> None:
    """Write a copy whose weights of matrix products are int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(path, target, weight_type=QuantType.QInt8)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A time without the warnings and advice of the two exporters, one of which writes to the root logger and adds a handler."""
    handlers, disabled = list(logging.getLogger().handlers), logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().handlers[:] = handlers
        logging.disable(disabled)


def _query_weights(encoder: SparseEncoder) -> dict[str, float]:
    """The weight of each token in queries, as FastEmbed and OpenSearch read it; zeros are left out."""
    router: Any = encoder[0]
    static: Any = router.sub_modules["query"][-1]
    names = {id_: token for token, id_ in static.tokenizer.get_vocab().items()}
    weights = static.weight.detach().float().tolist()
    return {names[id_]: weight for id_, weight in enumerate(weights) if weight and id_ in names}
