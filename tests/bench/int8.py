"""INT8 on a CPU: generation beside the same network in bfloat16 and float32; and one linear layer beside other libraries'.

Networks of random weights, llama-like; greedy generation with a cache, prompts of 8 tokens, 32 new ones, the whole call. Of the
INT8 networks all but the blocks' linear layers is float32; inputs of int8-static were observed on random tokens. All networks
take turns in one process. Where their time goes is measured in calls of their own: linear layers, and in them the rounding of
x and the sums of integers.
"""

import contextlib
import logging
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn

from model.config import ModelConfig
from model.generate import generate
from model.init import build_network
from quant import int8, int8_product, llm_int8
from quant.calibrate import observe
from quant.int8_linear import Int8Linear
from quant.linear import quantizable_layers, quantize_linears, quantized_layers
from tests.bench.timing import alternate, ratio, table

COMMON = {"vocab_size": 2048, "context": 128, "bos_id": 1, "eos_id": 2}
SIZES = {
    "6 × 384": {"depth": 6, "width": 384, "heads": 6, "kv_heads": 6, "mlp_width": 1024},
    "12 × 768": {"depth": 12, "width": 768, "heads": 12, "kv_heads": 12, "mlp_width": 2048},
}
SCHEMES = ("int8-dynamic", "int8-static", "llm-int8")
BATCHES = (1, 16)
PROMPT, NEW = 8, 32
LAYERS, ROWS = ((384, 1536), (768, 3072), (3072, 768)), (1, 16, 128, 512)  # layers: I × O


def bench_int8(rounds: int) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each call that it rounds to float16
    has, planes = ("has no", "two planes") if int8_product.has_saturating_sums() else ("has", "one plane")
    print(f"This CPU {has} VNNI: few rows of integers are multiplied in {planes}\n")
    print(f"Generation, prompt {PROMPT}, {NEW} new tokens; tokens a second; ratio: median of the rounds")
    for name in SIZES:
        rows = [row for batch_size in BATCHES for row in generation(name, batch_size, rounds)]
        print("\n" + table((name, "in", "tokens/s", "over bfloat16", "why: milliseconds a step"), rows), flush=True)
    print("\nOne linear layer, milliseconds; planes, floats: our two ways to add up integers, with the rounding of x\n")
    found = [row for size in LAYERS for row in one_layer(*size, rounds)]
    print(table(("layer, I × O", "rows", *found[0][2]), [(name, rows, *ms.values()) for name, rows, ms in found]), flush=True)


# ---- generation


def networks(size: dict) -> dict[str, nn.Module]:
    config = ModelConfig.preset("tiny", **COMMON, **size)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    made = {name: build_network(config, seed=0, dtype=dtype).eval() for name, dtype in dtypes.items()}
    ids = torch.randint(3, config.vocab_size, (4, 16, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    inputs = observe(made["float32"], ids, lambda network, ids: network(ids))
    for scheme in SCHEMES:
        observed = inputs if scheme == "int8-static" else None
        made[scheme] = quantize_linears(build_network(config, seed=0).eval(), scheme, inputs=observed)
    return made


def generation(name: str, batch_size: int, rounds: int) -> list[tuple[str, ...]]:
    made = networks(SIZES[name])
    ids = torch.randint(3, COMMON["vocab_size"], (batch_size, PROMPT), generator=torch.Generator().manual_seed(1))
    calls = {side: partial(generate, network, ids, max_new_tokens=NEW, temperature=0) for side, network in made.items()}
    seconds = alternate(calls, rounds, warmup=1)
    spent = {side: parts_of(network, calls[side]) for side, network in made.items()}
    rows = []
    for side, times in seconds.items():
        faster = ratio(seconds["bfloat16"], times)
        tokens = f"{batch_size * NEW / statistics.median(times):,.1f}"
        reason = why(spent[side], spent["bfloat16"], faster)
        rows.append((f"batch {batch_size}", side, tokens, f"**{faster:.2f}**", reason))
    return rows


def parts_of(network: nn.Module, call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds a step, of one more token of each sequence: in the linear layers, in their rounding of x, in their sums; and
    in all."""
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable) -> Callable:
        def wrapped(*args: object, **named: object) -> object:
            start = time.perf_counter()
            result = function(*args, **named)
            spent[part] += (time.perf_counter() - start) * 1e3 / NEW
            return result

        return wrapped

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        layers = (quantized_layers(network) or quantizable_layers(network)).values()
        places = [(layer, "forward", "linear") for layer in layers]
        places += [(layer.input, "forward", "rounding") for layer in layers if isinstance(layer, Int8Linear)]
        places += [(llm_int8, "split_outliers", "rounding"), (llm_int8, "sum_products", "sums")]
        places += [(int8_product, name, "sums") for name in ("int8_sums", "float_sums")]
        with contextlib.ExitStack() as patches:
            for owner, name, part in places:
                patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
            yield

    with watched():
        timed("all", call)()
    return spent


def why(spent: dict[str, float], usual: dict[str, float], faster: float) -> str:
    linear, rest = spent["linear"], spent["all"] - spent["linear"]
    text = f"linear {linear:.2f}"
    if "sums" in spent:
        other = linear - spent["rounding"] - spent["sums"]
        text += f" (rounding {spent['rounding']:.2f}, sums {spent['sums']:.2f}, scaling and calls {other:.2f})"
    text += f", rest {rest:.2f}"
    if faster < 1:
        more = {"linear layers": linear - usual["linear"], "rest": rest - (usual["all"] - usual["linear"])}
        worst = max(more, key=more.get)
        text += f"; most of it in the {worst}: {more[worst]:+.2f}"
    return text


# ---- one layer


def one_layer(ins: int, outs: int, rounds: int) -> list[tuple[str, int, dict[str, str]]]:
    sides, found = layers_of(ins, outs), []
    for count in ROWS:
        x = torch.randn(count, ins, generator=torch.Generator().manual_seed(count))
        x = {side: x.bfloat16() if side == "bfloat16" else x for side in sides}
        with torch.no_grad():
            seconds = alternate({side: partial(run, x[side]) for side, run in sides.items()}, rounds)
        shown = {side: f"{statistics.median(each) * 1e3:.2f}" for side, each in seconds.items()}
        found.append((f"{ins} × {outs}", count, shown))
    return found


def layers_of(ins: int, outs: int) -> dict[str, Callable[[Tensor], Tensor]]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # here: it takes seconds

    plain = nn.Linear(ins, outs, bias=False).requires_grad_(False)
    weight = plain.weight
    ours = Int8Linear(int8.quantize(weight))

    def by(few_rows: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with mock.patch.object(int8_product, "FEW_ROWS", few_rows):
                return ours(x)

        return run

    theirs = Linear8bitLt(ins, outs, False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    torchaos = nn.Sequential(nn.Linear(ins, outs, bias=False).requires_grad_(False))
    quantize_(torchaos, Int8DynamicActivationInt8WeightConfig())
    with warnings.catch_warnings():  # torch says that it is to go
        warnings.simplefilter("ignore")
        torchs = torch.ao.quantization.quantize_dynamic(nn.Sequential(plain), {nn.Linear}, dtype=torch.qint8)
    return {
        "float32": plain,
        "bfloat16": nn.Linear(ins, outs, bias=False, dtype=torch.bfloat16),
        "ours, int8, planes": by(max(ROWS)),
        "ours, int8, floats": by(0),
        "ours, llm-int8": llm_int8.LlmInt8Linear(llm_int8.quantize(weight)),
        "bitsandbytes, Linear8bitLt": theirs.to("cpu").eval(),
        "torch.ao, quantize_dynamic": torchs,
        "torchao, dynamic": torchaos,
    }
