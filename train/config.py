"""The settings of a training run: the dataclasses behind `python -m train --help`. They import no torch.

A value "auto" is resolved once, when the run starts; the run's `config.toml` holds the resolved value.
"""

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

from data.config import DataConfig, parse_named_paths
from lora.config import CONFIGS
from quant.config import FourBit, QatConfig
from train.check import check
from train.losses.choose import LOSSES
from train.optimizers.precision import PRECISIONS
from train.optimizers.registry import optimizer_names
from train.optimizers.schedule import SCHEDULES
from train.recompute import MODES

# Defaults of every objective; those of one objective stand in its task. They are what two minutes on two cores are best spent
# on, in bits per byte of runs like the default one (docs/LOG.md, 2026-11-21). Muon's rate: beside 0.03 with 8 texts a step,
# 0.05 costs 0.040 and 0.02 costs 0.016; 0.04 goes with the 16 of the default. Decay: 0.1 costs 0.003, none 0.06, 0.4 0.02.
DEFAULT_MATRIX_LR = 4e-2
DEFAULT_DECAY = 0.2
# With --init, learning rates are pretraining's divided by INIT_LR_DIVISOR: measured on the default network, of width 128. For a
# wider one --lr is scaled by 128 / width too: 3e-5 at 4,096.
INIT_LR_DIVISOR = 8
DEFAULT_WIDTH = 128
QAT_BITS = {"int8": 8, "int4": 4}
ANCHORS = ("none", "l2-sp", "ewc", "ewc-empirical")


def also(*aliases: str) -> dict[str, tuple[str, ...]]:
    """Other names of a field's option, known from other trainers."""
    return {"aliases": aliases}


@dataclass(frozen=True)
class RunConfig:
    """Run: what to train, from which weights, where, how long, on which device."""

    objective: str = "clm"
    """The training objective: a file of train/tasks (listed above), or PATH.py, your own task file (its code is run)."""
    out: Path | None = field(default=None, metadata=also("--output-dir"))
    """The run's folder. Default: runs/PRESET-DATE-TIME. Also --output-dir."""
    resume: Path | None = field(default=None, metadata=also("--resume-from-checkpoint"))
    """Resume the run in this folder with its own settings; only a few other options go with it. Also
    --resume-from-checkpoint."""
    recipe: str | None = None
    """Take the defaults from this TOML file, or from train/recipes/NAME.toml; options override it."""
    init: Path | None = field(default=None, metadata=also("--model-name-or-path"))
    """Start from this run's or model folder's weights and tokenizer instead of random weights. Also --model-name-or-path."""
    adapter: Literal["none", *CONFIGS] = "none"
    """Freeze the weights of --init and train an adapter (--lora.r and so on); only the adapter is saved."""
    quantize: Literal["none", *FourBit.SCHEMES] = "none"
    """With --adapter: quantize the matrices of --init to 4 bits, with double quantization (QLoRA)."""
    qat: Literal["none", *QAT_BITS] = "none"
    """Quantization-aware training: every step rounds weights to this format, and inputs to INT8 (--qat.granularity and so on);
    checkpoints hold the quantized network."""
    steps: int = field(default=700, metadata=also("--max-steps"))
    """Optimizer steps. With --resume: a larger number makes the run longer (see --extend). Also --max-steps."""
    epochs: float | None = field(default=None, metadata=also("--num-train-epochs"))
    """Passes over the data, in place of --steps. Also --num-train-epochs."""
    extend: Literal["hold", "replan"] | None = None
    """With --resume and more --steps: hold keeps the last learning rate, replan recomputes the schedule over all steps. Not
    needed for --schedule constant and inverse_sqrt, which have no end."""
    freeze: str | None = None
    """Freeze a part of the network: no gradient, moments or decay. all: what --init brings, so that its new head learns; body:
    embeddings and layers; embeddings; top:K: all below the top K layers; else a regular expression for names of weights, ours
    or the published ones."""
    unfreeze: str | None = None
    """Gradual unfreezing: train the head first, and one more layer from the top each epoch (gradual), or each N steps (a
    number); the embeddings last, and with them a head that shares their matrix."""
    seed: int = 0
    """Seed of initial weights, batches, dropout and samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    mesh: str | None = None
    """Under torchrun, the arrangement of ranks: replicate (DDP; default), shard (FSDP2), or replicate=2,shard=4."""
    on_nonfinite: Literal["stop", "skip"] | None = None
    """After a loss or gradient that is inf or NaN: stop the run (default), or skip that batch."""


@dataclass(frozen=True)
class RecordedConfig:
    """Values that a run records for its resume; no option sets them."""

    objective_sha256: str | None = None
    """SHA-256 of the user's file in --objective PATH.py."""
    reward_sha256: tuple[str, ...] | None = None
    """SHA-256 of each user file in --reward PATH.py:FUNCTION, in their order."""
    epochs: float | None = None
    """The value of --epochs, which --steps holds in steps."""
    scheduled_steps: int | None = None
    """Steps of the schedule, where a resume has added steps after its end."""
    decoder_start_id: int | None = None
    """The id that starts an encoder-decoder's decoder: the network's own."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network: a preset, and changes to it."""

    preset: str | None = None
    """A published shape (`python -m model info` lists them) or one of our own. Default: the objective's."""
    context: int | None = field(default=None, metadata=also("--max-seq-length"))
    """Tokens in a training sequence, and the longest that the network reads. Default: the preset's; with --init the network's,
    at most 2,048. Also --max-seq-length."""
    width: int | None = field(default=None, metadata=also("--hidden-size"))
    """D, the width of the hidden state. Also --hidden-size."""
    depth: int | None = field(default=None, metadata=also("--num-layers"))
    """Number of layers; in an encoder-decoder, of each stack. Also --num-layers."""
    heads: int | None = field(default=None, metadata=also("--num-heads"))
    """Number of attention heads (key/value heads follow). Also --num-heads."""
    mlp_width: int | None = field(default=None, metadata=also("--intermediate-size"))
    """F, the width of the feed-forward layer. Also --intermediate-size."""
    dropout: float | None = None
    """Dropout of embedding, sublayers (in families that have it) and attention weights. Default: 0; with --init its own."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Batch size, optimizer and learning-rate schedule."""

    batch_size: int = field(default=16, metadata=also("--train-batch-size"))
    """Sequences in a micro-batch, over all ranks. Also --train-batch-size."""
    accumulate: int = field(default=1, metadata=also("--gradient-accumulation-steps"))
    """Micro-batches in an optimizer step. Also --gradient-accumulation-steps."""
    optimizer: Literal[*optimizer_names()] | None = None
    """The optimizer. adamw8bit: AdamW with its moments in 8 bits. muon: hidden matrices by Muon, the rest by AdamW. sgd: with
    momentum. Default: muon; with an adapter adamw."""
    lr: float | None = field(default=None, metadata=also("--learning-rate"))
    """Peak learning rate (of AdamW; Muon has --matrix-lr). Default: set by the objective, tuned for small networks; with
    --init an eighth of it, times 128/width if the width is above 128; with --adapter the method's own. Also --learning-rate."""
    matrix_lr: float | None = None
    """Muon's peak learning rate. Default: 4e-2, or the objective's; with --init an eighth."""
    layer_rate: float = 1.0
    """Learning rate of each layer, times that of the one above; the head has --lr, the embeddings (and a head that shares their
    matrix) the lowest rate."""
    weight_decay: float | None = None
    """Decoupled weight decay, of matrices and embeddings, not of norms and biases. Default: 0.2, with an adapter 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = field(default=1e-8, metadata=also("--adam-epsilon"))
    """AdamW's epsilon. Also --adam-epsilon."""
    momentum: float = 0.95
    """Muon's and SGD's momentum."""
    clip: float = field(default=1.0, metadata=also("--max-grad-norm"))
    """Largest global gradient norm; 0 turns clipping off. Also --max-grad-norm."""
    label_smoothing: float = 0.0
    """Label smoothing: this much probability is spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of (log Σ exp logits)², which keeps logits from drifting; 1e-4 is usual."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and exported; 0: none."""
    schedule: Literal[*SCHEDULES] = field(default="cosine", metadata=also("--lr-scheduler-type"))
    """The course of the learning rate after its peak. Also --lr-scheduler-type."""
    warmup: float = field(default=0.05, metadata=also("--warmup-ratio"))
    """Warm-up, as a fraction of the steps. Also --warmup-ratio."""
    final_lr: float = 0.0
    """Final learning rate, as a fraction of the peak (cosine, linear, wsd, slanted_triangular)."""


@dataclass(frozen=True)
class AnchorConfig:
    """Against forgetting: a penalty that holds the weights near those of --init."""

    anchor: Literal[*ANCHORS] = "none"
    """Add λ/2 Σ F (θ - θ*)² to the loss, where θ* are the weights of --init. l2-sp: F = 1. ewc: F is the diagonal of the Fisher
    information on the old text, with labels drawn from the model; ewc-empirical: with the text's own labels."""
    anchor_weight: float = 1.0
    """λ. F is per scored token: with ewc, 1 weighs a nat of the old text's loss like one of the new text's, to second order."""
    anchor_corpus: tuple[str, ...] = ()
    """The old text of ewc: built-in names, files, folders and globs, as of --corpus."""
    anchor_rows: int = 256
    """Rows of the old text that F is estimated from, each of --context tokens."""


@dataclass(frozen=True)
class RewardConfig:
    """Reward functions, for objectives that learn from rewards."""

    reward: tuple[str, ...] = ()
    """Functions that judge a reply, one or several. By name: exact, answer, number, format, arithmetic, length:N,
    length_target:N, regex:PATTERN, tests or tests:share (the reply's code is run); or PATH.py:FUNCTION, a function of your own
    (its code is run), called as f(prompts, completions, **columns) and returning a number or None for each reply."""
    reward_weights: tuple[float, ...] = ()
    """The factor of each reward. Default: 1 each."""
    reward_workers: int = 1
    """Processes that run the functions of your own files (0: the training's own, without a timeout), and sandboxes of --reward
    tests at a time."""
    reward_timeout: float | None = None
    """Seconds that a function of your own has for the replies to one prompt; then the run stops. Default: 30. Seconds that the
    code of a reply has in --reward tests; then it has failed. Default: 5."""
    allow_code_rewards: bool = False
    """Let --reward tests run the code that the network writes, in bubblewrap. --resume needs it again; no recipe has it."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The factor of each reward, defaults included."""
        return self.reward_weights or (1.0,) * len(self.reward)

    @property
    def function_seconds(self) -> float:
        """Seconds of a user's function, default included."""
        return 30.0 if self.reward_timeout is None else self.reward_timeout

    @property
    def test_seconds(self) -> float:
        """Seconds of a reply's code, default included."""
        return 5.0 if self.reward_timeout is None else self.reward_timeout


@dataclass(frozen=True)
class SpeedConfig:
    """Speed and memory: precision, loss, recomputation, compilation."""

    precision: Literal["auto", *PRECISIONS] = "auto"
    """bf16, fp16: autocast with float32 weights; bf16-pure: weights in bfloat16 too, with stochastic rounding. auto: bf16 on a
    GPU, and for networks of width 512 and more on a CPU that multiplies bfloat16 (AVX512_BF16, AMX); else fp32."""
    loss: Literal["auto", *LOSSES] = "auto"
    """Cross-entropy from all logits at once, or chunk by chunk. auto: chunked where the logits are large."""
    recompute: Literal[*MODES] = field(default="none", metadata=also("--activation-checkpointing"))
    """Activation checkpointing, to save memory: run blocks again in the backward; selective keeps the results of their matrix
    products. Also --activation-checkpointing."""
    recompute_every: int = 1
    """With --recompute: run every Nth block again."""
    reshard: Literal["on", "off"] = "on"
    """With --mesh shard: free a block's gathered weights after its forward, rather than keep them for the backward."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block. auto: on a GPU."""
    deterministic: Literal["auto", "on", "off"] = "auto"
    """Deterministic kernels only, which repeat bit for bit. auto: on a CPU."""
    attention: Literal["sdpa", "reference"] = "sdpa"
    """torch's fused attention, or the plain reference."""


@dataclass(frozen=True)
class ReportConfig:
    """Reports and checkpoints."""

    log_every: int | None = field(default=None, metadata=also("--logging-steps"))
    """Steps between lines of metrics.jsonl. Default: 10; 1 where each step samples its own replies. Also --logging-steps."""
    log: Literal["tensorboard"] | None = None
    """Write the numbers of metrics.jsonl for TensorBoard too, in RUN/tensorboard (pip install tensorboard)."""
    eval_every: int | None = field(default=None, metadata=also("--eval-steps"))
    """Steps between validations. Default: a sixth of the steps, at most 100. Also --eval-steps."""
    eval_tokens: int = 200_000
    """Maximum number of validation tokens; of each corpus of --eval-corpus too."""
    eval_corpus: tuple[str, ...] = ()
    """NAME=PATH NAME=PATH …: further texts or records that each validation scores, as loss_NAME; of stdlib-docs and
    stdlib-code their held-out part. They do not choose the best checkpoint."""
    sample_every: int = 200
    """Steps between text samples, with one more at the end; 0: none."""
    save_every: int | None = field(default=None, metadata=also("--save-steps"))
    """Steps between checkpoints (the best validation and the last step are always saved). Default: that of --eval-every. Also
    --save-steps."""
    keep: int = field(default=3, metadata=also("--save-total-limit"))
    """Number of latest checkpoints to keep; the best is kept anyway. Also --save-total-limit."""
    early_stop: int = 0
    """Stop after this many validations without a new best; 0: never."""
    early_stop_on: tuple[str, ...] = ()
    """Scores of the validation that --early-stop watches; one that improves is enough to go on. Default: the one that chooses
    the best checkpoint."""
    min_delta: float = 0.0
    """A new best of --early-stop gains more than this; less does not count."""
    keep_best: bool = False
    """At the end put the weights of the best validation back into the network, as other commands read a run anyway."""
    verbose: bool = True
    """Print progress, not only errors and the end."""
    profile: bool = False
    """Profile a few steps: a Chrome trace and a table of the slowest operators in RUN/profile/."""
    memory_report: bool = False
    """After the second step, print its predicted and measured memory."""
    dry_run: bool = False
    """Set the run up, check everything, estimate memory, time and disk, and train nothing."""

    @property
    def eval_corpora(self) -> dict[str, tuple[str, ...]]:
        """{name: paths} of `eval_corpus`."""
        return parse_named_paths(self.eval_corpus, "--eval-corpus")


@dataclass(frozen=True)
class CommonConfig:
    """The settings of every run, without those of adapters."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    recorded: RecordedConfig = field(default_factory=RecordedConfig)


# One field per adapter method, under its name.
_Fields = make_dataclass(
    "_Fields",
    [(name, kind, field(default_factory=kind)) for name, kind in CONFIGS.items()],
    bases=(CommonConfig,),
    frozen=True,
)


@dataclass(frozen=True)
class TrainConfig(_Fields):
    """Train a language model on real text; without options: a small LLaMA on Python's own documentation, in about two
    minutes on two CPU cores."""

    @property
    def method(self) -> Any:
        """The settings of the adapter of --adapter; None without one."""
        return None if self.run.adapter == "none" else getattr(self, self.run.adapter)

    def check(self) -> None:
        """Refuse invalid values (TrainError); each message names the option and the value."""
        check(self)


def optimizer_of(config: TrainConfig) -> str:
    """The optimizer of --optimizer, else the default."""
    return config.optimizer.optimizer or ("muon" if config.method is None else "adamw")
