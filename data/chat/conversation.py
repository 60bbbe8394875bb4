"""Conversations as chat templates read them, and plain strings to learn without a template."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
REPLY = "assistant"  # the role whose messages are learned


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that were offered, and which messages are learned.

        messages    {"role": "system" | "user" | "assistant" | "tool", "content": str, …}, as OpenAI names the keys:
                    `tool_calls` [{"type": "function", "function": {"name", "arguments"}, "id"?}] with arguments as an object,
                    `tool_call_id`, `name`, `reasoning_content`. No key has the value null, arguments of JSON text excepted
        tools       JSON schemas, [{"type": "function", "function": {"name", …}}], or None
        is_learned  one flag a message. Default: True for replies
        dropped     messages before the first user's turn that were dropped

    Errors: ValueError if there are not as many flags as messages.

    >>> Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})).is_learned
    (False, True)
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    is_learned: tuple[bool, ...] = ()
    dropped: int = 0

    def __post_init__(self) -> None:
        if not self.is_learned:
            object.__setattr__(self, "is_learned", tuple(message["role"] == REPLY for message in self.messages))
        if len(self.is_learned) != len(self.messages):
            raise ValueError(f"{len(self.is_learned)} flags is_learned for {len(self.messages)} messages")


@dataclass(frozen=True)
class Plain:
    """Strings without a template, concatenated as they are: the completion is learned, the prompt is not.

    TRL reads {"prompt", "completion"} of strings likewise. A text to learn as a whole has the prompt "".
    """

    prompt: str
    completion: str


def has_dropped_turns(record: Conversation | Plain) -> bool:
    """Return True if turns before the first user's were dropped."""
    return isinstance(record, Conversation) and record.dropped > 0
