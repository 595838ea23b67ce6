"""Networks whose output at a token predicts the next one, while each token is read at its own
position (`reading` "shifted", as in Fast-dLLM v2).

The output at token i - 1 predicts token i. Inside a block token i - 1 is noisy, as its block is;
before a block's first token it is clean, the last of the block before. Nothing precedes a text's
first token: the output at its own mask predicts it.

Shape suffixes: B batch, L tokens of a sequence, T tokens of all streams, P tokens of all rows of a
pass, one row after another, M wanted ones among them, D width.
"""

from __future__ import annotations

import torch

from blockdiffusion.models.cache import BlockCache


def predicting_columns(
    first_BL: torch.Tensor, block_size: int, num_noisy: int, has_clean: bool
) -> torch.Tensor:
    """Return which token of the streams [noisy_1; ...; noisy_N; clean] predicts each of them, as
    columns (B, T).

    Args:
        first_BL: bool, the first token of every text in a row.
    """
    length = first_BL.shape[1]
    token_L = torch.arange(length, device=first_BL.device)
    before_BL = token_L - 1 + first_BL.long()
    stream_N1 = torch.arange(num_noisy + has_clean, device=first_BL.device)[:, None]
    columns = before_BL[:, None] + length * stream_N1
    if has_clean:
        from_clean_BL = (token_L % block_size == 0) & ~first_BL
        clean_BL = before_BL + length * num_noisy
        columns = torch.where(from_clean_BL[:, None], clean_BL[:, None], columns)
    return columns.flatten(1)


class ShiftedPass:
    """A pass over the tokens that follow each row's cached ones.

    The token that predicts the first of them was in an earlier pass. So the cache keeps the hidden
    state of each row's last committed token, and gets new ones from the pass.

    Args:
        tokens_B: the number of tokens of each row; int64 on the CPU, as `clean_B`.
        clean_B: how many of these, from the first, are clean.
        wanted_M: the tokens to predict; None = all P.

    Attributes:
        places: the tokens whose hidden states the pass has to return; None = all P.
    """

    def __init__(
        self,
        cache: BlockCache,
        tokens_B: torch.Tensor,
        clean_B: torch.Tensor,
        wanted_M: torch.Tensor | None,
        device: torch.device,
    ):
        self._cache = cache
        firsts_B = tokens_B.cumsum(0) - tokens_B
        before_P = torch.arange(int(tokens_B.sum())) - 1
        before_P[firsts_B[tokens_B > 0]] += 1
        # The row whose kept state predicts a token; -1: a token of the pass does.
        kept_P = torch.full_like(before_P, -1)
        follows_B = (tokens_B > 0) & (cache.lengths_B > 0)
        kept_P[firsts_B[follows_B]] = follows_B.nonzero().flatten()
        self._before_M, self._kept_M = before_P.to(device), kept_P.to(device)
        self.places: torch.Tensor | None = None
        if wanted_M is None:
            self._firsts_B, self._counts_B = firsts_B, None
            return
        self._before_M, self._kept_M = self._before_M[wanted_M], self._kept_M[wanted_M]
        # The last clean token of each row is wanted, too: for the cache, which commits it.
        has_clean_B = clean_B > 0
        ends = (firsts_B + clean_B - 1)[has_clean_B]
        self.places = torch.cat([self._before_M, ends.to(device)])
        self._firsts_B, self._counts_B = has_clean_B.cumsum(0) - clean_B, clean_B

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the states (M, D) that predict the wanted tokens, from those at `places`. If all
        are wanted, they have the shape of `hidden`."""
        if self.places is None:
            seen = hidden.flatten(0, -2)
            found_MD = seen[self._before_M]
        else:
            found_MD, seen = hidden.split([len(self._kept_M), len(hidden) - len(self._kept_M)])
        last_BD = self._cache.kept_of(seen)
        kept_M1 = self._kept_M[:, None]
        found_MD = torch.where(kept_M1 < 0, found_MD, last_BD[self._kept_M.clamp(min=0)])
        self._cache.passed(seen, self._firsts_B, self._counts_B)
        return found_MD.view_as(hidden) if self.places is None else found_MD
