"""Runs the GPU kernels on a CPU: import it before them.

TRITON_INTERPRET=1, which conftest.py sets, runs them in Triton's interpreter. TRITON_INTERPRET=0 compiles them, as
they would be for a GPU (GPU_TARGET=90 for sm_90, else sm_80), specialized on the arguments by Triton itself, and
runs the PTX in `ptx.py`: slower, because every new shape is compiled, and closer to a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import ptx
import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import JITFunction, driver, interpreter

from qdeploy.reference import fma32

COMPILED = not knobs.runtime.interpret

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor
_run = JITFunction.run
_seed: int | None = None


@contextlib.contextmanager
def warps_in_any_order(seed: int) -> Iterator[None]:
    """Compiled kernels run warp by warp in an order drawn from the seed, not all threads in step."""
    global _seed
    _seed = seed
    try:
        yield
    finally:
        _seed = None


def _allocations() -> list[tuple[int, int]]:
    """Start and end of the memory of all tensors."""
    found = []
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # those of a trace have no memory
                storage = tensor.untyped_storage()
                found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return found


def _launch(self: JITFunction, *args, grid, warmup: bool, **kwargs) -> None:
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    if warmup:
        return kernel
    bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
    arguments = [bound[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    arguments = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    memory = ptx.Memory(_allocations())
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    ptx.launch(kernel.asm["ptx"], arguments, grid, warps, shared, memory, _seed)


def _emulate_a_gpu() -> None:
    target = GPUTarget("cuda", int(os.environ.get("GPU_TARGET", "80")), 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    CUDABackend.make_cubin = lambda *args: b""  # the PTX is enough
    JITFunction.run = _launch
    gc.collect()
    gc.freeze()  # of what was there before the first tensor, gc.get_objects says nothing


# What the interpreter of some versions does in another way than compiled code.


def _fma(self, x, y, z):
    """Before 3.9 `tl.fma` rounds twice; compiled it is fma.rn.f32."""
    return interpreter.TensorHandle(fma32(x.data, y.data, z.data), z.dtype.scalar)


def _convert(data, source, target, rounding_mode):
    """Float32 to bfloat16 cuts bits off; compiled it is cvt.rn, half to even."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(data, source, target, rounding_mode)
    return ptx.to_bits(np.asarray(data, np.float32), "bf16")


def _patch(tensor, scope):
    """3.6 cannot loop to a bound that is known at run time only, with current numpy."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _mend_the_interpreter() -> None:
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter._convert_float = _convert
    interpreter._patch_lang_tensor = _patch


_emulate_a_gpu() if COMPILED else _mend_the_interpreter()
