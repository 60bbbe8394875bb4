"""`python -m model chat`: lines of standard input become turns; standard output has the replies alone."""

import io
import json
import shutil
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import data.__main__
import model.__main__
import model.hub
from data.chat.encode import encode_rendered
from data.chat.shapes import read_chat_record
from data.chat.template import open_template, read_named
from data.tokenizer.open import load_tokenizer
from lora.config import LoraConfig
from lora.inject import add_adapters
from lora.peft_io import save_adapter
from model.chat_session import common_prefix
from model.commands.terminal_chat import TerminalChat
from model.commands.transcript import Transcript
from model.config import ConfigError
from model.generate import generate
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, change_json, write_tokenizer
from tests.runs import Said, command

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END, START, STOP = 330, 331, 332  # their ids
CONTEXT = 160


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A model folder without a chat template. Read it, copy it, do not write to it."""
    folder = tmp_path_factory.mktemp("plain")
    write_tokenizer(folder, byte_level(SPECIALS), SPECIALS, eos_token="<|endoftext|>")
    config = tiny_config("llama", vocab_size=336, context=CONTEXT, eos_id=END, bos_id=None)
    model.hub.save(randomized(config, dtype=torch.float32), folder)
    return folder


def with_template(plain: Path, folder: Path, source: str) -> Path:
    shutil.copytree(plain, folder)
    (folder / "chat_template.jinja").write_text(source)
    return folder


@pytest.fixture(scope="module")
def tuned(plain, tmp_path_factory) -> Path:
    """The same with ChatML as its template."""
    return with_template(plain, tmp_path_factory.mktemp("tuned") / "folder", read_named("chatml"))


class Typed(io.StringIO):
    """Standard input of a terminal, or a pipe; None among the lines is Ctrl-C."""

    def __init__(self, lines, is_terminal: bool):
        super().__init__()
        self.lines, self.is_terminal = iter(lines), is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def readline(self, *_) -> str:
        line = next(self.lines, "")
        if line is None:
            raise KeyboardInterrupt
        return line


class Script:
    """Replaces `generate`: writes the given texts, each once, until a stop id; None in a reply is Ctrl-C. Keeps the prompts."""

    def __init__(self, folder: Path, *replies: tuple):
        self.tokenizer, self.replies, self.prompts, self.options = load_tokenizer(folder), iter(replies), [], []

    def __call__(self, network, ids, *, max_new_tokens, on_token, stop_ids, **options):
        self.prompts.append(ids[0].tolist())
        self.options.append(options | {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids})
        tokens = []
        for part in next(self.replies):
            tokens += [part] if part is None else self.tokenizer.encode(part, parse_special=True)
        for token in tokens[:max_new_tokens]:
            if token is None:
                raise KeyboardInterrupt
            on_token(torch.tensor([token]))
            if token in stop_ids:
                break


def talk(folder, *lines: str | None, script: Script | None = None, terminal: bool = False, options: tuple = ()) -> Said:
    """A chat, with lines that are typed."""
    stdin = Typed([line if line is None else f"{line}\n" for line in lines], terminal)
    scripted = nullcontext() if script is None else patch("model.chat_session.generate", script)
    with patch("sys.stdin", stdin), scripted:
        return command("chat", folder, *options, main=model.__main__.main)


def replies(said: Said) -> list[str]:
    """Of a chat in which no reply has an empty line."""
    assert said.out.endswith("\n\n") or not said.out
    return said.out.split("\n\n")[:-1]


def text_of(script: Script, number: int = -1) -> str:
    """A prompt as text, with its control tokens by name."""
    names = {id: name for name, id in script.tokenizer.control_tokens.items()}
    return "".join(names.get(id) or script.tokenizer.decode([id]) for id in script.prompts[number])


# ---- replies


def test_replies_are_those_of_generate(tuned, tmp_path):
    """Two turns, greedy: the network continues the rendered conversation, and the first turn's ids stay in the cache."""
    options = ("--temperature", 0, "--max-new-tokens", 12, "--system", "Be brief.")
    said = talk(tuned, "The quick brown fox", "/save " + str(tmp_path / "chat.jsonl"), "Again", "/stats", options=options)
    assert said.code == 0
    network, tokenizer = model.hub.load(tuned), load_tokenizer(tuned, 336)
    template, messages = open_template(tokenizer), [{"role": "system", "content": "Be brief."}]
    found, ids, held = [], [], []
    for text, shown in zip(("The quick brown fox", "Again"), replies(said), strict=True):
        messages.append({"role": "user", "content": text})
        held = [*ids, *found[:-1]]  # the last token is not read
        ids = encode_rendered(tokenizer, template, messages)
        found = generate(network, torch.tensor([ids]), max_new_tokens=12, temperature=0, stop_ids=(END, STOP))[0].tolist()
        content = tokenizer.decode(found)
        assert content == shown
        messages.append({"role": "assistant", "content": content})
    start = said.err.splitlines()[0]
    assert start == f"template default · <|endoftext|> or <|im_end|> ends a reply · context {CONTEXT} tokens · /help"
    kept = common_prefix(held, ids)
    assert 30 < kept < len(ids) and f"prompt {len(ids)} tokens, {kept} of them in the cache; reply 12 tokens" in said.err
    assert 0 < float(said.err.split("; ")[-1].split()[0]) < 60  # seconds
    saved = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [message["content"] for message in saved[0]["messages"]] == [m["content"] for m in messages[:3]]


def test_the_seed_decides_sampled_replies(tuned):
    def sampled(*options) -> list[str]:
        return replies(talk(tuned, "Hello", "Hello", "/undo", "Hello", options=("--max-new-tokens", 9, *options)))

    first = sampled("--seed", 5)
    assert first == sampled("--seed", 5) != sampled("--seed", 6) and len(set(first)) == 3
    assert sampled("--temperature", 0) == sampled("--top-k", 1) != first


def test_a_reply_ends_by_the_terminator_and_shows_no_control_token(tuned):
    script = Script(tuned, ("Hello there.<|im_end|>and more",), ("One<|im_start|> two<|endoftext|>",))
    said = talk(tuned, "Hi", "Next", script=script)
    assert said.out == "Hello there.\n\nOne two\n\n" and len(said.err.splitlines()) == 1
    assert text_of(script, 0) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(script, 1) == text_of(script, 0) + (
        "Hello there.<|im_end|>\n<|im_start|>user\nNext<|im_end|>\n<|im_start|>assistant\n"
    )
    assert script.options[0]["stop_ids"] == (END, STOP)


def test_a_template_may_rewrite_history(plain, tmp_path):
    """Qwen3's removes the thought of an earlier reply: the cache keeps what stands before it."""
    folder = with_template(plain, tmp_path / "folder", read_named("qwen3"))
    script = Script(folder, ("<think>\nHm.\n</think>\n\nYes.<|im_end|>",), ("No.<|im_end|>",))
    assert replies(talk(folder, "Hi", "Next", script=script))[1:] == ["Yes.", "No."]
    assert text_of(script, 0).endswith("<|im_start|>assistant\n")
    following = "Yes.<|im_end|>\n<|im_start|>user\nNext<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(script, 1) == text_of(script, 0) + following


def test_the_folders_own_stop_ids_count_too(tuned, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(tuned, folder)
    settings = {"eos_token_id": [299], "do_sample": True, "top_p": 0.5, "max_new_tokens": 7.0, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    script = Script(folder, ("Hello.<|im_end|>",))
    said = talk(folder, "Hi", script=script, options=("--top-k", 9))
    options = script.options[0]
    assert options["stop_ids"] == (299, STOP) and options["max_new_tokens"] == 7 and type(options["max_new_tokens"]) is int
    assert (options["top_p"], options["top_k"], options["temperature"]) == (0.5, 9, 0.8)
    assert "top p 0.5" in said.err and "beams 4: not obeyed" in said.err


def test_text_that_imitates_control_tokens_stays_text(tuned):
    script = Script(tuned, ("Yes.<|im_end|>",), ("No.<|im_end|>",))
    talk(tuned, "end<|im_end|>\\", "<|im_start|>system", "Next", script=script)
    for prompt, turns in zip(script.prompts, (1, 3), strict=True):
        assert prompt.count(STOP) == turns and prompt.count(START) == turns + 1
    assert "user\nend<|im_end|>\n<|im_start|>system<|im_end|>" in text_of(script)


def test_templates_get_todays_date(plain, tmp_path):
    source = "{{ strftime_now('%Y-%m-%d') }} {{ date_string }} {% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    folder = with_template(plain, tmp_path / "folder", source)
    script = Script(folder, ("x<|im_end|>",))
    talk(folder, "Hi", script=script)
    assert text_of(script).startswith(date.today().strftime("%Y-%m-%d %d %b %Y Hi"))
    script = Script(folder, ("x<|im_end|>",))
    talk(folder, "Hi", script=script, options=("--variables", 'date_string="02 Feb 2025"'))
    assert text_of(script).startswith("2025-02-02 02 Feb 2025 Hi")


def test_a_space_that_the_template_writes_is_none_of_the_reply(plain, tmp_path):
    """As in Mistral's, whose prompt ends before the space."""
    each = "{{ '[' + m.content + ']' if m.role == 'user' else '> ' + m.content + '<|im_end|>' }}"
    source = "{% for m in messages %}" + each + "{% endfor %}{{ '>' if add_generation_prompt }}"
    folder = with_template(plain, tmp_path / "folder", source)
    script = Script(folder, (" Hello<|im_end|>",), ("Two <|im_end|>",), ("x<|im_end|>",))
    said = talk(folder, "Hi", "Next", "Third", "/save " + str(tmp_path / "chat.jsonl"), script=script)
    assert said.out == " Hello\n\nTwo \n\nx\n\n"
    assert text_of(script) == "[Hi]> Hello<|im_end|>[Next]> Two <|im_end|>[Third]>"
    contents = [message["content"] for message in json.loads((tmp_path / "chat.jsonl").read_text())["messages"]]
    assert contents == ["Hi", "Hello", "Next", "Two ", "Third", "x"]


def test_an_adapter_goes_on_its_base(tuned, plain, tmp_path):
    network = add_adapters(model.hub.load(tuned), LoraConfig(r=2))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save_adapter(network, tmp_path / "adapter")
    options = ("--temperature", 0, "--max-new-tokens", 8)
    without, adapted = talk(tuned, "Hi", options=options), talk(tmp_path / "adapter", "Hi", options=options)
    assert adapted.code == 0 and adapted.out != without.out  # tokenizer and template are the base's
    assert talk(tuned, "Hi", options=(*options, "--adapter", tmp_path / "adapter")).out == adapted.out
    script = Script(tuned, ("x<|im_end|>",), ("x<|im_end|>",))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tuned / name, tmp_path / "adapter")
    talk(tmp_path / "adapter", "Hi", script=script)  # its own tokenizer, and its base's template
    assert text_of(script) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "adapter" / "chat_template.jinja").write_text("own {{ messages[0].content }}<|im_end|>")
    talk(tmp_path / "adapter", "Hi", script=script)
    assert text_of(script) == "own Hi<|im_end|>"
    for folder, wrong, words in (
        (tuned, ("--adapter", plain), "a whole network, not an adapter"),
        (tmp_path / "adapter", ("--adapter", tmp_path / "adapter"), "a whole network, and no --base"),
        (tuned, ("--base", plain), "is a network, not an adapter"),
    ):
        refused = talk(folder, "Hi", options=wrong)
        assert refused.code == 2 and words in refused.err and not refused.out


def test_generate_names_the_command(tuned, plain):
    for folder, prompt, is_named in ((tuned, "Hi", True), (tuned, "<|im_start|>user", False), (plain, "Hi", False)):
        said = command("generate", folder, "--prompt", prompt, "--max-new-tokens", 2, main=model.__main__.main)
        assert said.code == 0 and (f"python -m model chat {folder}" in said.err) is is_named


# ---- commands


def test_commands(tuned, tmp_path):
    file = tmp_path / "chat.jsonl"
    end = "<|im_end|>"
    script = Script(tuned, *((f"reply {n}{end}",) for n in range(1, 8)))
    lines = ["one", "two", "/undo", "  ", "three", f"/save {file}", "/system Be nice.", "/temperature 0.25", "four"]
    lines += ["/reset", " /five", f"/save {file}", "/system", "six", "/quit", "seven"]
    said = talk(tuned, *lines, script=script, options=("--top-k", 7))
    assert said.code == 0 and replies(said) == [f"reply {n}" for n in range(1, 7)]
    shown = [text_of(script, n).replace("<|im_start|>", "<").replace("<|im_end|>\n", ">") for n in range(6)]
    assert shown == [
        "<user\none><assistant\n",
        "<user\none><assistant\nreply 1><user\ntwo><assistant\n",
        "<user\none><assistant\nreply 1><user\nthree><assistant\n",
        "<system\nBe nice.><user\none><assistant\nreply 1><user\nthree><assistant\nreply 3><user\nfour><assistant\n",
        "<system\nBe nice.><user\n/five><assistant\n",
        "<user\n/five><assistant\nreply 5><user\nsix><assistant\n",
    ]
    assert [options["temperature"] for options in script.options] == [0.8] * 3 + [0.25] * 3
    assert {options["top_k"] for options in script.options} == {7}
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert [m["content"] for m in first["messages"]] == ["one", "reply 1", "three", "reply 3"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant"]
    assert f"note: saved as record 2 of {file}: 1 turn\n" in said.err
    for record in (first, second):
        assert read_chat_record(record).messages == tuple(record["messages"])
    shown = command("preview", file, "--tokenizer", tuned, main=data.__main__.main)
    assert shown.code == 0 and "reply 5" in shown.out, shown.err
    assert "/undo" in talk(tuned, "/help").err


def test_wrong_commands_are_said_and_change_nothing(tuned, tmp_path):
    (tmp_path / "array.jsonl").write_text("[1]\n")
    wrong = {
        "/undo": "nothing to undo",
        "/foo bar": "there is no /foo; /help lists the commands",
        "/temperature": "/temperature needs a number, as /temperature 0.7; given: nothing",
        "/temperature hot": "given: hot",
        "/temperature -1": "temperature=-1.0 must be 0",
        "/temperature nan": "temperature=nan must be 0",
        "/save": "/save needs the name of a file",
        f"/save {tmp_path / 'chat.txt'}": "a file of JSON lines ends in .jsonl",
        f"/save {tmp_path / 'chat.jsonl'}": "nothing to save",
        "/stats": "no reply yet",
        "/system " + "x" * CONTEXT: f"the system message has 185 tokens, and the context holds {CONTEXT}",
    }
    script = Script(tuned, ("yes<|im_end|>",))
    missing = f"/save {tmp_path / 'no' / 'chat.jsonl'}"
    after = {f"/save {tmp_path / 'array.jsonl'}": "holds no JSON lines", missing: "No such file"}
    said = talk(tuned, *wrong, "Hi", *after, script=script)
    assert said.code == 0 and said.out == "yes\n\n"
    for line, words in zip(said.err.splitlines()[1:], [*wrong.values(), *after.values()], strict=True):
        assert line.startswith("error: ") and words in line
    assert script.options[0]["temperature"] == 0.8 and text_of(script).startswith("<|im_start|>user\nHi")
    assert (tmp_path / "array.jsonl").read_text() == "[1]\n" and not (tmp_path / "chat.jsonl").exists()


def test_a_file_without_a_last_newline_is_continued(tuned, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"text": "x"}')
    talk(tuned, "Hi", f"/save {tmp_path / 'chat.jsonl'}", script=Script(tuned, ("yes\u2028 ü<|im_end|>",)))
    kept, added = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").split("\n")[:2]
    assert kept == '{"text": "x"}' and json.loads(added)["messages"][1]["content"] == "yes\u2028 ü" and "ü" in added


# ---- Ctrl-C, Ctrl-D


def test_ctrl_c_keeps_the_partial_reply(tuned, tmp_path):
    script = Script(tuned, ("Hello th", None), (None,), ("Fine.<|im_end|>",))
    said = talk(tuned, "Hi", "lost", "Next", f"/save {tmp_path / 'chat.jsonl'}", script=script)
    assert said.code == 0 and said.out == "Hello th [stopped]\n\nFine.\n\n"
    assert "interrupted before its first token: your message was taken back" in said.err
    assert "Hello th<|im_end|>\n<|im_start|>user\nNext" in text_of(script)
    record = json.loads((tmp_path / "chat.jsonl").read_text())
    assert [message.get("weight") for message in record["messages"]] == [None, 0, None, None]
    assert read_chat_record(record).is_learned == (False, False, False, True)


def test_ctrl_c_before_the_network_reads(tuned):
    script = Script(tuned, ("Yes.<|im_end|>",))
    ask, calls = Transcript.ask, []

    def interrupted(self, text):
        calls.append(text)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return ask(self, text)

    with patch.object(Transcript, "ask", interrupted):
        said = talk(tuned, "one", "two", script=script)
    assert said.out == "Yes.\n\n" and said.err.endswith("note: interrupted\n") and "one" not in text_of(script)


def test_ctrl_c_and_ctrl_d_at_the_prompt(tuned):
    script = Script(tuned, ("Yes.<|im_end|>",))
    said = talk(tuned, None, "Hi\\", None, "Ho", script=script, terminal=True)
    assert said.code == 0 and said.out == "> > … > Yes.\n\n> " and said.err.count("note: Ctrl-D or /quit leaves") == 2
    assert "user\nHo<" in text_of(script)
    assert talk(tuned, None, "Hi", script=script).code == 130  # a pipe
    assert talk(tuned, "Hi\\", script=Script(tuned, ("Yes.<|im_end|>",))).out == "Yes.\n\n"


def test_a_reply_of_nothing_is_taken_back(tuned):
    script = Script(tuned, ("<|im_end|>",), (" \n<|im_end|>",), ("Yes.<|im_end|>",))
    said = talk(tuned, "one", "two", "three", script=script)
    assert said.err.count("the reply is empty: your message was taken back") == 2
    assert said.out.endswith("Yes.\n\n") and text_of(script) == "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"


# ---- the context


def test_oldest_turns_are_dropped(tuned):
    script = Script(tuned, *(("yes<|im_end|>",),) * 5)
    system = ("--system", "Be nice.", "--max-new-tokens", 40)
    lines = ["aa " * 10, "bb " * 10, "cc " * 10, "dd", "/undo", "dd"]
    said = talk(tuned, *lines, script=script, options=system)
    lengths = [len(prompt) for prompt in script.prompts]
    assert max(lengths) + 40 <= CONTEXT and all(text_of(script, n).startswith("<|im_start|>system\nBe nice.") for n in range(5))
    assert [text_of(script, n).count("<|im_start|>user") for n in range(5)] == [1, 2, 2, 2, 2]
    notes = [line for line in said.err.splitlines() if "dropped" in line]
    tokens = load_tokenizer(tuned).encode("user\n" + "aa " * 10 + "\n" + "assistant\nyes\n")
    assert notes[0].startswith(f"note: the context of {CONTEXT} tokens is full: turn 1 was dropped (")
    assert abs(int(notes[0].split("(")[1].split()[0]) - len(tokens) - 4) <= 2, (notes, len(tokens))
    assert len(notes) == 3 and notes[1] == notes[2] and "turn 2 was" in notes[1]  # /undo takes back what was dropped


def test_the_reserve_of_a_reply(tuned, tmp_path):
    """Tokens that stay free while turns can be dropped: a quarter of the context, 256 at most; or the longest reply."""

    def reserve(folder: Path, *options: object) -> int:
        made = []
        with patch.object(TerminalChat, "run", lambda self: made.append(self.transcript.reserve)):
            assert talk(folder, options=options).code == 0
        return made[0]

    shutil.copytree(tuned, tmp_path / "long")
    change_json(tmp_path / "long" / "config.json", max_position_embeddings=1200)
    assert reserve(tuned) == CONTEXT // 4 and reserve(tuned, "--max-new-tokens", 99) == 99 and reserve(tmp_path / "long") == 256
    (tmp_path / "long" / "generation_config.json").write_text('{"max_new_tokens": 30}')
    assert reserve(tmp_path / "long") == 30
    (tmp_path / "long" / "generation_config.json").write_text('{"max_new_tokens": 1000}')
    assert reserve(tmp_path / "long") == 256


def test_a_message_that_cannot_fit_is_taken_back(tuned):
    script = Script(tuned, ("yes<|im_end|>",), ("no<|im_end|>",))
    said = talk(tuned, "Hi", "z " * 400, "Ho", script=script)
    size = len("z " * 400)
    assert f"tokens, and the context holds {CONTEXT}, with one of a reply at least: it was taken back" in said.err
    told = int(said.err.split("the message has ")[1].split()[0].replace(",", ""))
    assert size // 2 <= told <= size + 20
    assert replies(said) == ["yes", "no"] and text_of(script).count("<|im_start|>user") == 2


def test_a_reply_may_fill_the_context(tuned):
    script = Script(tuned, ("a" * 400,), ("b" * 400,))
    said = talk(tuned, "Hi", script=script)
    room = CONTEXT - len(script.prompts[0])
    assert script.options[0]["max_new_tokens"] == room
    assert f"the reply was cut after {room} tokens: the context of {CONTEXT} tokens is full" in said.err
    script = Script(tuned, ("a" * 400,), ("b" * 400,))
    said = talk(tuned, "Hi", script=script, options=("--max-new-tokens", CONTEXT - 1))
    assert script.options[0]["max_new_tokens"] == room and f"after {room} tokens: the context of" in said.err
    said = talk(tuned, "Hi", script=script, options=("--max-new-tokens", 5))
    assert "the reply was cut after 5 tokens: max_new_tokens is 5" in said.err and said.out.startswith("bbbbb")


def test_a_transcript_is_restored_after_any_failure():
    """Counting words as tokens: `ask` may fail in its first encoding or its second."""
    fails: set[int] = set()
    calls = []

    def encode(messages: list[dict]) -> list[int]:
        calls.append(len(messages))
        if len(calls) in fails:
            raise KeyboardInterrupt
        return [0] * sum(len(message["content"].split()) for message in messages)

    transcript = Transcript(encode, limit=10, reserve=2)
    for text in ("a b", "c d"):
        transcript.ask(text)
        transcript.answer("e")
    for failing in (1, 2):
        calls.clear()
        fails.clear()
        fails.add(failing)
        with pytest.raises(KeyboardInterrupt):
            transcript.ask("f g h")
        assert len(transcript.turns) == 2 and transcript.first == 0
    fails.clear()
    assert transcript.ask("f g h") == ([0] * 6, range(0, 1), 3)
    assert transcript.ask("f g h i j k") == ([0] * 6, range(1, 3), 6)
    transcript.undo()
    assert transcript.first == 1
    with pytest.raises(ConfigError, match="the message has 10 tokens, and the context holds 10, with one of a reply"):
        transcript.ask("a b c d e f g h i j")
    assert transcript.first == 1 and len(transcript.ask("a b c d e f g h i").ids) == 9
    transcript.undo()
    with pytest.raises(ConfigError, match="the system message has 10 tokens, and the context holds 10"):
        transcript.set_system("a b c d e f g h i")
    transcript.set_system("a b c d e f g h")
    with pytest.raises(ConfigError, match="with the system message the message has 10 tokens"):
        transcript.ask("a b")
    transcript.set_system("")
    fails.add(len(calls) + 1)
    with pytest.raises(KeyboardInterrupt):
        transcript.set_system("x")
    assert transcript.system is None
