"""The key-value cache of generation: keys and values that are computed once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import ConfigError, ModelConfig


class LayerCache:
    """The self-attention keys and values of one layer, in buffers of fixed size."""

    def __init__(self, shape_BGSK: tuple[int, ...], dtype: torch.dtype, device: torch.device | str):
        self.key_BGSK = torch.zeros(shape_BGSK, dtype=dtype, device=device)
        self.value_BGSK = torch.zeros(shape_BGSK, dtype=dtype, device=device)
        self.length = 0

    def update(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the cached ones, and return all of them, B G S K each."""
        start, end = self.length, self.length + k_BGTK.size(2)
        if end > self.key_BGSK.size(2):
            raise ConfigError(f"the cache holds {self.key_BGSK.size(2)} positions, {end} were asked of it")
        self.key_BGSK[:, :, start:end] = k_BGTK
        self.value_BGSK[:, :, start:end] = v_BGTK
        self.length = end
        return self.key_BGSK[:, :, :end], self.value_BGSK[:, :, :end]

    def grow(self, positions: int) -> None:
        """Extend the buffers by this many positions."""
        self.key_BGSK = F.pad(self.key_BGSK, (0, 0, 0, positions))
        self.value_BGSK = F.pad(self.value_BGSK, (0, 0, 0, positions))

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self.length = length

    def reorder(self, row_B: Tensor) -> None:
        """Replace row b by row row_B[b], for a beam that continues another one."""
        self.key_BGSK[:, :, : self.length] = self.key_BGSK[row_B, :, : self.length]
        self.value_BGSK[:, :, : self.length] = self.value_BGSK[row_B, :, : self.length]

    def select(self, row_B: Tensor, moved_M: Tensor, first: int, skip: int) -> None:
        """Make row row_B[b] row b, and forget the `skip` positions behind the `first` ones; moved_M: where row_B[b] is not b.

        Rows that stay in place are not copied: fewer rows are a view of the same buffers.
        """
        self.key_BGSK = self._selected(self.key_BGSK, row_B, moved_M, first, skip)
        self.value_BGSK = self._selected(self.value_BGSK, row_B, moved_M, first, skip)
        self.length -= skip

    def _selected(self, x_BGSK: Tensor, row_B: Tensor, moved_M: Tensor, first: int, skip: int) -> Tensor:
        count, length = len(row_B), self.length
        if count > len(x_BGSK):
            more_BGSK = x_BGSK.new_zeros(count, *x_BGSK.shape[1:])
            more_BGSK[:, :, :length] = x_BGSK[row_B, :, :length]
            x_BGSK = more_BGSK
        elif len(moved_M):
            x_BGSK[moved_M, :, :length] = x_BGSK[row_B[moved_M], :, :length]
        if skip and first:
            x_BGSK[:, :, skip : skip + first] = x_BGSK[:, :, :first].clone()  # the two may overlap
        return x_BGSK[:count, :, skip:]


class CrossCache:
    """The cross-attention keys and values of one layer, computed at the first call."""

    def __init__(self):
        self.keys_and_values: tuple[Tensor, Tensor] | None = None

    def get(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]], encoder_hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the encoder's hidden state, by `compute` in the first call."""
        if self.keys_and_values is None:
            self.keys_and_values = compute(encoder_hidden_BSD)
        return self.keys_and_values


class Cache:
    """The key-value cache of a decoder: a `LayerCache` and a `CrossCache` for each layer.

    It holds 2 · L · G · K numbers a position and row. capacity: positions of text; virtual tokens come on top. Beams of one
    text must stay adjacent rows: `reorder` leaves the cross-attention caches as they are.
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
        self.num_virtual_tokens = 0  # cached positions of a prompt or prefix (`model.virtual_tokens`)

    @property
    def length(self) -> int:
        """The number of cached positions, virtual tokens included."""
        return self.layers[0].length

    @property
    def text_length(self) -> int:
        """The number of cached positions of text, without virtual tokens."""
        return max(self.length - self.num_virtual_tokens, 0)

    @property
    def capacity(self) -> int:
        """The number of positions of text that the buffers can hold."""
        return self.layers[0].key_BGSK.size(2) - self.num_virtual_tokens

    def grow(self, capacity: int) -> None:
        """Extend the buffers to `capacity` positions of text, if they are smaller."""
        missing = capacity - self.capacity
        if missing > 0:
            for layer in self.layers:
                layer.grow(missing)

    def truncate(self, text_length: int) -> None:
        """Forget all positions of text but the first `text_length`; virtual tokens stay. Error: more than it holds."""
        if not 0 <= text_length <= self.text_length:
            raise ConfigError(f"truncate({text_length}): the cache holds {self.text_length} positions of text")
        for layer in self.layers:
            layer.truncate(min(layer.length, self.num_virtual_tokens + text_length))

    def add_virtual_tokens(self, count: int) -> None:
        """Make room for virtual tokens in an empty cache."""
        self.num_virtual_tokens = count
        if count:
            for layer in self.layers:
                layer.grow(count)

    def reorder(self, row_B: Tensor) -> None:
        """Replace row b by row row_B[b] in every layer's self-attention cache."""
        for layer in self.layers:
            layer.reorder(row_B)

    def select(self, row_B: Tensor, skip: int = 0) -> None:
        """Make row row_B[b] row b, and forget the first `skip` positions of text, in every self-attention cache."""
        moved_M = (row_B != torch.arange(len(row_B), device=row_B.device)).nonzero()[:, 0]
        for layer in self.layers:
            layer.select(row_B, moved_M, self.num_virtual_tokens, skip)
