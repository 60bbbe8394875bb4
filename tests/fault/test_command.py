"""What a person can get wrong: one line that begins with "error: ", code 2, and nothing left behind."""

import pytest
from safetensors.torch import load_file

from tests.runs import arguments, command, further, write_corpus
from train.runs.checkpoint import checkpoints

BROKEN = b"good line\ncaf\xe9"


def assert_one_clear_line(said, *expected):
    assert said.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.out + said.err
    for words in expected:
        assert words in said.err


BAD_VALUES = {
    "--steps 0": ("--steps 0: must be at least 1",),
    "--lr nan": ("--lr nan",),
    "--lr inf": ("--lr inf",),
    "--matrix-lr -1": ("--matrix-lr -1.0",),
    "--seed -1": ("--seed -1",),
    "--warmup 2": ("--warmup 2.0: a fraction",),
    "--width 128 --heads 3": ("width=128 is not divisible by heads=3",),
    "--width 0": ("--width 0: must be at least 1",),
    "--dropout 1.5": ("--dropout 1.5: must be at least 0 and below 1",),
    "--betas 1 2": ("--betas 1.0: must be",),
    "--optimizer adamw --eps nan": ("--optimizer adamw", "eps=nan"),
    "--momentum 1": ("--momentum 1.0: must be",),
    "--final-lr 5": ("--final-lr 5.0: a fraction",),
    "--threads 999999": ("--threads 999999: must be at most 1024",),
    "--seed 99999999999999999999": ("--seed 99999999999999999999: must be below 2^63",),
    "--device nonsense": ("--device nonsense: not a device",),
    "--device mps": ("--device mps: cpu and cuda are supported",),
    "--device cuda:99": ("--device cuda:99",),
    "--preset gpt3": ("unknown preset 'gpt3'; nearest: gpt2", "tiny"),
    "--preset zzz": ("unknown preset 'zzz'; all: bart-base, ",),
    "--context 100000": ("training split", "fewer than one block of context=100000", "use a context of at most"),
    "--vocab-size 5000": ("--vocab-size 5000 is more than this text can fill", "--vocab-size"),
    "--recipe nothing": ("--recipe nothing: there is no", "recipes: chat-base, gpt2-124m"),
}


@pytest.mark.parametrize("given", BAD_VALUES)
def test_bad_value(given, options, tmp_path):
    out = tmp_path / "run"
    assert_one_clear_line(command(*options, *given.split(" "), "--out", out), *BAD_VALUES[given])
    assert not out.exists()


REFUSED_BY_TYRO = {
    "--stepps 5": "--stepps",
    "--steps many": "--steps",
    "--optimizer lion": "muon",
    "--vocab-size 10": "--vocab-size 10: from",
    "--val-fraction 1": "--val-fraction 1.0: a fraction above 0",
    "--corpus": "corpus is empty",
}


@pytest.mark.parametrize("given", REFUSED_BY_TYRO)
def test_what_is_refused_while_options_are_read(given, options, tmp_path):
    """tyro draws its own box around these: more than a line, as clear."""
    said = command(*options, *given.split(), "--out", tmp_path / "run")
    assert said.code == 2 and REFUSED_BY_TYRO[given] in said.err and "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


CORPORA = {
    "missing": (None, ("missing: no such file or folder", "the built-in corpora are stdlib-docs")),
    "empty.txt": (b"", ("is empty",)),
    "broken.txt": (BROKEN, ("broken.txt: broken UTF-8 at byte 13 (0xe9)", "--on-bad-text")),
    "broken.jsonl": (b'{"text": "one"}\n{"text": "tw\n', ("broken.jsonl:2: not a JSON line",)),
    "keys.jsonl": (b'{"body": "one"}\n', ("keys.jsonl:1: no key 'text'", "'body'", "--text-key")),
    "picture.png": (b"x", ("picture.png: its suffix is not one that is read",)),
    "short.txt": (b"To be, or not to be.", ("the corpus has 1 document",)),
}


@pytest.mark.parametrize("name", CORPORA)
def test_bad_corpus(name, options, tmp_path):
    content, expected = CORPORA[name]
    path, out, cache = tmp_path / name, tmp_path / "run", tmp_path / "cache"
    if content is not None:
        path.write_bytes(content)
    assert_one_clear_line(command(*options, "--corpus", path, "--cache", cache, "--out", out), *expected)
    assert not out.exists() and (not cache.exists() or not list(cache.iterdir()))


def test_on_bad_text_goes_on(options, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "broken.txt").write_bytes(BROKEN)
    changes = {"corpus": corpus, "cache": tmp_path / "cache", "out": tmp_path / "run", "steps": 1, "on-bad-text": "skip"}
    said = command(*options, *arguments(changes))
    assert said.code == 0 and "1 document of bad text left out" in said.out and "broken.txt" in said.out


@pytest.mark.parametrize(
    "content, expected",
    [
        ("steps = 5", ("unknown setting 'steps'", "run")),
        ("[run]\nstepps = 5", ("run: unknown setting 'stepps'", "steps")),
        ("[run]\nsteps = 'five'", ("run: steps = 'five': int is expected",)),
        ("[run]\nsteps = true", ("run: steps = True: int is expected",)),
        ("[optimizer]\nschedule = 'steps'", ("schedule = 'steps': one of 'cosine'",)),
        ("[optimizer]\nbetas = [0.9]", ("2 values are expected",)),
        ("run = 3", ("run = 3: a table is expected",)),
        ("[run", ("is not TOML",)),
        ("[run]\nsteps = 0", ("--steps 0",)),
        ("[data]\nvocab_size = 3", ("--vocab-size 3",)),
    ],
)
def test_bad_recipe(content, expected, options, tmp_path):
    recipe, out = tmp_path / "mine.toml", tmp_path / "run"
    recipe.write_text(content)
    options = [] if "steps = 0" in content else options
    assert_one_clear_line(command(*options, "--recipe", recipe, "--out", out), *expected)
    assert not out.exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_refused(options, halfway):
    before = contents(halfway)
    said = command(*options, "--out", halfway)
    assert_one_clear_line(said, "already holds a run", f"python -m train --resume {halfway}", "another --out")
    assert contents(halfway) == before


def test_out_that_cannot_be_a_folder(options, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_one_clear_line(command(*options, "--out", tmp_path / "file"), "is a file")
    assert_one_clear_line(command(*options, "--out", tmp_path / "file" / "run"), "Not a directory")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "metrics.jsonl").write_text("of something else")
    said = command(*options, "--out", tmp_path)
    assert_one_clear_line(said, f"--out {tmp_path} is there already, and is not an empty folder")
    assert (tmp_path / "metrics.jsonl").read_text() == "of something else"


def test_resume_takes_no_other_option(halfway):
    before = contents(halfway)
    said = command("--resume", halfway, "--lr", 1e-3)
    assert_one_clear_line(said, "own settings", f"--init {halfway}")
    assert contents(halfway) == before


def test_resume_of_no_run(tmp_path):
    assert_one_clear_line(command("--resume", tmp_path), "not a run", str(tmp_path / "config.toml"))
    assert_one_clear_line(command("--resume", tmp_path / "nothing"), "not a run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda text: text[: text.index("steps = ") + 3], "is not TOML"),
        (lambda text: text.replace("[run]", "[walk]"), "unknown setting 'walk'"),
        (lambda text: text.replace("steps = 160", "steps = 0"), "--steps 0"),
        (lambda text: text.replace("optimizer = ", "optimiser = "), "unknown setting 'optimiser'"),
        (lambda text: text.replace('optimizer = "muon"', 'optimizer = "adamw"'), "does not fit this run"),
    ],
)
def test_resume_with_broken_settings(change, expected, halfway):
    path = halfway / "config.toml"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    before = contents(halfway)
    assert_one_clear_line(command("--resume", halfway), expected)
    assert contents(halfway) == before


def test_init_of_nothing(options, tmp_path, halfway):
    out = tmp_path / "run"
    assert_one_clear_line(command(*further(options), "--init", tmp_path / "nothing", "--out", out), "nothing does not exist")
    (tmp_path / "empty").mkdir()
    assert_one_clear_line(command(*further(options), "--init", tmp_path / "empty", "--out", out), "neither a run")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert_one_clear_line(command(*further(options), "--init", tmp_path / "empty", "--out", out), "names no model_type")
    said = command(*further(options), "--init", halfway, "--width", 64, "--out", out)
    assert_one_clear_line(said, "--width 64 does not go with --init", "which has 32")
    (checkpoints(halfway)[-1] / "model.safetensors").write_bytes(b"")  # its best
    assert_one_clear_line(command(*further(options), "--init", halfway, "--out", out), "model.safetensors has 0 bytes")
    assert not out.exists()


def test_a_loss_that_is_not_finite_is_not_saved(options, tmp_path):
    run = tmp_path / "run"
    changes = {"lr": 1e38, "matrix-lr": 1e38, "clip": 0, "steps": 8, "save-every": 1, "warmup": 0, "out": run}
    said = command(*options, *arguments(changes))
    assert_one_clear_line(said, "the weights are inf or NaN after step 1", "a lower --lr")
    for folder in checkpoints(run):
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
