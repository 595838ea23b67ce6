"""Which tokens to mask, and with what weight: the forward process of masked diffusion.

Corruption is drawn for a whole global batch at once from one generator, on the CPU, and sliced
afterwards: the masks are then functions of the generator's seed and of a row's index in the global
batch, whatever the micro-batches, the number of processes or the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockdiffusion.schedules import Schedule

T_MIN = 1e-3  # where the authors cut t (their sampling_eps_min)


@dataclass(frozen=True)
class Corrupted:
    """`noisy_BNL`: N noisy copies of every row. `weight_BNL`: loss weight, 0 where not masked.

    sum(weight * nll) over a row, divided by N, estimates the row's NELBO in nats.
    """

    noisy_BNL: torch.Tensor
    weight_BNL: torch.Tensor

    def rows(self, start: int, stop: int) -> Corrupted:
        """The rows [start, stop) of the batch."""
        return Corrupted(self.noisy_BNL[start:stop], self.weight_BNL[start:stop])


def stratified_uniform(
    shape: tuple[int, ...], generator: torch.Generator, stratified: bool = True
) -> torch.Tensor:
    """float64 uniforms on (0, 1]; stratified: one in each of n equal strata, in random order.

    The order is a uniformly random permutation, so that every single entry is itself uniform. (The
    authors' strata are not permuted: at batch 1 their first block always sees little noise.)
    """
    count = int(torch.tensor(shape).prod())
    within = 1 - torch.rand(count, generator=generator, dtype=torch.float64)
    if stratified:
        within = (torch.randperm(count, generator=generator) + within) / count
    return within.view(shape)


def bernoulli(
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    block_size: int,
    mask_id: int,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    num_noisy: int = 1,
    t_min: float = T_MIN,
    stratified: bool = True,
) -> Corrupted:
    """The paper's corruption: one t per block, every free token masked with probability p(t).

    Args:
        clean_BL: token ids (B, L); L is a multiple of `block_size`.
        free_BL: bool (B, L), the tokens that may be masked and are scored. Given tokens (BOS, a
            prompt) and padding are not free.
        t_min: t is uniform on [max(low, t_min), high] of the schedule's `t_range`. With the linear
            schedule an uncut 1/t has infinite variance; the authors cut at 1e-3.
        stratified: spread the times of all blocks of the batch evenly (lower variance of the batch
            mean, the same marginal for every block).

    Returns:
        `Corrupted`, on the device of `clean_BL`; weights are float32.
    """
    batch, length = clean_BL.shape
    blocks = length // block_size
    uniform = stratified_uniform((batch, num_noisy, blocks), generator, stratified)
    low, high = schedule.t_range
    low = min(max(low, t_min), high)
    t_BNK = low + (high - low) * uniform
    prob_BNL = schedule.mask_prob(t_BNK).repeat_interleave(block_size, dim=-1)
    weight_BNL = schedule.loss_weight(t_BNK).repeat_interleave(block_size, dim=-1)
    coin_BNL = torch.rand(prob_BNL.shape, generator=generator, dtype=torch.float64)

    device = clean_BL.device
    masked_BNL = (coin_BNL < prob_BNL).to(device) & free_BL[:, None]
    noisy_BNL = clean_BL[:, None].masked_fill(masked_BNL, mask_id)
    weight_BNL = torch.where(masked_BNL, weight_BNL.float().to(device), 0.0)
    return Corrupted(noisy_BNL, weight_BNL)
