"""`python -m quant SCHEME FOLDER --out DIR`: quantize a model folder's linear layers, and report sizes, errors and perplexity.

Memory holds the layers quantized so far, the unquantized parts, and one matrix in the folder's own dtype; int8-static, whose
inputs are observed first, holds the whole original network. Perplexity is measured on the quantized network first, which is
then freed; the original network, read next, must fit alone.
"""

import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

import touchstone

touchstone.refuse_shadowed()  # before a file of the user's is imported in place of ours

from data.shell import program
from quant.commands.options import KINDS, Int8Static, Options
from quant.config import FourBit, Int8, QuantError
from train.command_line import refuse_idle, refuse_unreadable, run_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from model.config import ModelConfig
    from model.network import Network
    from quant.int8_linear import StaticInput
    from quant.report import Layer
    from train.task import Task

PICTURE = "quantization.png"
PARTS = {  # role of a parameter: the part that it is counted in, of those that are not quantized
    "embedding": "embeddings",
    "position": "embeddings",
    "head": "head",
    "norm": "norms and biases",
    "bias": "norms and biases",
    "matrix": "other matrices",
}


def quantize(options: Options, scheme: str) -> None:
    settings = options.settings(scheme)
    check_limits(options)

    import torch

    import model.hub
    from eval.commands import held_out
    from lora.merge_folder import give_back_freed_memory
    from model.account import align_columns
    from model.commands.try_it import example_command
    from model.folders import atomic_folder, copy_auxiliary_files
    from quant.report import account, amount, described, normal_error, score_line, score_table, table, together
    from train.runs.open import checked_device, resolve

    give_back_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, folder = checked_device(options.device), resolve(options.folder)
    check_out(options.out, folder)
    config = model.hub.read_config(folder)
    check_unquantized(folder)
    paths = find_matrices(config, settings, folder)
    task = open_text_of(options, config, folder, options.corpus) if options.perplexity else "--no-perplexity"

    with atomic_folder(options.out) as making:
        inputs = observe_inputs(options, config, folder, settings, device) if isinstance(options, Int8Static) else None
        network, layers = load_quantized(folder, settings, device, paths, inputs)
        unquantized = unquantized_parts(network)
        with warnings.catch_warnings(record=True) as notes:  # shown at the end, where they are read
            warnings.simplefilter("always")
            model.hub.save(network, making)
        copy_auxiliary_files(folder, making)
        files, normal = (weight_bytes(folder), weight_bytes(making)), normal_error(settings)
        how, what = f"{described(settings)}, {together('', layers).bits:.3f} bits a weight", f"{settings.bits}-bit matrices"
        print(f"{how} (error: ‖W − Ŵ‖ / ‖W‖, cosine: of W and Ŵ)")
        print(align_columns(table(layers, per_layer=options.per_layer)))
        print(f"  the error of normally distributed numbers: {normal:.4f}\n")
        print(align_columns(account(what, layers, unquantized, files)) + "\n")
        if isinstance(task, str):
            said = f"perplexity not measured: {task}"
            print(said)
        else:
            dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
            after = held_out.score(network, task, scheme)
            del network  # first: both might not fit into memory
            before = held_out.score(model.hub.load(folder, device=device, check_finite=True), task, "before")
            said = score_line(before, after)
            exact = "" if dtype == "float32" else f", computed in {dtype}"
            print(f"held-out text: {held_out.describe(task)}{exact}\n{align_columns(score_table(before, after, scheme))}\n")
        title = f"{options.folder.absolute().name}: {how} · {amount(files[0])} → {amount(files[1])}"
        print(draw(layers, unquantized, making, options.out, what=what, title=title, caption=said, normal=normal))
    for note in notes:
        print(f"note: {note.message}")
    print(f"written: {options.out}: {amount(files[1])} of weights, was {amount(files[0])}")
    print(f"try it:  {example_command(options.out)}")


def check_limits(options: Options) -> None:
    """Check values against training's limits, before anything is opened."""
    from train.config import ReportConfig, RunConfig, TrainConfig

    TrainConfig(run=RunConfig(threads=options.threads), report=ReportConfig(eval_tokens=options.eval_tokens)).check()


def check_out(out: Path, folder: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise QuantError(f"--out {out} is there already, and is not an empty folder")
    if out.resolve() == Path.cwd():
        raise QuantError(f"--out {out} is the folder that this command runs in: it cannot be replaced when all is written")
    if folder.resolve() in out.resolve().parents:
        raise QuantError(f"--out {out} lies in the folder that is read")


def check_unquantized(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if settings is not None:
        raise QuantError(f"{folder} is quantized already ({scheme_in(settings)}): quantize the folder that it was made from")


def scheme_in(config: object) -> str:
    """Return the scheme of a `quantization_config`, or its method where it is not read here."""
    from quant.forms import form_of_config

    try:
        return form_of_config(config).read_config(config).scheme
    except QuantError:
        return str(config.get("quant_method") if isinstance(config, dict) else config)


def find_matrices(config: "ModelConfig", settings: FourBit | Int8, folder: Path) -> dict[str, str]:
    """Return our path → published name of the layers that will be quantized.

    They are found in a network on the meta device, before any text or weight is read.
    """
    from model.init import empty_network
    from model.weights import weight_table
    from quant.linear import quantizable_layers

    table = [row for row in weight_table(config).values() if row.layout != "wide"]
    names = {row.name.removesuffix(".weight"): row.published.removesuffix(".weight") for row in table}
    found = quantizable_layers(empty_network(config, device="meta"), settings.skip, names).keys() & names.keys()
    if not found:
        raise QuantError(f"{folder}: no matrix is left to quantize, with --skip {shlex.join(settings.skip)}")
    return {path: name for path, name in names.items() if path in found}


def load_quantized(
    folder: Path,
    settings: FourBit | Int8,
    device: "torch.device",
    paths: dict[str, str],
    inputs: "dict[str, StaticInput] | None",
) -> "tuple[Network, list[Layer]]":
    """Load the network quantized, and compare each matrix with the original while both are in memory."""
    from tqdm import tqdm

    from model.hub import load
    from quant.report import measure

    layers: list[Layer] = []
    with tqdm(total=len(paths), unit="matrix", desc="quantizing", disable=not sys.stderr.isatty(), leave=False) as bar:

        def add_measure(name: str, weight: "Tensor", quantized: "nn.Module") -> None:
            layers.append(measure(name, weight, quantized))
            bar.update()

        return load(folder, quantization=settings, inputs=inputs, on_layer=add_measure).to(device), layers


def observe_inputs(
    options: Int8Static, config: "ModelConfig", folder: Path, settings: Int8, device: "torch.device"
) -> "dict[str, StaticInput]":
    """Observe the range of each layer's input on text of the training split."""
    from tqdm import tqdm

    from data.config import DataError
    from model.hub import load
    from quant.calibrate import observe
    from quant.int8 import Grid
    from train.losses.cross_entropy import linear_cross_entropy

    try:
        text = open_text_of(options, config, folder, options.calibrate or options.corpus, scored=False)
    except DataError as error:
        raise QuantError(str(error).replace("--corpus", "--calibrate" if options.calibrate else "--corpus")) from None
    if isinstance(text, str):
        raise QuantError(f"--calibrate: inputs need text to be observed on: {text}")
    if options.calibrate_tokens < 1:
        raise QuantError(f"--calibrate-tokens {options.calibrate_tokens}: the calibration set is empty")
    asked = text.config
    tokens = min(options.calibrate_tokens, text.shards.train.tokens)
    steps = range(-(-tokens // (asked.optimizer.batch_size * asked.network.context)))
    shown = tqdm(steps, unit="batch", desc="observing", disable=not sys.stderr.isatty(), leave=False)
    made = (batch for step in shown for batch in text.source.batches(step))
    batches = ({name: value.to(device) for name, value in batch.items()} for batch in made)
    network = load(folder, device=device, check_finite=True)
    objective = text.objective(network, linear_cross_entropy)
    inputs = observe(
        network,
        batches,
        lambda network, batch: objective(batch),
        observer=options.observer,
        grid=Grid(symmetric=not settings.affine_inputs),
        skip=settings.skip,
    )
    rows = len(steps) * asked.optimizer.batch_size * asked.network.context
    print(f"inputs observed ({options.observer}) on {' '.join(asked.data.corpus)}: {rows:,} tokens of its training split")
    return inputs


def unquantized_parts(network: "Network") -> dict[str, tuple[int, int]]:
    """Return part → (numbers, bytes) of what is not quantized. A head tied to the embedding is counted there."""
    from model.weights import role_of

    found: dict[str, tuple[int, int]] = dict.fromkeys(PARTS.values(), (0, 0))
    for name, value in network.named_parameters():
        part = PARTS[role_of(network.config, name)]
        numbers, size = found[part]
        found[part] = numbers + value.numel(), size + value.numel() * value.element_size()
    return {part: both for part, both in found.items() if both[0]}


def weight_bytes(folder: Path) -> int:
    from model.hub import weight_files

    return sum(path.stat().st_size for path in weight_files(folder))


def open_text_of(
    options: Options, config: "ModelConfig", folder: Path, corpus: tuple[str, ...], *, scored: bool = True
) -> "Task | str":
    """Open the text as training does; windows of unscored text do not depend on `--eval-tokens`."""
    from eval.commands.held_out import open_text

    tokens = options.eval_tokens if scored else Options.eval_tokens
    reading = {"text_key": options.text_key, "on_bad_text": options.on_bad_text}
    return open_text(folder, config, corpus=corpus, cache=options.cache, eval_tokens=tokens, **reading)


# ---- said at the end


def draw(layers: "list[Layer]", unquantized: dict[str, tuple[int, int]], making: Path, out: Path, **more: object) -> str:
    """Draw the picture and return a line that names it, or why there is none."""
    from quant.plot import plot

    try:
        plot(layers, unquantized, making / PICTURE, **more)
    except ImportError:
        return "picture: not drawn: matplotlib is not installed (pip install -c constraints.txt -e '.[plots]')"
    return f"picture: {out / PICTURE}"


def main(arguments: list[str]) -> int:
    def act() -> None:
        refuse_unreadable(arguments, QuantError)
        options = tyro.extras.subcommand_cli_from_dict(KINDS, args=arguments or ["--help"], prog=program("quant"))
        refuse_idle(options, options.NEEDS, arguments, QuantError)
        quantize(options, next(name for name, kind in KINDS.items() if type(options) is kind))

    return run_command(act, failures)


def failures() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    from data.config import DataError
    from model.config import ConfigError
    from model.hub import HubError
    from train.runs.errors import CheckpointError, TrainError

    return QuantError, DataError, ConfigError, HubError, CheckpointError, TrainError, SafetensorError, OSError


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without UTF-8, and for names of files that are none
    sys.exit(main(sys.argv[1:]))
