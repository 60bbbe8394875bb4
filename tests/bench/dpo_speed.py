"""Direct preference optimisation on a CPU: tokens a second of our steps, and of TRL's DPOTrainer on the same network.

Both sides: the same first weights in float32, the same ids, AdamW by torch's fused kernel with the same settings, clipping at
1, β = 0.1, no recomputation. Each collates the batch once, by its own collator; a step is forward, backward, clipping and
update. Theirs is `trainer.training_step` with what `train()` does after it, without a log, a progress bar or a checkpoint. The
metrics that its loss computes at each step cannot be switched off; ours computes its own too. Freed memory is kept
(`train.allocator`) for both.

    live         log-probabilities of the reference in each step: a frozen copy, with LoRA the network without its adapter
    precomputed  they are in the batch, or in a table

Tokens are those of both replies with their prompts, without padding. Before the measurement both sides take `CHECKED` steps at
a higher rate: where their losses differ, nothing is measured. Memory is the highest sum of what a step allocates, gradients
included; weights and the optimizer's state, the same on both sides, are not.
"""

import logging
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import lora.peft_io
import model.hub
from data.chat.encode_preference import pair_examples
from data.packing.collate import pad_batch
from lora.config import LoraConfig
from lora.inject import add_adapters
from tests.bench.loss import peak_bytes
from tests.bench.timing import alternate, ratio, table
from tests.chat_runs import CHATML, write_base
from train.allocator import keep_freed_memory
from train.engine import Engine
from train.optimizers.build import build_optimizer
from train.preference_objective import PairLoss, PairObjective
from train.reference import COPY, REFERENCES, ROW_IDS, StoredReference, frozen_copy, reply_log_probs

PAIRS, PROMPT, REPLY = 8, (80, 120), (40, 80)  # pairs of a batch; shortest and longest
BETA, CHECKED, HIGHER, RATE = 0.1, 2, 1e-4, 1e-6
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6, "initializer_range": 0.02}
VOCABULARIES = {8192: 1.0, 32_000: 0.4}  # and a share of the rounds
LORA = {"r": 8, "target_modules": "all-linear"}


class Pair(NamedTuple):
    """Ids of a prompt and of two replies to it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Side(NamedTuple):
    """step() -> the loss of the step, before its update; set_rate(rate) of the optimizer."""

    step: Callable[[], float]
    set_rate: Callable[[float], None]


def make_pairs(vocab_size: int) -> list[Pair]:
    lengths, tokens = np.random.default_rng(0), np.random.default_rng(1)  # apart: the lengths are those of every vocabulary

    def ids(least: int, most: int) -> list[int]:
        return tokens.integers(3, vocab_size, lengths.integers(least, most + 1)).tolist()

    return [Pair(ids(*PROMPT), ids(*REPLY), ids(*REPLY)) for _ in range(PAIRS)]


def our_side(folder: Path, pairs: list[Pair], kind: str, is_adapted: bool) -> Side:
    """The engine's step. Writes the adapter's first weights into folder / adapter."""
    network = model.hub.load(folder, dtype=torch.float32)
    if is_adapted:
        add_adapters(network, LoraConfig(r=LORA["r"], alpha=2 * LORA["r"], targets="all-linear"))
        lora.peft_io.save_adapter(network, folder / "adapter")
    rows = [[pair_examples(np.array(prompt), np.array(reply)) for reply in replies] for prompt, *replies in pairs]
    batch = pad_batch(rows, 0) | {ROW_IDS: torch.arange(2 * len(pairs))}
    networks, reference = network, REFERENCES[kind]()
    if isinstance(reference, StoredReference):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            reference.fill(reply_log_probs(network, inputs, batch["labels"]))
    if kind == "copy":
        networks = {"policy": network, COPY: frozen_copy(network, lambda: model.hub.load(folder, dtype=torch.float32))}
    objective = PairObjective(networks, PairLoss({"sigmoid": 1.0}, BETA), reference).train()
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: "matrix", lr=RATE, fused=True, **ADAM)
    factor = [1.0]
    engine = Engine(objective, optimizers, max_norm=1.0, factor=lambda update: factor[0])

    def set_rate(rate: float) -> None:
        factor[0] = rate / RATE

    return Side(lambda: float(engine.train([batch]).loss), set_rate)


def their_side(folder: Path, pairs: list[Pair], kind: str, is_adapted: bool) -> Side:
    """DPOTrainer's step: `training_step`, clipping and update, as its training loop calls them."""
    import datasets
    import peft
    import safetensors.torch
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<s>"
    asked = trl.DPOConfig(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=len(pairs),
        beta=BETA,
        learning_rate=RATE,
        weight_decay=ADAM["weight_decay"],
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_epsilon=ADAM["eps"],
        optim="adamw_torch_fused",
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = peft.LoraConfig(lora_alpha=2 * LORA["r"], task_type="CAUSAL_LM", **LORA) if is_adapted else None
    unused = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])  # it asks for text
    trainer = trl.DPOTrainer(
        model=network, args=asked, train_dataset=unused, processing_class=tokenizer, peft_config=adapter
    )
    if is_adapted:
        peft.set_peft_model_state_dict(
            trainer.model, safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
        )
    batch: dict[str, Tensor] = trainer.data_collator([pair._asdict() for pair in pairs])
    if kind == "precomputed":
        both = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), both, strict=True))
        trainer.precompute_ref_logps, trainer.ref_model = True, None
    optimizer, trained = trainer.create_optimizer(), [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.current_gradient_accumulation_steps = 1

    def step() -> float:
        loss = trainer.training_step(trainer.model, batch)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        trainer.model.zero_grad(set_to_none=True)
        return float(loss)

    def set_rate(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    return Side(step, set_rate)


def check_losses(sides: dict[str, Side]) -> None:
    """Take the first steps of both, and stop where the losses differ or do not move."""
    losses = {}
    for name, side in sides.items():
        side.set_rate(HIGHER)
        losses[name] = torch.tensor([side.step() for _ in range(CHECKED)], dtype=torch.float64)
        side.set_rate(RATE)
    ours, theirs = losses["ours"], losses["TRL"]
    if (ours - theirs).abs().max() > 1e-5 or abs(ours[0] - ours[-1]) < 1e-3:
        raise SystemExit(f"the sides do not compute the same: {losses}")


def bench_dpo_speed(rounds: int) -> None:
    logging.disable(logging.WARNING)
    keep_freed_memory()
    shown = []
    with tempfile.TemporaryDirectory() as place:
        for vocab_size, share in VOCABULARIES.items():
            folder = write_base(Path(place) / str(vocab_size), CHATML, **SIZES, **HEADS, vocab_size=vocab_size)
            pairs = make_pairs(vocab_size)
            tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
            for is_adapted in (False, True):
                for reference in ("live", "precomputed"):
                    kind = ("adapter-off" if is_adapted else "copy") if reference == "live" else reference
                    ours = our_side(folder, pairs, kind, is_adapted)  # first: theirs reads its adapter
                    sides = {"TRL": their_side(folder, pairs, kind, is_adapted), "ours": ours}
                    check_losses(sides)
                    peak = {name: peak_bytes(side.step)[0] for name, side in sides.items()}
                    steps = {name: side.step for name, side in sides.items()}
                    seconds = alternate(steps, math.ceil(share * rounds), warmup=0)
                    shown.append(
                        (
                            f"V {vocab_size:,}, {'LoRA' if is_adapted else 'all weights'}",
                            reference,
                            *(f"{tokens / statistics.median(each):,.0f}" for each in seconds.values()),
                            f"**{ratio(seconds['TRL'], seconds['ours']):.2f}**",
                            *(f"{each / 1e6:,.0f} MB" for each in peak.values()),
                            f"**{peak['ours'] / peak['TRL']:.2f}**",
                        )
                    )
    print(f"DPO, 6 × 384, {PAIRS} pairs of {tokens:,} tokens, float32, LoRA r = {LORA['r']}: tokens a second; memory that a")
    print(f"step allocates; medians of {rounds} rounds, V 32,000: {math.ceil(VOCABULARIES[32_000] * rounds)}\n")
    header = ("network", "reference", "DPOTrainer", "ours", "ours over TRL's", "DPOTrainer, peak", "ours, peak", "peaks")
    print(table(header, shown))
