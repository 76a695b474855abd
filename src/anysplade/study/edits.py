"""Write checkpoints whose head is edited."""

from pathlib import Path
from typing import get_args

import torch
from filelock import FileLock
from torch import nn
from transformers import PreTrainedModel

from anysplade._common.files import atomic_folder, make_folder
from anysplade.errors import ModelError, OptionError
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.head import find_head, untie_head
from anysplade.model.rescaling import rescale_head
from anysplade.study.inputs import model_fingerprint
from anysplade.study.plan import Edit, Edits


def edited(backbone: str, edits: Edits, out: str | Path) -> str:
    """Write a backbone with an edited head into a folder, once; returns its path, or without edits the backbone itself."""
    if not edits:
        return backbone
    target = Path(out) / edited_name(backbone, edits)
    make_folder(target.parent)
    with FileLock(target.with_name(f".{target.name}.lock")):  # other processes may need the same folder now
        if not target.exists():
            model, tokenizer = load_masked_lm(backbone)
            for edit, value in edits:
                _edit(model, edit, value)
            with atomic_folder(target) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    return str(target)


def edited_name(backbone: str, edits: Edits) -> str:
    names = "-".join(f"{edit}-{value:.6g}" for edit, value in edits)
    return f"{Path(backbone).name}-{names}-{(model_fingerprint(backbone) or '')[:8]}"


@torch.no_grad()
def _edit(model: PreTrainedModel, edit: Edit, value: float) -> None:
    if edit == "scaled":
        rescale_head(model, k=value)
    elif edit == "untied":
        untie_head(model)
    elif edit == "tied":
        head = find_head(model)
        for tensor in (head.decoder.weight, *head.biases):
            tensor /= value
    elif edit == "folded":
        norm = _norm_before_decoder(model)
        for tensor in (norm.weight, norm.bias, *find_head(model).biases):
            if tensor is not None:
                tensor /= value
    else:
        raise OptionError(f"{edit!r} is not an edit; choose one of {', '.join(get_args(Edit))}")


def _norm_before_decoder(model: PreTrainedModel) -> nn.LayerNorm:
    """The last LayerNorm of the head, whose output the decoder projects."""
    prefix = f"{model.base_model_prefix}."
    norms = [module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and not name.startswith(prefix)]
    if not norms:
        raise ModelError(f"{type(model).__name__}: its head has no LayerNorm before the decoder to fold a scale into")
    return norms[-1]
