"""Embeddings, transformer layers and final norm: the code that encoder and decoder share."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.block import BLOCKS
from model.cache import Cache, CrossCache
from model.config import ConfigError, LayerSpec, ModelConfig
from model.mask import AttentionInputs, Mask
from model.norm import NORMS
from model.position import POSITIONS, RelativeBias
from model.rope import rope_tables
from model.virtual_tokens import PastKeyValues, Positions, VirtualTokens, read_virtual_tokens


class Output(NamedTuple):
    """The outputs of a network.

    logits: B T V for a language model; other heads have other shapes, see `model.heads`. hidden: B T D after the last norm; for
    an encoder–decoder, of the decoder. hidden_states, if requested: embedding output, then each layer's output; the last entry
    is `hidden`. encoder_hidden (B S D), encoder_hidden_states: those of the encoder. pair_logits B 2: next-sentence logits,
    only from BERT's pretraining head. prompt B P D: outputs at a prompt's positions, only in the call that processed the
    prompt.
    """

    logits: Tensor | None
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    encoder_hidden: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pair_logits: Tensor | None = None
    prompt: Tensor | None = None


class EncoderOutput(NamedTuple):
    """The encoder's output for cross-attention: last hidden state, padding mask (1 real, 0 pad), document ids of packed rows.

    The first `prompt_length` positions are virtual tokens, which every document may attend to.
    """

    hidden_BSD: Tensor
    attention_mask_BS: Tensor | None = None
    document_ids_BS: Tensor | None = None
    prompt_length: int = 0

    def attention_inputs(self, queries: int, document_ids_BS: Tensor | None) -> AttentionInputs:
        """Return the mask of cross-attention. document_ids_BS: of all decoder positions; the queries are the last `queries`."""
        if (self.document_ids_BS is None) != (document_ids_BS is None):
            raise ConfigError("packed rows of an encoder-decoder need both document_ids and decoder_document_ids")
        mask = Mask(
            causal=False,
            attention_mask=self.attention_mask_BS,
            document_ids=self.document_ids_BS,
            query_ids=None if document_ids_BS is None else document_ids_BS[:, -queries:],
            prefix=self.prompt_length,
        )
        return mask.attention_inputs(queries, self.hidden_BSD.size(1), self.hidden_BSD.device)


class BlockInputs(NamedTuple):
    """The arguments of `Block.forward` after x."""

    attention_inputs: AttentionInputs
    rope: tuple[Tensor, Tensor] | None
    past_key_values: PastKeyValues
    encoder_hidden_BSD: Tensor | None
    cross_inputs: AttentionInputs | None
    cross_cache: CrossCache | None


class Stack(nn.Module):
    """ids → hidden states: token, position and segment embeddings, the layers, the last norm.

    attention: "sdpa" (fused) or "reference" (plain). embedding: given when two stacks share one table. Pre-norm networks have a
    final norm; in post-norm networks each layer already ends with one.

    Two optional modules make virtual tokens (`model.virtual_tokens`; `lora.prompt` and `lora.prefix` set them): `prompt()`
    returns P × D vectors or None, `prefix()` keys and values, L 2 G P K, or None; the attribute `length` of each is P.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: tuple[LayerSpec, ...],
        attention: str = "sdpa",
        *,
        causal: bool,
        cross: bool = False,
        embedding: nn.Embedding | None = None,
    ):
        super().__init__()
        self.config, self.layers, self.causal = config, layers, causal
        self.dropout, self.output_dropout = config.dropout, config.output_dropout
        self.embedding = embedding if embedding is not None else nn.Embedding(config.vocab_size, config.width)
        self.position = POSITIONS[config.position](config)
        self.token_type = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.embedding_norm = NORMS[config.norm](config.width, config.norm_eps) if config.embedding_norm else nn.Identity()
        self.relative = RelativeBias(config, bidirectional=not causal) if config.position == "relative" else None
        self.blocks = nn.ModuleList(BLOCKS[config.norm_first](config, attention, cross=cross) for _ in layers)
        self.norm = NORMS[config.norm](config.width, config.norm_eps) if config.norm_first else nn.Identity()
        self.register_module("prompt", None)
        self.register_module("prefix", None)

    @property
    def num_virtual_tokens(self) -> int:
        """The number of positions that prompt and prefix take from the context."""
        return sum(part.length for part in (self.prompt, self.prefix) if part is not None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        visible_lengths: Tensor | None = None,
        cache: Cache | None = None,
        encoder_output: EncoderOutput | None = None,
        hidden_states: bool = False,
        keep_prompt: bool = False,
    ) -> Output:
        """Return the hidden states of the text, B T D; with keep_prompt also of the prompt, in front: B P+T D.

        input_ids B T. attention_mask B S (1 real, 0 pad; S: cached positions of the text too). position_ids B T (default:
        computed from the mask, not counting pads). token_type_ids B T (default: 0). document_ids B T: packed documents do not
        attend to each other; every one attends to prompt and prefix, and virtual tokens attend only to each other.
        visible_lengths B, of a causal stack: each position of a document sees the first visible_lengths[b] positions of the row
        (cached ones count) that are of its document, also those after it.
        """
        if cache is not None and document_ids is not None:
            raise ConfigError("a cache holds one document a row; document_ids are for training on packed rows")
        virtual = read_virtual_tokens(self, cache)
        positions = virtual.positions(input_ids, attention_mask, position_ids, document_ids, visible_lengths)
        x_BTD = self.embed(input_ids, token_type_ids, positions, virtual.prompt_PD)
        states = [x_BTD]
        block_inputs = self.block_inputs(x_BTD, positions, virtual, encoder_output, cache)
        for block, inputs in zip(self.blocks, block_inputs, strict=True):
            x_BTD = block(x_BTD, *inputs)
            if hidden_states:
                states.append(x_BTD)
        x_BTD = F.dropout(self.norm(x_BTD), self.output_dropout, self.training)
        output = Output(None, x_BTD, (*states[:-1], x_BTD) if hidden_states else None)
        return output if keep_prompt else split_prompt(output, virtual.prompt_length)

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Look up the token embeddings, times √D in families that scale them."""
        x_BTD = self.embedding(input_ids)
        return x_BTD * self.config.embedding_scale if self.config.scale_embedding else x_BTD

    def embed(
        self, input_ids: Tensor, token_type_ids: Tensor | None, positions: Positions, prompt_PD: Tensor | None
    ) -> Tensor:
        """Sum token, position and segment embeddings, and apply the embedding norm if the family has one. A prompt's vectors
        are treated as token embeddings of segment 0."""
        if self.config.position == "learned" and positions.keys > self.config.context:
            raise ConfigError(f"{positions.keys} positions were asked of a network with context={self.config.context}")
        x_BTD = self.embed_tokens(input_ids)
        if prompt_PD is not None:
            x_BTD = torch.cat((prompt_PD.to(x_BTD.dtype).expand(x_BTD.size(0), -1, -1), x_BTD), dim=1)
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions.position_ids).to(x_BTD.dtype)
        if self.token_type is not None:
            types_BT = token_type_ids if token_type_ids is not None else torch.zeros_like(input_ids)
            x_BTD = x_BTD + self.token_type(F.pad(types_BT, (x_BTD.size(1) - types_BT.size(1), 0)))
        elif token_type_ids is not None:
            raise ConfigError(f"{self.config.family} of this config has no token types; token_type_ids were given")
        return F.dropout(self.embedding_norm(x_BTD), self.dropout, self.training)

    def block_inputs(
        self,
        x_BTD: Tensor,
        positions: Positions,
        virtual: VirtualTokens,
        encoder_output: EncoderOutput | None,
        cache: Cache | None,
    ) -> list[BlockInputs]:
        """Return the inputs of each layer besides x. Layers with the same window share a mask, with the same RoPE its
        tables."""
        masks = self.attention_inputs(positions, virtual.length, x_BTD.device)
        ropes = {
            rope: rope_tables(positions.position_ids, self.config.head_width, rope, x_BTD.dtype) if rope is not None else None
            for rope in {spec.rope for spec in self.layers}
        }
        encoder_hidden_BSD = cross_inputs = None
        if encoder_output is not None:
            encoder_hidden_BSD = encoder_output.hidden_BSD
            cross_inputs = encoder_output.attention_inputs(positions.queries, positions.document_ids)
        cross_caches = cache.cross if cache is not None else [None] * len(self.layers)
        return [
            BlockInputs(masks[spec.window], ropes[spec.rope], past, encoder_hidden_BSD, cross_inputs, cross_cache)
            for spec, past, cross_cache in zip(self.layers, virtual.past_key_values, cross_caches, strict=True)
        ]

    def attention_inputs(
        self, positions: Positions, num_virtual_tokens: int, device: torch.device
    ) -> dict[int | None, AttentionInputs]:
        """Return the mask and bias of self-attention, by the window of the layers."""
        mask = Mask(
            self.causal,
            document_ids=positions.document_ids,
            attention_mask=positions.attention_mask,
            prefix=num_virtual_tokens,
            visible_lengths=positions.visible_lengths,
        )
        queries, keys = positions.queries, positions.keys
        bias_1HTS = self.relative(queries, keys) if self.relative is not None else None
        return {
            window: mask.with_window(window).attention_inputs(queries, keys, device)._replace(bias_1HTS=bias_1HTS)
            for window in {spec.window for spec in self.layers}
        }


def split_prompt(output: Output, length: int) -> Output:
    """Move the first `length` positions, a prompt's, out of the hidden states into `Output.prompt`."""
    if not length:
        return output
    prompt_BPD, hidden_BTD = output.hidden[:, :length], output.hidden[:, length:]
    states = output.hidden_states
    if states is not None:
        states = (*(state_BTD[:, length:] for state_BTD in states[:-1]), hidden_BTD)
    return output._replace(hidden=hidden_BTD, hidden_states=states, prompt=prompt_BPD)
