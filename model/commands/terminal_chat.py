"""A chat in the terminal: lines are read, replies are written while they are generated.

Standard output has the replies alone, each with an empty line after it; all else goes to standard error.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from model.commands.transcript import Message, Transcript
from model.config import ConfigError

if TYPE_CHECKING:
    import torch

    from data.chat.template import ChatTemplate
    from data.tokenizer.base import Tokenizer
    from model.chat_session import ChatSession, Reply
    from model.sampling import Sampling

HELP = """\
/undo              take back your last message and its reply
/reset             begin anew; the system message stays
/system TEXT       set the system message; without a text: remove it
/temperature X     0: always the best token; above: sampled
/save FILE.jsonl   append the conversation to FILE.jsonl, which --objective sft reads
/stats             the tokens of the last reply, and of its prompt those that were read
/quit              leave; so does Ctrl-D
Ctrl-C stops a reply. A line that ends in \\ goes on in the next one. A space in front makes "/" text."""


class TerminalChat:
    """A conversation in the terminal: reads lines, and writes replies."""

    def __init__(
        self,
        session: "ChatSession",
        tokenizer: "Tokenizer",
        template: "ChatTemplate",
        *,
        variables: Mapping[str, object],
        sampling: "Sampling",
        max_new_tokens: int | None,
        reserve: int,
        generator: "torch.Generator",
        system: str | None,
    ):
        self.session, self.tokenizer, self.template = session, tokenizer, template
        self.sampling, self.max_new_tokens, self.generator = sampling, max_new_tokens, generator
        self.variables = variables
        self.last: tuple[Reply, float] | None = None
        self.transcript = Transcript(self.encode, limit=session.limit, reserve=reserve, system=system)

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the ids of messages and of the prompt for a reply; control tokens that a message imitates stay text."""
        from data.chat.encode import encode_rendered

        for message in messages:
            try:
                message["content"].encode()
            except UnicodeEncodeError:
                raise ConfigError(f"the {message['role']} message is not valid UTF-8") from None
        return encode_rendered(self.tokenizer, self.template, messages, variables=self.variables)

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        from data.config import DataError

        is_terminal = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # for `encode` to refuse
        self.introduce()
        while (line := next_line(is_terminal)) is not None:
            try:
                if line.startswith("/"):
                    name, _, argument = line.partition(" ")
                    if name == "/quit":
                        return
                    self.command(name)(argument.strip())
                elif line.strip():
                    self.take_turn(line[1:] if line.startswith(" /") else line)
            except KeyboardInterrupt:
                note("interrupted")
            except (ConfigError, DataError, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                print(f"error: {error}", file=sys.stderr)

    def introduce(self) -> None:
        """Print template, stop tokens and context."""
        stops = name_tokens(self.tokenizer, self.session.stop_ids) or "its length alone"
        parts = (f"template {self.template.name}", f"{stops} ends a reply", f"context {self.session.limit:,} tokens", "/help")
        print(" · ".join(parts), file=sys.stderr)

    # ---- a turn

    def take_turn(self, text: str) -> None:
        """Ask for a reply to a message, and write it while it is generated."""
        prompt = self.transcript.ask(text)
        if prompt.dropped:
            first, last = prompt.dropped[0] + 1, prompt.dropped[-1] + 1
            turns = f"turn {first} was" if first == last else f"turns {first} to {last} were"
            note(f"the context of {self.session.limit:,} tokens is full: {turns} dropped ({prompt.dropped_tokens:,} tokens)")
        room = self.session.limit - len(prompt.ids)
        try:
            text, reply = self.reply(prompt.ids, room)
        except BaseException:
            self.transcript.undo()
            raise
        if not text.strip():
            self.transcript.undo()
            why = "interrupted before its first token" if reply.ending == "interrupted" else "the reply is empty"
            note(f"{why}: your message was taken back")
            return
        is_partial = reply.ending != "stop"
        print(" [stopped]\n" if reply.ending == "interrupted" else "\n", flush=True)
        if reply.ending == "length":
            most = self.max_new_tokens
            is_full = most is None or room <= most
            why = f"the context of {self.session.limit:,} tokens is full" if is_full else f"max_new_tokens is {most:,}"
            note(f"the reply was cut after {len(reply.ids):,} tokens: {why}")
        self.transcript.answer(self.as_content(text), is_partial=is_partial)

    def reply(self, ids: list[int], room: int) -> tuple[str, "Reply"]:
        """Generate and write a reply; returns its text too."""
        from model.streaming import TextStream

        pieces: list[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            print(text, end="", flush=True)

        shown = TextStream(write, self.tokenizer.token_bytes)

        def show(token: int) -> None:
            if token not in self.session.stop_ids:
                shown.add(token)

        begun = perf_counter()
        options = {"sampling": self.sampling, "generator": self.generator, "on_token": show}
        most = room if self.max_new_tokens is None else min(room, self.max_new_tokens)
        reply = self.session.reply(ids, max_new_tokens=most, **options)
        shown.close()
        self.last = reply, perf_counter() - begun
        return "".join(pieces), reply

    def as_content(self, text: str) -> str:
        """Return the reply as the template's content: without spaces that the template adds itself, as after Mistral's [/INST].

        It is the first candidate with which the template renders what the network has read and written.
        """
        from data.chat.template import TemplateError

        messages = self.transcript.messages(self.transcript.first)
        render = partial(self.template.render, variables=self.variables)
        written = render(messages, add_generation_prompt=True) + text
        for content in dict.fromkeys((text, text.removeprefix(" "), text.strip())):
            try:
                rendered = render([*messages, {"role": "assistant", "content": content}])
            except TemplateError:  # it refuses this reply: said in the next turn
                return text
            if rendered.startswith(written):
                return content
        return text

    # ---- commands

    def command(self, name: str) -> Callable[[str], None]:
        """Return the method of a command. Error (ConfigError): there is no such command."""
        if name not in COMMANDS:
            raise ConfigError(f"there is no {name}; /help lists the commands. A space in front makes it a message")
        return partial(COMMANDS[name], self)

    def help(self, argument: str) -> None:
        """Print the commands."""
        print(HELP, file=sys.stderr)

    def undo(self, argument: str) -> None:
        """Take back the last turn."""
        self.transcript.undo()
        note(f"taken back; the conversation has {count_turns(self.transcript)}")

    def reset(self, argument: str) -> None:
        """Forget all turns."""
        self.transcript.reset()
        note("the conversation begins anew" + (", with its system message" if self.transcript.system else ""))

    def system(self, argument: str) -> None:
        """Set or remove the system message."""
        self.transcript.set_system(argument)
        note("system message set" if argument else "no system message")

    def temperature(self, argument: str) -> None:
        """Set the temperature."""
        try:
            value = float(argument)
        except ValueError:
            raise ConfigError(f"/temperature needs a number, as /temperature 0.7; given: {argument or 'nothing'}") from None
        self.sampling = replace(self.sampling, temperature=value)
        note(f"temperature {value:g}")

    def save(self, argument: str) -> None:
        """Append the conversation to a file."""
        if not argument:
            raise ConfigError("/save needs the name of a file, as /save chat.jsonl")
        path = Path(argument).expanduser()
        if path.suffix != ".jsonl":
            raise ConfigError(f"/save {argument}: a file of JSON lines ends in .jsonl; --objective sft reads no other name")
        number = self.transcript.save(path)
        note(f"saved as record {number} of {path}: {count_turns(self.transcript)}")

    def stats(self, argument: str) -> None:
        """Print the tokens of the last reply, and the seconds that it took."""
        if self.last is None:
            raise ConfigError("no reply yet")
        reply, seconds = self.last
        prompt = f"prompt {reply.read + reply.cached:,} tokens, {reply.cached:,} of them in the cache"
        note(f"{prompt}; reply {len(reply.ids):,} tokens; {seconds:.2f} s")


COMMANDS: Mapping[str, Callable[[TerminalChat, str], None]] = {
    "/help": TerminalChat.help,
    "/undo": TerminalChat.undo,
    "/reset": TerminalChat.reset,
    "/system": TerminalChat.system,
    "/temperature": TerminalChat.temperature,
    "/save": TerminalChat.save,
    "/stats": TerminalChat.stats,
}


def next_line(is_terminal: bool) -> str | None:
    r"""Read a message: a line, and those that follow a \ at its end. None: the end of input."""
    if is_terminal:
        try:
            import readline  # noqa: F401, it gives input() a history and its keys
        except ImportError:
            pass
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            lines.append(input(("… " if lines else "> ") if is_terminal else ""))
        except EOFError:
            if is_terminal:
                print(file=sys.stderr)
            if not lines:
                return None
            break
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            note("Ctrl-D or /quit leaves")
            lines = []
    return "\n".join(line.removesuffix("\\") if place < len(lines) - 1 else line for place, line in enumerate(lines))


def name_tokens(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Return the names of tokens, for messages."""
    names = [tokenizer.token_name(id) for id in ids]
    return " or ".join(names)


def count_turns(transcript: Transcript) -> str:
    """Return the number of turns in words."""
    count = len(transcript.turns)
    return f"{count} turn{'s' * (count != 1)}"


def note(text: str) -> None:
    """Print a note."""
    print(f"note: {text}", file=sys.stderr)
