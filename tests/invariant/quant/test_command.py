"""`python -m quant nf4|fp4`: its table, perplexities and picture beside direct computations, and a folder that opens."""

import json
import math
import re
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from unittest.mock import call, patch

import bitsandbytes
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from torch.nn import functional as F

import model.__main__
import model.hub
import quant.__main__
from data.config import MASK, DataConfig
from data.corpus.prepare import prepare
from data.corpus.split import split_fraction
from data.packing.blocks import sequential_blocks
from data.tokenizer.open import load_tokenizer
from data.transforms.masked import VALIDATION_STEP, mlm_batch
from eval.commands import held_out
from model.account import align_columns
from quant import dequantize, report
from quant.config import FourBit
from quant.layer import QuantizedLinear
from quant.linear import quantized_layers
from quant.nf4 import quantize
from tests.compare import relative
from tests.conftest import randomized, tiny_config
from tests.invariant.house.test_command_line import HEAVY, HELP
from tests.oracle.believed import without_packing
from tests.runs import ROOT, WORDS, Said, command, last_checkpoint, torch_as_it_was, write_corpus
from train.reports.log import read_metrics

WHOLE = {"width": 64, "mlp_width": 128, "context": 32}  # of whole blocks: elsewhere bitsandbytes' values depend on the machine


def quantized(*options: object, draw: bool = False) -> Said:
    """The command; but for where the picture is looked at, without the second that it takes."""
    with nullcontext() if draw else patch("quant.plot.plot"):
        return command(*options, main=quant.__main__.main)


def shown(said: Said, first: str) -> list[str]:
    """The cells of the line that begins so."""
    (line,) = [line for line in said.out.splitlines() if line.strip().startswith(first + " ")]
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture(scope="module")
def nf4_run(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "nf4"
    said = quantized("nf4", finished, "--out", out, draw=True)
    assert said.code == 0 and not said.err, said.err
    return said, out


class Text:
    """A corpus, its cache, and folders of random networks with a tokenizer of it."""

    def __init__(self, folder: Path):
        self.folder, self.corpus, self.cache = folder, write_corpus(folder / "corpus"), folder / "cache"
        self.asked = ("--corpus", self.corpus, "--cache", self.cache)

    def shards(self, tokenizer=None, mask=False):
        config = DataConfig(corpus=(str(self.corpus),), cache=self.cache, vocab_size=320)
        return prepare(config, tokenizer=tokenizer, controls=[MASK] if mask else [])

    def network(self, name: str, family: str, *, mask: bool = False, dtype: torch.dtype = torch.float32, **changes) -> Path:
        folder = self.folder / name
        if not folder.exists():
            tokenizer = self.shards(mask=mask).tokenizer
            ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
            network = randomized(tiny_config(family, **(ids | WHOLE | changes)), dtype=dtype)
            model.hub.save(network, folder)
            tokenizer.save(folder)
        return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tmp_path_factory.mktemp("text"))


def dense_and_small(before: Path, after: Path) -> dict[str, tuple[torch.Tensor, QuantizedLinear]]:
    """Our name -> the weight as it was, in the order of the file, and the layer that it became."""
    network = model.hub.load(after)
    old = dict(model.hub.load(before).named_parameters())
    found = {path: module for path, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    return {path: (old[f"{path}.weight"], module) for path, module in found.items()}


# ---- the table


GPT2 = {"attention.project.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def test_the_table_beside_a_direct_computation(finished, nf4_run):
    said, out = nf4_run
    pairs = dense_and_small(last_checkpoint(finished), out)
    assert len(pairs) == 8
    before = after = 0
    for path, (w, layer) in pairs.items():
        number, ours = re.fullmatch(r"body\.blocks\.(\d)\.(.*)", path).groups()
        v, small = layer.weight.dequantize(torch.float32).double(), layer.weight
        w = w.detach().double()
        error, cosine = float((w - v).norm() / w.norm()), float((w * v).sum() / (w.norm() * v.norm()))
        kept = [small.packed, small.absmax, small.nested_absmax, small.offset]  # without the maps, which all have alike
        size = sum(part.nbytes for part in kept)
        assert shown(said, f"transformer.h.{number}.{GPT2[ours]}")[1:] == [
            f"{w.size(0)} × {w.size(1)}",
            report.amount(4 * w.numel()),
            report.amount(size),
            f"{8 * size / w.numel():.3f}",
            f"{error:.4f}",
            f"{cosine:.5f}",
        ]
        before, after = before + 4 * w.numel(), after + size
    assert shown(said, "all")[1:5] == ["8", report.amount(before), report.amount(after), f"{32 * after / before:.3f}"]
    assert shown(said, "4-bit matrices")[1:] == [f"{before // 4:,}", report.amount(before), report.amount(after)]


def test_what_stays_and_the_files(finished, nf4_run):
    said, out = nf4_run
    old, new = last_checkpoint(finished), model.hub.load(out)
    config = new.config
    embeddings = config.width * (config.vocab_size + config.context)
    assert shown(said, "embeddings")[1:] == [f"{embeddings:,}", *[report.amount(4 * embeddings)] * 2]
    rest = sum(value.numel() for value in new.parameters()) - embeddings
    assert shown(said, "norms and biases")[1:] == [f"{rest:,}", *[report.amount(4 * rest)] * 2]
    assert not re.search(r"^ *(head|other matrices) ", said.out, re.MULTILINE)  # the head is the embedding
    files = [report.amount((folder / "model.safetensors").stat().st_size) for folder in (old, out)]
    count = sum(value.numel() for value in model.hub.load(old).parameters())
    assert shown(said, "files of weights")[1:] == [f"{count:,}", *files]
    assert f"written: {out}: {files[1]} of weights, was {files[0]}\n" in said.out
    assert f"try it:  python -m model generate {out} --prompt The\n" in said.out
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "quantization.png"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    }
    assert {path.name for path in out.parent.iterdir()} == {"nf4"}


SHAPES = [(1, 1), (3, 5), (64, 64), (7, 4099), (100, 700)]


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_measured_in_pieces(scheme, dtype, monkeypatch):
    monkeypatch.setattr(dequantize, "DEQUANTIZE_CHUNK", 4096)
    monkeypatch.setattr(report, "IN_CACHE", 1000)
    for number, shape in enumerate(SHAPES):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        small = quantize(weight, scheme=scheme)
        found = report.measure("a.0.weight", weight, small)
        w, v = weight.double(), small.dequantize(torch.float32).double()
        # 1e-13: float64, sums in another order
        assert found.error == pytest.approx(float((w - v).norm() / w.norm()), rel=1e-13)
        assert found.cosine == pytest.approx(float((w * v).sum() / (w.norm() * v.norm())), rel=1e-13)
        assert (found.before, found.after, found.bits) == (weight.nbytes, small.nbytes, small.bits)
    whole = quantize(torch.ones(4096, 64))
    assert f"{report.measure('', torch.ones(4096, 64), whole).bits:.3f}" == "4.127"


def test_a_matrix_of_zeros_has_no_error():
    weight = torch.zeros(4, 64)
    for double in (True, False):
        found = report.measure("zeros.weight", weight, quantize(weight, double_quantized=double))
        assert (found.name, found.error, found.cosine) == ("zeros", 0.0, 1.0)


def test_together_is_one_large_matrix():
    weights = [torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in range(3)]
    layers = [report.measure(f"h.{n}.x.weight", w, quantize(w, double_quantized=False)) for n, w in enumerate(weights)]
    whole = torch.cat(weights)
    one, all_ = report.measure("all", whole, quantize(whole, double_quantized=False)), report.together("all", layers)
    assert (all_.numbers, all_.before, all_.after) == (one.numbers, one.before, one.after)
    assert all_.error == pytest.approx(one.error, rel=1e-13) and all_.cosine == pytest.approx(one.cosine, rel=1e-13)
    assert all_.error != pytest.approx(sum(layer.error for layer in layers) / 3, rel=1e-6)  # the mutant: a mean of errors


def test_many_matrices_are_shown_by_kind(text):
    folder = text.network("deep", "llama", depth=5, dtype=torch.bfloat16)
    short = quantized("nf4", folder, "--out", text.folder / "short", "--no-perplexity")
    long = quantized("nf4", folder, "--out", text.folder / "long", "--no-perplexity", "--per-layer")
    assert short.code == long.code == 0
    names = re.findall(r"^  (model\.layers\S+)", short.out, re.MULTILINE)
    assert len(names) == 7 and all(name.startswith("model.layers.N.") for name in names)
    assert len(re.findall(r"^  model\.layers\.\d\.", long.out, re.MULTILINE)) == 35
    network = model.hub.load(folder)
    weights = [block.mlp.down.weight.detach() for block in network.body.blocks]
    w_LOI = torch.stack(weights).double()
    e_LOI = w_LOI - torch.stack([quantize(weight).dequantize(torch.float32) for weight in weights]).double()
    errors = (e_LOI.flatten(1).norm(dim=1) / w_LOI.flatten(1).norm(dim=1)).tolist()
    worst = max(range(5), key=errors.__getitem__)
    cells = shown(short, "model.layers.N.mlp.down_proj")
    assert cells[1:3] == ["5", report.amount(5 * 64 * 128 * 2)]
    assert cells[5] == f"{float(e_LOI.norm() / w_LOI.norm()):.4f}" and cells[7:] == [f"{errors[worst]:.4f}", str(worst)]
    assert shown(long, f"model.layers.{worst}.mlp.down_proj")[5] == cells[7]
    assert shown(long, "all") == shown(short, "all")[:7]


# ---- perplexity


def loss_of(network, ids, context: int, bos_id: int) -> tuple[float, int]:
    """Each document's part of each window by itself, so that nothing of masks, positions and labels is taken from elsewhere."""
    nats, count = 0.0, 0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        begins = [0, *(place for place in range(1, len(window)) if window[place] == bos_id), len(window)]
        for first, last in pairwise(begins):
            # what follows the last token of a part is the next document's beginning, which is not scored
            part = torch.tensor([window[first:last]])
            if part.size(1) > 1:
                with torch.no_grad():
                    logits = network(part[:, :-1]).logits[0].double()
                nats += float(F.cross_entropy(logits, part[0, 1:], reduction="sum"))
                count += part.size(1) - 1
    return nats, count


def scores(said: Said, row: str) -> list[float]:
    return [float(cell.replace(",", "").removesuffix("%").replace("× ", "")) for cell in shown(said, row)[1:]]


def test_perplexity_is_that_of_each_document_by_itself(finished, nf4_run):
    said, out = nf4_run
    table = tomllib.loads((finished / "config.toml").read_text())
    data = DataConfig(**table["data"] | {"corpus": tuple(table["data"]["corpus"]), "cache": Path(table["data"]["cache"])})
    with torch_as_it_was():
        shards = prepare(data, tokenizer=load_tokenizer(last_checkpoint(finished), 320))
        ids = shards.validation.ids.tolist()
        for row, folder in (("before", last_checkpoint(finished)), ("nf4", out)):
            nats, count = loss_of(model.hub.load(folder), ids, 32, shards.tokenizer.bos_id)
            assert count == shards.validation.targets
            loss, perplexity, bits = scores(said, row)
            # half of the last digit that is shown, and 1e-5 for float32
            assert loss == pytest.approx(nats / count, abs=6e-5)
            assert perplexity == pytest.approx(math.exp(nats / count), rel=1e-5, abs=6e-3)
            assert bits == pytest.approx(nats / math.log(2) / shards.validation.bytes, abs=6e-5)
    assert f"{len(ids):,} tokens in windows of 32\n" in said.out
    last = read_metrics(finished / "metrics.jsonl")[-1]  # what training said of the same text
    assert last["split"] == "validation" and scores(said, "before")[0] == pytest.approx(last["loss"], abs=6e-5)
    (before, old, _), (after, new, _), (change, factor, _) = (scores(said, row) for row in ("before", "nf4", "change"))
    assert change == pytest.approx(after - before, abs=1.6e-4) and factor == pytest.approx(new / old, abs=2e-3)


def test_as_many_tokens_as_asked(finished, tmp_path):
    said = quantized("nf4", finished, "--out", tmp_path / "out", "--eval-tokens", 300)
    assert said.code == 0 and re.search(r"the first 300 of [\d,]+ tokens in windows of 32\n", said.out)


def test_no_window_is_longer_than_asked_and_the_text_is_kept_where_asked(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "WINDOW", 16)
    said = quantized("nf4", finished, "--out", tmp_path / "out", "--eval-tokens", 300, "--cache", tmp_path / "cache")
    assert said.code == 0 and "tokens in windows of 16\n" in said.out
    assert any((tmp_path / "cache").iterdir())


def test_a_window_is_no_longer_than_the_text_for_training_either(text, tmp_path):
    """Which is not scored, though a batch of it must be there."""
    (tmp_path / "corpus").mkdir()
    long = next(each for n in range(9999) if split_fraction(each := f"the file {n} reads " * 200) < 0.002)
    for number, words in enumerate([long, *(f"{name} {name}" for name in WORDS[:20])]):
        (tmp_path / "corpus" / f"{number}.txt").write_text(words)
    folder = text.network("wide", "llama", context=512)
    asked = ("--corpus", tmp_path / "corpus", "--cache", tmp_path / "cache")
    said = quantized("nf4", folder, "--out", tmp_path / "out", *asked)
    assert said.code == 0, said.err
    data = DataConfig(corpus=(str(tmp_path / "corpus"),), cache=tmp_path / "cache")
    shards = prepare(data, tokenizer=load_tokenizer(folder))
    assert shards.train.tokens < 512 < shards.validation.tokens
    assert f" in windows of {shards.train.tokens - 1}\n" in said.out


def test_masked_words_are_scored_as_such(text, tmp_path):
    folder = text.network("masked", "bert", mask=True)
    said = quantized("nf4", folder, "--out", tmp_path / "out", *text.asked)
    assert said.code == 0, said.err
    assert "pseudo-perplexity" in said.out and "bits per byte" not in said.out
    assert f"python -m model fill {tmp_path / 'out'} " in said.out
    shards = text.shards(load_tokenizer(folder), mask=True)
    tokenizer, block = shards.tokenizer, torch.cat(list(sequential_blocks(shards.validation.ids, 32, 64)))
    masks = {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids, "bos_id": tokenizer.bos_id}
    batch = mlm_batch(
        block[:, :-1],
        seed=0,
        step=VALIDATION_STEP,
        first_row=0,
        vocab_size=tokenizer.vocab_size,
        mask_replace_prob=1.0,
        random_replace_prob=0.0,
        **masks,
    )
    labels = batch.pop("labels")
    for row, place in (("before", folder), ("nf4", tmp_path / "out")):
        with torch.no_grad():
            logits = model.hub.load(place)(**batch).logits[labels != -100].double()
        scored = labels[labels != -100]
        loss, perplexity, accuracy = scores(said, row)
        assert loss == pytest.approx(float(F.cross_entropy(logits, scored)), abs=6e-5)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert accuracy == pytest.approx(100 * float((logits.argmax(-1) == scored).double().mean()), abs=6e-3)


@pytest.mark.parametrize(
    "family, head, why",
    [("bert", "sequence", "an encoder with the head 'sequence'"), ("t5", "lm", "an encoder-decoder with the head 'lm'")],
)
def test_why_there_is_no_perplexity(family, head, why, text, tmp_path):
    folder = text.network(f"{family}-{head}", family, mask=family == "bert", head=head)
    said = quantized("nf4", folder, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert "perplexity not measured: " in said.out and why in said.out
    shown = {"lm": "generate", "sequence": "predict"}.get(head, "info")
    assert f"try it:  python -m model {shown} {tmp_path / 'out'}" in said.out
    assert model.hub.load(tmp_path / "out").config.head == head


def test_a_tokenizer_without_a_mask(text, tmp_path):
    said = quantized("nf4", text.network("unmasked", "bert"), "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert "perplexity not measured: this objective needs a mask token" in said.out


def test_without_a_tokenizer(tmp_path):
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path / "in")
    said = quantized("nf4", tmp_path / "in", "--out", tmp_path / "out")
    assert said.code == 0 and "perplexity not measured: " in said.out and "no tokenizer can be read there" in said.out
    assert model.hub.load(tmp_path / "out").source == tmp_path / "out"


def test_threads(text, tmp_path):
    with patch("torch.set_num_threads") as set_threads:
        said = quantized("nf4", text.network("plain", "llama"), "--out", tmp_path / "out", "--no-perplexity", "--threads", 3)
    assert said.code == 0 and call(3) in set_threads.call_args_list


def test_fp4_is_coarser(finished, nf4_run, tmp_path):
    said = quantized("fp4", finished, "--out", tmp_path / "fp4", "--no-perplexity", "--no-double", "--block-size", 128)
    assert said.code == 0
    entry = json.loads((tmp_path / "fp4" / "config.json").read_text())["quantization_config"]
    assert (entry["bnb_4bit_quant_type"], entry["bnb_4bit_use_double_quant"]) == ("fp4", False)
    coarse, fine = (dense_and_small(last_checkpoint(finished), folder) for folder in (tmp_path / "fp4", nf4_run[1]))
    for path, (w, layer) in coarse.items():
        assert layer.weight.block_size == 128 and not layer.weight.double_quantized
        errors = [(w - each.dequantize()).norm() for each in (layer, fine[path][1])]
        assert errors[0] > 1.1 * errors[1], path  # of normal numbers 1.33 times
    assert shown(said, "all")[4] == f"{4 + 32 / 128:.3f}"


# ---- the folder


def test_it_opens_here(finished, nf4_run):
    out = nf4_run[1]
    said = command("generate", out, "--prompt", "the file", "--max-new-tokens", 10, main=model.__main__.main)
    assert said.code == 0 and said.out.startswith("the file")
    network, old = model.hub.load(out), dict(model.hub.load(last_checkpoint(finished)).named_parameters())
    for name, value in network.named_parameters():
        assert torch.equal(value, old[name]), name  # what is not quantized is what it was
    for w, layer in dense_and_small(last_checkpoint(finished), out).values():
        small = quantize(w.detach())
        assert torch.equal(layer.weight.packed, small.packed) and torch.equal(layer.weight.absmax, small.absmax)


def test_it_opens_in_transformers(text, tmp_path, parity):
    out = tmp_path / "out"
    assert quantized("nf4", text.network("plain", "llama"), "--out", out, "--no-perplexity").code == 0
    theirs = without_packing(transformers.AutoModelForCausalLM.from_pretrained(out).eval())
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in theirs.modules()) == 14
    words = "the file reads a list of objects"
    ids = torch.tensor([load_tokenizer(out).encode(words)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(words, add_special_tokens=False).input_ids == ids[0].tolist()
    with torch.no_grad():
        ours, other = model.hub.load(out)(ids).logits, theirs(ids).logits
    library, reason = f"bitsandbytes {bitsandbytes.__version__}", "float32 rounding; sums in another order"
    parity("python -m quant: logits", library, relative(ours, other), 1e-6, reason)


def test_what_is_skipped_stays(text, tmp_path):
    folder = text.network("plain", "llama")
    said = quantized("nf4", folder, "--out", tmp_path / "out", "--no-perplexity", "--skip", r"layers\.0\.", "o_proj$")
    assert said.code == 0
    layers = {path for path, m in model.hub.load(tmp_path / "out").named_modules() if isinstance(m, QuantizedLinear)}
    rest = ("attention.project.query", "attention.project.key", "attention.project.value", "mlp.gate", "mlp.up", "mlp.down")
    assert layers == {f"body.blocks.1.{name}" for name in rest}
    other = 64 * (64 + 2 * 32 + 64 + 3 * 128) + 64 * 64  # of layer 0: q, k and v of two heads, o, the MLP; and o of layer 1
    assert shown(said, "other matrices")[1:] == [f"{other:,}", *[report.amount(4 * other)] * 2]


@pytest.mark.parametrize("family", ["llama", "roformer", "t5"])
def test_the_matrices_are_counted_before(family, tmp_path):
    """Those that transformers keeps too are no part of them."""
    config, settings = tiny_config(family), FourBit(skip=("0.*query",))
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path)
    found = quantized_layers(model.hub.load(tmp_path, quantization=settings))
    assert quant.__main__.find_matrices(config, settings, tmp_path).keys() == found.keys() and found


# ---- the picture


def test_the_picture(finished, nf4_run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), Path(path).touch()))
    said = quantized("nf4", finished, "--out", tmp_path / "out", "--eval-tokens", 300, draw=True)
    assert said.code == 0 and f"picture: {tmp_path / 'out' / 'quantization.png'}\n" in said.out
    (figure,) = drawn
    errors, sizes = figure.axes
    lines = {line.get_label(): line for line in errors.lines}
    assert set(lines) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "normal numbers"}
    for label in set(lines) - {"normal numbers"}:
        assert list(lines[label].get_xdata()) == [0, 1]
        wanted = [shown(said, f"transformer.h.{number}.{label}")[5] for number in (0, 1)]
        assert [f"{error:.4f}" for error in lines[label].get_ydata()] == wanted
    assert f"{lines['normal numbers'].get_ydata()[0]:.4f}" in said.out.partition("normally distributed numbers: ")[2][:6]
    assert [bar.get_label() for bar in sizes.containers] == ["4-bit matrices", "embeddings", "norms and biases"]
    before, after = (bar.get_width() for bar in sizes.containers[0])
    assert shown(said, "4-bit matrices")[2:] == [report.amount(before), report.amount(after)]
    old, new = shown(said, "before")[2], shown(said, "nf4")[2]
    assert f"perplexity {old} before, {new} after" in figure.get_supxlabel() and "4.1" in figure.get_suptitle()
    assert (nf4_run[1] / "quantization.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib(text, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    said = quantized("nf4", text.network("plain", "llama"), "--out", tmp_path / "out", "--no-perplexity", draw=True)
    assert said.code == 0 and "picture: not drawn: matplotlib is not installed" in said.out
    assert model.hub.load(tmp_path / "out") and not (tmp_path / "out" / "quantization.png").exists()


# ---- the command


HELPS = {"": ["nf4", "fp4"], "fp4 --help": ["--out", "--no-double", "--block-size", "--skip", "--corpus", "--eval-tokens"]}


@pytest.mark.parametrize("line, words", HELPS.items())
def test_help_needs_no_torch(line, words):
    done = subprocess.run([sys.executable, "-c", HELP, "quant", *line.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    help, _, loaded = done.stdout.partition("loaded:")
    assert not set(HEAVY) & set(loaded.split()) and all(word in help for word in ["python -m quant", *words])


def test_rows_are_columns():
    one = report.measure("h.0.x.weight", torch.ones(2, 64), quantize(torch.ones(2, 64)))
    rows = report.table([one])
    assert len({len(row) for row in rows}) == 1 and "h.0.x" in align_columns(rows)
    assert [len(report.table([one] * count)) for count in (32, 33)] == [1 + 32 + 1, 1 + 1 + 1]  # above 32, a row for each kind
    assert FourBit().block_size == 64 and 0.09 < report.normal_error(FourBit()) < 0.1 < report.normal_error(FourBit("fp4"))
    assert report.normal_error(FourBit(block_size=4096)) > 0.1 > report.normal_error(FourBit(double_quantized=False))
    assert report.normal_error(FourBit(double_quantized=False)) != report.normal_error(FourBit())


PEAK = """
import sys
import torch
from quant.__main__ import main
small, base, out = sys.argv[1:]
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
assert main(["nf4", small, "--no-perplexity", "--out", out + "-small"]) == 0  # a first use imports and sets up
before = peak()
assert main(["nf4", base, "--no-perplexity", "--out", out]) == 0
print(peak() - before)
"""
BUFFERS = 10_000_000  # bytes, for what is read, quantized and compared a piece at a time


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_is_that_of_the_result(text, tmp_path):
    """243 MB, of which 53 stay: they stand there twice while they are written, and never beside all of the original."""
    sizes = {"width": 1024, "depth": 4, "mlp_width": 3072, "heads": 8, "kv_heads": 8, "vocab_size": 3000}
    base = text.network("large", "llama", tie_embeddings=False, **sizes)
    line = [sys.executable, "-c", PEAK, text.network("plain", "llama"), base, tmp_path / "out"]
    done = subprocess.run([*map(str, line)], cwd=ROOT, capture_output=True, text=True, check=True)
    grown, result = int(done.stdout.splitlines()[-1]), (tmp_path / "out" / "model.safetensors").stat().st_size
    largest, whole = 4 * 1024 * 3072, (base / "model.safetensors").stat().st_size
    print(f"grown {grown / 1e6:.1f} MB; result {result / 1e6:.1f}, largest {largest / 1e6:.1f}, original {whole / 1e6:.1f} MB")
    assert grown < 2 * result + largest + BUFFERS < 0.6 * whole
