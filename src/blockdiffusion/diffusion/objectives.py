"""What the objectives of diffusion differ in: one small object for each, chosen once.

A `Diffusion` says how the tokens of a block are corrupted, what a corrupted block then costs, and
which estimators its bound has. Training, likelihood and the measurement of variance ask it, and
know nothing else of objectives. (How a block is sampled is in `sampling.processes`.)

* `MaskedDiffusion`: block diffusion as in the paper, and MDLM, its case of one block,
* `ScoreEntropy`: SEDD with absorbing noise (Lou et al. 2024), per block,
* `DiscreteTime`: D3PM (Austin et al. 2021), absorbing or uniform, per block.

Every block has its own time, and a later block reads earlier ones clean: log p(x) is the sum over
blocks of log p(x^b | x^<b), and each term has the bound of the diffusion inside the block.

Shape suffixes: B rows, N noisy copies, L tokens, K blocks, M scored positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, masked_loss, masked_nll, scored_terms
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
from blockdiffusion.diffusion.losses import prior_kl, score_entropy, uniform_kl
from blockdiffusion.diffusion.schedules import Scaled, Schedule, make_schedule, noise_level
from blockdiffusion.errors import UserError


class Diffusion(Protocol):
    """What a network's objective decides; made for the configuration of one network."""

    @property
    def title(self) -> str:
        """What it is, in words."""
        ...

    @property
    def usual_estimator(self) -> str:
        """The name of the unbiased estimator that draws, of least noise: what "auto" stands for
        where enumeration is not possible, or costs more."""
        ...

    @property
    def enumerable(self) -> bool:
        """Whether the bound is a finite sum over mask sets: masks, and a network without time."""
        ...

    @property
    def prior_nats(self) -> float:
        """What every free token adds to the bound besides, whatever the network says."""
        ...

    def estimator(self, spec: str, t_min: float = T_MIN) -> tuple[Estimator, str | None]:
        """The estimator called `spec`, for this network; and a note where it is another one.

        Raises:
            UserError: there is no such estimator, or not for this network.
        """
        ...

    def fitted(self, law: Estimator) -> Estimator:
        """An estimator of masks made into one for this network, which may need times, too.

        Raises:
            UserError: it cannot be.
        """
        ...

    def terms(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The terms (B, N, L) of the bound, in nats: sum(weight * term) over a row, divided by N,
        plus `prior_nats` for each free token, is an estimate of the row's bound."""
        ...

    def loss(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum of weight * term over everything, for training: a scalar in nats."""
        ...


def diffusion_of(config: Any) -> Diffusion:
    """What the objective in a network's configuration means.

    Raises:
        UserError: the network is autoregressive and has none.
    """
    if config.objective not in _KINDS:
        raise UserError(
            f"a network whose objective is {config.objective} draws no noise; use a network that "
            f"denoises blocks ({', '.join(_KINDS)})"
        )
    return _KINDS[config.objective](config)


class _SummedTerms:
    """The loss of a diffusion is the sum of its terms."""

    def loss(
        self: Diffusion,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Diffusion`."""
        return (drawn.weight_BNL * self.terms(model, drawn, clean_BL, valid_BL)).sum()


# --- masks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedDiffusion:
    """Absorbing masks in continuous time, cross-entropy of the masked tokens (SUBS).

    A network that reads no time has its bound for every schedule alike. One that does (MDLM with
    time conditioning) reads sigma = -log(1 - p(t)).
    """

    config: Any

    @property
    def title(self) -> str:
        """See `Diffusion`."""
        return "masked diffusion"

    @property
    def usual_estimator(self) -> str:
        """See `Diffusion`."""
        return "complement"

    @property
    def enumerable(self) -> bool:
        """See `Diffusion`."""
        return not self.config.time_conditioning

    @property
    def prior_nats(self) -> float:
        """See `Diffusion`; everything is masked in the end."""
        return 0.0

    def estimator(self, spec: str, t_min: float = T_MIN) -> tuple[Estimator, str | None]:
        """See `Diffusion`."""
        law, note = for_block_size(make_estimator(spec, t_min=t_min), self.config.block_size)
        return self.fitted(law), note

    def fitted(self, law: Estimator) -> Estimator:
        """See `Diffusion`."""
        return _timed(law) if self.config.time_conditioning else law

    def terms(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Diffusion`: -log p(x_l) at masked positions."""
        sigma_BNK = _sigma(model, drawn) if self.config.time_conditioning else None
        return masked_nll(model, drawn.noisy_BNL, clean_BL, drawn.scored_BNL, valid_BL, sigma_BNK)

    def loss(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Diffusion`; the logits of all masked positions never exist at once."""
        return _loss_of_masks(model, drawn, clean_BL, valid_BL)


@dataclass(frozen=True)
class ScoreEntropy(_SummedTerms, MaskedDiffusion):
    """SEDD: the same noise, and a network that estimates its ratios by score entropy.

    Its bound (Lou et al. 2024, theorem 3.6) integrates dsigma/dt times the score entropy; see
    `losses.score_entropy` for the weight, which is that of masked diffusion.
    """

    @property
    def title(self) -> str:
        """See `Diffusion`."""
        return "masked diffusion trained by score entropy (SEDD)"

    @property
    def usual_estimator(self) -> str:
        """See `Diffusion`."""
        return "bernoulli" if self.config.noise_eps else "complement"

    @property
    def enumerable(self) -> bool:
        """See `Diffusion`."""
        return False

    @property
    def prior_nats(self) -> float:
        """See `Diffusion`; 0 unless the noise ends before everything is masked."""
        return prior_kl(self.config.noise_eps, self.config.vocab_size - 1, absorbing=True)

    def fitted(self, law: Estimator) -> Estimator:
        """See `Diffusion`."""
        eps = self.config.noise_eps
        if not eps:
            return _timed(law)
        if not isinstance(law, Bernoulli):
            raise UserError(
                f"{law.name} needs noise that ends with everything masked, but this network's "
                f"noise_eps is {eps:g}; take bernoulli"
            )
        return replace(law, schedule=Scaled(law.schedule, eps))

    def terms(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Diffusion`: score entropy over r at masked positions."""
        mask_id = self.config.mask_id
        scored_BNL = drawn.scored_BNL
        target_M = clean_BL[:, None].expand_as(scored_BNL)[scored_BNL]
        return scored_terms(
            model,
            drawn.noisy_BNL,
            clean_BL,
            scored_BNL,
            lambda logits_RV, part: score_entropy(logits_RV, target_M[part], mask_id),
            valid_BL,
            _sigma(model, drawn),
        )


# --- discrete time -----------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscreteTime(_SummedTerms):
    """D3PM: T steps of noise, and a network that predicts x_0, reading sigma_t = -log(1 - p_t).

    Q_t keeps a token with probability (1 - p_t) / (1 - p_{t-1}) and otherwise makes it the mask
    (absorbing) or a uniform token (uniform); p_t is `noise_schedule` at t / T. The bound (Austin et
    al. 2021, equation 1) is the sum over t = 1..T of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),
    where the term of t = 1 is the reconstruction, and the prior's KL, which is 0 when p_T = 1.

    The reverse step is equation 4 at every t: p(x_{t-1} | x_t) in proportion to the sum over x_0 of
    q(x_{t-1}, x_t | x_0) p(x_0 | x_t). (The authors of D3PM take p(x_0 | x_1) itself at t = 1; for
    absorbing noise that is the same.) The mask has no probability as data.
    """

    config: Any

    usual_estimator = "timesteps"
    enumerable = False

    @property
    def title(self) -> str:
        """See `Diffusion`."""
        return f"{self.config.transition} diffusion in {self.config.timesteps:,} steps (D3PM)"

    @property
    def prior_nats(self) -> float:
        """See `Diffusion`."""
        keep = 1 - float(self.schedule.mask_prob(torch.ones((), dtype=torch.float64)))
        return prior_kl(max(0.0, keep), self.config.vocab_size - 1, absorbing=not self._uniform)

    @property
    def schedule(self) -> Schedule:
        """p_t at t / T."""
        base = make_schedule(self.config.noise_schedule)
        return Scaled(base, self.config.noise_eps) if self.config.noise_eps else base

    @property
    def _uniform(self) -> bool:
        return self.config.transition == "uniform"

    def estimator(self, spec: str, t_min: float = T_MIN) -> tuple[Estimator, str | None]:
        """See `Diffusion`; there is one, `Timesteps`, which has no cut."""
        if spec != self.usual_estimator:
            raise UserError(
                f"estimator is {spec}, but a d3pm network has discrete time; use "
                f"{self.usual_estimator} or auto"
            )
        return self.fitted(Bernoulli()), None

    def fitted(self, law: Estimator) -> Estimator:
        """See `Diffusion`; takes over the number of copies and the stratification."""
        if not isinstance(law, Bernoulli) or law.resample or not law.is_bound:
            raise UserError(
                f"{law.name} draws masks in continuous time, but a d3pm network has discrete time; "
                "leave the estimator and the clip out"
            )
        return Timesteps(
            timesteps=self.config.timesteps,
            transition=self.config.transition,
            vocab_size=self.config.vocab_size,
            schedule=self.schedule,
            num_noisy=law.num_noisy,
            stratify=law.stratify,
        )

    def terms(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Diffusion` and `Timesteps`."""
        sigma_BNK = _sigma(model, drawn) if self.config.time_conditioning else None
        if not self._uniform:
            return masked_nll(
                model, drawn.noisy_BNL, clean_BL, drawn.scored_BNL, valid_BL, sigma_BNK
            )
        scored_BNL = drawn.scored_BNL
        target_M = clean_BL[:, None].expand_as(scored_BNL)[scored_BNL]
        noisy_M = drawn.noisy_BNL[scored_BNL]
        keep_M, before_M = (
            1 - _per_token(prob_BNK, clean_BL)[scored_BNL.cpu()]
            for prob_BNK in (drawn.prob_BNK, drawn.before_BNK)
        )

        def term(logits_RV: torch.Tensor, part: slice) -> torch.Tensor:
            target_R, noisy_R = target_M[part], noisy_M[part]
            keep_R, before_R = keep_M[part], before_M[part]
            return uniform_kl(logits_RV, target_R, noisy_R, keep_R, before_R, self.config.mask_id)

        return scored_terms(model, drawn.noisy_BNL, clean_BL, scored_BNL, term, valid_BL, sigma_BNK)

    def loss(
        self,
        model: Denoiser,
        drawn: Corrupted,
        clean_BL: torch.Tensor,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Diffusion`; of absorbing noise it is that of masked diffusion."""
        if self._uniform:
            return super().loss(model, drawn, clean_BL, valid_BL)
        return _loss_of_masks(model, drawn, clean_BL, valid_BL)


def _loss_of_masks(
    model: Denoiser, drawn: Corrupted, clean_BL: torch.Tensor, valid_BL: torch.Tensor | None
) -> torch.Tensor:
    """Weighted cross-entropy of the masked tokens."""
    sigma_BNK = _sigma(model, drawn) if model.config.time_conditioning else None
    return masked_loss(
        model,
        drawn.noisy_BNL,
        clean_BL,
        drawn.scored_BNL,
        drawn.weight_BNL,
        valid_BL,
        sigma_BNK,
    )


def _timed(law: Estimator) -> Estimator:
    """A law of masks that tells the mask probabilities, too."""
    if isinstance(law, Bernoulli):
        return law
    assert isinstance(law, Count | Complement)
    if not law.is_bound:
        raise UserError(
            f"{law.name} draws the number of masked tokens before t, which this network reads; "
            "with a clip take bernoulli"
        )
    return replace(law, timed=True)


def _sigma(model: Denoiser, drawn: Corrupted) -> torch.Tensor:
    """What the network reads as the time of every block, (B, N, K)."""
    assert drawn.prob_BNK is not None, "the estimator was not fitted to the network"
    return noise_level(drawn.prob_BNK).float().to(model.device)


def _per_token(prob_BNK: torch.Tensor | None, clean_BL: torch.Tensor) -> torch.Tensor:
    assert prob_BNK is not None
    return prob_BNK.repeat_interleave(clean_BL.shape[1] // prob_BNK.shape[-1], dim=-1)


_KINDS = {
    "block_diffusion": MaskedDiffusion,
    "score_entropy": ScoreEntropy,
    "d3pm": DiscreteTime,
}
