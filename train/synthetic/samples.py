"""Rejection sampling: n replies to each prompt of a file, their rewards, and the best of each prompt as a record to learn."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data.chat.conversation import REPLY
from data.chat.encode import encode_rendered
from data.chat.prompts import PromptRecord
from data.chat.template import ChatTemplate
from data.config import DataError
from data.tokenizer.base import Tokenizer
from model.network import Network
from model.rollouts import SampledReply, sample_replies
from train.policy_task import CHECKED, weighted
from train.prompt_task import PromptIds, text_of_prompt
from train.rewards.open import Rewards
from train.rewards.sample import Sample
from train.rollout import draw_uniforms
from train.synthetic.best_of import CUT, EMPTY, choose_best
from train.synthetic.writer import thought_opening

BEST_OF = 1 << 33  # stands for the number of a rollout in the noise
NO_ROOM = "no room for a reply in the context"


class Sampling(NamedTuple):
    """Settings of sampling and of the choice. may_be_cut: a reply that has not ended may win."""

    best_of: int
    seed: int
    temperature: float
    max_reply: int
    at_least: float | None
    may_be_cut: bool
    prompts_at_once: int


@dataclass
class BestReplies:
    """Sums over prompts, for the report."""

    prompts: int = 0
    winners: int = 0
    samples: int = 0  # with a reward
    cut: int = 0
    total: float = 0.0  # of all rewards
    best_total: float = 0.0  # of the winners' rewards
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)  # reason: name of the first prompt

    def drop(self, name: str, reason: str) -> None:
        """Count a prompt without a winner."""
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, name)


class ReplySampler:
    """Samples and scores replies of a network. template: None where all prompts are strings."""

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        rewards: Rewards,
        sampling: Sampling,
        *,
        stop_ids: Sequence[int],
    ):
        self.network, self.tokenizer, self.template, self.rewards = network, tokenizer, template, rewards
        self.sampling, self.stop_ids = sampling, list(stop_ids)
        self.opening = "" if template is None else thought_opening(template)
        self.context = network.config.context - network.body.num_virtual_tokens

    def encode(self, record: PromptRecord, name: str) -> PromptIds:
        """Return the ids and the text of a prompt. Errors (DataError): turns, and no template."""
        if isinstance(record.prompt, str):
            ids = [*self.tokenizer.affixes.prefix, *self.tokenizer.encode(record.prompt)]
            return PromptIds(ids, record.prompt, record, name)
        if self.template is None:
            raise DataError(f"{name}: its prompt has turns, and the network has no chat template: --template NAME")
        ids = encode_rendered(self.tokenizer, self.template, record.prompt, tools=record.tools)
        return PromptIds([int(id) for id in ids], text_of_prompt(record) + f"\n{self.opening}".rstrip(), record, name)

    def best(
        self,
        prompts: Sequence[tuple[str, PromptRecord]],
        found: BestReplies,
        on_prompts: Callable[[int], object] | None = None,
    ) -> Iterator[dict]:
        """Yield a record for each prompt with a winner; `found` gets the sums. on_prompts(count) is told of finished prompts.

        The noise of a reply is a function of (seed, place of the prompt in the file, number of the reply): the first 4 of the
        best of 8 are those of the best of 4.
        """
        placed = [(place, self.encode(record, name)) for place, (name, record) in enumerate(prompts)]
        found.prompts += len(placed)
        for _, prompt in (each for each in placed if len(each[1].ids) >= self.context):
            found.drop(prompt.name, NO_ROOM)
        fitting = [(place, prompt) for place, prompt in placed if len(prompt.ids) < self.context]
        longest = min(self.context, max((len(prompt.ids) for _, prompt in fitting), default=0) + self.sampling.max_reply)
        some = [prompt for _, prompt in fitting[:CHECKED]]
        self.rewards.check_models(some, self.stop_ids, longest, self.tokenizer.vocab_size)
        if on_prompts is not None:
            on_prompts(len(placed) - len(fitting))
        most = self.sampling.prompts_at_once
        for first in range(0, len(fitting), most):
            part = fitting[first : first + most]
            for (_, prompt), replies, rewards in zip(part, *self.sample_and_score(part), strict=True):
                record = self.choose(prompt, replies, rewards, found)
                if record is not None:
                    yield record
            if on_prompts is not None:
                on_prompts(len(part))

    def sample_and_score(
        self, part: Sequence[tuple[int, PromptIds]]
    ) -> tuple[list[list[SampledReply]], list[list[float]]]:
        """Return the n replies to each prompt of (place, prompt), and their rewards, the weighted sums of the functions."""
        n, sampling = self.sampling.best_of, self.sampling
        noise_NT = draw_uniforms(sampling.seed, BEST_OF, 0, [place for place, _ in part], n, sampling.max_reply)
        replies = sample_replies(
            self.network,
            [list(prompt.ids) for _, prompt in part for _ in range(n)],
            uniforms_NT=noise_NT,
            stop_ids=self.stop_ids,
            temperature=sampling.temperature,
            pad_id=self.tokenizer.pad_id or 0,
            context=self.context,
        )
        groups = [replies[first : first + n] for first in range(0, len(replies), n)]
        pairs = zip(part, groups, strict=True)
        samples = [self.sample_of(prompt, reply) for (_, prompt), group in pairs for reply in group]
        totals = [weighted(row, self.rewards.weights) for row in self.rewards(samples).tolist()]
        return groups, [totals[first : first + n] for first in range(0, len(totals), n)]

    def sample_of(self, prompt: PromptIds, reply: SampledReply) -> Sample:
        """Return the sample that rewards judge."""
        text = self.text_of(reply)
        ids, columns = (*prompt.ids, *reply.ids), prompt.record.columns
        return Sample(prompt.text, text, columns, reply.has_ended, len(reply.ids), prompt.name, ids)

    def text_of(self, reply: SampledReply) -> str:
        """Return the text of a reply, without its stop token."""
        return self.tokenizer.decode(reply.ids[:-1] if reply.has_ended else reply.ids)

    def choose(
        self, prompt: PromptIds, replies: Sequence[SampledReply], rewards: Sequence[float], found: BestReplies
    ) -> dict | None:
        """Return the record of the best reply, or None where no reply may win; count both."""
        given = [value for value in rewards if not math.isnan(value)]
        found.samples += len(given)
        found.total += math.fsum(given)
        found.cut += sum(not reply.has_ended for reply in replies)
        may_win = [reply.has_ended or self.sampling.may_be_cut for reply in replies]
        choice = choose_best(rewards, at_least=self.sampling.at_least, may_win=may_win)
        if choice.place is None:
            found.drop(prompt.name, choice.reason)
            return None
        text = self.text_of(replies[choice.place])
        if not text.strip():
            found.drop(prompt.name, EMPTY)
            return None
        found.winners += 1
        found.best_total += rewards[choice.place]
        score = {"score": rewards[choice.place], "best_of": len(replies), "mean_score": choice.mean, "origin": prompt.name}
        return build_record(prompt.record, self.opening + text) | score


def build_record(record: PromptRecord, reply: str) -> dict:
    """Return a record for --objective sft: a prompt that is a string with its completion, or the turns with the reply.

    A reply in turns has no white space around it: templates add their own, as Mistral's the space before it.

    >>> build_record(PromptRecord("1 + 1 ="), " 2")
    {'prompt': '1 + 1 =', 'completion': ' 2'}
    """
    if isinstance(record.prompt, str):
        return {"prompt": record.prompt, "completion": reply}
    tools = {} if record.tools is None else {"tools": record.tools}
    return {"messages": [*record.prompt, {"role": REPLY, "content": reply.strip()}]} | tools


def advice(reasons: Iterable[str]) -> str:
    """Return what to do where no prompt has a winner, by the most frequent reason."""
    known = {
        CUT: "raise --max-reply, teach stopping first (--objective sft), or allow cut replies (--truncated keep)",
        EMPTY: "the network says nothing: is it tuned with this template?",
        NO_ROOM: "give shorter prompts, or a network of a longer context",
    }
    reason = next(iter(reasons))
    return known.get(reason, "raise --best-of, or lower --at-least")
