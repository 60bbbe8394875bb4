"""Ids of preference pairs beside transformers' apply_chat_template and the tokenization of TRL's DPOTrainer."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers
import trl

from data.chat.encode import ChatEncoder
from data.chat.encode_preference import REWRITTEN, EncodedReplies, encode_replies, pair_examples
from data.chat.preferences import read_preference
from data.chat.template import open_template
from data.config import DataError
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from data.transforms.causal import IGNORE
from tests.chat_tokenizers import WRITERS
from tests.chats import CHATS, freeze_clock, reply, user
from tests.compare import count
from tests.oracle.data.test_chat_encode import EXACT, IMITATION, NAMED, by_transformers

LONG = 10_000
SIDES = ("chosen_ids", "rejected_ids")
KINDS = [(kind, name) for kind, names in NAMED.items() for name in names]
THOUGHT = "<think>\n\n</think>\n\n"  # Qwen3 puts it before its last reply, and not at the end of its prompt


@pytest.fixture(autouse=True)
def frozen_clock(monkeypatch):
    freeze_clock(monkeypatch)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Kind of tests/chat_tokenizers.py -> its tokenizer as we read it and as transformers does."""

    @cache
    def both(kind: str) -> tuple[Tokenizer, Any]:
        folder = tmp_path_factory.mktemp("tokenizers") / kind
        WRITERS[kind](folder)
        return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)

    return both


def encode(encoder: ChatEncoder, row: dict, most: int = LONG, policy: str = "error") -> EncodedReplies:
    pair = read_preference(row)
    return encode_replies(encoder, pair.prompt, (pair.chosen, pair.rejected), pair.tools, most=most, policy=policy)


def pairs_of_chats() -> list[tuple[str, dict]]:
    """Each conversation that ends with a reply as a pair of this reply and another one."""
    found = []
    for name, (messages, tools) in CHATS.items():
        if messages[-1]["role"] == "assistant" and name not in (IMITATION, "empty reply"):
            row = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [reply("No,\n\nthe fox.")], "tools": tools}
            found.append((name, row))
    return found


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_prompt_and_reply_are_the_rendered_conversation(kind, name, tokenizers, parity):
    """Prompt + reply are the conversation's ids up to the terminator, and the prompt's those of the prompt alone."""
    ours, other = tokenizers(kind)
    template = open_template(ours, name)
    encoder, wrong, left_out, compared = ChatEncoder(ours, template), [], [], 0
    for chat, row in pairs_of_chats():
        try:
            found = encode(encoder, row)
        except DataError:  # what the template refuses
            continue
        if found.reason is not None:
            left_out.append((chat, found.reason))
            continue
        asked = by_transformers(other, template.source, row["prompt"], row["tools"], add_generation_prompt=True)["input_ids"]
        thought = ours.encode(THOUGHT, parse_special=True) if name == "qwen3" else []
        for side, ids in zip(("chosen", "rejected"), found.replies, strict=True):
            whole = by_transformers(other, template.source, row["prompt"] + row[side], row["tools"])["input_ids"]
            mine = [*found.prompt.tolist(), *ids.tolist()]
            rest = other.decode(whole[len(mine) :]).removesuffix("</s>").strip()
            is_right = mine == whole[: len(mine)] and not rest and found.prompt.tolist() in (asked, asked + thought)
            wrong += [] if is_right else [(chat, side)]
            compared += 1
    assert compared >= 8
    assert left_out == ([(chat, REWRITTEN) for chat in ("reasoning", "thoughts")] if name == "qwen3" else [])
    parity(f"preferences: ids of {compared} replies, {kind}", "transformers apply_chat_template", count(wrong), 0, EXACT)


# ---- TRL


def by_trl(tokenizer: Any, rows: list[dict]) -> list[dict]:
    """prompt_ids, chosen_ids and rejected_ids of records as DPOTrainer prepares them."""
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    made = datasets.Dataset.from_list([dict(row) for row in rows])
    return list(trl.DPOTrainer._prepare_dataset(trainer, made, tokenizer, arguments, "train"))


AFTER = {  # what TRL learns behind the terminator, as the template writes it there
    "chatml": "\n",
    "zephyr": "\n",
    "gemma": "\n",
    "phi-3": "</s>",
    "llama-2": "",
    "mistral-v3": "",
}
BY_TRL = [("byte-level", "chatml"), ("ours", "chatml"), ("llama-2", "zephyr"), ("gemma", "gemma"), ("phi-3", "phi-3")]
BY_TRL += [("llama-2", "llama-2"), ("mistral-v3", "mistral-v3")]
TALKS = [
    {"prompt": [user("Hi")], "chosen": [reply("The fox 😀")], "rejected": [reply("No")]},
    {"prompt": [user("Hi"), reply("Hello"), user("Bye")], "chosen": [reply("Ciao\n")], "rejected": [reply("\u2581")]},
    {"chosen": [user("a"), reply("b"), user("c"), reply("d")], "rejected": [user("a"), reply("b"), user("c"), reply("e")]},
]
STRINGS = [  # prompt, chosen, rejected
    ("Q: to be\nA:", " the dog", "No"),
    ("The quick", " brown fox", "\n\nthe"),
    ("😀", "😀", " 你好"),
]
MERGING = [("to be ", "the dog", "users"), ("th", "e", " names")]  # TRL's prompt ends where the tokens of a whole text differ


@pytest.mark.parametrize(("kind", "name"), BY_TRL)
def test_conversations_beside_trl(kind, name, tokenizers, parity):
    """Equal but for what the template writes behind the terminator, which TRL learns."""
    ours, other = tokenizers(kind)
    template = open_template(ours, name)
    other.chat_template = template.source
    encoder, wrong = ChatEncoder(ours, template), []
    for row in TALKS:
        (theirs,) = by_trl(other, [row])
        found = encode(encoder, row)
        wrong += [] if found.prompt.tolist() == theirs["prompt_ids"] else [row]
        for ids, side in zip(found.replies, SIDES, strict=True):
            after = theirs[side][len(ids) :]
            is_right = ids.tolist() == theirs[side][: len(ids)] and other.decode(after).strip(" ") == AFTER[name]
            wrong += [] if is_right else [row]
    parity(f"preferences: ids of conversations, {kind}, {name}", "trl DPOTrainer", count(wrong), 0, EXACT)


@pytest.mark.parametrize("kind", WRITERS)
def test_strings_beside_trl(kind, tokenizers, parity):
    """Equal where no token holds the end of the prompt and the beginning of a reply, with a bos and eos each."""
    ours, other = tokenizers(kind)
    encoder = ChatEncoder(ours, open_template(ours, "zephyr"))
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in STRINGS]
    wrong = []
    for row, theirs in zip(rows, by_trl(other, rows), strict=True):
        found = encode(encoder, row)
        mine = (found.prompt.tolist(), *(ids.tolist() for ids in found.replies))
        wrong += [] if mine == tuple(theirs[key] for key in ("prompt_ids", *SIDES)) else [row]
    parity(f"preferences: ids of strings, {kind}", "trl DPOTrainer", count(wrong), 0, EXACT)


@pytest.mark.parametrize("kind", WRITERS)
def test_where_a_token_would_hold_prompt_and_reply_ours_asks_as_generation_does(kind, tokenizers):
    """TRL moves the end of the prompt into both replies, ours keeps the prompt's ids; both spell the text."""
    ours, other = tokenizers(kind)
    encoder = ChatEncoder(ours, open_template(ours, "zephyr"))
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in MERGING]
    for row, theirs in zip(rows, by_trl(other, rows), strict=True):
        found = encode(encoder, row)
        asked = other(row["prompt"])["input_ids"]
        assert found.prompt.tolist() == asked and len(theirs["prompt_ids"]) < len(asked)
        for side, ids in zip(("chosen", "rejected"), found.replies, strict=True):
            assert ours.decode([*found.prompt.tolist(), *ids.tolist()]) == row["prompt"] + row[side]
            assert ids[-1] == ours.eos_id


def test_rows_beside_trls_collator(tokenizers, parity):
    """Inputs and labels of each row, as the collator's ids and completion mask give them, shifted by one."""
    ours, other = tokenizers("byte-level")
    template = open_template(ours, "llama-2")
    other.chat_template = template.source
    encoder, wrong = ChatEncoder(ours, template), 0
    collate = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=ours.pad_id)
    for row in TALKS[:2]:
        batch = collate(by_trl(other, [row]))
        found = encode(encoder, row)
        rows = zip(found.replies, batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True)
        for ids, whole, learned, real in rows:
            example = pair_examples(found.prompt, ids)
            whole, learned = whole[real.bool()], learned[real.bool()].bool()
            labels = whole[1:].masked_fill(~learned[1:], IGNORE)
            wrong += example.ids.tolist() != whole[:-1].tolist() or example.labels.tolist() != labels.tolist()
    parity("preferences: rows and labels", "trl DataCollatorForPreference", count(wrong), 0, EXACT)


@pytest.mark.parametrize("most", [7, 10])
def test_a_cut_beside_trls(most, tokenizers, parity):
    """The collator's keep_start on strings: of the same length, as a row here holds `most` tokens beside the last label."""
    ours, other = tokenizers("gemma")
    encoder = ChatEncoder(ours, open_template(ours, "zephyr"))
    row = {"prompt": "to be", "chosen": " the quick brown fox jumps over", "rejected": " hello world, how are you?"}
    found = encode(encoder, row, most, "cut")
    collate = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=ours.pad_id, max_length=most + 1)
    whole = collate(by_trl(other, [row]))["input_ids"]
    wrong = sum([*found.prompt, *ids] != theirs.tolist() for ids, theirs in zip(found.replies, whole, strict=True))
    assert found.tokens > 0 and found.turns == 0
    parity("preferences: cut rows", "trl DataCollatorForPreference", count(wrong), 0, EXACT)
