"""How an ensemble of networks decides, from the logits of its members."""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.errors import InputError


def combine(logits: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Combines members: [M, N, K] float32 logits to probabilities [N, K] and classes [N].

    Args:
        logits: the output of M members for N images and K classes.
        rule: "logits": softmax of the mean logit (EoQ, QT-DoG equation 6); "probs": mean of the softmaxes;
            "vote": shares of the members' votes, ties decided by the mean logit.

    Raises:
        InputError: another rule.
    """
    mean = logits.float().mean(0)
    if rule == "logits":
        probabilities = mean.softmax(-1)
        return probabilities, mean.argmax(-1)
    if rule == "probs":
        probabilities = logits.float().softmax(-1).mean(0)
        return probabilities, probabilities.argmax(-1)
    if rule == "vote":
        votes = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
        tied = votes == votes.amax(-1, keepdim=True)
        return votes / len(logits), mean.masked_fill(~tied, -torch.inf).argmax(-1)
    raise InputError(f"expected rule logits, probs or vote, got {rule!r} - at combine")
