"""Floating-point operations a token, of the matrices and the attention scores in one training step.

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
    """Operations a token, forward and backward, of matrices and of attention scores.

    For an encoder-decoder: of one output token and one input token together, with texts of equal length.
    """

    matrices: float
    scores: float
    backward_matrices: float
    backward_scores: float

    @property
    def forward(self) -> float:
        """All operations of the forward pass."""
        return self.matrices + self.scores

    @property
    def backward(self) -> float:
        """All operations of the backward pass."""
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
    """Count operations a token: forward = 2 · Σ O · I + 4 · H · K · pairs / T over all layers; backward = 2 · forward.

    pairs: the (query, key) pairs that the mask allows (causal, window), as a kernel computes that skips masked blocks;
    `skip_masked=False`: all T · S. The backward of a matrix is one product for its input and one for its weight. With adapters
    of `rank` > 0 the base is frozen: its inputs' gradients remain (counted everywhere, although none is needed below the first
    adapter), its weights' do not. `scored`: the share of positions with a label, which alone the head reads. `recompute`:
    the blocks' forward once more, as part of the backward. A kernel that recomputes the scores in its backward (flash
    attention) does a quarter more there, which is not counted.

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
    """Return all weights that multiply a token; the head's also where it is the embedding."""
    found = [p for p in parameters(config).values() if len(p.shape) == 2 and p.role in ("matrix", "head")]
    if is_tied(config):
        shape = (config.vocab_size, config.width)
        found.append(Parameter("head.weight", shape, "head", "head", True))
    return tuple(found)


def matrix_rows(config: ModelConfig, matrix: Parameter, context: int, scored: float = 1.0) -> float:
    """Return the rows that a matrix multiplies per token: 1; for the head `scored`, or 1 / T if it pools one token."""
    pooled = matrix.name.startswith("head.pair.") or (matrix.part == "head" and config.head in POOLED_HEADS)
    if pooled:
        return 1 / context
    return scored if matrix.part == "head" else 1.0


def score_flops(config: ModelConfig, context: int, *, skip_masked: bool = True) -> float:
    """Count the operations a token of q kᵀ and weights v: 4 · H · K for each pair, over the layers of all stacks."""
    causal = config.architecture != "encoder"
    total = 0
    for layer in config.decoder_layers if causal else config.layers:
        total += allowed_pairs(context, causal, layer.window) if skip_masked else context**2
    if config.architecture == "encoder-decoder":
        for layer in config.layers:
            total += allowed_pairs(context, False, layer.window) if skip_masked else context**2
        total += len(config.decoder_layers) * context**2  # cross-attention
    return 4 * config.heads * config.head_width * total / context


def allowed_pairs(length: int, causal: bool, window: int | None) -> int:
    """Count the allowed pairs of query t and key s: s <= t if causal, t - s < window.

    >>> allowed_pairs(4, True, None), allowed_pairs(4, True, 2), allowed_pairs(4, False, None), allowed_pairs(4, False, 2)
    (10, 7, 16, 13)
    """
    far = max(length - window, 0) if window is not None else 0
    return (length * (length + 1) // 2 if causal else length**2) - far * (far + 1) // 2
