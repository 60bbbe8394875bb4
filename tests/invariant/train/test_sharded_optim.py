"""Two ranks that share each parameter: optimizers, scaler, averages and clipping are those of one process.

One pair of processes makes all the checks; the tests read what each of them found.
"""

import copy
import json
import math
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import train.optimizers.clip
import train.optimizers.muon
import train.optimizers.scaler
from tests.compare import Error, absolute, relative
from tests.ranks import in_two_ranks
from train.optimizers.adamw import AdamW
from train.optimizers.adamw8bit import AdamW8bit
from train.optimizers.clip import clip_grad_norm_
from train.optimizers.ema import EMA
from train.optimizers.muon import Muon
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.rounding import stochastic_round_
from train.optimizers.scaler import GradScaler
from train.optimizers.sgd import SGD
from train.parallel.ranks import disconnect
from train.parallel.shard import copy_, full_tensor, shard_groups, shard_of
from train.runs.sharded import is_sharded, local

RANKS = 2
TORCH = f"torch {torch.__version__.split('+')[0]}"


class Network(nn.Module):
    """Rows that two ranks share evenly, unevenly (5), and of which one rank has none (1)."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 1)
        self.gain = nn.Parameter(torch.ones(5))
        generator = torch.Generator().manual_seed(5)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gain * torch.tanh(self.middle(torch.tanh(self.into(x)))))


def sharded(network: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(network.middle)  # a block of its own, and the root with the rest
    return fully_shard(network)


def pair_of_networks(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    return Network(dtype), sharded(Network(dtype))


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def backward(one: nn.Module, both: nn.Module, step: int) -> None:
    """All rows in one process; half of them on each rank, whose gradients FSDP averages."""
    x = batch(step, one.gain.dtype)
    one(x).square().mean().backward()
    both(x.chunk(RANKS)[dist.get_rank()]).square().mean().backward()


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def difference(one: dict[str, Tensor], both: dict[str, Tensor]) -> Error:
    """Of whole tensors."""
    return absolute(*({name: full(value) for name, value in each.items()} for each in (one, both)))


MATRICES = ("into.weight", "middle.weight", "out.weight")


def optimizers_of(kind: str, network: nn.Module) -> Optimizers:
    named = dict(network.named_parameters())
    matrices = {name: named[name] for name in MATRICES}
    others = {name: param for name, param in named.items() if name not in MATRICES}
    return Optimizers(
        {
            "AdamW fused": lambda: [AdamW(named.items(), lr=0.01, fused=True)],
            "AdamW plain": lambda: [AdamW(named.items(), lr=0.01, fused=False)],
            "SGD": lambda: [SGD(named.items(), lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True)],
            "SGD plain": lambda: [SGD(named.items(), lr=0.01, momentum=0.9, weight_decay=0.1, foreach=False)],
            "Muon batched": lambda: [Muon(matrices.items()), AdamW(others.items(), lr=0.01)],
            "Muon plain": lambda: [Muon(matrices.items(), batched=False), AdamW(others.items(), lr=0.01)],
        }[kind]()
    )


def check_optimizer(kind: str) -> list:
    one, both = pair_of_networks()
    optimizers = [optimizers_of(kind, network) for network in (one, both)]

    def steps(numbers: range) -> None:
        for step in numbers:
            backward(one, both, step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    steps(range(6))
    state, expected = optimizers[1].named_state(), optimizers[0].named_state()
    assert all(is_sharded(value) for key, value in state.items() if not key.endswith(".step"))
    errors = [difference(dict(one.named_parameters()), dict(both.named_parameters())), difference(expected, state)]
    for step, copied in ((6, copy.deepcopy), (7, full)):  # it stops, and goes on from its own parts, or from whole tensors
        saved = {key: copied(value) for key, value in optimizers[1].named_state().items()}
        optimizers[1] = optimizers_of(kind, both)
        optimizers[1].load_named_state(saved)
        assert difference(saved, optimizers[1].named_state()) == 0
        steps(range(step, step + 1))
    errors.append(difference(dict(one.named_parameters()), dict(both.named_parameters())))
    tolerance, reason = 1e-12, "float64; gradients are averaged over ranks in another order"
    if "Muon" in kind:
        tolerance, reason = 1e-9, "as AdamW; the iteration enlarges rounding by 3.4^5 = 485"
    return [(f"sharded over 2 ranks: {kind}", "one process", max(errors), tolerance, reason)]


def check_mutant_of_muon() -> list:
    """Each rank orthogonalises its own rows only."""
    train.optimizers.muon.full_tensor = train.optimizers.muon.shard_of = lambda tensor, like: tensor
    try:
        ((_, _, error, _, _),) = check_optimizer("Muon batched")
    finally:
        train.optimizers.muon.full_tensor, train.optimizers.muon.shard_of = full_tensor, shard_of
    assert error > 1e-3
    return []


def check_moments_in_8_bits() -> list:
    """Rows of whole blocks: the bytes of one process, also after a load of whole tensors. Other rows: moments in float32."""
    from torch.distributed.fsdp import fully_shard

    sizes = ((256, 17), (77, 100), (80, 40), (4096, 1))  # the third has fewer than 4,096 numbers; of the last one rank has none
    one = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    both = fully_shard(copy.deepcopy(one))
    optimizers = [AdamW8bit(network.named_parameters(), lr=0.01) for network in (one, both)]
    for step in range(8):
        torch.manual_seed(step)
        for alone, param in zip(one.parameters(), both.parameters(), strict=True):
            alone.grad, param.grad = torch.randn(alone.shape) * torch.rand(alone.shape), torch.zeros_like(param)
            copy_(param.grad, alone.grad)
        for optimizer in optimizers:
            optimizer.step()
        if step == 4:
            saved = {key: full(value).clone() for key, value in optimizers[1].named_state().items()}
            optimizers[1] = AdamW8bit(both.named_parameters(), lr=0.01)
            optimizers[1].load_named_state(saved)
    expected, state = (optimizer.named_state() for optimizer in optimizers)
    assert state["0.weight.exp_avg"].dtype == torch.uint8 and state["0.weight.exp_avg_scale"].shape == (17, 1)
    assert expected["1.weight.exp_avg"].dtype == torch.uint8 and state["1.weight.exp_avg"].dtype == torch.float32
    assert all(is_sharded(value) for key, value in state.items() if not key.endswith(".step"))
    alone, spread = (dict(network.named_parameters()) for network in (one, both))
    for values, others in ((alone, spread), (expected, state)):
        assert all(torch.equal(full(values[key]), full(others[key])) for key in values if not key.startswith("1.weight"))
    assert difference({"1.weight": alone["1.weight"]}, {"1.weight": spread["1.weight"]}) < 0.02  # 8 steps of 0.01, nearly alike
    with pytest.raises(ValueError, match=r"1\.weight\.exp_avg"):
        optimizers[1].load_named_state({k: v for k, v in expected.items() if k.startswith("1.weight")})
    return []


def check_parts() -> list:
    _, both = pair_of_networks()
    for param in both.parameters():
        every = full_tensor(local(param.detach()), param)
        assert torch.equal(every, full(param)) and torch.equal(shard_of(every, param), local(param.detach()))
    assert local(both.out.weight).numel() == (5 if dist.get_rank() == 0 else 0)  # this is what an empty part is
    return []


def check_rounding() -> list:
    """Parts are rounded where they lie: on each rank to a neighbour of the float32 result, 300 tiny steps kept."""
    _, both = pair_of_networks(torch.bfloat16)
    optimizers = Optimizers([SGD(both.named_parameters(), lr=2.0**-14)])
    optimizers.set_rounding(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for param in both.parameters():
            local(param).fill_(1.5)
    for _ in range(300):
        for param in both.parameters():
            param.grad = torch.ones_like(param)
        optimizers.step()
    moved = torch.cat([1.5 - full(param).float().flatten() for param in both.parameters()])
    assert abs(moved.mean().item() - 300 * 2.0**-14) < 5 * 2.0**-7 * math.sqrt(300 / 128 / moved.numel())
    stochastic_round_(torch.empty(0, dtype=torch.bfloat16), torch.empty(0), torch.Generator())
    return []


def check_scaler() -> list:
    """An infinity in one rank's rows stops both; without the exchange, the mutant, the ranks would part."""
    one, both = pair_of_networks(torch.float32)
    optimizers, scaler = optimizers_of("AdamW fused", both), GradScaler(init_scale=2.0**8)
    before = {name: full(param).clone() for name, param in both.named_parameters()}

    def step(number: int, infinite_on: int | None) -> tuple[bool, bool]:
        scaler.scale(both(batch(number, torch.float32)).square().mean()).backward()
        if infinite_on == dist.get_rank():
            local(both.middle.weight.grad)[0, 0] = math.inf
        found = bool(scaler.unscale_(both.parameters()))
        norm = clip_grad_norm_(both.parameters(), None)
        raw = local(both.middle.weight.detach()).clone()
        scaler.step(optimizers)
        stepped = not torch.equal(raw, local(both.middle.weight.detach()))
        scaler.update()
        optimizers.zero_grad()
        assert found == (not stepped) == (not bool(norm.isfinite()))
        return stepped, found

    for rank in range(RANKS):
        assert step(0, rank) == (False, True)
    assert difference(before, dict(both.named_parameters())) == 0 and optimizers.named_state() == {}
    assert scaler.get_scale() == 2.0**6 and step(1, None) == (True, False)
    one(batch(1, torch.float32)).square().mean().backward()
    optimizer = optimizers_of("AdamW fused", one)
    optimizer.step()
    assert difference(dict(one.named_parameters()), dict(both.named_parameters())) < 1e-5

    train.optimizers.scaler.shard_groups = lambda grad: ()
    try:
        scaler = GradScaler()
        for param in both.parameters():
            param.grad = torch.zeros_like(param)
        if dist.get_rank() == 1:
            local(both.middle.weight.grad)[0, 0] = math.inf
        assert bool(scaler.unscale_(both.parameters())) == (dist.get_rank() == 1)
    finally:
        train.optimizers.scaler.shard_groups = shard_groups

    alone = nn.Parameter(torch.ones(2))  # not sharded: ranks agree where they are told to
    for group, expected in ((dist.group.WORLD, True), (None, dist.get_rank() == 0)):
        alone.grad = torch.full((2,), math.nan if dist.get_rank() == 0 else 1.0)
        assert bool(GradScaler(group=group).unscale_([alone])) == expected
    return []


def check_ema() -> list:
    one, both = pair_of_networks()
    averages, ours = EMA(one.named_parameters(), 0.8), EMA(both.named_parameters(), 0.8)
    optimizers = [optimizers_of("SGD", network) for network in (one, both)]
    for step in range(4):
        backward(one, both, step)
        for optimizer, average in zip(optimizers, (averages, ours), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            average.update()
    errors = [difference(averages.averages, ours.averages)]
    assert all(map(is_sharded, ours.averages.values()))

    x, raw = batch(9), {name: full(param).clone() for name, param in both.named_parameters()}
    with torch.no_grad():
        before, expected = both(x), one(x)
        with ours.applied():
            stale = both(x)  # the mutant: FSDP2's root still has the raw weights that it gathered
        with ours.applied(both), averages.applied():
            errors.append(absolute(both(x), one(x)))
            assert absolute(both(x), expected) > 1e-4 and not torch.equal(stale, both(x))
        assert torch.equal(both(x), before) and difference(raw, dict(both.named_parameters())) == 0

    again = EMA(both.named_parameters(), 0.8)
    again.load_named_state({name: full(value) for name, value in ours.named_state().items()})
    assert difference(again.averages, ours.averages) == 0 and again.updates == 4
    return [("sharded over 2 ranks: EMA", "one process", max(errors), 1e-12, "float64; sums in another order")]


def check_clip() -> list:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rows, reason = [], "float64; sums in another order"
    for max_norm in (0.1, 1e6):
        for foreach in (True, False):
            one, both = pair_of_networks()
            theirs = sharded(Network())
            backward(one, both, 3)
            theirs(batch(3)).square().mean().backward()
            norm = clip_grad_norm_(both.parameters(), max_norm, foreach=foreach)
            oracle = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm).full_tensor()
            assert not is_sharded(norm)
            grads, expected = ({n: p.grad for n, p in net.named_parameters()} for net in (both, theirs))
            part = f"clip_grad_norm_: sharded, {'foreach' if foreach else 'plain twin'}, max_norm {max_norm:g}"
            for error in (relative(norm, oracle), difference(grads, expected)):
                rows.append((part, f"{TORCH} clip_grad_norm_", error, 1e-13, reason))

    # Slices, copies and plain tensors together, on a mesh of two dimensions: each element counts once.
    values = [torch.randn(6, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    exact = torch.cat(values).norm().item()
    for shape in ((1, RANKS), (RANKS, 1)):
        mesh = init_device_mesh("cpu", shape)
        cuts = [(Replicate(), Shard(0)), (Shard(0), Replicate()), (Replicate(), Replicate())]
        grads = [distribute_tensor(value, mesh, cut) for value, cut in zip(values, cuts, strict=False)] + values[3:]
        params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for foreach in (True, False):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            norm = clip_grad_norm_(params, 1.0, foreach=foreach)
            worst = absolute([full(p.grad) for p in params], [v / (exact + 1e-6) for v in values])
            assert relative(norm, exact) < 1e-14 and worst < 1e-15
        train.optimizers.clip.shard_groups = lambda grad: (dist.group.WORLD,)  # the mutant: over all ranks, copies too
        try:
            assert train.optimizers.clip.total_norm([param.grad for param in params]).item() > 1.1
        finally:
            train.optimizers.clip.shard_groups = shard_groups
    return rows


CHECKS = {
    **{kind: lambda kind=kind: check_optimizer(kind) for kind in ("AdamW fused", "AdamW plain", "SGD", "SGD plain")},
    **{kind: lambda kind=kind: check_optimizer(kind) for kind in ("Muon batched", "Muon plain")},
    "Muon's mutant": check_mutant_of_muon,
    "moments in 8 bits": check_moments_in_8_bits,
    "parts": check_parts,
    "rounding": check_rounding,
    "scaler": check_scaler,
    "averages": check_ema,
    "clipping": check_clip,
}


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            found[name] = {"rows": [(*row, row[2].measure) for row in check()]}  # JSON keeps the number alone
        except Exception:
            found[name] = {"failure": traceback.format_exc()}
        failed = torch.tensor(float("failure" in found[name]))
        dist.all_reduce(failed)
        if failed:  # the ranks may stand at different places now: the rest cannot be told
            break
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    disconnect()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_ranks(one_rank, folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(found, parity, name):
    for rank, results in enumerate(found):
        assert name in results, "not reached: a check before it failed"
        assert "failure" not in results[name], f"rank {rank}: {results[name]['failure']}"
        for part, library, error, tolerance, reason, measure in results[name]["rows"]:
            parity(part, library, Error(error, measure), tolerance, reason)
