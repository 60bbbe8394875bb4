"""Heads: the layers that turn the last hidden state into logits of tokens, classes, spans or values.

A head class registers itself in `HEADS` under its name. Its layers follow the family's `HeadSpec`, where the family has
published such a head, else `own_spec`; any head goes on any body.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import HeadSpec, ModelConfig, Pool
from model.linear import linear
from model.mlp import ACTIVATIONS
from model.norm import LayerNorm
from model.stack import Output


def _rows(roles: dict[str, str]) -> tuple[tuple[str, str, str], ...]:
    """Build rows as in a family's table, published under our own names."""
    return tuple((name, name, role) for name, role in roles.items())


_DENSE = _rows({"head.dense.weight": "matrix", "head.dense.bias": "bias"})
_OUT = _rows({"head.out.weight": "head", "head.out.bias": "bias"})
_MATRIX = _rows({"head.weight": "head"})
_MASKED = _DENSE + _rows({"head.norm.weight": "norm", "head.norm.bias": "bias"}) + _MATRIX + _rows({"head.bias": "bias"})
_PAIR = _rows({"head.pair.out.weight": "head", "head.pair.out.bias": "bias"})

HEADS: dict[str, type["Head"]] = {}


class Head(nn.Module):
    """The base of all heads: forward(hidden B T D, attention_mask B T or None) → logits."""

    is_language_model = False  # logits over the vocabulary; its matrix may be the embedding's
    is_pooled = False  # one token represents the text
    has_labels = False  # as many outputs as `ModelConfig.labels`
    is_part_of_body = False  # published with the body alone, without a prefix
    own_spec = HeadSpec()  # its weights under our own names, for families that have published no such head

    def __init_subclass__(cls, name: str | None = None, **options):
        super().__init_subclass__(**options)
        if name is not None:
            HEADS[name] = cls

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        """Add the logits to the body's output."""
        return output._replace(logits=self(output.hidden, attention_mask))


class LanguageHead(Head, nn.Linear, name="lm"):
    """Language-model head: logits B T V = scale · hidden Wᵀ + b. T5 with tied embeddings has scale = 1/√D, others 1.

    A loss that never builds all logits takes `features(hidden)`, `weight` and `bias` instead.

    The matrix may be quantized: `pack` puts a frozen low-bit layer (`quant.layer.QuantizedLinear`) in its place. `weight` is
    then the matrix dequantized at each access, and `features` are rounded as that layer rounds its input.
    """

    is_language_model = True
    own_spec = HeadSpec(weights=_MATRIX, bias=False)

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        nn.Linear.__init__(self, config.width, config.vocab_size, spec.bias)
        self.scale = config.head_scale
        self.register_module("packed", None)
        if self.bias is not None:
            self.bias.requires_grad_(config.head != "lm")  # BART publishes it as a constant

    def pack(self, layer: nn.Module) -> None:
        """Replace the matrix by a quantized layer."""
        del self.weight
        self.packed = layer

    def __getattr__(self, name: str):
        if name == "weight" and self._modules.get("packed") is not None:
            return self.packed.dequantize()
        return super().__getattr__(name)

    def transform(self, hidden: Tensor) -> Tensor:
        """Apply the layers before the matrix; any leading axes."""
        return hidden if self.scale == 1 else hidden * self.scale

    def rounded(self, features: Tensor) -> Tensor:
        """Round the matrix' input as a quantized layer does."""
        return features if self.packed is None else self.packed.rounded(features)

    def features(self, hidden: Tensor) -> Tensor:
        """Return the input of the matrix V × D; any leading axes."""
        return self.rounded(self.transform(hidden))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features = self.transform(hidden)
        if self.packed is not None:
            return self.packed.multiply(features, self.bias)
        return linear(features, self.weight, self.bias)


class MaskedHead(LanguageHead, name="mlm"):
    """Masked-language-model head: logits B T V = norm(f(hidden Wdᵀ + bd)) Wᵀ + b. Source: Devlin et al. 2018; its code."""

    own_spec = HeadSpec(weights=_MASKED)

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__(config, spec)
        self.dense = nn.Linear(config.width, config.width)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]

    def transform(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


def first(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Pool the first real token: BERT's [CLS], RoBERTa's <s>."""
    if attention_mask is None:
        return hidden_BTD[:, 0]
    place_B = attention_mask.long().argmax(-1)  # of equal values, argmax takes the first
    return hidden_BTD[torch.arange(hidden_BTD.size(0), device=place_B.device), place_B]


def last(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Pool the last real token, by the mask rather than by id: the only one that has seen a whole causal text."""
    if attention_mask is None:
        return hidden_BTD[:, -1]
    place_T = torch.arange(1, hidden_BTD.size(1) + 1, device=hidden_BTD.device)
    place_B = (attention_mask.long() * place_T).argmax(-1)
    return hidden_BTD[torch.arange(hidden_BTD.size(0), device=place_B.device), place_B]


def mean(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Pool the mean of the real tokens; 0 where a row has none."""
    if attention_mask is None:
        return hidden_BTD.mean(1)
    real_BT1 = attention_mask.bool()[..., None]
    return hidden_BTD.masked_fill(~real_BT1, 0).sum(1) / real_BT1.sum(1).clamp(min=1)


def maximum(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Pool the largest value of each feature over the real tokens; 0 where a row has none."""
    if attention_mask is None:
        return hidden_BTD.amax(1)
    real_BT1 = attention_mask.bool()[..., None]
    largest_BD = hidden_BTD.masked_fill(~real_BT1, -torch.inf).amax(1)
    return largest_BD.masked_fill(~real_BT1.any(1), 0)  # such a row only fills a batch up: -inf would make its gradient NaN


POOLS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"first": first, "last": last, "mean": mean, "max": maximum}


class PooledHead(Head):
    """Classification head on one pooled vector: logits B C = tanh(h Wdᵀ + bd) Wᵀ + b, or h Wᵀ + b where the family has no dense
    layer.

    RoFormer has its own activation instead of tanh. Dropout precedes the last matrix (RoBERTa's code applies it before the
    dense layer as well). Where the first token is pooled and a prompt precedes the text, that is the prompt's first vector,
    as in PEFT. classes: C; None: no last matrix, logits are B D. pool: default: the family's own.

    pool "concat": W is C × 3D and reads [t, max, mean]: the family's pooled token t (through the dense layer, if any), and the
    largest value and the mean of each feature over the real tokens of the text. ULMFiT puts two linear layers with batch norm
    on that vector. Source: Howard & Ruder 2018, arXiv 1801.06146, section 3.3.
    """

    is_pooled = True
    own_spec = HeadSpec(weights=_OUT)

    def __init__(self, config: ModelConfig, spec: HeadSpec, classes: int | None, pool: Pool | None = None):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width) if spec.dense else None
        self.more = (maximum, mean) if pool == "concat" else ()
        width = (1 + len(self.more)) * config.width
        self.out = nn.Linear(width, classes, spec.bias) if classes is not None else nn.Identity()
        self.activation = ACTIVATIONS[config.activation] if spec.own_activation else torch.tanh
        self.pool = POOLS[spec.pool if pool in (None, "concat") else pool]
        self.dropout = config.dropout if classes is not None else 0.0

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        return output._replace(logits=self.pooled(output, attention_mask))

    def pooled(self, output: Output, attention_mask: Tensor | None) -> Tensor:
        """Return the logits B C of a body's output."""
        if self.pool is first and output.prompt is not None:
            pooled_BD = output.prompt[:, 0]
        else:
            pooled_BD = self.pool(output.hidden, attention_mask)
        if self.dense is not None:
            pooled_BD = self.activation(self.dense(pooled_BD))
        more = [pool(output.hidden, attention_mask) for pool in self.more]
        vector_BJ = torch.cat((pooled_BD, *more), dim=-1) if more else pooled_BD
        return self.out(F.dropout(vector_BJ, self.dropout, self.training))

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.pooled(Output(None, hidden_BTD), attention_mask)


class NextSentenceHead(PooledHead, name="nsp"):
    """Next-sentence prediction: logits B 2; class 0: it is the next sentence, 1: it is not."""

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__(config, spec, classes=2)


class PretrainingHead(MaskedHead, name="pretraining"):
    """BERT's two heads at once: masked tokens (logits B T V) and next sentence (pair_logits B 2)."""

    own_spec = HeadSpec(weights=_MASKED + _PAIR)

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__(config, spec)
        self.pair = NextSentenceHead(config, spec)

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        return super().read(output, attention_mask)._replace(pair_logits=self.pair.pooled(output, attention_mask))


class SequenceHead(PooledHead, name="sequence"):
    """Sequence classification: logits B C with C = labels; one label is regression. The pooling is `config.pool`'s."""

    has_labels = True

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__(config, spec, config.labels, config.pool)


class TokenHead(Head, name="token"):
    """Token classification: logits B T C = h Wᵀ + b with C = labels."""

    has_labels = True
    own_spec = HeadSpec(weights=_OUT)

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__()
        self.out, self.dropout = nn.Linear(config.width, config.labels, spec.bias), config.dropout

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(F.dropout(hidden_BTD, self.dropout, self.training))


class SpanHead(Head, name="qa"):
    """Extractive question answering: logits B T 2 = h Wᵀ + b, start and end of the answer."""

    own_spec = HeadSpec(weights=_OUT)

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__()
        self.out = nn.Linear(config.width, 2, spec.bias)

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(hidden_BTD)


class ValueHead(Head, name="value"):
    """One value a token, for reinforcement learning: logits B T = h wᵀ + b."""

    own_spec = HeadSpec(weights=_OUT)

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__()
        self.out = nn.Linear(config.width, 1, spec.bias)

    def forward(self, hidden_BTD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(hidden_BTD)[..., 0]


class PoolerHead(PooledHead, name="pooler"):
    """BERT's pooler: logits B D = tanh(h Wdᵀ + bd) of the pooled token."""

    is_part_of_body = True
    own_spec = HeadSpec(weights=_DENSE, dense=True)

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__(config, spec, classes=None)


class NoHead(Head, name="none"):
    """Hidden states alone; logits stay None."""

    is_part_of_body = True

    def __init__(self, config: ModelConfig, spec: HeadSpec):
        super().__init__()

    def read(self, output: Output, attention_mask: Tensor | None) -> Output:
        return output


TIED_HEADS = tuple(name for name, head in HEADS.items() if head.is_language_model)
POOLED_HEADS = tuple(name for name, head in HEADS.items() if head.is_pooled)
CLASSIFIERS = tuple(name for name, head in HEADS.items() if head.has_labels)


def is_tied(config: ModelConfig) -> bool:
    """True where the head's matrix is the embedding."""
    return config.tie_embeddings and config.head in TIED_HEADS
