"""The objectives of diffusion: one small object for each.

A `Diffusion` decides how the tokens of a block are corrupted, what a corrupted block costs, and
which estimators its bound has. Training, likelihood and the measurement of variance ask it and
know nothing else of objectives. (`sampling.choosing` decides how a block is sampled.)

* `MaskedDiffusion`: block diffusion as in the paper, and MDLM, its special case of one block,
* `ScoreEntropy`: SEDD with absorbing noise (Lou et al. 2024), per block,
* `DiscreteTime`: D3PM (Austin et al. 2021), absorbing or uniform, per block.

Every block has its own time, and later blocks read earlier ones clean: log p(x) is the sum over
blocks of log p(x^b | x^<b), and the diffusion inside the block bounds each term.

Shape suffixes: B rows, N noisy copies, L tokens, K blocks, M scored positions, R some of these, V
vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, masked_loss, scored_terms
from blockdiffusion.diffusion.estimators import (
    T_MIN,
    Bernoulli,
    Complement,
    Corrupted,
    Count,
    Estimator,
    Timesteps,
    for_block_size,
    make_estimator,
)
from blockdiffusion.diffusion.losses import prior_kl, score_entropy, subs_nll, uniform_kl
from blockdiffusion.diffusion.schedules import Scaled, make_schedule, noise_level
from blockdiffusion.errors import UserError

# Logits (R, V) of some scored positions, and which these are -> their terms (R,) in nats.
Term = Callable[[torch.Tensor, slice], torch.Tensor]


class Diffusion(ABC):
    """The objective of a network with a given configuration.

    Attributes:
        title: its name in words.
        usual_estimator: name of the unbiased estimator with the least noise. "auto" stands for it
            if enumeration is impossible or costs more.
        enumerable: whether the bound is a finite sum over mask sets, which needs masks and a
            network that reads no time.
        prior_nats: what every free token adds to the bound, whatever the network predicts.
        is_cross_entropy: whether the terms are the cross-entropy of masked tokens, whose loss
            needs few logits at a time (`losses.weighted_subs_nll`).
        sampled: the positions whose logits a sampling pass needs: those that it draws, all that are
            still masked, or all.
    """

    title: str
    usual_estimator = "complement"
    enumerable = False
    prior_nats = 0.0
    is_cross_entropy = True
    sampled: Literal["drawn", "masked", "all"] = "drawn"

    def __init__(self, config: Any):
        self.config = config

    def estimator(self, spec: str, t_min: float = T_MIN) -> tuple[Estimator, str | None]:
        """Return the estimator called `spec` for this network, and a note if it is another one.

        Raises:
            UserError: the estimator is unknown, or not one for this network.
        """
        masks, note = for_block_size(make_estimator(spec, t_min=t_min), self.config.block_size)
        return self.fitted(masks), note

    @abstractmethod
    def fitted(self, masks: Estimator) -> Estimator:
        """Return an estimator of masks as one for this network, which may need times too.

        Raises:
            UserError: this network cannot use it.
        """

    def terms(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the terms (B, N, L) of the bound in nats: sum(weight * term) over a row, divided
        by N, plus `prior_nats` for each free token, estimates the row's bound."""
        scored_BNL = drawn.scored_BNL
        target_M = clean_BL[:, None].expand_as(scored_BNL)[scored_BNL]
        term, sigma_BNK = self._term(drawn, target_M), self._sigma(model, drawn)
        return scored_terms(model, drawn.noisy_BNL, clean_BL, scored_BNL, term, valid_BL, sigma_BNK)

    def _term(self, drawn: Corrupted, target_M: torch.Tensor) -> Term:
        """The term of scored positions, whose tokens are `target_M`: -log p of these."""
        return lambda logits_RV, part: subs_nll(logits_RV, target_M[part], self.config.mask_id)

    def loss(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sum of weight * term over everything, for training: a scalar in nats."""
        if not self.is_cross_entropy:
            return (drawn.weight_BNL * self.terms(model, drawn, clean_BL, valid_BL)).sum()
        return masked_loss(
            model,
            drawn.noisy_BNL,
            clean_BL,
            drawn.scored_BNL,
            drawn.weight_BNL,
            valid_BL,
            self._sigma(model, drawn),
        )

    def _sigma(self, model: Denoiser, drawn: Corrupted) -> torch.Tensor | None:
        """The time of every block (B, N, K) as the network reads it, if it does."""
        if not self.config.time_conditioning:
            return None
        assert drawn.prob_BNK is not None, "the estimator was not fitted to the network"
        return noise_level(drawn.prob_BNK).float().to(model.device)


def diffusion_of(config: Any) -> Diffusion:
    """Return what the objective in a network's configuration means.

    Raises:
        UserError: the network is autoregressive.
    """
    if config.objective not in _KINDS:
        raise UserError(
            f"a network whose objective is {config.objective} draws no noise; use a network that "
            f"denoises blocks ({', '.join(_KINDS)})"
        )
    return _KINDS[config.objective](config)


class MaskedDiffusion(Diffusion):
    """Absorbing masks in continuous time, with the cross-entropy of the masked tokens (SUBS).

    The bound of a network that reads no time is the same for every schedule. A network that reads
    it (MDLM with time conditioning) gets sigma = -log(1 - p(t)).
    """

    title = "masked diffusion"

    def __init__(self, config: Any):
        super().__init__(config)
        self.enumerable = not config.time_conditioning

    def fitted(self, masks: Estimator) -> Estimator:
        return _timed(masks) if self.config.time_conditioning else masks


class ScoreEntropy(Diffusion):
    """SEDD: the noise of `MaskedDiffusion`, and a network that estimates its ratios by score
    entropy.

    Its bound (Lou et al. 2024, theorem 3.6) integrates dsigma/dt times the score entropy. See
    `losses.score_entropy` for the weight, which is that of masked diffusion.
    """

    title = "masked diffusion trained by score entropy (SEDD)"
    is_cross_entropy = False
    sampled = "masked"

    def __init__(self, config: Any):
        super().__init__(config)
        if config.noise_eps:
            self.usual_estimator = "bernoulli"
        # 0 unless the noise ends before everything is masked.
        self.prior_nats = prior_kl(config.noise_eps, config.vocab_size - 1, absorbing=True)

    def fitted(self, masks: Estimator) -> Estimator:
        eps = self.config.noise_eps
        if not eps:
            return _timed(masks)
        if not isinstance(masks, Bernoulli):
            raise UserError(
                f"{masks.name} needs noise that ends with everything masked, but this network's "
                f"noise_eps is {eps:g}; take bernoulli"
            )
        return replace(masks, schedule=Scaled(masks.schedule, eps))

    def _term(self, drawn: Corrupted, target_M: torch.Tensor) -> Term:
        """The score entropy over r."""
        return lambda logits_RV, part: score_entropy(logits_RV, target_M[part], self.config.mask_id)


class DiscreteTime(Diffusion):
    """D3PM: T steps of noise, and a network that predicts x_0, reading sigma_t = -log(1 - p_t).

    Q_t keeps a token with probability (1 - p_t) / (1 - p_{t-1}) and otherwise replaces it by the
    mask (absorbing) or a uniform token (uniform); p_t is `noise_schedule` at t / T. The bound
    (Austin et al. 2021, equation 1) is the sum over t = 1..T of
    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), in which the term of t = 1 is the reconstruction,
    plus the prior's KL, which is 0 if p_T = 1.

    The reverse step is equation 4 at every t: p(x_{t-1} | x_t) is in proportion to the sum over x_0
    of q(x_{t-1}, x_t | x_0) p(x_0 | x_t). (The authors of D3PM take p(x_0 | x_1) itself at t = 1,
    which is the same for absorbing noise.) The mask has no probability as data.
    """

    usual_estimator = "timesteps"

    def __init__(self, config: Any):
        super().__init__(config)
        self.title = f"{config.transition} diffusion in {config.timesteps:,} steps (D3PM)"
        base = make_schedule(config.noise_schedule)
        self.schedule = Scaled(base, config.noise_eps) if config.noise_eps else base
        if config.transition == "uniform":
            self.is_cross_entropy, self.sampled = False, "all"
        keep = 1 - float(self.schedule.mask_prob(torch.ones((), dtype=torch.float64)))
        self.prior_nats = prior_kl(
            max(0.0, keep), config.vocab_size - 1, absorbing=self.is_cross_entropy
        )

    def estimator(self, spec: str, t_min: float = T_MIN) -> tuple[Estimator, str | None]:
        """Return `Timesteps`, the only estimator, which has no cut."""
        if spec != self.usual_estimator:
            raise UserError(
                f"estimator is {spec}, but a d3pm network has discrete time; use "
                f"{self.usual_estimator} or auto"
            )
        return self.fitted(Bernoulli()), None

    def fitted(self, masks: Estimator) -> Estimator:
        """Return `Timesteps` with the copies and the stratification of `masks`."""
        if not isinstance(masks, Bernoulli) or masks.resample or not masks.is_bound:
            raise UserError(
                f"{masks.name} draws masks in continuous time, but a d3pm network has discrete "
                "time; leave the estimator and the clip out"
            )
        return Timesteps(
            timesteps=self.config.timesteps,
            transition=self.config.transition,
            vocab_size=self.config.vocab_size,
            schedule=self.schedule,
            num_noisy=masks.num_noisy,
            stratify=masks.stratify,
        )

    def _term(self, drawn: Corrupted, target_M: torch.Tensor) -> Term:
        """The cross-entropy of masked tokens, or `uniform_kl` of all; see `Timesteps`."""
        if self.is_cross_entropy:
            return super()._term(drawn, target_M)
        scored_BNL, noisy_M = drawn.scored_BNL, drawn.noisy_BNL[drawn.scored_BNL]
        keep_M, before_M = (
            1 - _per_token(prob_BNK, scored_BNL.shape[-1])[scored_BNL.cpu()]
            for prob_BNK in (drawn.prob_BNK, drawn.before_BNK)
        )

        def term(logits_RV: torch.Tensor, part: slice) -> torch.Tensor:
            target_R, noisy_R = target_M[part], noisy_M[part]
            keep_R, before_R = keep_M[part], before_M[part]
            return uniform_kl(logits_RV, target_R, noisy_R, keep_R, before_R, self.config.mask_id)

        return term


def _timed(masks: Estimator) -> Estimator:
    """The estimator `masks`, which returns the mask probabilities too."""
    if isinstance(masks, Bernoulli):
        return masks
    assert isinstance(masks, Count | Complement)
    if not masks.is_bound:
        raise UserError(
            f"{masks.name} draws the number of masked tokens before t, which this network reads; "
            "with a clip take bernoulli"
        )
    return replace(masks, timed=True)


def _per_token(prob_BNK: torch.Tensor | None, length: int) -> torch.Tensor:
    assert prob_BNK is not None
    return prob_BNK.repeat_interleave(length // prob_BNK.shape[-1], dim=-1)


_KINDS = {
    "block_diffusion": MaskedDiffusion,
    "score_entropy": ScoreEntropy,
    "d3pm": DiscreteTime,
}
