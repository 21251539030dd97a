"""How an ensemble of networks decides, from the logits of its members."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qdeploy import reference
from qdeploy.errors import InputError
from qdeploy.graph import COMBINE

RULES = (*COMBINE, "vote")
ELEMENTS_PER_PIECE = 2**15  # logits of a member at a time on the CPU: the temporaries of the reference stay in L2


def combine(logits: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Combines members: [M, N, K] logits to probabilities float32 [N, K] and classes int64 [N].

    The first two rules are those of a model file (docs/format.md, "Ensembles"), with the bits of the engine, on a CPU
    and on a GPU: a network judged here decides as its exported ensemble does from the same logits.

    Args:
        logits: the output of M members for N images and K classes; float32, bfloat16 or float16, computed in float32.
        rule: "logits": softmax of the mean logit (EoQ, QT-DoG equation 6); "probs": mean of the softmaxes;
            "vote": shares of the members' votes, ties decided by the mean logit.

    Returns:
        The probabilities, and the first class of the largest mean logit or mean probability. Under the first two rules
        an image for which a softmax sees a NaN, a +inf or nothing but -inf has NaN for all its probabilities and any
        class of 0..K-1. No gradient flows back.

    Raises:
        InputError: another rule, shape or type.
    """
    if rule not in RULES:
        raise InputError(f"expected rule {', '.join(COMBINE)} or vote, got {rule!r} - at combine")
    check_logits(logits)
    if rule == "vote":
        return _vote(logits)
    if logits.is_cuda:
        from qdeploy.kernels.triton_ensemble import average

        return average(logits, rule)
    return _average(logits, rule)


def check_logits(logits: Tensor) -> None:
    """Raises InputError for what is not the output of an ensemble."""
    if logits.dim() != 3 or not (logits.shape[0] and logits.shape[2]):
        raise InputError(f"expected [M, N, K] with M and K > 0, got {list(logits.shape)} - at logits of an ensemble")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"expected float32, bfloat16 or float16, got {logits.dtype} - at logits of an ensemble")


def _average(logits: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The rules "logits" and "probs" by the definition in numpy."""
    probabilities = torch.empty(logits.shape[1:])
    classes = torch.empty(logits.shape[1], dtype=torch.int64)
    step = max(1, ELEMENTS_PER_PIECE // logits.shape[2])
    for start in range(0, logits.shape[1], step):
        piece = slice(start, start + step)
        with np.errstate(invalid="ignore", over="ignore"):
            found, scores = reference.combine(list(logits[:, piece].detach().float().numpy()), rule)
        found[~np.isfinite(scores.max(-1))] = np.nan  # the reference turns NaN and +inf into any integer
        probabilities[piece] = torch.from_numpy(found)
        classes[piece] = torch.from_numpy(scores.argmax(-1))
    return probabilities, classes


def _vote(logits: Tensor) -> tuple[Tensor, Tensor]:
    votes = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    tied = votes == votes.amax(-1, keepdim=True)
    classes = logits.float().mean(0).masked_fill(~tied, -torch.inf).argmax(-1)
    return votes / len(logits), classes
