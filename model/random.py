"""Gumbel noise from a counter-based hash: a draw depends on (seed, position, token) and on nothing else.

No generator holds state, so the same seed and position give the same noise in any batch, on any device, and again
when a sequence is recomputed. All of it is integer arithmetic modulo 2**32 (torch's int32 wraps), up to the last
step from 31 random bits to a Gumbel variate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_MASK64 = 2**64 - 1
_SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0x7FEB352D  # both from lowbias32 (Wellons, "Prospecting for Hash Functions")
_MULTIPLIER_2 = 0x846CA68B - 2**32  # as int32


def _splitmix64(value: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    value = (value + _SPLITMIX_INCREMENT) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _token_hashes(vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """lowbias32 of every token id. A bijection: no two tokens ever share their noise."""
    x = np.arange(vocab_size, dtype=np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_MULTIPLIER_1)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_MULTIPLIER_2 % 2**32)
    return (x ^ (x >> np.uint32(16))).view(np.int32)


class GumbelNoise:
    """Standard Gumbel variates, addressed by row key and token id."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._token_hashes = torch.from_numpy(_token_hashes(vocab_size)).to(device)  # int32 [vocab]

    def row_keys(self, seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """int32 [n, 2]: 64 bits for each pair of a 64-bit seed and the position of the token to draw."""
        pairs = zip(seeds, positions, strict=True)
        keys = [_splitmix64(_splitmix64(seed & _MASK64) ^ position) for seed, position in pairs]
        halves = np.array(keys, dtype=np.uint64).view(np.int32).reshape(-1, 2)
        return torch.from_numpy(halves).to(self._device)

    def all_tokens(self, keys: torch.Tensor) -> torch.Tensor:
        """keys int32 [n, 2] → fp32 [n, vocab]."""
        return _gumbel(keys, self._token_hashes[None])

    def for_tokens(self, keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """keys int32 [n, 2], token_ids int64 [n, m] → fp32 [n, m], the same values that `all_tokens` holds there."""
        return _gumbel(keys, self._token_hashes[token_ids])


def _gumbel(keys: torch.Tensor, hashes: torch.Tensor) -> torch.Tensor:
    """keys int32 [n, 2], hashes int32 [n or 1, m] → fp32 [n, m]. Two keyed rounds of multiply and shift."""
    x = hashes ^ keys[:, :1]  # int32 [n, m]
    x.mul_(_MULTIPLIER_1)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))  # the mask turns the arithmetic shift into a logical one
    x.bitwise_xor_(keys[:, 1:])
    x.mul_(_MULTIPLIER_2)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    return _to_gumbel(x.bitwise_and_(0x7FFFFFFF))


def _to_gumbel(bits: torch.Tensor) -> torch.Tensor:
    """31 random bits in int32 → −log(−log(1 − u)) with u = (bits + 1/2) / 2**31, in fp32 and finite.

    Floats are finest near 0, and small u makes the large variates. The largest bits round up to 2**31 as a float; the
    last factor keeps u below 1 even there.
    """
    return bits.float().add_(0.5).mul_(-(2.0**-31) * (1 - 2.0**-24)).log1p_().neg_().log_().neg_()
