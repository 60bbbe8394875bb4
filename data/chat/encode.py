"""Render a conversation by its chat template, encode it, and label the tokens of its replies.

    rendering    by the template, in which control tokens are told from the same characters in contents (data.chat.guard)
    spans        the characters of each reply and of the token that ends it
    ids, labels  tokens are learned by their offsets, never by a search for ids

Learned: a reply's text, reasoning and tool calls, and its terminator, the first control token after it. Not learned: role
headers, what follows the terminator, and an empty thought that the template adds by itself.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from data.chat.conversation import REPLY, Conversation, Message, Plain
from data.chat.guard import Guard
from data.chat.sandbox import TemplateError
from data.chat.template import REASONING, ChatTemplate, open_template
from data.chat.turns import read_flags
from data.config import DataError
from data.example import Example
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE

Learn = Literal["assistant", "last", "all"]
OPENED_THOUGHT = re.compile(r"<think>\s*\Z")  # at the end of a prompt
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
QUESTION = {"role": "user", "content": "?"}


class Tokens(NamedTuple):
    """Token ids of one example with its terminator, and for each whether it is learned."""

    ids: np.ndarray
    is_learned: np.ndarray

    @property
    def learned_count(self) -> int:
        """The number of labels: learned tokens, without the first token of the example, which nothing predicts."""
        return int(self.is_learned[1:].sum())

    def example(self) -> Example:
        """Return the inputs ids[:-1] and the shifted labels; -100 where the next token is not learned."""
        labels = np.where(self.is_learned[1:], self.ids[1:], IGNORE)
        return Example(self.ids[:-1], labels)


class Rendered(NamedTuple):
    """A text with control tokens by their names, cut into texts and ids, and the characters that are learned."""

    text: str
    parts: list[str | int]
    spans: list[tuple[int, int]]
    terminator: int | None = None  # an id after the text, where the template ends a reply by the next role's token


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | ChatTemplate | None = None,
    tools: list[dict] | None = None,
    learn: Learn = "assistant",
) -> Example:
    """Return input ids and labels of one conversation, rendered by a template: the tokenizer's own, or one by its name.

        messages  as the template reads them; a reply with "train": False or "weight": 0 is not learned
        learn     "assistant": all replies; "last": the last one; "all": every token

    labels[t] is the target of position t. Errors (DataError): a template that raises; no learned token; several replies in a
    template that rewrites history (earlier replies look different once later messages follow): `ChatEncoder` then makes an
    example of each.
    """
    template = template if isinstance(template, ChatTemplate) else open_template(tokenizer, template)
    encoder = ChatEncoder(tokenizer, template, learn=learn)
    flags = [read_flags(dict(message), f"message {number}") for number, message in enumerate(messages, 1)]
    is_learned = [flag and message.get("role") == REPLY for flag, message in zip(flags, messages, strict=True)]
    found = encoder(Conversation(tuple(messages), tools, tuple(is_learned)))
    if len(found) > 1:
        raise DataError(f"the template {template.name} rewrites history: {len(found)} examples, one a reply, by ChatEncoder")
    return found[0].example()


class ChatEncoder:
    """Callable: encoder(conversation) -> examples, one; or one a learned reply, where the template rewrites history.

        per_reply   True: always an example a reply; None: where it must be so
        variables   further variables of the template, such as enable_thinking

    Errors (DataError): no token is learned; a template that raises; a reply that cannot be found in the rendering.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        learn: Learn = "assistant",
        per_reply: bool | None = None,
        variables: Mapping[str, object] | None = None,
    ):
        if learn not in get_args(Learn):
            raise DataError(f"learn={learn!r}: one of {', '.join(get_args(Learn))}")
        self.tokenizer, self.template, self.learn, self.per_reply = tokenizer, template, learn, per_reply
        self.variables = dict(variables or {})
        self.adds_thoughts = False  # True once the template has put an empty thought before a reply
        self.has_rendered_text = False  # True once a string without a template held the name of a control token
        self.alters_replies = False  # True once a template wrote a reply's content otherwise than by white space
        self.loses_thoughts = False  # True once a reply had reasoning that the template never reads
        self.reads_thoughts = any(name in template.source for name in REASONING)
        unknown = tokenizer.unknown_id
        self.ids = {name: id for name, id in tokenizer.control_tokens.items() if id != unknown and len(name) > 1}
        names = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        if missing := [name for name in template.control_tokens if name not in self.ids]:
            raise DataError(
                f"the template {template.name} needs control tokens that this tokenizer lacks: {', '.join(missing)}"
            )

    def __call__(self, conversation: Conversation | Plain) -> list[Tokens]:
        if isinstance(conversation, Plain):
            found = [self.encode_plain(conversation)]
        else:
            found = [self.encode(rendered) for rendered in self.render(conversation)]
        if not sum(tokens.learned_count for tokens in found):
            raise DataError("no token of it is learned: it has no reply, or none that may be learned")
        return found

    # ---- rendering

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Return the renderings of a conversation with the spans of its learned replies."""
        guard = Guard(self.pattern, (conversation.messages, conversation.tools))
        messages, tools = guard.hide(list(conversation.messages)), guard.hide(conversation.tools)
        if tools and not self.template.reads("tools"):
            raise DataError(f"it has tools, and the template {self.template.name} has no place for them")
        learned = [i for i, is_learned in enumerate(conversation.is_learned) if is_learned]
        if self.learn == "last":
            last = max((i for i, message in enumerate(messages) if message["role"] == REPLY), default=None)
            learned = [i for i in learned if i == last]
        render = Renderer(self.template, tools, self.variables)
        if self.learn == "all":
            text = render(messages)
            return [self.cut(guard, text, [(0, len(text))], None)]
        if not learned:
            return []
        replies = [self.find_reply(render, messages, i, guard) for i in learned]
        whole = replies[-1]
        keeps_history = all(whole.text.startswith(reply.text[: reply.end]) for reply in replies)
        if self.per_reply or not keeps_history:
            return [self.cut(guard, each.text[: each.end], [(each.begin, each.end)], each.terminator) for each in replies]
        # A terminator that is the next role's token lies behind the end of its reply.
        spans = [(each.begin, self.token_end(whole.text, each.end) if each.terminator else each.end) for each in replies]
        return [self.cut(guard, whole.text[: whole.end], spans, whole.terminator)]

    def find_reply(self, render: "Renderer", messages: list[Message], index: int, guard: Guard) -> "Reply":
        """Return the rendering up to a reply, and its characters there with its terminator.

        The reply begins where the template's prompt for it ends. What the template puts after it is known from the same
        conversation with a marker as the reply.
        """
        if index == 0:
            raise TemplateError("message 1 is a reply, and no message before it asks for one")
        self.loses_thoughts |= not self.reads_thoughts and any(messages[index].get(name) for name in REASONING)
        bare = {key: value for key, value in messages[index].items() if key != "tool_calls"} | {"content": guard.marker}
        prompt, text = render(messages[:index], add_generation_prompt=True), render(messages[: index + 1])
        before, *after = render([*messages[:index], bare]).split(guard.marker)
        if len(after) != 1:
            raise TemplateError(f"message {index + 1}: the template {self.template.name} does not write a reply once, as it is")
        begin, (tail,) = self.find_beginning(prompt, before, text, index), after
        lead = before[len(prompt) :].strip() if begin == len(prompt) else ""
        if lead and not self.template.reads("add_generation_prompt"):
            raise TemplateError(
                f"message {index + 1}: the template {self.template.name} writes {lead[:40]!r} before a reply, but not where "
                "it is asked for one (add_generation_prompt): that header would be learned as part of the reply"
            )
        end = len(text) - len(tail)
        if not text.endswith(tail) or end < begin:  # tool calls may end in another way
            end = max((match.start() for match in self.pattern.finditer(text, begin)), default=len(text))
            tail = text[end:]
        self.alters_replies |= squeeze(messages[index].get("content")) not in squeeze(text[begin:end])
        stop = len(tail) - len(tail.lstrip())
        if not self.pattern.match(tail, stop):
            return Reply(text, begin, len(text), self.next_token(render, messages[: index + 1], bare, text, tail))
        stop = self.token_end(tail, stop)
        if self.pattern.match(tail, stop):  # several end a reply, unless one ends only the last reply
            following = render([*messages[:index], bare, QUESTION]).partition(guard.marker)[2]
            while (match := self.pattern.match(tail, stop)) and following.startswith(tail[: match.end()]):
                stop = match.end()
        return Reply(text, begin, end + stop, None)

    def find_beginning(self, prompt: str, before: str, text: str, index: int) -> int:
        """Return the first character of a reply in `text`, the rendering up to it; `before` stands before a bare reply.

        It is the end of the prompt. An empty thought that the template adds there is no part of the reply, nor is its end,
        where the prompt opens it.
        """
        opened = OPENED_THOUGHT.search(prompt)
        for header, thought in ((prompt, opened[0] if opened else ""), (OPENED_THOUGHT.sub("", prompt), "")):
            lead = before[len(header) :] if before.startswith(header) else ""
            if text.startswith(header + lead) and EMPTY_THOUGHT.fullmatch(thought + lead):
                self.adds_thoughts = True
                return len(header + lead)
            if text.startswith(prompt):
                return len(prompt)
        same = next((i for i, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), len(text))
        raise TemplateError(
            f"message {index + 1}: the template {self.template.name} asks for a reply by {prompt[same:][:40]!r}, and has "
            f"{text[same:][:40]!r} there where one stands: a network would not be asked as it learned. Another template, or "
            "other variables of it (enable_thinking=true)"
        )

    def next_token(self, render: "Renderer", messages: list[Message], bare: Message, text: str, tail: str) -> str:
        """Return the control token of the role that follows a reply, which ends it: a tool's after calls, else the user's."""
        if calls := messages[-1].get("tool_calls"):
            function = calls[-1].get("function", calls[-1])
            result = {"role": "tool", "name": function["name"], "tool_call_id": calls[-1].get("id", ""), "content": "?"}
            following = render([*messages, result])
            following = following[len(text) :] if following.startswith(text) else ""
        else:
            following = render([*messages[:-1], bare, QUESTION]).partition(bare["content"])[2].removeprefix(tail)
        if (match := self.pattern.match(following)) is None:
            raise TemplateError(
                f"message {len(messages)}: the template {self.template.name} ends a reply by no control token ({tail[:20]!r} "
                f"follows it, then {following[:20]!r}): a network could not learn to stop"
            )
        return match[0]

    def token_end(self, text: str, at: int) -> int:
        """Return the end of the control token at a place of a text; the place itself at the end of the text."""
        match = self.pattern.match(text, at)
        return at if match is None else match.end()

    def cut(self, guard: Guard, text: str, spans: list[tuple[int, int]], terminator: str | None) -> Rendered:
        """Cut a guarded text at its control tokens, and take the guards out of texts and spans."""
        if guard.escaped in text:
            raise TemplateError(f"the template {self.template.name} escapes characters in contents, such as {guard.escaped}")
        parts: list[str | int] = []
        at = 0
        for match in self.pattern.finditer(text):
            parts += [guard.show(text[at : match.start()]), self.ids[match[0]]]
            at = match.end()
        parts.append(guard.show(text[at:]))
        shown = [(begin - text.count(guard.mark, 0, begin), end - text.count(guard.mark, 0, end)) for begin, end in spans]
        return Rendered(guard.show(text), [part for part in parts if part != ""], shown, self.ids.get(terminator))

    # ---- encoding

    def encode(self, rendered: Rendered) -> Tokens:
        """Return the ids of a rendering; a token is learned if one of its characters is."""
        ids, offset_N2 = self.tokenizer.encode_parts(rendered.parts)
        is_learned = np.zeros(len(ids), dtype=bool)
        begin_N = offset_N2[:, 0]
        end_N = np.maximum(offset_N2[:, 1], begin_N + 1)  # a space that only the tokenizer adds belongs to what follows it
        for begin, end in rendered.spans:
            is_learned |= (begin_N < end) & (end_N > begin)
        if rendered.terminator is not None:
            ids, is_learned = [*ids, rendered.terminator], np.append(is_learned, True)
        return Tokens(np.array(ids, dtype=np.int64), is_learned)

    def encode_plain(self, plain: Plain) -> Tokens:
        """Return the ids of prompt + completion between bos and eos; the completion and eos are learned."""
        tokenizer = self.tokenizer
        ids, offset_N2 = tokenizer.encode_parts([plain.prompt + plain.completion])
        is_learned = np.maximum(offset_N2[:, 1], offset_N2[:, 0] + 1) > len(plain.prompt)
        is_learned |= self.learn == "all"
        self.has_rendered_text |= self.pattern.search(plain.prompt + plain.completion) is not None
        begin = list(tokenizer.affixes.prefix)
        end = [id for id in (tokenizer.eos_id,) if id is not None]
        flags = [np.zeros(len(begin), bool), is_learned, np.ones(len(end), bool)]
        return Tokens(np.array([*begin, *ids, *end], dtype=np.int64), np.concatenate(flags))


class Reply(NamedTuple):
    """A rendering up to a reply: text[begin:end] is learned. terminator: the control token after it, if not in the text."""

    text: str
    begin: int
    end: int
    terminator: str | None


class Renderer:
    """Callable: renders messages by a template with its tools and variables."""

    def __init__(self, template: ChatTemplate, tools: list[dict] | None, variables: Mapping[str, object]):
        self.template, self.options = template, {"tools": tools, "variables": variables}

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, **self.options)


def squeeze(text: str | None) -> str:
    """Return a text without white space."""
    return "".join((text or "").split())


def encode_rendered(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], **options: Any) -> list[int]:
    """Return the ids of a conversation with the prompt for the next reply, as generation reads it.

    options: tools, variables.
    """
    encoder = ChatEncoder(tokenizer, template, variables=options.get("variables"))
    guard = Guard(encoder.pattern, (messages, options.get("tools")))
    render = Renderer(template, guard.hide(options.get("tools")), encoder.variables)
    text = render(guard.hide(list(messages)), add_generation_prompt=True)
    return tokenizer.encode_parts(encoder.cut(guard, text, [], None).parts)[0]


def prompt_and_reply(encoder: ChatEncoder, record: Conversation | Plain) -> tuple[list[int], str]:
    """Return the ids that ask for the last learned reply of a record, and its text."""
    tokenizer = encoder.tokenizer
    if isinstance(record, Plain):
        return [*tokenizer.affixes.prefix, *tokenizer.encode(record.prompt)], record.completion.strip()
    index = max(i for i, is_learned in enumerate(record.is_learned) if is_learned)
    options = {"tools": record.tools, "variables": encoder.variables}
    ids = encode_rendered(tokenizer, encoder.template, record.messages[:index], **options)
    reply = record.messages[index]
    if encoder.learn != "all" and (reply.get("tool_calls") or any(reply.get(name) for name in REASONING)):
        flags = (False,) * index + (True,)
        (tokens,) = encoder(Conversation(tuple(record.messages[: index + 1]), record.tools, flags))
        return ids, tokenizer.decode(tokens.ids[tokens.is_learned].tolist()).strip()  # its terminator decodes to nothing
    return ids, reply["content"].strip()


def terminators(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Return the ids that end a reply in this template, for generation_config.json: those after text, then after tool calls."""
    encoder = ChatEncoder(tokenizer, template)
    call = {"type": "function", "id": "000000000", "function": {"name": "f", "arguments": {}}}
    replies = [{"role": REPLY, "content": "!"}, {"role": REPLY, "content": "", "tool_calls": [call]}]
    ends = []
    for reply in replies[: 2 if "tool_calls" in template.source else 1]:
        tokens = encoder(Conversation((QUESTION, reply), None, (False, True)))[0]
        ends.append(int(tokens.ids[tokens.is_learned][-1]))
    return list(dict.fromkeys(ends))
