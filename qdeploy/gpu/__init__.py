"""A model file on an NVIDIA GPU: the same graph, the same bits as on a CPU. Needs PyTorch and Triton."""

from qdeploy.gpu.loading import load
from qdeploy.gpu.model import GpuModel
from qdeploy.gpu.texts import GpuTextModel

__all__ = ["GpuModel", "GpuTextModel", "load"]
