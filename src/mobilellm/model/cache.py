"""Key/value cache: one slot per *executed* step, so that a block run twice keeps two histories."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilellm.config import ModelConfig


class KVCache:
    """Keys and values of `capacity` tokens for a batch; made by `MobileLLM.new_cache`.

    The model appends in every step and advances the length once per forward call. `padding` (B,) counts
    the left-padding tokens of each row: they are masked, and positions start after them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        padding: Tensor | None = None,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"a cache for {batch} rows of {capacity} tokens holds nothing; both must be at least 1"
            )
        if padding is not None and padding.shape != (batch,):
            raise ValueError(
                f"padding has shape {tuple(padding.shape)}; it is one count for each of {batch} rows"
            )
        shape = (config.num_steps, batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.padding = padding
        self.length = 0

    def reserve(self, batch: int, count: int) -> None:
        """Refuse another batch and an overflow before anything is written. Raises ValueError."""
        if batch != self.keys.shape[1]:
            raise ValueError(f"cache was made for {self.keys.shape[1]} rows and cannot take {batch}")
        if self.length + count > self.capacity:
            raise ValueError(
                f"cache holds {self.length} of {self.capacity} tokens and cannot take {count} more; "
                "make it longer or shorten the text"
            )

    def view(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Positions (T,) or (B, T) of the next `count` tokens and the mask of what they see."""
        columns = torch.arange(self.length, self.length + count, device=self.keys.device)  # (T,)
        if self.padding is not None:
            return _left_padding_view(self.padding, columns)
        if count == 1 or self.length == 0:
            return columns, None
        return columns, torch.arange(self.length + count, device=columns.device) <= columns[:, None]  # (T, S)

    def append(self, step: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) of one executed step; return all keys and values so far, (B, K, S, D)."""
        start, end = self.length, self.length + keys.shape[2]
        self.keys[step, :, :, start:end] = keys
        self.values[step, :, :, start:end] = values
        return self.keys[step, :, :, :end], self.values[step, :, :, :end]

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget everything after `length` tokens (a rejected draft, a shared prompt prefix)."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length


def _left_padding_view(padding: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (B, T) and mask (B, 1, T, S) for rows that begin with padding[b] tokens of padding.

    Padding tokens may look at themselves: a row with nothing to look at would be NaN and spread.
    """
    keys = torch.arange(int(columns[-1]) + 1, device=columns.device)
    positions = (columns - padding[:, None]).clamp(min=0)
    visible = (keys >= padding[:, None])[:, None, :] & (keys <= columns[:, None])
    mask = visible | (keys == columns[:, None])
    return positions, mask[:, None]
