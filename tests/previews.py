"""Write tests/invariant/data/previews.txt: what each named template makes of conversations, learned tokens between ⟦ and ⟧.

    python -m tests.previews

A test compares the file as a whole; read its changes before they are committed.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from data.chat.conversation import Conversation
from data.chat.encode import ChatEncoder
from data.chat.preview import mark_learned
from data.chat.template import TEMPLATE_NAMES, open_template
from data.config import DataError
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from tests.chat_tokenizers import write_byte_level
from tests.chats import CHATS, reply, system, user

FILE = Path(__file__).parent / "invariant" / "data" / "previews.txt"
HEAD = "Learned tokens stand between ⟦ and ⟧. Written by: python -m tests.previews\n"
TALK = [user(" Hi 😀"), reply("Hello "), user("Bye"), reply("Ciao"), user("…")]
SHOWN = {
    "two turns": (TALK, None),
    "a system message": ([system("Be brief."), *TALK[:4]], None),
    "a call": CHATS["one call"],
    "thoughts": CHATS["reasoning"],
}
THINKING = ("qwen3",)  # templates that write thoughts
UNDECLARED = ("deepseek",)  # templates that write calls of tools and no declarations


def previews(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the parts of the file."""
    yield HEAD
    for name in TEMPLATE_NAMES:
        encoder = ChatEncoder(tokenizer, open_template(tokenizer, name))
        for title, (messages, tools) in SHOWN.items():
            if title == "thoughts" and name not in THINKING:
                continue
            yield f"\n==== {name}, {title}\n"
            try:
                examples = encoder(Conversation(tuple(messages), None if name in UNDECLARED else tools))
            except DataError as error:
                yield f"refused: {error}\n"
                continue
            for number, tokens in enumerate(examples, 1):
                yield f"-- reply {number}\n" if len(examples) > 1 else ""
                yield mark_learned(tokenizer, tokens) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_byte_level(Path(folder))
        FILE.write_text("".join(previews(load_tokenizer(folder))), encoding="utf-8")
    print(f"{FILE} is written: read its changes (git diff)")


if __name__ == "__main__":
    main()
