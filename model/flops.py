"""Floating-point operations a token: what the matrices and the attention scores of one training step cost.

A multiply-add counts as 2. Norms, activations, softmax and the loss are left out (a few per cent of a small network,
less of a large one), as in the papers on scaling.
Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
"""

from dataclasses import dataclass

from model.config import ModelConfig
from model.heads import POOLED_HEADS, is_tied
from model.parameters import Parameter, adapted_matrices, parameters


@dataclass(frozen=True)
class Flops:
    """Operations a token, forward and backward, matrices and attention scores apart.

    Of an encoder-decoder: of one token of the output with one of the input, the two texts being of one length.
    """

    matrices: float
    scores: float
    backward_matrices: float
    backward_scores: float

    @property
    def forward(self) -> float:
        return self.matrices + self.scores

    @property
    def backward(self) -> float:
        return self.backward_matrices + self.backward_scores


def flops_per_token(
    config: ModelConfig,
    context: int,
    *,
    rank: int = 0,
    targets: str = "all-linear",
    recompute: bool = False,
    skip_masked: bool = True,
    scored: float = 1.0,
) -> Flops:
    """forward = 2 · Σ O · I + 4 · H · K · pairs / T over all layers; backward = 2 · forward.

    `pairs` counts the (query, key) pairs that the mask allows: the causal half, and of windowed layers what the window
    reaches, which is what a kernel that skips the masked blocks computes. `skip_masked=False`: all T · S of them.
    The backward of a matrix is one product for its input and one for its weight. With adapters of `rank` > 0 the base
    is frozen: its inputs' gradients remain (counted everywhere, though below the first adapter none is needed), its weights'
    do not. `scored`: the share of positions that the head reads, where it leaves out those without a label.
    `recompute`: the blocks' forward once more, as part of the backward. A kernel that also computes the scores
    anew in its backward (flash attention) does a quarter more there, which is not counted.

    >>> flops = flops_per_token(ModelConfig.preset("gpt2"), 1024)
    >>> round(flops.matrices / 1e6), round(flops.scores / 1e6)
    (247, 19)
    """
    base = {p.name: 2 * matrix_rows(config, p, context, scored) * p.size for p in matrices(config)}
    added = 0.0
    if rank:
        added = sum(2 * matrix_rows(config, p, context) * rank * sum(p.shape) for p in adapted_matrices(config, targets))
    forward = sum(base.values()) + added
    scores = score_flops(config, context, skip_masked=skip_masked)
    backward = sum(base.values()) * (1 if rank else 2) + 2 * added
    again = sum(value for name, value in base.items() if ".blocks." in name) + added if recompute else 0.0
    return Flops(forward, scores, backward + again, scores * (3 if recompute else 2))


def matrices(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every weight that a token is multiplied with; the head's also where it is the embedding."""
    found = [p for p in parameters(config).values() if len(p.shape) == 2 and p.role in ("matrix", "head")]
    if is_tied(config):
        shape = (config.vocab_size, config.width)
        found.append(Parameter("head.weight", shape, "head", "head", True))
    return tuple(found)


def matrix_rows(config: ModelConfig, matrix: Parameter, context: int, scored: float = 1.0) -> float:
    """How many rows a matrix multiplies for each token: 1, the head's `scored`, or if it reads one token of the text 1 / T."""
    pooled = matrix.name.startswith("head.pair.") or (matrix.part == "head" and config.head in POOLED_HEADS)
    if pooled:
        return 1 / context
    return scored if matrix.part == "head" else 1.0


def score_flops(config: ModelConfig, context: int, *, skip_masked: bool = True) -> float:
    """q kᵀ and weights v: 4 · H · K for each pair of query and key, a token, over the layers of all stacks."""
    causal = config.architecture != "encoder"
    total = 0
    for layer in config.decoder_layers if causal else config.layers:
        total += allowed_pairs(context, causal, layer.window) if skip_masked else context**2
    if config.architecture == "encoder-decoder":
        for layer in config.layers:
            total += allowed_pairs(context, False, layer.window) if skip_masked else context**2
        total += len(config.decoder_layers) * context**2  # across
    return 4 * config.heads * config.head_width * total / context


def allowed_pairs(length: int, causal: bool, window: int | None) -> int:
    """How many (query t, key s) are allowed: s <= t if causal, t - s < window.

    >>> pairs(4, True, None), pairs(4, True, 2), pairs(4, False, None), pairs(4, False, 2)
    (10, 7, 16, 13)
    """
    far = max(length - window, 0) if window is not None else 0
    return (length * (length + 1) // 2 if causal else length**2) - far * (far + 1) // 2
