"""Keys and values already computed, so that generation does not compute them again."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

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

    def make_room(self, positions: int) -> None:
        """Let the buffers hold so many positions more."""
        self.key_BGSK = F.pad(self.key_BGSK, (0, 0, 0, positions))
        self.value_BGSK = F.pad(self.value_BGSK, (0, 0, 0, positions))

    def reorder(self, row_B: Tensor) -> None:
        """Row b becomes what row row_B[b] was: a beam goes on from another one's past."""
        self.key_BGSK[:, :, : self.length] = self.key_BGSK[row_B, :, : self.length]
        self.value_BGSK[:, :, : self.length] = self.value_BGSK[row_B, :, : self.length]


class CrossCache:
    """One layer's keys and values of the encoder's output, computed when they are first asked for."""

    def __init__(self):
        self.keys_and_values: tuple[Tensor, Tensor] | None = None

    def get(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]], memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys_and_values is None:
            self.keys_and_values = compute(memory_BSD)
        return self.keys_and_values


class Cache:
    """For each layer that generates a `LayerCache`, and a `CrossCache` where it looks at an encoder.

    2 · L · G · K numbers a position and row. Beams of one text must stay together: `reorder` leaves the cross caches.
    capacity: positions of text; a prompt or prefix that stands before it takes its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sizes = config.second_stack
        shape = (batch_size, sizes.kv_heads, capacity, sizes.head_width)
        self.layers = [LayerCache(shape, dtype, device) for _ in config.decoder_layers]
        self.cross = [CrossCache() for _ in config.decoder_layers]
        self.before = 0  # of the positions held, those of a prompt or prefix (`model.before`)

    @property
    def length(self) -> int:
        """How many positions are held, with those before the text."""
        return self.layers[0].length

    def make_room(self, before: int) -> None:
        """For what stands before the text; asked of an empty cache."""
        self.before = before
        if before:
            for layer in self.layers:
                layer.make_room(before)

    def reorder(self, row_B: Tensor) -> None:
        for layer in self.layers:
            layer.reorder(row_B)
