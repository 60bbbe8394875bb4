"""The decoder: embedding, a stack of blocks, a last norm; and the language model, which adds a head.

`LanguageModel.body` is the decoder, `.head` the matrix from its last hidden state to the vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.block import Block
from model.cache import Cache
from model.config import ConfigError, ModelConfig
from model.mask import Mask
from model.norm import NORMS
from model.position import positions_from_mask, rope_tables


class Output(NamedTuple):
    """What a network returns."""

    logits: Tensor | None  # B T V
    hidden: Tensor  # B T D, after the last norm
    hidden_states: tuple[Tensor, ...] | None = None  # the embedding, then each layer; the last one after the last norm


class Decoder(nn.Module):
    """ids → hidden states. `attention` chooses the plain or the fused twin (`model.attention.ATTENTIONS`)."""

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config, attention) for _ in config.layers)
        self.norm = NORMS[config.norm](config.width, config.norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        hidden_states: bool = False,
    ) -> Output:
        """input_ids B T. attention_mask B S (1 real, 0 pad; S counts what the cache holds too). position_ids B T
        (default: counted by the mask). document_ids B T: packed documents, which must not see each other."""
        if cache is not None and document_ids is not None:
            raise ConfigError("a cache holds one document a row; document_ids are for training on packed rows")
        queries = input_ids.size(1)
        keys = queries + (cache.length if cache is not None else 0)
        if position_ids is None:
            position_ids = self._positions(attention_mask, queries, keys, input_ids.device)
        if self.position is not None and keys > self.config.context:
            raise ConfigError(f"{keys} positions were asked of a network with context={self.config.context}")

        x_BTD = self.embedding(input_ids)
        if self.position is not None:
            x_BTD = x_BTD + self.position(position_ids)
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)

        mask = Mask(document_ids=document_ids, attention_mask=attention_mask)
        layers = self.config.layers
        plans = {w: mask.with_window(w).plan(queries, keys, x_BTD.device) for w in {s.window for s in layers}}
        ropes = {
            base: rope_tables(position_ids, self.config.head_width, base, x_BTD.dtype) if base is not None else None
            for base in {s.rope_base for s in layers}
        }
        states = [x_BTD]
        for index, (spec, block) in enumerate(zip(layers, self.blocks, strict=True)):
            layer_cache = cache.layers[index] if cache is not None else None
            x_BTD = block(x_BTD, plans[spec.window], ropes[spec.rope_base], layer_cache)
            if hidden_states:
                states.append(x_BTD)
        x_BTD = self.norm(x_BTD)
        return Output(None, x_BTD, (*states[:-1], x_BTD) if hidden_states else None)

    @staticmethod
    def _positions(attention_mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
        if attention_mask is None:
            return torch.arange(keys - queries, keys, device=device)[None]
        if attention_mask.size(1) != keys:
            raise ConfigError(f"attention_mask covers {attention_mask.size(1)} positions, there are {keys} keys")
        return positions_from_mask(attention_mask)[:, -queries:]


class LanguageModel(nn.Module):
    """logits = hidden Wheadᵀ. With tied embeddings the head's matrix is the embedding's."""

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        self.config = config
        self.body = Decoder(config, attention)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head and the embedding one parameter, where the config says so (again after loading)."""
        if self.config.tie_embeddings:
            self.head.weight = self.body.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> Output:
        """As `Decoder.forward`, with logits."""
        output = self.body(input_ids, attention_mask, **options)
        return output._replace(logits=self.head(output.hidden))
