"""Prompts, p-tuning and prefixes against PEFT: logits of the text, gradients, ten updates, counts; float64, whole tensors."""

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import model.hub
from lora.config import PrefixConfig, PromptConfig, PtuningConfig
from lora.inject import add_adapters
from model.generate import generate
from model.network import Network
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import ROUNDING, inputs, published
from tests.oracle.wide import widen

LIBRARY = f"peft {peft.__version__}"
STEPS = (1e-11, "float64 rounding, through ten updates of AdamW")
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
P = 5
ENCODER = {"encoder_hidden_size": 7}
# Without `num_transformer_submodules` PEFT makes a second prompt for T5's decoder, which its forward never reads.
ONE = {"num_virtual_tokens": P, "num_transformer_submodules": 1}
METHODS = {  # name: our config, PEFT's
    "prompt": (PromptConfig(tokens=P), peft.PromptTuningConfig, ONE),
    "ptuning": (PtuningConfig(tokens=P, width=7), peft.PromptEncoderConfig, ONE | ENCODER),
    "prefix": (PrefixConfig(tokens=P), peft.PrefixTuningConfig, {"num_virtual_tokens": P}),
    "prefix, MLP": (
        PrefixConfig(tokens=P, width=7),
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": P, "prefix_projection": True} | ENCODER,
    ),
}
LEAVES = {"vectors": "embedding.weight", "embedding": "embedding.weight"}
# PEFT counts T5's layers by its encoder's and its head's width by the model's: it must be told.
T5_PREFIX = {"num_layers": 3, "num_attention_heads": 4, "token_dim": 40}


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def their_name(name: str, method: str) -> str:
    """PEFT's name of our parameter `body.….parts.default.LEAF`."""
    leaf = name.partition(".parts.default.")[2]
    inner = {"ptuning": "mlp_head"}.get(method, "transform")
    return f"prompt_encoder.default.{LEAVES.get(leaf) or leaf.replace('mlp', inner)}"


def to_theirs(value: Tensor, name: str, network: Network, method: str) -> Tensor:
    """Of T5, whose decoder layer i reads the keys and values 2 i mod L of PEFT's table; else as it is."""
    layers = len(network.config.decoder_layers)
    if method == "prompt" or method == "ptuning" or network.config.architecture != "encoder-decoder":
        return value
    if name.endswith(("mlp.0.weight", "mlp.0.bias")) or (name.endswith("embedding") and "MLP" in method):
        return value
    axis = 0 if ".mlp." in name else 1
    layer = [next(i for i in range(layers) if 2 * i % layers == place) for place in range(layers)]
    return value.unflatten(axis, (layers, -1)).index_select(axis, torch.tensor(layer)).flatten(axis, axis + 1)


def twins(family: str, method: str, folder) -> tuple[Network, nn.Module]:
    """Both with the same random adapter."""
    network = randomized(tiny_config(family))
    theirs = widen(published(network, folder))
    config, kind, settings = METHODS[method]
    add_adapters(network, config)
    if family == "t5" and "prefix" in method:
        settings = settings | T5_PREFIX
    theirs = peft.get_peft_model(theirs, kind(task_type=TASKS[family], **settings)).double().eval()
    with torch.no_grad():
        for name, value in trained(network).items():
            value.add_(0.3 * torch.randn_like(value))
            theirs.get_parameter(their_name(name, method)).copy_(to_theirs(value, name, network, method))
    return network, theirs


def batches(network: Network, method: str) -> tuple[dict, dict, Tensor]:
    """Our arguments, theirs, and which logits count. Before a prompt PEFT ignores position ids: rows of a decoder are
    padded on the right then, else on the left."""
    ours, theirs, real, _ = inputs(network.config, padded=True)
    ours.pop("token_type_ids", None), theirs.pop("token_type_ids", None)
    if network.config.architecture == "decoder" and "prefix" not in method:
        ours = {name: value.flip(1) for name, value in ours.items()}
        theirs, real = dict(ours), real.flip(1)
    return ours, theirs, real


def their_logits(theirs: nn.Module, arguments: dict, length: int) -> Tensor:
    """Over the text: PEFT returns a prompt's too."""
    return theirs(**arguments).logits[:, -length:]


def loss_of(logits: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[real], labels[real], reduction="sum")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TASKS)
def test_text_gradients_and_ten_steps(family, method, tmp_path, parity):
    network, theirs = twins(family, method, tmp_path)
    named = {their_name(name, method): name for name in trained(network)}
    others = {name: value for name, value in theirs.named_parameters() if value.requires_grad}
    assert set(named) == set(others)
    assert sum(p.numel() for p in trained(network).values()) == theirs.get_nb_trainable_parameters()[0]

    arguments, their_arguments, real = batches(network, method)
    logits = network(**arguments).logits
    expected = their_logits(theirs, their_arguments, logits.size(1))
    labels = torch.randint(0, logits.size(-1), real.shape)
    parity(f"{method}: logits", LIBRARY, mixed(logits[real], expected[real]), *ROUNDING)

    loss_of(logits, real, labels).backward()
    loss_of(expected, real, labels).backward()
    errors = []
    for name, own in named.items():
        assert others[name].grad.abs().max() > 0, f"{name} has no gradient: nothing is compared"
        errors.append(mixed(to_theirs(trained(network)[own].grad, own, network, method), others[name].grad))
    parity(f"{method}: gradients", LIBRARY, max(errors), *ROUNDING)

    start = {name: value.detach().clone() for name, value in trained(network).items()}
    optimizers = [torch.optim.AdamW(m.values(), lr=1e-2, eps=1e-6) for m in (trained(network), others)]
    for _ in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(network(**arguments).logits, real, labels).backward()
        loss_of(their_logits(theirs, their_arguments, logits.size(1)), real, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    values = trained(network)
    assert all((value - start[name]).abs().max() > 1e-2 for name, value in values.items())
    moved = [mixed(to_theirs(values[own], own, network, method), others[name]) for name, own in named.items()]
    parity(f"{method}: parameters after 10 steps", LIBRARY, max(moved), *STEPS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_greedy_text_is_that_of_peft(family, method, tmp_path):
    network, theirs = twins(family, method, tmp_path)
    ids = torch.randint(3, 61, (1 if family != "t5" else 3, 6))
    ours = generate(network, ids, max_new_tokens=8, temperature=0)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    # transformers makes T5's cache by the encoder's number of layers; a prefix brings its own.
    settings["use_cache"] = family != "t5" or "prefix" in method
    other = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
    assert torch.equal(ours, other[:, -8:])


def test_token_types_and_where_heads_look(tmp_path, parity):
    """A prompt's token type is 0; what is pooled is the state of its first vector."""
    network = randomized(tiny_config("bert", head="sequence", labels=3))
    model.hub.save(network, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    theirs = peft.get_peft_model(theirs, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)).double().eval()
    add_adapters(network, PromptConfig(tokens=P))
    with torch.no_grad():
        network.body.prompt.parts["default"].vectors.copy_(theirs.get_parameter("prompt_encoder.default.embedding.weight"))
    ids, kinds = torch.randint(3, 61, (2, 9)), torch.randint(0, 2, (2, 9))
    ours = network(ids, token_type_ids=kinds, hidden_states=True)
    other = theirs(input_ids=ids, token_type_ids=kinds, output_hidden_states=True)
    pairs = zip(ours.hidden_states, other.hidden_states, strict=True)
    parity("prompt: states, token types", LIBRARY, max(mixed(a, b[:, P:]) for a, b in pairs), *ROUNDING)
    vectors = network.body(ids, token_type_ids=kinds, keep_prompt=True).hidden
    assert torch.equal(network.head(vectors, None), ours.logits)
    parity("prompt: classes", LIBRARY, mixed(ours.logits, other.logits), *ROUNDING)


def test_the_first_values_are_those_of_words():
    """Embeddings of tokens, as PEFT begins: random ones, a function of the seed, or those that are given, repeated or cut."""
    for family in ("llama", "vaswani"):  # the second scales its embeddings
        network = add_adapters(randomized(tiny_config(family)), PromptConfig(tokens=P), seed=3)
        stack = getattr(network.body, "encoder", network.body)
        table_VD, vectors_PD = stack.embed_tokens(torch.arange(61)), stack.prompt.parts["default"].vectors
        distance_PV = (vectors_PD[:, None] - table_VD).abs().amax(-1)
        assert (distance_PV.min(-1).values == 0).all()
        again = add_adapters(randomized(tiny_config(family)), PromptConfig(tokens=P), seed=3)
        other = add_adapters(randomized(tiny_config(family)), PromptConfig(tokens=P), seed=4)
        assert torch.equal(trained(again).popitem()[1], vectors_PD) and not torch.equal(trained(other).popitem()[1], vectors_PD)
        for ids, expected in (((7, 9), [7, 9, 7, 9, 7]), (tuple(range(3, 20)), [3, 4, 5, 6, 7])):
            add_adapters(network, PromptConfig(tokens=P, ids=ids), f"of{len(ids)}")
            assert torch.equal(stack.prompt.parts[f"of{len(ids)}"].vectors, table_VD[expected])
