"""The encoder-decoder: one stack reads the input, the other writes the output and looks at what the first one made of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import Cache
from model.config import ConfigError, ModelConfig
from model.decoder import Decoder
from model.encoder import Encoder
from model.stack import Memory, Output


class EncoderDecoder(nn.Module):
    """(input ids, output ids so far) → the decoder's hidden states. The two share the table of token embeddings.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.1.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Encoder(config, attention, embedding=self.embedding)
        self.decoder = Decoder(config.second_stack, attention, cross=True, embedding=self.embedding)

    @property
    def before(self) -> int:
        """As `Stack.before`, of the text that is written."""
        return self.decoder.before

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, hidden_states: bool = False) -> Output:
        """hidden B S D; a prompt of the encoder stays in it (B P+S D): the decoder looks at that too."""
        return self.encoder(input_ids, attention_mask, hidden_states=hidden_states, keep_prompt=True)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        cache: Cache | None = None,
        hidden_states: bool = False,
        **other: Tensor | None,
    ) -> Output:
        """input_ids B S (attention_mask: 1 real, 0 pad), decoder_input_ids B T; without these the output is the input,
        shifted right, as when a whole text is to be classified. memory B S D: what `encode` returned for input_ids."""
        if given := sorted(name for name, value in other.items() if value is not None):
            raise ConfigError(f"an encoder-decoder has no {', '.join(given)}: each row holds one text")
        encoded = self.encode(input_ids, attention_mask, hidden_states=hidden_states) if memory is None else None
        memory = memory if encoded is None else encoded.hidden
        if decoder_input_ids is None:
            decoder_input_ids = self.shift_right(input_ids)
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            cache=cache,
            memory=Memory(memory, self.memory_mask(attention_mask)),
            hidden_states=hidden_states,
        )
        return decoded._replace(memory=memory, memory_states=encoded.hidden_states if encoded is not None else None)

    def memory_mask(self, attention_mask_BS: Tensor | None) -> Tensor | None:
        """The mask of the input, for what the encoder makes of it."""
        prompt = self.encoder.prompt.length if self.encoder.prompt is not None else 0
        return attention_mask_BS if attention_mask_BS is None or not prompt else F.pad(attention_mask_BS, (prompt, 0), value=1)

    def shift_right(self, ids_BT: Tensor) -> Tensor:
        """decoder_start_id, then all ids but the last: position t is to predict ids[t]."""
        start = self.config.decoder_start_id
        if start is None:
            raise ConfigError("this encoder-decoder has no decoder_start_id: give decoder_input_ids")
        return torch.cat((torch.full_like(ids_BT[:, :1], start), ids_BT[:, :-1]), dim=1)
