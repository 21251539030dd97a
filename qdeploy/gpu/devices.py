"""Which GPUs a model runs on."""

from __future__ import annotations

import torch

from qdeploy.errors import InputError


def checked_device(device: str | torch.device) -> torch.device:
    """The device with its index. Raises InputError for one that is not there, or older than the kernels need."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"expected cpu, cuda or cuda:N, got {device!r} - at device") from None
    if device.type != "cuda":
        raise InputError(f"expected cpu, cuda or cuda:N, got {device} - at device")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InputError("expected a CUDA GPU that PyTorch can use, got none - at device")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise InputError(f"expected cuda:0 to cuda:{count - 1}, got {device} - at device")
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        raise InputError(f"expected compute capability 8.0 or newer, got {capability[0]}.{capability[1]} - at device")
    return torch.device("cuda", index)
