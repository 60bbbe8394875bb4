"""PEFT's twin of a small network with an adapter: the same weights, the same adapter, every parameter under two names.

    mine = twin("llama", LoraConfig(r=3), peft.LoraConfig(r=3, ...), folder)     both, with the same random adapter
    compare("lora", mine, parity)     logits, gradients, parameters after ten updates, how many are trained

A pair of networks is float64, and transformers' casts to float32 are undone (`tests.oracle.wide`), so that only the order of
sums differs.
"""

from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.inject import add_adapters, merge, unmerge
from lora.targets import match_layers, published_modules
from model.network import Network
from model.weights import to_published, weight_table
from tests.compare import Error, mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import ROUNDING, inputs, published
from tests.oracle.wide import widen

LIBRARY = f"peft {peft.__version__}"
FAMILIES = ("gpt2", "llama", "bert", "t5")
STEPS = (1e-11, "float64 rounding, through ten updates of AdamW")
RATE, EPS = 1e-3, 1e-6  # of AdamW; by the default eps, a gradient of 1e-9 that is off by 1e-16 would move its parameter in full

# The last part of our parameter's name -> what PEFT may call it, after the layer's name.
LEAVES = {
    "A": ("lora_A.{name}.weight", "lora_A.{name}", "lora_embedding_A.{name}"),
    "B": ("lora_B.{name}.weight", "lora_B.{name}", "lora_embedding_B.{name}"),
    "E": ("lora_E.{name}",),
    "magnitude": ("lora_magnitude_vector.{name}.weight",),
    "scale_I": ("ia3_l.{name}",),
    "scale_O": ("ia3_l.{name}",),
}


@dataclass
class Twin:
    """Our network and PEFT's model; `names`: our name of each trained parameter -> PEFT's."""

    network: Network
    theirs: peft.PeftModel
    names: dict[str, str]

    def to_theirs(self, name: str, value: Tensor) -> Tensor:
        """Our parameter (or its gradient) in the shape that PEFT gives it."""
        target = self.theirs.get_parameter(self.names[name])
        before, _, after = name.partition(".parts.")
        own = name.replace(".base.", ".") if not after else f"{before}.{after.partition('.')[2]}"
        if own in weight_table(self.network.config):  # a bias or a whole module: the family's layout
            return to_published(weight_table(self.network.config)[own], value, self.network.config)
        return value.reshape(target.shape)  # a vector that PEFT keeps as a row or column; others are alike

    @torch.no_grad()
    def copy(self) -> None:
        """Give PEFT's model the values of every parameter that we train."""
        for name, value in trained(self.network).items():
            self.theirs.get_parameter(self.names[name]).copy_(self.to_theirs(name, value))


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def published_name(network: Network, theirs: nn.Module, name: str) -> str:
    """PEFT's name of our parameter; one that it does not have is an error."""
    have, modules = dict(theirs.named_parameters(remove_duplicate=False)), published_modules(network)
    path, _, rest = name.partition(".parts.")
    adapter, _, leaf = rest.partition(".")
    if not rest:
        path, _, leaf = name.removesuffix(".base").replace(".base.", ".").rpartition(".")
    prefix = f"base_model.model.{modules[path]}"
    endings = LEAVES.get(leaf, ()) if rest else ()
    candidates = [f"{prefix}.{ending.format(name=adapter)}" for ending in endings]
    candidates += [f"{prefix}.modules_to_save.{adapter}.{leaf}", f"{prefix}.base_layer.{leaf}", f"{prefix}.{leaf}"]
    found = [candidate for candidate in candidates if candidate in have]
    assert found, f"{name}: none of {candidates} is PEFT's"
    return found[0]


def target_names(network: Network, targets: str) -> list[str]:
    """What a PEFT config's `target_modules` must be to mean the layers that our `targets` means: their full names."""
    modules = published_modules(network)
    return [modules[path] for path in match_layers(network, targets)]


@torch.no_grad()
def randomize(network: Network, seed: int = 1, scale: float = 0.3) -> None:
    """Move every trained parameter: B = 0 or a magnitude at its first value would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for value in trained(network).values():
        value.add_(scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype))


def twin(
    family: str, config: object, theirs: peft.PeftConfig, folder, *, random: bool = True, copy: bool = True, **changes
) -> Twin:
    """The tiny network of `family` (`tests.conftest.tiny_config`, with `changes`) with our adapter of `config`, and
    transformers' with PEFT's of `theirs`, whose `target_modules` are filled in from `config.targets`.

    Every trained parameter is random (unless `random=False`) and the same in both (unless `copy=False`). folder: an empty one,
    for the weights.
    """
    network = randomized(tiny_config(family, **changes))
    base = widen(published(network, folder))
    if theirs.target_modules is None:
        theirs.target_modules = target_names(network, config.targets)
    theirs.fan_in_fan_out = family == "gpt2"  # transformers' Conv1D
    add_adapters(network, config)
    if random:
        randomize(network)
    return pair(network, base, theirs, copy=copy)


def pair(network: Network, base: nn.Module, theirs: peft.PeftConfig, *, copy: bool = True) -> Twin:
    """PEFT's adapter on `base`, with the values of the one that `network` has."""
    model = peft.get_peft_model(base, theirs).eval()
    for name, value in model.named_parameters():
        # AdaLoRA's divisor of the scale is a constant, but PEFT makes it a trained parameter where it casts or moves it.
        value.requires_grad_(value.requires_grad and ".ranknum." not in name)
    both = Twin(network, model, {name: published_name(network, model, name) for name in trained(network)})
    if copy:
        both.copy()
    return both


def batch(both: Twin) -> tuple[dict, dict, Tensor]:
    """Our arguments, theirs, and which logits count."""
    ours, theirs, real, _ = inputs(both.network.config, padded=True)
    return ours, theirs, real


def loss_of(logits: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[real], labels[real])


def gradients_gap(both: Twin) -> Error:
    """Over every trained parameter of ours; nothing else of theirs may have one, and none is zero throughout."""
    errors = []
    for name, value in trained(both.network).items():
        expected = both.theirs.get_parameter(both.names[name]).grad
        assert expected.abs().max() > 0, f"{name} has no gradient: nothing is compared"
        errors.append(mixed(both.to_theirs(name, value.grad), expected))
    return max(errors)


def parameters_gap(both: Twin) -> Error:
    values = trained(both.network).items()
    return max(mixed(both.to_theirs(name, value), both.theirs.get_parameter(both.names[name])) for name, value in values)


def compare(family: str, both: Twin, parity, *, draws: int = 0) -> None:
    """Rows of the parity table for `family: …`: logits, gradients, parameters after ten updates by torch's AdamW; and the two
    train as many numbers, under the same names. Each forward pass of either begins with the seed `draws`, for dropout."""
    ours, theirs, real = batch(both)
    theirs_trained = {name: value for name, value in both.theirs.named_parameters() if value.requires_grad}
    assert set(both.names.values()) == set(theirs_trained)
    assert sum(p.numel() for p in trained(both.network).values()) == sum(p.numel() for p in theirs_trained.values())

    def results() -> tuple[Tensor, Tensor]:
        torch.manual_seed(draws)
        mine = both.network(**ours).logits
        torch.manual_seed(draws)
        return mine, both.theirs(**theirs).logits

    logits, expected = results()
    parity(f"{family}: logits", LIBRARY, mixed(logits[real], expected[real]), *ROUNDING)
    labels = torch.randint(0, logits.size(-1), real.shape)
    loss_of(logits, real, labels).backward()
    loss_of(expected, real, labels).backward()
    parity(f"{family}: gradients", LIBRARY, gradients_gap(both), *ROUNDING)

    weights = (trained(both.network).values(), theirs_trained.values())
    optimizers = [torch.optim.AdamW(values, lr=RATE, eps=EPS) for values in weights]
    start = {name: value.detach().clone() for name, value in trained(both.network).items()}
    for _ in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for logits in results():
            loss_of(logits, real, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all((value - start[name]).abs().max() > RATE for name, value in trained(both.network).items())
    parity(f"{family}: parameters after 10 steps", LIBRARY, parameters_gap(both), *STEPS)


def check_merging(family: str, config: object, **changes) -> None:
    """merge ≡ the adapter beside the weights, at 1e-12 in float64 and 1e-5 in float32; unmerge gives every bit back."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        network = randomized(tiny_config(family, **changes), dtype=dtype)
        ours, *_ = inputs(network.config, padded=False)
        plain = network(**ours).logits
        randomize(add_adapters(network, config))
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        beside = network(**ours).logits
        assert mixed(plain, beside) > 1e-2  # the adapter does something
        assert mixed(merge(network)(**ours).logits, beside) <= tolerance
        changed = [name for name, value in network.state_dict().items() if not torch.equal(value, weights[name])]
        assert len([name for name in changed if name.endswith("weight")]) == len(match_layers(network, config.targets))
        back = unmerge(network).state_dict()
        assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
        assert torch.equal(network(**ours).logits, beside)


def check_sixteen_bit(dtype: torch.dtype, config: object) -> None:
    """A 16-bit network with float32 adapters: outputs near those in float64, gradients finite, float32, near likewise."""
    for family in FAMILIES:
        wide, narrow = (randomized(tiny_config(family), dtype=dtype) for _ in range(2))
        wide.double()  # the same weights: those that 16 bits can hold
        ours, *_ = inputs(wide.config, padded=False)
        results = []
        for network in (wide, narrow):
            randomize(add_adapters(network, config), scale=0.1)
            logits = network(**ours).logits
            direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            (logits.double() * direction).mean().backward()
            results.append((logits, trained(network)))
        (exact, exact_trained), (logits, narrow_trained) = results
        assert logits.isfinite().all()
        assert (logits.double() - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm(), family
        for name, value in narrow_trained.items():
            assert value.dtype == value.grad.dtype == torch.float32 and value.grad.isfinite().all()
            expected = exact_trained[name].grad
            # T5's scores are not scaled, and these weights are large: a softmax near 0 or 1 (bfloat16: 0.31, others 0.06)
            assert expected.norm() > 0 and (value.grad - expected).norm() < 0.5 * expected.norm(), (family, name)
