"""The reference of a run on disk: which weights it was, and log-probabilities that were computed once.

    RUN/reference.json         the SHA-256 of --init's weights: a resume refuses others
    RUN/reference.safetensors  or --dpo.reference-file: a log-probability for each row, by a hash of the row's ids

A file of log-probabilities names the settings that they depend on. Another run may name it too: it reads the rows that it has,
by their hashes, and is refused where a setting differs or a row is missing.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.messages import format_count
from data.shell import quote
from data.transforms.causal import IGNORE
from lora.base import digest
from model.safetensors_file import WeightFile, WeightFileError, save_file
from train.parallel.parallelize import unwrapped
from train.parallel.ranks import own_rows
from train.reference import ROW_IDS, AdapterOffReference, StoredReference, frozen_copy, read_reference, reply_log_probs
from train.runs.errors import CheckpointError, TrainError
from train.runs.open import resolve

if TYPE_CHECKING:
    from train.loop import Run
    from train.preference_task import PreferenceTask

NOTE, TABLE = "reference.json", "reference.safetensors"
IS_NEW = "is_new"  # key of a batch here


def check_reference(run: "Run") -> str:
    """Return the SHA-256 of --init's weights; in a resumed run compare it with that of `note_reference`.

    Errors (CheckpointError): the weights cannot be read, or are others than those that the run began with.
    """
    init, note = run.config.run.init, run.out / NOTE
    sha256 = run.ranks.from_main(lambda: read_reference(lambda: digest(resolve(init))))
    if run.step and note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before["sha256"] != sha256:
            raise CheckpointError(
                f"the reference {init} has other weights than when {run.out} began: bring them back (their hash began with "
                f"{before['sha256'][:12]}), or begin a new run from them, --init {quote(run.out)}"
            )
    return sha256


def note_reference(run: "Run", sha256: str) -> None:
    """Write the hash of --init's weights beside a new run."""
    note = run.out / NOTE
    if run.ranks.is_main and not (run.step and note.is_file()):
        run.out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"init": str(run.config.run.init), "sha256": sha256}, indent=2) + "\n", encoding="utf-8")


def open_table(run: "Run", task: "PreferenceTask", path: Path | None, sha256: str) -> None:
    """Fill the objective's table of log-probabilities: from a file, else by one pass over the data, whose results it keeps.

    Errors (TrainError): a file of other settings or other records; one that cannot be read; sharded weights.
    """
    reference: StoredReference = unwrapped(run.engine.objective).reference
    path = run.out / TABLE if path is None else path
    settings = table_settings(run, sha256)
    batches = list(all_batches(task))
    keys_N = row_keys(run, batches, task.row_count)
    if run.ranks.from_main(path.is_file):
        table_N = read_table(path, settings, keys_N, task.option)
        run.console.info(f"reference {path}: {format_count(len(table_N), 'log-probability', 'log-probabilities')} read")
    else:
        if run.engine.mesh.shard > 1:
            raise TrainError(
                f"{task.option}.reference precomputed: {path} is not there, and sharded weights cannot make it: make it by a "
                f"run of one step without --mesh shard, or {task.option}.reference copy"
            )
        table_N = same_for_same(keys_N, compute_table(run, task, batches))
        if run.ranks.is_main:
            write_table(path, settings, keys_N, table_N)
        run.console.info(f"reference {format_count(len(table_N), 'log-probability', 'log-probabilities')} computed: {path}")
    reference.fill(table_N.to(run.device))


def fill_zeros(run: "Run", task: "PreferenceTask") -> None:
    """Fill the objective's table for a trial of a step."""
    run.console.info("reference its log-probabilities are computed before the first step of the run; zeros stand for them here")
    unwrapped(run.engine.objective).reference.fill(torch.zeros(task.row_count, device=run.device))


def table_settings(run: "Run", sha256: str) -> dict[str, Any]:
    """Return what the log-probabilities of given ids depend on."""
    config = run.config
    asked = {"init_sha256": sha256, "precision": config.speed.precision, "quantize": config.run.quantize}
    return asked | {"ld_alpha": getattr(run.task.settings, "ld_alpha", 1.0)}


def all_batches(task: "PreferenceTask") -> Iterator[dict[str, Tensor]]:
    """Yield batches with every row of the data: of training as the first epoch has them, then those of validation."""
    for source in task.sources.values():
        for first in range(0, source.rows_in_epoch(0), source.batch_size):
            yield source.batch(first)
    yield from task.validation


def row_keys(run: "Run", batches: list[dict[str, Tensor]], count: int) -> Tensor:
    """Return a hash of the ids, labels and weights of each row, N in int64: LD-DPO's weights depend on the other reply."""
    keys_N, objective = torch.zeros(count, dtype=torch.int64), unwrapped(run.engine.objective)
    for batch in batches:
        columns = [batch[name] for name in ("input_ids", "labels")]
        if (weights_BT := objective.token_weights(batch["labels"])) is not None:
            columns.append(weights_BT.double().view(torch.int64))
        for row, length, values_CT in zip(
            batch[ROW_IDS].tolist(), batch["attention_mask"].sum(-1).tolist(), torch.stack(columns, dim=1), strict=True
        ):
            if (values_CT[1] != IGNORE).any():  # rows without labels fill a batch up
                content = values_CT[:, :length].contiguous().numpy().tobytes()
                keys_N[row] = int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)
    return keys_N


def same_for_same(keys_N: Tensor, table_N: Tensor) -> Tensor:
    """Return the table with one value for equal rows, as a file of it is read: rounding differs between batches."""
    place = {key: index for index, key in enumerate(keys_N.tolist())}
    return table_N[[place[key] for key in keys_N.tolist()]]


@torch.no_grad()
def compute_table(run: "Run", task: "PreferenceTask", batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the reference's log-probability of each row, N, computed in the batches in which training reads it first."""
    objective = unwrapped(run.engine.objective)
    policy, frozen = objective.network, objective.frozen
    compute = AdapterOffReference()
    compute.read = objective.read
    network = None
    if run.config.method is None:  # before the first step the policy is its own reference
        network = policy if not run.step else frozen_copy(policy, task.initial)
    was_training = policy.training
    policy.eval()
    dtype = torch.float64 if next(policy.parameters()).dtype == torch.float64 else torch.float32
    table_N, seen_N = torch.zeros(task.row_count, dtype=dtype), torch.zeros(task.row_count, dtype=torch.bool)
    is_quiet = not (run.config.report.verbose and run.ranks.is_main and sys.stderr.isatty())
    for batch in tqdm(batches, desc="reference", unit=" batches", disable=is_quiet, leave=False):
        is_new_B = first_scored(batch, seen_N)  # of all ranks' rows: the last batch goes on with the second epoch's first ones
        own = run._to_device(own_rows(batch | {IS_NEW: is_new_B}, run.ranks))
        is_new_B = own.pop(IS_NEW).cpu()
        inputs, labels_BT = objective.inputs_of(own), own["labels"]
        weights_BT = objective.token_weights(labels_BT)
        with run.engine.autocast():
            if network is None:
                found_B = compute(policy, frozen, own, inputs, labels_BT, weights_BT)
            else:
                found_B = reply_log_probs(network, inputs, labels_BT, weights_BT, objective.read)
        table_N[own[ROW_IDS].cpu()[is_new_B]] = found_B.cpu().to(dtype)[is_new_B]
    policy.train(was_training)
    return run.ranks.sum(table_N)


def first_scored(batch: dict[str, Tensor], seen_N: Tensor) -> Tensor:
    """Return which rows of a batch have labels and come for the first time, B; note them in `seen_N`."""
    is_new = []
    for row, is_scored in zip(batch[ROW_IDS].tolist(), (batch["labels"] != IGNORE).any(-1).tolist(), strict=True):
        is_new.append(is_scored and not seen_N[row])
        seen_N[row] |= is_scored
    return torch.tensor(is_new)


def write_table(path: Path, settings: dict[str, Any], keys_N: Tensor, table_N: Tensor) -> None:
    """Write a file of log-probabilities; it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({"keys": keys_N, "log_probs": table_N}, partial, {"settings": json.dumps(settings)})
    partial.replace(path)


def read_table(path: Path, settings: dict[str, Any], keys_N: Tensor, option: str) -> Tensor:
    """Return the log-probabilities of the rows, N, from a file that may have them in another order, and more."""
    try:
        with WeightFile(path) as file:
            found = {name: torch.empty(file.shape(name), dtype=file.dtype(name)) for name in ("keys", "log_probs")}
            for name, tensor in found.items():
                file.read(name, tensor)
            before = json.loads(file.metadata["settings"])
        keys, log_probs = found["keys"], found["log_probs"]
    except (OSError, WeightFileError, KeyError, ValueError) as error:
        raise TrainError(f"{path} is no file of a reference's log-probabilities: {error}") from error
    if differ := [name for name in settings if before.get(name) != settings[name]]:
        said = "; ".join(f"{name} {before.get(name)!r} there, {settings[name]!r} here" for name in differ)
        raise TrainError(f"{path} is of another reference ({said}): name another {option}.reference-file, or remove it")
    place = {key: index for index, key in enumerate(keys.tolist())}
    missing = [key for key in keys_N.tolist() if key not in place]
    if missing:
        raise TrainError(
            f"{path} lacks {len(missing):,} of the {len(keys_N):,} rows of this run: other records, template, --context or "
            f"{option}.overlong; name another {option}.reference-file, or remove it"
        )
    return log_probs[torch.tensor([place[key] for key in keys_N.tolist()])]
