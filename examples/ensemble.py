"""Three networks, one file, one call: what an ensemble of quantized networks (EoQ) gains and costs.

    python examples/ensemble.py

Needs `pip install 'qdeploy[train]'`. The data is the 200 images of 16 x 16 that qdeploy brings along.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import qdeploy
from qdeploy.demo import DATA
from qdeploy.training import project_steps_, quantize_, step_group

torch.set_num_threads(1)  # more do not help networks as small as these
with np.load(DATA / "digits.npz") as archive:
    images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2) / 255  # f32 [200, 1, 16, 16]
    labels = torch.from_numpy(archive["labels"])
train, test = slice(0, 100), slice(100, 200)


def block(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())


def trained(seed: int) -> nn.Module:
    """A network that was quantized to 7 bits halfway."""
    torch.manual_seed(seed)
    net = nn.Sequential(block(1, 16), block(16, 32), block(32, 64), nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for update in range(120):
        if update == 60:
            quantize_(net, weight_bits=7)
            optimizer.add_param_group(step_group(net, lr=1e-4))
        drawn = torch.randint(100, (32,))
        loss = cross_entropy(net(images[drawn]), labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project_steps_(net)
    return net.eval()


def accuracy(path: Path) -> float:
    model = qdeploy.load_int_model(path)  # an ensemble loads like any other file
    return (model.predict(images[test].numpy()) == labels[test].numpy()).mean()


nets = [trained(seed) for seed in range(3)]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.safetensors"
    for i, net in enumerate(nets):
        qdeploy.export(net, images[:1], path, calibration=images[train])
        print(f"network {i} alone    {accuracy(path):.0%} of the test images are right, {path.stat().st_size:,} bytes")
    report = qdeploy.export_ensemble(nets, images[:1], path, calibration=images[train])
    print(f"the three as one   {accuracy(path):.0%}, {path.stat().st_size:,} bytes\n")
print(report)
