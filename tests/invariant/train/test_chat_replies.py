"""Replies that validation writes: to which prompts, in batches as one by one, up to a stop id or the end of the context."""

import pytest
import torch

from data.chat.conversation import Conversation, Plain
from data.chat.encode import encode_rendered
from model.generate import generate
from tests.chat_runs import CHATML, open_sft, write_base, write_conversations
from tests.conftest import randomized, tiny_config
from train.chat_replies import choose_prompts, describe_reply, write_replies

SYSTEM = {"role": "system", "content": "Be brief."}
USER, REPLY = {"role": "user", "content": "the list"}, {"role": "assistant", "content": " of names \n"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    place = tmp_path_factory.mktemp("replies")
    write_base(place / "base", CHATML)
    corpus = write_conversations(place / "train.jsonl", 12)
    return open_sft(place / "base", corpus, template="chatml")[0]


def test_prompts_are_of_the_last_learned_reply(task):
    """Text without a prompt has none; a prompt needs room for its reference."""
    encoder, tokenizer = task.encoder, task.tokenizer
    two = Conversation((SYSTEM, USER, REPLY, USER, REPLY), None, (False, False, True, False, False))
    records = [Plain("", "text"), Plain("the list", " of names"), two]
    strings, first = choose_prompts(encoder, records, 9, 128)
    assert strings == ([330, *tokenizer.encode("the list")], "of names")
    assert first == (encode_rendered(tokenizer, encoder.template, (SYSTEM, USER)), "of names")
    assert choose_prompts(encoder, records, 1, 128) == [strings] and choose_prompts(encoder, records, 0, 128) == []
    needed = len(strings.ids) + len(tokenizer.encode("of names"))
    assert choose_prompts(encoder, records, 9, needed + 1)[0] == strings
    assert strings not in choose_prompts(encoder, records, 9, needed)


def test_batches_write_what_single_prompts_write(task):
    """Left-padded rows of several lengths; a reply ends before a stop id, or where the context or max_new_tokens does."""
    network = randomized(tiny_config("llama", vocab_size=task.tokenizer.vocab_size, context=128))
    prompts = [prompt.ids for prompt in task.prompts(9)] + [task.tokenizer.encode("a b c d e f g h") * n for n in (1, 3, 5)]
    options = {"context": 120, "max_new_tokens": 30}
    alone = [write_replies(network, task.tokenizer, [ids], **options)[0] for ids in prompts]
    assert write_replies(network, task.tokenizer, prompts, batch_size=3, **options) == alone
    tokens = [generate(network, torch.tensor([ids]), max_new_tokens=30, temperature=0.0)[0].tolist() for ids in prompts]
    frequent = max({id for row in tokens for id in row}, key=lambda id: sum(id in row for row in tokens))
    network.config = network.config.replace(eos_id=None, stop_ids=(frequent,))
    replies = write_replies(network, task.tokenizer, prompts, batch_size=4, **options)
    assert {reply.has_ended for reply in replies} >= {True}
    for reply, row in zip(replies, tokens, strict=True):
        assert reply.has_ended == (frequent in row)
        end = row.index(frequent) if frequent in row else None
        assert reply.text == task.tokenizer.decode(row[:end]).strip()
    longest = max(prompts, key=len)
    tight = options | {"context": len(longest) + 3}  # each has its own room, whatever its batch has
    network.config = network.config.replace(stop_ids=())
    alone = [write_replies(network, task.tokenizer, [ids], **tight)[0] for ids in prompts]
    assert write_replies(network, task.tokenizer, prompts, batch_size=len(prompts), **tight) == alone
    network.config = network.config.replace(stop_ids=(frequent,))
    (short,) = write_replies(network, task.tokenizer, [longest], context=len(longest) + 2, max_new_tokens=30)
    assert short.text == task.tokenizer.decode(tokens[prompts.index(longest)][:2]).strip() or short.has_ended


def test_a_sample_shows_prompt_reference_and_reply(task):
    (prompt,) = task.prompts(1)
    reply = write_replies(
        randomized(tiny_config("llama", vocab_size=task.tokenizer.vocab_size, context=128)), task.tokenizer, [prompt.ids],
        context=128, max_new_tokens=3,
    )[0]
    lines = describe_reply(task.tokenizer, prompt, reply).split("\n", 2)
    assert [line.split()[0] for line in lines] == ["prompt", "reference", "reply"]
    assert prompt.reference in lines[1] and lines[2].endswith(" […]") == (not reply.has_ended)
