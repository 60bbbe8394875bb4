"""`--log tensorboard`: the numbers of metrics.jsonl as TensorBoard's scalars, in RUN/tensorboard."""

from pathlib import Path

from train.runs.errors import TrainError


def writer_type() -> type:
    """Import torch's SummaryWriter. Errors (TrainError): the package `tensorboard` is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainError("--log tensorboard: the package is not installed (pip install tensorboard)") from None
    return SummaryWriter


class TensorBoard:
    """Writes each number of a row of metrics.jsonl as the scalar `SPLIT/NAME` at the row's step.

    `step`: of the checkpoint that a run resumes from; TensorBoard then hides what an earlier session wrote after it.
    """

    def __init__(self, folder: Path, step: int):
        self.writer = writer_type()(str(folder), purge_step=step + 1 if step else None)

    def write(self, values: dict[str, object]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        for name, value in numbers.items():
            tag, step = f"{values['split']}/{name}", int(values["step"])
            self.writer.add_scalar(tag, value, step, new_style=True, double_precision=True)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
