"""Reinforcement on verifiable tasks through the command: exact match of held-out prompts before and after, three seeds.

A start (`verifiable_starts`) answers a fifth to two fifths of 300 held-out prompts greedily. Each row trains it with 32
prompts × 16 replies a step, AdamW (.9, .99), no decay, a constant rate that was the best of RATES for seed 3, and no KL term
unless it says so. Exact match: of greedy replies, and of four samples to each prompt at temperature 1. Entropy: nats a token,
means of the first and the last ten steps; a part of a sampled gain is that samples come nearer to the greedy reply.

    grpo, rloo, dr_grpo    reward `exact`
    shuffled               each group's rewards in another order: what is learned is noise
    constant               1 for every reply: no weight moves
    kl                     β = 10 by k2: the policy is held

`--base FOLDER` keeps starts and results, and reads those that are there. `--only sort:grpo,reverse:rloo` selects rows.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench.timing import table
from tests.bench.verifiable_starts import MOST, Start, make_start, read_rows, score, train
from train.reports.log import read_metrics
from train.runs.checkpoint import read_pointer

TASKS, SEEDS, CHOSEN_BY = ("sort", "reverse"), (0, 1, 2), 3
STEPS, RATES = {"sort": 150, "reverse": 300}, (3e-4, 5e-4)
RATE = {"sort": 3e-4, "reverse": 5e-4}
OPTIONS = (
    "--device cpu --threads 1 --optimizer adamw --betas 0.9 0.99 --weight-decay 0 --schedule constant --warmup 0.05 "
    f"--batch-size 512 --eval-every STEPS --sample-every 0 --keep 1 --OBJ.group 16 --OBJ.max-reply {MOST} "
    "--OBJ.validation-prompts 300 --OBJ.samples-every 50"
)
ROWS = {  # objective, options, seeds
    "grpo": ("grpo", "--reward exact", SEEDS),
    "rloo": ("rloo", "--reward exact --rloo.beta 0", SEEDS),
    "dr_grpo": ("grpo", "--reward exact --grpo.loss dr_grpo", SEEDS),
    "shuffled": ("grpo", "--reward FILE:shuffled --reward-workers 0", SEEDS),
    "constant": ("grpo", "--reward FILE:constant --reward-workers 0", (0,)),
    "kl": ("grpo", "--reward exact --grpo.beta 10 --grpo.kl k2", (0,)),
}
REWARDS = '''"""Rewards that say nothing about the reply."""

import random


def shuffled(prompts, completions, answer):
    """The exact match of the group's replies, in another order."""
    rewards = [float(text.strip() == wanted) for text, wanted in zip(completions, answer)]
    random.Random(repr((prompts[0], completions))).shuffle(rewards)
    return rewards


def constant(prompts, completions):
    return [1.0] * len(completions)
'''


def bench_reinforcement(rounds: int, *, base: Path | None = None, only: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(base or place)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = only.split(",") if only else [f"{task}:{row}" for task in TASKS for row in ROWS]
        known = {f"{task}:{row}" for task in TASKS for row in (*ROWS, "rates")}
        if unknown := sorted(set(wanted) - known):
            raise SystemExit(f"--only {', '.join(unknown)}: of {', '.join(sorted(known))}")
        shown = []
        for entry in wanted:
            task, name = entry.split(":")
            if name == "rates":
                choose_rate(folder, task)
                continue
            results = [run_row(folder, task, name, seed) for seed in ROWS[name][2]]
            shown += [describe(task, name, results)]
            print(shown[-1], flush=True)
        header = ("task", "row", "greedy before", "greedy", "×", "sampled before", "sampled", "×", "entropy", "KL", "seconds")
        print(table(header, shown))


def choose_rate(folder: Path, task: str) -> None:
    """Print the scores of each rate with the seed that no row has."""
    for rate in RATES:
        result = run_row(folder, task, "grpo", CHOSEN_BY, rate)
        greedy, sampled, _ = result["after"]
        print(f"{task}, seed {CHOSEN_BY}, rate {rate:g}: greedy {greedy:.3f}, sampled {sampled:.3f}", flush=True)


def run_row(folder: Path, task: str, name: str, seed: int, rate: float | None = None) -> dict:
    """Return the results of a run; kept in the folder."""
    rate = RATE[task] if rate is None else rate
    kept = folder / f"{task}-{name}-{seed}-{rate:g}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    start = make_start(task, folder / "starts" / task / f"seed{seed}", seed)
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    objective, options, _ = ROWS[name]
    run = folder / f"{task}-{name}-{seed}-{rate:g}"
    began, used = time.perf_counter(), time.process_time()
    options = (
        f"{OPTIONS} {options} --objective {objective} --lr {rate} --steps STEPS --seed {seed} --init {start.init} "
        f"--corpus {start.train} --validation {start.held_out} --out {run}"
    )
    for name_of_part, value in (("OBJ", objective), ("FILE", folder / "rewards.py"), ("STEPS", STEPS[task])):
        options = options.replace(name_of_part, str(value))
    train(options)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    result = measure(run, start) | {"seconds": seconds, "processor": used, "step": start.step}
    kept.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def measure(run: Path, start: Start) -> dict:
    """Return scores before and after, of the last step, and what metrics.jsonl says."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"]
    last = read_pointer(run, "last")
    entropy = [statistics.fmean(row["entropy"] for row in part) for part in (rows[:10], rows[-10:])]
    norms = max(row["grad_norm"] for row in rows)
    after = score(last, read_rows(start.held_out))
    found = {"before": list(start.scores), "after": list(after), "entropy": entropy, "grad_norm": norms}
    return found | {"kl": rows[-1].get("kl")}


def describe(task: str, name: str, results: list[dict]) -> tuple:
    """Return a row of the table: each seed's value."""

    def each(values, form="{:.2f}") -> str:
        return " ".join(form.format(value) for value in values)

    cells = []
    for column in (0, 1):  # greedy, sampled
        before, after = ([result[when][column] for result in results] for when in ("before", "after"))
        gains = [b / max(a, 1e-9) for a, b in zip(before, after, strict=True)]
        cells += [each(before), each(after), each(gains, "{:.1f}")]
    entropy = each([r["entropy"][0] for r in results]) + " → " + each([r["entropy"][1] for r in results])
    kl = each([r["kl"] for r in results if r["kl"] is not None], "{:.4f}")
    return (task, name, *cells, entropy, kl, each([r["processor"] for r in results], "{:.0f}"))
