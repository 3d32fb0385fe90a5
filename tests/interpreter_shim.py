"""Mends Triton's CPU interpreter for the tests (3.6 to 3.8). Import it before the first kernel is launched.

1. The interpreter keeps bfloat16 as raw uint16: arithmetic on it is garbage and casts truncate, without an error.
   Here it is kept as ml_dtypes.bfloat16, and every cast goes through float32.
2. With NumPy >= 2.4, Triton 3.6 cannot turn a one-element array into the bound of a `range`.
"""

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BF16 = np.dtype(ml_dtypes.bfloat16)
_builder = interpreter.InterpreterBuilder
_original = {
    name: getattr(_builder, name)
    for name in ("create_masked_load", "create_masked_store", "cast_impl", "create_fp_to_fp", "create_dot")
}
_original_np_dtype = interpreter._get_np_dtype
_original_patch_tensor = interpreter._patch_lang_tensor


def _np_dtype(dtype):
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    is_bf16 = not isinstance(scalar, tl.pointer_type) and scalar == tl.bfloat16
    return BF16 if is_bf16 else _original_np_dtype(dtype)


def _as_bits(array):
    return np.ascontiguousarray(array).view(np.uint16)


def _masked_load(self, ptrs, mask, other, *rest, **options):
    element = ptrs.get_element_ty()
    if element != tl.bfloat16:
        return _original["create_masked_load"](self, ptrs, mask, other, *rest, **options)
    filler = np.zeros(ptrs.data.shape, BF16) if other is None else np.asarray(other.data).astype(BF16)
    bits = interpreter._interpreter.load(ptrs.data, mask.data, _as_bits(filler), np.dtype(np.uint16))
    return interpreter.TensorHandle(bits.view(BF16), element)


def _masked_store(self, ptrs, value, mask, *rest, **options):
    if value.data.dtype == BF16:
        value = interpreter.TensorHandle(_as_bits(value.data), tl.uint16)
    return _original["create_masked_store"](self, ptrs, value, mask, *rest, **options)


def _involves_bf16(source, target):
    scalars = (source.dtype.scalar, target.scalar)
    return tl.bfloat16 in scalars and not any(each.is_fp8() for each in scalars)


def _cast(self, source, target):
    if not _involves_bf16(source, target):
        return _original["cast_impl"](self, source, target)
    wide = source.data.astype(np.float32) if target.scalar.is_floating() else source.data
    return interpreter.TensorHandle(wide.astype(_np_dtype(target)), target.scalar)


def _fp_to_fp(self, source, target, rounding):
    if _involves_bf16(source, target):
        return _cast(self, source, target)
    return _original["create_fp_to_fp"](self, source, target, rounding)


def _dot(self, a, b, accumulator, *rest):
    def widen(handle):
        if handle.data.dtype != BF16:
            return handle
        return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)

    return _original["create_dot"](self, widen(a), widen(b), accumulator, *rest)


def _patch_tensor(tensor, *rest):
    result = _original_patch_tensor(tensor, *rest)
    tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
    return result


interpreter._get_np_dtype = _np_dtype
interpreter._patch_lang_tensor = _patch_tensor
_builder.create_masked_load = _masked_load
_builder.create_masked_store = _masked_store
_builder.cast_impl = _cast
_builder.create_fp_to_fp = _fp_to_fp
_builder.create_dot = _dot
