"""Triton's loss kernel beside its plain twin in float64 (`tests.oracle.triton.harness`)."""

import itertools

import torch

from tests.compare import Error, relative
from tests.oracle.triton.harness import DTYPES, FLOOR, LAYOUTS, Launch, main, placed
from train.losses.chunked import row_loss_

SIZES = {  # rows and words: fewer than a block, one word more than a block, several blocks; one of each
    "3 x 5": (3, 5),
    "5 x 4097": (5, 4097),
    "2 x 9000": (2, 9000),
    "1 x 1": (1, 1),
}
OPTIONS = {"bare": (0.0, 0.0), "smoothed": (0.1, 0.0), "z-loss": (0.0, 0.01), "both": (0.3, 0.02)}
CASES = {
    f"{size}, {dtype}, {layout}, {options}": (size, dtype, layout, options)
    for size, dtype, layout, options in [
        *itertools.product(["3 x 5"], DTYPES, LAYOUTS, ["both"]),
        *itertools.product(["5 x 4097"], DTYPES, ["contiguous"], OPTIONS),
        *itertools.product(["2 x 9000", "1 x 1"], DTYPES, ["every second row"], ["both"]),
    ]
}
VARIANTS = {
    f"{dtype}{', aligned' * aligned}{', loss alone' * (not gradient)}": (dtype, gradient, aligned)
    for dtype, (gradient, aligned) in itertools.product(DTYPES, [(True, True), (True, False), (False, True)])
}
AROUND = 30.0  # more than the largest logit: read by mistake, it shows


def measure(name: str, device: str = "cpu") -> dict:
    """Largest errors over the largest entry, of losses and gradients; and whether all other memory stayed as it was."""
    from train.losses.kernels import cross_entropy as kernel

    size, dtype, layout, options = CASES[name]
    torch.manual_seed(0)
    (rows, words), (smoothing, z_loss) = SIZES[size], OPTIONS[options]
    rising = torch.linspace(0, 8, words, device=device)  # the largest is not in the first block
    logits, memory = placed((4 * torch.randn(rows, words, device=device) + rising).to(DTYPES[dtype]), layout, AROUND)
    labels = torch.randint(0, words, (2 * rows,), device=device)[::2]
    expected, wrong, without = (logits.double().contiguous() for _ in range(3))
    options = {"smoothing": smoothing, "z_loss": z_loss, "scale": 4.0}
    expected_loss = row_loss_(expected, labels, **options)
    wrong_loss = row_loss_(wrong, labels, **options | {"smoothing": smoothing + 0.05, "z_loss": z_loss + 0.005})
    alone = kernel.row_loss_(without.to(logits.dtype), labels, **options | {"scale": None})
    loss = kernel.row_loss_(logits, labels, **options)
    found = {
        "loss": relative([loss, alone], [expected_loss] * 2, FLOOR),
        "gradient": relative(logits, expected, FLOOR),
        "mutant": min(relative(wrong_loss, expected_loss, FLOOR), relative(wrong, expected, FLOOR)) if words > 1 else 1.0,
    }
    logits.fill_(AROUND)
    return found | {"outside": bool((memory == AROUND).all())}


def whole_loss(device: str = "cpu") -> Error:
    """The loss "triton" beside the plain one in float64, with all gradients, in chunks of 3 rows; a row is not scored."""
    from train.losses.choose import LOSSES

    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in ((2, 5, 6), (17, 6), (17,))]
    labels = torch.randint(0, 17, (2, 5), device=device)
    labels[0, 2] = -100
    found = []
    for loss, own, options in ((LOSSES["triton"], inputs, {"chunk_rows": 3}), (LOSSES["plain"], None, {})):
        own = own or [x.detach().double().requires_grad_() for x in inputs]
        total, count = loss(own[0], own[1], labels, own[2], smoothing=0.1, z_loss=0.01, **options)
        found.append([total.detach(), *torch.autograd.grad(total * 3, own)])
        assert count == 9
    return relative(*found)


def run() -> dict:
    """Every case; a label that is no class; and classes of -inf."""
    from train.losses.kernels import cross_entropy as kernel

    found = {name: measure(name) for name in CASES}
    found["no class"] = kernel.row_loss_(torch.randn(3, 5), torch.tensor([1, 5, -7]), smoothing=0, z_loss=0, scale=None)
    ruled_out = torch.randn(2, 5000).index_fill_(1, torch.arange(4500), -torch.inf)
    found["ruled out"] = kernel.row_loss_(ruled_out, torch.tensor([4600, 4999]), smoothing=0, z_loss=0.1, scale=1.0)
    found["no class"], found["ruled out"] = found["no class"].isnan().tolist(), bool(found["ruled out"].isfinite().all())
    return found | {"whole": whole_loss()}


def launch(dtype: str, gradient: bool, aligned: bool) -> Launch:
    from train.losses.kernels import cross_entropy as kernel

    types = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "loss_ptr": "*fp32"}
    types |= dict.fromkeys(("smoothing", "z_loss", "scale"), "fp32")
    constants = {"column_stride": 1, "BLOCK": kernel.BLOCK, "GRADIENT": gradient}
    sixteens = ("logits_ptr", "labels_ptr", "loss_ptr", "row_stride", "vocab_size") if aligned else ()
    return Launch(kernel.row_loss_kernel, types, constants, {"num_warps": kernel.WARPS}, sixteens)


if __name__ == "__main__":
    main(run, launch, VARIANTS)
