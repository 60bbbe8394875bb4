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

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Tensor | bool | None) -> Output:
        """hidden B S D; a prompt of the encoder stays in it (B P+S D): the decoder looks at that too. options: those of
        `Stack.forward`."""
        return self.encoder(input_ids, attention_mask, keep_prompt=True, **options)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
        memory: Tensor | None = None,
        cache: Cache | None = None,
        hidden_states: bool = False,
    ) -> Output:
        """input_ids B S (attention_mask: 1 real, 0 pad), decoder_input_ids B T; without these the output is the input,
        shifted right, as when a whole text is to be classified. memory B S D: what `encode` returned for input_ids.

        document_ids B S, decoder_document_ids B T: packed rows, in which the output of a document sees its own input; with
        position_ids and decoder_position_ids, that count in each document."""
        encoded = None
        if memory is None:
            told = {"position_ids": position_ids, "document_ids": document_ids, "hidden_states": hidden_states}
            encoded = self.encode(input_ids, attention_mask, **told)
            memory = encoded.hidden
        if decoder_input_ids is None:
            if document_ids is not None:
                raise ConfigError("packed rows of an encoder-decoder need decoder_input_ids: what is shifted is one text a row")
            decoder_input_ids = self.shift_right(input_ids)
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            position_ids=decoder_position_ids,
            document_ids=decoder_document_ids,
            cache=cache,
            memory=Memory(memory, self.memory_mask(attention_mask), self.memory_documents(document_ids), self.prompt_length),
            hidden_states=hidden_states,
        )
        return decoded._replace(memory=memory, memory_states=encoded.hidden_states if encoded is not None else None)

    def memory_mask(self, attention_mask_BS: Tensor | None) -> Tensor | None:
        """The mask of the input, for what the encoder makes of it."""
        return None if attention_mask_BS is None else F.pad(attention_mask_BS, (self.prompt_length, 0), value=1)

    def memory_documents(self, document_ids_BS: Tensor | None) -> Tensor | None:
        return None if document_ids_BS is None else F.pad(document_ids_BS, (self.prompt_length, 0), value=-1)

    @property
    def prompt_length(self) -> int:
        return self.encoder.prompt.length if self.encoder.prompt is not None else 0

    def shift_right(self, ids_BT: Tensor) -> Tensor:
        """decoder_start_id, then all ids but the last: position t is to predict ids[t]."""
        start = self.config.decoder_start_id
        if start is None:
            raise ConfigError("this encoder-decoder has no decoder_start_id: give decoder_input_ids")
        return torch.cat((torch.full_like(ids_BT[:, :1], start), ids_BT[:, :-1]), dim=1)
