"""What a training run is told: the dataclasses behind `python -m train --help`. Standard library only.

A value "auto" is resolved once, when the run starts, and what was chosen stands in the run's `config.toml`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.config import DataConfig
from lora.config import (
    CONFIGS,
    AdaloraConfig,
    AdapterConfig,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    PtuningConfig,
)
from quant.config import QatConfig
from train.losses.choose import LOSSES
from train.optimizers.precision import PRECISIONS
from train.optimizers.registry import optimizer_names
from train.optimizers.schedule import SCHEDULES
from train.recompute import MODES
from train.runs.errors import TrainError

# Where nothing else is asked for, whatever the objective (what each has of its own, its task says): measured, see LOG.md.
DEFAULT_MATRIX_LR = 4e-2
DEFAULT_DECAY = 0.2
# What pretraining's rates are divided by where weights are trained further (--init): measured on the default network. Of larger
# networks the rate falls with the width, from that of the default one (128) on: 3e-5 at 4,096.
FURTHER = 8
WIDTH = 128
# With an adapter, whatever the objective: for networks as small as the default presets (large ones want less; LoRA's 2e-4).
ADAPTER_LR = {
    "lora": 1e-2,
    "dora": 1e-2,
    "adalora": 1e-2,
    "ia3": 1e-1,
    "adapter": 5e-3,
    "prompt": 1e-1,
    "ptuning": 5e-3,
    "prefix": 1e-1,
}

def also(*aliases: str) -> dict[str, tuple[str, ...]]:
    """Other names of a field's option, known from other trainers."""
    return {"aliases": aliases}


@dataclass(frozen=True)
class RunConfig:
    """The run: what is trained, where to, for how long."""

    objective: str = "clm"
    """What is learned: a file of train/tasks (listed above), or PATH.py, a task's file of your own, which is run."""
    out: Path | None = field(default=None, metadata=also("--output-dir"))
    """The run's folder. Default: runs/PRESET-DATE-TIME. Also --output-dir."""
    resume: Path | None = field(default=None, metadata=also("--resume-from-checkpoint"))
    """Go on with the run in this folder, with its own settings; no other option goes with it. Also --resume-from-checkpoint."""
    recipe: str | None = None
    """Start from the settings in this TOML file, or in train/recipes/NAME.toml; other options still win."""
    init: Path | None = field(default=None, metadata=also("--model-name-or-path"))
    """Start from this run's or model folder's weights and tokenizer instead of random weights. Also --model-name-or-path."""
    adapter: Literal["none", *CONFIGS] = "none"
    """Freeze the weights of --init, and train a small part beside them (--lora.r and so on); only that part is saved."""
    quantize: Literal["none", "nf4", "fp4"] = "none"
    """With --adapter: hold the matrices of --init in four bits, their scales quantized too (QLoRA)."""
    qat: Literal["none", "int8", "int4"] = "none"
    """Quantization-aware training: compute every step with weights rounded so and inputs in INT8 (--qat.granularity and so on);
    checkpoints hold the quantized network."""
    steps: int = field(default=700, metadata=also("--max-steps"))
    """Optimizer steps. With --resume more than the run had: it goes on (see --extend). Also --max-steps."""
    epochs: float | None = field(default=None, metadata=also("--num-train-epochs"))
    """In place of --steps: how often the data are seen. Also --num-train-epochs."""
    extend: Literal["hold", "replan"] | None = None
    """With --resume and more --steps, where the schedule has come to its end: hold the rate that it ended with, or replan it,
    as if the run had had so many steps from the beginning. A constant rate and inverse_sqrt go on by themselves."""
    freeze: str | None = None
    """Leave weights as they are in whose name (ours or the published one) this regular expression is found: no gradient, no
    moments, no decay."""
    seed: int = 0
    """Decides first weights, batches, dropout and samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    mesh: str | None = None
    """Under torchrun, how ranks share the work: replicate (DDP; default), shard (FSDP2), or replicate=2,shard=4."""
    on_nonfinite: Literal["stop", "skip"] | None = None
    """A loss or gradient that is inf or NaN: stop the run (default), or leave that batch out and go on."""


@dataclass(frozen=True)
class RecordedConfig:
    """What a run notes for its resume; no option sets it."""

    objective_sha256: str | None = None
    """Of the user's own file of --objective PATH.py."""
    epochs: float | None = None
    """That --epochs asked for; --steps has what they are in steps."""
    scheduled_steps: int | None = None
    """That the schedule spans, where a resume has added steps behind it."""
    decoder_start_id: int | None = None
    """What the texts of an encoder-decoder's decoder begin with: the network's own."""


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
    """Number of layers; of an encoder-decoder of each of its stacks. Also --num-layers."""
    heads: int | None = field(default=None, metadata=also("--num-heads"))
    """Number of attention heads (key/value heads follow). Also --num-heads."""
    mlp_width: int | None = field(default=None, metadata=also("--intermediate-size"))
    """F, the width of the feed-forward layer. Also --intermediate-size."""
    dropout: float = 0.0
    """Of the embedding, the sublayers (families that have it) and the attention weights."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimization: what a step does."""

    batch_size: int = 16
    """Sequences in a micro-batch; ranks share them."""
    accumulate: int = field(default=1, metadata=also("--gradient-accumulation-steps"))
    """Micro-batches in an optimizer step. Also --gradient-accumulation-steps."""
    optimizer: Literal[*optimizer_names()] | None = None
    """adamw8bit: AdamW with its moments in 8 bits. muon: hidden matrices by Muon, the rest by AdamW. Default: muon, or adamw
    with an adapter."""
    lr: float | None = field(default=None, metadata=also("--learning-rate"))
    """The learning rate at its height (of AdamW, where Muon has its own). Default: the objective's, for networks as small as
    the default ones; with --init an eighth, and less the wider the network is; with an adapter by its method. Also
    --learning-rate."""
    matrix_lr: float | None = None
    """Muon's learning rate at its height. Default: 4e-2; with --init an eighth."""
    weight_decay: float | None = None
    """Decoupled; by parameter role: matrices and embeddings, not norms and biases. Default: 0.2, with an adapter 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = field(default=1e-8, metadata=also("--adam-epsilon"))
    """AdamW's epsilon. Also --adam-epsilon."""
    momentum: float = 0.95
    """Muon's and SGD's momentum."""
    clip: float = field(default=1.0, metadata=also("--max-grad-norm"))
    """Largest global gradient norm; 0 turns clipping off. Also --max-grad-norm."""
    label_smoothing: float = 0.0
    """Share of a target's probability that training spreads over the whole vocabulary."""
    z_loss: float = 0.0
    """Weight of (log Σ exp logits)², which keeps logits from drifting; 1e-4 is usual."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is validated and used; 0: none."""
    schedule: Literal[*SCHEDULES] = field(default="cosine", metadata=also("--lr-scheduler-type"))
    """The course of the learning rate after its peak. Also --lr-scheduler-type."""
    warmup: float = field(default=0.05, metadata=also("--warmup-ratio"))
    """Warm-up, as a fraction of the steps. Also --warmup-ratio."""
    final_lr: float = 0.0
    """The learning rate at the end, as a fraction of its height (cosine, linear, wsd, slanted_triangular)."""


@dataclass(frozen=True)
class SpeedConfig:
    """Speed: the same numbers, sooner."""

    precision: Literal["auto", *PRECISIONS] = "auto"
    """bf16, fp16: autocast with float32 weights; bf16-pure: all in 16 bits, rounded at random. auto: bf16 on a GPU, and for
    networks of width 512 and more on a CPU that multiplies bfloat16 (AVX512_BF16, AMX); else fp32."""
    loss: Literal["auto", *LOSSES] = "auto"
    """Cross-entropy of all logits at once, or a chunk at a time. auto: in chunks where they would be large."""
    recompute: Literal[*MODES] = "none"
    """Less memory: run blocks again in the backward; selective keeps what their matrix products gave."""
    recompute_every: int = 1
    """With --recompute: every so many blocks one is run again."""
    reshard: Literal["on", "off"] = "on"
    """With --mesh shard: give a block's gathered weights back after its forward, rather than keep them for the backward."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, a block at a time. auto: on a GPU."""
    deterministic: Literal["auto", "on", "off"] = "auto"
    """Only kernels that repeat bit for bit. auto: on a CPU."""
    attention: Literal["sdpa", "reference"] = "sdpa"
    """torch's fused attention, or the plain twin."""


@dataclass(frozen=True)
class ReportConfig:
    """Reports and checkpoints: how often, how many."""

    log_every: int = field(default=10, metadata=also("--logging-steps"))
    """Steps between lines of metrics.jsonl. Also --logging-steps."""
    eval_every: int | None = field(default=None, metadata=also("--eval-steps"))
    """Steps between validations. Default: a sixth of the steps, at most 100. Also --eval-steps."""
    eval_tokens: int = 200_000
    """Validate on at most so many tokens of the validation split."""
    sample_every: int = 200
    """Steps between text samples, and one at the end; 0: none."""
    save_every: int | None = field(default=None, metadata=also("--save-steps"))
    """Steps between checkpoints (the best validation and the last step are always saved). Default: as validations. Also
    --save-steps."""
    keep: int = field(default=3, metadata=also("--save-total-limit"))
    """How many of the latest checkpoints stay; the best stays anyway. Also --save-total-limit."""
    early_stop: int = 0
    """Stop after so many validations without a new best; 0: never."""
    verbose: bool = True
    """Print more than errors and the end."""
    profile: bool = False
    """Record a few steps: RUN/profile/ gets a Chrome trace and a table of the operators that take longest."""
    memory_report: bool = False
    """After the second step, print its memory: predicted, and measured."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on real text; without options: a small LLaMA on Python's own documentation, in about two
    minutes on two CPU cores."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dora: DoraConfig = field(default_factory=DoraConfig)
    adalora: AdaloraConfig = field(default_factory=AdaloraConfig)
    ia3: Ia3Config = field(default_factory=Ia3Config)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    ptuning: PtuningConfig = field(default_factory=PtuningConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    recorded: RecordedConfig = field(default_factory=RecordedConfig)

    @property
    def method(self) -> Any:
        """The settings of the adapter that is asked for; None without one."""
        return None if self.run.adapter == "none" else getattr(self, self.run.adapter)

    def check(self) -> None:
        """Refuse values that no run can have; each message names the option and its value."""
        run, optimizer, report = self.run, self.optimizer, self.report
        least = {
            "steps": (run.steps, 1),
            "seed": (run.seed, 0),
            "threads": (run.threads, 0),
            "batch-size": (optimizer.batch_size, 1),
            "accumulate": (optimizer.accumulate, 1),
            "log-every": (report.log_every, 1),
            "eval-every": (1 if report.eval_every is None else report.eval_every, 1),
            "eval-tokens": (report.eval_tokens, 2),
            "sample-every": (report.sample_every, 0),
            "save-every": (1 if report.save_every is None else report.save_every, 1),
            "keep": (report.keep, 1),
            "early-stop": (report.early_stop, 0),
            "clip": (optimizer.clip, 0),
            "lr": (0 if optimizer.lr is None else optimizer.lr, 0),
            "matrix-lr": (0 if optimizer.matrix_lr is None else optimizer.matrix_lr, 0),
            "z-loss": (optimizer.z_loss, 0),
            "recompute-every": (self.speed.recompute_every, 1),
            "weight-decay": (0 if optimizer.weight_decay is None else optimizer.weight_decay, 0),
        }
        for name, (value, minimum) in least.items():
            if not minimum <= value < math.inf:  # so that NaN is refused too
                raise TrainError(f"--{name} {value}: must be at least {minimum}, and finite")
        for name, value in (("warmup", optimizer.warmup), ("final-lr", optimizer.final_lr)):
            if not 0 <= value <= 1:
                raise TrainError(f"--{name} {value}: a fraction, from 0 to 1")
        rates = [
            ("momentum", optimizer.momentum),
            ("dropout", self.network.dropout),
            ("label-smoothing", optimizer.label_smoothing),
            ("ema", optimizer.ema),
        ]
        for name, value in rates + [("betas", beta) for beta in optimizer.betas]:
            if not 0 <= value < 1:
                raise TrainError(f"--{name} {value}: must be at least 0 and below 1")
        if run.seed >= 2**63:
            raise TrainError(f"--seed {run.seed}: must be below 2^63")
        if run.threads > 1024:
            raise TrainError(f"--threads {run.threads}: must be at most 1024, and is best at most the number of cores")
        for name in ("context", "width", "depth", "heads", "mlp_width"):
            value = getattr(self.network, name)
            if value is not None and value < 1:
                raise TrainError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if run.epochs is not None and not 0 < run.epochs < math.inf:
            raise TrainError(f"--epochs {run.epochs}: must be above 0, and finite")
        if run.freeze is not None and run.adapter != "none":
            raise TrainError(f"--freeze {run.freeze}: --adapter {run.adapter} freezes all weights of --init already")
        self.check_adapter()
        self.check_qat()

    def check_adapter(self) -> None:
        chosen = self.run.adapter
        if chosen != "none" and self.run.init is None:
            raise TrainError(f"--adapter {chosen} stands beside a network's weights: give them, --init RUN or a model folder")
        if chosen == "none" and self.run.quantize != "none":
            raise TrainError(f"--quantize {self.run.quantize}: weights of four bits stay as they are: add --adapter lora")
        if chosen != "none" and "shard" in (self.run.mesh or ""):
            raise TrainError(f"--adapter {chosen} does not go with --mesh {self.run.mesh}: replicate does")
        if chosen != "none" and self.speed.precision == "bf16-pure":
            raise TrainError(f"--adapter {chosen} is trained in float32: --precision bf16 has the network in 16 bits beside it")
        for name in CONFIGS:
            if name != chosen and getattr(self, name) != CONFIGS[name]():
                raise TrainError(f"--{name}.… says how an adapter is made that is not asked for: add --adapter {name}")

    def check_qat(self) -> None:
        chosen = self.run.qat
        if chosen == "none" and self.qat != QatConfig():
            raise TrainError("--qat.… says how numbers are rounded in a training that is not asked for: add --qat int8")
        if chosen != "none" and self.run.adapter != "none":
            raise TrainError(f"--qat {chosen} trains all weights, and --adapter {self.run.adapter} leaves them as they are")
        if chosen != "none" and "shard" in (self.run.mesh or ""):
            raise TrainError(f"--qat {chosen} does not go with --mesh {self.run.mesh}: replicate does")
        if chosen != "none" and self.speed.precision == "bf16-pure":
            raise TrainError(f"--qat {chosen}: 16-bit weights lose small steps; --precision bf16 has them in float32")


def optimizer_of(config: TrainConfig) -> str:
    """The one that is asked for, else the default."""
    return config.optimizer.optimizer or ("muon" if config.method is None else "adamw")
