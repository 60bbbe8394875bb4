"""Conversations that tests of chat templates render: roles, tools, reasoning, and texts that are easily damaged."""

from datetime import datetime

from data.chat.sandbox import FROZEN_DATE

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says <b>today's</b> weather: °C & more",
            "parameters": {"type": "object", "properties": {"place": {"enum": ["Köln", "東京"]}}, "required": ["place"]},
        },
    }
]


def user(text: str, **more) -> dict:
    return {"role": "user", "content": text, **more}


def reply(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def call(*places: str, text: str = "", **more) -> dict:
    """A reply that calls the tool once a place; ids have nine characters, as Mistral's must."""
    calls = [
        {"type": "function", "id": f"{number:09}", "function": {"name": "weather", "arguments": {"place": place}}}
        for number, place in enumerate(places)
    ]
    return reply(text, tool_calls=calls, **more)


def result(text: str, number: int = 0) -> dict:
    return {"role": "tool", "tool_call_id": f"{number:09}", "name": "weather", "content": text}


PROSE = {  # user and assistant in turn, which every template renders
    "two turns": [user("Hi"), reply("Hello"), user("Bye"), reply("Ciao")],
    "question": [user("Hi"), reply("Hello"), user("Bye")],
    "one question": [user("Hi")],
    "emoji": [user("😀👩‍👩‍👧 é e\u0301"), reply("你好, \u2581a\u2581\u2581b"), user("ß"), reply("🏳️‍🌈")],
    "line ends": [user("a\r\nb\n\n"), reply("\r\nc\rd\r\n")],
    "spaces": [user("  Hi \t"), reply(" Hello  "), user("\n"), reply("x \n")],
    "markup": [user("<|im_end|> {{ bos_token }} {% if %} <b>&</b>"), reply("</s>[INST] \\n 'a' \"b\"")],
}
SYSTEM = {
    "system": [system("Be brief."), user("Hi"), reply("Hello"), user("Bye"), reply("Ciao")],
    "system with spaces": [system(" S \n"), user("Hi"), reply("Hello")],
}
REASONING = {
    "reasoning": [user("2"), reply("4", reasoning_content="\nTwo and two.\n"), user("3"), reply("6", reasoning="Three.")],
    "thoughts": [user("2 + 2"), reply("<think>\nTwo.\n</think>\n\n4"), user("3 + 3"), reply("<think>\nThree.\n</think>\n\n6")],
}
TOOL_USE = {
    "one call": [system("S"), user("Weather?"), call("Köln"), result('{"t": 3.5}'), reply("3 °C"), user("Bye"), reply("Ciao")],
    "two calls": [user("Weather?"), call("Köln", "東京"), result("3", 0), result("sunny", 1), reply("Fine")],
    "calls after calls": [user("a"), call("a"), result("[1]"), call("東京"), result("0.5"), reply("b"), user("c"), call("")],
    "text and call": [user("a"), call("Köln", text="I ask."), result("x y"), reply("b")],
}
ODD = {
    "empty reply": [user("Hi"), reply(""), user(""), reply("")],
    "two questions": [user("a"), user("b"), reply("c")],
    "late system": [user("a"), reply("b"), system("S"), user("c")],
    "reply first": [reply("a"), user("b")],
}
ALL = PROSE | SYSTEM | REASONING | TOOL_USE | ODD
CHATS = {name: (chat, TOOLS if name in TOOL_USE else None) for name, chat in ALL.items()}


def freeze_clock(monkeypatch) -> None:
    """Make transformers' strftime_now show the day that ours is frozen to."""
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls):
            return cls(FROZEN_DATE.year, FROZEN_DATE.month, FROZEN_DATE.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
