"""A stack of layers between embedding and hidden state: what encoder and decoder have in common."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.before import before_the_text
from model.block import Block
from model.cache import Cache
from model.config import ConfigError, LayerSpec, ModelConfig
from model.mask import Mask, Plan
from model.norm import NORMS
from model.position import POSITIONS, RelativeBias, positions_from_mask
from model.rope import rope_tables


class Output(NamedTuple):
    """What a network returns."""

    logits: Tensor | None  # of the head: B T V of a language model; see `model.heads`
    hidden: Tensor  # B T D, after the last norm; of an encoder-decoder the decoder's
    hidden_states: tuple[Tensor, ...] | None = None  # the embedding, then each layer; the last one after the last norm
    memory: Tensor | None = None  # B S D, an encoder-decoder's encoded input
    memory_states: tuple[Tensor, ...] | None = None  # as hidden_states, of the encoder
    pair_logits: Tensor | None = None  # B 2, next sentence, of the head that has both
    prompt: Tensor | None = None  # B P D, what became of the vectors before the text, where this call has read them


class Memory(NamedTuple):
    """What a decoder looks at: the encoder's last hidden state, which of it is real (1) or pad (0), and which packed document
    it is of; its first `prompt` positions all see."""

    hidden_BSD: Tensor
    attention_mask_BS: Tensor | None = None
    document_ids_BS: Tensor | None = None
    prompt: int = 0


class Stack(nn.Module):
    """ids → hidden states: token, position and segment embeddings, the layers, the last norm.

    `attention` chooses the plain or the fused twin (`model.attention.ATTENTIONS`). `embedding` is given where two stacks
    share one. With `norm_first` a last norm ends the stack; otherwise each layer has normalized its own sum.

    Two parts that may be set later stand before the text (`model.before`; `lora.prompt` and `lora.prefix` make them). Called
    without arguments, `prompt` gives P × D vectors or None, `prefix` keys and values L 2 G P K or None; `length` of each is P.
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
        self.embedding = embedding if embedding is not None else nn.Embedding(config.vocab_size, config.width)
        self.position = POSITIONS[config.position](config)
        self.token_type = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.embedding_norm = NORMS[config.norm](config.width, config.norm_eps) if config.embedding_norm else nn.Identity()
        self.relative = RelativeBias(config, both_ways=not causal) if config.position == "relative" else None
        self.blocks = nn.ModuleList(Block(config, attention, cross=cross) for _ in layers)
        self.norm = NORMS[config.norm](config.width, config.norm_eps) if config.norm_first else nn.Identity()
        self.register_module("prompt", None)
        self.register_module("prefix", None)

    @property
    def before(self) -> int:
        """How many positions prompt and prefix take from the context."""
        return sum(part.length for part in (self.prompt, self.prefix) if part is not None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
        hidden_states: bool = False,
        keep_prompt: bool = False,
    ) -> Output:
        """input_ids B T. attention_mask B S (1 real, 0 pad; S counts what the cache holds too). position_ids B T
        (default: counted by the mask). token_type_ids B T (default: 0). document_ids B T: packed documents, which must
        not see each other; all see prompt and prefix, and a prompt then sees itself alone. hidden B T D, of the text
        (keep_prompt: B P+T D, of a prompt before it too)."""
        if cache is not None and document_ids is not None:
            raise ConfigError("a cache holds one document a row; document_ids are for training on packed rows")
        before = before_the_text(self, cache)
        queries = before.new + input_ids.size(1)
        keys = before.length + before.held + input_ids.size(1)
        attention_mask, document_ids = before.covered(attention_mask, 1), before.covered(document_ids, -1)
        if position_ids is None:
            position_ids = positions(attention_mask, queries, keys, input_ids.device)
        else:
            position_ids = before.counted(position_ids)
        x_BTD = self.embed(input_ids, position_ids, token_type_ids, keys, before.prompt_PD)

        mask = Mask(self.causal, document_ids=document_ids, attention_mask=attention_mask, prefix=before.length)
        plans = self.plans(mask, queries, keys, x_BTD.device)
        ropes = {
            rope: rope_tables(position_ids, self.config.head_width, rope, x_BTD.dtype) if rope is not None else None
            for rope in {spec.rope for spec in self.layers}
        }
        memory_plan = None
        if memory is not None:
            if (memory.document_ids_BS is None) != (document_ids is None):
                raise ConfigError("packed rows of an encoder-decoder need both document_ids and decoder_document_ids")
            cross = Mask(
                causal=False,
                attention_mask=memory.attention_mask_BS,
                document_ids=memory.document_ids_BS,
                query_ids=None if document_ids is None else document_ids[:, -queries:],
                prefix=memory.prompt,
            )
            memory_plan = cross.plan(queries, memory.hidden_BSD.size(1), x_BTD.device)
        states = [x_BTD]
        for index, (spec, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            x_BTD = block(
                x_BTD,
                plans[spec.window],
                ropes[spec.rope],
                before.pasts[index],
                memory.hidden_BSD if memory is not None else None,
                memory_plan,
                cache.cross[index] if cache is not None else None,
            )
            if hidden_states:
                states.append(x_BTD)
        x_BTD, prompt_BPD = F.dropout(self.norm(x_BTD), self.config.output_dropout, self.training), None
        if before.new and not keep_prompt:
            prompt_BPD, x_BTD = x_BTD[:, : before.new], x_BTD[:, before.new :]
            states = [state_BTD[:, before.new :] for state_BTD in states]
        return Output(None, x_BTD, (*states[:-1], x_BTD) if hidden_states else None, prompt=prompt_BPD)

    def words(self, input_ids: Tensor) -> Tensor:
        """token · scale."""
        x_BTD = self.embedding(input_ids)
        return x_BTD * self.config.embedding_scale if self.config.scale_embedding else x_BTD

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        keys: int,
        prompt_PD: Tensor | None = None,
    ) -> Tensor:
        """word + position + segment, normalized where the family does so; a prompt's vectors are words, of segment 0."""
        if self.config.position == "learned" and keys > self.config.context:
            raise ConfigError(f"{keys} positions were asked of a network with context={self.config.context}")
        x_BTD = self.words(input_ids)
        if prompt_PD is not None:
            x_BTD = torch.cat((prompt_PD.to(x_BTD.dtype).expand(x_BTD.size(0), -1, -1), x_BTD), dim=1)
        if self.position is not None:
            x_BTD = x_BTD + self.position(position_ids).to(x_BTD.dtype)
        if self.token_type is not None:
            kinds = token_type_ids if token_type_ids is not None else torch.zeros_like(input_ids)
            x_BTD = x_BTD + self.token_type(F.pad(kinds, (x_BTD.size(1) - kinds.size(1), 0)))
        elif token_type_ids is not None:
            raise ConfigError(f"{self.config.family} of this config has no token types; token_type_ids were given")
        return F.dropout(self.embedding_norm(x_BTD), self.config.dropout, self.training)

    def plans(self, mask: Mask, queries: int, keys: int, device: torch.device) -> dict[int | None, Plan]:
        """One a window: layers of the same window share it."""
        plans = {w: mask.with_window(w).plan(queries, keys, device) for w in {spec.window for spec in self.layers}}
        if self.relative is None:
            return plans
        bias_1HTS = self.relative(queries, keys)
        return {window: plan._replace(bias_1HTS=bias_1HTS) for window, plan in plans.items()}


def positions(attention_mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Counted by the mask, or from the first key."""
    if attention_mask is None:
        return torch.arange(keys - queries, keys, device=device)[None]
    if attention_mask.size(1) != keys:
        raise ConfigError(f"attention_mask covers {attention_mask.size(1)} positions, there are {keys} keys")
    return positions_from_mask(attention_mask)[:, -queries:]
