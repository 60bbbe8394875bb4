"""The messages of a chat: its turns, which of them the network still reads, and the file that keeps them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model.config import ConfigError

Message = dict[str, Any]


@dataclass
class Turn:
    """A user's message and its reply. first: the first turn that was read with it; is_partial: the reply was cut."""

    user: str
    first: int
    reply: str | None = None
    is_partial: bool = False


class Prompt(NamedTuple):
    """The ids of a conversation with the prompt for its next reply; how many turns were dropped for it, and their tokens."""

    ids: list[int]
    dropped: range
    dropped_tokens: int


class Transcript:
    """A system message and turns. encode(messages) returns the ids of a conversation with the prompt for the next reply.

    limit: the most tokens of prompt and reply. reserve: tokens to keep free for a reply, as long as turns can be dropped.
    Errors of every method (ConfigError, and those of `encode`) leave the transcript as it was.
    """

    def __init__(self, encode: Callable[[list[Message]], list[int]], *, limit: int, reserve: int, system: str | None = None):
        self.encode, self.limit, self.reserve = encode, limit, reserve
        self.system: str | None = None
        self.turns: list[Turn] = []
        self.first = 0  # turns before it are no longer read
        if system:
            self.set_system(system)

    def messages(self, first: int = 0) -> list[Message]:
        """Return the messages from turn `first` on, after the system message."""
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[first:]:
            found.append({"role": "user", "content": turn.user})
            if turn.reply is not None:
                found.append({"role": "assistant", "content": turn.reply})
        return found

    def ask(self, text: str) -> Prompt:
        """Add a user's message, and drop oldest turns until it fits with the reserve.

        Error (ConfigError): with the system message alone, it leaves no token for a reply.
        """
        before = self.first
        self.turns.append(Turn(text, before))
        try:
            ids = self.encode(self.messages(self.first))
            length = len(ids)
            while len(ids) + self.reserve > self.limit and self.first < len(self.turns) - 1:
                self.first += 1
                ids = self.encode(self.messages(self.first))
            if len(ids) >= self.limit:
                what = "with the system message the message has" if self.system else "the message has"
                room = f"the context holds {self.limit:,}, with one of a reply at least"
                raise ConfigError(f"{what} {len(ids):,} tokens, and {room}: it was taken back; shorten it")
        except BaseException:  # Ctrl-C too
            self.first = before
            self.turns.pop()
            raise
        self.turns[-1].first = self.first
        return Prompt(ids, range(before, self.first), length - len(ids))

    def answer(self, reply: str, *, is_partial: bool = False) -> None:
        """Add the reply to the last message."""
        self.turns[-1].reply, self.turns[-1].is_partial = reply, is_partial

    def undo(self) -> Turn:
        """Take back the last turn, and what was dropped for it. Error (ConfigError): there is none."""
        if not self.turns:
            raise ConfigError("nothing to undo: the conversation has no turn")
        turn = self.turns.pop()
        self.first = self.turns[-1].first if self.turns else 0
        return turn

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns, self.first = [], 0

    def set_system(self, text: str) -> None:
        """Set the system message of the whole conversation; empty: none. Errors: it does not fit, or the template has none."""
        before, self.system = self.system, text or None
        try:
            length = len(self.encode([*self.messages(len(self.turns)), {"role": "user", "content": "?"}]))
            if length >= self.limit:
                raise ConfigError(f"the system message has {length:,} tokens, and the context holds {self.limit:,}: shorten it")
        except BaseException:
            self.system = before
            raise

    def save(self, path: Path) -> int:
        """Append the conversation to a file of JSON lines, as OpenAI's messages; returns the number of its line.

        A reply that was cut, or is empty, has the weight 0: `--objective sft` reads it, and does not learn it.
        Errors (ConfigError): no turn; the file holds something else.
        """
        if not self.turns:
            raise ConfigError("nothing to save: the conversation has no turn")
        messages = self.messages()
        replies = [message for message in messages if message["role"] == "assistant"]
        for message, turn in zip(replies, self.turns, strict=True):
            if turn.is_partial or not turn.reply:
                message["weight"] = 0
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and not lines[-1].startswith("{"):
            raise ConfigError(f"{path} holds no JSON lines: name another file")
        with path.open("a", encoding="utf-8") as file:
            newline = "" if not text or text.endswith("\n") else "\n"
            file.write(f"{newline}{json.dumps({'messages': messages}, ensure_ascii=False)}\n")
        return len(lines) + 1
