"""Instruction tuning on the built-in conversations through `python -m train`: before and after, and with shuffled replies.

The base is the recipe chat-base. Each row answers the first question of the same held-out conversations, greedily, by the
same prompts; modules, contexts and replies of these are not in training, so an exact match is copied from the context, except
for "The text does not say.".

    ended      the share of replies that end by themselves
    exact      the share that equals the reference, of the questions that the context answers
    unanswered the same of the others
    ROUGE-L    F, the mean over all questions

Before: the base with rows for the two control tokens. Tuned: three seeds. Shuffled: the same runs with the replies of
training permuted among questions of one form. Each share is the mean over the seeds, with a bootstrap interval over questions.
"""

import random
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

import model.hub
from data.chat.encode import encode_rendered, terminators
from data.made.conversations import make_conversations
from data.tokenizer.open import load_tokenizer
from eval.rouge import rouge_scores
from model.resize import add_rows
from tests.bench.timing import table
from tests.records import write_rows
from tests.runs import command
from train.chat_data import open_chat_tokenizer, set_stop_ids
from train.chat_replies import Reply, write_replies
from train.runs.open import resolve

SEEDS, QUESTIONS, MOST = (0, 1, 2), 200, 48
OPTIONS = "--batch-size 8 --eval-tokens 20000 --sample-every 0 --sft.replies 0 --sft.overlong drop"


class Scores(NamedTuple):
    """One value a question: 1 or 0, and ROUGE-L's F."""

    ended: list[float]
    exact: list[float]
    unanswered: list[float]
    rouge: list[float]


def bench_sft(rounds: int, steps: int = 500, base: str | None = None) -> None:
    del rounds
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = base or train(place / "base", "--recipe chat-base")
        sets = make_conversations()
        files = {"tuned": sets["train"], "shuffled": shuffle_replies(sets["train"])}
        for name, records in [*files.items(), ("held out", sets["validation"])]:
            write_rows(place / f"{name}.jsonl", records)
        asked = sets["validation"][:QUESTIONS]
        rows = [("before", *cells([score(Path(base), asked)]))]
        for name in files:
            corpus = ["--corpus", str(place / f"{name}.jsonl"), "--validation", str(place / "held out.jsonl")]
            options = f"--objective sft --init {base} --steps {steps} {OPTIONS}"
            runs = [train(place / f"{name}-{seed}", f"{options} --seed {seed}", corpus) for seed in SEEDS]
            rows.append((name, *cells([score(Path(run), asked) for run in runs])))
        print(table(("", "ended", "exact", "unanswered", "ROUGE-L"), rows))


def train(out: Path, options: str, more: list[str] = ()) -> str:
    said = command(*options.split(), *more, "--out", str(out), "--threads", str(torch.get_num_threads()))
    assert said.code == 0, said.err
    return str(out)


def shuffle_replies(records: list[dict]) -> list[dict]:
    """Permute the replies among the questions of one form, answered or not."""
    places = defaultdict(list)
    for record in records:
        turns = [message for message in record["messages"] if message["role"] == "assistant"]
        for form, message in zip(record["kind"].split(), turns, strict=True):
            places[form.partition(":")[0]].append(message)
    copies = {id(message): dict(message) for messages in places.values() for message in messages}
    for form, messages in sorted(places.items()):
        contents = [message["content"] for message in messages]
        random.Random(form).shuffle(contents)
        for message, content in zip(messages, contents, strict=True):
            copies[id(message)]["content"] = content
    return [
        record | {"messages": [copies.get(id(message), message) for message in record["messages"]]} for record in records
    ]


def score(run: Path, records: list[dict]) -> Scores:
    """Answer the first question of each record."""
    folder = resolve(run)
    network = model.hub.load(folder).eval()
    own = load_tokenizer(folder, network.config.vocab_size)
    tokenizer, template, new_ids = open_chat_tokenizer(None, own, lambda line: None)
    if new_ids:
        network = set_stop_ids(add_rows(network, new_ids), terminators(tokenizer, template))
    firsts = [next(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant") for record in records]
    pairs = list(zip(records, firsts, strict=True))
    prompts = [encode_rendered(tokenizer, template, record["messages"][:i]) for record, i in pairs]
    sizes = {"context": network.config.context, "max_new_tokens": MOST, "batch_size": 16}
    replies: list[Reply] = write_replies(network, tokenizer, prompts, **sizes)
    right = [record["messages"][i]["content"].strip() for record, i in pairs]
    absent = [":absent" in record["kind"].split()[0] for record in records]
    equal = [float(reply.has_ended and reply.text == text) for reply, text in zip(replies, right, strict=True)]
    rouge = [
        rouge_scores([reply.text], [text], kinds="rougeL")["rougeL"].value for reply, text in zip(replies, right, strict=True)
    ]
    return Scores(
        [float(reply.has_ended) for reply in replies],
        [value for value, none in zip(equal, absent, strict=True) if not none],
        [value for value, none in zip(equal, absent, strict=True) if none],
        rouge,
    )


def cells(of_seeds: list[Scores]) -> list[str]:
    """Return mean [low, high] of each score: the mean over seeds, with the percentile bootstrap over questions."""
    found = []
    for per_seed in zip(*of_seeds, strict=True):
        means = torch.tensor(per_seed, dtype=torch.float64).mean(0)
        draws = torch.randint(len(means), (2000, len(means)), generator=torch.Generator().manual_seed(0))
        low, high = means[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found.append(f"{means.mean():.3f} [{low:.3f}, {high:.3f}]")
    return found
