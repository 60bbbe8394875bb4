"""Every command and every Python snippet of the README, docs/ and CONTRIBUTING.md runs, on tiny networks and texts."""

import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import data.__main__
import data.made.modules
import model.hub
import quant.__main__
from eval.bleu import corpus_bleu
from lora.inject import adapters
from quant.linear import quantized_layers
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.made import modules
from tests.pairs import word_pairs
from tests.policy_table import variant_table as policy_table
from tests.preference_table import variant_table
from tests.runs import ROOT, command, last_checkpoint, write_corpus
from train.options import read_options, resolve_aliases

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = {"LOG.md", "parity.md"}  # a diary, and a table that is generated
COMMAND = re.compile(r"python -m (train|model|data|lora|quant|eval)\b.*|touchstone (?:train|generate)\b.*|torchrun .*")
TINY = "--width 32 --depth 1 --heads 2 --context 32 --vocab-size 290 --val-fraction 0.2"
ROLLOUT = "--batch-size 4 --NAME.group 4 --NAME.max-reply 8 --NAME.validation-prompts 2"
SHORT = "--steps 1 --batch-size 2 --accumulate 1 --threads 1 --sample-every 0 --device cpu --compile off"


def commands() -> list[tuple[str, str]]:
    """(page, command) of all blocks of code, and of the tables' cells; each once."""
    found = {}
    for page in (page for page in PAGES if page.name not in WRITTEN):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for language, block in blocks if not language for line in block.splitlines()]
        cells = [cell for row in text.splitlines() if row.startswith("|") for cell in re.findall(r"`([^`]*)`", row)]
        for line in (*lines, *cells):
            if COMMAND.fullmatch(line) and "…" not in line:
                found.setdefault(" ".join(shlex.split(line, comments=True, posix=False)), page.name)
    return [(page, line) for line, page in found.items()]


DATA_SETS = {  # of `python -m data task`, as the pages call them: the run of it, and its options
    "names": ("tagger", "tag"),
    "halves": ("belongs", "pairs"),
    "functions": ("similar", "pairs --pairs.kind number --pairs.label score"),
    "qa": ("runs/qa", "qa"),
}


def write_records(path: Path) -> None:
    """Records with the columns of all of them."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(40):
            record = {"words": ["a", f"w{n}"], "labels": ["O", "B-X" if n % 2 else "O"], "first": f"w{n}", "second": "a b"}
            record |= {"label": "yes" if n % 2 else "no", "score": n / 40, "question": "who", "context": f"it is w{n}"}
            answers = {"text": [f"w{n}"] * (n % 2), "answer_start": [6] * (n % 2)}
            file.write(json.dumps(record | {"answers": answers}) + "\n")


def preferences() -> dict[str, list[dict]]:
    """Records of docs/preferences.md: pairs, rated replies, scored replies, votes."""
    asked = [[{"role": "user", "content": f"{n}"}] for n in range(30)]
    replies = [[{"role": "assistant", "content": word}] for word in ("b", "c")]
    rated = [{"prompt": prompt, "completion": replies[n % 2], "label": n % 2 == 0} for n, prompt in enumerate(asked)]
    return {
        "pairs.jsonl": [{"prompt": prompt, "chosen": replies[0], "rejected": replies[1]} for prompt in asked],
        "rated.jsonl": rated,
        "scored.jsonl": [{"prompt": f"{n}", "responses": ["b", "c"], "scores": [n, 2]} for n in range(6)],
        "votes.jsonl": [{"prompt": f"{n}", "a": "b", "b": "c", "choice": "a"} for n in range(6)],
    }


class Place(NamedTuple):
    """Files and runs that stand for the capitals in commands."""

    folder: Path
    names: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("docs")
    corpus = str(write_corpus(folder / "corpus"))
    hypotheses, references = word_pairs(60)
    for name, texts in {"HYP": hypotheses, "REF": references, "A": hypotheses[::-1], "B": references}.items():
        (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    rows = [{"text": f"w{n} is it", "label": "ab"[n % 2], "source": f"w{n}", "target": "ab"[n % 2]} for n in range(60)]
    (folder / "PAIRS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows))
    chats = [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "b"}]} for n in range(30)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    for name, rows in preferences().items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in DATA_SETS:
        write_records(folder / f"{name}.jsonl")
    assert command("task", "sort", "--out", folder / "sort", main=data.__main__.main).code == 0
    for split in ("train", "validation"):  # of its records a few
        path = folder / "sort" / f"{split}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))
    (folder / "mine.py").write_text("def score(prompts, completions):\n    return [len(text) for text in completions]\n")
    names = {f"{name}/{split}.jsonl": str(folder / f"{name}.jsonl") for name in DATA_SETS for split in ("train", "validation")}
    names["TAGS.jsonl"] = names["names/train.jsonl"]
    names |= {name: str(folder / name) for name in ("HYP", "REF", "A", "B", "PAIRS.jsonl", "reviews.csv", "chat.jsonl")}
    names |= {name: str(folder / name) for name in preferences()}
    names |= dict.fromkeys(("PATH", "CORPUS", "notes/", "stdlib-code"), corpus) | {"books/*.txt.gz": f"{corpus}/*.txt"}
    other = write_corpus(folder / "other", seed=1)
    names |= {f"sort/{split}.jsonl": str(folder / "sort" / f"{split}.jsonl") for split in ("train", "validation")}
    names |= {"sort.txt": corpus, "mine.py:score": f"{folder / 'mine.py'}:score"}
    names |= {"web=web/:7": f"web={corpus}:7", "code=src/:3": f"code={other}:3"}

    def trained(name: str, line: str) -> str:
        run = folder / name
        said = command(*shlex.split(f"{line} {SHORT} --cache {folder / 'cache'} --out {run}"))
        assert said.code == 0, said.err
        return str(run)

    plain = trained("plain", f"--corpus {corpus} {TINY}")
    names |= dict.fromkeys(("RUN", "FOLDER", "BASE"), plain)
    for kind, file in {"mlm": corpus, "classify": names["reviews.csv"], "seq2seq": names["PAIRS.jsonl"]}.items():
        names[f"RUN of {kind}"] = trained(kind, f"--objective {kind} --corpus {file} {TINY}")
    longer = trained("longer", f"--corpus {corpus} {TINY.replace('--context 32', '--context 128')}")
    names["RUN of sft"] = trained("sft", f"--objective sft --init {longer} --corpus {names['chat.jsonl']}")
    names |= {"SFT": names["RUN of sft"], "LONGER": longer}
    names["REWARD"] = trained("reward", f"--objective reward --init {names['SFT']} --corpus {names['pairs.jsonl']}")
    names["ENCODER"] = names["RUN of mlm"]
    for kind in ("span", "denoise", "fim"):
        names[f"RUN of {kind}"] = trained(kind, f"--objective {kind} --corpus {corpus} {TINY}")
    for name, (run, options) in DATA_SETS.items():
        names[run] = trained(name, f"--objective {options} --corpus {folder / name}.jsonl {TINY}")
    names["ADAPTED_RUN"] = names["OTHER_RUN"] = trained("adapted", f"--init {plain} --adapter lora --corpus {corpus}")
    names["QLORA_RUN"] = trained("qlora", f"--init {plain} --adapter lora --quantize nf4 --corpus {corpus}")
    names["DIR"] = str(folder / "nf4")
    line = ["nf4", plain, "--out", names["DIR"], "--no-perplexity"]
    assert command(*line, main=quant.__main__.main).code == 0
    return Place(folder, names)


def filled(word: str, place: Place) -> str:
    """A word of a command, with real names in the place of capitals."""
    if word.endswith("/checkpoints/step-N"):
        return str(last_checkpoint(Path(place.names[word.partition("/")[0]])))
    name, equals, value = word.partition("=")
    if equals and value in ("A", "B"):
        return f"{name}={place.names[value]}"
    return place.names.get(word, word)


@pytest.mark.parametrize("page, line", commands())
def test_a_command_runs(page, line, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    ranks = words[0] == "torchrun"
    program, *words = words[words.index("-m") + 1 :] if "-m" in words else words[words.index("touchstone") + 1 :]
    words, program = ([program, *words], "model") if program == "generate" else (words, program)
    if kind := kind_of_run(words):
        words = [place.names[f"RUN of {kind}"] if word == "RUN" else word for word in words]
    new = [str(tmp_path / f"new{Path(word).suffix}") if last == "--out" else None for last, word in pairwise(["", *words])]
    words = [name or filled(word, place) for name, word in zip(new, words, strict=True)]
    if program == "train" and words[:1] != ["compare"]:
        words = made_small(words, place, tmp_path)
    if ranks:  # read alone: launching processes is tested elsewhere
        assert read_options(resolve_aliases(words)).run.steps == 1
        return
    if program == "data" and words[0] == "task":
        monkeypatch.setattr(data.made.modules, "read_modules", lambda progress: modules())
    elif program == "data" and words[0] == "prepare":
        words += ["--cache", str(tmp_path / "cache")]
    if (program == "eval" and words[0] == "perplexity") or program == "quant":
        words += ["--cache", str(tmp_path / "cache")] if program == "quant" else []
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))  # of model chat
    said = command(*words, main=importlib.import_module(f"{program}.__main__").main)
    assert said.code == 0, said.err


def kind_of_run(words: list[str]) -> str | None:
    """The objective of the RUN that a command needs."""
    said = " ".join(words)
    kinds = {"generate .*--prefix": "fim", "generate .*--source.*MASK": "denoise", "generate .*--source.*extra_id": "span"}
    kinds |= {"fill ": "mlm", "predict RUN ": "classify", "chat RUN": "sft"}
    return next((kind for pattern, kind in kinds.items() if re.match(pattern, said)), None)


def made_small(words: list[str], place: Place, tmp_path: Path) -> list[str]:
    """A training command on a tiny network, for one step."""
    if "--resume" in words:
        run = tmp_path / "resumed"
        shutil.copytree(words[-1], run)
        return [*words[:-1], str(run)]
    for name in ("--steps", "--epochs", "--width", "--depth", "--heads", "--vocab-size", "--batch-size"):
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
    words += [*shlex.split(SHORT), "--cache", str(place.folder / "cache"), "--out", str(tmp_path / "run")]
    if "--reward" in words:
        rollout = ROLLOUT.replace("NAME", words[words.index("--objective") + 1] if "--objective" in words else "ppo")
        words += rollout.split()
    words += [] if "--init" in words else shlex.split(TINY.partition(" --val-fraction")[0] if "--validation" in words else TINY)
    kinds = {"chat.jsonl": ("sft", "pairs-sft"), "rated.jsonl": ("kto",)}
    kinds["pairs.jsonl"] = ("dpo", "reward", "pairs-dpo", "pairs-reward", "pairs-ppo")
    corpus = place.names[next((file for file, said in kinds.items() if {*said} & {*words}), "PATH")]
    if {"pairs-sft", "--sft.template"} & {*words}:  # whose template's tokens need more context than BASE has
        words[words.index("--init") + 1] = place.names["LONGER"]
    words += [] if "--corpus" in words else ["--corpus", corpus]
    return words


def test_the_commands_are_found():
    lines = [line for _, line in commands()]
    assert len(lines) > 40 and any("torchrun" in line for line in lines)


def test_commands_of_the_tests_are_read(tmp_path):
    """pytest reads its lines, whose files exist, and runs nothing by them; the tools beside it know their names."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES if page.name != "LOG.md"]
    found = {line.strip() for text in texts for line in re.findall(r"python -m (pytest[^`#\n]*|tests\.[^`#\n]*)", text)}
    assert len(found) > 5
    lines = [shlex.split(line) for line in sorted(found)]
    table = f"--parity={tmp_path / 'parity.md'}"  # in the place of the one in docs/
    read = [[*words, *[table] * ("--parity" in "".join(words)), "-n", "0"] for name, *words in lines if name == "pytest"]
    done = subprocess.run([sys.executable, "-c", READ, json.dumps(read)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    benches = {*re.findall(r'^    "(\w+)": bench_', (ROOT / "tests/bench/__main__.py").read_text(), re.MULTILINE)}
    for name, *words in lines:
        assert name == "pytest" or importlib.util.find_spec(name), name
        assert name != "tests.bench" or set(words) <= benches, words


# --markers: the options are read, and no test is collected, which would import what it tests
READ = """
import itertools, json, pathlib, pytest, sys
for words in json.loads(sys.argv[1]):
    code = pytest.main([*words, "--markers"])
    assert code == pytest.ExitCode.OK, (words, code)
    places = [word for last, word in itertools.pairwise(["", *words]) if "-" not in (last[:1], word[:1])]
    missing = [place for place in places if not pathlib.Path(place).exists()]
    assert not missing, (words, missing)
"""


def test_what_pages_name_exists():
    """Links, and the files of the project in backquotes; and the README is one that is read to the end."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
    links, files = 0, 0
    for page in (page for page in PAGES if page.name not in WRITTEN):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
            links += 1
        for name in re.findall(r"`((?:model|data|quant|eval|lora|train|tests)/[\w/.-]*)`", text):
            if "NAME" not in name:
                assert (ROOT / name).exists(), f"{page.name}: {name}"
                files += 1
    assert links > 15 and files > 80


# ---- Python snippets


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_every_snippet_is_run_here():
    """A page with Python that no test below runs is an error."""
    pages = [str(page.relative_to(ROOT)) for page in PAGES if page.name not in WRITTEN]
    assert {page: len(snippets(page)) for page in pages if snippets(page)} == {
        "README.md": 1, "docs/adapters.md": 1, "docs/quantization.md": 2, "docs/metrics.md": 1, "docs/networks.md": 1,
        "docs/training.md": 1, "docs/instructions.md": 1, "docs/preferences.md": 1, "docs/reinforcement.md": 2,
        "docs/rlhf.md": 1,
    }  # fmt: skip


def test_the_example_of_the_readme(capsys):
    (block,) = snippets("README.md")
    names: dict = {}
    exec(block, names)
    q, k, v, y = (names[name] for name in "qkvy")
    assert torch.allclose(y, torch.nn.functional.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)
    assert capsys.readouterr().out.startswith("BLEU = ")


def test_a_conversation_is_encoded(place, capsys):
    (block,) = snippets("docs/instructions.md")
    exec(block.replace("FOLDER", str(last_checkpoint(Path(place.names["FOLDER"])))), {})
    assert capsys.readouterr().out.split() == ["Hello"]


def test_the_table_of_preference_losses_is_computed():
    """python -m tests.preference_table prints it."""
    assert variant_table().strip() in (ROOT / "docs/preferences.md").read_text(encoding="utf-8")


def test_the_table_of_policy_losses_is_computed():
    """python -m tests.policy_table prints it."""
    assert policy_table().strip() in (ROOT / "docs/reinforcement.md").read_text(encoding="utf-8")


def test_losses_of_replies(place, tmp_path, monkeypatch, capsys):
    text, losses = snippets("docs/reinforcement.md")
    shutil.copytree(place.folder / "sort", tmp_path / "sort")
    monkeypatch.chdir(tmp_path)
    exec(text, {})
    first, _, rest = (tmp_path / "sort.txt").read_text().partition("\n\n")
    prompt, _, answer = first.removeprefix("Sort: ").partition(" = ")
    assert answer == "".join(sorted(prompt)) and rest.count("Sort: ") == 39
    exec(losses, {})
    assert capsys.readouterr().out == "[0.5, -0.5, -0.5, 0.5] 6 0.0\n"


def test_losses_of_tokens(capsys):
    (block,) = snippets("docs/rlhf.md")
    exec(block, {})
    assert capsys.readouterr().out.startswith("(tensor(2.5731), tensor(6)) ")


def test_losses_of_pairs(capsys):
    (block,) = snippets("docs/preferences.md")
    exec(block, {})
    said = capsys.readouterr().out.splitlines()
    shown = block.partition("a pair: ")[2].splitlines()[0]
    assert said[0] == shown and said[1].startswith("tensor(") and said[2] == "False"


def test_a_checkpoint_opens_in_transformers(place, monkeypatch):
    (block,) = snippets("docs/training.md")
    monkeypatch.chdir(place.folder)
    block = block.replace("RUN/checkpoints/step-N", str(last_checkpoint(Path(place.names["RUN"]))))
    names: dict = {}
    exec(block, names)
    assert sum(parameter.numel() for parameter in names["network"].parameters()) > 1000


def test_the_adapters(tmp_path, monkeypatch):
    (block,) = snippets("docs/adapters.md")
    monkeypatch.chdir(tmp_path)
    before = randomized(tiny_config("llama"))
    model.hub.save(before, "FOLDER")
    names: dict = {}
    exec(block, names)
    after = names["network"]
    assert not adapters(after) and (tmp_path / "ADAPTER" / "adapter_model.safetensors").is_file()
    for name, value in after.named_parameters():  # B was zero: the weights are what they were
        assert mixed(value, before.get_parameter(name)) < 1e-6, name


def test_the_four_bits(tmp_path, monkeypatch):
    block, _ = snippets("docs/quantization.md")
    monkeypatch.chdir(tmp_path)
    model.hub.save(randomized(tiny_config("llama")), "FOLDER")
    names: dict = {"weight": torch.randn(64, 64), "network": randomized(tiny_config("llama"))}
    exec(block, names)
    assert names["small"].bits < 4.2 and quantized_layers(names["network"])
    assert json.loads((tmp_path / "DIR" / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_the_eight_bits(tmp_path, monkeypatch):
    _, block = snippets("docs/quantization.md")
    monkeypatch.chdir(tmp_path)
    before = randomized(tiny_config("llama"), dtype=torch.float32)
    model.hub.save(before, "FOLDER")
    batches = [{"input_ids": torch.arange(12).view(2, 6)}]
    names: dict = {"weight": torch.randn(64, 64), "network": before, "batches": batches}
    exec(block, names)
    assert names["small"].group_size == 32 and quantized_layers(names["packed"])
    assert json.loads((tmp_path / "DIR" / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    assert torch.equal(model.hub.load("DIR")(**batches[0]).logits, names["network"].eval()(**batches[0]).logits)


def test_the_scores():
    (block,) = snippets("docs/metrics.md")
    hypotheses, references = word_pairs(7)
    names: dict = {"hypotheses": hypotheses, "references": references, "baseline": hypotheses[::-1]}
    names |= {"predicted": ["a", "b", "a"], "true": ["a", "b", "b"], "labels": torch.tensor([0, 1])}
    names |= {"probabilities": torch.tensor([[0.9, 0.1], [0.6, 0.4]]), "documents": [[*range(5, 45)]]}
    names["network"] = randomized(tiny_config("llama"))
    exec(block, names)
    assert names["test"].difference > 5 and names["report"].accuracy == 2 / 3 and names["loss"].targets == 39
    assert names["error"].value > 0 and names["named"].precision == 0
    assert names["whole"] == corpus_bleu(hypotheses, [references]) and "tok:intl" in names["score"].signature
    assert names["interval"].low < names["whole"].value < names["interval"].high and names["scores"]["rouge1"].fmeasure > 0.3


def test_networks_are_opened_and_written(tmp_path, monkeypatch):
    (block,) = snippets("docs/networks.md")
    monkeypatch.chdir(tmp_path)
    model.hub.save(randomized(tiny_config("llama")), "FOLDER")
    names: dict = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}
    exec(block, names)
    assert names["output"].logits.shape == (2, 3) and len(names["output"].hidden_states) == 3 and (tmp_path / "OTHER").is_dir()
