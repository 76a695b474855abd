"""Operations for which the host would wait if a computation ran on a GPU, found while it runs on a CPU."""

import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators with a result, or the size of one, that the host needs to know; lift_fresh copies new numbers to the device.
_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "bincount", "repeat_interleave.Tensor")
_METHODS = ("tolist", "cpu", "numpy", "__array__")  # of tensors that are on a CPU already, so that no operator runs


@contextmanager
def recorded_waits(recording=lambda: True):
    """Count the waits in a block while ``recording()`` is true: a Counter of "operator in file: function".

    What the trainer does to read a batch is left out: it happens on the host.
    """
    waits = Counter()

    def note(name):
        if recording():
            stack = traceback.extract_stack()[::-1]
            if not any(frame.name == "get_batch_samples" for frame in stack):
                own = (Path(__file__).parent, Path(torch.__file__).parent)
                frame = next(frame for frame in stack if not any(Path(frame.filename).is_relative_to(folder) for folder in own))
                waits[f"{name} in {Path(frame.filename).name}: {frame.name}"] += 1

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = str(operator).removeprefix("aten.")
            if name.startswith(("index.", "index_put")):
                if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                    note(f"{name.partition('.')[0]} by a mask")
            elif name.startswith(_OPERATORS) or "unique" in name:
                note(name.partition(".")[0])
            return operator(*args, **(kwargs or {}))

    class Methods(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in _METHODS and isinstance(args[0], torch.Tensor):
                note(name)
            return function(*args, **(kwargs or {}))

    with Methods(), Operators():
        yield waits
