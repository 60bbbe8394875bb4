"""Steps of group-relative policy optimisation on a CPU: replies, rewards and update, beside TRL's GRPOTrainer.

Both sides: the same first weights in float32, the same prompts in each step, G sampled replies of `REPLY` tokens to each (the
network's stop id is not among its likely tokens, so that both write as many), a reward of the text's letters, DAPO's loss with
the same clips, no KL term, AdamW by torch's fused kernel, clipping at 1, no recomputation. A step is generation, scoring,
forward, backward, clipping and update. Theirs is `trainer.training_step`, which generates, with what `train()` does after it,
without a log, a progress bar or a checkpoint; ours is the run's own loop without those. Freed memory is kept for both.

    one step      a rollout is one optimizer step: ratio 1
    two steps     a rollout of as many replies is two, so that log-probabilities of the rollout's policy are computed too
"""

import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.timing import alternate, ratio, table
from tests.chat_runs import CHATML, write_base
from tests.folders import TEXT
from tests.records import write_rows
from train.allocator import keep_freed_memory
from train.config import DataConfig, NetworkConfig, OptimizerConfig, ReportConfig, RewardConfig, RunConfig
from train.loop import Run
from train.parallel.ranks import Ranks
from train.registry import config_type, load
from train.start import resolve_new

PROMPTS, GROUP, REPLY = 4, 8, 64
RATE = 1e-6
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6, "initializer_range": 0.02}
WORDS = " ".join(TEXT).split()
REWARD = '''def letters(prompts, completions):
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]
'''


def write_prompts(folder: Path, words: int) -> Path:
    """PROMPTS prompts of so many words, no two alike."""
    rows = []
    for number in range(PROMPTS):
        content = " ".join([str(number), *(WORDS[(number + i) % len(WORDS)] for i in range(words))])
        rows.append({"prompt": [{"role": "user", "content": content}], "answer": "-"})
    return write_rows(folder / "prompts.jsonl", rows)


def our_side(folder: Path, corpus: Path, minibatches: int) -> Callable[[], None]:
    """A rollout and its steps, as the run's loop takes them."""
    (folder / "letters.py").write_text(REWARD, encoding="utf-8")
    kind = load("grpo")
    config = config_type("grpo")(
        run=RunConfig(
            objective="grpo", init=folder, out=folder / "ours", steps=10_000, device="cpu", threads=torch.get_num_threads()
        ),
        data=DataConfig(corpus=(str(corpus),), validation=(str(corpus),)),
        network=NetworkConfig(context=512),
        optimizer=OptimizerConfig(
            batch_size=PROMPTS * GROUP // minibatches, optimizer="adamw", lr=RATE, schedule="constant", warmup=0, **ADAM
        ),
        rewards=RewardConfig(reward=(f"{folder / 'letters.py'}:letters",), reward_workers=0),
        report=ReportConfig(verbose=False),
        grpo=kind.Settings(group=GROUP, max_reply=REPLY, minibatches=minibatches, clip_high=0.2),
    )
    config, _ = resolve_new(config, Ranks())
    run = Run(config, Ranks(), resume=False)
    run.task.begin(run)
    context = run.batches()
    batches = context.__enter__()

    def step() -> None:
        for _ in range(minibatches):
            own, _count = run.prepare(next(batches))
            run.engine.train(own, run.phases)

    step.run = run
    return step


def their_side(folder: Path, corpus: Path, minibatches: int) -> Callable[[], None]:
    """GRPOTrainer's steps: `training_step`, clipping and update, as its training loop calls them."""
    import datasets
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<s>"
    contents = [json.loads(line)["prompt"][0]["content"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    texts = [{"prompt": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"} for text in contents]
    asked = trl.GRPOConfig(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=PROMPTS * GROUP // minibatches,
        num_generations=GROUP,
        steps_per_generation=minibatches,
        max_completion_length=REPLY,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        learning_rate=RATE,
        weight_decay=ADAM["weight_decay"],
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_epsilon=ADAM["eps"],
        optim="adamw_torch_fused",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )

    def letters(completions, **columns):
        return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]

    trainer = trl.GRPOTrainer(
        model=str(folder),
        args=asked,
        reward_funcs=letters,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = [text for text in texts for _ in range(GROUP)]

    def step() -> None:
        for _ in range(minibatches):
            trainer.training_step(trainer.model, batch, None)
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            trainer.model.zero_grad(set_to_none=True)

    step.trainer = trainer
    return step


def bench_grpo_speed(rounds: int) -> None:
    logging.disable(logging.WARNING)
    keep_freed_memory()
    shown = []
    with tempfile.TemporaryDirectory() as place:
        for words in (20, 80):
            folder = write_base(Path(place) / str(words), CHATML, **SIZES, **HEADS, vocab_size=8192)
            corpus = write_prompts(folder, words)
            for minibatches in (1, 2):
                ours = our_side(folder, corpus, minibatches)
                sides = {"TRL": their_side(folder, corpus, minibatches), "ours": ours}
                seconds = alternate(sides, rounds, warmup=1)
                prompt = len(ours.run.task.data.train.values[0].ids)
                lengths = ours.run.source.rollout.length_N
                tokens = PROMPTS * GROUP * REPLY
                assert lengths.sum() >= 0.9 * tokens, lengths  # a stop id by chance
                spent = ours.run.phases.seconds()
                rollout = spent["rollout"] / sum(spent[name] for name in spent)
                shown.append(
                    (
                        f"prompts of {prompt}",
                        ("one step", "two steps")[minibatches - 1],
                        *(f"{tokens / statistics.median(each):,.0f}" for each in seconds.values()),
                        f"**{ratio(seconds['TRL'], seconds['ours']):.2f}**",
                        f"{rollout:.0%}",
                    )
                )
                print(shown[-1], flush=True)
    print(f"GRPO, 6 × 384, V 8,192, {PROMPTS} × {GROUP} replies of {REPLY} tokens, float32: reply tokens a second of whole")
    print(f"steps; medians of {rounds} rounds\n")
    print(table(("prompts", "a rollout is", "GRPOTrainer", "ours", "ours over TRL's", "of it rollout"), shown))
