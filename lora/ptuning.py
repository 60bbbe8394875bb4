"""P-tuning: vectors before the embedded text, as in prompt tuning, made by a small network from embeddings of its own.

    P = relu(relu(E W1ᵀ + b1) W2ᵀ + b2) W3ᵀ + b3, with E of P × D, W1 of width × D, W2 of width × width, W3 of D × width

What they are learned through helps the optimizer; afterwards only the P × D vectors count.
Source: Liu et al. 2021, arXiv 2103.10385, section 3. The paper has an LSTM before the MLP; this is PEFT's default, "MLP".
Where the vectors stand: `lora.prompt`.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lora.config import PtuningConfig
from lora.layer import Part
from lora.prompt import PromptAdapters, attach_virtual_tokens, text_stack


def reset_embedding_and_mlp(module: nn.Module, embedding: nn.Parameter, generator: torch.Generator) -> None:
    """torch's own first values: embeddings N(0, 1), matrices and biases of linear layers uniform in ±1/√I."""
    embedding.data.copy_(torch.empty(embedding.shape).normal_(generator=generator))
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in (layer.weight, layer.bias):
                parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


class Ptuning(Part):
    """`embedding` P D and `mlp`: three linear layers."""

    def __init__(self, config: PtuningConfig, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.tokens, width))
        self.mlp = nn.Sequential(
            skip_init(nn.Linear, width, config.width),
            nn.ReLU(),
            skip_init(nn.Linear, config.width, config.width),
            nn.ReLU(),
            skip_init(nn.Linear, config.width, width),
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        reset_embedding_and_mlp(self.mlp, self.embedding, generator)

    @property
    def length(self) -> int:
        return len(self.embedding)

    def forward(self) -> Tensor:
        return self.mlp(self.embedding)  # P D


def ptuning(network: nn.Module, config: PtuningConfig, name: str) -> None:
    attach_virtual_tokens(network, text_stack(network), PromptAdapters, Ptuning(config, network.config.width), name)
