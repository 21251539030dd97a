"""Train a small network on digits, quantize it to 4 bits, write one file, and run that file as int8.

    python examples/quantize_and_export.py

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

torch.manual_seed(0)
torch.set_num_threads(1)  # more do not help a network as small as this
with np.load(DATA / "digits.npz") as archive:
    images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2) / 255  # f32 [200, 1, 16, 16]
    labels = torch.from_numpy(archive["labels"])
train, test = slice(0, 150), slice(150, 200)


def block(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())


def train_on(count: int) -> None:
    net.train()
    for _ in range(count):
        drawn = torch.randint(150, (32,))
        loss = cross_entropy(net(images[drawn]), labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project_steps_(net)  # keeps step sizes positive, once there are any
    net.eval()


@torch.no_grad()
def accuracy(model) -> float:
    return (torch.as_tensor(model(images[test])).argmax(1) == labels[test]).float().mean().item()


net = nn.Sequential(block(1, 16), block(16, 32), block(32, 64), nn.Flatten(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
train_on(60)
print(f"in float32         {accuracy(net):.0%} of the test images are right")

quantize_(net, weight_bits=4)  # all weights but those of the classifier, which the file holds in 8 bits
optimizer.add_param_group(step_group(net, lr=1e-4))
train_on(60)
print(f"trained at 4 bits  {accuracy(net):.0%}")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.safetensors"
    report = qdeploy.export(net, images[:1], path, calibration=images[train])
    model = qdeploy.load_int_model(path)
    print(f"the int8 file      {accuracy(lambda x: model(x.numpy())):.0%}, {model.nbytes:,} bytes\n")
print(report)
