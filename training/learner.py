"""A network in training and what changes it: what stands on the axes of a run, joined."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.terminal import note
from qdeploy.training.attached_quantizers import step_parameters
from qdeploy.training.batch_norm import freeze_, synchronize_
from qdeploy.training.config import Config, made
from qdeploy.training.initial_steps import MIN_STEP
from qdeploy.training.methods.batches import Minibatches
from qdeploy.training.seeds import seed_hash

FAST = 1e-2  # of a step size, in one update


class Learner:
    """One network with its optimizer, objective, step, quantization, average and schedule.

    All that update t depends on, beside its minibatches, is in `state_dict`; random draws follow from the seed and t.
    """

    def __init__(self, net: nn.Module, config: Config, fabric: Fabric):
        self.net, self.config, self.fabric = net.to(fabric.device), config, fabric
        train_only_(self.net, config.train_only)
        self.attached = False  # whether the quantization has changed the network
        self._update = 0
        self.optimizer: torch.optim.Optimizer = made(config, "optimizer", params=self.net.parameters())
        self.schedule = made(config, "schedule")
        self.objective = made(config, "objective", progress=lambda: self._update / config.updates)
        self.step = made(config, "step", net=self.net, backward=fabric.backward)
        self.quantization = made(config, "quantization")
        self.average = made(config, "average")
        if config.batch_norm == "synchronized":
            synchronize_(self.net)
        self._wrap()

    def _wrap(self) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._model = self.fabric.setup_module(self.net)
        self._stepper: Any = self.fabric.setup_optimizers(self.optimizer)

    def update(self, t: int, minibatches: Minibatches) -> Tensor:
        """Makes update `t` (from 0) and returns its loss, that of this process."""
        self._update = t
        if t == 0:
            self.average.begin(self.net)
        if t == self.quantization.start:
            whole = [(self._of_all_devices(images), classes) for images, classes in minibatches]
            self._switch(lambda: self.quantization.attach(self.net, self.optimizer, whole))
            self._warn_of_fast_steps()
        self.train_mode()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule.factor(t)
        loss = self.step.gradients(lambda: self._loss(t, minibatches))
        self._stepper.step()
        if self.attached:
            self.quantization.after_step(t)
        self.average.update(self.net, t)
        return loss.detach()

    def _loss(self, t: int, minibatches: Minibatches) -> Tensor:
        """The same at every call: a step may ask for it more than once, and for the same draws."""
        torch.manual_seed(seed_hash(self.config.seed, t, self.fabric.global_rank))  # dropout and the like
        rng = torch.Generator().manual_seed(seed_hash(self.config.seed, t, "objective"))
        return self.objective.loss(self._model, minibatches, rng)

    def _switch(self, attach: Callable[[], object]) -> None:
        """Goes on with the network as `attach` changes it."""
        del self._model  # data-parallel training holds the network, which may not be quantized then
        attach()
        self.attached = True
        self._wrap()  # again, with the new parameters

    def _warn_of_fast_steps(self) -> None:
        """Adam moves a step size by about its learning rate, whatever the gradient: quiet channels lose their grid."""
        steps, rate = step_parameters(self.net), self.config.lr_step_size
        if not steps or rate is None or not self.fabric.is_global_zero:
            return
        alive = torch.cat([step.detach().flatten() for step in steps])
        alive = alive[alive > MIN_STEP]  # those of channels that are not all zero
        if not len(alive):
            return
        smallest = alive.min().item()
        if rate / smallest > FAST:
            note(f"warning: --lr-step-size {rate} is {rate / smallest:.0%} of the smallest step size, {smallest:.2g}")

    def train_mode(self) -> None:
        """As an update has it."""
        self._model.train()
        if self.config.batch_norm == "frozen":
            freeze_(self.net)

    def candidate(self, t: int) -> nn.Module:
        """The network that the evaluation after update `t` judges: the average of those so far, where there is one."""
        return self.average.network(self.net) if self.average.eligible(t) else self.net

    def evaluations(self, t: int) -> int:
        """How many networks are judged after update `t`: the one that trains, where the average goes by its losses, and
        the average."""
        return 2 if self.average.goes_by_losses and self.average.eligible(t) else 1

    def eligible(self, t: int) -> bool:
        """Whether the network of the evaluation after update `t` may be selected."""
        return self.quantization.eligible(t) and self.average.eligible(t)

    def _of_all_devices(self, share: Tensor) -> Tensor:
        """The whole minibatch in its order, of which process r of n holds the places r, r + n, ...

        So the range and the first step size of an input are those of all its images, whatever the number of devices.
        """
        rank, count = self.fabric.global_rank, self.fabric.world_size
        whole = share.new_zeros(count * len(share), *share.shape[1:])
        whole[rank::count] = share
        summed: Any = self.fabric.all_reduce(whole, reduce_op="sum")
        return summed

    def _stateful(self) -> dict[str, Any]:
        return {axis: getattr(self, axis) for axis in ("objective", "step", "quantization", "average")}

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, beside its minibatches."""
        states = {axis: choice.state_dict() for axis, choice in self._stateful().items()}
        net, optimizer = self.net.state_dict(), self.optimizer.state_dict()
        return {"net": net, "optimizer": optimizer, "attached": self.attached, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        if state["attached"]:
            self._switch(lambda: self.quantization.reattach(self.net, self.optimizer, state["net"]))
        else:
            self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        for axis, choice in self._stateful().items():
            choice.load_state_dict(state[axis])


def train_only_(net: nn.Module, pattern: str | None) -> None:
    """Freezes all other parameters. Raises InputError where none is left."""
    if pattern is None:
        return
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(fnmatchcase(name, pattern))
    if not any(parameter.requires_grad for parameter in net.parameters()):
        some = ", ".join([name for name, _ in net.named_parameters()][:3])
        raise InputError(f"expected a pattern of parameters ({some}, ...), got {pattern!r} - at --train-only")
