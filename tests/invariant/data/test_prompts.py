"""Records of prompts for reinforcement: each shape, the answer, the columns for rewards, and what is refused."""

import json

import pytest

from data.chat.preferences import read_instruction
from data.chat.prompts import PromptRecord, read_prompt
from data.chat.shapes import read_chat_record
from data.config import DataError
from tests.chats import TOOLS, call, reply, result, system, user

HI, HELLO = user("Hi"), reply("Hello")
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
CASES = {  # name: record, prompt, columns
    "a string": ({"prompt": "1 + 1 =", "answer": "2"}, "1 + 1 =", {"answer": "2"}),
    "a string, no answer": ({"prompt": "Sing.", "kind": "song"}, "Sing.", {"kind": "song"}),
    "a string, completion": ({"prompt": "1 =", "completion": " 1"}, "1 =", {"completion": " 1", "answer": " 1"}),
    "turns": ({"prompt": [HI], "answer": 3, "id": 7}, (HI,), {"answer": 3, "id": 7}),
    "one turn": ({"prompt": HI, "answer": "3"}, (HI,), {"answer": "3"}),
    "JSON text": ({"prompt": json.dumps([HI]), "answer": "3"}, (HI,), {"answer": "3"}),
    "turns, completion": (
        {"prompt": [HI], "completion": [HELLO]},
        (HI,),
        {"completion": [HELLO], "answer": "Hello"},
    ),
    "messages": ({"messages": [HI, HELLO]}, (HI,), {"answer": "Hello"}),
    "messages, answer": ({"messages": [HI, HELLO], "answer": "Bye", "level": 2}, (HI,), {"answer": "Bye", "level": 2}),
    "messages, answer 0": ({"messages": [HI, HELLO], "answer": 0}, (HI,), {"answer": 0}),
    "messages, null answer": ({"messages": [HI, HELLO], "answer": None, "n": None}, (HI,), {"n": None, "answer": "Hello"}),
    "messages without a reply": ({"messages": [system("S"), HI]}, (system("S"), HI), {}),
    "several turns": ({"messages": [HI, HELLO, user("Bye"), reply("Ciao")]}, (HI, HELLO, user("Bye")), {"answer": "Ciao"}),
    "system column": ({"messages": [HI, HELLO], "system": "S"}, (system("S"), HI), {"answer": "Hello"}),
    "the same system": ({"messages": [system("S"), HI], "system_prompt": "S"}, (system("S"), HI), {}),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, (HI,), {"answer": "Hello"}),
    "alpaca": ({"instruction": "Hi", "output": "Hello"}, (HI,), {"output": "Hello", "answer": "Hello"}),
    "alpaca, input, history": (
        {"instruction": "Add.", "input": "1 1", "history": [["Hi", "Hello"]], "answer": "2"},
        (HI, HELLO, user("Add.\n\n1 1", instruction="Add.", input="1 1")),
        {"answer": "2"},
    ),
    "other shape is empty": ({"prompt": "", "messages": [HI, HELLO]}, (HI,), {"answer": "Hello"}),
}
REFUSED = {  # name: record, what the error says
    "no user": ({"messages": [system("S"), HELLO]}, "no turn of the user in the prompt, so there is nothing to answer.*system"),
    "a reply alone": ({"messages": [HELLO]}, "no turn of the user in the prompt.*its only turn is the reply"),
    "begins with a reply": ({"messages": [HELLO, HI, HELLO]}, "begins with a turn of the role assistant"),
    "two replies": ({"messages": [HI, HELLO, HELLO]}, "ends with a reply, so there is nothing to answer"),
    "prompt with a reply": ({"prompt": [HI, HELLO], "answer": "x"}, "ends with a reply, so there is nothing to answer"),
    "system last": ({"prompt": [HI, system("S")]}, "ends with a system message"),
    "empty prompt": ({"prompt": " \n", "answer": "x"}, "'prompt' is empty: there is nothing to answer"),
    "no prompt": ({"prompt": "", "answer": "x"}, "'prompt': empty, so there is nothing to answer"),
    "no turns": ({"messages": [], "answer": "x"}, "'messages': empty, so there is nothing to answer"),
    "empty last turn": ({"messages": [user(" "), HELLO]}, "the prompt is empty: the last turn of the user says nothing"),
    "empty instruction": ({"instruction": " ", "output": "x"}, "'instruction' is empty"),
    "two shapes": ({"prompt": "Hi", "messages": [HI]}, "'prompt', 'messages' are columns of 2 shapes: leave one"),
    "GSM8K": ({"question": "1 + 1?", "answer": "2"}, "no prompt: its columns: 'question', 'answer'.*Rename question to prompt"),
    "nothing": ({"answer": "2"}, "no prompt: its columns: 'answer'. Accepted: prompt"),
    "system beside a string": ({"prompt": "Hi", "system": "S"}, "need a template, and so lists of turns as prompt"),
    "tools beside a string": ({"prompt": "Hi", "tools": TOOLS}, "need a template, and so lists of turns as prompt"),
    "two systems": ({"messages": [system("A"), HI], "system": "B"}, "two system messages"),
    "media": ({"messages": [HI], "images": ["a.png"]}, "only text is read"),
    "a number": ({"prompt": 3}, "'prompt' is .*not a list of turns"),
    "completion": ({"prompt": "Hi", "completion": 3}, "'completion' is .*not a string or a list of turns"),
    "unknown role": ({"prompt": [{"role": "Eve", "content": "Hi"}]}, "prompt, turn 1: the role 'Eve' is unknown"),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes(case):
    row, prompt, columns = CASES[case]
    before = json.dumps(row)
    assert read_prompt(row) == PromptRecord(prompt, None, columns)
    assert json.dumps(row) == before, "the record stays as it is"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    row, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        read_prompt(row)


def test_tools():
    """The prompt may end with a tool's result; a last reply that only calls a tool is no answer."""
    asked = [user("Weather?"), call("Köln"), result("3°")]
    found = read_prompt({"messages": [*asked, reply("Cold.")], "tools": TOOLS})
    assert found.tools == TOOLS and [message["role"] for message in found.prompt] == ["user", "assistant", "tool"]
    assert found.columns == {"answer": "Cold."}
    assert read_prompt({"messages": asked[:2], "tools": TOOLS}) == PromptRecord((asked[0],), TOOLS, {})


def test_the_prompt_is_that_of_instruction_tuning():
    for row in (
        {"messages": [system("S"), HI, HELLO, user("Bye"), reply("Ciao")]},
        {"conversations": [HUMAN, GPT], "system": "S"},
        {"instruction": "Add.", "input": "1 1", "output": "2", "history": [["Hi", "Hello"]], "system": "S"},
    ):
        talk = read_chat_record(row)
        found = read_prompt(row)
        assert found.prompt == talk.messages[:-1] and found.columns["answer"] == talk.messages[-1]["content"]
    assert read_instruction({"instruction": "Hi"}) == [HI]


@pytest.mark.parametrize("name", ["input", "history"])
def test_columns_of_another_shape_are_not_lost(name):
    value = {"input": "3 4", "history": [["a", "b"]]}[name]
    for row in ({"prompt": "Add the numbers."}, {"messages": [{"role": "user", "content": "Add."}]}):
        with pytest.raises(DataError, match=f"'{name}' beside"):
            read_prompt(row | {name: value})
        assert read_prompt(row | {name: ""}).columns == {}
