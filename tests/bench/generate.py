"""Generation: greedy tokens a second through the cache, ours and transformers' `generate`, the same network.

Both sides: the same weights in float32 (bfloat16 on a GPU), the same prompts of 32 tokens, 128 new ones with no end, their
cache as it is by default. The time is that of the whole call, the reading of the prompt included. Before anything is timed
the two must say the same tokens.
"""

import statistics
import tempfile

import torch
import transformers

import model.hub
from model.config import ModelConfig
from model.generate import generate
from model.init import build_network
from tests.bench.timing import alternate, ratio, table

COMMON = {"context": 512, "dropout": 0.0, "attention_dropout": 0.0, "bos_id": 1, "eos_id": 2}
SIZES = {
    "4 × 128, V 2,048": {"depth": 4, "width": 128, "heads": 4, "kv_heads": 4, "vocab_size": 2048},
    "4 × 256, V 8,192": {"depth": 4, "width": 256, "heads": 4, "kv_heads": 4, "vocab_size": 8192},
    "6 × 384, V 8,192": {"depth": 6, "width": 384, "heads": 6, "kv_heads": 6, "vocab_size": 8192},
}
FAMILIES = {"gpt2": ("gpt2", 4), "llama": ("tiny", 3)}  # the preset, and how many times wider the feed-forward layer is
BATCHES = (1, 8)
PROMPT, NEW = 32, 128


def sides(family: str, size: dict, batch_size: int) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    preset, wider = FAMILIES[family]
    config = ModelConfig.preset(preset, **COMMON, **size, mlp_width=wider * size["width"])
    network = build_network(config, seed=0, device=device, dtype=dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.hub.save(network, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    ids = torch.randint(3, config.vocab_size, (batch_size, PROMPT), device=device)
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)

    def ours() -> torch.Tensor:
        return generate(network, ids, max_new_tokens=NEW, temperature=0)

    def huggingface() -> torch.Tensor:
        return theirs.generate(ids, **options)[:, PROMPT:]

    if device.type == "cpu" and not torch.equal(ours(), huggingface()):
        raise SystemExit(f"{family}: the two sides do not say the same")
    return {"transformers": huggingface, "ours": ours}


def bench_generate(rounds: int) -> None:
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for family in FAMILIES:
        for name, size in SIZES.items():
            for batch_size in BATCHES:
                seconds = alternate(sides(family, size, batch_size), rounds)
                tokens = {side: batch_size * NEW / statistics.median(times) for side, times in seconds.items()}
                rows.append(
                    (
                        f"{family} {name}, batch {batch_size}",
                        *(f"{value:,.0f}" for value in tokens.values()),
                        f"**{ratio(seconds['transformers'], seconds['ours']):.2f}**",
                    )
                )
    print(f"Greedy generation with a cache, prompt {PROMPT}, {NEW} new tokens: tokens a second; ratio: median of the rounds\n")
    print(table(("network", "transformers", "ours", "ratio"), rows))
