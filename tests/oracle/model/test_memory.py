"""The memory of training: what autograd keeps and what the allocator holds, against the account of both."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import model.memory
import model.training
import train.losses.chunked
import train.optimizers.adamw8bit
import train.optimizers.muon
import train.optimizers.named_optimizer
from model.activations import activation_bytes
from model.config import ModelConfig
from model.init import build_network
from model.memory import static_bytes, training_memory
from model.parameters import adapted_matrices, adapter_parameters, parameters
from model.training import Training
from model.weights import role_of
from tests.compare import relative
from tests.conftest import tiny_config
from train.losses.chunked import chunked_linear_cross_entropy
from train.losses.cross_entropy import linear_cross_entropy
from train.objective import Objective, Result, Term
from train.optimizers.build import build_optimizer
from train.optimizers.ema import EMA
from train.optimizers.precision import autocast
from train.recompute import recompute
from train.reports.memory import MeasuredMemory, measure_step
from train.step import train_step

CPU = torch.device("cpu")
TORCH = f"torch {torch.__version__}"
ALLOCATED = (0.05, "the account is by operation, the allocator by kernel")
FAMILIES = ["gpt2", "llama", "mistral", "qwen3", "bert", "t5", "t5-gated", "bart", "vaswani"]


class Scored(Objective):
    """The objective on what the head's matrix reads: of a masked head that is behind its own layers."""

    def forward(self, batch):
        hidden = self.network.body(batch["input_ids"]).hidden
        head = self.network.head
        return Result({"loss": Term(*self.loss(head.features(hidden), head.weight, batch["labels"], None))})


def batch_of(size: int, context: int) -> dict[str, torch.Tensor]:
    return {name: torch.randint(3, 61, (size, context)) for name in ("input_ids", "labels")}


# ---- activations


class Adapted(nn.Module):
    """A frozen matrix with a low-rank term beside it: y = x Wᵀ + (x Aᵀ) Bᵀ."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.a_RI = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.b_OR = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.a_RI), self.b_OR)


def adapt(network: nn.Module, rank: int, targets: str) -> nn.Module:
    network.requires_grad_(False)
    for parameter in adapted_matrices(network.config, targets):
        owner, _, leaf = parameter.name.removesuffix(".weight").rpartition(".")
        parent = network.get_submodule(owner)
        setattr(parent, leaf, Adapted(getattr(parent, leaf), rank))
    return network


def kept_bytes(network: nn.Module, batch: dict, mixed: bool) -> int:
    """Bytes of the distinct storages that autograd keeps: neither parameters nor autocast's copies of them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    shapes = {tuple(shape) for parameter in network.parameters() for shape in (parameter.shape, parameter.shape[::-1])}
    storages = {}  # held, so that no address comes twice

    def pack(tensor):
        copy = tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and tuple(tensor.shape) in shapes
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not copy:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, "bf16" if mixed else "fp32")():
        Scored(network.train())(batch)
    return sum(storage.nbytes() for storage in storages.values())


# No two sizes alike, and no row count that is a width: a copy of a weight is told by its shape.
SHAPES = {
    "small": ({"width": 64, "depth": 2, "heads": 4, "mlp_width": 160, "vocab_size": 211, "context": 96}, 3, 80),
    "deep": ({"width": 96, "depth": 6, "heads": 4, "mlp_width": 256, "vocab_size": 1000, "context": 128}, 2, 127),
    "wordy": ({"width": 64, "depth": 2, "heads": 2, "mlp_width": 256, "vocab_size": 4000, "context": 64}, 8, 63),
}
DROPPED = {"dropout": 0.1, "attention_dropout": 0.1, "mlp_dropout": 0.1}


def shaped(name: str, shape: str, **changes) -> tuple[ModelConfig, int, int]:
    sizes, batch_size, length = SHAPES[shape]
    own = {"decoder_depth": 3} if tiny_config(name).decoder_depth else {}
    grouped = {"kv_heads": sizes["heads"] // 2} if name in ("llama", "mistral", "qwen3") else {"kv_heads": sizes["heads"]}
    return tiny_config(name, **(sizes | own | grouped | changes)), batch_size, length


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("name", FAMILIES)
def test_activations(name, dropped, mixed, parity):
    config, batch_size, length = shaped(name, "small", **(DROPPED if dropped else {}))
    measured = kept_bytes(build_network(config, seed=0), batch_of(batch_size, length), mixed)
    training = Training(batch_size, length, precision="bf16" if mixed else "fp32", device="cpu")
    # BERT's head: on a CPU autocast leaves its norm in 16 bits, on a GPU it widens what comes in, which is counted.
    tolerance = (0.03, "the norm in the head") if name == "bert" and mixed else (1e-4, "a mask of a scalar or two")
    error = relative(activation_bytes(config, training), measured)
    parity(f"activations: {name}{', dropout' * dropped}{', bf16' * mixed}", f"{TORCH} saved tensors", error, *tolerance)
    if dropped:  # and the measurement would see what is left out
        bare = activation_bytes(config.replace(**dict.fromkeys(DROPPED, 0.0)), training)
        assert abs(bare / measured - 1) > 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_activations_at_other_shapes(name, shape, parity):
    config, batch_size, length = shaped(name, shape)
    measured = kept_bytes(build_network(config, seed=0), batch_of(batch_size, length), False)
    error = relative(activation_bytes(config, Training(batch_size, length, device="cpu")), measured)
    parity(f"activations: {name} {shape}", f"{TORCH} saved tensors", error, 1e-4, "a scalar or two")


@pytest.mark.parametrize("targets", ["all-linear", "attention", "query-value"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_activations_of_adapters(name, targets, parity):
    config, batch_size, length = shaped(name, "small")
    measured = kept_bytes(adapt(build_network(config, seed=0), 8, targets), batch_of(batch_size, length), False)
    training = Training(batch_size, length, method="lora", rank=8, targets=targets, device="cpu")
    error = relative(activation_bytes(config, training), measured)
    parity(f"activations with adapters: {name}, {targets}", f"{TORCH} saved tensors", error, *ALLOCATED)


# ---- a whole step


def optimizers_of(network: nn.Module, optimizer: str):
    def role(name: str) -> str:
        return "matrix" if name.endswith(("a_RI", "b_OR")) else role_of(network.config, name)

    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    return build_optimizer(optimizer, named, role, lr=1e-4, matrix_lr=1e-4)


LOSSES = {"plain": linear_cross_entropy, "chunked": chunked_linear_cross_entropy}


def measured_step(network: nn.Module, training: Training) -> MeasuredMemory:
    """A second step: the first makes the optimizer's state."""
    device = torch.device(training.device)
    network = recompute(network, training.recompute, training.recompute_every).train()
    objective, optimizers = Scored(network, LOSSES[training.loss]), optimizers_of(network, training.optimizer)
    batches = [batch_of(training.batch_size, training.context) for _ in range(training.accumulate)]
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    if training.precision == "bf16-pure":
        optimizers.set_rounding(torch.Generator(device).manual_seed(0))
    step = partial(train_step, objective, batches, optimizers, max_norm=1.0, autocast=autocast(device, training.precision))
    step()
    return measure_step(lambda phase: step(phase=phase), device, network.parameters(), optimizers.named_state().values())


WAYS = {
    "fp32": {},
    "recomputed": {"recompute": "blocks"},
    "every second": {"recompute": "blocks", "recompute_every": 2},
    "selective": {"recompute": "selective"},
    "bf16": {"precision": "bf16"},
    "bf16 recomputed": {"precision": "bf16", "recompute": "blocks"},
    "bf16 selective": {"precision": "bf16", "recompute": "selective"},
    "accumulated": {"accumulate": 2},
    "accumulated, recomputed": {"accumulate": 2, "recompute": "blocks"},
    "muon": {"optimizer": "muon", "recompute": "blocks"},
    "sgd": {"optimizer": "sgd", "recompute": "blocks"},
    "adamw8bit": {"optimizer": "adamw8bit", "recompute": "blocks"},
    "chunked": {"loss": "chunked"},
    "chunked, accumulated": {"loss": "chunked", "accumulate": 2},
    "chunked, bf16": {"loss": "chunked", "precision": "bf16"},
    "chunked, recomputed": {"loss": "chunked", "recompute": "blocks"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak(name, shape, way, parity):
    config, batch_size, length = shaped(name, shape)
    training = Training(batch_size, length, device="cpu", **WAYS[way])
    ours, highest = check_peak(config, training, f"{name} {shape}, {way}", parity)
    if shape == "wordy" and training.loss == "plain":  # and it would be seen if the gradients of the logits were left out
        assert abs((ours.peak - 2 / 3 * ours.logits) / highest - 1) > 0.05


@pytest.mark.parametrize("way", ["fp32", "recomputed", "bf16", "every second", "selective", "bf16 selective", "chunked"])
@pytest.mark.parametrize("name", ["bert", "qwen3", "t5", "bart"])
def test_peak_of_other_families(name, way, parity):
    config, batch_size, length = shaped(name, "small")
    check_peak(config, Training(batch_size, length, device="cpu", **WAYS[way]), f"{name} small, {way}", parity)


@pytest.mark.parametrize("way", ["recomputed", "selective", "bf16 selective"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_peak_with_dropout(name, way, parity):
    config, batch_size, length = shaped(name, "small", **DROPPED)
    training = Training(batch_size, length, device="cpu", **WAYS[way])
    loose = (0.08, "on a CPU attention with dropout is many operators, whose temporaries are not followed")
    check_peak(config, training, f"{name} small with dropout, {way}", parity, *loose)


@pytest.mark.parametrize("way", ["chunked", "chunked, bf16", "chunked, recomputed"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_of_many_chunks(name, way, parity, monkeypatch):
    for module in (model.training, train.losses.chunked):
        monkeypatch.setattr(module, "CHUNK_BYTES", 50 * 4 * 4000)  # 50 of 504 rows
        monkeypatch.setattr(module, "CHUNK_ROWS", {"cpu": 16})
    config, batch_size, length = shaped(name, "wordy")
    training = Training(batch_size, length, device="cpu", **WAYS[way])
    _, highest = check_peak(config, training, f"{name} wordy, 50 rows at a time, {way}", parity)
    assert highest < 0.6 * training_memory(config, replace(training, loss="plain")).peak


FORMAT_WAYS = [{}, {"recompute": "blocks"}, {"recompute": "selective"}, {"optimizer": "sgd"}, {"optimizer": "adamw8bit"}]


@pytest.mark.parametrize("way", FORMAT_WAYS)
@pytest.mark.parametrize("precision", ["fp16", "bf16-pure"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_in_other_formats(name, precision, way, parity):
    config, batch_size, length = shaped(name, "deep")
    training = Training(batch_size, length, device="cpu", precision=precision, **way)
    check_peak(config, training, f"{name} deep, {precision}, {way}", parity)


@pytest.mark.parametrize("precision", ["fp32", "bf16-pure"])
def test_peak_of_an_update_in_8_bits(precision, parity, monkeypatch):
    """Eight tokens, so that the update is the highest moment; by small pieces it is not."""
    config, _, _ = shaped("gpt2", "wordy")
    training = Training(1, 8, device="cpu", precision=precision, optimizer="adamw8bit")
    ours, highest = check_peak(config, training, f"gpt2, update in 8 bits, {precision}", parity)
    assert ours.optimizer < 0.27 * training_memory(config, replace(training, precision="fp32", optimizer="adamw")).optimizer
    monkeypatch.setattr(train.optimizers.adamw8bit, "CHUNK_ELEMENTS", {"cpu": 4096})
    dtype = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    assert measured_step(build_network(config, seed=0, dtype=dtype), training).peak < 0.7 * highest


def check_peak(config: ModelConfig, training: Training, label: str, parity, tolerance=ALLOCATED[0], why=ALLOCATED[1]):
    """The account against the allocator, part by part; returns (the account, bytes measured at the highest moment)."""
    dtype = torch.bfloat16 if training.precision == "bf16-pure" else torch.float32
    network = build_network(config, seed=0, dtype=dtype)
    for parameter_name in training.frozen:
        network.get_parameter(parameter_name).requires_grad_(False)
    measured = measured_step(network, training)
    ours = training_memory(config, training)
    assert ours.weights == measured.weights and ours.gradients <= measured.weights
    # Each parameter's step count is a number too; and no gradient reaches the bias of BERT's head, which the loss leaves out.
    assert ours.optimizer == pytest.approx(measured.optimizer, rel=0.01)
    assert ours.gradients == pytest.approx(measured.gradients, rel=0.01)
    for part in ("forward", "peak"):
        what = {"forward": "memory when the forward ends", "peak": "memory of a step"}[part]
        error = relative(getattr(ours, part), getattr(measured, part))
        parity(f"{what}: {label}", f"{TORCH} allocator", error, tolerance, why)
    return ours, measured.peak


FROZEN = {
    "the embedding": r"body\.embedding",
    "the lower blocks": r"embedding|position|blocks\.[0-3]\.",
    "all but the last block": r"embedding|position|blocks\.[0-4]\.",
    "matrices": r"blocks.*(project|out|up|down|gate)",
    "norms": "norm",
}


@pytest.mark.parametrize("pattern", FROZEN)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_with_frozen_weights(name, pattern, parity):
    config, batch_size, length = shaped(name, "deep")
    frozen = frozenset(name for name in parameters(config) if re.search(FROZEN[pattern], name))
    training = Training(batch_size, length, device="cpu", frozen=frozen)
    _, highest = check_peak(config, training, f"{name} deep, {pattern} frozen", parity)
    if pattern in ("the lower blocks", "all but the last block", "matrices"):  # it would be seen if they were thought trained
        assert training_memory(config, replace(training, frozen=frozenset())).peak / highest > 1.2


@pytest.mark.parametrize("recompute", ["none", "blocks", "selective"])
@pytest.mark.parametrize("targets", ["all-linear", "query-value"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_with_adapters(name, targets, recompute, parity):
    config, batch_size, length = shaped(name, "small")
    training = Training(batch_size, length, "lora", recompute=recompute, rank=8, targets=targets, device="cpu")
    measured = measured_step(adapt(build_network(config, seed=0), 8, targets), training)
    ours = training_memory(config, training)
    assert ours.weights == measured.weights
    assert ours.gradients == 4 * adapter_parameters(config, 8, targets) == measured.gradients
    assert ours.optimizer == pytest.approx(measured.optimizer, rel=0.01)
    label = f"memory of a step: {name} adapters on {targets}, recompute {recompute}"
    parity(label, f"{TORCH} allocator", relative(ours.peak, measured.peak), *ALLOCATED)


@pytest.mark.parametrize(("kind", "every"), [("none", 1), ("blocks", 1), ("blocks", 2), ("selective", 1)])
def test_one_recomputation_is_not_taken_for_another(kind, every):
    config, batch_size, length = shaped("llama", "deep")
    training = Training(batch_size, length, recompute=kind, recompute_every=every, device="cpu")
    measured = measured_step(build_network(config, seed=0), training)
    for other, others_every in (("none", 1), ("blocks", 1), ("blocks", 2), ("selective", 1)):
        account = training_memory(config, replace(training, recompute=other, recompute_every=others_every))
        assert (abs(account.forward / measured.forward - 1) < 0.03) == ((other, others_every) == (kind, every))


@pytest.mark.parametrize("precision", ["fp32", "bf16-pure"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_averages(name, precision):
    config, training = tiny_config(name), Training(precision=precision, ema=True)
    network = build_network(config, seed=0, dtype=torch.bfloat16 if precision == "bf16-pure" else torch.float32)
    averages = EMA(network.named_parameters(), 0.999).averages
    without, with_them = (static_bytes(config, replace(training, ema=ema)) for ema in (False, True))
    assert with_them[2] - without[2] == sum(average.nbytes for average in averages.values())
    assert with_them[:2] == without[:2]


def test_a_quantized_base_has_the_paper_s_bits():
    config = ModelConfig.preset("llama-2-7b")
    weights, gradients, state = static_bytes(config, Training(method="qlora", rank=8, targets="query-value", precision="bf16"))
    packed, others = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert weights == pytest.approx(packed * (4 + 0.127) / 8 + 2 * others + 4 * 4_194_304, rel=1e-4)
    assert gradients == state / 2 == 4 * 4_194_304


def test_sizes_are_the_trainer_s():
    assert model.memory.BATCH_ELEMENTS == train.optimizers.muon.BATCH_ELEMENTS
    assert model.memory.WIDENED_ELEMENTS == train.optimizers.named_optimizer.WIDENED_ELEMENTS
    eight_bit = train.optimizers.adamw8bit
    assert (model.memory.SMALLEST, model.memory.BLOCK) == (eight_bit.MIN_8BIT_SIZE, eight_bit.BLOCK)
    assert model.memory.PIECE == eight_bit.CHUNK_ELEMENTS
    assert model.training.CHUNK_BYTES == train.losses.chunked.CHUNK_BYTES
    assert model.training.CHUNK_ROWS == train.losses.chunked.CHUNK_ROWS


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_on_a_gpu(name, way, parity):
    sizes = {"width": 512, "depth": 6, "heads": 8, "kv_heads": 8, "mlp_width": 2048, "vocab_size": 8000, "context": 512}
    config, training = tiny_config(name, **sizes), Training(4, 512, device="cuda", **WAYS[way])
    measured = measured_step(build_network(config, seed=0, device="cuda"), training)
    ours = training_memory(config, training)
    parity(f"memory of a step on a GPU: {name}, {way}", f"{TORCH} allocator", relative(ours.peak, measured.peak), *ALLOCATED)
