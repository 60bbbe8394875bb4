"""Each plain twin against torch's or transformers' operator, and each fast twin against its plain one."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from model.attention import attention_reference, attention_sdpa
from model.mask import AttentionInputs, Mask
from model.mlp import gelu_tanh
from model.norm import LayerNorm, RMSNorm, layer_norm_reference, rms_norm_reference
from model.position import relative_bucket
from tests.compare import absolute, differing

TORCH = f"torch {torch.__version__}"
ROUNDING = "float64 rounding; sums in another order"


def gradients(output, inputs):
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * direction).sum(), inputs)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_layer_norm(parity):
    x, module = leaf(3, 5, 24), LayerNorm(24, 1e-5).double()
    nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    inputs = (x, module.weight, module.bias)
    twin, theirs = layer_norm_reference(x, module.weight, module.bias, 1e-5), F.layer_norm(x, (24,), *inputs[1:])
    error = absolute((twin, *gradients(twin, inputs)), (theirs, *gradients(theirs, inputs)))
    parity("layer norm", TORCH, error, 1e-12, ROUNDING)
    assert torch.equal(module(x), theirs)


def test_rms_norm(parity):
    x, module = leaf(3, 5, 24), RMSNorm(24, 1e-5).double()
    nn.init.normal_(module.weight)
    inputs = (x, module.weight)
    twin, theirs = rms_norm_reference(x, module.weight, 1e-5), F.rms_norm(x, (24,), module.weight, 1e-5)
    error = absolute((twin, *gradients(twin, inputs)), (theirs, *gradients(theirs, inputs)))
    parity("RMS norm", TORCH, error, 1e-12, ROUNDING)
    assert torch.equal(module(x), theirs)


@pytest.mark.parametrize("compiling", [False, True])
def test_gelu_tanh(compiling, parity, monkeypatch):
    """Also the form that a compiled block has."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    ours, theirs = gelu_tanh(x), F.gelu(x, approximate="tanh")
    error = absolute((ours, *gradients(ours, (x,))), (theirs, *gradients(theirs, (x,))))
    parity(f"GELU by tanh{', as compiled' * compiling}", TORCH, error, 1e-12, "float64 rounding; another form")
    assert compiling == bool(error)  # the two forms round differently: 0 would mean that they are one


MASKS = {
    "all": Mask(causal=False),
    "causal": Mask(),
    "window": Mask(window=3),
    "documents": Mask(document_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 3]])),
    "padding": Mask(attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])),
    "visible": Mask(visible_lengths=torch.tensor([4, 7])),
    "everything visible": Mask(
        window=3,
        document_ids=torch.tensor([[-1, 0, 0, 1, 1, 1, 1], [-1, 1, 1, 1, 1, 2, 3]]),
        attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]),
        prefix=1,
        visible_lengths=torch.tensor([4, 3]),
    ),
    "everything": Mask(
        window=3,
        document_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 3]]),
        attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]),
    ),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_attention(name, kv_heads, parity):
    q, k, v = leaf(2, 4, 7, 6), leaf(2, kv_heads, 7, 6), leaf(2, kv_heads, 7, 6)
    attended = MASKS[name].attention_inputs(7, 7)
    twin, fast = attention_reference(q, k, v, *attended), attention_sdpa(q, k, v, *attended)
    assert twin.isfinite().all() and fast.isfinite().all()
    all_gradients = gradients(twin, (q, k, v)), gradients(fast, (q, k, v))
    assert all(gradient.isfinite().all() for pair in all_gradients for gradient in pair)  # rows without a key too
    error = absolute((twin, *all_gradients[0]), (fast, *all_gradients[1]))
    parity(f"attention: mask {name}, {kv_heads} of 4 key heads", f"{TORCH} SDPA", error, 1e-12, ROUNDING)


def test_mask_by_hand():
    """The dense table, rule by rule, against the definitions; and the queries are the last of the keys."""
    documents = torch.tensor([[0, 0, 0, 0, 1, 1]])
    real = torch.tensor([[0, 1, 1, 1, 1, 1]])
    mask = Mask(window=3, document_ids=documents, attention_mask=real)
    allowed = mask.allowed(6, 6)[0, 0]
    for t in range(6):
        for s in range(6):
            expected = s <= t and t - s < 3 and documents[0, t] == documents[0, s] and real[0, s] == 1
            assert allowed[t, s] == expected
    assert torch.equal(mask.allowed(2, 6)[0, 0], allowed[-2:])


@pytest.mark.parametrize("window", [None, 3])
def test_visible_keys_by_hand(window):
    """Behind 2 virtual tokens the first 4 or 3 keys are visible: to earlier text too, inside window, document and padding."""
    documents = torch.tensor([[-1, -1, 0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]])
    lengths = [4, 3]
    mask = Mask(
        window=window, document_ids=documents, attention_mask=real, prefix=2, visible_lengths=torch.tensor(lengths)
    )
    allowed = mask.allowed(8, 8)
    for b, length in enumerate(lengths):
        for t in range(8):
            for s in range(8):
                is_seen = s <= t or (2 <= s < 2 + length and t >= 2)
                is_near = s < 2 or window is None or abs(t - s) < window
                is_same = s < 2 or documents[b, t] == documents[b, s]
                assert allowed[b, 0, t, s] == (is_seen and is_near and is_same and real[b, s] == 1), (b, t, s)
    assert torch.equal(mask.allowed(3, 8), allowed[:, :, -3:])
    plain = Mask(visible_lengths=torch.tensor([2]))
    assert plain.attention_inputs(4, 4).allowed_B1TS[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1] * 4]


@pytest.mark.parametrize("window", [1, 3, 6])
def test_window_counts_the_query_itself(window):
    """A window of w reaches w keys: the query's own and the w - 1 before it, as in transformers' Mistral."""
    allowed = Mask(window=window).allowed(6, 6)[0, 0]
    assert allowed.sum(-1).tolist() == [min(t + 1, window) for t in range(6)]


def test_masks_become_flags_where_they_say_the_same():
    assert Mask().attention_inputs(5, 5) == AttentionInputs(is_causal=True)
    assert Mask().attention_inputs(1, 9) == AttentionInputs()
    assert Mask(window=9).attention_inputs(5, 5) == AttentionInputs(is_causal=True)
    assert Mask(causal=False).attention_inputs(5, 5) == AttentionInputs()
    assert Mask().attention_inputs(3, 9).allowed_B1TS is not None  # SDPA's flag would align the wrong corner
    assert Mask(window=2).attention_inputs(1, 9).allowed_B1TS is not None


def test_attention_without_a_mask():
    """Three tensors are enough; a mask may have two axes, and is_causal is the triangular one."""
    q, k, v = leaf(2, 4, 5, 6), leaf(2, 4, 5, 6), leaf(2, 4, 5, 6)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    for attend in (attention_reference, attention_sdpa):
        assert (attend(q, k, v) - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-12
        assert (attend(q, k, v, lower) - attend(q, k, v, is_causal=True)).abs().max() < 1e-12
        assert (attend(q, k, v, lower) - attend(q, k, v)).abs().max() > 1e-2
        with pytest.raises(ValueError, match="as many queries as keys, not 3 and 5"):
            attend(q[:, :, :3], k, v, is_causal=True)
        with pytest.raises(ValueError, match="is_causal goes without allowed_TS"):
            attend(q, k, v, lower, is_causal=True)
        with pytest.raises(TypeError):
            attend(q, k, v, lower.double())


def test_rows_without_a_key_give_zero():
    q, k, v = leaf(1, 1, 3, 4), leaf(1, 1, 3, 4), leaf(1, 1, 3, 4)
    attended = Mask(attention_mask=torch.tensor([[0, 1, 1]])).attention_inputs(3, 3)
    for attend in (attention_reference, attention_sdpa):
        assert torch.equal(attend(q, k, v, *attended)[0, 0, 0], torch.zeros(4, dtype=torch.float64))


def test_key_heads_are_repeated_not_tiled():
    """4 query heads, 2 key heads, uniform attention over constant values: V0 V0 V1 V1; tiling would give V0 V1 V0 V1."""
    q, k = torch.zeros(1, 4, 2, 3), torch.zeros(1, 2, 2, 3)
    v = torch.stack((torch.full((2, 3), 10.0), torch.full((2, 3), 20.0)))[None]
    for attend in (attention_reference, attention_sdpa):
        assert attend(q, k, v)[0, :, 0, 0].tolist() == [10, 10, 20, 20]
    tiled = v.repeat(1, 2, 1, 1)  # the mutant
    assert attention_reference(q, k.repeat(1, 2, 1, 1), tiled)[0, :, 0, 0].tolist() != [10, 10, 20, 20]


@pytest.mark.parametrize("name", MASKS)
def test_attention_with_bias_and_scale(name, parity):
    """As T5 has it: something is added to the scores, which are not scaled by √K."""
    q, k, v, bias = leaf(2, 4, 7, 6), leaf(2, 4, 7, 6), leaf(2, 4, 7, 6), leaf(1, 4, 7, 7)
    attended = MASKS[name].attention_inputs(7, 7)._replace(bias_1HTS=bias)
    twin, fast = (attend(q, k, v, *attended, scale=1.0) for attend in (attention_reference, attention_sdpa))
    inputs = (q, k, v, bias)
    all_gradients = gradients(twin, inputs), gradients(fast, inputs)
    assert all(x.isfinite().all() for x in (twin, fast, *all_gradients[0], *all_gradients[1]))
    error = absolute((twin, *all_gradients[0]), (fast, *all_gradients[1]))
    parity(f"attention: with bias, mask {name}", f"{TORCH} SDPA", error, 1e-12, ROUNDING)
    without = attention_reference(q, k, v, *attended._replace(bias_1HTS=None), scale=1.0)
    scaled = attention_reference(q, k, v, *attended)
    assert (twin - without).abs().max() > 1e-2 and (twin - scaled).abs().max() > 1e-2


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (16, 50)])
def test_relative_buckets_against_transformers(bidirectional, buckets, farthest, parity):
    distance = torch.arange(-300, 301)
    t5 = transformers.models.t5.modeling_t5.T5Attention
    theirs = t5._relative_position_bucket(distance, bidirectional, buckets, farthest)
    ours = relative_bucket(distance, buckets, farthest, bidirectional)
    name = f"relative positions: {buckets} buckets to {farthest}, {'both ways' if bidirectional else 'backward'}"
    parity(name, f"transformers {transformers.__version__}", differing(ours, theirs), 0, "integers are equal or wrong")
    assert ours.unique().numel() == buckets - (bidirectional is True and 1)  # no key is 0 before: that bucket is never met
