"""Training steps for which the host does not wait, so that it queues the next one while the device is still at work.

The host waits whenever it reads a number from the device: to choose a branch, to print it, or to know how many entries of a mask
are set. A test counts what would wait in a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_ALL_MASKS = ("cuda",)  # types of device on which every attention mask is built
Products = Literal["bfloat16", "tf32", "float32"]


def matrix_products(precision: str, device: torch.device) -> Products:
    """The format of a training's matrix products: where float32 is asked for, NVIDIA's GPUs since 2020 multiply in TF32.

    TF32 has the range of float32 and rounds the factors to 10 bits; sums stay in float32. It is several times as fast.
    """
    if precision == "bfloat16":
        return "bfloat16"
    tf32 = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32" if tf32 else "float32"


class Steps:
    """Mixin for a trainer whose steps do not wait for the device."""

    args: Any

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = self.args.device
        with _all_masks() if device.type in _ALL_MASKS else nullcontext(), _fast_products(device):
            loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]  # the trainer has it
            return loss


@contextmanager
def _all_masks() -> Iterator[None]:
    """Let transformers build each attention mask, also for a batch without padding.

    It would leave such a mask out, and waits in each forward pass to know whether it may; batches without padding are rare.
    """
    build = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def always(*args: Any, **options: Any) -> Any:
        return build(*args, **options | {"allow_is_bidirectional_skip": False})

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = always
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = build


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """TF32 where the device has it; what is computed after the step is exact again."""
    if matrix_products("float32", device) != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
