"""Prompt tuning: learned vectors before the embedded text, and a frozen network that reads them as it reads words.

    [p_1 … p_P, e(x_1) … e(x_T)]

They take the first P positions, the text's own count on from there, and no loss is taken at them
(`model.virtual_tokens`). At the start
each is the embedding of a token: a random one's, or those of a text (Lester et al., section 3.2).
Source: Lester et al. 2021, arXiv 2104.08691. As PEFT does: of an encoder-decoder they stand before the encoder's text alone,
and the decoder looks at what became of them; they have token type 0; where a family scales its embeddings, they stand beside
the scaled ones; a head that reads the first token ([CLS]) finds p_1. Otherwise than with PEFT, position_ids count on rather
than being ignored, and so do left-padded rows; a sliding window does not lose sight of the prompt.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora.config import AdapterError, PromptConfig
from lora.layer import Holder, Part


class Prompt(Part):
    """`vectors` P D. `words` gives the embeddings of token ids."""

    def __init__(self, config: PromptConfig, width: int, vocab_size: int, embed_tokens: Callable[[Tensor], Tensor]):
        super().__init__()
        if wrong := [token for token in config.ids if not 0 <= token < vocab_size]:
            raise AdapterError(f"prompt: the id {wrong[0]} is not among the {vocab_size} of this network's vocabulary")
        if config.text is not None and not config.ids:
            raise AdapterError("prompt: to begin with a text, give the ids that its tokenizer makes of it, `ids`")
        self.vectors = nn.Parameter(torch.empty(config.tokens, width))
        self.ids, self.vocab_size, self.embed_tokens = config.ids, vocab_size, embed_tokens

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        ids_P = torch.randint(self.vocab_size, (len(self.vectors),), generator=generator)
        if self.ids:
            ids_P = torch.tensor([self.ids[place % len(self.ids)] for place in range(len(self.vectors))])
        self.vectors.copy_(self.embed_tokens(ids_P.to(self.vectors.device)))

    @property
    def length(self) -> int:
        return len(self.vectors)

    def forward(self) -> Tensor:
        return self.vectors


class VirtualTokenAdapters(Holder):
    """The adapters of a stack whose parts stand before the text, the active ones one after the other. A part is called without
    arguments; `length` is how many positions it takes."""

    kind: str  # of the stack's attributes, which this one is
    positions: int  # the axis of what a part gives, along which they stand

    def forward(self) -> Tensor | None:
        given = [self.parts[name]() for name in self.active]
        return torch.cat(given, dim=self.positions) if given else None

    @property
    def length(self) -> int:
        return sum(self.parts[name].length for name in self.active)

    def detach_from(self, network: nn.Module) -> None:
        for stack in network.modules():
            if getattr(stack, self.kind, None) is self:
                setattr(stack, self.kind, None)


class PromptAdapters(VirtualTokenAdapters):
    """`Stack.prompt`: P D."""

    kind, positions = "prompt", 0


def attach_virtual_tokens(
    network: nn.Module, stack: nn.Module, kind: type[VirtualTokenAdapters], part: Part, name: str
) -> None:
    """Give a stack the part of one more adapter. Error (AdapterError): the context has no room left for a text."""
    config = network.config
    if config.position != "relative" and part.length >= config.context:
        raise AdapterError(f"{part.length} positions before the text leave no room for it in context={config.context}")
    if getattr(stack, kind.kind) is None:
        setattr(stack, kind.kind, kind().train(network.training))
    getattr(stack, kind.kind).parts[name] = part.train(network.training)


def text_stack(network: nn.Module) -> nn.Module:
    """The stack that reads the text: of an encoder-decoder the encoder."""
    return getattr(network.body, "encoder", network.body)


def prompt(network: nn.Module, config: PromptConfig, name: str) -> None:
    stack = text_stack(network)
    part = Prompt(config, network.config.width, network.config.vocab_size, stack.embed_tokens)
    attach_virtual_tokens(network, stack, PromptAdapters, part, name)
