"""What a training loop of your own needs: the four lines with an arrow. Everything else is plain PyTorch.

    python examples/your_own_training_loop.py

Needs `pip install 'qdeploy[train]'`. The task is made up: which of two spirals is a point on?
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import qdeploy
from qdeploy.training import project_steps_, quantize_, step_group, summary

torch.manual_seed(0)
torch.set_num_threads(1)  # more do not help a network as small as this
labels = torch.randint(2, (2000,))
angle = 8 * torch.rand(2000).sqrt()
turned = angle + torch.pi * labels
points = (angle * torch.stack([turned.cos(), turned.sin()])).T / 8 + 0.01 * torch.randn(2000, 2)  # f32 [2000, 2]

net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

for update in range(800):
    if update == 400:  # bits by layer; inputs of the layers at 8 bits, learned too
        quantize_(net, {"0": 8, "2": 5, "4": 8}, activation_bits=8, calibration=[points])  # <-- 1
        optimizer.add_param_group(step_group(net, lr=1e-4))  # <-- 2
    batch = torch.randint(2000, (256,))
    loss = cross_entropy(net(points[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    project_steps_(net)  # <-- 3
    if update % 200 == 199:
        right = (net(points).argmax(1) == labels).float().mean()
        print(f"update {update + 1}: loss {loss:.3f}, {right:.1%} right")

for layer in summary(net):
    print(f"layer {layer.name}: {layer.bits} bits, step size {layer.step:.4f}, rounding error {layer.error:.1%}")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "spirals.safetensors"
    qdeploy.export(net, points[:1], path, calibration=points)  # <-- 4
    model = qdeploy.load_int_model(path)
    print(
        f"the int8 file: {(model.predict(points.numpy()) == labels.numpy()).mean():.1%} right, {model.nbytes:,} bytes"
    )
