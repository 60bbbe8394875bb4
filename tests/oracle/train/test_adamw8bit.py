"""AdamW with moments in 8 bits: against bitsandbytes bit for bit, against AdamW, and what a rounded moment must not do."""

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

import train.optimizers.adamw8bit
from quant.blockwise import dynamic_map, nearest, nearest_on_grid
from tests.compare import absolute, relative
from tests.runs import assert_same_end, command, stopped_at
from train.optimizers.adamw import AdamW, adamw_update
from train.optimizers.adamw8bit import BLOCK, MIN_8BIT_SIZE, AdamW8bit, dynamic_map_on, nearest_by_table, nearest_table
from train.optimizers.build import build_optimizer
from train.optimizers.named_optimizer import Optimizers

BITSANDBYTES = f"bitsandbytes {bitsandbytes.__version__} AdamW8bit (CPU)"
CPU = torch.device("cpu")
# Rows of whole blocks; a last block of 52; as few numbers as have 8 bits; one dimension; three; then fewer than 4,096.
SHAPES = {"a": (33, 256), "b": (100, 77), "c": (64, 64), "d": (4100,), "e": (8, 5, 130), "f": (40, 33), "g": (7,)}
SMALL = ("f", "g")


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def groups_of(params: dict[str, Tensor]) -> list[dict]:
    """Two groups: with decay and without, each with rates and betas of its own."""
    first, second = "abf", "cdeg"
    own = {"weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)}
    return [
        {"params": [params[n] for n in first], "names": list(first), "weight_decay": 0.1},
        {"params": [params[n] for n in second], "names": list(second), **own},
    ]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Over four orders of magnitude within a block; some exact zeros, and at some steps a tensor of zeros."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        size = 10 ** (4 * torch.rand(shape, generator=generator) - 5)
        grad = torch.randn(shape, generator=generator) * size * (torch.rand(shape, generator=generator) > 0.1)
        grads[name] = (grad * ((step + index) % 9 != 0)).to(dtype)
    return grads


def train_on(optimizer, params: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        for name, grad in gradients(step, params["a"].dtype).items():
            params[name].grad = grad
        for group in optimizer.param_groups:
            group["lr"] *= 1 - 0.01 * (step % 3)
        optimizer.step()


def bits(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: tensor.detach().flatten().view(torch.uint8).tolist() for name, tensor in tensors.items()}


# ---- the maps' places


@pytest.mark.parametrize("signed", [True, False])
def test_two_look_ups_find_the_nearest_place(signed):
    """At every bound, at its neighbours among the floats, at both ends of each table entry, and in between."""
    code = dynamic_map_on(CPU, signed)
    assert torch.equal(code, dynamic_map(signed)) and dynamic_map_on(CPU, signed) is code
    bounds = (code[:-1] + code[1:]) / 2
    ends = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.cat((ends, ends | 0xFFFF, ends + 0x7777)).view(torch.float32)
    around = [bounds, *(bounds.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))]
    z = torch.cat((code, *around, ends[ends.abs() <= 1], torch.rand(100_000) * 2 - 1, torch.randn(100_000) * 1e-6))
    assert torch.equal(nearest_by_table(z, code), nearest(z, code))
    first, _ = nearest_table(code)
    assert not torch.equal(first[(z.view(torch.int32) >> 16) & 0xFFFF].to(torch.uint8), nearest(z, code))  # the mutant: one


# ---- against bitsandbytes


@pytest.mark.parametrize("piece", [1 << 18, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bitsandbytes(parity, monkeypatch, dtype, piece):
    monkeypatch.setattr(train.optimizers.adamw8bit, "CHUNK_ELEMENTS", {"cpu": piece})
    ours, theirs = weights(dtype), weights(dtype)
    optimizer = AdamW8bit(groups_of(ours), lr=1e-2, decide=nearest_on_grid)
    oracle = bitsandbytes.optim.AdamW8bit(groups_of(theirs), lr=1e-2)
    train_on(optimizer, ours, range(40))
    train_on(oracle, theirs, range(40))
    errors = {name: absolute(ours[name], theirs[name]) for name in SHAPES}
    for name in SHAPES.keys() - set(SMALL):
        mine, other = optimizer.state[ours[name]], oracle.state[theirs[name]]
        pairs = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1", "exp_avg_sq_scale": "absmax2"}
        for slot, key in pairs.items():
            assert torch.equal(mine[slot].flatten(), other[key].flatten()), (name, slot)
    label, large = str(dtype).removeprefix("torch."), [errors[name] for name in SHAPES if name not in SMALL]
    parity(f"AdamW8bit: {label}, pieces of {piece}", BITSANDBYTES, max(large), 0, "the same operations in the same order; bits")
    few = [errors[name] for name in SMALL]
    tolerance, reason = 40 * 2**-22, "theirs corrects eps and lr, not the root: a last place of weights below 4, 40 steps"
    if dtype == torch.bfloat16:
        tolerance, reason = 2**-6, "as in float32, where it may decide one rounding: a last place of weights below 4"
    parity(f"AdamW8bit: float32 moments of small tensors, {label}", BITSANDBYTES, max(few), tolerance, reason)


def test_small_tensors_equal_the_plain_twin_in_float64(parity):
    params = weights()
    exact = {name: (params[name].detach().double(), *torch.zeros(2, *SHAPES[name], dtype=torch.float64)) for name in SMALL}
    optimizer = AdamW8bit(params.items(), lr=1e-2, weight_decay=0.1)
    for step in range(50):
        for name, grad in gradients(step).items():
            params[name].grad = grad
        optimizer.step()
        for name, (param, *moments) in exact.items():
            grad = params[name].grad.double()
            exact[name] = adamw_update(param, grad, *moments, step + 1, lr=1e-2, weight_decay=0.1)
    for name in SMALL:
        assert set(optimizer.state[params[name]]) == {"exp_avg", "exp_avg_sq", "step"}
        moments = (optimizer.state[params[name]][slot].double() for slot in ("exp_avg", "exp_avg_sq"))
        for moment, expected in zip(moments, exact[name][1:], strict=True):
            assert relative(moment, expected) < 1e-6
    error = absolute([params[name] for name in SMALL], [exact[name][0] for name in SMALL])
    reason = "float32: a last place of weights below 4, 50 steps"
    parity("AdamW8bit: small tensors", "plain twin, float64", error, 50 * 2**-22, reason)


# ---- state


def test_state_has_two_bytes_a_parameter_and_eight_a_block():
    params = weights()
    optimizer = AdamW8bit(params.items())
    assert optimizer.named_state() == {}
    train_on(optimizer, params, range(1))
    state = optimizer.named_state()
    for name, param in params.items():
        own = {slot: state[f"{name}.{slot}"] for slot in optimizer.slots if f"{name}.{slot}" in state}
        expected = 2 * param.numel() + 8 * -(-param.numel() // BLOCK) if param.numel() >= MIN_8BIT_SIZE else 8 * param.numel()
        assert sum(slot.nbytes for slot in own.values()) == expected + 4  # the count of steps
        assert own["exp_avg"].shape == own["exp_avg_sq"].shape == param.shape
    assert sum(state[f"a.{slot}"].nbytes for slot in optimizer.slots[:4]) == (2 + 8 / 256) * params["a"].numel()
    assert state["a.exp_avg_scale"].shape == (33, 1) and state["b.exp_avg_scale"].shape == (31,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [False, True])
def test_stopping_half_way_changes_nothing(dtype, rounding):
    """With stochastic rounding parameters and gradients are widened for the update; codes must not be."""

    def optimizer_of(params: dict[str, Tensor], seed: int) -> Optimizers:
        optimizers = Optimizers([AdamW8bit(groups_of(params), lr=1e-2)])
        optimizers.set_rounding(torch.Generator().manual_seed(seed) if rounding else None)
        return optimizers

    straight, first = weights(dtype), weights(dtype)
    whole, stopped = optimizer_of(straight, 0), optimizer_of(first, 0)
    train_on(stopped, first, range(9))
    train_on(whole, straight, range(9))
    whole.set_rounding(torch.Generator().manual_seed(9) if rounding else None)
    train_on(whole, straight, range(9, 20))

    def resume(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        second = {name: nn.Parameter(param.detach().clone()) for name, param in first.items()}
        resumed = optimizer_of(second, 9)
        for group, old in zip(resumed.param_groups, stopped.param_groups, strict=True):
            group["lr"] = old["lr"]
        resumed.load_named_state(state)
        train_on(resumed, second, range(9, 20))
        return second, resumed.named_state()

    second, state = resume({key: value.clone() for key, value in stopped.named_state().items()})
    assert bits(second) == bits(straight) and bits(state) == bits(whole.named_state())
    assert state["a.exp_avg"].dtype == torch.uint8 and state["f.exp_avg"].dtype == torch.float32
    second, _ = resume({})  # the mutant: weights alone are not enough
    assert bits(second) != bits(straight)


def test_rounded_by_chance_the_moments_are_those_of_float32():
    """The first step: bfloat16 weights are rounded, moments are not, and every weight is next to that of float32."""
    narrow = weights(torch.bfloat16)
    wide = {name: nn.Parameter(param.detach().float()) for name, param in narrow.items()}
    optimizers = {"narrow": AdamW8bit(narrow.items(), lr=1e-2), "wide": AdamW8bit(wide.items(), lr=1e-2)}
    optimizers["narrow"].rounding = torch.Generator().manual_seed(0)
    for name, grad in gradients(1, torch.bfloat16).items():
        narrow[name].grad, wide[name].grad = grad, grad.float()
    for optimizer in optimizers.values():
        optimizer.step()
    assert bits(optimizers["narrow"].named_state()) == bits(optimizers["wide"].named_state())
    assert not torch.equal(narrow["a"], wide["a"].bfloat16())  # the mutant: to nearest
    for name in SHAPES:
        exact = wide[name].detach()
        assert ((narrow[name].float() - exact).abs() <= 2**-7 * exact.abs()).all()


def test_strides_do_not_matter():
    start, grads = torch.randn(80, 64).mT, [torch.randn(64, 80) for _ in range(5)]  # dense, not contiguous

    def trained(param: Tensor) -> Tensor:
        param = nn.Parameter(param)
        optimizer = AdamW8bit([param], lr=0.1)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        return param.detach()

    assert start.clone().stride() == start.stride()
    assert torch.equal(trained(start.clone()), trained(start.contiguous()))


# ---- what rounding must not do


def embedding(optimizer_of, grad_of, width: int = 64, steps: int = 60) -> Tensor:
    """256 rows that begin at zero, after steps of `grad_of(step, random)`."""
    generator, param = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(256, width))
    optimizer = optimizer_of([param], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        param.grad = grad_of(step, 1e-2 * torch.randn(256, width, generator=generator))
        optimizer.step()
    return param.detach()


def seen_by_even_rows(step: int, grad: Tensor) -> Tensor:
    grad[1::2] = 0
    return grad


def seen_once_by_odd_rows(step: int, grad: Tensor) -> Tensor:
    return grad if step == 0 else seen_by_even_rows(step, grad)


def test_a_row_never_seen_does_not_move():
    """Two rows of 64 that are seen share a block with two that are not."""
    assert embedding(AdamW8bit, seen_by_even_rows)[1::2].abs().max() == 0
    assert embedding(AdamW8bit, seen_by_even_rows)[::2].abs().min() > 0
    drifted = embedding(lambda *settings, **named: AdamW8bit(*settings, decide=nearest_on_grid, **named), seen_by_even_rows)
    assert drifted[1::2].abs().min() > 1e-5  # in 60 steps; the rows that are seen move by 1e-3 a step at the most
    whole_blocks = embedding(lambda *s, **named: AdamW8bit(*s, decide=nearest_on_grid, **named), seen_by_even_rows, width=256)
    assert whole_blocks[1::2].abs().max() == 0  # a block of zeros has the scale 0, and no row shares it


@pytest.mark.parametrize("width", [64, 256])
def test_a_row_seen_once_comes_to_rest(width, monkeypatch):
    """Its first moment fades over some ten steps; were its second one rounded to zero, each of them would divide by eps."""
    exact = embedding(AdamW, seen_once_by_odd_rows, width)[1::2].abs().max()
    assert embedding(AdamW8bit, seen_once_by_odd_rows, width)[1::2].abs().max() < 3 * exact
    monkeypatch.setattr(torch, "maximum", lambda code, positive, out: code)  # the mutant: nearest alone
    assert embedding(AdamW8bit, seen_once_by_odd_rows, width)[1::2].abs().max() > 100 * exact


def test_it_converges_as_32_bits_do(parity):
    """Least squares with noise, from batches of 32 of 512 rows: the loss on all of them."""

    def final_loss(optimizer_class) -> float:
        generator = torch.Generator().manual_seed(0)
        x_ND, true_DO = torch.randn(512, 64, generator=generator), torch.randn(64, 128, generator=generator)
        y_NO = x_ND @ true_DO + torch.randn(512, 128, generator=generator)
        weight_DO = nn.Parameter(torch.zeros(64, 128))
        optimizer = Optimizers([optimizer_class([("weight", weight_DO)], lr=2e-2, weight_decay=0.0)])
        for step in range(600):
            optimizer.set_lr(1 - step / 600)
            rows = torch.randint(512, (32,), generator=generator)
            weight_DO.grad = x_ND[rows].mT @ (x_ND[rows] @ weight_DO.detach() - y_NO[rows]) / 32
            optimizer.step()
        return (x_ND @ weight_DO.detach() - y_NO).square().mean().item()

    loss, expected = final_loss(AdamW8bit), final_loss(AdamW)
    assert expected < 1.1  # 129.0 at the start; the noise is 1
    reason = "moments with 2 to 3 digits; loss, relative"
    parity("AdamW8bit: least squares", "AdamW, 32 bits", relative(loss, expected), 0.01, reason)


# ---- as the trainer has it


def test_build_optimizer_knows_it_and_rates_of_their_own():
    params = {name: param for name, param in weights().items() if name in "ab"}
    options = {"lr": 1e-3, "lr_multiple_of": lambda name: {"a": 1.0, "b": 4.0}[name]}
    (optimizer,) = build_optimizer("adamw8bit", params.items(), lambda name: "matrix", **options).optimizers
    assert type(optimizer) is AdamW8bit
    assert [(group["names"], group["lr"]) for group in optimizer.param_groups] == [(["a"], 1e-3), (["b"], 4e-3)]
    with pytest.raises(ValueError, match="lr=-1"):
        AdamW8bit(params.items(), lr=-1)


def test_a_run_stopped_and_resumed_ends_in_the_same_bytes(options, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = (*options, "--optimizer", "adamw8bit", "--steps", 12, "--save-every", 4, "--eval-every", 6)
    said = command(*settings, "--out", whole)
    assert said.code == 0, said.err
    assert stopped_at(6, *settings, "--out", run).code == 130
    assert command("--resume", run).code == 0
    assert_same_end(run, whole, steps=12)


@pytest.mark.gpu
def test_a_step_on_the_card_is_the_step_on_the_cpu(monkeypatch):
    """The first step, before a code that fell to the other side of a bound can make a difference; in five pieces."""
    monkeypatch.setattr(train.optimizers.adamw8bit, "CHUNK_ELEMENTS", {"cpu": 4096, "cuda": 2048})
    states, after = [], []
    for device in ("cpu", "cuda"):
        params = {name: nn.Parameter(param.detach().to(device)) for name, param in weights().items()}
        optimizer = AdamW8bit(params.items(), lr=1e-2)
        for name, grad in gradients(1).items():
            params[name].grad = grad.to(device)
        optimizer.step()
        after.append({name: param.detach().cpu() for name, param in params.items()})
        states.append({key: value.cpu() for key, value in optimizer.named_state().items()})
    assert max((after[0][name] - after[1][name]).abs().max() for name in SHAPES) < 1e-6
    for key, value in states[0].items():
        other = states[1][key]
        assert other.dtype == value.dtype
        if value.dtype == torch.uint8:
            assert (other != value).double().mean() < 1e-3
        else:
            assert (other - value).abs().max() <= 1e-6 * value.abs().max()
