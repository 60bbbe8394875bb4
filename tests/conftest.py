"""Markers, the parity table, and small networks that several tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a defect

import pytest
import torch

from model.config import ModelConfig
from model.init import build
from tests.runs import _halfway, finished, halfway, options, uninterrupted  # noqa: F401, fixtures
from tests.texts import documents, stdlib_docs  # noqa: F401, fixtures

ROWS = pytest.StashKey[list[tuple]]()


def pytest_addoption(parser):
    parser.addoption("--parity", metavar="FILE", help="write the parity table (Markdown) of the oracle tests that ran")


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish(session):
    path = session.config.getoption("--parity")
    if path is None:
        return
    lines = ["| part | against | largest error | tolerance | why this tolerance |", "|---|---|---|---|---|"]
    for part, library, error, tolerance, reason in sorted(session.config.stash[ROWS]):
        lines.append(f"| {part} | {library} | {error:.1e} | {tolerance:.0e} | {reason} |")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


@pytest.fixture
def parity(request):
    """parity(part, library, error, tolerance, reason): assert error <= tolerance and record the table's row."""

    def record(part: str, library: str, error: float, tolerance: float, reason: str) -> None:
        error = float(error.detach()) if isinstance(error, torch.Tensor) else float(error)
        request.config.stash[ROWS].append((part, library, error, float(tolerance), reason))
        assert error <= tolerance, f"{part} against {library}: {error:.3e} > {tolerance:.1e} ({reason})"

    return record


TINY = {"width": 24, "depth": 2, "heads": 4, "mlp_width": 40, "vocab_size": 61, "context": 32}


def tiny_config(family: str, **changes) -> ModelConfig:
    """Two layers, odd sizes; grouped key/value heads where the family has them."""
    preset, heads = {"gpt2": ("gpt2", 4), "llama": ("tiny", 2)}[family]
    settings = {"kv_heads": heads, "dropout": 0.0, "attention_dropout": 0.0, "bos_id": 1, "eos_id": 2}
    return ModelConfig.preset(preset, **(TINY | settings | changes))


def randomized(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64, attention: str = "sdpa"):
    """A network whose every parameter is random, norms and biases too: at initialisation a wrong bias is invisible."""
    network = build(config, seed=seed, dtype=dtype, attention=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(dtype))
    return network.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
