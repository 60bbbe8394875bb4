"""Rollouts: sampled tokens a second, ours and transformers' `generate`, the same network, prompts and ends.

Both sides: the same weights in float32 (bfloat16 on a GPU), prompts of 64 tokens, temperature 1 without filters, up to 128 new
tokens. 2 % of the vocabulary are stop ids, and the network is as initialized, nearly uniform: the lengths of replies are
geometric, with a mean of 50 before the limit. Only tokens up to a row's end count. Ours returns their log-probabilities too;
theirs returns none, and is not asked for any.

    groups of 1   all prompts differ
    groups of 8   each prompt is there eight times, as group advantages need it

Each round has its own noise; the ratio is that of the tokens a second.
"""

import itertools
import statistics
import tempfile
from collections.abc import Callable

import torch
import transformers

import model.hub
from model.config import ModelConfig
from model.init import build_network
from model.rollouts import sample_replies
from tests.bench.generate import COMMON, FAMILIES, SIZES
from tests.bench.timing import alternate, table

SIZE = "6 × 384, V 8,192"
BATCHES, GROUPS = (32, 64), (1, 8)
PROMPT, NEW, STOPS = 64, 128, 0.02
FIRST = 3  # ids below are special


def sides(family: str, batch_size: int, group: int) -> tuple[dict[str, Callable[[], object]], dict[str, list[int]]]:
    """Return the two sides, and the lists to which each appends the number of tokens of a call."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    preset, wider = FAMILIES[family]
    size = SIZES[SIZE]
    config = ModelConfig.preset(preset, **COMMON, **size, mlp_width=wider * size["width"])
    network = build_network(config, seed=0, device=device, dtype=dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.hub.save(network, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    stop_ids = list(range(FIRST, FIRST + round(STOPS * config.vocab_size)))
    ids_BT = torch.randint(stop_ids[-1] + 1, config.vocab_size, (batch_size // group, PROMPT)).repeat_interleave(group, 0)
    prompts, ids_BT, mask_BT = ids_BT.tolist(), ids_BT.to(device), torch.ones_like(ids_BT).to(device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW}
    options |= {"eos_token_id": stop_ids, "pad_token_id": 0, "attention_mask": mask_BT}
    seeds, tokens = itertools.count(), {"transformers": [], "ours": []}

    def huggingface() -> None:
        new = theirs.generate(ids_BT, **options)[:, PROMPT:].tolist()
        ends = ([place for place, token in enumerate(row) if token in stop_ids] for row in new)
        tokens["transformers"].append(sum(places[0] + 1 if places else len(row) for places, row in zip(ends, new, strict=True)))

    def ours() -> None:
        noise = torch.Generator().manual_seed(next(seeds))
        uniforms_NT = torch.rand(batch_size, NEW, generator=noise, dtype=torch.float64)
        replies = sample_replies(network, prompts, uniforms_NT=uniforms_NT, stop_ids=stop_ids, context=config.context)
        tokens["ours"].append(sum(len(reply.ids) for reply in replies))

    return {"transformers": huggingface, "ours": ours}, tokens


def bench_rollout_speed(rounds: int) -> None:
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for family, batch_size, group in itertools.product(FAMILIES, BATCHES, GROUPS):
        torch.manual_seed(0)
        calls, tokens = sides(family, batch_size, group)
        seconds = alternate(calls, rounds, warmup=1)
        rates = {
            name: [count / time for count, time in zip(tokens[name][1:], times, strict=True)] for name, times in seconds.items()
        }
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["transformers"], strict=True)]
        length = sum(tokens["ours"]) / len(tokens["ours"]) / batch_size
        rows.append(
            (
                f"{family}, {batch_size} rows in groups of {group}",
                f"{length:.0f}",
                *(f"{statistics.median(each):,.0f}" for each in rates.values()),
                f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        )
    print(f"Sampled replies, {SIZE}, prompts of {PROMPT}, up to {NEW} new tokens: tokens a second up to each row's end;")
    print(f"medians of {rounds} rounds, in parentheses the least and the greatest ratio\n")
    print(table(("rows", "mean length", "transformers", "ours", "ratio"), rows))
