"""Replies that a network writes to held-out prompts, for validation."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from data.chat.conversation import Conversation, Plain
from data.chat.encode import ChatEncoder, prompt_and_reply
from data.tokenizer.base import Tokenizer
from model.generate import generate

MAX_QUESTION = 300  # characters of a prompt in a sample


class Prompt(NamedTuple):
    """The ids that ask for a reply, and the reference."""

    ids: list[int]
    reference: str


class Reply(NamedTuple):
    """The text of a reply, without white space around it, and if it ended by itself."""

    text: str
    has_ended: bool


def choose_prompts(encoder: ChatEncoder, records: Iterable[Conversation | Plain], most: int, context: int) -> list[Prompt]:
    """Return prompts for the last learned reply of the first records with room for the reference; plain text has none."""
    found: list[Prompt] = []
    for record in records:
        if len(found) == most:
            break
        if isinstance(record, Plain) and not record.prompt:
            continue
        prompt = Prompt(*prompt_and_reply(encoder, record))
        if len(prompt.ids) + len(encoder.tokenizer.encode(prompt.reference)) < context:
            found.append(prompt)
    return found


def write_replies(
    network: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    context: int,
    max_new_tokens: int,
    pad_id: int = 0,
    temperature: float = 0.0,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> list[Reply]:
    """Write a reply to each prompt (ids), in batches of similar length, within the context; temperature 0: the greedy one.

    A reply ends by itself at one of stop_ids (None: the network's), which is not part of it, within max_new_tokens and the
    context, whatever the longer prompts of its batch leave room for.
    """
    if stop_ids is None:
        stop_ids = [id for id in dict.fromkeys((network.config.eos_id, *network.config.stop_ids)) if id is not None]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: dict[int, Reply] = {}
    for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        width = max(len(prompts[i]) for i in batch)
        pads = [width - len(prompts[i]) for i in batch]
        ids_BT = torch.tensor([[pad_id] * pad + prompts[i] for pad, i in zip(pads, batch, strict=True)], device=device)
        mask_BT = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)
        rooms = [min(max_new_tokens, context - len(prompts[i])) for i in batch]
        options = {"max_new_tokens": max(rooms), "stop_ids": stop_ids, "temperature": temperature, "top_p": top_p}
        new_BN = generate(network, ids_BT, attention_mask=mask_BT, generator=generator, **options).tolist()
        for i, room, new in zip(batch, rooms, new_BN, strict=True):
            ids = new[:room]  # beyond its room a row's window slides
            end = next((index for index, id in enumerate(ids) if id in stop_ids), None)
            replies[i] = Reply(tokenizer.decode(ids[:end]).strip(), end is not None)
    return [replies[i] for i in range(len(prompts))]


def describe_reply(tokenizer: Tokenizer, prompt: Prompt, reply: Reply) -> str:
    """Return the end of the prompt, the reference and the reply in three lines."""
    question = " ".join(tokenizer.decode(prompt.ids).split())
    question = question if len(question) <= MAX_QUESTION else f"… {question[-MAX_QUESTION:]}"
    sample = {"prompt": question, "reference": prompt.reference, "reply": reply.text + " […]" * (not reply.has_ended)}
    return "\n".join(f"{name:9}  {text}" for name, text in sample.items())
