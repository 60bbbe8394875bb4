"""Keys and values already computed, so that generation does not compute them again."""

import torch
from torch import Tensor

from model.config import ConfigError, ModelConfig


class LayerCache:
    """One layer's keys and values in buffers of fixed size; `update` writes the new ones and returns all so far."""

    def __init__(self, shape_BGSK: tuple[int, ...], dtype: torch.dtype, device: torch.device | str):
        self.key_BGSK = torch.zeros(shape_BGSK, dtype=dtype, device=device)
        self.value_BGSK = torch.zeros(shape_BGSK, dtype=dtype, device=device)
        self.length = 0

    def update(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.length, self.length + k_BGTK.size(2)
        if end > self.key_BGSK.size(2):
            raise ConfigError(f"the cache holds {self.key_BGSK.size(2)} positions, {end} were asked of it")
        self.key_BGSK[:, :, start:end] = k_BGTK
        self.value_BGSK[:, :, start:end] = v_BGTK
        self.length = end
        return self.key_BGSK[:, :, :end], self.value_BGSK[:, :, :end]


class Cache:
    """One `LayerCache` a layer. 2 · L · G · K numbers a position."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (batch_size, config.kv_heads, capacity, config.head_width)
        self.layers = [LayerCache(shape, dtype, device) for _ in config.layers]

    @property
    def length(self) -> int:
        """How many positions are held."""
        return self.layers[0].length
