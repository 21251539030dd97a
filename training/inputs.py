"""What the networks of a run read, images or texts, and all that depends on which of the two it is: how a batch of a
domain becomes the input of a network, calibration data, and the input of a model file.

A batch of texts is one tensor like one of images, whatever joins, splits and sends batches: ids [N, T], -1 beyond the
end of a text. The network itself makes ids and mask of it (`_with_mask`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.errors import InputError

if TYPE_CHECKING:
    from qdeploy.model import Model


@dataclass(frozen=True)
class Images:
    """Of [C, H, W]; from pixels in [0, 1] `mean` is subtracted, and `std` divides them, by channel."""

    what: ClassVar = "images"
    option: ClassVar = "--image-size"  # that says their shape
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return self.shape[0]

    def adapted(self, net: nn.Module, name: str) -> nn.Module:
        """`net`, as the batches of `for_network` need it; `name` is that of --model."""
        return net

    def check(self, net: nn.Module, count: int) -> None:
        """Raises RuntimeError or ValueError where `net` does not take `count` of them; moves it to "meta"."""
        net.to("meta")(torch.empty(count, *self.shape, device="meta"))

    def text(self, count: int) -> str:
        return f"{count} of {list(self.shape)}"

    def for_network(self, batch: Tensor) -> Tensor:
        """Of u8 [N, C, H, W] what the network takes, f32 on the same device: from [0, 1], less `mean`, over `std`."""
        largest, mean, std = _scales(self.mean, self.std, batch.device)
        return batch.float().div_(largest).sub_(mean).div_(std)

    def for_calibration(self, batch: Tensor) -> Tensor:
        """As `for_network`."""
        return self.for_network(batch)

    def file_options(self) -> dict[str, Any]:
        """What they say to an export."""
        return {"preprocess": {"mean": self.mean, "std": self.std}}

    def predict(self, model: Model, images: Tensor) -> np.ndarray:
        """The classes of a model file for what `for_network` returned."""
        return model.predict(images.numpy())


@cache
def _scales(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, `mean` and `std` on the device. By a number of Python's a GPU does not divide: it multiplies with the
    reciprocal, which rounds to other bits."""
    channels = (-1, 1, 1)
    return (
        torch.tensor(255.0, device=device),
        torch.tensor(mean, device=device).reshape(channels),
        torch.tensor(std, device=device).reshape(channels),
    )


@dataclass(frozen=True)
class Texts:
    """Of up to `longest` tokens, whose ids are below `vocabulary`."""

    what: ClassVar = "texts"
    option: ClassVar = "--tokens"
    longest: int
    vocabulary: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a text as a domain gives it."""
        return (self.longest,)

    @property
    def channels(self) -> int:
        return 1

    def adapted(self, net: nn.Module, name: str) -> nn.Module:
        """As of `Images`: from now on `net` takes ids that are -1 beyond the end of a text."""
        if "attention_mask" not in signature(net.forward).parameters:
            expected = "a network of texts, whose forward takes attention_mask"
            raise InputError(f"expected {expected}, got a {type(net).__name__} - at --model {name}")
        net.register_forward_pre_hook(_with_mask, with_kwargs=True)  # in place of a module around it, as for `logits`
        return net

    def check(self, net: nn.Module, count: int) -> None:
        """Raises RuntimeError, ValueError or IndexError where `net` has too few positions or ids. One text is run: on
        "meta" nothing would be looked up."""
        with torch.no_grad():
            net.eval()(torch.full((1, self.longest), self.vocabulary - 1))

    def text(self, count: int) -> str:
        return f"{self.longest} tokens with ids to {self.vocabulary - 1}"

    def for_network(self, batch: Tensor) -> Tensor:
        """Of i32 [N, T] what the network takes, i64."""
        return batch.long()

    def for_calibration(self, batch: Tensor) -> Tensor:
        """As many rows, i64 [N, T], each full: a text, and after it those that follow in the batch, until T.

        An export is traced without a mask, and padding would widen the ranges by what the engine never computes. So
        every row begins as a text does, at position 0.
        """
        texts = [text[text >= 0].long() for text in batch]
        starts = np.cumsum([0, *map(len, texts)])[:-1]
        cycle = torch.cat(texts)
        places = (torch.from_numpy(starts)[:, None] + torch.arange(self.longest)) % len(cycle)
        return cycle[places]

    def file_options(self) -> dict[str, Any]:
        """As of `Images`."""
        return {}

    def predict(self, model: Model, texts: Tensor) -> np.ndarray:
        """As of `Images`; through the mask of the engine."""
        mask = texts >= 0
        reader: Any = model  # a `TextModel`
        return reader.predict(texts.clamp(min=0).numpy(), mask.long().numpy())


def _with_mask(net: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In place of ids that are -1 beyond the end of a text: ids and mask, as long as the longest text of the batch.

    An export traces the network with ids alone.
    """
    if torch.compiler.is_exporting() or len(args) != 1 or more:
        return args, more
    mask = args[0] >= 0
    longest = int(mask.sum(1).max())
    ids, mask = args[0][:, :longest], mask[:, :longest]
    return (ids.clamp(min=0),), {"attention_mask": mask.long()}


Inputs = Images | Texts
