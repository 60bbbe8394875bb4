"""Ids and masks of conversations beside transformers' apply_chat_template, TRL's tagged templates, and mistral-common.

The tokenizers are small, with the control tokens and flags of each family; mistral-common's are the published models.
"""

import json
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import transformers
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall

from data.chat.conversation import Conversation
from data.chat.encode import ChatEncoder, Tokens, encode_chat, encode_rendered, terminators
from data.chat.preview import decode_named
from data.chat.template import ChatTemplate, name_special_tokens, open_template
from data.config import DataError
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from data.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.chat_tokenizers import WRITERS
from tests.chats import CHATS, freeze_clock, reply, system, user
from tests.compare import count
from tests.oracle.data.test_chat_templates import MESSAGES, MODES, WHEEL, mistral_tokenizer

EXACT = "the same ids"
IMITATION = "markup"  # the conversation whose contents imitate control tokens
SIZES = {"small": range(3000), "large": range(3000, 1 << 20)}  # bytes; transformers takes 50 ms to compile a large template
SOME = ["small", pytest.param("large", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def frozen_clock(monkeypatch):
    freeze_clock(monkeypatch)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Kind of tests/chat_tokenizers.py -> its tokenizer as we read it and as transformers does."""

    @cache
    def both(kind: str) -> tuple[Tokenizer, Any]:
        folder = tmp_path_factory.mktemp("tokenizers") / kind
        WRITERS[kind](folder)
        return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)

    return both


def by_transformers(tokenizer: Any, source: str, messages: list, tools: list | None, **options: Any) -> Any:
    """The ids, or what the options ask for; None where the template refuses."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, chat_template=source, tokenize=True, **options)
    except Exception:
        return None


def ids_of(tokenizer: Tokenizer, template: ChatTemplate, messages: list, tools: list | None) -> list[int] | None:
    """Our ids of the whole conversation, or with the prompt for a reply where none ends it; None where refused."""
    try:
        if messages[-1]["role"] != "assistant":
            return encode_rendered(tokenizer, template, messages, tools=tools)
        return ChatEncoder(tokenizer, template, learn="all")(Conversation(tuple(messages), tools))[0].ids.tolist()
    except DataError:
        return None


def compare_ids(pair: tuple[Tokenizer, Any], template: ChatTemplate) -> tuple[int, list]:
    """The number of conversations that are equal; those that are not, but for what we refuse: tools without a place."""
    tokenizer, other = pair
    equal, wrong = 0, []
    for name, (messages, tools) in CHATS.items():
        prompt = messages[-1]["role"] != "assistant"
        found = by_transformers(other, template.source, messages, tools, add_generation_prompt=prompt)
        theirs, ours = found and found["input_ids"], ids_of(tokenizer, template, messages, tools)
        if name == IMITATION:
            is_right = theirs is None or differs_by_imitations(tokenizer, template, theirs, ours)
        elif ours is None and theirs is not None:  # transformers drops the tools, or the calls, in silence
            is_right = tools is not None and not ("tool_calls" in template.source and template.reads("tools"))
        else:
            equal += theirs is not None
            is_right = ours == theirs
        wrong += [] if is_right else [(template.name, name)]
    return equal, wrong


def differs_by_imitations(tokenizer: Tokenizer, template: ChatTemplate, theirs: list[int], ours: list[int]) -> bool:
    """True if both spell one text, ours with the control tokens of the template alone, theirs with more."""
    messages = [message | {"content": "x"} for message in CHATS[IMITATION][0]]
    names = {id: name for name, id in tokenizer.control_tokens.items()}
    written, mine, others = (
        [id for id in ids if id in names] for ids in (ids_of(tokenizer, template, messages, None), ours, theirs)
    )
    text, other = (decode_named(tokenizer, names, ids) for ids in (ours, theirs))
    return mine == written and len(others) > len(mine) and text.replace(" ", "") == other.replace(" ", "")


def writes_contents(source: str, other: Any) -> bool:
    """False for a template that wants contents as lists of parts, as those of some networks for images do."""
    messages = CHATS["two turns"][0]
    found = by_transformers(other, source, messages, None)
    return found is not None and all(message["content"] in other.decode(found["input_ids"]) for message in messages)


@pytest.mark.parametrize("size", SOME)
def test_every_template_of_the_wheel(size, tokenizers, parity):
    ours, other = tokenizers("byte-level")
    wrong, compared, of_parts = [], 0, []
    for file in sorted(WHEEL.glob("*.jinja")):
        source = file.read_text(encoding="utf-8")
        if file.stem.endswith("_training") or file.stat().st_size not in SIZES[size]:
            continue
        if not writes_contents(source, other):
            of_parts.append(file.stem)
            continue
        equal, differing = compare_ids((ours, other), ChatTemplate(file.stem, source, name_special_tokens(ours)))
        compared, wrong = compared + equal, wrong + differing
        assert equal >= 6, file.stem
    assert of_parts == (list(OF_PARTS) if size == "small" else [])
    part = f"conversations: ids by the wheel's templates, {compared} renderings"
    parity(part, "transformers apply_chat_template", count(wrong), 0, EXACT)


NAMED = {
    "byte-level": ("chatml", "llama-3", "gemma", "phi-3", "mistral-v3", "mistral-v7", "zephyr", "deepseek", "qwen3"),
    "phi-3": ("phi-3",),
    "gemma": ("gemma",),
    "llama-2": ("llama-2", "zephyr", "alpaca", "mistral-v1"),
    "mistral-v3": ("mistral-v3", "mistral-v7"),
    "ours": ("chatml", "qwen2.5", "qwen3", "zephyr", "llama-2", "alpaca"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_named_templates(kind, tokenizers, parity):
    wrong, compared = [], 0
    for name in NAMED[kind]:
        equal, differing = compare_ids(tokenizers(kind), open_template(tokenizers(kind)[0], name))
        compared, wrong = compared + equal, wrong + differing
        assert equal >= 8
    parity(f"conversations: ids, {kind}", "transformers apply_chat_template", count(wrong), 0, EXACT)


def test_one_bos(tokenizers, parity):
    """As many as the template writes: none, one, or in llama-2 one a pair. To encode its text adds a second (T#31796)."""
    messages, wrong = CHATS["two turns"][0], []
    for kind, names in NAMED.items():
        ours, other = tokenizers(kind)
        for name in names:
            template = open_template(ours, name)
            ids = ids_of(ours, template, messages, None)
            expected = 2 if name == "llama-2" else int("bos_token" in template.source)
            wrong += [(kind, name)] if ids.count(ours.control_tokens["<s>"]) != expected else []
            if kind == "byte-level" and expected:
                twice = other(template.render(messages))["input_ids"]
                assert twice.count(ours.control_tokens["<s>"]) == expected + 1
    parity("conversations: bos", "the templates", count(wrong), 0, EXACT)


def test_control_tokens_that_transformers_loses(tmp_path, parity):
    """With LLaMA's old flag `normalized` and a space before each text, transformers recognizes none within a text. Ours are the
    ids of a file without the flag. Nor does a role's token need an entry of its own."""
    WRITERS["llama-2"](tmp_path / "right")
    spec = json.loads((tmp_path / "right" / "tokenizer.json").read_text())
    changes = {"normalized": [token | {"normalized": True} for token in spec["added_tokens"]]}
    changes["no entry"] = [token for token in spec["added_tokens"] if token["content"] == "<pad>"]
    right = transformers.AutoTokenizer.from_pretrained(tmp_path / "right")
    messages, wrong = CHATS["two turns"][0], []
    for name, added in changes.items():
        folder = tmp_path / name
        WRITERS["llama-2"](folder)
        (folder / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": added}))
        ours, other = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for named in ("llama-2", "zephyr", "mistral-v1"):
            template = open_template(ours, named)
            expected = by_transformers(right, template.source, messages, None)["input_ids"]
            theirs = by_transformers(other, template.source, messages, None)["input_ids"]
            assert (theirs == expected) == (name == "no entry")
            wrong += [(name, named)] if ids_of(ours, template, messages, None) != expected else []
    parity("conversations: flags of control tokens", "transformers, a file without them", count(wrong), 0, EXACT)


def ask_mistral(version: str, messages: list, tools: list | None) -> list[int] | None:
    """The ids of mistral-common; None where it refuses."""
    made = []
    for message in messages:
        fields = {key: value for key, value in message.items() if key in ("content", "tool_call_id", "name")}
        if message.get("tool_calls"):
            functions = [(each["id"], each["function"]) for each in message["tool_calls"]]
            calls = {id: FunctionCall(name=each["name"], arguments=json.dumps(each["arguments"])) for id, each in functions}
            fields["tool_calls"] = [ToolCall(id=id, function=function) for id, function in calls.items()]
        made.append(MESSAGES[message["role"]](**fields))
    declared = [Tool.model_validate(tool) for tool in tools] if tools else None
    try:
        request = ChatCompletionRequest(messages=made, tools=declared)
        return mistral_tokenizer(version, MODES[made[-1].role]).encode_chat_completion(request).tokens
    except Exception:
        return None


@lru_cache
def mistral_model(version: str) -> SentencePieceTokenizer:
    (file,) = (Path(find_spec("mistral_common").origin).parent / "data").glob(f"*.model.{version}")
    return SentencePieceTokenizer(file.read_bytes())


ONLY_OURS = {"empty reply": "mistral-common refuses a reply without text"}
ONLY_MISTRALS = {
    "two questions": "mistral-common joins them by an empty line; ours, and Mistral's published Jinja, refuse",
    "reply first": "mistral-common puts an empty user turn before it (v7: nothing); ours refuses",
}


def test_ids_of_mistral_common(parity):
    wrong, equal, differences = [], {"v1": 0, "v3": 0, "v7": 0}, set()
    for version in equal:
        tokenizer = mistral_model(version)
        template = open_template(tokenizer, f"mistral-{version}")
        for name, (messages, tools) in CHATS.items():
            theirs, ours = ask_mistral(version, messages, tools), ids_of(tokenizer, template, messages, tools)
            if (theirs is None) != (ours is None):
                differences.add((name, ours is None))
            else:
                equal[version] += ours is not None
                wrong += [(version, name)] if ours != theirs else []
    assert equal == {"v1": 11, "v3": 14, "v7": 15}
    assert differences == {(name, False) for name in ONLY_OURS} | {(name, True) for name in ONLY_MISTRALS}
    parity("conversations: ids of mistral-v1, v3, v7", "mistral-common", count(wrong), 0, EXACT)


def test_llama_2_as_its_reference_code_encodes(parity):
    """Meta's generation.py: for each pair <s>, the model's ids of "[INST] … [/INST] … " with its space before them, </s>."""
    tokenizer = mistral_model("v1")  # a model with LLaMA's rules
    expected = []
    for text in ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello ", "[INST] Bye [/INST] 😀 "):
        expected += [tokenizer.bos_id, *tokenizer.processor.encode(text), tokenizer.eos_id]
    messages = [system("Be brief."), user("Hi"), reply("Hello"), user("Bye"), reply("😀")]
    found = encode_chat(tokenizer, messages, template="llama-2")
    wrong = found.ids.tolist() != expected[:-1] or found.labels[-1] != tokenizer.eos_id
    parity("conversations: ids of llama-2", "sentencepiece, as Meta's code calls it", count(int(wrong)), 0, EXACT)


# ---- masks

NEWLINE = "a newline after the terminator: the network has stopped, nothing asks it for one"
HEADER = "the prompt for a reply holds it: the network never writes it"
EMPTY = "an empty thought that the template adds to a reply without one"
DIFFERENCES = {  # (tokens, place): (right, families); +: TRL's twin learns them, -: ours does
    ("+\n", "after"): (
        NEWLINE,
        "diffusion_gemma gemma gemma3 lfm2 lfm2_v2 nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra "
        "phi3 phi3_5 qwen2_5 qwen2_5_vl qwen3 qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_8 qwen3_instruct_2507 qwen3_vl",
    ),
    ("+\n</s>", "after"): ("Phi-3's eos, which stands once, behind the last turn: the network has stopped", "phi3 phi3_5"),
    ("+\n", "before"): (HEADER, "qwen2_5"),
    ("+<｜Assistant｜>", "before"): (HEADER, "deepseekv3"),
    ("+<｜tool▁outputs▁end｜>", "before"): (HEADER, "deepseekv3"),
    ("+<｜Assistant｜><think>\n", "before"): (HEADER, "deepseek_r1_distill"),
    ("+<|start|>assistant", "before"): (HEADER, "gptoss muse_glimmer"),
    ("+<think>\n", "before"): (
        "the prompt opens the thought",
        "nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra qwen3_5_think qwen3_6 qwen3_8",
    ),
    ("+<think>\n\n</think>\n\n", "before"): (EMPTY, "qwen3 qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_8"),
    ("+<think></think>", "before"): (
        EMPTY,
        "nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra",
    ),
    ("+\n<think></think>\n", "before"): (EMPTY, "glm4moe"),
    ("-<|tool_response>", "after"): ("the token behind a call ends it: without it a network would not stop", "diffusion_gemma"),
    ("-<|turn>model\n", "before"): ("no prompt after a tool's result has it: the network must write it", "diffusion_gemma"),
    ("-\ufffd\ufffd\ufffd", "before"): (
        "transformers marks the first token alone of the last character of a block, here of four: ours",
        "diffusion_gemma",
    ),
}
WHOLE = {"deepseekv3": "deepseek"}  # twins whose own prompt opens a thought that no reply has: ours writes the reply's header
OTHER_TEXT = {("deepseekv3", "calls after calls")}  # see DIFFERENCES of test_chat_templates
OF_PARTS = ("idefics3", "llava_next", "smolvlm")
TWINS = [file for file in sorted(WHEEL.glob("*_training.jinja")) if not file.stem.startswith(OF_PARTS)]


def difference(tokenizer: Tokenizer, tokens: Tokens, ids: list[int], mask: list[int]) -> set[tuple[str, str]]:
    """The runs of tokens that one learns and the other does not: with a sign, and if learned ones follow or precede them."""
    mine = [*tokens.is_learned.tolist(), *[False] * (len(ids) - len(tokens.ids))]
    assert tokens.ids.tolist() == ids[: len(tokens.ids)]
    both = [(bool(one), other) for one, other in zip(mask, mine, strict=True)]
    names, found = {id: name for name, id in tokenizer.control_tokens.items()}, set()
    for pair, run in groupby(range(len(ids)), key=both.__getitem__):
        run = list(run)
        if pair[0] != pair[1]:
            follows = run[-1] + 1 < len(ids) and both[run[-1] + 1] == (True, True)
            text = decode_named(tokenizer, names, [ids[i] for i in run])
            found.add(("+-"[pair[1]] + text, "before" if follows else "after"))
    return found


def compare_masks(pair: tuple[Tokenizer, Any], file: Path) -> tuple[set, int]:
    """The differences over all conversations, and how many replies were compared."""
    tokenizer, other = pair
    source, family = file.read_text(encoding="utf-8"), file.stem.removesuffix("_training")
    special = name_special_tokens(tokenizer)
    template = ChatTemplate(family, source, special)
    if family in WHOLE:
        named = open_template(tokenizer, WHOLE[family])
        template = ChatTemplate(named.name, named.source, special | {"eos_token": "<｜end▁of▁sentence｜>"})
    encoder, found, compared = ChatEncoder(tokenizer, template), set(), 0
    for name, (messages, tools) in CHATS.items():
        tools = None if family in WHOLE else tools
        for end in [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]:
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            theirs = by_transformers(other, source, messages[:end], tools, **options)
            if theirs is None or name == IMITATION or (family, name) in OTHER_TEXT:
                continue
            try:
                *earlier, tokens = encoder(Conversation(tuple(messages[:end]), tools))
            except DataError:
                continue
            ids, mask = theirs["input_ids"], theirs["assistant_masks"]
            if earlier:  # an example a reply: they have been compared
                begin = int(tokens.is_learned.argmax())
                while mask[begin - 1]:
                    begin -= 1
                mask = [0] * begin + mask[begin:]
            found |= difference(tokenizer, tokens, ids, mask)
            compared += 1
    return found, compared


@pytest.mark.parametrize("size", SOME)
def test_masks_of_tagged_twins(size, tokenizers, parity):
    """Equal but for the table's differences, each of which occurs."""
    compared, some = 0, [file for file in TWINS if file.stat().st_size in SIZES[size]]
    families = {file.stem.removesuffix("_training") for file in some}
    expected = {(family, *key) for key, (_, names) in DIFFERENCES.items() for family in names.split()}
    found = set()
    for file in some:
        differences, replies = compare_masks(tokenizers("byte-level"), file)
        found |= {(file.stem.removesuffix("_training"), *key) for key in differences}
        compared += replies
        assert replies
    wrong = found ^ {key for key in expected if key[0] in families}
    part = f"conversations: masks of {compared} renderings, named differences aside"
    parity(part, "trl's tagged templates", count(wrong), 0, "the same tokens")


BY_KIND = {  # kind, family: its differences
    ("phi-3", "phi3"): {("+</s>", "after")},  # the newline belongs to <|end|>, which both learn
    ("gemma", "gemma"): {("+\n", "after")},
    ("ours", "qwen2_5"): {("+\n", "after"), ("+\n", "before")},
}


@pytest.mark.parametrize(("kind", "family"), BY_KIND)
def test_masks_of_other_tokenizers(kind, family, tokenizers, parity):
    """Tokens that take white space in, spaces that the tokenizer adds, bytes."""
    found, compared = compare_masks(tokenizers(kind), WHEEL / f"{family}_training.jinja")
    assert compared >= 10
    part = f"conversations: masks of {compared} renderings, named differences aside"
    parity(part, "trl's tagged templates", count(found ^ BY_KIND[kind, family]), 0, "the same tokens")


def test_what_ends_a_reply(tokenizers):
    """By the wheel's templates: several tokens, the next role's token, and another one after a call."""
    tokenizer, _ = tokenizers("byte-level")
    ends = {
        "cohere2": ["<|END_OF_TURN_TOKEN|>"],  # behind <|END_RESPONSE|>, which is learned too
        "gemma": ["<end_of_turn>"],
        "glm4moe": ["<|user|>", "<|observation|>"],
        "gptoss": ["<|return|>", "<|call|>"],
        "llama3_1": ["<|eot_id|>"],
        "phi3": ["<|end|>"],
        "qwen2_5": ["<|im_end|>"],
    }
    for name, expected in ends.items():
        template = ChatTemplate(name, (WHEEL / f"{name}.jinja").read_text(encoding="utf-8"), name_special_tokens(tokenizer))
        assert [tokenizer.token_name(id) for id in terminators(tokenizer, template)] == expected


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_a_prompt_that_no_reply_follows_is_refused(name, tokenizers):
    tokenizer, _ = tokenizers("byte-level")
    template = ChatTemplate(name, (WHEEL / f"{name}.jinja").read_text(encoding="utf-8"), name_special_tokens(tokenizer))
    with pytest.raises(DataError, match=r"message 2: .* asks for a reply by '<think>\\n', and has 'Hello.* there"):
        encode_chat(tokenizer, CHATS["two turns"][0], template=template)
