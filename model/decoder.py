"""The decoder: a stack with causal attention. Alone it is a GPT; with `cross` it attends to an encoder's output."""

from torch import nn

from model.config import ModelConfig
from model.stack import Stack


class Decoder(Stack):
    """ids → hidden states, each a function of the tokens up to its own. Source: Radford et al. 2018."""

    def __init__(
        self, config: ModelConfig, attention: str = "sdpa", *, cross: bool = False, embedding: nn.Embedding | None = None
    ):
        super().__init__(config, config.decoder_layers, attention, causal=True, cross=cross, embedding=embedding)
