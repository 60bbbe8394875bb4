"""Estimate activation memory: the tensors that each operation saves for the backward, in order, with their bytes (a tape).

Each operation saves only what its derivative needs: a matrix its input, a norm its input and the statistics, an activation
function its input, a product both factors, attention q, k, v, its result and one logsumexp a query, dropout its mask, the
loss the log-probabilities; a sum saves nothing. A tensor that two operations save is listed once, with the one whose
backward runs last. `model.memory` walks the tape.

Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4, whose count is of 16-bit networks without fused attention.
Under autocast the inputs of matrices and attention have 16 bits and the residual stream 32, and every matrix that reads the
stream saves its own 16-bit copy, as autocast makes it.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from model.config import LayerSpec, ModelConfig
from model.heads import HEADS, POOLED_HEADS, TIED_HEADS, MaskedHead, is_tied
from model.parameters import Parameter, adapted_matrices, parameters_in_training
from model.training import KERNELS, WIDE, Training

INDEX = 8  # bytes of an id


class Op(NamedTuple):
    """The bytes of one operation."""

    name: str
    saved: int = 0  # from its forward to its backward
    copies: int = 0  # likewise: autocast's 16-bit copy of its weight
    results: int = 0  # those of its results that selective recomputation keeps
    workspace: int = 0  # lives in its forward alone
    forward_grads: int = 0  # the part of `grads` that its forward computes already
    grads: int = 0  # weight gradients that its backward leaves
    pending: int = 0  # gradient of a weight that is used twice: it waits for the other one, then the two are summed
    transient: int = 0  # lives in its backward alone: gradients that come in, go out, or are about to be cast


@dataclass
class Segment:
    """Operations that are recomputed together: a block, or everything before or after the blocks."""

    name: str
    ops: list[Op] = field(default_factory=list)
    entry: int = 0  # the input of a block that is recomputed; else 0
    results: int = 0  # results that such a block saves too
    shared: int = 0  # the part of the input that `ops` count too
    stream: int = 0  # gradients that bypass its operations

    @property
    def saved(self) -> int:
        """Bytes saved by all operations."""
        return sum(op.saved + op.copies for op in self.ops)

    @property
    def retained(self) -> int:
        """Bytes held from its forward until the backward reaches it."""
        return self.entry + self.results if self.entry else self.saved

    @property
    def copies(self) -> int:
        """Bytes of autocast's copies of weights."""
        return sum(op.copies for op in self.ops)


def tape(config: ModelConfig, training: Training) -> list[Segment]:
    """Return the segments of one micro-batch's forward, in order."""
    return Recorder(config, training).record()


def activation_bytes(config: ModelConfig, training: Training) -> int:
    """Return the bytes saved after the forward of one micro-batch, without 16-bit copies of weights.

    >>> config = ModelConfig.preset("gpt2", dropout=0.0, attention_dropout=0.0)
    >>> activation_bytes(config, Training(batch_size=1)) // 2**20
    779
    """
    segments = tape(config, training)
    return sum(segment.retained - (0 if segment.entry else segment.copies) for segment in segments)


class Recorder:
    """Builds the tape of a network, following `forward` of stacks, blocks and heads line by line."""

    def __init__(self, config: ModelConfig, training: Training):
        self.config, self.training = config, training
        self.kernels, self.size, self.wide = KERNELS[training.device], training.itemsize, training.param_itemsize
        self.texts, self.rows = training.batch_size, training.batch_size * training.context
        self.widens = self.wide != WIDE and not self.kernels.fused_rms_norm  # such a norm saves its input in float32
        self.weights = parameters_in_training(config, training.frozen)
        self.full = training.method == "full"
        self.adapted = set() if self.full else {p.name for p in adapted_matrices(config, training.targets)}
        self.stream = self.rows * config.width * self.wide
        self.tied = is_tied(config)
        self.ops: list[Op] = []
        # Whether the current input needs a gradient; below the first adapter or trained weight none does.
        self.needs_grad = self.full and not training.frozen

    def record(self) -> list[Segment]:
        """Return all segments of the network."""
        config = self.config
        if config.architecture == "encoder-decoder":
            segments = self.stack("body.encoder", config.layers, causal=False)
            self.config = config.second_stack
            segments += self.stack("body.decoder", config.decoder_layers, causal=True, cross=True)
        else:
            causal = config.architecture == "decoder"
            segments = self.stack("body", config.decoder_layers if causal else config.layers, causal=causal)
        return [*segments, self.segment("head", self.head)]

    def segment(self, name: str, write, *arguments, **fields) -> Segment:
        self.ops = []
        write(*arguments)
        return Segment(name, self.ops, **fields)

    def add(self, name: str, **sizes: int) -> None:
        if self.training.frozen and not self.needs_grad:
            sizes |= dict.fromkeys(("saved", "transient"), 0)
        self.ops.append(Op(name, **sizes))

    def trains(self, start: str) -> bool:
        """Return True where a weight under that prefix is trained; then everything after it needs a gradient."""
        found = self.full and any(p.trained for p in self.weights.values() if p.name.startswith(start))
        self.needs_grad = self.needs_grad or found
        return found

    def stack(self, name: str, layers: tuple[LayerSpec, ...], *, causal: bool, cross: bool = False) -> list[Segment]:
        shared = self.stream if self.config.norm_first or not self.training.is_mixed else 0
        shared = 0 if self.widens and self.config.norm == "rmsnorm" else shared
        biased = self.config.position == "relative" and self.full
        stream = self.stream * (1 + cross) + self.table(self.wide) * biased  # gradients of encoder output and bias
        self.needs_grad = self.full and not self.training.frozen
        segments = [self.segment(f"{name}.embed", self.embed, name, causal)]
        for index, layer in enumerate(layers):
            block = f"{name}.blocks.{index}"
            recorded = self.segment(block, self.block, block, layer, causal, cross, stream=stream)
            if self.training.is_recomputed(index):
                selective = self.training.recompute == "selective"
                results = sum(op.results for op in recorded.ops) if selective else 0
                recorded = replace(recorded, entry=self.stream, shared=shared, results=results)
            segments.append(recorded)
        return [*segments, self.segment(f"{name}.norm", self.last_norm, name)]

    def embed(self, name: str, causal: bool) -> None:
        """Add the ids, for the tables' gradients; norm and dropout of the embeddings' sum; tensors that the layers share."""
        config, length = self.config, self.training.context
        if self.full:
            ids = self.rows * INDEX * (1 + bool(config.token_types)) + length * INDEX * (config.position == "learned")
            tables = ("embedding.", "position.", "token_type.")
            params = [p for p in self.weights.values() if p.name.startswith(tuple(f"{name}.{table}" for table in tables))]
            params += [p for p in self.weights.values() if p.name == "body.embedding.weight" and name == "body.encoder"]
            grads = sum(p.size for p in params if p.trained) * self.wide
            self.needs_grad = self.needs_grad or any(p.trained for p in params)
            table = config.vocab_size * config.width * self.wide if name == "body.decoder" else 0  # the encoder's too
            waits = {"transient": self.stream + table} if self.tied else {"transient": self.stream, "pending": table}
            self.add("embedding", saved=ids, grads=grads, **waits)
        if config.position == "relative" and self.full:
            self.add("relative", saved=length**2 * INDEX, grads=self.size_of(f"{name}.relative.weight") * self.wide)
        fused = not causal and self.kernels.fused_attention and not self.training.is_mixed
        if config.position == "relative" and (fused or self.training.recompute != "none"):  # recomputed blocks hold it
            self.add("bias", saved=self.table(self.wide))
        if config.position == "rope":
            self.add("rope tables", saved=length * config.head_width * self.wide)
        if config.embedding_norm:
            self.norm(f"{name}.embedding_norm", self.rows, config.width)
        self.dropout(self.rows * config.width, config.dropout, self.wide)

    def size_of(self, name: str) -> int:
        """Count the elements that get a gradient."""
        return self.weights[name].size if self.weights[name].trained else 0

    def table(self, size: int) -> int:
        """Return the bytes of a bias, H · T · S, the same for all texts."""
        return self.config.heads * self.training.context**2 * size

    def block(self, name: str, layer: LayerSpec, causal: bool, cross: bool) -> None:
        for sublayer in ("attention", "cross", "mlp") if cross else ("attention", "mlp"):
            if self.config.norm_first:
                self.norm(f"{name}.{sublayer}_norm", self.rows, self.config.width)
            if sublayer == "mlp":
                self.mlp(f"{name}.mlp")
            else:
                self.attention(f"{name}.{sublayer}", layer, causal, is_cross=sublayer == "cross")
            self.dropout(self.rows * self.config.width, self.config.dropout, self.size)
            if not self.config.norm_first:
                self.norm(f"{name}.{sublayer}_norm", self.rows, self.config.width)

    def attention(self, name: str, layer: LayerSpec, causal: bool, *, is_cross: bool) -> None:
        config, size, length = self.config, self.size, self.training.context
        queries, keys = (self.rows * heads * config.head_width for heads in (config.heads, config.kv_heads))
        if f"{name}.project.qkv.weight" in self.weights:
            self.linears([f"{name}.project.qkv"], fresh=True)
        elif is_cross:
            self.linears([f"{name}.project.query"], fresh=True)
            # In float32 all layers read one encoder output, counted at the encoder's last norm.
            self.linears([f"{name}.project.key", f"{name}.project.value"], fresh=self.training.is_mixed)
        else:
            self.linears([f"{name}.project.{part}" for part in ("query", "key", "value")], fresh=True)
        if config.qk_norm and not is_cross:
            for part, numbers in (("query", queries), ("key", keys)):
                self.norm(f"{name}.{part}_norm", numbers // config.head_width, config.head_width, size)
        rotated = layer.rope is not None and not is_cross
        if rotated:
            self.add("rotate", transient=3 * queries * size + 2 * keys * size)
        rate, biased = config.attention_dropout, config.position == "relative" and not is_cross
        weights = self.texts * config.heads * length**2
        if self.kernels.fused_attention or (not rate and not biased):
            saved = (2 * queries + 2 * keys) * size + self.rows * config.heads * WIDE
            if biased and (causal or self.training.is_mixed):
                saved += self.table(size) + length**2 * causal  # computed in each layer from bias and mask
            elif layer.window is not None and layer.window < length and not is_cross:
                saved += length**2 * size  # the mask as numbers
            # With dropout it is recomputed, as its random numbers must be drawn again (train.recompute).
            results = 0 if rate else queries * size + self.rows * config.heads * WIDE
            self.add("attention", saved=saved, results=results, transient=2 * (queries + keys) * size)
        else:
            saved = 3 * queries * WIDE + weights * WIDE * (3 if rate else 1) + length**2 * (biased and causal)
            self.add("attention", saved=saved, results=(weights + queries) * WIDE, transient=(2 * weights + queries) * size)
        # The fused kernel's result has q's layout, a token's heads adjacent, which is the layout that `out` reads.
        copied = not (self.kernels.fused_attention or (not rate and not biased))
        self.linears([f"{name}.out"], fresh=copied, last=True)

    def mlp(self, name: str) -> None:
        config, size = self.config, self.size
        inner, rate = self.rows * config.mlp_width * size, config.mlp_dropout
        gated, relu = config.mlp == "gated", config.activation == "relu"
        self.linears([f"{name}.gate", f"{name}.up"] if gated else [f"{name}.up"], fresh=True)
        self.add("activation", saved=inner, transient=2 * inner)  # relu keeps its result, the others their input
        if gated:
            self.add("gate", saved=inner if relu else 2 * inner, transient=3 * inner)
        self.dropout(self.rows * config.mlp_width, rate, size)
        self.linears([f"{name}.down"], fresh=gated or not relu or rate > 0, last=True)

    def last_norm(self, name: str) -> None:
        config = self.config
        if config.norm_first:
            self.norm(f"{name}.norm", self.rows, config.width)
        self.dropout(self.rows * config.width, config.output_dropout, self.wide)
        if name == "body.encoder" and not self.training.is_mixed:
            self.add("encoder output", saved=self.stream)

    def norm(self, name: str, rows: int, width: int, size: int | None = None) -> None:
        """Add a norm: it saves its input, the inverse deviation and the mean, if any. `size`: bytes of an input element."""
        config, numbers, wide = self.config, rows * width, self.wide
        if not (self.trains(f"{name}.") or self.needs_grad):
            return
        rms = config.norm == "rmsnorm" and f"{name}.bias" not in self.weights
        saved = numbers * (WIDE if rms and self.widens else wide) + rows * WIDE * (1 if rms else 2)
        weights = sum(p.size for p in self.weights.values() if p.name.startswith(f"{name}.") and p.trained)
        if rms and self.full and weights and (size not in (None, wide) or not self.kernels.fused_rms_norm):
            saved += numbers * WIDE
        self.add(name, saved=saved, grads=weights * wide if self.full else 0, transient=2 * numbers * wide)

    def dropout(self, numbers: int, rate: float, size: int) -> None:
        if rate and self.needs_grad:
            self.add("dropout", saved=numbers * (1 if self.kernels.bool_dropout else size), transient=numbers * size)

    def linears(self, names: list[str], *, fresh: bool, last: bool = False) -> None:
        """Add matrices that read the same input. `fresh`: no other operation saves this input. Under autocast each casts a
        32-bit input for itself. `last`: of the sublayer; its output gradient is the stream's, unless that is cast or masked."""
        size, saved_already = self.size, not fresh
        for name in names:
            weight = self.weights[f"{name}.weight"]
            (out, into), bias = weight.shape, self.weights.get(f"{name}.bias")
            reads = self.trains(weight.name) or weight.name in self.adapted
            saved = 0 if saved_already or not reads else self.rows * into * size
            saved_already = saved_already or (bool(saved) and not self.training.is_mixed)
            sizes = self.weight_bytes(weight, bias, self.rows)
            if last and not self.training.is_mixed and not self.config.dropout:
                sizes["transient"] -= self.rows * out * size
            if weight.name in self.adapted:  # the adapter's gradient of the same input
                sizes["transient"] += self.rows * into * size
            self.add(name, saved=saved, results=self.rows * out * size, **sizes)
            if weight.name in self.adapted:
                self.adapter(out, into)
        self.needs_grad = self.needs_grad or any(f"{name}.weight" in self.adapted for name in names)

    def adapter(self, out: int, into: int) -> None:
        """Add an adapter, y + B (A x) · scale: A's result is saved for B; x is saved already."""
        rank, size = self.training.rank, self.size
        copies = rank * (out + into) * size if self.training.is_mixed else 0
        transient = self.rows * (into + rank + out * self.training.is_mixed) * size + copies
        saved = self.rows * rank * size
        results, grads = self.rows * (rank + out) * size, rank * (out + into) * self.wide
        self.add("adapter", saved=saved, results=results, copies=copies, grads=grads, transient=transient)

    def weight_bytes(self, weight: Parameter, bias: Parameter | None, rows: int) -> dict[str, int]:
        """Return a matrix' bytes beside its input: a copy, gradients, and in QLoRA the dequantized matrix for a moment."""
        (out, into), size = weight.shape, self.size
        transient = rows * (out + into) * size
        if self.full:
            numbers = sum(p.size for p in (weight, bias) if p is not None and p.trained)
            copies = weight.size * size if self.training.is_mixed else 0
            return {"copies": copies, "grads": numbers * self.wide, "transient": transient + copies}
        unpacked = weight.size * size if self.training.method == "qlora" and weight.in_block else 0
        return {"transient": transient + unpacked, "grads": 0}

    def head(self) -> None:
        """Add the head's matrices, then the loss: log-probabilities in float32, and two transient gradients of their size."""
        config, size = self.config, self.size
        if config.head == "sequence" and config.pool in ("max", "concat"):  # the largest values save what they are taken from
            self.add("pool", saved=self.stream, transient=self.stream)
        rows = self.texts if config.head in POOLED_HEADS else max(1, round(self.rows * self.training.scored))
        for weight in self.weights.values():
            if weight.part == "head" and weight.role == "matrix":
                bias = self.weights.get(weight.name.removesuffix("weight") + "bias")
                saved = rows * weight.shape[1] * size * self.trains(weight.name) + rows * weight.shape[0] * size
                self.add(weight.name, saved=saved, **self.weight_bytes(weight, bias, rows))
        if issubclass(HEADS[config.head], MaskedHead):
            self.norm("head.norm", rows, config.width)
        if config.head in TIED_HEADS:
            shape = (config.vocab_size, config.width)
            tied = Parameter("head.weight", shape, "head", "head", self.weights["body.embedding.weight"].trained)
            weight = self.weights.get("head.weight", tied)
            bias = self.weights.get("head.bias")
            self.classes(weight, bias if bias is not None and bias.trained else None, rows)
        else:
            for weight in self.weights.values():
                if weight.part == "head" and weight.role == "head" and len(weight.shape) == 2:
                    self.classes(weight, self.weights.get(weight.name.removesuffix("weight") + "bias"), rows)

    def classes(self, weight: Parameter, bias: Parameter | None, rows: int) -> None:
        (classes, width), size = weight.shape, self.size
        sizes = self.weight_bytes(weight, bias, rows)
        self.needs_grad = self.needs_grad or (self.full and weight.trained)
        if self.tied and self.full and weight.trained and classes == self.config.vocab_size:
            table = weight.size * self.wide
            sizes |= {"grads": sizes["grads"] - table, "pending": table}
        if self.training.loss != "plain" and self.config.head in TIED_HEADS:
            self.chunked(weight, rows, sizes)
            return
        logits = rows * classes * WIDE
        self.add("head", saved=rows * width * size * (self.full and weight.trained), **sizes)
        self.add("logits", saved=logits + rows * INDEX, workspace=logits, transient=2 * logits)

    def chunked(self, weight: Parameter, rows: int, sizes: dict[str, int]) -> None:
        """Add the loss of `train.losses.chunked`, whose forward computes float32 gradients of hidden states and matrix.

        Beside them a chunk's logits and, from 16 bits, their float32 copy, the matrix' copy, and a part of its gradient.
        """
        (classes, width), size = weight.shape, self.size
        chunk = self.training.chunk_rows(rows, classes)
        forward_grads = weight.size * WIDE if self.full else 0
        workspace = chunk * (classes + width) * size + chunk * width * WIDE
        if size != WIDE:
            part = self.training.chunk_classes(classes, width) * width * WIDE * self.full
            workspace += weight.size * size * self.training.is_mixed + max(chunk * classes * WIDE, part)
        transient = forward_grads if self.wide != WIDE else 0  # 16-bit gradients beside the 32-bit ones
        sizes = {name: sizes[name] for name in ("grads", "pending") if name in sizes}
        saved = rows * width * (self.wide + WIDE) + rows * INDEX
        self.add("chunks", saved=saved, workspace=workspace, forward_grads=forward_grads, transient=transient, **sizes)
