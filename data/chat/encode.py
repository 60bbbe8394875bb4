"""Render a conversation by its chat template, encode it, and label the tokens of its replies.

    rendering    by the template, in which control tokens are told from the same characters in contents
    spans        the characters of each reply and of the token that ends it
    ids, labels  tokens are learned by their offsets, never by a search for ids

Learned: a reply's text, reasoning and tool calls, and its terminator, the first control token after it. Not learned: role
headers, what follows the terminator, and an empty thought that the template adds by itself.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data.chat.conversation import REPLY, Conversation, Message, Plain
from data.chat.sandbox import TemplateError
from data.chat.template import REASONING, ChatTemplate, open_template
from data.config import DataError
from data.example import Example
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE

Learn = Literal["assistant", "last", "all"]
GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: in no text that is meant to be read
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


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

        learn   "assistant": all replies; "last": the last one; "all": every token

    labels[t] is the target of position t. Errors (DataError): a template that raises; no learned token; several replies in a
    template that rewrites history (earlier replies look different once later messages follow): `ChatEncoder` then makes an
    example of each.
    """
    template = template if isinstance(template, ChatTemplate) else open_template(tokenizer, template)
    encoder = ChatEncoder(tokenizer, template, learn=learn)
    conversation = Conversation(tuple(messages), tools, tuple(message["role"] == REPLY for message in messages))
    found = encoder(conversation)
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
        self.tokenizer, self.template, self.learn, self.per_reply = tokenizer, template, learn, per_reply
        self.variables = dict(variables or {})
        self.adds_thoughts = False  # True once the template has put an empty thought before a reply
        unknown = tokenizer.unknown_id
        self.ids = {name: id for name, id in tokenizer.control_tokens.items() if id != unknown and name}
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
        learned = learned[-1:] if self.learn == "last" else learned
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

    def find_reply(self, render: "Renderer", messages: list[Message], index: int, guard: "Guard") -> "Reply":
        """Return the rendering up to a reply, and its characters there with its terminator.

        The reply begins where the template's prompt for it ends. What the template puts after it is known from the same
        conversation with a marker as the reply.
        """
        prompt = render(messages[:index], add_generation_prompt=True)
        text = render(messages[: index + 1])
        bare = {key: value for key, value in messages[index].items() if key not in (*REASONING, "tool_calls")}
        marked = render([*messages[:index], bare | {"content": guard.marker}])
        if not (text.startswith(prompt) and marked.startswith(prompt) and marked.count(guard.marker) == 1):
            raise TemplateError(
                f"message {index + 1}: the template {self.template.name} renders a reply otherwise than it asks for one, so "
                "that its beginning is not known: the prompt must be the beginning of the conversation with the reply"
            )
        lead, tail = marked[len(prompt) :].split(guard.marker)
        begin, end = len(prompt), len(text) - len(tail)
        if not text.endswith(tail) or end < begin:  # tool calls may end in another way
            end = max((match.start() for match in self.pattern.finditer(text, begin)), default=len(text))
            tail = text[end:]
        if lead and EMPTY_THOUGHT.fullmatch(lead) and text.startswith(lead, begin):
            begin += len(lead)
            self.adds_thoughts = True
        if (match := self.pattern.match(tail.lstrip())) is not None:
            return Reply(text, begin, end + len(tail) - len(tail.lstrip()) + match.end(), None)
        following = render([*messages[: index + 1], {"role": "user", "content": "?"}])
        match = self.pattern.match(following, end + len(tail)) if following.startswith(text) else None
        if match is None:
            raise TemplateError(
                f"message {index + 1}: the template {self.template.name} ends a reply by no control token ({tail[:20]!r} "
                "follows it): a network could not learn to stop"
            )
        return Reply(text, begin, len(text), match[0])

    def token_end(self, text: str, at: int) -> int:
        """Return the end of the control token at a place of a text; the place itself at the end of the text."""
        match = self.pattern.match(text, at)
        return at if match is None else match.end()

    def cut(self, guard: "Guard", text: str, spans: list[tuple[int, int]], terminator: str | None) -> Rendered:
        """Cut a guarded text at its control tokens, and take the guards out of texts and spans."""
        parts: list[str | int] = []
        at = 0
        for match in self.pattern.finditer(text):
            parts += [guard.show(text[at : match.start()]), self.ids[match[0]]]
            at = match.end()
        parts.append(guard.show(text[at:]))
        shown = [(len(guard.show(text[:begin])), len(guard.show(text[:end]))) for begin, end in spans]
        return Rendered(guard.show(text), [part for part in parts if part != ""], shown, self.ids.get(terminator))

    # ---- encoding

    def encode(self, rendered: Rendered) -> Tokens:
        """Return the ids of a rendering; a token is learned if one of its characters is."""
        ids, offset_N2 = self.tokenizer.encode_parts(rendered.parts)
        is_learned = np.zeros(len(ids), dtype=bool)
        for begin, end in rendered.spans:
            is_learned |= (offset_N2[:, 0] < end) & (offset_N2[:, 1] > begin)
        if rendered.terminator is not None:
            ids, is_learned = [*ids, rendered.terminator], np.append(is_learned, True)
        return Tokens(np.array(ids, dtype=np.int64), is_learned)

    def encode_plain(self, plain: Plain) -> Tokens:
        """Return the ids of prompt + completion between bos and eos; the completion and eos are learned."""
        tokenizer = self.tokenizer
        ids, offset_N2 = tokenizer.encode_parts([plain.prompt + plain.completion])
        is_learned = offset_N2[:, 1] > len(plain.prompt)
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


class Guard:
    """Marks control tokens that are written in contents: a noncharacter after the first character of each keeps them text.

    It is in none of the values, and templates pass it on.

    >>> guard = Guard(re.compile("<s>"), ["a <s> b"])
    >>> guard.hide({"content": "a <s> b"})["content"].index(guard.mark), guard.show(guard.hide("a <s> b"))
    (3, 'a <s> b')
    """

    def __init__(self, pattern: re.Pattern, values: object):
        used = {character for text in strings(values) if not text.isascii() for character in GUARDS if character in text}
        free = [character for character in GUARDS if character not in used]
        if len(free) < 2:
            raise DataError("it holds all of Unicode's 32 noncharacters U+FDD0 to U+FDEF: no text does")
        self.mark, self.pattern = free[0], pattern
        self.marker = f"{free[1]}reply{free[1]}"  # stands for a reply

    def hide(self, value: Any) -> Any:
        """Return JSON values in which no string has a control token; roles are left as they are."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: match[0][0] + self.mark + match[0][1:], value)
        if isinstance(value, Mapping):
            return {self.hide(key): each if key == "role" else self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """Return a text without marks."""
        return text.replace(self.mark, "")


def strings(value: object) -> Iterable[str]:
    """Yield the strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)


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
    return ids, record.messages[index]["content"].strip()


def terminators(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Return the ids that end a reply in this template, for generation_config.json."""
    encoder = ChatEncoder(tokenizer, template)
    messages = ({"role": "user", "content": "?"}, {"role": REPLY, "content": "!"})
    tokens = encoder(Conversation(messages, None, (False, True)))[0]
    return [int(tokens.ids[tokens.is_learned][-1])]

