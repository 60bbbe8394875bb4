"""The encoder-decoder: one stack encodes the input, the other decodes the output with cross-attention to the encoding."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import Cache
from model.config import ConfigError, ModelConfig
from model.decoder import Decoder
from model.encoder import Encoder
from model.stack import EncoderOutput, Output


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
    def num_virtual_tokens(self) -> int:
        """The number of positions that the decoder's virtual tokens take from its context."""
        return self.decoder.num_virtual_tokens

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Tensor | bool | None) -> Output:
        """Encode input_ids B S; a prompt stays in the hidden state, B P+S D, as the decoder attends to it too. options: those
        of `Stack.forward`."""
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
        encoder_hidden: Tensor | None = None,
        cache: Cache | None = None,
        hidden_states: bool = False,
    ) -> Output:
        """input_ids B S (attention_mask: 1 real, 0 pad), decoder_input_ids B T → hidden B T D. decoder_input_ids default to
        input_ids shifted right, for the classification of a text. encoder_hidden: `encode(input_ids).hidden`, if already known.

        document_ids B S, decoder_document_ids B T: packed rows, in which a document's output attends to its own input; then
        position_ids and decoder_position_ids count within each document.
        """
        encoder_hidden_states = None
        if encoder_hidden is None:
            options = {"position_ids": position_ids, "document_ids": document_ids, "hidden_states": hidden_states}
            encoded = self.encode(input_ids, attention_mask, **options)
            encoder_hidden, encoder_hidden_states = encoded.hidden, encoded.hidden_states
        if decoder_input_ids is None:
            if document_ids is not None:
                raise ConfigError("packed rows of an encoder-decoder need decoder_input_ids: one text a row is shifted")
            decoder_input_ids = self.shift_right(input_ids)
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            position_ids=decoder_position_ids,
            document_ids=decoder_document_ids,
            cache=cache,
            encoder_output=EncoderOutput(
                encoder_hidden, self.pad(attention_mask, 1), self.pad(document_ids, -1), self.prompt_length
            ),
            hidden_states=hidden_states,
        )
        return decoded._replace(encoder_hidden=encoder_hidden, encoder_hidden_states=encoder_hidden_states)

    def pad(self, x_BS: Tensor | None, value: int) -> Tensor | None:
        """Give the encoder's prompt a column each in a mask or in document ids."""
        return None if x_BS is None else F.pad(x_BS, (self.prompt_length, 0), value=value)

    @property
    def prompt_length(self) -> int:
        """The number of prompt vectors that the encoder reads before the text."""
        return self.encoder.prompt.length if self.encoder.prompt is not None else 0

    def shift_right(self, ids_BT: Tensor) -> Tensor:
        """Return decoder_start_id, then all ids but the last, so that position t predicts ids[t]."""
        start = self.config.decoder_start_id
        if start is None:
            raise ConfigError("this encoder-decoder has no decoder_start_id: give decoder_input_ids")
        return torch.cat((torch.full_like(ids_BT[:, :1], start), ids_BT[:, :-1]), dim=1)
