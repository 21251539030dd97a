"""Operations on torch tensors. `triton_*.py` are their kernels for GPUs and the only modules that import Triton."""
