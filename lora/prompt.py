"""Prompt tuning: learned virtual tokens before the embedded text of a frozen network.

    [p_1 … p_P, e(x_1) … e(x_T)]

They take the first P positions, the text's positions continue from there, and they have no loss (`model.virtual_tokens`). Each
is initialized to the embedding of a token: a random one, or those of a text (Lester et al., section 3.2).
Source: Lester et al. 2021, arXiv 2104.08691. As in PEFT: in an encoder-decoder they stand before the encoder's text only, and
the decoder attends to their encodings; they have token type 0; where a family scales its embeddings, they stand beside the
scaled ones; a head that pools the first token ([CLS]) reads p_1. Unlike PEFT, position_ids continue from P rather than being
ignored, and so do those of left-padded rows; a sliding window does not hide the prompt.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora.config import AdapterError, PromptConfig
from lora.foreign import require_own
from lora.layer import Holder, Part
from lora.methods import virtual_token_method


class Prompt(Part):
    """`vectors`, P × D. embed_tokens: token ids → their embeddings."""

    def __init__(self, config: PromptConfig, width: int, vocab_size: int, embed_tokens: Callable[[Tensor], Tensor]):
        super().__init__()
        if wrong := [token for token in config.ids if not 0 <= token < vocab_size]:
            raise AdapterError(f"prompt: the id {wrong[0]} is not among the {vocab_size} of this network's vocabulary")
        if config.text is not None and not config.ids:
            raise AdapterError("prompt: to initialize from a text, give its token ids, `ids`")
        self.vectors = nn.Parameter(torch.empty(config.tokens, width))
        self.ids, self.vocab_size, self.embed_tokens = config.ids, vocab_size, embed_tokens

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        ids_P = torch.randint(self.vocab_size, (len(self.vectors),), generator=generator)
        if self.ids:
            ids_P = torch.tensor([self.ids[position % len(self.ids)] for position in range(len(self.vectors))])
        self.vectors.copy_(self.embed_tokens(ids_P.to(self.vectors.device)))

    @property
    def length(self) -> int:
        return len(self.vectors)

    def forward(self) -> Tensor:
        return self.vectors

    def table(self) -> Tensor:
        """The tensor that an adapter's file holds: P rows."""
        return self()


class VirtualTokenAdapters(Holder):
    """The virtual tokens of a stack, those of the active adapters concatenated. Each part is called without arguments; `length`
    is its number of positions."""

    stack_attribute: str  # the attribute of the stack that holds this module
    position_axis: int  # of a part's output

    def forward(self) -> Tensor | None:
        found = [self.parts[name]() for name in self.active]
        return torch.cat(found, dim=self.position_axis) if found else None

    @property
    def length(self) -> int:
        return sum(self.parts[name].length for name in self.active)

    def detach_from(self, network: nn.Module) -> None:
        for stack in network.modules():
            if getattr(stack, self.stack_attribute, None) is self:
                setattr(stack, self.stack_attribute, None)


class PromptAdapters(VirtualTokenAdapters):
    """`Stack.prompt`: P × D."""

    stack_attribute, position_axis = "prompt", 0


def attach_virtual_tokens(
    network: nn.Module, stack: nn.Module, kind: type[VirtualTokenAdapters], part: Part, name: str
) -> None:
    """Add the part of the adapter `name` to a stack. Error (AdapterError): no room is left for a text in the context."""
    config = network.config
    if config.position != "relative" and part.length >= config.context:
        raise AdapterError(f"{part.length} positions before the text leave no room for it in context={config.context}")
    if getattr(stack, kind.stack_attribute) is None:
        setattr(stack, kind.stack_attribute, kind().train(network.training))
    getattr(stack, kind.stack_attribute).parts[name] = part.train(network.training)


def input_stack(network: nn.Module) -> nn.Module:
    """Return the stack that reads the text: the encoder of an encoder-decoder, else the only one."""
    require_own(network, "virtual tokens need")
    return getattr(network.body, "encoder", network.body)


@virtual_token_method(PromptConfig)
def prompt(network: nn.Module, config: PromptConfig, name: str) -> None:
    """Attach the vectors to the stack that reads the text."""
    stack = input_stack(network)
    part = Prompt(config, network.config.width, network.config.vocab_size, stack.embed_tokens)
    attach_virtual_tokens(network, stack, PromptAdapters, part, name)
