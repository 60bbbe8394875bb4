"""`python -m tests.bench NAME`: speed and memory as ratios, both sides in turn; medians.

    train     our training step beside a Hugging Face GPT2LMHeadModel loop of the same size, batch and dtype
    generate  tokens a second of our cached generation beside transformers' generate, the same network
    rollout_speed  sampled replies that end at different lengths: tokens a second beside transformers' generate
    loading   peak memory of model.hub.load beside transformers' from_pretrained, in fresh processes, over the weights' bytes
    engine    a training step on the CPU, eager, compiled, recomputed: operations a second beside the machine's products
    formats   a training step in bf16 beside fp32, at six widths: where --precision auto begins to choose bf16
    loss      time and memory of the head's chunked loss beside the plain one's
    ranks     two ranks of one thread each, DDP and FSDP2, beside one process of two threads
    adapters  LoRA's step beside PEFT's; and what each method learns of a new corpus, beside full fine-tuning (--steps, --base)
    quant     four bits on a CPU beside bitsandbytes: quantize, dequantize, the linear layer and its gradient
    llama     Llama-3-8B's linear layers in four bits, in memory (about four minutes)
    errors    what NF4, FP4 and INT4 change of real weights and of normal noise
    qlora     what four bits cost the end result: QLoRA beside LoRA, three seeds (--steps, --base)
    int8      INT8 on a CPU: generation beside bfloat16 and float32; one linear layer beside other libraries'
    qat       INT4 weights trained for, beside rounded afterwards: CLM and MLM, three seeds (--steps, --base)
    reversal  the first Transformer learns to reverse strings through the command: exact match and seconds, three seeds
    objectives  every objective through the command, beside its baseline, with an interval; half an hour (--only NAME,…)
    forgetting  continued pretraining on code: replay, rates, LoRA, EWC, L2 to the start; both domains
    fim       fill in the middle: its left-to-right loss beside clm's; middles with and without suffix (--steps, --base)
    transfer  a package's name from a docstring by 50, 200 and all labels, from pretrained and random weights; eight ways to
              fine-tune beside bag of words; half an hour (--only NAME;…, --steps, --base)
    sft       instruction tuning on the built-in conversations: before, after, with shuffled replies (--steps, --base)
    sft_speed  instruction tuning with LoRA beside TRL's SFTTrainer: tokens a second, padded, packed, as they come
    dpo_speed  preference pairs beside TRL's DPOTrainer: tokens a second and memory, reference live and precomputed, LoRA or not
    preference  a reward model, and every preference loss on built-in pairs: the rule kept, KL, cost; an hour (--only, --base)
    grpo_speed  steps of GRPO beside TRL's GRPOTrainer: reply tokens a second, generation included
    reinforcement  exact match on verifiable tasks before and after GRPO, RLOO, Dr. GRPO, with wrong rewards and a KL term;
              half an hour on two cores (--only TASK:ROW,…, --base)
    rlhf      PPO on a reward model at three KL weights, beside DPO and GRPO: reward, the true rule, KL; half an hour (--only
              ROW;…, --base)
    metrics   scores of texts beside the libraries that define them; the command's memory and start
    gpu       GPT-2 124M on a card, compiled, beside its own products and transformers
"""

import argparse
import platform

import torch

from tests.bench.adapters import bench_adapters
from tests.bench.dpo_speed import bench_dpo_speed
from tests.bench.engine import bench_engine
from tests.bench.errors import bench_errors
from tests.bench.fim import bench_fim
from tests.bench.forgetting import bench_forgetting
from tests.bench.formats import bench_formats
from tests.bench.generate import bench_generate
from tests.bench.gpu import bench_gpu
from tests.bench.grpo_speed import bench_grpo_speed
from tests.bench.int8 import bench_int8
from tests.bench.loading import bench_loading
from tests.bench.loss import bench_loss
from tests.bench.metrics import bench_metrics
from tests.bench.objectives import bench_objectives
from tests.bench.preference import bench_preference
from tests.bench.qat import bench_qat
from tests.bench.qlora import bench_qlora
from tests.bench.quant import bench_llama, bench_quant
from tests.bench.ranks import bench_ranks
from tests.bench.reinforcement import bench_reinforcement
from tests.bench.reversal import bench_reversal
from tests.bench.rlhf import bench_rlhf
from tests.bench.rollout_speed import bench_rollout_speed
from tests.bench.sft import bench_sft
from tests.bench.sft_speed import bench_sft_speed
from tests.bench.train import bench_train
from tests.bench.transfer import bench_transfer

BENCHES = {
    "train": bench_train,
    "generate": bench_generate,
    "rollout_speed": bench_rollout_speed,
    "loading": bench_loading,
    "engine": bench_engine,
    "formats": bench_formats,
    "loss": bench_loss,
    "ranks": bench_ranks,
    "adapters": bench_adapters,
    "quant": bench_quant,
    "llama": bench_llama,
    "errors": bench_errors,
    "qlora": bench_qlora,
    "int8": bench_int8,
    "qat": bench_qat,
    "reversal": bench_reversal,
    "objectives": bench_objectives,
    "forgetting": bench_forgetting,
    "fim": bench_fim,
    "transfer": bench_transfer,
    "sft": bench_sft,
    "sft_speed": bench_sft_speed,
    "dpo_speed": bench_dpo_speed,
    "preference": bench_preference,
    "grpo_speed": bench_grpo_speed,
    "reinforcement": bench_reinforcement,
    "rlhf": bench_rlhf,
    "metrics": bench_metrics,
    "gpu": bench_gpu,
}
TAKES_GIVEN = (
    *("adapters", "qlora", "errors", "qat", "fim", "transfer", "forgetting", "sft", "preference", "reinforcement", "rlhf"),
)
TAKES_ONLY = ("objectives", "transfer", "forgetting", "preference", "reinforcement", "rlhf")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", choices=[*BENCHES, "all"], default="all", help="which one (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--steps", type=int, help="steps of adapters, qlora (400), qat (200), fim (700), transfer (2000)")
    parser.add_argument("--base", help="adapters, qlora, qat: weights to start from; errors, fim: measured; others: folder")
    parser.add_argument(
        "--only", help="objectives, transfer, forgetting, preference, reinforcement, rlhf: these rows alone, and their starts"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {where}, {options.threads} threads, Python {platform.python_version()}\n")
    given = {name: value for name, value in {"steps": options.steps, "base": options.base}.items() if value is not None}
    for name in BENCHES if options.name == "all" else [options.name]:
        named = {"only": options.only} if name in TAKES_ONLY and options.only else {}
        takes_given = name in TAKES_GIVEN
        BENCHES[name](options.rounds, **(given if takes_given else {}), **named)


if __name__ == "__main__":
    main()
