"""What is read off the last hidden state: words, a class for the text or for each token, an answer's span, a value.

A head's parts follow the family's `HeadSpec`, where it has published one; any head goes on any body.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import HeadSpec, ModelConfig
from model.linear import linear
from model.mlp import ACTIVATIONS
from model.norm import LayerNorm
from model.stack import Output


class Head(nn.Module):
    """forward(hidden B T D, attention_mask B T or None) → logits."""

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        """The body's output, with what the head makes of it."""
        return output._replace(logits=self(output.hidden, attention_mask))


class LanguageHead(Head, nn.Linear):
    """logits B T V = scale · hidden Wᵀ + b: the next word's. T5 with tied embeddings has scale = 1/√D, others 1.

    A loss that never builds all logits takes `features(hidden)`, `weight` and `bias` instead.

    The matrix may be quantized: `pack` puts a frozen layer of few bits (`quant.layer.QuantizedLinear`) in its place. `weight`
    is then the dequantized matrix, made anew where it is asked for, and `features` are rounded as that layer rounds its input.
    """

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        nn.Linear.__init__(self, config.width, config.vocab_size, spec.bias)
        self.scale = config.head_scale
        self.register_module("packed", None)
        if self.bias is not None:
            self.bias.requires_grad_(config.head != "lm")  # BART publishes it as a constant

    def pack(self, layer: nn.Module) -> None:
        del self.weight
        self.packed = layer

    def __getattr__(self, name: str):
        if name == "weight" and self._modules.get("packed") is not None:
            return self.packed.dequantize()
        return super().__getattr__(name)

    def transform(self, hidden: Tensor) -> Tensor:
        """What the head does before its matrix; any leading axes."""
        return hidden if self.scale == 1 else hidden * self.scale

    def rounded(self, features: Tensor) -> Tensor:
        return features if self.packed is None else self.packed.rounded(features)

    def features(self, hidden: Tensor) -> Tensor:
        """What the matrix V × D is multiplied with; any leading axes."""
        return self.rounded(self.transform(hidden))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features = self.transform(hidden)
        if self.packed is not None:
            return self.packed.product(features, self.bias)
        return linear(features, self.weight, self.bias)


class MaskedHead(LanguageHead):
    """logits B T V = norm(f(hidden Wdᵀ + bd)) Wᵀ + b: the masked word's. Source: Devlin et al. 2018; its published code."""

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__(config, spec)
        self.dense = nn.Linear(config.width, config.width)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]

    def transform(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


def first(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The first real token's: BERT's [CLS], RoBERTa's <s>."""
    if attention_mask is None:
        return hidden_BTD[:, 0]
    place_B = attention_mask.long().argmax(-1)  # of equal values, argmax takes the first
    return hidden_BTD[torch.arange(hidden_BTD.size(0), device=place_B.device), place_B]


def last(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The last real token's, by the mask rather than by id: the only one that has seen a whole causal text."""
    if attention_mask is None:
        return hidden_BTD[:, -1]
    place_T = torch.arange(1, hidden_BTD.size(1) + 1, device=hidden_BTD.device)
    place_B = (attention_mask.long() * place_T).argmax(-1)
    return hidden_BTD[torch.arange(hidden_BTD.size(0), device=place_B.device), place_B]


POOLS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"first": first, "last": last}


class PooledHead(Head):
    """One token speaks for the text: logits B C = tanh(h Wdᵀ + bd) Wᵀ + b, or h Wᵀ where the family has no dense layer. In
    place of tanh RoFormer has its own activation.

    C = labels for classes, 1 for regression, 2 for next sentence (0: it is the next, 1: it is not). As `pooler` it stops
    after the dense layer, and logits are B D. Dropout stands before the last matrix (RoBERTa's code has it before the
    dense layer as well). Where the first token speaks, and a prompt stands before the text, that is the prompt's first vector,
    as in PEFT.
    """

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width) if spec.dense else None
        classes = 2 if config.head in ("nsp", "pretraining") else config.labels
        self.out = nn.Linear(config.width, classes, spec.bias) if config.head != "pooler" else nn.Identity()
        self.activation = ACTIVATIONS[config.activation] if spec.own_activation else torch.tanh
        self.pool = POOLS[spec.pool]
        self.dropout = 0.0 if config.head == "pooler" else config.dropout

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        return output._replace(logits=self.pooled(output, attention_mask))

    def pooled(self, output: Output, attention_mask: Tensor | None) -> Tensor:
        if self.pool is first and output.prompt is not None:
            return self(output.prompt)
        return self(output.hidden, attention_mask)

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        pooled_BD = self.pool(hidden_BTD, attention_mask)
        if self.dense is not None:
            pooled_BD = self.activation(self.dense(pooled_BD))
        return self.out(F.dropout(pooled_BD, self.dropout, self.training))


class PretrainingHead(MaskedHead):
    """BERT's two at once: masked words (logits B T V) and next sentence (pair_logits B 2)."""

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__(config, spec)
        self.pair = PooledHead(config, spec)

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        return super().read(output, attention_mask)._replace(pair_logits=self.pair.pooled(output, attention_mask))


class TokenHead(Head):
    """logits B T C = h Wᵀ + b for every token: C labels (`token`), start and end of an answer (`qa`), or one value a
    token, B T (`value`)."""

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__()
        self.out = nn.Linear(config.width, {"qa": 2, "value": 1}.get(config.head, config.labels), spec.bias)
        self.dropout = config.dropout if config.head == "token" else 0.0

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(F.dropout(hidden_BTD, self.dropout, self.training))


class ValueHead(TokenHead):
    """One number a token: logits B T."""

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(hidden_BTD, attention_mask)[..., 0]


class NoHead(Head):
    """Hidden states alone; logits stay None."""

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__()

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        return output


HEADS = {
    "lm": LanguageHead,
    "mlm": MaskedHead,
    "nsp": PooledHead,
    "pretraining": PretrainingHead,
    "sequence": PooledHead,
    "token": TokenHead,
    "qa": TokenHead,
    "value": ValueHead,
    "pooler": PooledHead,
    "none": NoHead,
}
