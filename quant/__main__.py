"""`python -m quant nf4|fp4 FOLDER --out DIR`: a model folder with its linear layers in four bits, and what that cost.

In memory at once: what is 4-bit so far, what stays as it is, and one matrix in the folder's own format. For the perplexity the
4-bit network is scored first and given up; then the original one is read, which must fit alone.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from quant.config import FourBit, QuantError

if TYPE_CHECKING:
    import torch

    from model.config import ModelConfig
    from model.network import Network
    from quant.nf4 import QuantizedTensor
    from quant.report import Layer
    from train.tasks.task import Scores, Task

PICTURE = "quantization.png"
WINDOW = 2048  # tokens of a text that is scored, at the most
TOKENS_AT_ONCE = 2048  # in a batch of short windows
OBJECTIVES = {("decoder", "lm"): "clm", ("encoder", "mlm"): "mlm", ("encoder", "pretraining"): "mlm"}
PARTS = {  # what stays as it is, by the role of a parameter
    "embedding": "embeddings",
    "position": "embeddings",
    "head": "head",
    "norm": "norms and biases",
    "bias": "norms and biases",
    "matrix": "other matrices",
}


@dataclass(frozen=True)
class Options:
    """What all commands here ask."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A model folder, or a run (its best checkpoint, else its last)."""
    out: Path
    """The folder to write; it must be empty, or not there yet."""
    double: bool = True
    """The blocks' scales in eight bits too (double quantization)."""
    block_size: int = 64
    """Weights that share a scale: 32, 64 … 4096."""
    skip: tuple[str, ...] = ()
    """Regular expressions: matrices in whose name one is found stay as they are. Heads and embeddings do anyway."""
    per_layer: bool = False
    """A row of the table for each matrix, however many they are."""
    perplexity: bool = True
    """Score held-out text before and after."""
    corpus: tuple[str, ...] = ()
    """Its validation split is scored: files, folders, globs or a built-in name, as for training. Default: the text that the run
    was trained on; of another folder, Python's documentation."""
    eval_tokens: int = 50_000
    """Score at most so many tokens."""
    cache: Path | None = None
    """Folder for the prepared text. Default: as for training."""
    device: str = "cpu"
    """Where perplexity is measured: cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True)
class Nf4(Options):
    """NF4: sixteen values at the quantiles of a normal distribution. The usual choice, of QLoRA too."""


@dataclass(frozen=True)
class Fp4(Options):
    """FP4: a sign, two bits of exponent, one of fraction. Coarser than NF4 for weights as training leaves them."""


def four_bit(options: Options, scheme: str) -> None:
    settings = FourBit(scheme, options.double, options.block_size, options.skip)
    check_values(options)

    import torch

    import model.hub
    from lora.merge_folder import copy_the_rest, give_back_freed_memory
    from model.account import columns
    from quant.report import account, amount, normal_error, score_line, score_table, table, together
    from train.checkpoint import resolve
    from train.setup import checked_device

    give_back_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, folder = checked_device(options.device), resolve(options.folder)
    refuse_taken(options.out, folder)
    config = model.hub.read_config(folder)
    refuse_quantized(folder)
    matrices = count(config, settings, folder)
    task = held_out(options, config, folder)

    with whole_or_not_there(options.out) as making:
        network, layers = quantized(folder, settings, device, matrices)
        kept = parts(network)
        model.hub.save(network, making)
        copy_the_rest(folder, making)
        files, normal = (bytes_of_weights(folder), bytes_of_weights(making)), normal_error(settings)
        how = f"{scheme}, blocks of {settings.block_size}, {together('', layers).bits:.3f} bits a weight"
        print(f"{how} (error: ‖W − Ŵ‖ / ‖W‖, cosine: of W and Ŵ)")
        print(columns(table(layers, per_layer=options.per_layer)))
        print(f"  the error of normally distributed numbers: {normal:.4f}\n")
        print(columns(account(layers, kept, files)) + "\n")
        if isinstance(task, str):
            said = f"perplexity not measured: {task}"
            print(said)
        else:
            after = score(network, task, scheme)
            del network  # first: beside it the original might not fit
            before = score(model.hub.load(folder, device=device), task, "before")
            said = score_line(before, after)
            print(f"held-out text: {described(task)}\n{columns(score_table(before, after, scheme))}\n")
        title = f"{options.folder.absolute().name}: {how} · {amount(files[0])} → {amount(files[1])}"
        print(drawn(layers, kept, making, options.out, title=title, caption=said, normal=normal))
    print(f"written: {options.out}: {amount(files[1])} of weights, was {amount(files[0])}")
    print(f"try it:  {try_it(config, options.out)}")


def check_values(options: Options) -> None:
    """Training's own limits, before anything is opened."""
    from train.config import ReportConfig, RunConfig, TrainConfig

    TrainConfig(run=RunConfig(threads=options.threads), report=ReportConfig(eval_tokens=options.eval_tokens)).check()


def refuse_taken(out: Path, folder: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise QuantError(f"--out {out} is there already, and is not an empty folder")
    if out.resolve() == Path.cwd():
        raise QuantError(f"--out {out} is the folder that this command runs in: it cannot be replaced when all is written")
    if folder.resolve() in out.resolve().parents:
        raise QuantError(f"--out {out} lies in the folder that is read")


def refuse_quantized(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if settings is not None:
        how = settings.get("bnb_4bit_quant_type") or settings.get("quant_method") if isinstance(settings, dict) else settings
        raise QuantError(f"{folder} is quantized already ({how}): quantize the folder that it was made from")


def count(config: "ModelConfig", settings: FourBit, folder: Path) -> int:
    """How many matrices will be quantized, told from a network without memory, before any text or weight is read."""
    from model.init import empty
    from model.weights import weight_table
    from quant.linear import quantizable

    table = [row for row in weight_table(config).values() if row.layout != "wide"]
    names = {row.name.removesuffix(".weight"): row.published.removesuffix(".weight") for row in table}
    found = quantizable(empty(config, device="meta"), settings.skip, names).keys() & names.keys()
    if not found:
        raise QuantError(f"{folder}: no matrix is left to quantize, with --skip {shlex.join(settings.skip)}")
    return len(found)


@contextmanager
def whole_or_not_there(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which takes its name when all that stands in it is whole; else nothing stays."""
    out = out.resolve()
    making = out.with_name(f".{out.name}.partial-{os.getpid()}")
    making.mkdir(parents=True)
    try:
        yield making
        making.rename(out)
    except BaseException:
        shutil.rmtree(making)
        raise


def quantized(folder: Path, settings: FourBit, device: "torch.device", matrices: int) -> "tuple[Network, list[Layer]]":
    """The network in four bits, and each matrix compared with what it was, while both are there."""
    from tqdm import tqdm

    from model.hub import load
    from quant.report import measure

    layers: list[Layer] = []
    with tqdm(total=matrices, unit="matrix", desc="quantizing", disable=not sys.stderr.isatty(), leave=False) as bar:

        def watch(name: str, weight: "torch.Tensor", small: "QuantizedTensor") -> None:
            layers.append(measure(name, weight, small))
            bar.update()

        return load(folder, quantization=settings, watch=watch).to(device), layers


def parts(network: "Network") -> dict[str, tuple[int, int]]:
    """What stays as it is -> (numbers, bytes). A head that is the embedding is counted there."""
    from model.weights import role_of

    found: dict[str, tuple[int, int]] = dict.fromkeys(PARTS.values(), (0, 0))
    for name, value in network.named_parameters():
        part = PARTS[role_of(network.config, name)]
        numbers, size = found[part]
        found[part] = numbers + value.numel(), size + value.numel() * value.element_size()
    return {part: both for part, both in found.items() if both[0]}


def bytes_of_weights(folder: Path) -> int:
    from model.hub import weight_files

    return sum(path.stat().st_size for path in weight_files(folder))


# ---- scored on text


def held_out(options: Options, config: "ModelConfig", folder: Path) -> "Task | str":
    """The held-out text as training validates on it, or why there is none. Errors only where a corpus was asked for."""
    if not options.perplexity:
        return "--no-perplexity"
    objective = OBJECTIVES.get((config.architecture, config.head))
    if objective is None:
        article = "a" if config.architecture == "decoder" else "an"
        return f"it is that of words in plain text, and this is {article} {config.architecture} with the head {config.head!r}"

    from data.config import DataConfig, DataError
    from data.shards import prepare
    from data.tokenizer import load_tokenizer
    from train.config import NetworkConfig, OptimizerConfig, ReportConfig, RunConfig, TrainConfig, TrainError
    from train.loop import settings
    from train.setup import TASKS

    try:
        tokenizer = load_tokenizer(folder, config.vocab_size)
        run = folder.parents[1]
        is_run = folder.parent.name == "checkpoints" and (run / "config.toml").is_file()
        data = settings(run).data if is_run else DataConfig()
        data = replace(data, corpus=options.corpus or data.corpus, cache=options.cache or data.cache)
        shards = prepare(data, tokenizer=tokenizer, mask=objective == "mlm", say=print, progress=sys.stderr.isatty())
        # No window is longer than the text: what would fill it up costs time, and is not scored.
        text = min(shards.validation.tokens, options.eval_tokens, shards.train.tokens)
        context = max(1, min(config.context, WINDOW, text - 1))
        told = TrainConfig(
            run=RunConfig(objective=objective),
            data=data,
            network=NetworkConfig(context=context),
            optimizer=OptimizerConfig(batch_size=max(1, TOKENS_AT_ONCE // context)),
            report=ReportConfig(eval_tokens=options.eval_tokens),
        )
        return TASKS[objective](told, shards)
    except (DataError, TrainError) as error:
        if options.corpus:
            raise
        return str(error)


def score(network: "Network", task: "Task", what: str) -> "Scores":
    """As training validates: each target once, sums and counts over all of the text."""
    from tqdm import tqdm

    from train.evaluate import evaluate
    from train.loss.losses import LOSSES, choose_loss

    asked, device = task.config, next(network.parameters()).device
    rows = asked.optimizer.batch_size * asked.network.context
    objective = task.objective(network, LOSSES[choose_loss(rows, network.config.vocab_size, device)])
    shown = tqdm(task.validation, unit="batch", desc=f"scoring {what}", disable=not sys.stderr.isatty(), leave=False)
    batches = ({name: value.to(device) for name, value in batch.items()} for batch in shown)
    return task.scores(evaluate(objective, batches))


def described(task: "Task") -> str:
    scored, there = len(task.held_out), task.shards.validation.tokens
    share = f"{scored:,} tokens" if scored == there else f"the first {scored:,} of {there:,} tokens"
    return f"{' '.join(task.config.data.corpus)}, {share} in windows of {task.config.network.context:,}"


# ---- said at the end


def drawn(layers: "list[Layer]", kept: dict[str, tuple[int, int]], making: Path, out: Path, **more: object) -> str:
    """The picture, or why there is none."""
    from quant.plot import plot

    try:
        plot(layers, kept, making / PICTURE, **more)
    except ImportError:
        return "picture: not drawn: matplotlib is not installed (pip install -c constraints.txt -e '.[plots]')"
    return f"picture: {out / PICTURE}"


def try_it(config: "ModelConfig", out: Path) -> str:
    folder, objective = shlex.quote(str(out)), OBJECTIVES.get((config.architecture, config.head))
    if objective == "mlm":
        return f"python -m model fill {folder} 'The [MASK] statement'"
    if config.head == "lm":
        return f"python -m model generate {folder} --prompt 'The'"
    return f"python -m model info {folder}"


COMMANDS: dict[str, tuple[type, Callable[[Options, str], None]]] = {"nf4": (Nf4, four_bit), "fp4": (Fp4, four_bit)}


def main(arguments: list[str]) -> int:
    kinds = {name: kind for name, (kind, _) in COMMANDS.items()}
    options = tyro.extras.subcommand_cli_from_dict(kinds, args=arguments or ["--help"], prog="python -m quant")

    from safetensors import SafetensorError

    from data.config import DataError
    from model.config import ConfigError
    from model.hub import HubError
    from train.checkpoint import CheckpointError
    from train.config import TrainError

    name = next(name for name, kind in kinds.items() if type(options) is kind)
    try:
        COMMANDS[name][1](options, name)
    except (QuantError, DataError, ConfigError, HubError, CheckpointError, TrainError, SafetensorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a terminal without UTF-8
    sys.exit(main(sys.argv[1:]))
