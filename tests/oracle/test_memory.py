"""The memory of training: what autograd keeps and what the allocator holds, against the account of both."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import model.memory
import train.muon
from model.activations import Training, activation_bytes
from model.config import ModelConfig
from model.init import build
from model.memory import Memory, standing, training_memory
from model.parameters import adapted, adapter_parameters
from model.weights import role_of
from tests.conftest import tiny_config
from train.objective import Objective, Term
from train.optim import build_optimizer
from train.step import train_step

TORCH = f"torch {torch.__version__}"
ALLOCATED = (0.05, "the account is by operation, the allocator by kernel")
FAMILIES = ["gpt2", "llama", "mistral", "qwen3", "bert", "t5", "t5-gated", "bart", "vaswani"]


class Scored(Objective):
    """The objective on what the head's matrix reads: of a masked head that is behind its own layers."""

    def forward(self, batch):
        hidden = self.network.body(batch["input_ids"]).hidden
        return {"loss": Term(*self.loss(self.network.head.features(hidden), self.network.head.weight, batch["labels"]))}


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
    for parameter in adapted(network.config, targets):
        owner, _, leaf = parameter.name.removesuffix(".weight").rpartition(".")
        parent = network.get_submodule(owner)
        setattr(parent, leaf, Adapted(getattr(parent, leaf), rank))
    return network


def autocast(mixed: bool):
    return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()


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

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(mixed):
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
    measured = kept_bytes(build(config, seed=0), batch_of(batch_size, length), mixed)
    training = Training(batch_size, length, mixed=mixed, device="cpu")
    # BERT's head: on a CPU autocast leaves its norm in 16 bits, on a GPU it widens what comes in, which is counted.
    tolerance = (0.03, "the norm in the head") if name == "bert" and mixed else (1e-4, "a mask of a scalar or two")
    error = abs(activation_bytes(config, training) / measured - 1)
    parity(f"activations: {name}{', dropout' * dropped}{', bf16' * mixed}", f"{TORCH} saved tensors", error, *tolerance)
    if dropped:  # and the measurement would see what is left out
        bare = activation_bytes(config.replace(**dict.fromkeys(DROPPED, 0.0)), training)
        assert abs(bare / measured - 1) > 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_activations_at_other_shapes(name, shape, parity):
    config, batch_size, length = shaped(name, shape)
    measured = kept_bytes(build(config, seed=0), batch_of(batch_size, length), False)
    error = abs(activation_bytes(config, Training(batch_size, length, device="cpu")) / measured - 1)
    parity(f"activations: {name} {shape}", f"{TORCH} saved tensors", error, 1e-4, "a scalar or two")


@pytest.mark.parametrize("targets", ["all-linear", "attention", "query-value"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_activations_of_adapters(name, targets, parity):
    config, batch_size, length = shaped(name, "small")
    measured = kept_bytes(adapt(build(config, seed=0), 8, targets), batch_of(batch_size, length), False)
    training = Training(batch_size, length, method="lora", rank=8, targets=targets, device="cpu")
    error = abs(activation_bytes(config, training) / measured - 1)
    parity(f"activations with adapters: {name}, {targets}", f"{TORCH} saved tensors", error, *ALLOCATED)


# ---- a whole step


def recomputing(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for block in getattr(module, "blocks", ()):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return network


def optimizers_of(network: nn.Module, optimizer: str):
    def role(name: str) -> str:
        return "matrix" if name.endswith(("a_RI", "b_OR")) else role_of(network.config, name)

    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    return build_optimizer(optimizer, named, role, lr=1e-4, matrix_lr=1e-4)


def standing_bytes(network: nn.Module, optimizers) -> tuple[int, int]:
    return sum(p.nbytes for p in network.parameters()), sum(state.nbytes for state in optimizers.named_state().values())


def measured_peak(network: nn.Module, batch_size: int, length: int, training: Training) -> tuple[int, int, int]:
    """(weights, state, all that is allocated at the highest moment of a second step), by the allocator's own events."""
    optimizers, objective = optimizers_of(network, training.optimizer), Scored(network.train())
    micro_batches = [batch_of(batch_size, length) for _ in range(training.accumulate)]
    step = partial(train_step, objective, micro_batches, optimizers, max_norm=1.0, autocast=lambda: autocast(training.mixed))
    step()
    weights, state = standing_bytes(network, optimizers)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return weights, state, weights + state + highest


WAYS = {
    "fp32": {},
    "recomputed": {"recompute": True},
    "bf16": {"mixed": True},
    "bf16 recomputed": {"mixed": True, "recompute": True},
    "accumulated": {"accumulate": 2},
    "accumulated, recomputed": {"accumulate": 2, "recompute": True},
    "muon": {"optimizer": "muon", "recompute": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak(name, shape, way, parity):
    config, batch_size, length = shaped(name, shape)
    training = Training(batch_size, length, device="cpu", **WAYS[way])
    ours, highest = check_peak(config, training, f"{name} {shape}, {way}", parity)
    if shape == "wordy":  # and the measurement would see it if the gradients of the logits were left out
        assert abs((ours.peak - 2 / 3 * ours.logits) / highest - 1) > 0.05


@pytest.mark.parametrize("way", ["fp32", "recomputed", "bf16"])
@pytest.mark.parametrize("name", ["bert", "qwen3", "t5", "bart"])
def test_peak_of_other_families(name, way, parity):
    config, batch_size, length = shaped(name, "small")
    check_peak(config, Training(batch_size, length, device="cpu", **WAYS[way]), f"{name} small, {way}", parity)


def check_peak(config: ModelConfig, training: Training, label: str, parity) -> tuple[Memory, int]:
    network = build(config, seed=0)
    network = recomputing(network) if training.recompute else network
    weights, state, highest = measured_peak(network, training.batch_size, training.context, training)
    ours = training_memory(config, training)
    assert ours.weights == weights and ours.gradients <= weights
    # Each parameter's step count is a number too; and no gradient reaches the bias of BERT's head, which the loss leaves out.
    assert ours.optimizer == pytest.approx(state, rel=0.01)
    parity(f"memory of a step: {label}", f"{TORCH} allocator", abs(ours.peak / highest - 1), *ALLOCATED)
    return ours, highest


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("targets", ["all-linear", "query-value"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_with_adapters(name, targets, recompute, parity):
    config, batch_size, length = shaped(name, "small")
    training = Training(batch_size, length, "lora", recompute=recompute, rank=8, targets=targets, device="cpu")
    network = adapt(build(config, seed=0), 8, targets)
    weights, state, highest = measured_peak(recomputing(network) if recompute else network, batch_size, length, training)
    ours = training_memory(config, training)
    assert ours.weights == weights
    assert ours.gradients == 4 * adapter_parameters(config, 8, targets)
    assert ours.optimizer == pytest.approx(state, rel=0.01)
    label = f"memory of a step: {name} adapters on {targets}{', recomputed' * recompute}"
    parity(label, f"{TORCH} allocator", abs(ours.peak / highest - 1), *ALLOCATED)


def test_a_quantized_base_has_the_paper_s_bits():
    config = ModelConfig.preset("llama-2-7b")
    weights, gradients, state = standing(config, Training(method="qlora", rank=8, targets="query-value", mixed=True))
    packed, others = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert weights == pytest.approx(packed * (4 + 0.127) / 8 + 2 * others + 4 * 4_194_304, rel=1e-4)
    assert gradients == state / 2 == 4 * 4_194_304


def test_the_stacks_of_muon_are_the_trainer_s():
    assert model.memory.BATCH_ELEMENTS == train.muon.BATCH_ELEMENTS


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_on_a_gpu(name, way, parity):
    sizes = {"width": 512, "depth": 6, "heads": 8, "kv_heads": 8, "mlp_width": 2048, "vocab_size": 8000, "context": 512}
    config = tiny_config(name, **sizes)
    training = Training(4, 512, device="cuda", **WAYS[way])
    network = build(config, seed=0, device="cuda").train()
    network = recomputing(network) if training.recompute else network
    optimizers, objective = optimizers_of(network, training.optimizer), Scored(network)
    batch = {key: value.cuda() for key, value in batch_of(4, 512).items()}
    mixed = partial(torch.autocast, "cuda", torch.bfloat16, enabled=training.mixed)
    for _ in range(2):  # the first makes the state, and the libraries' workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_step(objective, [batch] * training.accumulate, optimizers, max_norm=1.0, autocast=mixed)
    spare = before - sum(standing_bytes(network, optimizers))  # workspaces, and the batch
    highest = torch.cuda.max_memory_allocated() - spare
    ours = training_memory(config, training)
    parity(f"memory of a step on a GPU: {name}, {way}", f"{TORCH} allocator", abs(ours.peak / highest - 1), *ALLOCATED)
