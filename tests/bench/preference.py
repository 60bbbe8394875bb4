"""Preferences on built-in pairs through `python -m train`: a rule that replies keep more often, beside what that costs.

The start is the recipe chat-base, tuned by the recipe pairs-sft on replies of which a quarter keep the rule (short, no hedge,
names the module). Each row trains on the built-in pairs, and answers held-out prompts by sampling at temperature 1:

    kept      the share of replies that keep the rule, are well formed and end by themselves
    KL        mean over these replies of Σ log π - log π_start, nats a reply: an estimate of KL(π ‖ start)
    words     mean words of a reply
    answer    the share of replies that hold the right answer
    chosen    mean log π of held-out chosen replies, nats
    text      bits a byte of plain text: the documentation that the base was trained on, held out
    s, MiB    the run's seconds in training steps, and the memory of its process at its highest

A run saves SAVES checkpoints; the one whose replies to 60 prompts keep the rule most often is scored on 200 others.
`reversed`: in half of the pairs chosen and rejected are exchanged. The reward model's line has its accuracy on held-out pairs.
`--only curve`: DPO without a stop, checkpoint by checkpoint, into preferences.png: past the best one replies break.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import model.hub
from data.chat.encode import encode_rendered
from data.chat.template import open_template
from data.made.preferences import make_preferences
from data.made.rule import is_well_formed, keeps_rule
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from data.transforms.causal import IGNORE
from eval.bootstrap import wilson_interval
from eval.commands.held_out import open_text
from lora.peft_io import open_network
from model.network import Network
from tests.bench.timing import table
from tests.records import write_rows
from tests.runs import metrics
from train.chat_replies import Reply, write_replies
from train.evaluate import bits_per_byte, evaluate
from train.losses.preference import PREFERENCE_DETAILS
from train.objective import Objective
from train.reference import reply_log_probs
from train.runs.checkpoint import checkpoints, step_of
from train.runs.open import resolve

SEEDS = (0, 1, 2)
MAIN = ("sigmoid", "ipo", "kto", "simpo", "orpo")
CHOOSING, TESTED, MOST, SAVES = 60, 200, 48, 3
COMMON = "--batch-size 16 --optimizer adamw --sample-every 0 --log-every 1"
DPO, KTO, LORA = "dpo --lr 5e-5 --steps 45", "kto --lr 5e-5 --steps 45", "dpo --adapter lora --lr 5e-4 --steps 45"
CURVE, CURVE_SAVES = "dpo --lr 1e-4 --steps 100", 10
ROWS: dict[str, tuple[str, tuple[int, ...]]] = {  # name: options, seeds
    "sigmoid": (DPO, SEEDS),
    "ipo": (f"{DPO} --dpo.loss ipo", SEEDS),
    "kto": (KTO, SEEDS),
    "simpo": (f"{DPO} --dpo.loss simpo", SEEDS),
    "orpo": (f"{DPO} --dpo.loss orpo", SEEDS),
    "sigmoid, β 0.5": (f"{DPO} --dpo.beta 0.5", SEEDS),
    "reversed, β 0.5": (f"{DPO} --dpo.beta 0.5", SEEDS),
    "sigmoid=1,sft=1": (f"{DPO} --dpo.loss sigmoid=1,sft=1", SEEDS[:1]),
    **{name: (f"{DPO} --dpo.loss {name}", SEEDS[:1]) for name in PREFERENCE_DETAILS if name not in MAIN},
    "wpo": (f"{DPO} --dpo.wpo", SEEDS[:1]),
    "ld-dpo": (f"{DPO} --dpo.ld-alpha 0.5", SEEDS[:1]),
    "forward KL": (f"{DPO} --dpo.divergence forward_kl", SEEDS[:1]),
    "js": (f"{DPO} --dpo.divergence js", SEEDS[:1]),
    "lora": (LORA, SEEDS[:1]),
    "qlora": (f"{LORA} --quantize nf4", SEEDS[:1]),
}


class Place(NamedTuple):
    """The start, as a reference; prompts of held-out pairs, and the files of pairs."""

    start: Path
    network: Network
    tokenizer: Tokenizer
    pairs: list[dict]
    prompts: list[list[int]]
    folder: Path


class Scores(NamedTuple):
    """Scores of a network, as the columns of the table."""

    kept: float
    kl: float
    words: float
    answer: float
    chosen: float
    text: float


def bench_preference(rounds: int, steps: int | None = None, base: str | None = None, only: str | None = None) -> None:
    """base: a run of the recipe pairs-sft. steps: of each run, in place of its own. only: names of rows, joined by ;."""
    del rounds
    with tempfile.TemporaryDirectory() as folder:
        place = open_place(Path(folder), base)
        said = [("", "step", *Scores._fields, "s", "MiB")]
        said.append(("start", 0, *shown([measure(place, place.start)]), "", ""))
        if only == "curve":
            show_curve(place)
            return
        show_reward(place)
        for name, (options, seeds) in ROWS.items():
            if only is None or name in only.split(";"):
                runs = [train_row(place, name, options, seed, steps) for seed in seeds]
                found = [best_of(place, run) for run, *_ in runs]
                steps_of = " ".join(str(step) for step, _ in found)
                cost = (f"{fmean(values):.0f}" for values in zip(*(each[1:] for each in runs), strict=True))
                said.append((name, steps_of, *shown([scores for _, scores in found]), *cost))
                print(table(said[0], said[-1:]), flush=True)
        print(table(said[0], said[1:]))


def open_place(folder: Path, base: str | None) -> Place:
    if base is None:
        train(f"--recipe chat-base --out {folder}/base")
        train(f"--recipe pairs-sft --init {folder}/base --out {folder}/start")
    start = resolve(Path(base or folder / "start"))
    network = model.hub.load(start).eval()
    tokenizer = load_tokenizer(start, network.config.vocab_size)
    sets, template = make_preferences(), open_template(tokenizer, None)
    held_out = sets["validation"][: CHOOSING + TESTED]
    prompts = [encode_rendered(tokenizer, template, pair["prompt"]) for pair in held_out]
    write_rows(folder / "pairs.jsonl", sets["train"])
    write_rows(folder / "held_out.jsonl", sets["validation"][CHOOSING + TESTED :][:60])
    draw = random.Random(0)
    exchanged = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in sets["train"]]
    either = [row if draw.random() < 0.5 else other for row, other in zip(sets["train"], exchanged, strict=True)]
    write_rows(folder / "reversed.jsonl", either)
    return Place(start, network, tokenizer, held_out, prompts, folder)


def train(options: str) -> str:
    """Run the command in a process of its own; return what it prints."""
    line = [sys.executable, "-m", "train", *options.split(), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def train_row(
    place: Place, name: str, options: str, seed: int, steps: int | None, saves: int = SAVES
) -> tuple[Path, float, float]:
    """Return (run, seconds of its steps, MiB)."""
    out = place.folder / re.sub(r"\W+", "-", f"{name}-{seed}")
    objective, _, rest = options.partition(" ")
    count = steps or int(re.search(r"--steps (\d+)", rest)[1])
    every = max(1, count // saves)
    corpus = place.folder / ("reversed.jsonl" if name.startswith("reversed") else "pairs.jsonl")
    files = f"--init {place.start} --corpus {corpus} --validation {place.folder}/held_out.jsonl"
    kept = f"--save-every {every} --eval-every {count} --keep {saves + 1}"
    more = f"--{objective}.replies 0 --steps {count} {kept} --seed {seed} --out {out}"
    text = train(f"--objective {objective} {files} {COMMON} {rest} {more}")
    seconds = sum(float(found) for found in re.findall(r"(?:forward|backward|optimizer) +([\d.]+) s", text))
    size, unit = re.search(r"memory +([\d.]+) (\w+) at its highest", text).groups()
    return out, seconds, float(size) * {"MiB": 1, "GiB": 1024}[unit]


def best_of(place: Place, run: Path) -> tuple[int, Scores]:
    """Return (step, scores) of the checkpoint that keeps the rule most often on the prompts to choose on."""
    found = {}
    for folder in checkpoints(run):
        replies = sample(place, open_policy(place, folder), slice(0, CHOOSING))
        found[folder] = share_kept(replies, place.pairs[:CHOOSING])
    best = max(sorted(found, key=step_of), key=found.get)
    return step_of(best), measure(place, best)


def open_policy(place: Place, folder: Path) -> Network:
    if (folder / "adapter_config.json").is_file():
        return open_network(folder)
    return model.hub.load(folder).eval()


def sample(place: Place, network: Network, part: slice) -> list[Reply]:
    """Sample a reply to each prompt."""
    options = {"context": network.config.context, "max_new_tokens": MOST, "batch_size": 50, "temperature": 1.0}
    return write_replies(network, place.tokenizer, place.prompts[part], generator=torch.Generator().manual_seed(0), **options)


def is_kept(reply: Reply, pair: dict) -> bool:
    return reply.has_ended and keeps_rule(reply.text, pair["module"]) and is_well_formed(reply.text)


def share_kept(replies: list[Reply], pairs: list[dict]) -> float:
    return fmean(is_kept(reply, pair) for reply, pair in zip(replies, pairs, strict=True))


def measure(place: Place, folder: Path) -> Scores:
    network, part = open_policy(place, folder), slice(CHOOSING, CHOOSING + TESTED)
    pairs, prompts = place.pairs[part], place.prompts[part]
    replies = sample(place, network, part)
    ends = [id for id in (network.config.eos_id,) if id is not None]
    sampled = [[*place.tokenizer.encode(reply.text), *(ends if reply.has_ended else [])] for reply in replies]
    chosen = [[*place.tokenizer.encode(pair["chosen"][0]["content"]), *ends] for pair in pairs]
    policy, start = (log_probs(each, prompts, sampled) for each in (network, place.network))
    return Scores(
        share_kept(replies, pairs),
        fmean(a - b for a, b in zip(policy, start, strict=True)),
        fmean(len(reply.text.split()) for reply in replies),
        fmean(pair["answer"] in reply.text for reply, pair in zip(replies, pairs, strict=True)),
        fmean(log_probs(network, prompts, chosen)),
        plain_text(place, network),
    )


@torch.no_grad()
def log_probs(network: Network, prompts: list[list[int]], replies: list[list[int]]) -> list[float]:
    """Return the log-probability of each reply, in batches of 50."""
    found = []
    for first in range(0, len(prompts), 50):
        rows = [(a + b, len(a)) for a, b in zip(prompts[first : first + 50], replies[first : first + 50], strict=True)]
        width = max(len(ids) for ids, _ in rows) - 1
        ids_BT, mask_BT = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
        labels_BT = torch.full((len(rows), width), IGNORE)
        for row, (ids, begin) in enumerate(rows):
            ids_BT[row, : len(ids) - 1], mask_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1]), 1
            labels_BT[row, begin - 1 : len(ids) - 1] = torch.tensor(ids[begin:])
        found += reply_log_probs(network, {"input_ids": ids_BT, "attention_mask": mask_BT}, labels_BT).tolist()
    return found


def plain_text(place: Place, network: Network) -> float:
    """Return bits a byte of held-out documentation."""
    task = open_text(place.start, place.network.config, corpus=("stdlib-docs",), eval_tokens=20_000, info=lambda line: None)
    nats, _ = evaluate(Objective(network), task.validation)["loss"]
    return bits_per_byte(nats, task.validation_bytes)


def shown(of_seeds: list[Scores]) -> list[str]:
    """Return the mean over seeds of each score; of the first with each seed's."""
    means = Scores(*(fmean(values) for values in zip(*of_seeds, strict=True)))
    each = f" ({' '.join(f'{100 * scores.kept:.0f}' for scores in of_seeds)})" if len(of_seeds) > 1 else ""
    low, high = wilson_interval(round(means.kept * TESTED), TESTED)
    first = f"{means.kept:.1%} [{100 * low:.0f}, {100 * high:.0f}]{each}"
    return [first, f"{means.kl:.1f}", f"{means.words:.1f}", f"{means.answer:.0%}", f"{means.chosen:.1f}", f"{means.text:.3f}"]


def show_curve(place: Place) -> None:
    """Print and draw the scores of each checkpoint of CURVE."""
    run, *_ = train_row(place, "curve", CURVE, 0, None, saves=CURVE_SAVES)
    names = ("kept", "well formed", "kl", "chosen", "text")
    found = {}
    for folder in [place.start, *sorted(checkpoints(run), key=step_of)]:
        step, network = (0 if folder == place.start else step_of(folder)), open_policy(place, folder)
        replies = sample(place, network, slice(CHOOSING, CHOOSING + TESTED))
        well = fmean(reply.has_ended and is_well_formed(reply.text) for reply in replies)
        scores = measure(place, folder)
        found[step] = (scores.kept, well, scores.kl, scores.chosen, scores.text)
        print(step, *(f"{value:.3f}" for value in found[step]), flush=True)
    print(table(("step", *names), [(step, *(f"{value:.3f}" for value in values)) for step, values in found.items()]))
    draw_curve(found, Path("preferences.png"))


def draw_curve(found: dict[int, tuple[float, ...]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    shares, nats = figure.subplots(1, 2)
    steps, columns = list(found), list(zip(*found.values(), strict=True))
    for name, values in (("keep the rule and are well formed", columns[0]), ("are well formed", columns[1])):
        shares.plot(steps, values, marker=".", label=name)
    shares.set(title="sampled replies that …", xlabel="step", ylabel="share", ylim=(0, 1))
    chosen = [-value for value in columns[3]]
    for name, values in (("KL to the start, nats a reply", columns[2]), ("−log π of chosen replies, nats", chosen)):
        nats.plot(steps, values, marker=".", label=name)
    nats.set(title="what it costs", xlabel="step", ylabel="nats")
    for axes in (shares, nats):
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(file, dpi=110, format="png")


def show_reward(place: Place) -> None:
    out = place.folder / "reward"
    files = f"--init {place.start} --corpus {place.folder}/pairs.jsonl --validation {place.folder}/held_out.jsonl"
    train(f"--objective reward {files} {COMMON} --lr 3e-4 --steps 150 --eval-every 50 --out {out}")
    last = metrics(out)[-1]
    print(f"reward model: {json.dumps({k: round(last[k], 4) for k in ('step', 'accuracy', 'difference', 'ece')})}", flush=True)
