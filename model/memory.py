"""Training memory: weights, gradients, optimizer state, and the peak of a step.

The estimate walks the tape of `model.activations`: the forward, the backward operation by operation, each of which frees its
saved tensors and leaves its weights' gradients, then the update. The peak is the static memory plus the highest moment. Not
included is memory outside tensors: the CUDA context (0.3 to 0.6 GiB), workspaces of libraries, fragmentation.
"""

from collections import Counter
from dataclasses import dataclass

from model.activations import Segment, activation_bytes, tape
from model.config import ModelConfig
from model.parameters import adapted_matrices, adapter_parameters, parameters_in_training
from model.training import HALF, OPTIMIZERS, WIDE, Training

# As in train.optimizers.adamw8bit: smaller tensors have float32 moments; others 8-bit codes and a float32 scale a block.
SMALLEST, BLOCK, PIECE = 4096, 256, {"cpu": 1 << 18, "cuda": 1 << 22}
PIECE_BYTES = 29  # per element of the piece that is updated at a time: both moments in float32, and the quantization of one
# NF4 in blocks of 64 whose scales are 8-bit in blocks of 256 (Dettmers et al. 2023, arXiv 2305.14314, section 3).
BITS = 4 + 8 / 64 + 32 / (64 * 256)
ROUNDING = 10  # bytes per element of a weight with stochastic rounding: random bits, and tests for inf and NaN
WIDENED_ELEMENTS = 1 << 24  # as in train.optimizers.named_optimizer: elements of 16-bit weights that are float32 at a time
BATCH_ELEMENTS = 1 << 27  # as in train.optimizers.muon: elements that are orthogonalised together


@dataclass(frozen=True)
class MemoryEstimate:
    """An estimate of one training step's memory, in bytes: by part, after the first forward, and at the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # without logits
    logits: float  # log-probabilities in float32, and at the peak their two gradients; or those of one chunk
    copies: float  # autocast's 16-bit copies of weights
    forward: float  # added by the forward of the first micro-batch
    peak: float


def training_memory(config: ModelConfig, training: Training) -> MemoryEstimate:
    """Estimate the memory that one device needs to train the whole network; errors: an unknown option (ConfigError).

    `full`: float32 weights and gradients, two moments for AdamW (in 8 bits for "adamw8bit"), one for SGD, one for the blocks'
    matrices for Muon; under autocast a 16-bit copy of each matrix lives from its forward to its backward; "bf16-pure": all in
    16 bits, except 8-bit moments. `lora`: the base is frozen, in float32, or in 16 bits with mixed precision; adapters, their
    gradients and moments are float32. `qlora`: likewise, with the blocks' matrices in 4.127 bits. Gradients are freed after
    each update; with one micro-batch a step they grow while activations are freed, with several they exist beside them.

    >>> memory = training_memory(ModelConfig.preset("gpt2"), Training(batch_size=8))
    >>> memory.weights == memory.gradients == memory.optimizer / 2 == 4 * 124439808
    True
    """
    segments = tape(config, training)
    weights, gradients, optimizer = static_bytes(config, training)
    saved = activation_bytes(config, training)
    copies = sum(segment.copies for segment in segments if not segment.entry)
    last = segments[-1].ops
    logits = sum(op.saved for op in last if op.name == "logits")
    workspace = sum(op.workspace for op in last)
    waiting = gradients if training.accumulate > 1 else 0.0
    moments = forward_peak(segments) + waiting, backward_peak(segments, waiting)
    peak = weights + optimizer + max(*moments, gradients + update_workspace(config, training))
    forward = saved + copies + sum(op.forward_grads for op in last)
    return MemoryEstimate(weights, gradients, optimizer, saved - logits, 3 * logits or workspace, copies, forward, peak)


def static_bytes(config: ModelConfig, training: Training) -> tuple[float, float, float]:
    """Return the bytes of weights, of all gradients, and of the optimizer's state with the weight averages."""
    everything, stored = parameters_in_training(config, training.frozen).values(), training.param_itemsize
    average = WIDE if training.ema else 0
    if training.method == "full":
        trained = [p for p in everything if p.trained]
        numbers = sum(p.size for p in trained)
        matrices = sum(p.size for p in trained if p.role == "matrix" and len(p.shape) == 2)
        moments = (2 * numbers - matrices) * stored if training.optimizer == "muon" else moment_bytes(config, training)
        return sum(p.size for p in everything) * stored, numbers * stored, moments + numbers * average
    added = adapter_parameters(config, training.rank, training.targets)
    packed = sum(p.size for p in everything if p.role == "matrix" and p.in_block) if training.method == "qlora" else 0
    rest = sum(p.size for p in everything) - packed
    base = packed * BITS / 8 + rest * (WIDE if training.itemsize == WIDE else HALF)
    # An adapter's two matrices are hidden matrices to the optimizer too.
    return base + added * stored, added * stored, moment_bytes(config, training) + added * average


def moment_bytes(config: ModelConfig, training: Training) -> float:
    """Return the bytes of the moments, for optimizers that update all tensors alike."""
    sizes = trained_sizes(config, training)
    if training.optimizer == "adamw8bit":
        return sum(2 * size + 2 * WIDE * -(-size // BLOCK) if size >= SMALLEST else 2 * WIDE * size for size in sizes)
    return OPTIMIZERS[training.optimizer] * training.param_itemsize * sum(sizes)


def forward_peak(segments: list[Segment]) -> float:
    """Return the peak of the forward, at the logits: everything saved (log-probabilities too), and the logits.

    Autocast holds its copies of the weights to the end of the forward, also those of recomputed blocks.
    """
    retained = sum(segment.retained + (segment.copies if segment.entry else 0) for segment in segments)
    return retained + sum(op.workspace + op.forward_grads for op in segments[-1].ops)


def backward_peak(segments: list[Segment], waiting: float) -> float:
    """Return the peak of the backward. `waiting`: gradients of earlier micro-batches."""
    live, grads, highest = sum(segment.retained for segment in segments), waiting, 0.0
    for segment in reversed(segments):
        is_recomputed = bool(segment.entry)
        if is_recomputed:  # the second forward replaces its results by all saved tensors
            live += segment.saved - segment.shared - segment.results
        for op in reversed(segment.ops):
            highest = max(highest, live + grads + segment.stream + op.transient + op.grads + op.pending)
            live += op.pending - op.saved - op.copies
            grads += 0 if waiting else op.grads
        live -= segment.entry - segment.shared if is_recomputed else 0
    return highest


def update_workspace(config: ModelConfig, training: Training) -> float:
    """Return the temporary memory of the optimizer's update: nothing for AdamW's kernel, a piece of the moments with 8 bits,
    the decayed gradients for SGD, the iteration for Muon; and float32 copies of 16-bit weights."""
    sizes, eight_bit = trained_sizes(config, training), training.optimizer == "adamw8bit"
    widened = piece = float(PIECE_BYTES * min(max(sizes), PIECE[training.device]) if eight_bit else 0)
    if training.param_itemsize == HALF:
        # Weight, gradient and moments of a few weights in float32; beside them SGD's step, or the rounding of one weight.
        few, slots = max(min(sum(sizes), WIDENED_ELEMENTS), max(sizes)), 0 if eight_bit else OPTIMIZERS[training.optimizer]
        passing = max(few * WIDE if training.optimizer == "sgd" else 0, max(sizes) * ROUNDING, piece)
        widened = few * WIDE * (2 + slots) + passing
    if training.optimizer == "muon":
        return widened + muon_workspace(config, training)
    return widened + (sum(sizes) * training.param_itemsize if training.optimizer == "sgd" and not widened else 0.0)


def trained_sizes(config: ModelConfig, training: Training) -> list[int]:
    """Return the size of each trained tensor."""
    if training.method == "full":
        return [p.size for p in parameters_in_training(config, training.frozen).values() if p.trained]
    return [training.rank * side for p in adapted_matrices(config, training.targets) for side in p.shape]


def muon_workspace(config: ModelConfig, training: Training) -> float:
    """Return Muon's workspace: the averaged update of every matrix; for those of one shape a float32 stack of them, and in the
    iteration's format (bfloat16 on a GPU) the iterate, the next one, and two squares."""
    if training.method == "full":
        trained = (p for p in parameters_in_training(config, training.frozen).values() if p.trained)
        shapes = [p.shape for p in trained if p.role == "matrix" and len(p.shape) == 2]
    else:
        sides = (p.shape for p in adapted_matrices(config, training.targets))
        shapes = [shape for out, into in sides for shape in ((training.rank, into), (out, training.rank))]
    size, highest, previous = 2 if training.device == "cuda" else WIDE, 0, 0
    for (out, into), count in Counter(shapes).items():
        stack = min(count, max(1, BATCH_ELEMENTS // (out * into)))
        numbers, squares = stack * out * into, stack * min(out, into) ** 2
        highest = max(highest, previous + numbers * (WIDE + 2 * size) + 2 * squares * size)
        previous = numbers * size  # this stack's result exists while the next one begins
    return sum(out * into for out, into in shapes) * WIDE + highest
