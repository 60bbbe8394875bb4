"""Chat templates beside transformers, the templates of TRL's wheel, mistral-common, and text typed from published cards."""

import json
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils import chat_template_utils

from data.chat.sandbox import render_source, render_with_generation_spans
from data.chat.template import ChatTemplate, TemplateError, name_special_tokens, open_template, prepare_message, read_named
from data.tokenizer.open import load_tokenizer
from tests.chats import CHATS, REASONING, SYSTEM, TOOL_USE, TOOLS, freeze_clock, reply, system, user
from tests.compare import count
from tests.folders import byte_level, write_tokenizer

WHEEL = Path(find_spec("trl").origin).parent / "chat_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
ADDED_TOKEN = {"__type": "AddedToken", "content": "</s>", "special": True}
EXACT = "the same characters"


@pytest.fixture(autouse=True)
def frozen_clock(monkeypatch):
    freeze_clock(monkeypatch)


def theirs(source: str, messages: list, tools=None, prompt=False, spans=False, **variables):
    """The text of transformers, and spans; None where it raises."""
    try:
        texts, found = chat_template_utils.render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **TOKENS | variables,
        )
        return (texts[0], found[0]) if spans else texts[0]
    except Exception:
        return None


def ours(name: str, messages: list, tools=None, prompt=False, **variables):
    try:
        return ChatTemplate(name, read_named(name), TOKENS).render(
            messages, tools=tools, add_generation_prompt=prompt, variables=variables
        )
    except TemplateError:
        return None


def aliased(messages: list) -> list:
    """The names under which transformers passes reasoning."""
    return [prepare_message(message) for message in messages]


SMALL = 6000  # bytes: larger templates take 50 ms each to compile, in either library


@pytest.mark.parametrize("is_small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "large"])
def test_every_template_of_the_wheel_renders_as_in_transformers(is_small, parity):
    wrong, rendered, refused, blocks = [], 0, 0, 0
    for file in sorted(WHEEL.glob("*.jinja")):
        if (file.stat().st_size < SMALL) != is_small:
            continue
        source = file.read_text(encoding="utf-8")
        has_tag = re.search(r"{%-?\s*generation\s*-?%}", source) is not None
        for name, (messages, tools) in CHATS.items():
            for prompt in (False, True):
                given = {"messages": aliased(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt}
                expected = theirs(source, messages, tools, prompt, spans=has_tag)
                try:
                    render = render_with_generation_spans if has_tag else render_source
                    found = render(source, given | TOKENS)
                except TemplateError:
                    found = None
                rendered, refused = rendered + (expected is not None), refused + (expected is None)
                blocks += len(expected[1]) if has_tag and expected else 0
                wrong += [(file.name, name, prompt)] if found != expected else []
    assert min(rendered, refused, blocks) > (100 if is_small else 10), "each kind of result occurs"
    parity(f"chat templates: {rendered + refused} renderings of the wheel", "transformers", count(wrong), 0, EXACT)


def test_apply_chat_template_gives_the_text_of_render(tmp_path, parity):
    """Through both libraries' own doors: null keys, special tokens of the folder, the names of reasoning, tools."""
    write_tokenizer(tmp_path / "made", byte_level(["<s>", "</s>"]), ["<s>", "</s>"])
    file = tmp_path / "made" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"bos_token": "<s>", "eos_token": ADDED_TOKEN}
    file.write_text(json.dumps(settings))
    wrong, some = [], [*SYSTEM, *TOOL_USE, *REASONING]
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "made")
    for twin in ("qwen3", "llama3_1", "llama3_2", "gemma3"):
        (tmp_path / "made" / "chat_template.jinja").write_bytes((WHEEL / f"{twin}.jinja").read_bytes())
        template = open_template(load_tokenizer(tmp_path / "made"))
        other.chat_template = template.source
        for name in some:
            messages, tools = CHATS[name]
            messages = [{"name": None, **message} for message in messages]
            for prompt in (False, True):
                given = {"tools": tools, "add_generation_prompt": prompt}
                try:
                    expected = other.apply_chat_template(messages, tokenize=False, **given)
                except Exception:
                    expected = None
                try:
                    found = template.render(messages, **given)
                except TemplateError as error:
                    found = "our own error" if "no form for" in str(error) else None
                if found == "our own error":  # transformers renders, without the tools
                    assert twin == "gemma3" and name in TOOL_USE
                elif found != expected:
                    wrong.append((twin, name, prompt))
    parity("chat templates: a folder's, by apply_chat_template", "transformers", count(wrong), 0, EXACT)


IDIOMS = [  # what published templates do, each by itself; x is in every conversation's variables
    "{%- for m in messages %}{%- if loop.first %}{%- continue %}{%- endif %}{{ loop.index }}{%- break %}{%- endfor %}",
    "  {% if true %}\n    a\n  {% endif %}\nb\n\n",
    "{{ x | tojson }}{{ x | tojson(indent=2) }}{{ x | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "{{ x.a is mapping }}{{ x.b is iterable }}{{ x.c is string }}{{ x.d is none }}{{ x.e is defined }}{{ x.e }}",
    "{{ messages[::-1][0].content }}{{ messages[1:] | length }}{{ x.c.split('>')[-1].strip('.') }}{{ x.c.startswith('<') }}",
    "{% for key, value in x.items() %}{{ key }}={{ value }};{% endfor %}{{ x.b | join('+') }}{{ x | items | list }}",
    "{% set n = namespace(a=1, self=2) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}{{ n.self }}",
    "{{ dict(a=1, **x.a) }}{{ dict.fromkeys([1, 2], 3) }}{{ x.b + (4,) }}{{ [5] + [4] }}",
    "{{ 2 ** 5 }}{{ 2 ** -1 }}{{ 'a' * 3 }}{{ 3 * [1] }}{{ 'a' ~ 1 ~ x.d }}{{ 'a' + 'b' }}{{ 1.5 * 2 }}{{ 'a' * -1 }}",
    "{{ strftime_now('%d %b %Y, %A') }}{{ strftime_now is defined }}{{ raise_exception is defined }}",
    "{% macro m(a, b='c') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}{% call m(2) %}{% endcall %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | first | trim | upper }}",
    "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ messages | map(attribute='nothing') | list | length }}",
    "{{ bos_token if bos_token is defined }}{{ none }}{{ x.g }}{{ messages[0].nothing }}{{ (1, 2) }}{{ x }}{{ x.f is number }}",
    "{% set a = cycler('u', 'v') %}{% set b = joiner('|') %}{% for m in messages %}{{ b() }}{{ a.next() }}{% endfor %}",
    "{% generation %}{% set y = 1 %}a{% endgeneration %}{{ y is defined }}{%- generation -%} b {%- endgeneration -%} c",
    "{{ raise_exception('no') }}",
    "{{ x.b.append(1) }}",
    "{{ messages[9].content }}",
]
VALUES = {"a": {"k": "é <b> & 'q'"}, "b": (1, 2.5, True), "c": "<think>.a.", "d": None, "f": 3, "g": [{"h": "\u2028"}]}


@pytest.mark.parametrize("source", IDIOMS)
def test_idioms_of_templates(source, parity):
    wrong = []
    for name in ("two turns", "emoji", "spaces"):
        messages = CHATS[name][0]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, "x": VALUES}
        try:
            got = render_source(source, given | TOKENS)
        except TemplateError:
            got = None
        expected = theirs(source, messages, None, True, x=VALUES)
        wrong += [name] if got != expected else []
        assert (expected is None) == (source in IDIOMS[-3:])
    parity("chat templates: idioms of Jinja", "transformers", count(wrong), 0, EXACT)


BESIDE = {  # files beside a tokenizer
    "none": {},
    "file": {"chat_template.jinja": "a\r\nb"},
    "text": {"tokenizer_config.json": {"chat_template": "c"}},
    "list": {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n * 2} for n in ("default", "rag")]}},
    "file and text": {"chat_template.jinja": "a", "tokenizer_config.json": {"chat_template": "c"}},
    "further": {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "f", "tokenizer_config.json": {}},
    "further alone": {"additional_chat_templates/rag.jinja": "f", "tokenizer_config.json": {"chat_template": "c"}},
    "null": {"tokenizer_config.json": {"chat_template": None, "bos_token": None, "eos_token": "</s>"}},
    "tokens": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": ADDED_TOKEN, "pad_token": "</s>"}},
    "model's": {"tokenizer_config.json": {"bos_token": "<s>", "image_token": "<s>", "add_bos_token": True}},
    "model's, in a table": {"tokenizer_config.json": {"extra_special_tokens": {"boi_token": "<s>"}}},
    "map": {"tokenizer_config.json": {"added_tokens_decoder": ...}, "special_tokens_map.json": {"bos_token": "<s>"}},
}


def test_templates_and_special_tokens_of_a_folder(tmp_path, parity):
    wrong = []
    for number, (name, files) in enumerate(BESIDE.items()):
        folder = tmp_path / str(number)
        write_tokenizer(folder, byte_level(["<s>", "</s>"], vocab_size=270), ["<s>", "</s>"])
        for file, content in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            if file == "tokenizer_config.json":
                content = json.loads((folder / file).read_text()) | content
                content = {key: value for key, value in content.items() if value is not ...}
            (folder / file).write_bytes(content.encode() if isinstance(content, str) else json.dumps(content).encode())
        other, tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
        expected = other.chat_template or {}
        expected = {"default": expected} if isinstance(expected, str) else expected
        tokens = name_special_tokens(tokenizer)
        roles = {"bos_token": "<s>", "eos_token": "</s>"} if name != "null" else {}  # of tokens that the files are silent on
        wrong += [name] if (tokenizer.chat_templates, tokens) != (expected, roles | other.special_tokens_map) else []
    parity("chat templates: files and special tokens of a folder", "transformers", count(wrong), 0, "the same")


TWINS = {"qwen2.5": "qwen2_5", "qwen3": "qwen3", "llama-3": "llama3", "gemma": "gemma", "phi-3": "phi3"}
TWINS |= {"deepseek": "deepseekv3", "chatml": "qwen2_5"}
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."  # which chatml does not add
ROLES_MISSING = "the twin drops tool results in silence, and writes calls as empty replies; ours refuses"
DIFFERENCES = {  # (template, conversation): who is right; every other conversation is equal, or both refuse it
    **{("llama-3", name): "the twin knows no tools; ours writes Llama 3.1's (compared below)" for name in TOOL_USE},
    **{("phi-3", name): ROLES_MISSING for name in TOOL_USE},
    ("deepseek", "calls after calls"): "the twin opens only the first block of calls and of results; ours each",
}


def test_named_templates_render_as_their_twins(parity):
    wrong, found_differences, rendered = [], set(), 0
    for name, twin in TWINS.items():
        source = (WHEEL / f"{twin}.jinja").read_text(encoding="utf-8")
        eos = {"eos_token": "<｜end▁of▁sentence｜>"} if name == "deepseek" else {}
        for chat, (messages, tools) in CHATS.items():
            declared = None if name == "deepseek" else tools  # it has no form for them, and its twin none in silence
            for prompt in (False, True):
                given = arguments_as_text(messages) if name == "deepseek" else messages
                expected = theirs(source, given, declared, prompt, **eos)
                if name == "deepseek" and expected:  # R1's prompt; V3's is the header alone, as its replies have it
                    expected = expected.removesuffix("<think>\n")
                if name == "chatml" and expected and messages[0]["role"] != "system":
                    expected = expected.replace(f"<|im_start|>system\n{QWEN}<|im_end|>\n", "").replace(f"{QWEN}\n\n", "")
                got = ours(name, messages, declared, prompt, **eos)
                rendered += got is not None
                if got != expected:
                    found_differences.add((name, chat))
                    wrong += [] if (name, chat) in DIFFERENCES else [(name, chat, prompt)]
    assert rendered > 100 and found_differences == set(DIFFERENCES)
    parity("chat templates: our own", "trl's wheel", count(wrong), 0, EXACT)


def arguments_as_text(messages: list) -> list:
    """DeepSeek's published template wants JSON text where the others want an object: it fails on an object."""
    made = json.loads(json.dumps(messages))
    for each in made:
        for made_call in each.get("tool_calls", []):
            made_call["function"]["arguments"] = json.dumps(made_call["function"]["arguments"], ensure_ascii=False)
    return made


def test_llama_3_with_tools_renders_as_llama_3_1(parity):
    wrong, equal, source = [], 0, (WHEEL / "llama3_1.jinja").read_text(encoding="utf-8")
    for name, (messages, _) in CHATS.items():
        for prompt in (False, True):
            expected, got = theirs(source, messages, TOOLS, prompt), ours("llama-3", messages, TOOLS, prompt)
            if name == "text and call":  # the text is dropped there in silence; ours refuses
                assert expected and "I ask." not in expected and got is None
            elif name == "reply first":  # the tools are declared in the reply there; ours refuses
                assert expected and got is None
            else:
                equal += got is not None
                wrong += [(name, prompt)] if got != expected else []
    assert equal > 20
    parity("chat templates: llama-3 with tools", "trl's wheel (llama3_1)", count(wrong), 0, EXACT)


def test_a_block_without_thoughts_where_thinking_is_off(parity):
    source, chat = (WHEEL / "qwen3.jinja").read_text(encoding="utf-8"), CHATS["question"][0]
    pairs = [
        (theirs(source, chat, prompt=True, enable_thinking=value), ours("qwen3", chat, None, True, enable_thinking=value))
        for value in (True, False)
    ]
    assert pairs[0][1] != pairs[1][1] and pairs[1][1].endswith("<think>\n\n</think>\n\n")
    parity("chat templates: enable_thinking", "trl's wheel", count([a for a, b in pairs if a != b]), 0, EXACT)


MESSAGES = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage, "tool": ToolMessage}


def by_mistral(version: str, messages: list, tools: list | None) -> str | None:
    """The text of mistral-common's encoder, U+2581 as the space that it stands for there; None where it refuses."""
    made = []
    for message in messages:
        fields = {key: value for key, value in message.items() if key in ("content", "tool_call_id", "name")}
        if message.get("tool_calls"):
            functions = [(each["id"], each["function"]) for each in message["tool_calls"]]
            fields["tool_calls"] = [
                ToolCall(id=id, function=FunctionCall(name=each["name"], arguments=json.dumps(each["arguments"])))
                for id, each in functions
            ]
        made.append(MESSAGES[message["role"]](**fields))
    declared = [Tool.model_validate(tool) for tool in tools] if tools else None
    tokenizer = mistral_tokenizer(version, MODES[made[-1].role])
    try:
        text = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=made, tools=declared)).text
    except Exception:
        return None
    return re.sub("(<0x[0-9A-F]{2}>)+", decode_bytes, text).replace("\u2581", " ")


def decode_bytes(found: re.Match) -> str:
    return bytes.fromhex(found[0].replace("<0x", "").replace(">", "")).decode()


@lru_cache
def mistral_tokenizer(version: str, mode: ValidationMode) -> MistralTokenizer:
    (file,) = (Path(find_spec("mistral_common").origin).parent / "data").glob(f"*.model.{version}")
    return MistralTokenizer.from_file(file, mode=mode)


MODES = {"user": ValidationMode.test, "tool": ValidationMode.test, "assistant": ValidationMode.finetuning}
MISTRAL_DIFFERENCES = {  # conversation: who is right
    "two questions": "mistral-common joins them by an empty line; ours, and Mistral's published Jinja, refuse",
    "reply first": "mistral-common puts an empty user turn before it (v7: nothing); ours refuses",
}


def test_mistral_templates_write_the_text_of_mistral_common(parity):
    wrong, equal, found_differences = [], {"v1": 0, "v3": 0, "v7": 0}, set()
    for version in equal:
        for name, (messages, tools) in CHATS.items():
            expected, got = by_mistral(version, messages, tools), ours(f"mistral-{version}", messages, tools)
            if name == "empty reply":  # mistral-common refuses a reply without text; the record asks for eos alone
                assert expected is None and got.endswith("[/INST]</s>")
                continue
            equal[version] += got is not None
            if got != expected and (got is None or expected is None or got.replace("\u2581", " ") != expected):
                found_differences.add(name)
                assert got is None and expected is not None
                wrong += [] if name in MISTRAL_DIFFERENCES else [(version, name)]
    assert min(equal.values()) >= 10 and equal["v7"] >= 14 and found_differences == set(MISTRAL_DIFFERENCES)
    parity("chat templates: mistral-v1, v3, v7", "mistral-common", count(wrong), 0, EXACT)


CHAT = [user("Hi"), reply("Hello"), user("Bye"), reply("Ciao")]
PIRATE = "You are a friendly chatbot who always responds in the style of a pirate"
HELICOPTERS = "How many helicopters can a human eat in one sitting?"
TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
CARDS = {  # typed from the published cards: (template, conversation, add_generation_prompt): text
    "chatml": (  # github.com/openai/openai-python, chatml.md of 2023
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        [system("Be brief."), *CHAT[:3]],
        True,
    ),
    "llama-2": (  # huggingface.co/blog/llama2, "How to Prompt Llama 2"
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
        [system("Be brief."), *CHAT[:3]],
        True,
    ),
    "zephyr": (  # huggingface.co/HuggingFaceH4/zephyr-7b-beta
        f"<|system|>\n{PIRATE}</s>\n<|user|>\n{HELICOPTERS}</s>\n<|assistant|>\n",
        [system(PIRATE), user(HELICOPTERS)],
        True,
    ),
    "alpaca": (  # github.com/tatsu-lab/stanford_alpaca, with the bos that its tokenizer adds and the eos that train.py adds
        f"<s>{TASK.format('')}\n\n### Instruction:\nGive three tips.\n\n### Response:\n1. Eat.</s>",
        [user("Give three tips."), reply("1. Eat.")],
        False,
    ),
    "alpaca with input": (
        f"<s>{TASK.format(', paired with an input that provides further context')}\n\n### Instruction:\nTranslate.\n\n"
        "### Input:\nHello\n\n### Response:\n",
        [user("Translate.\n\nHello", instruction="Translate.", input="Hello")],
        True,
    ),
}


@pytest.mark.parametrize("card", CARDS)
def test_the_published_cards(card, parity):
    text, messages, prompt = CARDS[card]
    got = ours(card.partition(" ")[0], messages, None, prompt)
    parity(f"chat templates: {card}", "its published card", count(int(got != text)), 0, EXACT)
