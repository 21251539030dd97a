"""Wrappers x parametrizations x calibration data x types: the file is right, or one line says why there is none."""

import warnings

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

import qdeploy
from qdeploy import ExportError, InputError, export, format
from qdeploy.training import quantize_, quantizers

torch.set_num_threads(1)
SHAPE = (3, 8, 8)
X = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(1))


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 6)),
    )


def pruned_for_good(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return prune.remove(layer, "weight")


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch advises the new one; old checkpoints come with this one
        return weight_norm(layer)


# What is done to a layer before it is quantized.
PARAMETRIZATIONS = {
    "plain": lambda layer: layer,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": pruned_for_good,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "old_weight_norm": old_weight_norm,
}
REFUSED_PARAMETRIZATIONS = {"pruning", "old_weight_norm"}
WRAPPERS = {
    "none": lambda net: net,
    "average": AveragedModel,
    "data_parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "dict": lambda net: Dict(net),
}
TYPES = {
    "float32": lambda net: net,
    "half": lambda net: net.half(),
    "double": lambda net: net.double(),
    "half_buffers": lambda net: half_buffers(net),
}
REFUSED_TYPES = {"half", "double", "half_buffers"}
CALIBRATIONS = {
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "double": lambda: X.double(),
    "batches": lambda: list(X.split(8)),
    "labelled": lambda: [(x, torch.zeros(len(x))) for x in X.split(8)],
    "dicts": lambda: [{"image": x, "label": torch.zeros(len(x))} for x in X.split(8)],
    "generator": lambda: (x.numpy() for x in X.split(8)),
    "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(24)), 8),
    "dataset": lambda: torch.utils.data.TensorDataset(X, torch.zeros(24)),
    "integers": lambda: (X * 50).int(),
    "wrong_shape": lambda: X[:, :2],
    "nothing": lambda: [],
    "nan": lambda: X / 0 * 0,
}
REFUSED_CALIBRATIONS = {"integers", "wrong_shape", "nothing", "nan"}


class Dict(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return {"logits": self.net(image), "image": image}


def half_buffers(net):
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.half()
    return net


def codes_of_training(layer, quantizer):
    """Codes of the weight that the quantizer gets, as its own result tells."""
    step = quantizer.step.reshape(-1, *[1] * (layer.weight.dim() - 1))
    return (layer.weight / step).round().to(torch.int8).numpy()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(list(PARAMETRIZATIONS)), min_size=3, max_size=3),
    wrapper=st.sampled_from(list(WRAPPERS)),
    kind=st.sampled_from(["float32"] * 6 + list(TYPES)),
    calibration=st.sampled_from(list(CALIBRATIONS)),
    bits=st.integers(2, 8),
    activation_bits=st.sampled_from([None, None, 4, 8]),
    per_channel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_right_or_refused(tmp_path, kinds, wrapper, kind, calibration, bits, activation_bits, per_channel, seed):
    path = tmp_path / "net.safetensors"
    path.unlink(missing_ok=True)
    torch.manual_seed(seed)
    net = network().eval()
    for place, name in zip((0, 3, 7), kinds, strict=True):
        net[place] = PARAMETRIZATIONS[name](net[place])
    refused = REFUSED_PARAMETRIZATIONS & set(kinds) or kind in REFUSED_TYPES or calibration in REFUSED_CALIBRATIONS
    try:
        data = CALIBRATIONS[calibration]() if activation_bits else None
        quantize_(net, bits, activation_bits, per_channel=per_channel, calibration=data)
        wrapped = WRAPPERS[wrapper](TYPES[kind](net))
        report = export(wrapped, X[:1], path, CALIBRATIONS[calibration]())
    except (ExportError, InputError) as error:
        assert refused, error
        assert "\n" not in str(error) and " - at " in str(error) and not path.exists()
        return
    assert not refused
    nodes = {node.name.removeprefix("net."): node for node in format.load(path).members[0].nodes}
    with torch.no_grad():
        for name, quantizer in quantizers(net).items():
            layer, _, what = name.rpartition(".")
            if what == "weight":
                assert np.array_equal(nodes[layer].constants["weight"], codes_of_training(net[int(layer)], quantizer))
        expected = net(X).numpy()
    got = qdeploy.load_int_model(path)(X.numpy())
    sqnr = 10 * np.log10(np.square(expected).sum() / np.square(expected - got).sum())
    assert sqnr > 20 and report.output_sqnr_db > 20
