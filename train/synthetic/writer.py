"""Lists of instructions and replies by a network: as continued text, or by its chat template."""

from collections.abc import Sequence

import numpy as np
import torch

from data.chat.encode import OPENED_THOUGHT, QUESTION, Renderer, encode_rendered
from data.chat.template import ChatTemplate
from data.config import DataError
from data.tokenizer.base import Tokenizer
from model.network import Network
from train.chat_replies import write_replies
from train.synthetic.examples import STREAM, continuation_prompt, question
from train.synthetic.self_instruct import Written
from train.synthetic.settings import SelfInstructSettings

LIST_ROOM = 32  # tokens that a request leaves for its list at least; else it has fewer examples


class NetworkWriter:
    """Writes by a network, a round at a time; noise is a function of (seed, round, lists or replies).

    is_chat: lists are asked for in a message of the template, else the network continues a text. Replies always follow the
    template.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        settings: SelfInstructSettings,
        *,
        stop_ids: Sequence[int],
        is_chat: bool,
    ):
        self.network, self.tokenizer, self.template, self.settings = network, tokenizer, template, settings
        self.stop_ids, self.is_chat = list(stop_ids), is_chat
        self.opening = thought_opening(template)
        self.context = network.config.context - network.body.num_virtual_tokens

    def write_lists(self, requests: Sequence[Sequence[str]], round: int) -> list[Written]:
        """Return a completion to each request, which has fewer examples where the context has no room for all."""
        fitted = [self.fit(examples) for examples in requests]
        sampling = {"temperature": self.settings.temperature, "top_p": self.settings.top_p}
        replies = self._write([ids for ids, _ in fitted], round, 0, self.settings.list_tokens, **sampling)
        starts = ["" if self.is_chat else f"{count + 1}. " for _, count in fitted]
        return [
            Written(f"{start}{text}" if text else "", has_ended, count)
            for start, (text, has_ended), (_, count) in zip(starts, replies, fitted, strict=True)
        ]

    def write_replies(self, instructions: Sequence[str], round: int) -> list[Written]:
        """Return a reply to each instruction; one to an instruction that fills the context is cut before its first token."""
        prompts = [self.reply_ids(text) for text in instructions]
        fitting = [index for index, ids in enumerate(prompts) if len(ids) < self.context]
        options = {"temperature": self.settings.reply_temperature}
        replies = self._write([prompts[index] for index in fitting], round, 1, self.settings.reply_tokens, **options)
        whole = [Written(f"{self.opening}{text}" if text else "", has_ended) for text, has_ended in replies]
        written = dict(zip(fitting, whole, strict=True))
        return [written.get(index, Written("", False)) for index in range(len(prompts))]

    def fit(self, examples: Sequence[str]) -> tuple[list[int], int]:
        """Return the ids of a request, with as many of the first examples as leave room for a list, and their number.

        Errors (DataError): not even one does.
        """
        for count in range(len(examples), 0, -1):
            ids = self.list_ids(examples[:count])
            if len(ids) + min(LIST_ROOM, self.settings.list_tokens) <= self.context:
                return ids, count
        raise DataError(
            f"a request with one example, {examples[0]!r:.60}, has {len(ids):,} tokens and leaves no room for a list in a "
            f"context of {self.context:,}: give shorter seeds, or a network of a longer context"
        )

    def list_ids(self, examples: Sequence[str]) -> list[int]:
        """Return the ids that ask for a list."""
        if self.is_chat:
            return self.reply_ids(question(examples))
        return [*self.tokenizer.affixes.prefix, *self.tokenizer.encode(continuation_prompt(examples))]

    def reply_ids(self, message: str) -> list[int]:
        """Return the ids that ask for a reply to a message."""
        ids = encode_rendered(self.tokenizer, self.template, [{"role": "user", "content": message}])
        return [int(id) for id in ids]

    def _write(self, prompts: list[list[int]], round: int, kind: int, most: int, **sampling: float) -> list[tuple[str, bool]]:
        seed = int(np.random.SeedSequence((STREAM, self.settings.seed, round, kind)).generate_state(1, np.uint64)[0] >> 1)
        device = next(self.network.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        options = {"context": self.context, "max_new_tokens": most, "pad_id": self.tokenizer.pad_id or 0}
        replies = write_replies(
            self.network, self.tokenizer, prompts, device=device, batch_size=self.settings.batch_size,
            stop_ids=self.stop_ids, generator=generator, **options, **sampling,
        )  # fmt: skip
        return [(reply.text, reply.has_ended) for reply in replies]


def thought_opening(template: ChatTemplate) -> str:
    """Return the beginning of a reply that the template's prompt for it has: "<think>\\n" as of DeepSeek-R1, else ""."""
    text = Renderer(template, None, {})([QUESTION], add_generation_prompt=True)
    found = OPENED_THOUGHT.search(text)
    return "" if found is None else found[0]
