"""Instruction tuning with LoRA on a CPU: tokens a second of our steps, and of TRL's SFTTrainer on the same network.

Both sides: the same first weights in float32, LoRA r = 8 on every matrix of the blocks, AdamW, clipping at 1, the same
conversations. A round is `STEPS` steps of each, with the making of batches; theirs is `trainer.train()`, its logging, saving
and progress bar off. Tokens are those of the records, without padding.

    one batch, padded   every step has the same 8 records, padded to one length
    one batch, packed   every step has the same 16 records: theirs in one row, flattened (bfd), ours in rows of the context
    as they come        200 records in batches of 8: theirs padded to the longest in each, ours packed by first fit
"""

import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from data.packing.collate import PADDING_DOCUMENT
from lora.config import LoraConfig
from lora.inject import add_adapters
from tests.bench.timing import alternate, ratio, table
from tests.chat_runs import CHATML, conversations, open_sft, write_base, write_conversations
from tests.records import write_rows
from train.allocator import keep_freed_memory
from train.engine import Engine
from train.losses.choose import LOSSES, choose_loss
from train.optimizers.build import build_optimizer

STEPS, CONTEXT, BATCH_SIZE = 4, 512, 8
SHAPES = {
    "4 × 128, V 2,048": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048},
    "6 × 384, V 8,192": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": CONTEXT}
TAGGED = (  # ChatML, in which TRL finds the replies with their terminators
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
WAYS = {  # records, rows of theirs in a batch, how theirs and ours lay them out
    "one batch, padded": (BATCH_SIZE, BATCH_SIZE, False, "pad"),
    "one batch, packed": (2 * BATCH_SIZE, 2 * BATCH_SIZE, True, "first_fit"),
    "as they come": (200, BATCH_SIZE, False, "first_fit"),
}


def their_rounds(folder: Path, rows: list[dict], batch_size: int, packing: bool) -> tuple[Callable[[], None], list[int]]:
    """SFTTrainer's training loop, which begins anew at each call and takes `STEPS` steps; and the tokens of each call."""
    import datasets
    import peft
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.chat_template = "<s>", TAGGED
    asked = trl.SFTConfig(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=batch_size,
        max_length=CONTEXT,
        packing=packing,
        assistant_only_loss=True,
        max_steps=STEPS,
        learning_rate=1e-4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model=network, args=asked, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.remove_callback(transformers.PrinterCallback)
    tokens = []

    def rounds() -> None:
        before = trainer._total_train_tokens
        trainer.train()
        tokens.append(trainer._total_train_tokens - before)

    return rounds, tokens


def our_rounds(folder: Path, rows: list[dict], batch_size: int, packing: str) -> tuple[Callable[[], None], list[int]]:
    """The engine's steps, as a run takes them; and the tokens of each call."""
    files = write_rows(folder / "train.jsonl", rows), write_conversations(folder / "held_out.jsonl", 2)
    options = {"packing": packing, "template": "chatml", "dtype": torch.float32, "context": CONTEXT}
    task, network = open_sft(folder, files[0], validation=files[1], batch_size=1, **options)
    size = min(task.source.rows_in_epoch(0), batch_size)
    task, network = open_sft(folder, files[0], validation=files[1], batch_size=size, **options)
    add_adapters(network, LoraConfig(r=8, alpha=16, targets="all-linear"))
    loss = LOSSES[choose_loss(size * CONTEXT, network.config.vocab_size, torch.device("cpu"))]
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: "matrix", lr=1e-4, weight_decay=0.0)
    engine = Engine(task.objective(network, loss).train(), optimizers, max_norm=1.0)

    tokens = []

    def rounds() -> None:
        tokens.append(0)
        for _ in range(STEPS):
            batches = task.source.batches(engine.step)
            tokens[-1] += sum(count_tokens(batch) for batch in batches)
            engine.train(batches)

    return rounds, tokens


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    is_token = batch["attention_mask"] if "attention_mask" in batch else batch["document_ids"] != PADDING_DOCUMENT
    return int(is_token.sum())


def bench_sft_speed(rounds: int) -> None:
    logging.disable(logging.WARNING)
    keep_freed_memory()
    shown = []
    with tempfile.TemporaryDirectory() as place:
        for number, (shape, sizes) in enumerate(SHAPES.items()):
            folder = write_base(Path(place) / str(number), CHATML, **HEADS | sizes)
            for way, (records, batch_size, packs, packing) in WAYS.items():
                rows = conversations(records, longest=20)
                sides = {"TRL": their_rounds(folder, rows, batch_size, packs)}
                sides["ours"] = our_rounds(folder, rows, batch_size, packing)
                seconds = alternate({side: each for side, (each, _) in sides.items()}, rounds, warmup=1)
                tokens = {side: each[1:] for side, (_, each) in sides.items()}
                rates = {side: [n / t for n, t in zip(tokens[side], seconds[side], strict=True)] for side in sides}
                medians = [f"{statistics.median(each):,.0f}" for each in rates.values()]
                shown.append((shape, way, *medians, f"**{ratio(rates['ours'], rates['TRL']):.2f}**"))
    print(f"LoRA on conversations, float32: tokens of records a second; {STEPS} steps a round, medians of {rounds} rounds\n")
    print(table(("network", "data", "TRL's SFTTrainer", "ours", "ours over TRL's"), shown))
