"""Replies of a file of records as ids of prompt and reply, the pairs among them, and what is left out or cut."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import TYPE_CHECKING, NamedTuple

from data.messages import format_count, shorten_list
from eval.commands.reward_options import Reward
from eval.commands.texts import EvalError

if TYPE_CHECKING:
    import numpy as np

    from data.chat.encode import ChatEncoder
    from data.chat.encode_preference import EncodedReplies
    from data.chat.preferences import Side
    from data.chat.replies import PromptReplies
    from data.tokenizer.base import Tokenizer


class Reply(NamedTuple):
    """One reply of a record: its name there, its text, its own tokens, and the ids of prompt and reply."""

    record: str
    name: str
    prompt: int  # the prompt's number; records of equal prompts share it
    text: str
    tokens: int
    ids: "np.ndarray"


@dataclass
class Replies:
    """All replies, the texts of their prompts, and the pairs (better, worse) of their places."""

    replies: list[Reply] = field(default_factory=list)
    prompts: dict[str, tuple[int, str]] = field(default_factory=dict)  # identity: number, text
    pairs: list[tuple[int, int]] = field(default_factory=list)
    single: dict[int, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))  # prompt: place, score
    records: int = 0
    strings: int = 0  # records without turns
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason: names of records
    cut: list[str] = field(default_factory=list)

    def by_prompt(self) -> list[list[int]]:
        """Return the places of the replies to each prompt."""
        places: dict[int, list[int]] = defaultdict(list)
        for place, reply in enumerate(self.replies):
            places[reply.prompt].append(place)
        return [places[number] for number in sorted(places)]


def read_replies(options: Reward, tokenizer: "Tokenizer", most: int) -> Replies:
    """Read and encode the records of the file. Errors (DataError, EvalError): name the record."""
    from data.chat.encode import ChatEncoder
    from data.chat.preferences import EqualRepliesError
    from data.chat.replies import read_prompt_replies
    from data.chat.template import open_template
    from data.config import DataError
    from data.sources.files import ReadReport, read_rows
    from data.sources.find import readable_suffix
    from data.sources.record_files import FORMATS

    if not options.file.is_file():
        raise EvalError(f"{options.file} is no file" if options.file.exists() else f"{options.file} does not exist")
    if readable_suffix(options.file) not in FORMATS:
        raise EvalError(f"{options.file}: records are in {', '.join(FORMATS)}")
    found, encoder = Replies(), None
    template = options.template
    if is_bare := template is None and not tokenizer.chat_templates:
        template = "alpaca"  # has no control tokens: an encoder needs one, and uses it for turns alone
    for name, row in islice(read_rows([options.file], "error", ReadReport()), options.limit):
        found.records += 1
        try:
            record = read_prompt_replies(row)
            if is_bare and not isinstance(record.prompt, str):
                raise DataError("it has turns, and the folder has no chat template: --template chatml, or another one")
            encoder = encoder or ChatEncoder(tokenizer, open_template(tokenizer, template), learn="last")
            add_record(found, encoder, name, record, most, options)
        except EqualRepliesError:
            found.left_out["chosen and rejected are equal"].append(name)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    found.pairs += [pair for valued in found.single.values() for pair in pairs_of(valued)]
    if not found.records:
        raise EvalError(f"{options.file}: no record in it")
    if not found.replies:
        reasons = "; ".join(f"{reason}: {format_count(len(names), 'record')}" for reason, names in found.left_out.items())
        raise EvalError(f"{options.file}: no record of {found.records:,} is left to score ({reasons})")
    return found


def add_record(found: Replies, encoder: "ChatEncoder", name: str, record: "PromptReplies", most: int, options: Reward) -> None:
    """Encode a record's replies and add them, or leave it out by name. Errors: DataError."""
    from data.chat.encode_preference import MERGED, REWRITTEN, SAME, encode_replies
    from data.chat.rankings import identity
    from data.config import DataError

    asked = record.prompt, record.tools
    distinct = {identity(reply): reply for reply in record.replies}

    def encode(*replies: "Side") -> "EncodedReplies":
        return encode_replies(encoder, record.prompt, replies, record.tools, most=most, policy=options.overlong, room=0)

    try:
        encoded = encode(*distinct.values())
        parts = [encoded] * len(distinct)
        if not record.is_pair and encoded.reason in (SAME, MERGED, REWRITTEN):  # a pair is left out, as in training
            parts = [encode(reply) for reply in distinct.values()]
    except DataError as error:
        raise DataError(str(error).replace("a larger context, or the policy", "--overlong")) from None
    if reason := next((part.reason for part in parts if part.reason is not None), None):
        found.left_out[reason].append(name)
        return
    found.cut += [name] * any(part.turns or part.tokens for part in parts)
    found.strings += isinstance(record.prompt, str)
    number, _ = found.prompts.setdefault(identity(asked), (len(found.prompts), text_of(record.prompt)))
    replies = [part.replies[place if part is encoded else 0] for place, part in enumerate(parts)]
    by_identity = dict(zip(distinct, zip(parts, replies, strict=True), strict=True))
    first = len(found.replies)
    for reply, label in zip(record.replies, record.names, strict=True):
        part, ids = by_identity[identity(reply)]
        found.replies.append(Reply(name, label, number, text_of(reply), len(ids), concatenate(part.prompt, ids)))
    if record.values is not None:
        valued = list(zip(range(first, len(found.replies)), record.values, strict=True))
        if len(valued) == 1:  # single replies with a score are compared with those of the same prompt
            found.single[number] += valued
        else:
            found.pairs += pairs_of(valued)


def pairs_of(valued: list[tuple[int, float]]) -> Iterator[tuple[int, int]]:
    """Yield the pairs (better, worse) of places with different values."""
    for (one, high), (other, low) in combinations(valued, 2):
        if high != low:
            yield (one, other) if high > low else (other, one)


def concatenate(prompt: "np.ndarray", reply: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return np.concatenate([prompt, reply])


def text_of(side: "tuple | str") -> str:
    """Return the text of a prompt's last message or of a reply; of a reply that only calls tools their JSON."""
    if isinstance(side, str):
        return side
    return side[-1].get("content") or json.dumps(side[-1].get("tool_calls") or "", ensure_ascii=False)


def describe_left_out(found: Replies) -> Iterator[str]:
    """Yield notes on records that are left out or cut, and on a mixture of strings and turns."""
    for reason, names in found.left_out.items():
        yield f"left out {format_count(len(names), 'record')}, {reason}: {shorten_list(names)}"
    if found.cut:
        yield f"cut to the context: {format_count(len(found.cut), 'record')}, {shorten_list(found.cut)}"
    if found.strings:
        has = " have" if found.strings != 1 else " has"
        yield f"{format_count(found.strings, 'record')}{has} strings, which are read without a template"
