"""Training algorithms: how one update is made. Logging, evaluation and resuming belong to the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional

from qdeploy.training.attached_quantizers import parametrized_weight, project_steps_, quantizers, step_group
from qdeploy.training.config import Config
from qdeploy.training.quantize import quantize_
from qdeploy.training.quantize_like import quantize_like_

Minibatches = list[tuple[Tensor, Tensor]]  # images f32 [B, C, H, W] and classes [B] of each source domain


class ERM:
    """Empirical risk minimization: Adam on the mean cross-entropy of one minibatch from every source domain."""

    def __init__(self, net: nn.Module, config: Config, fabric: Fabric):
        self.net, self.config, self.fabric = net.to(fabric.device), config, fabric
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
        self.quantized = False
        self._wrap()

    def _wrap(self) -> None:
        self._model = self.fabric.setup_module(self.net)
        self._stepper: Any = self.fabric.setup_optimizers(self.optimizer)

    def update(self, number: int, minibatches: Minibatches) -> Tensor:
        """Makes update `number` (from 0) and returns its loss."""
        images, classes = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        self._train_mode()
        loss = functional.cross_entropy(self._model(images), classes)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self._stepper.step()
        return loss.detach()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits, float32 [N, K], in eval mode."""
        self._model.eval()
        return self._model(images).float()

    def _train_mode(self) -> None:
        self._model.train()
        if self.config.weights is not None:
            # Fine-tuning keeps the statistics of pretraining; gains and shifts still train (DomainBed's freeze_bn).
            for module in self.net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def state_dict(self) -> dict:
        """All that the next update depends on, beside its minibatches."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "quantized": self.quantized}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class QTDoG(ERM):
    """QT-DoG (ICML 2025): ERM that goes on with LSQ-quantized weights from update `quantize_at`.

    At the START of that update the quantizers are attached to the current weights. The Parameter objects stay, so
    Adam keeps its moments, and the step sizes join the optimizer as a group of their own: weights AND step sizes go on
    training. `qat_scope` "bn_head" freezes both, "no_s" the step sizes.
    """

    def update(self, number: int, minibatches: Minibatches) -> Tensor:
        if number == self.config.quantize_at:
            self._quantize(minibatches)
        loss = super().update(number, minibatches)
        project_steps_(self.net)
        return loss

    def _quantize(self, minibatches: Minibatches) -> None:
        shown = [] if self.config.activation_bits is None else [self._of_all_devices(part) for part, _ in minibatches]
        self._switch(lambda net: attach_quantizers(net, self.config, shown))

    def _switch(self, attach: Callable[[nn.Module], object]) -> None:
        """Goes on with the quantizers that `attach` attaches to the network."""
        config = self.config
        del self._model  # data-parallel training holds the network, which may not be quantized then
        attach(self.net)
        for quantizer in quantizers(self.net).values():
            quantizer.step.requires_grad_(config.qat_scope == "all")
        if config.qat_scope == "bn_head":
            for key in quantizers(self.net):
                name, _, kind = key.rpartition(".")
                if kind == "weight":
                    parametrized_weight(self.net.get_submodule(name)).original.requires_grad_(False)
        if config.reset_optimizer:
            self.optimizer.state.clear()
        if config.qat_scope == "all":
            self.optimizer.add_param_group(step_group(self.net, config.lr_step_size))
        self.quantized = True
        self._wrap()  # again, with the new parameters

    def _of_all_devices(self, share: Tensor) -> Tensor:
        """The whole minibatch in its order, of which process r of n holds the places r, r + n, ...

        So the range and the first step size of an input are those of all its images, whatever the number of devices.
        """
        rank, count = self.fabric.global_rank, self.fabric.world_size
        whole = share.new_zeros(count * len(share), *share.shape[1:])
        whole[rank::count] = share
        summed: Any = self.fabric.all_reduce(whole, reduce_op="sum")
        return summed

    def load_state_dict(self, state: dict) -> None:
        if state["quantized"]:
            self._switch(lambda net: quantize_like_(net, state["net"]))
        super().load_state_dict(state)


def attach_quantizers(net: nn.Module, config: Config, calibration: list[Tensor]) -> None:
    """`quantize_` with the settings of a run."""
    quantize_(
        net,
        config.bits,
        config.activation_bits,
        per_channel=not config.per_tensor,
        init=config.init,
        grad_scale=config.grad_scale,
        calibration=calibration,
    )


ALGORITHMS: dict[str, type[ERM]] = {"erm": ERM, "qt-dog": QTDoG}
