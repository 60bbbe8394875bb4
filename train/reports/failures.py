"""Messages about a run that cannot go on: what happened, what is safe, and what to type next."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from data.shell import command, quote
from quant.linear import quantized_layers
from train.freeze import frozen_names
from train.parallel.ranks import is_connection_error
from train.reports.memory import suggest_options, training_settings
from train.reports.view import RunView
from train.runs.errors import TrainError
from train.step import StepResult

LIBRARIES = 2**30  # bytes of a GPU for the CUDA context and the workspaces of libraries, roughly
NAMED = 12  # documents of a batch that a message names


@contextmanager
def explained_errors(run: RunView) -> Iterator[None]:
    """A block whose errors become a TrainError with advice: memory, a lost rank, a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output has gone
    except torch.OutOfMemoryError as error:
        raise TrainError(out_of_memory(run, error)) from error
    except RuntimeError as error:
        if not (run.ranks.world > 1 and is_connection_error(error)):
            raise
        raise TrainError(
            f"rank {run.ranks.rank}: at step {run.step + 1} another rank was gone ({str(error).splitlines()[0]}). The "
            f"checkpoints in {run.out} are untouched: torchrun … -m train --resume {quote(run.out)}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"could not write at step {run.step}: {error}. The checkpoints in {run.out} are untouched; "
            f"when there is room: {command('train', '--resume', run.out)}"
        ) from error


def batch_description(result: StepResult, step: int, origin: Sequence[str]) -> str:
    """A step with a non-finite loss or gradient, and the documents of its batch."""
    named = ", ".join(origin[:NAMED]) + (f" and {len(origin) - NAMED} more" if len(origin) > NAMED else "")
    loss, norm = float(result.loss), float(result.grad_norm)
    return f"step {step}: the loss is {loss}, the gradients' norm {norm}; its batch held {named}"


def nonfinite_step(run: RunView, description: str, in_a_row: int) -> str:
    times = f" ({in_a_row} steps in a row)" if in_a_row > 1 else ""
    return (
        f"{description}{times}. Nothing was saved since the last checkpoint in {run.out}. To leave such batches out: "
        f"`{command('train', '--resume', run.out, '--on-nonfinite', 'skip')}`; or begin anew with a lower --lr and "
        "--matrix-lr, or --precision fp32"
    )


def nonfinite_state(run: RunView, what: str) -> str:
    """The message for a non-finite loss or weight; `what`: which one, and at which step."""
    advice = "Try a lower --lr and --matrix-lr, or --precision fp32"
    return f"{what}; nothing was saved since the last checkpoint in {run.out}. {advice}"


def memory_of(device: torch.device) -> int:
    """The memory of a GPU in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


def out_of_memory(run: RunView, error: Exception) -> str:
    """A step that exceeded the GPU's memory: what it needs, and options that fit. (Sharded weights cannot be estimated.)"""
    untouched = "" if run.config.report.dry_run else f"The checkpoints in {run.out} are untouched. "
    what = f"out of memory at step {run.step + 1} ({str(error).splitlines()[0]}). {untouched}"
    if run.engine.mesh.shard > 1:
        return what + "Less is needed with a smaller --batch-size (and more --accumulate), --recompute blocks, --loss chunked."
    if not run.task.has_memory_estimate:
        return what + "Less is needed with a smaller --batch-size (and more --accumulate), --recompute blocks, --adapter lora."
    packed = bool(quantized_layers(run.engine.network))
    frozen = frozen_names(run.engine.network, run.config.run)
    training = training_settings(run.config, run.ranks, run.label_fraction or 1.0, packed=packed, frozen=frozen)
    advice = suggest_options(run.engine.network.config, training, memory_of(run.device) - LIBRARIES, ranks=run.ranks.world)
    return what + advice
