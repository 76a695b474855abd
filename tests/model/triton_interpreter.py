"""Triton's interpreter, corrected where it differs from a GPU. Import it before any kernel; TRITON_INTERPRET must be 1."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from anysplade.model.kernels import larger

_patch_tensor = interpreter._patch_lang_tensor
_dot = interpreter.InterpreterBuilder.create_dot
_reduce = interpreter.ReduceOps.apply_impl


def _patch_lang_tensor(tensor, scope):
    """Let tensors of one number be bounds of a loop: numpy 2.4 does not convert an array of shape (1,) to an integer."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _create_dot(self, left, right, *rest):
    """Multiply bfloat16 by value: the interpreter multiplies its bit patterns (triton-lang/triton#11584)."""
    left, right = (self.create_fp_to_fp(t, tl.float32, None) if t.dtype.scalar == tl.bfloat16 else t for t in (left, right))
    return _dot(self, left, right, *rest)


def _apply_impl(self, arguments):
    """Reduce by the maximum at once: the interpreter calls ``larger`` for every pair of numbers."""
    if self.combine_fn is larger:
        return self.min_max(arguments[0], val_reduce_op=np.max)
    return _reduce(self, arguments)


def correct():
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.ReduceOps.apply_impl = _apply_impl
