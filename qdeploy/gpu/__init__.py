"""A model file on an NVIDIA GPU: the same graph, the same bits as on a CPU. Needs PyTorch and Triton."""

from qdeploy.gpu.model import GpuModel, load

__all__ = ["GpuModel", "load"]
