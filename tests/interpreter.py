"""Triton's interpreter, which runs the GPU kernels on a CPU (conftest.py sets TRITON_INTERPRET).

Importing this mends what the interpreter of some versions does in another way than compiled code:
- before 3.9 `tl.fma` rounds twice; compiled it is fma.rn.f32;
- float32 to bfloat16 cuts bits off; compiled it is cvt.rn, half to even;
- 3.6 cannot loop to a bound that is known at run time only, with current numpy.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from qdeploy.reference import fma32

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor


def _fma(self, x, y, z):
    return interpreter.TensorHandle(fma32(x.data, y.data, z.data), z.dtype.scalar)


def _convert(data, source, target, rounding_mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(data, source, target, rounding_mode)
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(data), np.uint16(0x7FFF), rounded.astype(np.uint16)).reshape(np.shape(data))


def _patch(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter.InterpreterBuilder.create_fma = _fma
interpreter._convert_float = _convert
interpreter._patch_lang_tensor = _patch
