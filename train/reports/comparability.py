"""Tell whether the losses of runs may be compared: the same objective, the same held-out text, the same tokenizer."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.config import parse_entry
from train.registry import is_file, name_of
from train.runs.checkpoint import checkpoints, read_state

Settings = dict[str, object]  # of a run's config.toml: "optimizer.lr" → value
TOKENIZER = "tokenizer_sha256"
# Settings of an objective that leave the validation loss as it is.
HARMLESS = {"best", "bleu", "generated", "packing"}
# Of objectives whose score is the reward of held-out prompts these settings alone decide on it.
OF_REPLIES = frozenset({"max_reply", "overlong", "temperature", "template", "validation_prompts", "variables"})
DECIDING = {"grpo": OF_REPLIES, "rloo": OF_REPLIES}
REWARDS = ("rewards.reward", "rewards.reward_weights", "recorded.reward_sha256")


def not_comparable(runs: Sequence[Path], settings: Sequence[Settings]) -> str:
    """Name what makes the losses of these runs incomparable, in one line; "" where nothing does.

    A checkpoint's state.json tells tokenizers and texts apart; for a run without one its settings have to do.
    """
    texts = [text_of(run) for run in runs]
    tokens = tokenizers(settings, texts)
    parts = [part for part in (objectives(settings), held_out(settings, texts), tokens) if part]
    is_per_byte = parts == [tokens] and objective_of(settings[0]) == "clm"
    advice = ", and a loss is per token: compare bits per byte" if is_per_byte else ""
    return f"not comparable: {'; '.join(parts)}{advice}" if parts else ""


def text_of(run: Path) -> dict:
    """The fingerprint of text and tokenizer in the run's latest checkpoint; {} where there is none."""
    for folder in checkpoints(run):
        try:
            return dict(read_state(folder)["text"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def objective_of(settings: Settings) -> str:
    """
    >>> objective_of({}), objective_of({"run.objective": "mine/toy.py"})
    ('clm', 'toy')
    """
    return name_of(str(settings.get("run.objective", "clm")))


def objectives(settings: Sequence[Settings]) -> str:
    found = list(dict.fromkeys(map(objective_of, settings)))
    if len(found) > 1:
        return f"the objectives differ ({', '.join(found)})"
    if is_file(str(settings[0].get("run.objective", ""))) and differ(settings, "recorded.objective_sha256"):
        return f"the objectives differ ({found[0]}: the files have different contents)"
    keys = dict.fromkeys(key for each in settings for key in each if key.startswith(f"{found[0]}."))
    names = [key for key in keys if is_deciding(found[0], key.partition(".")[2]) and differ(settings, key)]
    if found[0] in DECIDING and any(differ(settings, key) for key in REWARDS):
        return "the rewards differ"
    return f"the objective's settings differ ({', '.join(names)})" if names else ""


def is_deciding(objective: str, setting: str) -> bool:
    """Return True for a setting of an objective that changes the validation loss."""
    return setting in DECIDING[objective] if objective in DECIDING else setting not in HARMLESS


def held_out(settings: Sequence[Settings], texts: Sequence[dict]) -> str:
    """Name the settings by which the runs are validated on different text, or ""."""
    names = list(dict.fromkeys(name for each in settings for name in deciding(each) if differ(settings, name, plain)))
    if names and not same_texts(texts):  # else the same text from another place
        return f"the held-out texts differ ({', '.join(names)})"
    # Classification scores all held-out texts; else more tokens than there are change nothing.
    limits = [each.get("report.eval_tokens", math.inf) for each in settings]
    scored = {min(limit, text.get("validation_tokens", math.inf)) for limit, text in zip(limits, texts, strict=True)}
    if len(set(limits)) > 1 and len(scored) > 1 and not any("labels" in text for text in texts):
        return "the held-out texts differ (report.eval_tokens)"
    if names or any(each.get(TOKENIZER) != texts[0].get(TOKENIZER) for each in texts):
        return ""  # counts of tokens tell texts apart under one tokenizer only
    keys = ["validation_tokens", "labels"] + ["records_sha256"] * all(not each.get("data.validation") for each in settings)
    for key in keys:
        if len({json.dumps(each[key]) for each in texts if key in each}) > 1:
            return "the held-out texts differ (the files have changed between the runs)"
    return ""


def deciding(settings: Settings) -> Iterator[str]:
    """The settings that decide on the held-out text."""
    yield "data.validation"
    if not settings.get("data.validation"):
        yield from ("data.corpus", "data.val_fraction", "data.dedup")
    yield from ("data.text_key", "data.on_bad_text")


def same_texts(texts: Sequence[dict]) -> bool:
    """True where the fingerprints say that training and held-out text are the same, tokenizer included."""
    return bool(texts[0]) and all(each == texts[0] for each in texts)


def tokenizers(settings: Sequence[Settings], texts: Sequence[dict]) -> str:
    if all("labels" in each for each in texts):
        return ""  # classification has one loss a text, whatever its tokens
    known = [each[TOKENIZER] for each in texts if TOKENIZER in each]
    sizes = [each.get("data.vocab_size") for each in settings]
    sizes = list(dict.fromkeys(size for size in sizes if size is not None))
    is_one = len(known) == len(texts) and len(set(known)) == 1
    if is_one or (len(set(known)) <= 1 and len(sizes) <= 1):
        return ""
    how = f"vocabularies of {' and '.join(f'{size:,}' for size in sizes)} pieces" if len(sizes) > 1 else "by their SHA-256"
    return f"the tokenizers differ ({how})"


def differ(settings: Sequence[Settings], name: str, value=lambda value: value) -> bool:
    return any(value(each.get(name)) != value(settings[0].get(name)) for each in settings)


def plain(value: object) -> object:
    """A corpus without the weights of its sources, which concern the training alone."""
    if not isinstance(value, list):
        return value
    paths = [parse_entry(each).path for each in value]
    return sorted(parse_entry(path, "temperature").path for path in paths)  # NAME=PATH; a path is absolute, and no NAME=…
