"""The cost of a network as one page of text: the table to read before renting a GPU."""

import textwrap
from dataclasses import replace

from model.config import ConfigError, ModelConfig
from model.flops import flops_per_token
from model.heads import is_tied
from model.memory import BITS, MemoryEstimate, training_memory
from model.parameters import adapter_parameters, cache_bytes, parameters_by_part, parameters_in_training
from model.training import USUAL_CONTEXT, Training

LABELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
COLUMNS = ("fp32", "bf16")  # of the table of all methods
KINDS = {"none": "kept", "blocks": "recomputed", "selective": "recomputed but for products"}


def info(
    config: ModelConfig,
    *,
    batch_size: int = 1,
    context: int | None = None,
    accumulate: int = 1,
    method: str = "full",
    precision: str = "bf16",
    recompute: str = "none",
    recompute_every: int = 1,
    loss: str = "plain",
    optimizer: str = "adamw",
    ema: bool = False,
    rank: int = 8,
    targets: str = "all-linear",
    device: str = "cuda",
    frozen: frozenset[str] = frozenset(),
) -> str:
    """Describe a network: parameters by part, operations and cache a token, and the memory of each training method.

    context: tokens of each text (default: the config's, at most `USUAL_CONTEXT`). `method`, `precision`, `recompute` and
    `recompute_every` choose the method that is listed in detail; the rest holds for all. `frozen`: parameters
    that full training leaves as they are. Errors: an impossible value (ConfigError, which names the option).
    """
    if context is None:
        context = min(config.context, USUAL_CONTEXT)
    if config.position == "learned" and context > config.context:
        raise ConfigError(f"context={context} is more than the {config.context} positions of the network")
    training = Training(
        batch_size=batch_size,
        context=context,
        method=method,
        precision=precision,
        recompute=recompute,
        recompute_every=recompute_every,
        loss=loss,
        accumulate=accumulate,
        optimizer=optimizer,
        ema=ema,
        rank=rank,
        targets=targets,
        device=device,
        frozen=frozen,
    )
    adapter_parameters(config, rank, targets)  # raises on unknown targets
    parts = (title(config), parameter_table(config, training), flops_table(config, training), cache_text(config, context))
    return "\n\n".join((*parts, memory_table(config, training), assumptions(config, training)))


def title(config: ModelConfig) -> str:
    depth = f"{config.depth}" if config.decoder_depth is None else f"{config.depth} + {config.decoder_depth}"
    heads = f"heads {config.heads} of {config.head_width}"
    heads += f" ({config.kv_heads} of keys and values)" if config.kv_heads != config.heads else ""
    total = sum(parameters_by_part(config).values())
    return (
        f"{config.family} {config.architecture} · head {config.head} · layers {depth} · width {config.width:,} · {heads} · "
        f"mlp {config.mlp_width:,}\nvocabulary {config.vocab_size:,} · context {config.context:,} · "
        f"weights {format_bytes(4 * total)} in float32, {format_bytes(2 * total)} in bfloat16"
    )


def parameter_table(config: ModelConfig, training: Training) -> str:
    counts, everything = parameters_by_part(config), parameters_in_training(config, training.frozen).values()
    total, trained = sum(counts.values()), sum(p.size for p in everything if p.trained)
    rows = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in counts.items()]
    rows.append(("total", f"{total:,}", "100.0%"))
    rows += [("trainable", f"{trained:,}", f"{trained / total:.1%}")] if trained != total else []
    added = adapter_parameters(config, training.rank, training.targets)
    rows.append((f"LoRA r={training.rank}", f"{added:,}", f"{added / total:.2%}"))
    return "parameters" + (" (the head's matrix is the embedding)" if is_tied(config) else "") + "\n" + align_columns(rows)


def flops_table(config: ModelConfig, training: Training) -> str:
    rows = [("", "forward", "matrices", "scores", "backward", "recomputed")]
    for label, rank in (("full", 0), ("LoRA", training.rank)):
        plain, recomputed = (
            flops_per_token(config, training.context, rank=rank, targets=training.targets, recompute=recompute)
            for recompute in (False, True)
        )
        values = (plain.forward, plain.matrices, plain.scores, plain.backward, recomputed.backward)
        rows.append((label, *map(format_flops, values)))
    two = ", of the input and of the output together" if config.decoder_depth is not None else ""
    return f"operations a token{two}, at {training.context:,} tokens\n" + align_columns(rows)


def cache_text(config: ModelConfig, context: int) -> str:
    cache = cache_bytes(config, context)
    if not cache.token:
        return "key/value cache: none, an encoder does not generate"
    text = f"key/value cache, bfloat16: {format_bytes(cache.token)} a token"
    text += f", {format_bytes(cache.source_token)} a token of the input" if cache.source_token else ""
    for at in sorted({context, config.context}):
        cache = cache_bytes(config, at)
        text += f"; {format_bytes(cache.full)} at {at:,} tokens"
        text += f", of which the windows reach {format_bytes(cache.in_reach)}" if cache.in_reach < cache.full else ""
    return textwrap.fill(text, 110, subsequent_indent="  ")


def memory_table(config: ModelConfig, chosen: Training) -> str:
    """Return the peak memory of a step for every method, then the parts of the chosen one."""
    rows = [("", *(f"{precision} {KINDS[kind]}" for precision in COLUMNS for kind in ("none", "blocks")))]
    for method, label in LABELS.items():
        ways = [
            replace(chosen, method=method, precision=precision, recompute=kind, recompute_every=1)
            for precision in COLUMNS
            for kind in ("none", "blocks")
        ]
        rows.append((label, *(format_bytes(training_memory(config, way).peak) for way in ways)))
    kind = KINDS[chosen.recompute] + f", every {chosen.recompute_every}. block" * (chosen.recompute_every > 1)
    detail = parts_of(training_memory(config, chosen))
    heading = f"\n\nof {LABELS[chosen.method]}, {chosen.precision} {kind} (not all at one time)\n"
    return "memory of a training step at its highest\n" + align_columns(rows) + heading + align_columns(detail)


def parts_of(memory: MemoryEstimate) -> list[tuple[str, str]]:
    named = (
        ("weights", memory.weights),
        ("16-bit copies", memory.copies),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("logits", memory.logits),
        ("at its highest", memory.peak),
    )
    return [(name, format_bytes(size)) for name, size in named if size]


def assumptions(config: ModelConfig, training: Training) -> str:
    rates = ("dropout", "attention_dropout", "mlp_dropout", "output_dropout")
    dropouts = ", ".join(f"{name} {getattr(config, name):g}" for name in rates if getattr(config, name))
    micro = f" x {training.accumulate} micro-batches" if training.accumulate > 1 else ""
    optimizer = training.optimizer + " with averages" * training.ema
    reads = f" (the network reads {config.context:,}: --context)" if training.context < config.context else ""
    how = (
        f"assumed: batch {training.batch_size}{micro} of {training.context:,} tokens{reads} · {optimizer} · "
        f"LoRA r={training.rank} on {training.targets} · {dropouts or 'no dropout'}. "
        "bf16: float32 weights and autocast; a frozen base in 16 bits. Recomputed: each block's forward, from its input. "
        f"QLoRA: the blocks' matrices in {BITS:.3f} bits, the rest in 16, adapters in float32. "
        f"Operators as on {training.device}, attention fused, masked scores skipped, "
        f"{'all logits at once' if training.loss == 'plain' else 'logits in chunks'}. Not counted: the "
        "CUDA context and the libraries' workspaces (about 1 GiB), fragmentation."
    )
    return textwrap.fill(how, 110, subsequent_indent="  ")


def align_columns(rows: list[tuple[str, ...]]) -> str:
    """Align rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("   ".join(("  " + first.ljust(widths[0]), *cells)))
    return "\n".join(lines)


def format_bytes(size: float) -> str:
    """Format a number of bytes.

    >>> format_bytes(36_864), format_bytes(500_000_000), format_bytes(16 * 2**30)
    ('36.0 KiB', '476.8 MiB', '16.00 GiB')
    """
    for unit, digits, bytes_each in (("GiB", 2, 2**30), ("MiB", 1, 2**20), ("KiB", 1, 2**10)):
        if size >= bytes_each:
            return f"{size / bytes_each:,.{digits}f} {unit}"
    return f"{size:.0f} B"


def format_flops(count: float) -> str:
    """Format a number of operations.

    >>> format_flops(266_000_000), format_flops(1.6e10)
    ('266.0 M', '16.00 G')
    """
    return f"{count / 1e9:,.2f} G" if count >= 1e9 else f"{count / 1e6:,.1f} M"
