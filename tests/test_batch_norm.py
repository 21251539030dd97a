"""Statistics of BatchNorm against numpy, and on two devices against one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from qdeploy.errors import InputError
from qdeploy.training import quantize_
from qdeploy.training.batch_norm import SynchronizedOnCPU, freeze_, reestimate_, synchronize_
from qdeploy.training.models import MODELS


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small():
    """Statistics and gains that are not those of a new layer; dropout would show what is not in eval mode."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)
    net = nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4))
    net.append(nn.BatchNorm1d(4, track_running_stats=False)).append(nn.BatchNorm1d(4)).append(nn.Linear(4, 2))
    net[1].weight.data.uniform_(0.5, 2)
    for _ in range(3):
        net(torch.randn(5, 2, 4, 4))
    return net


def batches(*sizes):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 4, 4, generator=rng) * 2 + 1 for size in sizes]


def test_frozen_statistics_stay_and_gains_train():
    net = small()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    freeze_(net)
    train = [type(module) for module in net if module.training]
    assert train == [nn.Conv2d, nn.ReLU, nn.Dropout, nn.Flatten, nn.Linear, nn.Linear]
    net(batches(6)[0]).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert net[1].weight.grad.abs().sum() > 0 and net[1].bias.requires_grad


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_the_means_over_all_batches(bits, training):
    net = small()
    if bits is not None:
        quantize_(net, bits)
    net.train(training)
    net[3].train(not training)  # each module's own mode comes back
    modes = [module.training for module in net.modules()]
    parameters = [parameter.detach().clone() for parameter in net.parameters()]
    shown = batches(6, 6, 3)
    with torch.no_grad():
        seen = [net[0](images).double().numpy().swapaxes(0, 1).reshape(3, -1) for images in shown]
    reestimate_(net, iter(shown))
    np.testing.assert_allclose(net[1].running_mean, np.mean([x.mean(1) for x in seen], 0), rtol=1e-5)
    np.testing.assert_allclose(net[1].running_var, np.mean([x.var(1, ddof=1) for x in seen], 0), rtol=1e-5)
    with torch.no_grad():  # the one behind it saw maps that were normalized with the statistics of each batch
        later = []
        for images, x in zip(shown, seen, strict=True):
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + net[1].eps)
            x = x * net[1].weight.double().numpy()[:, None] + net[1].bias.double().numpy()[:, None]
            x = np.maximum(x, 0).reshape(3, len(images), 4).swapaxes(0, 1).reshape(len(images), -1)
            x = x @ net[5].weight.double().numpy().T + net[5].bias.double().numpy()
            later.append((x - x.mean(0)) / np.sqrt(x.var(0) + net[6].eps))
    np.testing.assert_allclose(net[7].running_var, np.mean([x.var(0, ddof=1) for x in later], 0), rtol=1e-4)
    assert net[1].num_batches_tracked == net[7].num_batches_tracked == 3 and net[1].momentum == 0.1
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(parameters, net.parameters(), strict=True))
    assert not any(parameter.grad is not None for parameter in net.parameters())


def test_statistics_of_a_wrapped_network():
    nets = small(), small()
    reestimate_(nets[0], batches(4, 5))
    reestimate_(Fabric(accelerator="cpu", devices=1).setup_module(nets[1]), batches(4, 5))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True))


def broken():
    yield batches(4)[0]
    raise KeyboardInterrupt


def test_where_batches_fail_statistics_are_what_they_were():
    net = small()
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(InputError) as error:
        reestimate_(net, [])
    assert str(error.value) == "expected one batch or more, got none - at the statistics of BatchNorm"
    with pytest.raises(KeyboardInterrupt):
        reestimate_(net, broken())
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert net[1].momentum == 0.1 and all(module.training for module in net.modules())


@pytest.mark.parametrize("name", ["nin", "resnet18"])
def test_a_synchronized_network_is_the_same_one(name):
    net = MODELS[name](4, 1)
    state, parameters = net.state_dict(), [*net.named_parameters()]
    expected = net.eval()(torch.ones(2, 1, 32, 32))
    synchronize_(net)
    assert sum(isinstance(module, SynchronizedOnCPU) for module in net.modules()) > 5
    assert [*net.state_dict()] == [*state] and all(torch.equal(v, state[key]) for key, v in net.state_dict().items())
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(net.named_parameters(), parameters, strict=True))
    assert torch.equal(net(torch.ones(2, 1, 32, 32)), expected)
    synchronize_(net)  # nothing more
    MODELS[name](4, 1).load_state_dict(net.state_dict())


class Activated(nn.BatchNorm2d):
    """As some libraries have it."""

    def forward(self, input):
        return super().forward(input).relu()


def test_batch_norm_of_a_class_of_its_own_is_not_synchronized():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(Activated(2)))
    with pytest.raises(InputError) as error:
        synchronize_(net)
    assert str(error.value) == "expected a BatchNorm of torch to synchronize, got Activated - at layer `1.0`"
    assert type(net[0]) is nn.BatchNorm2d


TWO_DEVICES = """
import sys
import torch
from torch import distributed, nn
from qdeploy.training.batch_norm import reestimate_, synchronize_
from test_batch_norm import batches, small, without_dropout

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
net = without_dropout(small()).double()
synchronize_(net)
wrapped = nn.parallel.DistributedDataParallel(net)
images, more = (part.double() for part in batches(6, 8))
wrapped(images[rank::2]).square().mean().backward()
gradients = [parameter.grad for parameter in net.parameters()]
trained = [buffer.clone() for buffer in net.buffers()]
reestimate_(net, [images[rank::2], more[rank::2]])
torch.save((gradients, trained, [*net.buffers()]), f"{store}.{rank}")
distributed.destroy_process_group()
"""


def without_dropout(net):
    net[3].p = 0.0
    return net


def test_two_devices_have_the_statistics_and_gradients_of_one(tmp_path):
    store = tmp_path / "store"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", "-c", TWO_DEVICES]
    processes = [subprocess.Popen([*command, str(rank), str(store)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    net = without_dropout(small()).double()
    images, more = (part.double() for part in batches(6, 8))
    net(images).square().mean().backward()
    trained = [buffer.clone() for buffer in net.buffers()]
    reestimate_(net, [images, more])
    expected = [parameter.grad for parameter in net.parameters()], trained, [*net.buffers()]
    for rank in range(2):
        for part, right in zip(torch.load(f"{store}.{rank}"), expected, strict=True):
            for got, value in zip(part, right, strict=True):
                np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-14)
