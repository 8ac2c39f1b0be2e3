"""Distillation: cross-entropy with the text, mixed with the divergence from a teacher's k likeliest tokens.

At every position these have probabilities p_1 … p_k at temperature T, and all others together have
p_0 = 1 - sum p_i. With the student's probabilities at the same temperature, q = softmax(logits / T), and
q_0 = 1 - sum q_i,

    loss = ce_weight * nll + kl_weight * T² * (sum over i = 0 … k of p_i * log(p_i / q_i))

which is forward KL(teacher || student) over k + 1 events; T and T² are those of Hinton et al. 2015 (arXiv
1503.02531). It never exceeds the KL over the whole vocabulary, is that where k is the whole vocabulary, and
leaves the student free to share q_0 among the other tokens as the text teaches it. Renormalising p_1 … p_k to
1 instead would teach that no other token ever comes, and make the student surer than its teacher. The
gradient by logit z is kl_weight * T times q_i - p_i for the k tokens, (q_0 - p_0) * q_z / q_0 for each other.
N tokens, E hidden_size, V vocab_size, K = k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mobilellm.model.training import training_hidden
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.loss import check_ids, linear_loss, loss_kernels


class Mixture(NamedTuple):
    """What the loss is made of."""

    temperature: float
    ce_weight: float
    kl_weight: float
    z_loss: float = 0.0
    """Weight of logsumexp², as in `linear_cross_entropy`."""


def distillation_loss(temperature: float, ce_weight: float, kl_weight: float) -> Callable[..., Tensor]:
    """A loss function for the loop, whose batches bring `teacher_ids` and `teacher_logs`.

    It gives the sum over the batch of weight * loss (nats), and else is as `weighted_loss`.
    """

    def loss(
        model: MobileLLM,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor,
        *,
        teacher_ids: Tensor,
        teacher_logs: Tensor,
        segments: Tensor | None = None,
        z_loss: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> Tensor:
        hidden, head = training_hidden(model, tokens, segments, activation_checkpointing)
        terms = Distillation(
            targets.flatten(),
            weights.flatten().float(),
            teacher_ids.flatten(0, 1),
            teacher_logs.flatten(0, 1),
            Mixture(temperature, ce_weight, kl_weight, z_loss),
        )
        return linear_loss(hidden.flatten(0, 1), head, terms)

    return loss


class Distillation:
    """A `LossOfLogits`. targets and weights (N,); of the teacher ids (N, K), any whole numbers, and logs
    (N, K + 1), logarithms of probabilities at the temperature, that of all others last; they are scaled to
    sum to 1, which those stored in half precision do not quite."""

    def __init__(self, targets: Tensor, weights: Tensor, ids: Tensor, logs: Tensor, mixture: Mixture) -> None:
        self._targets, self._weights, self._ids, self._logs = targets, weights, ids, logs
        self._mixture = mixture

    def value(self, logits: Tensor, part: slice) -> Tensor:
        ids, shares, certainty = self._teacher(part, logits)
        return _Student(logits, ids, self._mixture).loss(
            self._targets[part], self._weights[part], shares, certainty
        )

    def gradient(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        ids, shares, certainty = self._teacher(part, logits)
        targets, weights, mixture = self._targets[part], self._weights[part], self._mixture
        kernels = loss_kernels(logits.device, logits.dtype)
        if kernels is None:
            student = _Student(logits, ids, mixture)
            loss = student.loss(targets, weights, shares, certainty)
            return loss, student.gradient(targets, weights, shares).to(logits.dtype)
        check_ids("targets", targets, logits.shape[1])
        check_ids("the teacher's ids", ids, logits.shape[1])
        losses = weights.new_empty(len(logits))
        T = mixture.temperature
        kernels(
            "distillation",
            logits,
            targets.contiguous(),
            weights.contiguous(),
            ids.contiguous(),
            shares.contiguous(),
            certainty,
            mixture.ce_weight,
            mixture.kl_weight * T * T,
            1 / T,
            mixture.z_loss,
            losses,
            *logits.shape,
            ids.shape[1],
        )
        return losses.sum(), logits

    def _teacher(self, part: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (rows, K), probabilities (rows, K + 1), and the sum of p log p (rows,)."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        shares = self._logs[part].to(dtype).softmax(-1)
        return self._ids[part].long(), shares, -torch.special.entr(shares).sum(-1)


class _Student:
    """What a chunk of logits (rows, V) says of the text and of the teacher's tokens; plain torch."""

    def __init__(self, logits: Tensor, ids: Tensor, mixture: Mixture) -> None:
        self._ids, self._mixture = ids, mixture
        self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._total = self._logits.logsumexp(-1)
        self._soft = self._logits / mixture.temperature if mixture.temperature != 1 else self._logits
        named = self._soft.gather(-1, ids)
        # By itself: as a difference of sums it would have no digits left where it is small.
        self._others = self._soft.scatter(-1, ids, -torch.inf).logsumexp(-1)
        total = torch.logaddexp(named.logsumexp(-1), self._others)
        self._log_named = named - total[:, None]
        self._log_others = self._others - total

    def loss(self, targets: Tensor, weights: Tensor, shares: Tensor, certainty: Tensor) -> Tensor:
        mixture, others = self._mixture, shares[:, -1]
        agreed = (shares[:, :-1] * self._log_named).sum(-1)
        agreed = agreed + torch.where(others > 0, others * self._log_others, 0)
        nll = self._total - self._logits.gather(-1, targets[:, None])[:, 0]
        each = mixture.ce_weight * nll + mixture.z_loss * self._total.square()
        each = each + mixture.kl_weight * mixture.temperature**2 * (certainty - agreed)
        return torch.dot(weights.to(each.dtype), each)

    def gradient(self, targets: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
        mixture, ids = self._mixture, self._ids
        weights = weights.to(shares.dtype)[:, None]
        hard = mixture.ce_weight + 2 * mixture.z_loss * self._total[:, None]
        soft = mixture.kl_weight * mixture.temperature
        known = (self._logits.gather(-1, ids) - self._total[:, None]).exp_() * hard
        known += soft * (self._log_named.exp() - shares[:, :-1])
        missing = (
            soft * (self._log_others.exp() - shares[:, -1])[:, None]
        )  # of which each other token has a part
        if mixture.temperature == 1:
            missing = missing + hard * self._log_others.exp()[:, None]
        gradient = (self._soft - self._others[:, None]).exp_().mul_(missing)
        if mixture.temperature != 1:
            gradient.add_((self._logits - self._total[:, None]).exp_().mul_(hard))
        gradient.scatter_(-1, ids, known)
        gradient.scatter_add_(-1, targets[:, None], torch.full_like(weights, -mixture.ce_weight))
        return gradient.mul_(weights)
