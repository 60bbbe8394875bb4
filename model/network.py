"""The network: a body (decoder, encoder or both) and a head."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from model.config import ConfigError, ModelConfig
from model.decoder import Decoder
from model.encoder import Encoder
from model.encoder_decoder import EncoderDecoder
from model.heads import HEADS, is_tied
from model.stack import Output
from model.weights import head_spec, weight_table

BODIES = {"decoder": Decoder, "encoder": Encoder, "encoder-decoder": EncoderDecoder}


class Network(nn.Module):
    """A network: `body` turns ids into hidden states, `head` turns these into logits (`model.heads`, by `config.head`).

    With tied embeddings the matrix of a language or masked-language head is the embedding's. forward has the
    arguments of the body's (`model.stack`, `model.encoder_decoder`), input_ids B T, attention_mask B T, … → `Output`.
    """

    source: Path | None = None  # the folder it was loaded from
    new_weights: tuple[str, ...] = ()  # names that the folder lacks in their shape: those of a new head, initialized
    generation: Mapping[str, object] | None = None  # that folder's generation_config.json, if it has one
    quantization: object | None = None  # the quantization at loading (quant.config.FourBit), if any

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        if config.head not in HEADS:
            raise ConfigError(f"unknown head {config.head!r}; heads: {', '.join(HEADS)}")
        self.config = config
        self.body = BODIES[config.architecture](config, attention)
        self.head = HEADS[config.head](config, head_spec(config))
        self.tie_weights()

    def published(self) -> dict[str, str]:
        """Map our name of each linear layer to the family's."""
        names = {row.name: row.published.removesuffix(".weight") for row in weight_table(self.config).values()}
        linear = (path for path, module in self.named_modules() if isinstance(module, nn.Linear))
        return {path: names[f"{path}.weight"] for path in linear if f"{path}.weight" in names}

    def tie_weights(self) -> None:
        """Share one parameter between head and embedding, where the config says so (again after loading). A quantized head
        has its own codes."""
        if is_tied(self.config) and self.head.packed is None:
            self.head.weight = self.body.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> Output:
        """Return the body's output with logits; options: those of the body's forward."""
        output = self.body(input_ids, attention_mask, **options)
        has_decoder_ids = options.get("decoder_input_ids") is not None  # else it reads the input ids, and shares their mask
        return self.head.read(output, options.get("decoder_attention_mask") if has_decoder_ids else attention_mask)
