"""Turns of a record as messages: roles, contents, tool calls, reasoning, and which replies are learned.

    turn        of OpenAI: {"role", "content", "tool_calls"?, "tool_call_id"?, "name"?, "reasoning_content"?, "weight"?}
                of ShareGPT: {"from", "value", "train"?}; each list may hold either
    null        is a missing key: Arrow gives each struct of a list the keys of all. Within an object every null is removed,
                arguments of tool calls and schemas of tools included. JSON text was never filled by Arrow: a null within a
                string of arguments, a function_call or a column `tools` of text stays.
    content     a string, or [{"type": "text", "text"}, …], whose texts are joined without a separator, as templates do
    arguments   JSON text in OpenAI's wire form, an object in templates: becomes an object; "" becomes {}
    reasoning   `reasoning_content`, `thinking` or `reasoning` (transformers' order) becomes `reasoning_content`
    learned     replies, unless the turn says "train": false or "weight": 0

Other keys of a turn stay: a template may read them. Sources: OpenAI's API reference (chat completions, fine-tuning);
LLaMA-Factory's data/README.md (function_call, observation); axolotl's documentation (`train`).
"""

import json
from typing import Any, TypeVar

from data.chat.conversation import REPLY, Message
from data.config import DataError
from data.messages import quote_names
from data.sources.files import JSON_KINDS

T = TypeVar("T")
CALL = "function_call"  # ShareGPT: a turn whose value is JSON of calls; OpenAI until 2023: the one call of a message
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's name since 2024
    "user": "user",
    "human": "user",
    "assistant": REPLY,
    "gpt": REPLY,
    "chatgpt": REPLY,
    "bing": REPLY,
    "bard": REPLY,
    "model": REPLY,
    CALL: REPLY,
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # keys of a turn, and columns of a record
FLAGS = ("train", "weight")
SPANS = ("train_detail", "train_details")  # axolotl: flags for ranges of characters


def read_turns(turns: Any, column: str, *, is_only: bool = True) -> tuple[list[Message], list[bool]]:
    """Return the messages of a column and which are learned. is_only: messages name turns without the column.

    Errors (DataError): name the turn, counted from 1.
    """
    turns = parse_column(turns, column)
    if isinstance(turns, dict) and turns and all(isinstance(each, list) for each in turns.values()):
        turns = [dict(zip(turns, turn, strict=True)) for turn in zip_equal(turns, column)]
    if not isinstance(turns, list):
        raise DataError(f"{column!r} is {kind_of(turns)}, not a list of turns")
    if not turns:
        raise DataError(f"{column!r} is empty: a conversation has a turn and a reply at least")
    messages, is_learned = [], []
    for number, turn in enumerate(turns, start=1):
        place = f"turn {number}" if is_only else f"{column}, turn {number}"
        message, flag = read_turn(turn, place)
        messages.append(message)
        is_learned.append(flag)
    return messages, is_learned


def zip_equal(columns: dict[str, list], name: str) -> list[tuple]:
    """Return the rows of columns, as `datasets.Sequence` stores a list of objects: one list a key."""
    lengths = {key: len(each) for key, each in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise DataError(f"{name!r} holds lists of several lengths ({counts})")
    return list(zip(*columns.values(), strict=True))


def read_turn(turn: Any, place: str) -> tuple[Message, bool]:
    """Return a turn's message and whether it is learned."""
    if not isinstance(turn, dict):
        raise DataError(f"{place}: {kind_of(turn)}, not an object with role and content, or from and value")
    turn = strip_nulls(turn)
    given_role = take_one(turn, ("role", "from"), place)
    if given_role is None:
        raise DataError(f"{place}: no role; its keys: {quote_names(turn)}. A turn has role and content, or from and value")
    role = ROLES.get(given_role) if isinstance(given_role, str) else None
    if role is None:
        raise DataError(f"{place}: the role {given_role!r:.60} is unknown. Roles: {', '.join(ROLES)}")
    place = f"{place} ({given_role})"
    for keys, why in ((MEDIA, "only text is read"), (SPANS, "flags of a part of a reply are not read: use train or weight")):
        if given := [key for key in keys if turn.get(key)]:
            raise DataError(f"{place}: it has {quote_names(given)}: {why}")
    is_learned = read_flags(turn, place) and role == REPLY
    content = read_content(take_one(turn, ("content", "value"), place), place)
    calls = read_calls(turn.pop("tool_calls", None), place) + read_calls(turn.pop(CALL, None), place)
    if given_role == CALL:
        calls, content = [*read_calls(parse_json(content or "", place), place), *calls], ""
    message: Message = {"role": role, "content": content or ""}
    if reasoning := take_one(turn, REASONING, place):
        if not isinstance(reasoning, str):
            raise DataError(f"{place}: its reasoning is {kind_of(reasoning)}, not a string")
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if role != REPLY and (found := [key for key in ("tool_calls", "reasoning_content") if key in message]):
        raise DataError(f"{place}: {quote_names(found)} belongs to a reply")
    if role == REPLY and not message["content"].strip() and "tool_calls" not in message:
        raise DataError(f"{place}: the reply is empty" + " but for its reasoning" * ("reasoning_content" in message))
    if content is None and "tool_calls" not in message:
        raise DataError(f"{place}: no content (missing, or null)")
    for key in ("name", "tool_call_id"):
        if not isinstance(turn.get(key, ""), str):
            raise DataError(f"{place}: {key!r} is {kind_of(turn[key])}, not a string")
    return message | turn, is_learned


def take_one(turn: dict, keys: tuple[str, ...], place: str) -> Any:
    """Remove several names of one thing from a turn; return its value, or None. Errors: they have different values."""
    values = {key: turn.pop(key) for key in keys if key in turn}
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        raise DataError(f"{place}: {' and '.join(map(repr, values))} differ, and are names of one thing: leave one")
    return first


def read_flags(turn: dict, place: str) -> bool:
    """Remove `train` and `weight` from a turn; return True if none is false."""
    is_learned = True
    for key in FLAGS:
        value = turn.pop(key, 1)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{place}: {key!r} is {value!r:.60}; it is true or 1, or false or 0: learn the reply, or not")
        is_learned &= bool(value)
    return is_learned


def read_content(content: Any, place: str) -> str | None:
    """Return a content as one string; None where it is missing."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        hint = ": write it as JSON text" if isinstance(content, dict) else ""
        raise DataError(f"{place}: its content is {kind_of(content)}, not a string{hint}")
    for number, part in enumerate(content, start=1):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise DataError(f'{place}: part {number} of its content is no object {{"type": "text", "text": …}}: {part!r:.60}')
        if part["type"] != "text":
            raise DataError(f"{place}: part {number} of its content has the type {part['type']!r:.60}; only text is read")
        if not isinstance(part.get("text"), str):
            raise DataError(f"{place}: part {number} of its content has no string 'text': {part!r:.60}")
    return "".join(part["text"] for part in content)


def read_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form, with arguments as objects. `calls`: a list, one call, JSON text of these, or None."""
    if isinstance(calls, str) and calls.strip():
        calls = parse_json(calls, f"{place}: its tool calls")
    if not calls:
        return []
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            form = '{"type": "function", "function": {"name": …, "arguments": …}}'
            raise DataError(f"{place}: a tool call is {form}, this is {call!r:.80}")
        if (kind := call.get("type", "function")) != "function":
            raise DataError(f"{place}: the tool call {function['name']!r} has the type {kind!r:.60}; only functions are read")
        arguments = read_arguments(function.get("arguments") or {}, f"{place}: the arguments of {function['name']!r:.60}")
        others = {k: v for k, v in call.items() if k not in ("type", "function", "name", "arguments") and v is not None}
        read.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | others)
    return read


def read_arguments(arguments: Any, what: str) -> dict[str, Any]:
    """Return a call's arguments as an object.

    >>> read_arguments('{"city": "Oslo", "unit": null}', "")
    {'city': 'Oslo', 'unit': None}
    """
    value = arguments
    if isinstance(arguments, str):
        value = parse_json(arguments, what) if arguments.strip() else {}
    if not isinstance(value, dict):
        hint = " (JSON that was quoted twice?)" if isinstance(arguments, str) and isinstance(value, str) else ""
        raise DataError(f"{what} are {kind_of(value)}, not an object{hint}: {arguments!r:.60}")
    return value


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a record as OpenAI's schemas; bare functions get their wrapper. None if there are none."""
    tools = parse_column(tools, "tools") if isinstance(tools, str) and tools.strip() else strip_nulls(tools)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"'tools' is {kind_of(tools)}, not a list of JSON schemas")
    read = []
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": …, "parameters": …}}'
            raise DataError(f"tool {number} is {form}, this is {tool!r:.80}")
        read.append(tool if "function" in tool else {"type": "function", "function": tool})
    return read


def parse_column(value: Any, column: str) -> Any:
    """Return the value of a column; of text, as a table has it, its JSON value."""
    return parse_json(value, repr(column)) if isinstance(value, str) else value


def parse_json(text: str, what: str) -> Any:
    """Return the JSON value of a text. Errors (DataError): no JSON; NaN; a lone surrogate."""
    try:
        value = json.loads(text, parse_constant=refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what}: a lone surrogate \\u{ord(error.object[error.start]):04x} in its JSON text") from error
    except (ValueError, RecursionError) as error:
        hint = ". Python's repr? Write it by json.dumps" if text.lstrip().startswith(("{'", "[{'")) else ""
        raise DataError(f"{what}: not JSON ({error}): {text!r:.60}{hint}") from error
    return value


def refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which JSON does not have."""
    raise ValueError(f"{name} is no JSON number")


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value, for messages."""
    return JSON_KINDS.get(type(value), type(value).__name__)


def strip_nulls(value: T) -> T:
    """Return a JSON value without the keys of its objects that are null. Nulls in lists stay: Arrow adds none there.

    >>> strip_nulls({"role": "user", "name": None, "parts": [{"text": "a", "image": None}, None]})
    {'role': 'user', 'parts': [{'text': 'a'}, None]}
    """
    if isinstance(value, dict):
        return {key: strip_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [strip_nulls(each) for each in value]
    return value
