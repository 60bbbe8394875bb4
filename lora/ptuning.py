"""P-tuning: virtual tokens before the embedded text, as in prompt tuning, computed by an MLP from embeddings of its own.

    P = relu(relu(E W1ᵀ + b1) W2ᵀ + b2) W3ᵀ + b3,  E: P × D,  W1: width × D,  W2: width × width,  W3: D × width

The reparameterization helps the optimizer; after training only the P × D vectors are needed.
Source: Liu et al. 2021, arXiv 2103.10385, section 3. The paper has an LSTM before the MLP; this is PEFT's default, "MLP".
`lora.prompt` says where the virtual tokens stand.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lora.config import PtuningConfig
from lora.layer import Part
from lora.methods import virtual_token_method
from lora.prompt import PromptAdapters, attach_virtual_tokens, input_stack


def reset_embedding_and_mlp(mlp: nn.Module, embedding: nn.Parameter, generator: torch.Generator | None) -> None:
    """Initialize as torch does: the embedding N(0, 1), weights and biases of linear layers uniform in ±1/√I."""
    embedding.data.copy_(torch.empty(embedding.shape).normal_(generator=generator))
    for layer in mlp.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in (layer.weight, layer.bias):
                parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


class Ptuning(Part):
    """`embedding`, P × D, and `mlp`, three linear layers."""

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

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        reset_embedding_and_mlp(self.mlp, self.embedding, generator)

    @property
    def length(self) -> int:
        return len(self.embedding)

    def forward(self) -> Tensor:
        return self.mlp(self.embedding)  # P D

    def table(self) -> Tensor:
        """The tensor that an adapter's file holds: P rows. As in PEFT, the MLP is not saved."""
        return self()


@virtual_token_method(PtuningConfig)
def ptuning(network: nn.Module, config: PtuningConfig, name: str) -> None:
    """Attach the vectors to the stack that reads the text."""
    stack = input_stack(network)
    attach_virtual_tokens(network, stack, PromptAdapters, Ptuning(config, network.config.width), name)
