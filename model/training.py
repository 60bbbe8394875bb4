"""The settings of training that its memory depends on."""

from dataclasses import dataclass
from typing import NamedTuple

from model.config import ConfigError

USUAL_CONTEXT = 2048  # tokens of a text in training, for networks with a longer context
WIDE = 4  # bytes of a float32 number
HALF = 2  # of a 16-bit one
# As in train.losses.chunked: bytes of the float32 logits of one chunk of rows, and its fewest rows.
CHUNK_BYTES, CHUNK_ROWS = 2**25, {"cpu": 512, "cuda": 1024}


class Kernels(NamedTuple):
    """The differences between torch's CPU and GPU operators in the tensors that they save for the backward."""

    fused_rms_norm: bool  # else the normalized values are saved beside the input, for the weight
    bool_dropout: bool  # saves a mask of one byte; else the noise itself
    fused_attention: bool  # also with dropout or with a trained bias; else these save the T × S weights


KERNELS = {"cuda": Kernels(True, True, True), "cpu": Kernels(False, False, False)}
METHODS = ("full", "lora", "qlora")
OPTIMIZERS = {"adamw": 2, "adamw8bit": 2, "muon": 1, "sgd": 1}  # moments; Muon's for the blocks' matrices, AdamW's for the rest
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "bf16-pure")
RECOMPUTATIONS = ("none", "blocks", "selective")
LOSSES = ("plain", "chunked", "triton")  # the last two never hold all logits, and need equal memory


@dataclass(frozen=True)
class Training:
    """The settings of one training run; names and values are those of `python -m train`."""

    batch_size: int = 1  # of a micro-batch
    context: int = 1024  # tokens of each text; of an encoder-decoder of the input and of the output
    method: str = "full"
    precision: str = "fp32"  # bf16, fp16: float32 weights and autocast; bf16-pure: weights and moments in 16 bits too
    recompute: str = "none"  # blocks save their input alone (selective: also products) and run again in the backward
    recompute_every: int = 1  # only blocks 0, k, 2k … of each stack
    loss: str = "plain"
    scored: float = 1.0  # share of the positions with a label; the head skips the others
    accumulate: int = 1  # micro-batches a step: from the second on, gradients exist during the forward
    optimizer: str = "adamw"
    ema: bool = False  # averages of the trained weights beside them, in float32
    rank: int = 8  # of adapters
    targets: str = "all-linear"  # of adapters: model.parameters.TARGETS
    frozen: frozenset[str] = frozenset()  # our names of parameters that get no gradient and no moments
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch_size", "context", "accumulate", "rank", "recompute_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.scored <= 1:
            raise ConfigError(f"scored={self.scored} must be a share, above 0 and at most 1")
        known = {"method": METHODS, "optimizer": OPTIMIZERS, "device": KERNELS, "precision": PRECISIONS}
        for name, values in (known | {"recompute": RECOMPUTATIONS, "loss": LOSSES}).items():
            if getattr(self, name) not in values:
                raise ConfigError(f"unknown {name}={getattr(self, name)!r}; known: {', '.join(values)}")

    @property
    def is_mixed(self) -> bool:
        """Autocast: matrices and attention in 16 bits, weights and the residual stream in 32."""
        return self.precision in ("bf16", "fp16")

    @property
    def itemsize(self) -> int:
        """Bytes of a number inside matrices and attention."""
        return WIDE if self.precision in ("fp32", "tf32") else HALF

    @property
    def param_itemsize(self) -> int:
        """Bytes of a trained weight, of its gradient, its moments, and of a number between the blocks."""
        return HALF if self.precision == "bf16-pure" else WIDE

    def is_recomputed(self, block: int) -> bool:
        """Return True where this block of a stack runs again in the backward."""
        return self.recompute != "none" and block % self.recompute_every == 0

    def chunk_rows(self, rows: int, classes: int) -> int:
        """Return the rows of one chunk of logits."""
        return min(rows, max(CHUNK_ROWS[self.device], CHUNK_BYTES // (WIDE * classes)))

    def chunk_classes(self, classes: int, width: int) -> int:
        """Return the rows of the head's matrix in one chunk of its gradient, where it is summed from 16 bits."""
        return min(classes, max(1, CHUNK_BYTES // (WIDE * width)))
