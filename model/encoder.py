"""The encoder: a stack with bidirectional attention."""

from torch import nn

from model.config import ModelConfig
from model.stack import Stack


class Encoder(Stack):
    """ids → hidden states, each a function of the whole text. Source: Devlin et al. 2018, arXiv 1810.04805."""

    def __init__(self, config: ModelConfig, attention: str = "sdpa", *, embedding: nn.Embedding | None = None):
        super().__init__(config, config.layers, attention, causal=False, embedding=embedding)
