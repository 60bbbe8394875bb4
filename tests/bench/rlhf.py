"""Three stages on built-in pairs through `python -m train`: a start, a reward model, a policy that seeks its reward.

The start is that of `preference`: the recipes chat-base and pairs-sft; a quarter of its replies keep the rule (short, no hedge,
names the module). The reward model learns the pairs; each row then trains the start, and answers held-out prompts by sampling
at temperature 1, checkpoint by checkpoint:

    reward    mean reward of the reward model, what is maximised
    kept      the share of replies that keep the rule, are well formed and end by themselves: what is meant
    formed    the share that are well formed and end by themselves
    KL        mean of Σ log π - log π_start over these replies, nats a reply
    words     mean words of a reply

A row's line is the checkpoint with the highest reward on 60 prompts, scored on 200 others: without the rule no better choice.
`shuffled`: the reward model of pairs of which half are exchanged. `dpo`: the row of `preference`, on the same pairs.
`--base FOLDER` keeps the start, the reward models, the runs and their scores, and reads those that are there.
"""

import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import model.hub
from data.made.preferences import make_preferences
from data.made.rule import is_well_formed, keeps_rule
from eval.bootstrap import wilson_interval
from model.reward import read_mean_score, reward_scores
from tests.bench.preference import CHOOSING, TESTED, Place, log_probs, open_place, open_policy, sample, train
from tests.bench.timing import table
from tests.records import write_rows
from tests.runs import metrics
from train.reports.log import read_metrics
from train.runs.checkpoint import checkpoints, step_of
from train.runs.open import resolve

SEEDS, SAVES = (0, 1, 2), 6
PPO = "ppo --lr 3e-4 --batch-size 64 --steps 60 --ppo.rollout-epochs 2 --ppo.value-lr 1e-3 --ppo.max-kl 30"
GRPO = "grpo --lr 3e-4 --batch-size 64 --steps 36 --grpo.group 8"
DPO = "dpo --lr 5e-5 --batch-size 16 --steps 45"
COMMON = "--optimizer adamw --schedule constant --sample-every 0 --seed SEED"
KAPPAS = (0.005, 0.05, 0.2)
ROWS: dict[str, tuple[str, tuple[int, ...]]] = {  # options, seeds
    **{f"ppo, κ {kappa:g}": (f"{PPO} --ppo.beta {kappa}", SEEDS) for kappa in KAPPAS},
    "grpo, β 0.05": (f"{GRPO} --grpo.beta 0.05", SEEDS),
    "grpo, β 0.5": (f"{GRPO} --grpo.beta 0.5", SEEDS),
    "dpo": (DPO, SEEDS),
    "ppo, shuffled": (f"{PPO} --ppo.beta 0.05", SEEDS),
}
CURVES = tuple(f"ppo, κ {kappa:g}" for kappa in KAPPAS)


class Scores(NamedTuple):
    """Scores of a checkpoint, as the columns of the table."""

    reward: float
    kept: float
    formed: float
    kl: float
    words: float


def bench_rlhf(rounds: int, *, base: str | None = None, only: str | None = None) -> None:
    """base: a folder for what is made. only: names of rows, joined by ;."""
    del rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(base or temporary)
        place, judge = open_stages(folder)
        header = ("", "step", *Scores._fields, "seconds")
        start = score(place, judge, place.start, slice(CHOOSING, CHOOSING + TESTED))
        said = [("start", 0, *shown([start]), "")]
        wanted = only.split(";") if only else [*ROWS]
        curves: dict[str, list[dict[int, Scores]]] = {}
        for name in wanted:
            options, seeds = ROWS[name]
            found = [run_row(folder, place, judge, name, options, seed) for seed in seeds]
            best = [row["best"] for row in found]
            steps = " ".join(str(row["step"]) for row in found)
            said.append((name, steps, *shown([Scores(*each) for each in best]), f"{fmean(r['seconds'] for r in found):.0f}"))
            print(table(header, said[-1:]), flush=True)
            curves[name] = [{int(step): Scores(*each) for step, each in row["curve"].items()} for row in found]
        print(table(header, said))
        if set(CURVES) <= curves.keys():
            draw_curves({name: curves[name] for name in CURVES}, folder / "rlhf.png")


def open_stages(folder: Path) -> tuple[Place, tuple]:
    """Return the start and its pairs, and the reward model that judges: (network, mean score)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, recipe, init in (("base", "chat-base", ""), ("start", "pairs-sft", f"--init {folder}/base")):
        if not (folder / name / "best.json").exists():
            train(f"--recipe {recipe} {init} --out {folder}/{name}")
    place = open_place(folder, str(folder / "start"))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in make_preferences()["train"]])
    held_out = [{"prompt": row["prompt"]} for row in make_preferences()["validation"][CHOOSING + TESTED :][:100]]
    write_rows(folder / "held_out_prompts.jsonl", held_out)
    for name, pairs in (("reward", "pairs"), ("shuffled", "reversed")):
        out = folder / name
        if not (out / "last.json").exists():
            files = f"--init {place.start} --corpus {folder}/{pairs}.jsonl --validation {folder}/held_out.jsonl"
            options = "--objective reward --optimizer adamw --batch-size 16 --lr 3e-4 --steps 150 --eval-every 50"
            train(f"{options} {files} --out {out}")
        last = metrics(out)[-1]
        print(f"reward model {name}: {last['accuracy']:.1%} of held-out pairs ordered right", flush=True)
    judge = resolve(folder / "reward")
    return place, (model.hub.load(judge).eval(), read_mean_score(judge).value)


def run_row(folder: Path, place: Place, judge: tuple, name: str, options: str, seed: int) -> dict:
    """Return the results of a run, kept in the folder: scores of each checkpoint, and of the best one."""
    out = folder / f"{name.replace(', ', '-').replace(' ', '')}-{seed}"
    kept = out.with_name(f"{out.name}.json")
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    objective, _, rest = options.partition(" ")
    steps = int(rest.partition("--steps ")[2].split()[0])
    reward = folder / ("shuffled" if "shuffled" in name else "reward")
    files = f"--init {place.start} --corpus {folder}/prompts.jsonl --validation {folder}/held_out_prompts.jsonl"
    more = f"--reward {reward} --{objective}.max-reply 48 --{objective}.validation-prompts 50"
    if objective == "dpo":
        files = f"--init {place.start} --corpus {folder}/pairs.jsonl --validation {folder}/held_out.jsonl"
        more = "--dpo.replies 0"
    saving = f"--save-every {steps // SAVES} --eval-every {steps} --keep {SAVES + 1} --out {out}"
    train(f"--objective {objective} {files} {rest} {more} {COMMON.replace('SEED', str(seed))} {saving}")
    rows = read_metrics(out / "metrics.jsonl")
    seconds = rows[-1]["time"] - rows[0]["time"]
    curve, chosen_by = {}, {}
    for checkpoint in checkpoints(out):
        chosen_by[step_of(checkpoint)] = score(place, judge, checkpoint, slice(0, CHOOSING)).reward
        curve[step_of(checkpoint)] = score(place, judge, checkpoint, slice(CHOOSING, CHOOSING + TESTED))
    best = max(sorted(chosen_by), key=chosen_by.get)
    result = {"step": best, "best": curve[best], "curve": dict(sorted(curve.items())), "seconds": seconds}
    kept.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def score(place: Place, judge: tuple, folder: Path, part: slice) -> Scores:
    """Return the scores of sampled replies to held-out prompts."""
    network, pairs, prompts = open_policy(place, folder), place.pairs[part], place.prompts[part]
    replies = sample(place, network, part)
    ends = [id for id in (network.config.eos_id,) if id is not None]
    sampled = [[*place.tokenizer.encode(reply.text), *(ends if reply.has_ended else [])] for reply in replies]
    policy, start = (log_probs(each, prompts, sampled) for each in (network, place.network))
    judged, mean_score = judge
    rows = [prompt + reply for prompt, reply in zip(prompts, sampled, strict=True)]
    formed = [reply.has_ended and is_well_formed(reply.text) for reply in replies]
    keeps = [keeps_rule(reply.text, pair["module"]) for reply, pair in zip(replies, pairs, strict=True)]
    return Scores(
        float(reward_scores(judged, rows, mean_score=mean_score).mean()),
        fmean(a and b for a, b in zip(formed, keeps, strict=True)),
        fmean(formed),
        fmean(a - b for a, b in zip(policy, start, strict=True)),
        fmean(len(reply.text.split()) for reply in replies),
    )


def shown(of_seeds: list[Scores]) -> list[str]:
    """Return the mean over seeds of each score; with each seed's of `kept`, and the interval of a sample of so many prompts."""
    means = Scores(*(fmean(values) for values in zip(*of_seeds, strict=True)))
    each = f" ({' '.join(f'{100 * scores.kept:.0f}' for scores in of_seeds)})" if len(of_seeds) > 1 else ""
    low, high = wilson_interval(round(means.kept * TESTED), TESTED)
    kept = f"{means.kept:.1%} [{100 * low:.0f}, {100 * high:.0f}]{each}"
    return [f"{means.reward:.2f}", kept, f"{means.formed:.0%}", f"{means.kl:.1f}", f"{means.words:.1f}"]


def draw_curves(curves: dict[str, list[dict[int, Scores]]], file: Path) -> None:
    """Draw reward and rule against KL: a line for each KL weight, a point for each checkpoint, the mean of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, seeds in curves.items():
        steps = sorted(seeds[0])
        means = [Scores(*(fmean(values) for values in zip(*(seed[step] for seed in seeds), strict=True))) for step in steps]
        for place, key in zip(axes, ("reward", "kept"), strict=True):
            place.plot([each.kl for each in means], [getattr(each, key) for each in means], marker=".", label=name)
    axes[0].set(title="reward of the reward model", xlabel="KL to the start, nats a reply", ylabel="reward")
    axes[1].set(title="replies that keep the rule", xlabel="KL to the start, nats a reply", ylabel="share")
    for place in axes:
        place.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(file, dpi=110, format="png")
