"""Score replies by a reward model: their rewards, the ranking of the replies to each prompt, and its accuracy on pairs."""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.messages import format_count
from eval.commands.reply_records import Replies, describe_left_out, read_replies
from eval.commands.reward_options import Reward
from eval.commands.texts import EvalError

if TYPE_CHECKING:
    import torch

    from eval.pair_rewards import LengthBias
    from eval.report import Result
    from model.reward import MeanScore

DIGITS = 4


def score_replies(options: Reward) -> None:
    """Score the replies of a command line and print the result, with notes on standard error."""
    from data.tokenizer.open import load_tokenizer
    from model.commands.opening import open_network, tokenizer_folder
    from model.config_json import read_config
    from model.reward import check_reward_model, read_mean_score, reward_scores
    from train.runs.open import checked_device, resolve

    if options.out is not None and options.out.exists():
        raise EvalError(f"--out {options.out} is there already: name a new file")
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    device, folder = checked_device(options.device), resolve(options.model)
    if (folder / "config.json").is_file():  # before the weights are read
        check_reward_model(read_config(folder, any_head=True), str(options.model))
    network = open_network(folder, device, options.base)
    check_reward_model(network.config, str(options.model))
    tokenizer = load_tokenizer(tokenizer_folder(folder, network), network.config.vocab_size)
    found = read_replies(options, tokenizer, most=network.config.context - network.body.num_virtual_tokens)
    mean = read_mean_score(folder)
    for note in describe_left_out(found):
        print(f"note: {note}", file=sys.stderr)
    for note in describe_mean(folder, mean):
        print(f"note: {note}", file=sys.stderr)
    # Equal replies are scored once: in batches of different shapes the last bits would differ, and so would their ranks.
    distinct = {reply.ids.tobytes(): reply.ids for reply in found.replies}
    scoring = {"mean_score": mean.value if mean else 0.0, "batch_size": options.batch_size}
    reward_U = reward_scores(network, list(distinct.values()), progress=show_progress, **scoring)
    places = {key: place for place, key in enumerate(distinct)}
    reward_N = reward_U[[places[reply.ids.tobytes()] for reply in found.replies]]
    if wrong := (~reward_N.isfinite()).nonzero().flatten().tolist():
        first = found.replies[wrong[0]]
        raise EvalError(f"{first.record}: the reward of reply {first.name} is inf or NaN")
    rank_N = rank_replies(found, reward_N.tolist())
    if options.out is not None:
        write_rewards(options.out, found, reward_N.tolist(), rank_N, mean)
    report(options, found, reward_N, rank_N, mean)


def describe_mean(folder: Path, mean: "MeanScore | None") -> Iterator[str]:
    """Yield a note where the mean score is missing, or that of other weights."""
    if mean is None:
        yield f"{folder} has no reward.json: rewards are its scores, whose zero has no meaning"
    elif folder.parent.name == "checkpoints" and mean.step is not None and folder.name != f"step-{mean.step}":
        yield f"{folder} was saved without a validation: its mean score is that of step {mean.step:,}"


def show_progress(batches: list) -> Iterator:
    from tqdm import tqdm

    return iter(tqdm(batches, unit="batch", desc="scoring", disable=not sys.stderr.isatty(), leave=False, delay=1))


def rank_replies(found: Replies, rewards: Sequence[float]) -> list[int]:
    """Return each reply's rank among those to its prompt, 1 the best; equal rewards have the same rank."""
    ranks = [0] * len(rewards)
    for places in found.by_prompt():
        for place in places:
            ranks[place] = 1 + sum(rewards[other] > rewards[place] for other in places)
    return ranks


def write_rewards(
    path: Path, found: Replies, rewards: Sequence[float], ranks: Sequence[int], mean: "MeanScore | None"
) -> None:
    """Write one JSON line a reply to a new file, which is there only when complete."""
    sizes = [len(places) for places in found.by_prompt()]
    making = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with making.open("x", encoding="utf-8", errors="replace") as file:
            for reply, reward, rank in zip(found.replies, rewards, ranks, strict=True):
                line = {"record": reply.record, "prompt": reply.prompt + 1, "reply": reply.name, "reward": reward}
                line |= {"score": reward + (mean.value if mean else 0.0), "tokens": reply.tokens, "rank": rank}
                line |= {"of": sizes[reply.prompt], "text": reply.text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.link(making, path)  # fails where a file has come to be there
    except FileExistsError:
        raise EvalError(f"--out {path} is there already: name a new file") from None
    except OSError as error:
        raise EvalError(f"--out {path}: {error.strerror}") from error
    finally:
        making.unlink(missing_ok=True)


def score_pairs(options: Reward, found: Replies, reward_N: "torch.Tensor") -> "Result | None":
    """Return accuracy, margin and calibration error on the pairs with their intervals; None without a pair."""
    import torch

    from eval.pair_rewards import PAIR_METRICS
    from eval.report import Result, Row, score_with_interval

    if not found.pairs:
        return None
    better_P, worse_P = torch.tensor(found.pairs).T
    difference_P = reward_N[better_P] - reward_N[worse_P]
    prompt_P = torch.tensor([found.replies[place].prompt for place in better_P.tolist()])
    statistics = [metric.statistics(difference_P, [prompt_P]) for metric in PAIR_METRICS]
    rows = [
        Row("", *score_with_interval(metric, sums_BK, options.samples, options.seed))
        for metric, sums_BK in zip(PAIR_METRICS, statistics, strict=True)
    ]
    return Result(len(statistics[0]), rows, "prompt")


def report(options: Reward, found: Replies, reward_N: "torch.Tensor", ranks: Sequence[int], mean: "MeanScore | None") -> None:
    """Print the result, as text or JSON."""
    import torch

    from eval.pair_rewards import length_bias
    from eval.report import finite_or_none, format_result

    result = score_pairs(options, found, reward_N)
    length_N = torch.tensor([reply.tokens for reply in found.replies])
    bias = length_bias(reward_N, length_N, torch.tensor([reply.prompt for reply in found.replies]))
    longer = count_longer(found, reward_N) if found.pairs else None
    if options.json:
        shown: dict[str, object] = {"records": found.records, "replies": len(found.replies), "prompts": len(found.prompts)}
        shown |= {"left_out": {reason: len(names) for reason, names in found.left_out.items()}, "cut": len(found.cut)}
        shown |= {"mean_score": mean.value if mean else None, "mean_reward": float(reward_N.double().mean())}
        shown["length"] = {name: finite_or_none(value) for name, value in bias._asdict().items()}
        shown["length"] |= {"longer_is_better": longer[0], "longer_is_preferred": longer[1]} if longer else {}
        shown["pairs"] = result.as_json({}) if result else None
        print(json.dumps(shown, ensure_ascii=False))
        return
    lines = [*describe_rewards(options, found, reward_N, mean), *show_rankings(options, found, reward_N.tolist(), ranks)]
    print("\n".join([*lines, *describe_lengths(found, bias, longer)]))
    if result is not None:
        print(f"\n{format_result(result, {})}")


def count_longer(found: Replies, reward_N: "torch.Tensor") -> tuple[float, float] | None:
    """Return, of the pairs of unequal lengths, the share whose longer reply is the better one, and the share whose longer reply
    has the higher reward; None without such a pair."""
    uneven = [(b, w) for b, w in found.pairs if found.replies[b].tokens != found.replies[w].tokens]
    if not uneven:
        return None
    is_longer = [found.replies[b].tokens > found.replies[w].tokens for b, w in uneven]
    is_right = [bool(reward_N[b] > reward_N[w]) for b, w in uneven]
    preferred = [right == longer for right, longer in zip(is_right, is_longer, strict=True)]
    return sum(is_longer) / len(uneven), sum(preferred) / len(uneven)


def describe_rewards(options: Reward, found: Replies, reward_N: "torch.Tensor", mean: "MeanScore | None") -> Iterator[str]:
    """Yield lines on the meaning of a reward and on the rewards of the file."""
    of = f"{options.model}: reward = score"
    if mean is None:
        yield f"{of} (no reward.json)"
    else:
        step = f" at step {mean.step:,}" if mean.step is not None else ""
        yield f"{of} - {mean.value:.{DIGITS}f}, the mean score of preferred held-out replies{step} (reward.json)"
    counts = format_count(len(found.replies), "reply", "replies"), format_count(len(found.prompts), "prompt")
    yield f"{options.file}: {format_count(found.records, 'record')}, {counts[0]} to {counts[1]}"
    low, high, middle = (float(value) for value in (reward_N.min(), reward_N.max(), reward_N.double().mean()))
    yield f"rewards  {low:.{DIGITS}f} to {high:.{DIGITS}f}, mean {middle:.{DIGITS}f}"


def show_rankings(options: Reward, found: Replies, rewards: Sequence[float], ranks: Sequence[int]) -> Iterator[str]:
    """Yield the first prompts with their replies, the best first."""
    from eval.report import shorten

    prompts = {number: text for number, text in found.prompts.values()}
    every = found.by_prompt()
    for places in every[: options.show]:
        first, is_one = found.replies[places[0]], len({found.replies[place].record for place in places}) == 1
        yield f"\n{first.record}  {shorten(prompts[first.prompt])}"
        for place in sorted(places, key=lambda place: (ranks[place], place)):
            reply = found.replies[place]
            rank = f"{ranks[place]:>3}." if len(places) > 1 else "    "
            name, length = reply.name if is_one else f"{reply.record} {reply.name}", format_count(reply.tokens, "token")
            yield f"{rank} {rewards[place]:+.{DIGITS}f}  {name:8}  {length:>10}  {shorten(reply.text)}"
    if options.show and len(every) > options.show:
        yield f"\n… {format_count(len(every) - options.show, 'further prompt')} (--show N, --out FILE)"
    if options.show:
        yield ""


def describe_lengths(found: Replies, bias: "LengthBias", longer: tuple[float, float] | None) -> Iterator[str]:
    """Yield lines on the lengths of replies and on their correlation with rewards."""
    lengths = [reply.tokens for reply in found.replies]
    yield f"lengths  {min(lengths):,} to {max(lengths):,} tokens, mean {sum(lengths) / len(lengths):.1f}"
    named = {"Pearson": bias.pearson, "Spearman": bias.spearman, "Pearson within prompts": bias.within}
    shown = " · ".join(f"{name} {'–' if math.isnan(value) else f'{value:+.3f}'}" for name, value in named.items())
    yield f"         correlation of reward with length: {shown}"
    if longer is not None:
        yield f"         the longer reply is the better one in {longer[0]:.1%} of the pairs, and preferred in {longer[1]:.1%}"
