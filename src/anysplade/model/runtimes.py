"""Prepare encoders for inference: in a precision, on PyTorch or OpenVINO.

OpenVINO runs the masked LM up to the decoder. Fused pooling follows in PyTorch, so the logits are never built.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import shutil
import sys
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.util import get_device_name
from torch import Tensor, nn
from transformers import PreTrainedModel

from anysplade._common.arguments import require
from anysplade._common.cache import mark_used
from anysplade._common.extras import extra
from anysplade._common.files import atomic_folder, default_cache
from anysplade.errors import ModelError, OptionError, OutputError
from anysplade.model.fused import FusedEncoder, hidden_states, is_fused
from anysplade.model.hardware import native_bfloat16
from anysplade.model.head import find_head
from anysplade.model.modules import splade_modules
from anysplade.model.options import OPEN_ENCODER, Precision, Runtime
from anysplade.model.saved import first_line

logger = logging.getLogger(__name__)

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_INT8_GROUP = 128  # inputs of a product that share a scale: the fastest on AVX-512, from 32 to the whole width
_FEW_TOKENS = 256  # of a batch, up to which converting the decoder's weights takes longer than it saves
_TOLERANCE = 1e-4  # relative to the largest hidden state: two orders of adding float32 numbers differ by less


def for_inference(
    encoder: SparseEncoder, runtime: Runtime = "auto", precision: Precision = "float32", cache_folder: Path | None = None
) -> SparseEncoder:
    """An encoder for a runtime and precision; ``encoder`` itself if nothing has to change.

    float32 is exact on every runtime: vectors of two runtimes differ by the order of float additions. bfloat16 (two to three
    digits) and int8 (weights and inputs of each product in 8 bits) are approximations. On OpenVINO they apply to the masked LM up
    to its decoder. Its logits are computed in float32, or in bfloat16 where so many are positive that this is faster.

    Args:
        encoder: any sparse encoder. It is not changed, and shares its weights with the result, except for bfloat16 on torch.
        runtime: ``"openvino"`` needs a SPLADE encoder with fused pooling, a CPU, and the extra ``anysplade[openvino]``. ``"auto"``
            is ``"openvino"`` if these are available, otherwise ``"torch"``.
        precision: ``"int8"`` needs OpenVINO. ``"auto"`` is bfloat16 if the device has native bfloat16 products, otherwise float32.
        cache_folder: where the converted model is stored by the content of its weights, so that it is converted only once;
            ``default_cache()`` if None.

    Raises:
        OptionError: the runtime or precision is not available; the message says why.
        ModelError: OpenVINO cannot run this model; only with ``runtime="openvino"`` or int8.
        ExtraError: OpenVINO is requested but not installed.
    """
    require("encoder", encoder, SparseEncoder, OPEN_ENCODER)
    precision = resolve_precision(precision, encoder.device)
    obstacle = _obstacle(encoder)
    if runtime == "openvino" and obstacle:
        raise OptionError(f"runtime openvino: {obstacle}; take `runtime=torch`")
    if runtime == "openvino" or (runtime == "auto" and not obstacle and openvino_installed()):
        try:
            return _on_openvino(encoder, precision, cache_folder)
        except ModelError as error:
            if runtime == "openvino" or precision == "int8":
                raise
            logger.warning("encoding with torch, which is slower but gives the same result: %s", error)
    if precision == "int8":
        reason = obstacle or ("the runtime is torch" if openvino_installed() else 'pip install "anysplade[openvino]"')
        raise OptionError(f"precision int8 needs OpenVINO ({reason}); or take `precision=bfloat16`")
    return encoder if precision == "float32" else copy.deepcopy(encoder).bfloat16()


def runtime_of(encoder: SparseEncoder) -> str:
    """The runtime of an encoder, ``"openvino"`` or ``"torch"``."""
    return "openvino" if isinstance(encoder, OpenVINOEncoder) else "torch"


def resolve_precision(precision: Precision, device: torch.device | None = None) -> Precision:
    """Resolve ``"auto"``: bfloat16 if the device (by default the one for new models) has native products, otherwise float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if native_bfloat16((device or torch.device(get_device_name())).type) else "float32"


@cache
def openvino_installed() -> bool:
    """Whether the extra ``anysplade[openvino]`` is installed."""
    try:
        return bool(version("openvino"))
    except PackageNotFoundError:
        return False


def _obstacle(encoder: SparseEncoder) -> str | None:
    """Why OpenVINO cannot run an encoder, or None."""
    if encoder.device.type != "cpu":
        return f"the model is on {encoder.device}, but OpenVINO runs on CPUs"
    return None if is_fused(encoder) else "OpenVINO runs only SPLADE with fused pooling"


def _import(name: str) -> Any:
    """Import ``openvino``, or ``nncf``, which converts weights to int8.

    Both send an event to their makers at each import and conversion unless the user opted out. They work without it if
    ``openvino_telemetry`` cannot be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    with extra("openvino"):
        return import_module(name)


def _on_openvino(encoder: SparseEncoder, precision: Precision, cache_folder: Path | None) -> SparseEncoder:
    openvino = _import("openvino")
    model = _converted(encoder, precision == "int8", cache_folder or default_cache())
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if precision == "float32" or not native_bfloat16("cpu") else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if precision == "int8":
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _INT8_GROUP
    compiled = openvino.Core().compile_model(model, "CPU", options)
    shared = {id(tensor): tensor for tensor in chain(encoder.parameters(), encoder.buffers())}
    result: Any = copy.deepcopy(encoder, shared).eval()
    result.__class__ = OpenVINOEncoder
    result.requests = _Requests(compiled)
    result.in_bfloat16 = precision != "float32" and native_bfloat16("cpu")
    return result


class _Requests(threading.local):
    """The request of a compiled model for each thread, because a request runs one inference at a time."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.inputs = [given.any_name for given in compiled.inputs]


class OpenVINOEncoder(FusedEncoder):
    """A fused encoder whose hidden states OpenVINO computes."""

    requests: _Requests
    in_bfloat16: bool  # whether logits may be computed in bfloat16

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pool under autocast if logits may be in bfloat16. For few tokens, converting the weights would take longer."""
        is_half = (
            self.in_bfloat16
            and self._module_of(input, kwargs) is splade_modules(self)[0]
            and input["input_ids"].numel() > _FEW_TOKENS
        )
        with torch.autocast("cpu", torch.bfloat16) if is_half else contextlib.nullcontext():
            return super().forward(input, **kwargs)

    def _hidden_states(self, transformer: Any, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = {name: features[name].numpy() for name in self.requests.inputs}
        outputs = self.requests.request.infer(inputs, share_inputs=True)
        return torch.from_numpy(outputs[0]), features["attention_mask"]


OpenVINOEncoder.__name__ = SparseEncoder.__name__


def _converted(encoder: SparseEncoder, int8: bool, cache_folder: Path | None) -> Any:
    """The masked LM up to the decoder, converted for OpenVINO or read from the cache."""
    openvino = _import("openvino")
    if cache_folder is None:
        return _convert(encoder, int8)
    folder = cache_folder / "openvino" / _content(encoder, int8)
    if folder.is_dir():
        mark_used(folder)
        try:
            return openvino.Core().read_model(folder / "model.xml")
        except RuntimeError:  # damaged: made again
            shutil.rmtree(folder, ignore_errors=True)
    model = _convert(encoder, int8)
    try:
        with atomic_folder(folder) as work:
            openvino.save_model(model, work / "model.xml", compress_to_fp16=False)
        mark_used(folder)
    except OutputError as error:  # another process made it meanwhile, or the cache cannot be written
        logger.debug("%s", error)
    return model


def _content(encoder: SparseEncoder, int8: bool) -> str:
    """Hash of everything that determines the converted model: weights, configuration and versions."""
    model = splade_modules(encoder)[0].model
    versions = {name: version(name) for name in ("openvino", "torch", "transformers")}
    about = {"config": model.config.to_dict(), "int8": int8, **versions}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _convert(encoder: SparseEncoder, int8: bool) -> Any:
    openvino = _import("openvino")
    transformer: Any = splade_modules(encoder)[0]
    features = transformer.preprocess(["a text of several words", "words"])
    names = [name for name in _INPUTS if name in features]
    module = _Hidden(transformer.model).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing; its result is checked below
            free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}  # batch and length
            shapes = dict.fromkeys(names, free)
            inputs = {name: features[name] for name in names}
            model = openvino.convert_model(torch.export.export(module, (), inputs, dynamic_shapes=shapes))
        _check(module, model, features, names, find_head(transformer.model).decoder.in_features)
    except Exception as error:  # a conversion can raise any type of error
        kind = type(transformer.model).__name__
        raise ModelError(f"OpenVINO cannot run {kind} ({first_line(error)}); take `runtime=torch`") from error
    if int8:
        nncf = _import("nncf")
        logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level would change handlers that others share
        with contextlib.redirect_stdout(io.StringIO()):  # hides a progress bar
            model = nncf.compress_weights(model)
    return model


class _Hidden(nn.Module):
    """A masked LM up to its decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return hidden_states(self.model, input_ids=input_ids, attention_mask=attention_mask, **types)


def _check(module: nn.Module, model: Any, features: dict[str, Tensor], names: Sequence[str], width: int) -> None:
    """Raise ValueError unless the converted model gives the hidden states of torch, for other lengths than it was traced with."""
    compiled = _import("openvino").Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ids = features["input_ids"]
    for batch, length in ((1, 3), (3, 37)):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1:, length // 2 :] = 0
        repeated = ids.flatten()[torch.arange(batch * length) % ids.numel()].view(batch, length)
        known = {"input_ids": repeated, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
        inputs = {name: known[name] for name in names}
        expected = module(**inputs)[mask.bool()]
        got = torch.from_numpy(compiled({name: value.numpy() for name, value in inputs.items()})[0])[mask.bool()]
        difference = (got - expected).abs().max().item()
        if got.shape[-1] != width or not difference <= _TOLERANCE * expected.abs().max().item():
            raise ValueError(f"its hidden states differ by {difference:.2g}")
