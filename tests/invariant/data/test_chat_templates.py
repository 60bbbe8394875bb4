"""What holds for every chat template of ours: its tokens, one bos, a frozen date, nothing that the caller gave changed."""

import copy
import re
import tomllib
from datetime import date, datetime
from pathlib import Path

import pytest

import data
from data.chat.sandbox import FROZEN_DATE, read_variables, render_source, render_with_generation_spans
from data.chat.template import CONTROL_TOKENS, TEMPLATE_NAMES, ChatTemplate, TemplateError, open_template, read_named
from data.tokenizer.open import load_tokenizer
from data.tokenizer.training import train_tokenizer
from tests.chats import CHATS, PROSE, TOOLS, reply, system, user
from tests.folders import TEXT, byte_level, write_tokenizer

BOS, EOS = "<BOS>", "<EOS>"
HAS_BOS = {"llama-2", "llama-3", "mistral-v1", "mistral-v3", "mistral-v7", "gemma", "deepseek", "alpaca"}


def named(name: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(name, read_named(name), tokens or {"bos_token": BOS, "eos_token": EOS})


def renderings(name: str) -> list[str]:
    """Every conversation that the template can hold, with and without a generation prompt."""
    texts = []
    for messages, tools in CHATS.values():
        for prompt in (False, True):
            try:
                given = tools if named(name).reads("tools") else None
                texts.append(named(name).render(messages, tools=given, add_generation_prompt=prompt))
            except TemplateError:
                continue
    assert len(texts) >= 2 * len(PROSE)
    return texts


def test_the_names_are_the_files_and_the_wheel_has_them():
    root = Path(data.__file__).parent
    assert {path.stem for path in (root / "chat" / "templates").iterdir()} == set(TEMPLATE_NAMES)
    packed = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert packed["data"] == ["chat/templates/*.jinja"]


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_control_tokens_are_those_that_it_writes(name):
    texts = renderings(name)
    assert all(any(token in text for text in texts) or "AVAILABLE" in token for token in named(name).control_tokens)
    known = {*CONTROL_TOKENS[name], BOS, EOS}
    typed = {"[INST]", "[/INST]", "<|user|>", "<|system|>", "<|assistant|>"} if not CONTROL_TOKENS[name] else set()
    typed |= {"<|im_end|>", "[INST]", "[1]"}  # by users
    form = re.compile(r"<[|｜].+?[|｜]>|<[a-z]+_of_turn>|\[/?[A-Z_]+\]|<[BE]OS>")
    written = {token for text in texts for token in form.findall(text)}
    assert written <= known | typed


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_exactly_one_bos_or_none(name):
    for messages, _ in (CHATS[chat] for chat in PROSE):
        text = named(name).render(messages)
        turns = sum(message["role"] == "user" for message in messages)
        assert text.count(BOS) == (turns if name == "llama-2" else name in HAS_BOS)
        assert text.startswith(BOS) == (name in HAS_BOS)
    if name in HAS_BOS - {"llama-2"}:  # a tokenizer without bos: the same text without it
        chat = CHATS["two turns"][0]
        assert named(name).render(chat) == BOS + named(name, eos_token=EOS).render(chat)


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_reply_follows_its_generation_prompt(name):
    """What is learned is what is generated: header and reply of a conversation are the prompt and the reply."""
    messages = [user("a"), reply("b"), user("c"), reply("REPLY")]
    prompt = named(name).render(messages[:3], add_generation_prompt=True)
    if name == "qwen3":
        prompt = named(name).render(messages[:3], add_generation_prompt=True, variables={"enable_thinking": False})
    whole = named(name).render(messages)
    assert whole.startswith(prompt) and whole.removeprefix(prompt).lstrip(" ").startswith("REPLY")


def test_the_date_is_frozen_unless_a_day_is_given():
    clock = "{{ strftime_now('%d %b %Y %H:%M') }}"
    assert render_source(clock, {}) == FROZEN_DATE.strftime("%d %b %Y 00:00") == "26 Jul 2024 00:00"
    assert render_source(clock, {"date_string": "1 Feb 2025"}) == "01 Feb 2025 00:00"
    assert render_source(clock, {"date_string": "1 Feb 2025"}, date(2026, 3, 4)) == "04 Mar 2026 00:00"
    assert render_source(clock, {}, datetime(2026, 3, 4, 5, 6)) == "04 Mar 2026 05:06"
    template = ChatTemplate("default", clock + "{{ messages[0].content }}")
    assert template.render([user("a")]) == "26 Jul 2024 00:00a"
    assert template.render([user("a")], day=date(2026, 3, 4)) == "04 Mar 2026 00:00a"
    with_tools = named("llama-3").render([user("a")], tools=TOOLS)
    assert "Today Date: 26 Jul 2024\n" in with_tools
    dated = named("llama-3").render([user("a")], tools=TOOLS, variables={"date_string": "X"})
    assert dated == with_tools.replace("26 Jul 2024", "X")


def test_variables_stand_before_the_tokenizers_tokens():
    template = ChatTemplate("default", "{{ eos_token }}{{ mood }}{{ documents is none }}", {"eos_token": "</s>"})
    assert template.render([user("a")], variables={"mood": "x"}) == "</s>xTrue"
    assert template.render([user("a")], variables={"mood": "x", "eos_token": "<e>"}) == "<e>xTrue"


@pytest.mark.parametrize("name", CHATS)
def test_rendering_changes_nothing_that_the_caller_gave(name):
    messages, tools = CHATS[name]
    before = copy.deepcopy((messages, tools))
    given = named("qwen3").render(messages, tools=tools)
    assert (messages, tools) == before
    as_tuples = tuple(tuple(message.items()) for message in messages)
    assert named("qwen3").render([dict(items) for items in as_tuples], tools=tools) == given
    nulls = [dict.fromkeys(("tool_calls", "name", "reasoning_content"), None) | message for message in messages]
    assert named("qwen3").render(nulls, tools=tools) == given


def test_the_names_of_reasoning_are_one():
    keys = ("reasoning_content", "thinking", "reasoning")
    texts = {named("qwen3").render([user("a"), reply("b", **{key: "why"})]) for key in keys}
    assert len(texts) == 1 and "<think>\nwhy\n</think>" in texts.pop()


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral-v3", "mistral-v7", "qwen2.5", "qwen3", "deepseek"])
def test_arguments_as_text_are_not_quoted_twice(name):
    def calls(arguments, **more):
        return [user("a"), reply("", tool_calls=[{"id": "123456789", **more, "arguments": arguments}])]

    inner = [{"function": {"name": "f", "arguments": arguments}, "id": "123456789"} for arguments in ({"x": 1}, '{"x": 1}')]
    texts = {named(name).render([user("a"), reply("", tool_calls=[each])]) for each in inner}
    assert texts == {named(name).render(calls({"x": 1}, name="f"))}  # without the wrapping "function"
    assert '{"x": 1}' in texts.pop()


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("3", "3"),
        ("-0.5", "-0.5"),
        ("true", "true"),
        ("null", "null"),
        ('{"a": [1]}', '{"a": [1]}'),
        ("[1, 2]", "[1, 2]"),
        ("", '""'),
        ("03", '"03"'),
        ('a "b" \u2581', '"a \\"b\\" \u2581"'),
        ({"a": "é"}, '{"a": "é"}'),
        ([1, None], "[1, null]"),
        (2.5, "2.5"),
    ],
)
def test_mistral_v3_writes_results_as_json(content, written):
    calls = [user("a"), reply("", tool_calls=[{"function": {"name": "f", "arguments": {}}}])]
    text = named("mistral-v3").render([*calls, {"role": "tool", "content": content}])
    called = '[TOOL_CALLS] [{"name": "f", "arguments": {}}]<EOS>'
    assert text.endswith(called + '[TOOL_RESULTS] {"content": ' + written + "}[/TOOL_RESULTS]")


def test_alpaca_in_several_turns():
    last = user("Translate.\n\nBye", instruction="Translate.", input="Bye")
    text = named("alpaca").render([system("Be brief."), user("Hi"), reply("Hello"), last])
    first = "\n\n### Instruction:\nHi\n\n### Response:\nHello<EOS>"
    second = "\n\n### Instruction:\nTranslate.\n\n### Input:\nBye"
    assert text == f"<BOS>Be brief.{first}{second}"
    asked = named("alpaca").render([user("Hi")], add_generation_prompt=True)
    assert asked == named("alpaca").render([user("Hi")]) + "\n\n### Response:\n"
    assert named("alpaca").render([user("Hi", instruction="other", input="")]) == named("alpaca").render([user("Hi")])


def test_deepseek_opens_each_block_of_calls_and_results():
    text = named("deepseek").render(CHATS["calls after calls"][0])
    for part in ("calls", "call", "outputs", "output"):
        counts = {text.count(f"<｜tool▁{part}▁{end}｜>") for end in ("begin", "end")}
        assert counts == {3 if part.startswith("call") else 2}
    assert text.count("<｜Assistant｜>") == 2  # no header after results


def test_generation_blocks_in_loops_and_conditions():
    source = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    text, spans = render_with_generation_spans(source, {"messages": [user("é😀"), reply(""), user("x")]})
    assert text == "user:é😀;assistant:;user:x;" and spans == [(5, 7), (18, 18), (24, 25)]
    loop = "{% generation %}{% for i in [1, 2] %}b{% endfor %}{% endgeneration %}"
    source = "{% if true %}a" + loop + "{% endif %}{% block c %}d{% endblock %}"
    assert render_with_generation_spans(source, {}) == ("abbd", [(1, 3)])


def test_what_a_template_reads():
    assert read_variables(read_named("qwen3")) >= {"messages", "tools", "enable_thinking", "add_generation_prompt"}
    assert named("qwen3").reads("enable_thinking") and not named("chatml").reads("enable_thinking")
    assert named("chatml").control_tokens == ("<|im_start|>", "<|im_end|>")
    assert ChatTemplate("default", "").control_tokens == ()
    assert not ChatTemplate("default", "{% set tools = 1 %}").reads("tools")


def test_templates_beside_a_tokenizer_change_nothing_else(tmp_path):
    """Ids, hash and saved files stay; a copy with another separator has the templates too."""
    specials = ["<s>", "</s>", "<|im_end|>"]
    write_tokenizer(tmp_path / "json", byte_level(specials), specials, eos_token="</s>")
    (tmp_path / "ours").mkdir()
    train_tokenizer(TEXT * 20, 330).save(tmp_path / "ours")
    for folder, bos in ((tmp_path / "json", "<s>"), (tmp_path / "ours", "<s>")):
        before = load_tokenizer(folder)
        assert before.chat_templates == {}
        (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("b")
        after = load_tokenizer(folder)
        assert after.sha256 == before.sha256 and after.files == before.files
        assert after.chat_templates == {"default": "{{ bos_token }}{{ eos_token }}", "rag": "b"}
        assert open_template(after).render([user("a")]) == f"{bos}</s>" and open_template(after, "rag").name == "rag"
        assert open_template(after, "chatml").source == read_named("chatml")
        file = folder / ("tokenizer.json" if folder.name == "json" else "tokenizer.model")
        assert load_tokenizer(file).chat_templates == after.chat_templates
    other = load_tokenizer(tmp_path / "json").with_separator("<|im_end|>")
    assert other.chat_templates["rag"] == "b" and open_template(other).special_tokens["eos_token"] == "</s>"
    (tmp_path / "json" / "chat_template.jinja").unlink()
    (tmp_path / "json" / "additional_chat_templates" / "rag.jinja").unlink()
    (tmp_path / "json" / "chat_template.json").write_text('{"chat_template": "old"}')
    assert load_tokenizer(tmp_path / "json").chat_templates == {"default": "old"}
