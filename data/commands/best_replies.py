"""`python -m data replies MODEL FILE --best-of N --score REWARD --out FILE.jsonl`: rejection sampling."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import tyro

from data.config import DataConfig, DataError
from data.messages import format_count
from train.command_line import Needs

if TYPE_CHECKING:
    from data.chat.prompts import PromptRecord
    from train.synthetic.samples import BestReplies


@dataclass(frozen=True, kw_only=True)
class Replies:
    """Sample N replies to each prompt, and write the best one of each by a reward, for --objective sft (rejection sampling).

    Records: {"messages" (or "prompt", "completion"), "score", "best_of", "mean_score", "origin"}. Of equal scores the first
    reply wins."""

    model: tyro.conf.Positional[Path]
    """A run, a model folder, or a run or folder of an adapter."""
    files: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and globs of prompts: "prompt", "messages" or "instruction"; other columns are for rewards."""
    out: Path
    """The file to write, .jsonl. Nothing is overwritten."""
    best_of: int
    """N, replies to each prompt."""
    score: tuple[str, ...]
    """Rewards, one or several, as of --reward in `python -m train`: exact, answer, number, format, arithmetic, length:N,
    length_target:N, regex:PATTERN, tests; PATH.py:FUNCTION, a function of your own (its code is run); or a reward model's
    folder."""
    score_weights: tuple[float, ...] = ()
    """The factor of each reward. Default: 1 each."""
    score_workers: int = 1
    """Processes that run the functions of your own files; 0: this one, without a timeout."""
    score_timeout: float | None = None
    """Seconds that a function of your own has for the replies to one prompt (default 30), or a reply's code (5)."""
    allow_code_rewards: bool = False
    """Let --score tests run the code that the network writes, in bubblewrap."""
    at_least: float | None = None
    """Leave out a prompt whose best reply has a lower score."""
    truncated: Literal["drop", "keep"] = "drop"
    """A reply that is cut at max-reply tokens cannot win (--objective sft would teach to stop there); or it can."""
    max_reply: int = 128
    """Maximal tokens of a reply."""
    temperature: float = 1.0
    """Temperature of sampling."""
    seed: int = 0
    """Seed of sampling."""
    batch_size: int = 32
    """Prompts at a time."""
    template: str | None = None
    """The chat template: one of ours by its name, or one of the folder's. Default: the folder's own."""
    base: Path | None = None
    """For an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""

    NEEDS: ClassVar = (
        Needs(
            ("score_workers", "score_timeout"),
            lambda options: any(".py:" in each or each.partition(":")[0] == "tests" for each in options.score),
            "it is of functions of your own, and of tests",
        ),
        Needs(
            ("allow_code_rewards",),
            lambda options: any(each.partition(":")[0] == "tests" for each in options.score),
            "it is of --score tests",
        ),
    )

    def __post_init__(self) -> None:
        for name, least in {"best_of": 1, "max_reply": 1, "batch_size": 1, "seed": 0, "score_workers": 0}.items():
            if getattr(self, name) < least:
                raise DataError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if not 0 < self.temperature < math.inf:
            raise DataError(f"--temperature {self.temperature}: must be finite and above 0, or all N replies are equal")
        if self.at_least is not None and not math.isfinite(self.at_least):
            raise DataError(f"--at-least {self.at_least}: must be a finite number")
        if self.score_timeout is not None and not self.score_timeout > 0:
            raise DataError(f"--score-timeout {self.score_timeout}: must be above 0")
        if self.score_weights and len(self.score_weights) != len(self.score):
            raise DataError(f"--score-weights: {len(self.score_weights)} for {format_count(len(self.score), 'reward')}")
        if self.score_weights and not any(self.score_weights):
            raise DataError("--score-weights: all are 0, and no reply is better than another")
        if not self.files:
            raise DataError("name a file of prompts")
        if self.out.suffix.lower() != ".jsonl":
            raise DataError(f"--out {self.out}: its name must end in .jsonl")


def write_best_replies(options: Replies) -> None:
    from tqdm import tqdm

    from data.commands.pairs import refuse_existing, write_lines
    from data.commands.writing_network import open_writing
    from train.config import RewardConfig
    from train.rewards.open import open_rewards
    from train.runs.errors import TrainError
    from train.synthetic.samples import BestReplies, ReplySampler, Sampling

    refuse_existing(options.out)
    prompts = read_prompts(options.files)
    rewards = {"reward": options.score, "reward_weights": options.score_weights}
    rewards |= {"reward_workers": options.score_workers, "reward_timeout": options.score_timeout}
    rewards |= {"allow_code_rewards": options.allow_code_rewards}
    sampling = Sampling(
        best_of=options.best_of, seed=options.seed, temperature=options.temperature, max_reply=options.max_reply,
        at_least=options.at_least, may_be_cut=options.truncated == "keep", prompts_at_once=options.batch_size,
    )  # fmt: skip
    found = BestReplies()
    try:
        with open_rewards(RewardConfig(**rewards), options.device) as judge:
            opened = open_writing(options.model, base=options.base, template=options.template, device=options.device)
            network = (opened.network, opened.tokenizer, opened.template)
            sampler = ReplySampler(*network, judge, sampling, stop_ids=opened.stop_ids)
            judge.start()
            bar = tqdm(total=len(prompts), unit=" prompts", disable=not sys.stderr.isatty(), leave=False)
            with bar:
                write_lines(options.out, refuse_none(sampler.best(prompts, found, bar.update), found))
    except TrainError as error:
        raise DataError(str(error).replace("--reward", "--score")) from error  # as the options are named here
    for line in report(options, found):
        print(line)


def read_prompts(files: tuple[str, ...]) -> list[tuple[str, "PromptRecord"]]:
    """Return (name, PromptRecord) of each record. Errors (DataError): a record without a prompt, by its name."""
    from data.chat.prompts import read_prompt
    from data.sources.records import read_corpus_rows

    rows = read_corpus_rows(DataConfig(corpus=files), [], lambda line: print(f"note: {line}", file=sys.stderr), option="FILE")
    found = []
    for name, row in zip(rows.names, rows.values, strict=True):
        try:
            found.append((name, read_prompt(row)))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return found


def refuse_none(records: "Iterator[dict]", found: "BestReplies") -> "Iterator[dict]":
    """Yield the records; where there is none, raise the DataError that says why and what to do."""
    from train.synthetic.samples import advice

    yield from records
    if not found.winners:
        reasons = [f"{count:,} {reason}" for reason, count in found.dropped.most_common()]
        what = advice(reason for reason, _ in found.dropped.most_common())
        mean = f"; mean score {found.total / found.samples:.4f}" if found.samples else ""
        prompts = format_count(found.prompts, "prompt")
        raise DataError(f"nothing to write: no reply to keep of {prompts} ({', '.join(reasons)}{mean}): {what}")


def report(options: Replies, found: "BestReplies") -> list[str]:
    """Return what is printed of a finished command."""
    from train.synthetic.best_of import best_of_n_kl_bound

    n, dropped = options.best_of, sum(found.dropped.values())
    samples = format_count(found.samples, "scored reply", "scored replies")
    lines = [
        f"prompts      {found.prompts:,}, {format_count(n, 'reply', 'replies')} each",
        f"score        {found.total / found.samples:.4f} on average of {samples}",
        f"best of {n:<4} {found.best_total / found.winners:.4f} on average of {format_count(found.winners, 'winner')}",
        f"dropped      {dropped / found.prompts:.1%} of the prompts",
    ]
    lines += [f"{'':13}{count:,} {why}: {found.first_dropped[why]}" for why, count in found.dropped.most_common()]
    if found.cut:
        lines.append(f"cut          {format_count(found.cut, 'reply', 'replies')} at --max-reply {options.max_reply}")
    further = " (before --at-least and cut replies, which choose further)" if dropped or found.cut else ""
    lines.append(f"KL           at most {best_of_n_kl_bound(n):.4f} nats from the policy, ln n - (n - 1) / n{further}")
    return [*lines, f"wrote        {options.out}"]
