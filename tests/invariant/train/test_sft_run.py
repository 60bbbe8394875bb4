"""`--objective sft` through the real command: it learns to answer and to stop; killed, on two ranks, with adapters."""

import json
import re
import shutil
from io import BytesIO, TextIOWrapper
from pathlib import Path
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
import transformers

import lora.__main__
import lora.peft_io
import model.__main__
import model.hub
from data.chat.encode import ChatEncoder, encode_rendered
from data.chat.template import open_template, read_named
from data.tokenizer.open import load_tokenizer
from model.generate import generate
from tests.chat_runs import CHATML, conversations, open_sft, write_base, write_conversations
from tests.compare import absolute
from tests.fault.test_ranks import torchrun
from tests.folders import change_json
from tests.records import write_rows
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from train.runs.checkpoint import step_of

LIBRARY = f"transformers {transformers.__version__}"
OVERFIT = 8  # conversations
SETTINGS = {
    "objective": "sft",
    "batch-size": 4,
    "context": 192,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "sample-every": 0,
    "log-every": 1,
}
FEW = {"steps": 6, "save-every": 3, "eval-every": 3, "sft.replies": 2, "sft.max-reply": 12}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sft")
    write_base(place / "base", hidden_size=64, intermediate_size=96)
    write_conversations(place / "train.jsonl", OVERFIT)
    write_conversations(place / "held_out.jsonl", 4, seed=1)
    return place


def options(place: Path, base: str = "base", **changes) -> list[str]:
    files = {"init": place / base, "corpus": place / "train.jsonl", "validation": place / "held_out.jsonl"}
    return arguments(SETTINGS | files | changes)


def overfit(place: Path, out: str) -> tuple[Path, str]:
    """A run of eight conversations that scores these."""
    corpus = place / "train.jsonl"
    lengths = {"steps": 45, "eval-every": 45, "sft.max-reply": 40, "lr": "1e-2", "sample-every": 45}
    said = command(*options(place, validation=corpus, **lengths), "--eval-corpus", f"other={place / 'held_out.jsonl'}",
                   "--out", place / out)
    assert said.code == 0, said.err
    return place / out, said.out


@pytest.fixture(scope="module")
def run(place) -> tuple[Path, str]:
    return overfit(place, "run")


def validations(run: Path) -> list[dict]:
    return [row for row in metrics(run) if row["split"] == "validation"]


# ---- learning


def test_it_answers_and_stops(run):
    last = validations(run[0])[-1]
    assert (last["ended"], last["exact_match"], last["token_accuracy"]) == (1, 1, 1) and last["loss"] < 0.01
    (before,) = re.findall(r"^before the first step: loss of held-out replies ([\d.]+) .* (\d+)% exact", run[1], re.MULTILINE)
    assert float(before[0]) > 5 and before[1] == "0"
    assert last["loss_other"] > 1 and 0 <= last["ended_other"] <= 1, "other conversations are not learned by heart"
    losses = [row["loss"] for row in metrics(run[0]) if row["split"] == "train"]
    assert losses[-1] < 0.05 < 5 < losses[0]


def test_mutant_whose_terminators_are_masked_never_stops(place):
    encode = ChatEncoder.encode

    def masked(self, rendered):
        tokens = encode(self, rendered)
        ends = np.append(tokens.is_learned[:-1] & ~tokens.is_learned[1:], tokens.is_learned[-1])
        return tokens._replace(is_learned=tokens.is_learned & ~ends)

    with patch.object(ChatEncoder, "encode", masked):
        last = validations(overfit(place, "masked")[0])[-1]
    assert (last["ended"], last["exact_match"]) == (0, 0) and last["token_accuracy"] == 1


def test_what_is_said(run, place):
    """The template, how many tokens are learned and which, new control tokens, and a sample of a held-out prompt."""
    folder, said = run
    for text in (
        "this folder has no chat template: chatml is used",
        "2 new control tokens: <|im_start|>, <|im_end|>, with rows at the mean of the others",
        f"records  {place / 'train.jsonl'}: 8 to train on, 8 in {place / 'train.jsonl'}",
        "tokens are learned (",
        "<|im_start|>assistant\n⟦",
        "<|im_end|>⟧",
        "held-out replies: loss 0.00",
        "100% end by themselves, 100% exact",
        "a held-out prompt, its reference and the greedy reply",
        f"python -m model chat {folder}",
        f"python -m train --objective sft --sft.max-reply 40 --init {place / 'base'} --corpus PATH   # your own files",
    ):
        assert text in said, text
    page = (folder / "report.html").read_text()
    assert "100% end by themselves, 100% exact" in page and "learned tokens" in page
    assert json.loads((folder / "best.json").read_text())["loss"] == min(row["loss"] for row in validations(folder))


def test_a_dry_run(place, tmp_path):
    said = command(*options(place, steps=3), "--eval-tokens", 5, "--dry-run", "--out", tmp_path / "run")
    assert said.code == 0 and "8 to train on, 1 in " in said.out, said.err  # one is scored at least
    assert "example  the first of the first step; · is not scored" in said.out and not (tmp_path / "run").exists()


# ---- folders


def test_transformers_opens_a_checkpoint(run, parity):
    """Ids of a rendered conversation, logits, and a greedy reply that ends at generation_config.json's ids."""
    folder = last_checkpoint(run[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    check_folder(folder, model.hub.load(folder), theirs, parity, is_overfit=True)


def check_folder(folder: Path, network, theirs, parity, *, is_overfit: bool = False) -> None:
    chat = conversations(OVERFIT)[4]["messages"]
    tokenizer, other = load_tokenizer(folder, network.config.vocab_size), transformers.AutoTokenizer.from_pretrained(folder)
    template = open_template(tokenizer)
    ids = encode_rendered(tokenizer, template, chat[:-1])
    options = {"return_dict": True, "return_tensors": "pt"}
    batch = other.apply_chat_template(chat[:-1], add_generation_prompt=True, **options)
    assert batch["input_ids"][0].tolist() == ids
    saved = json.loads((folder / "generation_config.json").read_text())
    ends = saved["eos_token_id"] if isinstance(saved["eos_token_id"], list) else [saved["eos_token_id"]]
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.control_tokens else "</s>"
    assert tokenizer.token_name(ends[0]) == end and saved.get("pad_token_id") not in ends
    with torch.no_grad():
        logits = theirs.eval()(**batch).logits
        error = absolute(network(torch.tensor([ids])).logits, logits)
        reply = theirs.generate(**batch, max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    parity(f"instruction tuning: logits of a run's folder, {template.name}", LIBRARY, error, 1e-4, "float32 rounding")
    ours = generate(network, torch.tensor([ids]), max_new_tokens=40, stop_ids=ends, temperature=0.0)[0].tolist()
    assert reply == ours[: len(reply)]
    if is_overfit:
        assert reply[-1] == ends[0] and tokenizer.decode(reply[:-1]) == chat[-1]["content"]


def test_model_chat_answers_with_it(run):
    """A conversation that it knows by heart, question after question; each reply ends at the terminator."""
    chat = next(each["messages"] for each in conversations(OVERFIT) if len(each["messages"]) == 4)
    questions = "".join(f"{message['content']}\n" for message in chat if message["role"] == "user")
    with patch("sys.stdin", TextIOWrapper(BytesIO(questions.encode()), encoding="utf-8")):
        said = command("chat", run[0], "--temperature", 0, main=model.__main__.main)
    assert said.code == 0, said.err
    places = [said.out.find(message["content"]) for message in chat if message["role"] == "assistant"]
    assert -1 not in places and places == sorted(places), said.out


@pytest.mark.parametrize("rows", [332, 340])
@pytest.mark.parametrize("tied", [False, True])
def test_new_control_tokens_have_the_mean_of_the_others(rows, tied, place, tmp_path):
    """In new rows, or in unused ones of a padded vocabulary, which hold noise; at both ends. Other rows stay."""
    base = write_base(tmp_path / "base", vocab_size=rows, tie_word_embeddings=tied)
    before = model.hub.load(base, dtype=torch.float64)
    _, network = open_sft(base, place / "train.jsonl", validation=place / "held_out.jsonl", context=192)
    assert network.config.vocab_size == max(rows, 334)
    others = [id for id in range(rows) if id not in (332, 333)]
    ends = [(each.body.embedding.weight, each.head.weight) for each in (before, network)]
    for old_VD, new_VD in zip(*ends, strict=True):
        assert absolute(new_VD[332:334], old_VD[others].mean(0).expand(2, -1)) < 1e-12
        assert torch.equal(new_VD[others], old_VD[others])
    assert (network.head.weight is network.body.embedding.weight) == tied


def test_a_folder_without_bos_and_one_whose_pad_is_eos(place, tmp_path):
    """No bos: nothing stands before the first control token. pad = eos: it still is learned, as padding is masked by length;
    the folder names no pad then, at which transformers would cut replies."""
    bare = write_base(tmp_path / "bare", CHATML, bos=False)
    change_json(bare / "tokenizer_config.json", pad_token="</s>", chat_template=None)
    change_json(bare / "generation_config.json", pad_token_id=331)
    change_json(bare / "config.json", pad_token_id=331)
    for template, end in (("chatml", 333), ("zephyr", 331)):
        settings = {"validation": place / "held_out.jsonl", "template": template, "context": 192}
        task, network = open_sft(bare, place / "train.jsonl", **settings)
        for talk in task.data.train.values:
            (tokens,) = talk.examples
            assert tokens.ids[0] != 330 and tokens.ids[-1] == end and tokens.is_learned[-1]
        ends = (task.validation[0]["labels"] == end).any(1)
        assert ends.sum() == len(task.data.validation) and task.pad_id == 331
        assert network.config.eos_id == end and network.config.pad_id is None and "pad_token_id" not in network.generation
        assert set((network.config.eos_id, *network.config.stop_ids)) == {end, 331}


# ---- resume and ranks

WAYS = {
    "packed": {"sft.neftune": 5},
    "padded": {"sft.packing": "pad", "sft.loss": "record"},
    "lora": {"adapter": "lora", "sft.template": "zephyr", "sft.neftune": 5},
    "lora with new tokens": {"adapter": "lora", "lora.train-whole": "embedding"},
    "qlora": {"adapter": "lora", "quantize": "nf4", "sft.template": "zephyr"},
}
SLOW = ("padded", "lora", "qlora")


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way in SLOW else ()) for way in WAYS])
def test_killed_and_resumed_it_ends_in_the_same_bytes(way, place, tmp_path):
    changes = {name: value for name, value in WAYS[way].items() if name != "lora.train-whole"} | FEW
    line = options(place, **changes) + (["--lora.train-whole", "embedding", "head"] if "lora.train-whole" in WAYS[way] else [])
    said = command(*line, "--out", tmp_path / "whole")
    assert said.code == 0, said.err
    said = stopped_at(4, *line, "--out", tmp_path / "run")
    assert said.code == 130 and step_of(last_checkpoint(tmp_path / "run")) == 4, said.err
    said = command("--resume", tmp_path / "run")
    assert said.code == 0, said.err
    assert_same_end(tmp_path / "whole", tmp_path / "run", FEW["steps"])


@pytest.mark.slow
def test_a_further_template_of_the_folder_is_found_again(place, tmp_path):
    """Named by --sft.template from a list in tokenizer_config.json: the checkpoint has it as its own, and under its name."""
    write_base(tmp_path / "base", CHATML)
    templates = [{"name": "default", "template": read_named("zephyr")}, {"name": "mine", "template": read_named("chatml")}]
    change_json(tmp_path / "base" / "tokenizer_config.json", chat_template=templates)
    line = [*options(place, **FEW | {"init": tmp_path / "base"}), "--sft.template", "mine"]
    said = command(*line, "--out", tmp_path / "whole")
    assert said.code == 0, said.err
    assert stopped_at(4, *line, "--out", tmp_path / "run").code == 130
    said = command("--resume", tmp_path / "run")
    assert said.code == 0, said.err
    folder = last_checkpoint(tmp_path / "run")
    shutil.rmtree(last_checkpoint(tmp_path / "whole") / "additional_chat_templates")
    assert (folder / "additional_chat_templates" / "mine.jinja").read_text() == read_named("chatml")
    shutil.rmtree(folder / "additional_chat_templates")
    assert_same_end(tmp_path / "whole", tmp_path / "run", FEW["steps"])


@pytest.mark.slow
def test_two_ranks_are_one(place, tmp_path):
    """Packed rows with different numbers of records, a mean over records; both ranks write the replies."""
    line = options(place, **{"sft.loss": "record"}, **FEW)
    assert command(*line, "--out", tmp_path / "one").code == 0
    with torchrun(*line, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    for mine, other in zip(*(metrics(tmp_path / name) for name in ("one", "two")), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-5) and mine.get("tokens") == other.get("tokens")
        assert (mine.get("ended"), mine.get("exact_match")) == (other.get("ended"), other.get("exact_match"))


# ---- adapters


def test_new_control_tokens_need_trained_rows(place, tmp_path):
    """An adapter and --freeze would leave their rows at the mean: refused before anything is written, with three ways out."""
    for more in (["--adapter", "lora"], ["--adapter", "ia3"], ["--adapter", "lora", "--lora.train-whole", "head"]):
        said = command(*options(place, **FEW), *more, "--out", tmp_path / "run")
        assert said.code == 2 and said.err.startswith("error: the template needs new control tokens (<|im_start|>, <|im_end|>)")
        for way in ("train-whole embedding head", "--sft.template alpaca, zephyr", "without --adapter"):
            assert way in said.err
    said = command(*options(place, **FEW), "--freeze", "top:1", "--out", tmp_path / "run")
    assert said.code == 2 and "--freeze top:1" in said.err and not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def adapted(place) -> Path:
    """LoRA and whole copies of the embedding and the head, with rows for two new control tokens."""
    line = [*options(place, **FEW, lr="1e-2"), "--adapter", "lora", "--lora.train-whole", "embedding", "head"]
    said = command(*line, "--out", place / "adapted")
    assert said.code == 0, said.err
    return last_checkpoint(place / "adapted")


def test_an_adapter_with_new_tokens_is_reopened_and_merged(adapted, place, tmp_path, parity):
    """By us, by AutoPeftModel, which resizes the base to the folder's tokenizer, and merged into a folder of its own."""
    network, merged = lora.peft_io.open_network(adapted), tmp_path / "merged"
    assert network.config.vocab_size == 334 and (network.config.eos_id, network.config.stop_ids) == (333, (331,))
    check_folder(adapted, network, peft.AutoPeftModelForCausalLM.from_pretrained(adapted), parity)
    said = command("merge", place / "base", adapted, "--out", merged, main=lora.__main__.main)
    assert said.code == 0 and f"try it:  python -m model chat {merged}" in said.out, said.err
    whole = model.hub.load(merged)
    assert (whole.config.eos_id, whole.config.stop_ids) == (333, (331,))
    ids = torch.randint(3, 330, (2, 20))
    with torch.no_grad():
        assert absolute(whole(ids).logits, network(ids).logits) < 1e-5
    check_folder(merged, whole, transformers.AutoModelForCausalLM.from_pretrained(merged), parity)
    rows = whole.body.embedding.weight
    assert not torch.equal(rows[332], rows[333]), "they began at one mean, and have learned"


@pytest.mark.slow
def test_an_adapter_on_known_tokens(place, tmp_path, parity):
    """Zephyr's template needs none: the folder has the template, the base's tokenizer and the id that ends replies."""
    said = command(*options(place, **FEW), "--adapter", "lora", "--sft.template", "zephyr", "--out", tmp_path / "run")
    assert said.code == 0 and "new control token" not in said.out, said.err
    folder = last_checkpoint(tmp_path / "run")
    check_folder(folder, lora.peft_io.open_network(folder), peft.AutoPeftModelForCausalLM.from_pretrained(folder), parity)


# ---- data


def test_short_records_fill_their_rows(place, tmp_path):
    corpus = write_rows(tmp_path / "many.jsonl", conversations(250, seed=3))
    said = command(*options(place, corpus=corpus, steps=1, context=256), "--dry-run")
    assert said.code == 0, said.err
    (fill,) = re.findall(r"rows of 256 hold 250 examples, ([\d.]+)% full", said.out)
    assert float(fill) >= 98


@pytest.mark.slow
def test_a_mixture_of_sources(place, tmp_path):
    """Two files by weight, one of them with plain text: the share of each is as asked."""
    other = write_rows(tmp_path / "text.jsonl", [{"text": f"The list of names, {n}"} for n in range(9)])
    line = options(place, **FEW)
    at = line.index("--corpus")
    line[at + 1 : at + 2] = [f"chat={place / 'train.jsonl'}:1", f"text={other}:3"]
    said = command(*line, "--out", tmp_path / "run")
    assert said.code == 0 and "mixture  chat 25.0%" in said.out, said.err
    (drawn,) = {row["drawn_text"] for row in metrics(tmp_path / "run") if row["split"] == "train" and row["step"] == 6}
    assert 0.6 <= drawn <= 0.9
    for asked, text in ((2, "no held-out record has a prompt"), (0, "no held-out record has a prompt")):
        said = command(*options(place, corpus=other, validation=other, steps=3, **{"sft.replies": asked}), "--dry-run")
        assert said.code == 0 and (text in said.out) == (asked > 0), said.err


def test_without_a_corpus_it_reads_the_built_in_conversations(place, tmp_path):
    """Split by modules of the standard library, named by their place; a resume finds them unchanged, or says so."""
    sets = {"train": conversations(12), "validation": conversations(3, seed=2)}
    line = options(place, **FEW)
    at = line.index("--corpus")
    del line[at : at + 4]  # and --validation
    with patch("data.made.conversations.make_conversations", lambda progress=iter: sets):
        said = stopped_at(4, *line, "--out", tmp_path / "run")
        assert said.code == 130 and "records  stdlib-chat: 12 to train on, 3 held out" in said.out, said.err
        assert "stdlib-chat, train record 1, learned between" in said.out
        sets["train"][-1]["messages"][-1]["content"] = "another"
        said = command("--resume", tmp_path / "run")
        assert said.code == 2 and "the corpus stdlib-chat is no longer the text that" in said.err
        sets["train"] = conversations(12)
        assert command("--resume", tmp_path / "run").code == 0
        sets["validation"][0]["messages"][-1]["content"] = "word " * 200
        said = command(*line, "--out", tmp_path / "other")
        assert said.code == 0 and "longer than a row, left out: stdlib-chat, validation record 1\n" in said.out, said.err
