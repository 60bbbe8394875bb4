"""Markers, the parity table, and small networks that several tests share."""

import os
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a defect
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: threads of each would wait for those of the others
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from model.config import ModelConfig, Rope
from model.init import build_network
from tests.compare import Error
from tests.proofs import COMPARISONS
from tests.runs import _halfway, finished, halfway, options, uninterrupted  # noqa: F401, fixtures
from tests.texts import documents, shared_cache, stdlib_docs  # noqa: F401, fixtures

ROWS: list[tuple] = []  # of the parity table
INTRODUCTION = """# Parity

Written by `python -m pytest -n 2 --dist loadfile --parity=docs/parity.md`; do not edit. Whole tensors, in
float64 where the library has it, with random norms and biases, gradients too, padded and packed. Measures, of ours a and theirs
b (`tests/compare.py`): absolute max |a − b|; relative max |a − b| / max |b|; mixed max |a − b| / (1 + max |b|); count: how many
differ.

""".splitlines()


def pytest_addoption(parser):
    parser.addoption("--parity", metavar="FILE", help="write the parity table (Markdown) of the oracle tests that ran")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report):
    """Rows come with the report of each test, from whichever process ran it."""
    if report.when == "teardown":
        ROWS.extend(tuple(row) for name, row in report.user_properties if name == "parity")


def pytest_sessionfinish(session):
    path = session.config.getoption("--parity")
    if path is None or not ROWS or "PYTEST_XDIST_WORKER" in os.environ:
        return
    groups = defaultdict(list)
    for part, library, error, measure, tolerance, reason, _ in ROWS:
        groups[part.split(":")[0], library, measure, tolerance, reason].append(error)
    titles = "| part | against | comparisons | largest error | measure | tolerance | why this tolerance |"
    lines = [*INTRODUCTION, titles, "|---|---|---|---|---|---|---|"]
    for (part, library, measure, tolerance, reason), errors in sorted(groups.items()):
        lines.append(f"| {part} | {library} | {len(errors)} | {max(errors):.1e} | {measure} | {tolerance:.0e} | {reason} |")
    lines += ["", "Every comparison:", "", COMPARISONS, "|---|---|---|---|---|---|"]
    for part, library, error, measure, tolerance, _, test in sorted(ROWS):
        lines.append(f"| {part} | {library} | {error:.1e} | {measure} | {tolerance:.0e} | `{test}` |")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


@pytest.fixture
def parity(request):
    """parity(part, library, error, tolerance, reason): assert error <= tolerance and record the table's row.

    The error is one of `tests.compare`'s measures. Rows of one part, "bert: logits", "bert: gradients", become one in the short
    table, with the largest error.
    """

    def record(part: str, library: str, error: Error, tolerance: float, reason: str) -> None:
        test = request.node.nodeid.partition("[")[0]  # without its parameters
        row = (part, library, float(error), error.measure, float(tolerance), reason, test)
        request.node.user_properties.append(("parity", row))
        assert error <= tolerance, f"{part} against {library}: {error:.3e} > {tolerance:.1e} ({reason})"

    return record


TINY = {"width": 24, "depth": 2, "heads": 4, "mlp_width": 40, "vocab_size": 61, "context": 32}
TINY_FAMILIES = {
    "gpt2": ("gpt2", {}),
    "llama": ("tiny", {"kv_heads": 2}),
    "mistral": ("mistral-7b", {"kv_heads": 2, "windows": (5,)}),
    "qwen2": ("qwen2-0.5b", {"kv_heads": 2, "windows": (None, 7), "tie_embeddings": False}),
    "qwen3": ("qwen3-0.6b", {"kv_heads": 2, "free_head_width": 10, "rope": Rope(1e4)}),
    "bert": ("bert-base", {}),
    "roberta": ("roberta-base", {}),
    "roformer": ("roformer-base", {}),
    "t5": ("t5-small", {"free_head_width": 10, "decoder_depth": 3, "relative_buckets": 8, "relative_distance": 20}),
    "t5-gated": ("flan-t5-small", {"free_head_width": 10, "decoder_depth": 1}),
    "bart": ("bart-base", {"decoder_depth": 3}),
    "vaswani": ("transformer-base", {"decoder_depth": 3}),
}
RATES = ("dropout", "attention_dropout", "mlp_dropout", "output_dropout")


def tiny_config(family: str, **changes) -> ModelConfig:
    """Two layers, odd sizes; grouped key/value heads, free head widths and unequal stacks where the family has them."""
    preset, own = TINY_FAMILIES[family]
    settings = TINY | {"kv_heads": 4, "bos_id": 1, "eos_id": 2} | dict.fromkeys(RATES, 0.0)
    return ModelConfig.preset(preset, **(settings | own | changes))


def randomized(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64, attention: str = "sdpa"):
    """A network whose every parameter is random, norms and biases too: at initialisation a wrong bias is invisible."""
    network = build_network(config, seed=seed, dtype=dtype, attention=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(dtype))
    return network.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
