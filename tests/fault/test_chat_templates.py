"""Chat templates that anyone may have made, and conversations that a template cannot hold: errors that say what and where."""

import json

import pytest

from data.chat import sandbox
from data.chat.sandbox import MAX_SIZE, render_source, render_with_generation_spans
from data.chat.template import TEMPLATE_NAMES, ChatTemplate, TemplateError, open_template, read_named
from data.config import DataError
from data.tokenizer.open import load_tokenizer
from tests.chats import CHATS, TOOLS, call, reply, result, system, user
from tests.folders import byte_level, write_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ESCAPES = [
    "{% set x = ''.__class__ %}",
    "{% set x = ''.__class__.__mro__ %}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ messages | sort(attribute='__class__') }}",
    "{{ messages | groupby('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0[__class__]}'.format(messages) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ 'a'.join.__self__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ dict.__class__ }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{{ m.__class__ }}{% endmacro %}{{ m() }}",
    "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{{ messages.append(1) }}",
    "{% set x = messages.pop() %}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].clear() }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace({'_x': 1}) %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
]
REFUSED = {  # a template: words of the error
    "{{ lipsum() }}": "'lipsum' is undefined",
    "{{ lipsum.__globals__ }}": "'lipsum' is undefined",
    "{{ messages | random }}": "No filter named 'random'",
    "{% include 'x' %}": "no loader",
    "{% import 'x' as y %}": "no loader",
    "{% from 'x' import y %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{% debug %}": "unknown tag 'debug'",
    "{{ range(10**9) }}": "Range too big",
    "{{ 'ab' * 10**8 }}": "result of * is too large",
    "{{ 10**8 * [0] }}": "result of * is too large",
    "{{ (7 ** 4000) }}": "result of \\*\\* is too large",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 }}": "result of \\*\\* is too large",
    "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}": "result of * is too large",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}": "result of + is too large",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}": "result of + is too large",
    "{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}": f"renders more than {MAX_SIZE:,} characters",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "line 1: RecursionError",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30: "nested",
    "a\n{{ foo }}": "line 2: 'foo' is undefined \\(variables given: bos_token, messages\\)",
    "{{ 'a' ~ foo }}": "'foo' is undefined",
    "{{ foo | upper }}": "'foo' is undefined",
    "{{ foo.bar }}": "'foo' is undefined",
    "{{ messages[0].thoughts.length }}": "'dict object' has no attribute 'thoughts'",
    "{{ messages[0].content + 1 }}": "line 1: TypeError",
    "\n\n{{ 1 / 0 }}": "line 3: ZeroDivisionError",
    "a\n{% if %}": "line 2: not valid Jinja: Expected an expression",
    "{% generation %}a": "not valid Jinja: .*endgeneration",
    "{{ tools | tojson }}": "TypeError: Object of type PrintableUndefined is not JSON serializable",
}


@pytest.mark.parametrize("source", ESCAPES)
def test_an_escape_from_the_sandbox_is_refused(source):
    messages = [user("Hi")]
    with pytest.raises(TemplateError, match=r"line 1: the sandbox refuses it: .*(unsafe|underscore)"):
        render_source(source, {"messages": messages})
    assert messages == [user("Hi")]


@pytest.mark.parametrize("source", REFUSED)
def test_a_template_that_fails_says_where(source):
    with pytest.raises(TemplateError, match=REFUSED[source].replace("of * is", "of \\* is").replace("of + is", "of \\+ is")):
        render_source(source, {"messages": [user("Hi")], "bos_token": "<s>"})


@pytest.mark.parametrize(
    "source",
    [
        "{% if tools %}x{% endif %}",
        "{% if tools is defined and tools is not none %}x{% endif %}",
        "{{ messages[0].thoughts }}{{ messages[0]['thoughts'] }}",
        "{{ tools | default('') }}",
        "{% for tool in tools %}x{% endfor %}",
        "{{ 'x' if tools }}",
        "{% macro m(a, b) %}{{ b }}{% endmacro %}{{ m('') }}",
    ],
)
def test_what_is_only_asked_for_may_be_missing(source):
    assert render_source(source, {"messages": [user("Hi")]}) == ""


def test_values_that_are_no_json_are_refused():
    class Sneaky(str):
        def upper(self):
            return open("/etc/passwd")

    assert render_source("{{ x.upper() }}", {"x": Sneaky("a")}) == "A"
    for value, kind in ((object(), "object"), ({1, 2}, "set"), (b"a", "bytes"), ({"a": [open]}, "builtin_function_or_method")):
        with pytest.raises(TemplateError, match=rf"x.* is of type {kind}: only JSON values"):
            render_source("", {"x": value})
    endless: list = []
    endless.append(endless)
    with pytest.raises(TemplateError, match="nested too deeply"):
        render_source("", {"x": endless})


BLOCK = "{% generation %}a{% endgeneration %}"


@pytest.mark.parametrize(
    ("source", "text", "kind"),
    [
        ("{% macro m() %}aa" + BLOCK + "{% endmacro %}a{{ m() }}", "aaaa", "macro"),
        ("{% macro m() %}a{{ caller() }}{% endmacro %}{% call m() %}" + BLOCK + "{% endcall %}", "aa", "callblock"),
        ("{% filter upper %}a" + BLOCK + "{% endfilter %}", "AA", "filterblock"),
        ("{% set x %}a" + BLOCK + "{% endset %}{{ x }}", "aa", "assignblock"),
        ("{% for x in [[1]] recursive %}" + BLOCK + "{{ loop(x) if x is iterable }}{% endfor %}", "aa", "for"),
        ("{% generation %}a" + BLOCK + "{% endgeneration %}", "aa", "callblock"),
    ],
)
def test_a_block_inside_what_takes_its_text_has_no_characters(source, text, kind):
    assert render_source(source, {}) == text
    with pytest.raises(TemplateError, match=f"line 1: a generation block in a {kind}"):
        render_with_generation_spans(source, {})


@pytest.mark.parametrize("installed", ["3.1.5", "2.11.3", "3.0"])
def test_a_jinja_with_known_escapes_is_refused(installed, monkeypatch):
    monkeypatch.setattr(sandbox, "version", lambda name: installed)
    with pytest.raises(DataError, match=rf"jinja2 {installed} has known escapes .*pip install 'jinja2>=3.1.6'"):
        sandbox.build_environment.__wrapped__()


@pytest.mark.parametrize("installed", ["3.1.6", "3.2", "3.10.0", "4.0rc1"])
def test_a_later_jinja_is_used(installed, monkeypatch):
    monkeypatch.setattr(sandbox, "version", lambda name: installed)
    assert sandbox.build_environment.__wrapped__().filters["tojson"] is sandbox.tojson


def named(name: str) -> ChatTemplate:
    return ChatTemplate(name, read_named(name), TOKENS)


PAIRS = ("llama-2", "mistral-v1", "alpaca")
ALTERNATE = "Conversation roles must alternate .*message {} is of {}"
UNFIT = [  # template, messages, words
    ("gemma", [system("S"), user("a")], r"chat template gemma: System role not supported \(message 1\)"),
    ("gemma", [user("a"), reply("b"), system("S")], r"System role not supported \(message 3\)"),
    ("gemma", [user("a"), user("b")], ALTERNATE.format(2, "user, not assistant")),
    ("gemma", [user("a"), result("b")], ALTERNATE.format(2, "tool, not assistant")),
    *((name, [user("a"), reply("b"), reply("c")], ALTERNATE.format(3, "assistant")) for name in (*PAIRS, "mistral-v3")),
    *((name, [reply("a")], ALTERNATE.format(1, "assistant")) for name in (*PAIRS, "mistral-v3", "mistral-v7")),
    *((name, [user("a"), user("b")], ALTERNATE.format(2, "user")) for name in (*PAIRS, "mistral-v3", "mistral-v7")),
    *((name, [user("a"), reply("b"), system("S")], ALTERNATE.format(3, "system")) for name in (*PAIRS, "mistral-v3")),
    *((name, [user("a"), result("b")], ALTERNATE.format(2, "tool")) for name in ("mistral-v3", "mistral-v7")),
    *((name, [user("a"), call("x"), user("b")], ALTERNATE.format(3, "user")) for name in ("mistral-v3", "mistral-v7")),
    *((name, [system("S")], "a system message needs a user message") for name in ("llama-2", "mistral-v1", "mistral-v3")),
    ("mistral-v3", [user("a"), call("x", text="b")], "message 2 has text beside its tool calls"),
    ("llama-3", [user("a"), call("x", text="b")], "message 2 has text beside its tool call"),
    ("llama-3", [user("a"), call("x", "y")], r"only supports single tool-calls at once! \(message 2\)"),
    *(
        (name, [user("a"), {"role": "critic", "content": "b"}], "message 2 has the role 'critic'")
        for name in ("chatml", "llama-3", "zephyr", "phi-3", "qwen2.5", "qwen3", "deepseek")
    ),
    *((name, [user("a"), {"role": "user"}], "has no attribute 'content'") for name in ("chatml", "zephyr", "phi-3", "qwen2.5")),
    *((name, [user("a"), call("x")], "message 2 calls tools: .*chatml, llama-3") for name in ("gemma", "phi-3", *PAIRS)),
    ("chatml", [], "the conversation has no message"),
    ("chatml", [user("a"), "b"], "message 2 is a str"),
    ("chatml", [user("a"), {"content": "b"}], "message 2 has the role ''"),
]


@pytest.mark.parametrize(("name", "messages", "words"), UNFIT)
def test_a_conversation_that_a_template_cannot_hold(name, messages, words):
    with pytest.raises(TemplateError, match=f"^chat template {name}: ") as error:
        named(name).render(messages)
    with pytest.raises(TemplateError, match=words):
        raise error.value


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_tools_without_a_form_for_them_are_an_error(name):
    has_form = name in ("chatml", "llama-3", "mistral-v3", "mistral-v7", "qwen2.5", "qwen3")
    assert named(name).reads("tools") == has_form
    if has_form:
        assert "Köln" in named(name).render([user("a")], tools=TOOLS)
    else:
        with pytest.raises(TemplateError, match=r"has tools: the template has no form for them; of our own, .*chatml, llama-3"):
            named(name).render([user("a")], tools=TOOLS)
    assert named(name).render([user("a")], tools=[]) == named(name).render([user("a")])


def test_llama_3_declares_tools_in_a_user_message():
    for messages in ([system("S")], [system("S"), reply("a")], [reply("a")]):
        with pytest.raises(TemplateError, match="no first user message"):
            named("llama-3").render(messages, tools=TOOLS)


@pytest.mark.parametrize("name", ["llama-2", "mistral-v1", "mistral-v3", "mistral-v7", "zephyr", "phi-3", "deepseek", "alpaca"])
def test_a_tokenizer_without_eos_has_no_terminator(name):
    with pytest.raises(TemplateError, match="'eos_token' is undefined"):
        ChatTemplate(name, read_named(name), {"bos_token": "<s>"}).render(CHATS["two turns"][0])


def test_a_variable_is_no_argument():
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        with pytest.raises(TemplateError, match=f"'{name}' is an argument of render"):
            named("chatml").render([user("a")], variables={name: 1})


def test_a_date_that_cannot_be_read():
    with pytest.raises(TemplateError, match="ValueError: time data '2024-07-26' does not match"):
        render_source("{{ strftime_now('%Y') }}", {"date_string": "2024-07-26"})


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_message_of_a_megabyte(name):
    text = "é\u2581\r\n😀 x" * 150_000
    assert text in named(name).render([user(text), reply("a")])


def folder_with(tmp_path, files: dict[str, str | bytes]):
    write_tokenizer(tmp_path, byte_level(["<s>", "</s>"]), ["<s>", "</s>"])
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({}, None, r"no default chat template. --template takes one of chatml, .*alpaca, or its folder has none"),
        ({}, "chatmel", r"no chat template 'chatmel'. --template takes one of chatml, .*alpaca, or its folder has none"),
        ({"additional_chat_templates/rag.jinja": "a"}, None, r"no default .*, or its folder's: rag"),
        ({"chat_template.jinja": b"\xff"}, None, "chat_template.jinja: not UTF-8"),
        ({"chat_template.json": "{"}, None, r"chat_template.json: its chat_template is damaged"),
        ({"chat_template.json": "[]"}, None, "damaged"),
        ({"chat_template.json": json.dumps({"chat_template": 3})}, None, "damaged"),
        ({"chat_template.json": json.dumps({"chat_template": [{"name": "default"}]})}, None, "damaged"),
        ({"chat_template.json": json.dumps({"chat_template": [{"name": "default", "template": 3}]})}, None, "is of type int"),
    ],
)
def test_templates_of_a_folder_that_cannot_be_had(files, name, words, tmp_path):
    tokenizer = folder_with(tmp_path, files)  # a damaged template does not stop those who need none
    with pytest.raises(DataError, match=words):
        open_template(tokenizer, name)
