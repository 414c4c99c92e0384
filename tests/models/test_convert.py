"""Reading fla's weights: a state dict with its names and shapes, and its arithmetic written out in float64."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.models.convert import INDEX, from_fla_state_dict, load_fla_checkpoint
from dn_lib.testing import relative_error

VOCAB, WIDTH, HIDDEN, LAYERS, HEADS = 40, 24, 64, 3, 2
HEAD_DIM = WIDTH // HEADS
CONFIG = {
    "model_type": "delta_net",
    "hidden_size": WIDTH,
    "num_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "intermediate_size": HIDDEN,
    "norm_eps": 1e-6,
}


def fla_weights(*, gate=False, conv=4, attention=(), kv_heads=2, old_mlp=False):
    """Random weights under the names and in the shapes of fla 0.6.0's DeltaNetForCausalLM.state_dict()."""
    shapes = {"model.embeddings.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for i in range(LAYERS):
        layer = {"attn_norm.weight": (WIDTH,), "mlp_norm.weight": (WIDTH,)}
        if old_mlp:
            layer["mlp.gate_proj.weight"] = (2 * HIDDEN, WIDTH)
        else:
            layer |= {f"mlp.{n}_proj.weight": (HIDDEN, WIDTH) for n in ("gate", "up")}
        layer["mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        layer |= {f"attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"}
        if i in attention:
            layer |= {f"attn.{n}_proj.weight": (kv_heads * WIDTH // 4, WIDTH) for n in "kv"}
        else:
            layer |= {"attn.b_proj.weight": (HEADS, WIDTH), "attn.o_norm.weight": (HEAD_DIM,)}
            if conv:
                layer |= {f"attn.{n}_conv1d.weight": (WIDTH, 1, conv) for n in "qkv"}
            if gate:
                layer["attn.g_proj.weight"] = (WIDTH, WIDTH)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / (2 if len(shape) == 3 else 4)
        + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["norm_eps"]) * weight


def delta_mixer(w, x, options):
    """fla's DeltaNet layer: SiLU belongs to the convolution; other activations come after it."""
    activation = options.get("qk_activation", "silu")
    functions = {"silu": F.silu, "relu": F.relu, "elu": lambda t: F.elu(t) + 1, "identity": lambda t: t}

    def part(name):
        y = F.linear(x, w[f"{name}_proj.weight"])
        filters = w.get(f"{name}_conv1d.weight")
        if filters is not None:
            y = F.conv1d(F.pad(y.mT, (filters.shape[-1] - 1, 0)), filters, groups=WIDTH).mT
        y = F.silu(y) if name == "v" else functions[activation](y)
        return y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)

    q, k, v = (part(n) for n in "qkv")
    if options.get("qk_norm", "l2") == "l2":
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    else:
        q, k = (F.normalize(t, p=1, dim=-1, eps=1e-6) for t in (q, k))
    beta = F.linear(x, w["b_proj.weight"]).sigmoid().mT * (2 if options.get("allow_neg_eigval") else 1)
    o, _ = recurrent_delta_rule(q, k, v, beta)
    o = rms(o.transpose(1, 2), w["o_norm.weight"])
    if "g_proj.weight" in w:
        o = o * F.silu(F.linear(x, w["g_proj.weight"]).unflatten(-1, (HEADS, HEAD_DIM)))
    return F.linear(o.flatten(-2), w["o_proj.weight"])


GATED = {
    "model_type": "gated_deltanet",
    "head_dim": 6,
    "expand_v": 2.0,
    **{name: value for name, value in CONFIG.items() if name != "model_type"},
}


def gated_weights(*, v_heads=HEADS, expand_v=2.0, gate=True, conv=4, attention=()):
    """Random weights under the names and in the shapes of fla 0.6.0's GatedDeltaNetForCausalLM.state_dict()."""
    keys, values = HEADS * GATED["head_dim"], int(v_heads * GATED["head_dim"] * expand_v)
    shapes = {name: tuple(t.shape) for name, t in fla_weights(attention=attention).items()}
    for i in range(LAYERS):
        if i in attention:
            continue
        layer = {f"{n}_proj.weight": (size, WIDTH) for n, size in zip("qkv", (keys, keys, values), strict=True)}
        layer |= {f"{n}_proj.weight": (v_heads, WIDTH) for n in "ab"} | {"A_log": (v_heads,), "dt_bias": (v_heads,)}
        layer |= {"o_proj.weight": (WIDTH, values), "o_norm.weight": (values // v_heads,)}
        if gate:
            layer["g_proj.weight"] = (values, WIDTH)
        if conv:
            layer |= {f"{n}_conv1d.weight": (layer[f"{n}_proj.weight"][0], 1, conv) for n in "qkv"}
        prefix = f"model.layers.{i}.attn."
        shapes = {n: shape for n, shape in shapes.items() if not n.startswith(prefix)}
        shapes |= {prefix + n: shape for n, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / (2 if len(shape) == 3 else 4)
        + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def gated_mixer(w, x, options):
    """fla's GatedDeltaNet layer; what its kernels do with a, b, A_log and dt_bias included."""
    d = options.get("head_dim", 256)

    def part(name):
        y = F.linear(x, w[f"{name}_proj.weight"])
        filters = w.get(f"{name}_conv1d.weight")
        if filters is not None:
            y = F.conv1d(F.pad(y.mT, (filters.shape[-1] - 1, 0)), filters, groups=y.shape[-1]).mT
        heads = w["A_log"].shape[0] if name == "v" else y.shape[-1] // d
        return F.silu(y).unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = (part(n) for n in "qkv")
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = (t.repeat_interleave(v.shape[1] // t.shape[1], 1) for t in (q, k))
    beta = F.linear(x, w["b_proj.weight"]).sigmoid().mT * (2 if options.get("allow_neg_eigval") else 1)
    g = (-w["A_log"].exp() * F.softplus(F.linear(x, w["a_proj.weight"]) + w["dt_bias"])).mT
    o, _ = recurrent_gated_delta_rule(q, k, v, beta, g)
    o = rms(o.transpose(1, 2), w["o_norm.weight"])
    if "g_proj.weight" in w:
        o = o * F.silu(F.linear(x, w["g_proj.weight"]).unflatten(-1, (v.shape[1], -1)))
    return F.linear(o.flatten(-2), w["o_proj.weight"])


def attention_mixer(w, x, spec):
    heads, length = spec["num_heads"], x.shape[1]
    d = WIDTH // heads
    q, k, v = (F.linear(x, w[f"{n}_proj.weight"]).unflatten(-1, (-1, d)).transpose(1, 2) for n in "qkv")
    angle = torch.arange(length)[:, None] * spec["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(t):
        turned = torch.complex(*t.chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    shared = heads // k.shape[1]
    k, v = rotate(k).repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    hidden = (j > i) | (j <= i - (spec["window_size"] or length))
    scores = (rotate(q) @ k.mT / math.sqrt(d)).masked_fill(hidden, -math.inf)
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2), w["o_proj.weight"])


def fla_logits(weights, options, tokens):
    """fla's forward pass from its weights by name, written out plainly."""
    x = F.embedding(tokens, weights["model.embeddings.weight"])
    spec = options.get("attn") or {"layers": []}
    for i in range(LAYERS):
        w = {n.removeprefix(f"model.layers.{i}."): t for n, t in weights.items() if f"layers.{i}." in n}
        mixer = {n.removeprefix("attn."): t for n, t in w.items() if n.startswith("attn.")}
        y = rms(x, w["attn_norm.weight"])
        recurrent = gated_mixer if "A_log" in mixer else delta_mixer
        x = x + (attention_mixer(mixer, y, spec) if i in spec["layers"] else recurrent(mixer, y, options))
        y = rms(x, w["mlp_norm.weight"])
        if "mlp.up_proj.weight" in w:
            gate, up = (F.linear(y, w[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        else:
            gate, up = F.linear(y, w["mlp.gate_proj.weight"]).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"])
    head = weights["model.embeddings.weight" if options.get("tie_word_embeddings") else "lm_head.weight"]
    return F.linear(rms(x, weights["model.norm.weight"]), head)


ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "rope_theta": 500.0}
CASES = {
    "plain": ({}, {}),
    "gate": ({"gate": True}, {"use_gate": True}),
    "no convolution": ({"conv": 0}, {"use_short_conv": False}),
    "three taps": ({"conv": 3}, {"conv_size": 3}),
    "beta to 2": ({}, {"allow_neg_eigval": True}),
    "relu, l1": ({}, {"qk_activation": "relu", "qk_norm": "sum"}),
    "1 + elu": ({}, {"qk_activation": "elu"}),
    "tied": ({}, {"tie_word_embeddings": True}),
    "one matrix for gate and up": ({"old_mlp": True}, {}),
    "full attention": ({"attention": [1]}, {"attn": ATTENTION | {"window_size": None}}),
    "window": ({"attention": [1]}, {"attn": ATTENTION | {"window_size": 5}}),
    "a window, as a list": ({"attention": [1]}, {"attn": [ATTENTION | {"window_size": 5}]}),
    "one key-value head": (
        {"attention": [1], "kv_heads": 1},
        {"attn": ATTENTION | {"window_size": None, "num_kv_heads": 1}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_weights_same_logits(name):
    shape_options, options = CASES[name]
    weights, config = fla_weights(**shape_options), CONFIG | options
    tokens = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    model = from_fla_state_dict(weights, config)
    written_out = options if not isinstance(options.get("attn"), list) else {"attn": options["attn"][0]}
    reference = fla_logits(weights, written_out, tokens)
    with torch.no_grad():
        error = relative_error(model(tokens), reference)
    # float64 throughout; the guard of the L2 norm against zero may be placed differently, relative 1e-6.
    assert error < 1e-5
    assert model.num_parameters() >= sum(t.numel() for n, t in weights.items() if n != "lm_head.weight")


GATED_CASES = {
    "plain": ({}, {}),
    "more value heads": ({"v_heads": 6}, {"num_v_heads": 6}),
    "narrow values": ({"expand_v": 0.5}, {"expand_v": 0.5}),
    "no gate": ({"gate": False}, {"use_gate": False}),
    "no convolution": ({"conv": 0}, {"use_short_conv": False}),
    "beta to 2": ({}, {"allow_neg_eigval": True}),
    "no model type": ({}, {"model_type": None}),
    "window": ({"attention": [1]}, {"attn": ATTENTION | {"window_size": 5}}),
}


@pytest.mark.parametrize("name", GATED_CASES)
def test_same_weights_same_logits_with_gates(name):
    shape_options, options = GATED_CASES[name]
    weights, config = gated_weights(**shape_options), GATED | options
    tokens = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    model = from_fla_state_dict(weights, config)
    assert "gated_delta" in model.config.mixers()
    with torch.no_grad():
        error = relative_error(model(tokens), fla_logits(weights, config, tokens))
    # float64 throughout; the guard of the L2 norm against zero may be placed differently, relative 1e-6.
    assert error < 1e-5


@pytest.mark.parametrize("part", ["A_log", "dt_bias", "a_proj.weight", "b_proj.weight"])
def test_the_gates_are_read(part):
    """The comparison above is sharp: another decay, or another writing strength, changes the logits."""
    weights, tokens = gated_weights(), torch.arange(17)[None]
    reference = fla_logits(weights, GATED, tokens)
    weights[f"model.layers.1.attn.{part}"] = weights[f"model.layers.1.attn.{part}"] + 0.5
    with torch.no_grad():
        assert relative_error(from_fla_state_dict(weights, GATED)(tokens), reference) > 1e-3


def test_a_gated_checkpoint_goes_on_token_by_token():
    model, tokens = from_fla_state_dict(gated_weights(v_heads=4), GATED | {"num_v_heads": 4}), torch.arange(17)[None]
    cache = model.new_cache(1)
    with torch.no_grad():
        pieces = [model(tokens[:, :9], cache), *(model(tokens[:, t : t + 1], cache) for t in range(9, 17))]
        assert relative_error(torch.cat(pieces, 1), model(tokens)) < 1e-11  # float64, four layers that amplify


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_gate_activation": "sigmoid"}, "config.output_gate_activation must be swish or silu to be converted"),
        ({"head_dim": 5}, "state_dict must be of config.head_dim = 5, its queries have 12 channels"),
        ({"head_dim": "6"}, "state_dict must be of config.head_dim = '6', its queries have 12 channels"),
        ({"head_dim": 2}, "state_dict must have a multiple of 6 value heads to be converted, got 2"),
        ({"head_dim": 12, "num_heads": 1}, "config.expand_v = 2.0, its weights are of 1.0"),
        ({"num_heads": 3}, "config.num_heads = 3, its weights are of 2"),
        ({"num_v_heads": 4}, "config.num_v_heads = 4, its weights are of 2"),
        ({"expand_v": 1.0}, "config.expand_v = 1.0, its weights are of 2.0"),
        ({"expand_v": "2"}, "config.expand_v must be a number, got '2'"),
        ({"use_gate": False}, "config.use_gate = False, its weights are of True"),
        ({"model_type": "delta_net", "use_gate": True}, r"attn\.\S+, which has no counterpart here"),
        ({"model_type": "kda"}, "config.model_type must be delta_net or gated_deltanet to be converted, got kda"),
    ],
)
def test_a_gated_configuration_of_other_weights_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        from_fla_state_dict(gated_weights(), GATED | options)


def test_every_gated_tensor_must_be_there_in_its_shape():
    weights = gated_weights()
    for name in weights:
        if not name.startswith("model.layers.1.attn."):
            continue
        with pytest.raises(ValueError, match="state_dict must"):
            from_fla_state_dict({n: t for n, t in weights.items() if n != name}, GATED)
        for wrong in (weights[name][:-1], weights[name].unsqueeze(0), weights[name].sum()):
            with pytest.raises(ValueError, match="state_dict must"):
                from_fla_state_dict(weights | {name: wrong}, GATED)


def test_fla_counts_21_layers_of_gated_deltanet():
    config = {name: value for name, value in GATED.items() if name != "num_hidden_layers"}
    with pytest.raises(ValueError, match=r"config\.num_hidden_layers = 21 layers, it holds 3"):
        from_fla_state_dict(gated_weights(), config)


def test_wrong_renaming_would_be_seen():
    """The comparison above is sharp: exchanging two projections of one layer changes the logits."""
    weights, tokens = fla_weights(), torch.arange(17)[None]
    reference = fla_logits(weights, CONFIG, tokens)
    a, b = "model.layers.1.attn.q_proj.weight", "model.layers.1.attn.k_proj.weight"
    weights[a], weights[b] = weights[b], weights[a]
    with torch.no_grad():
        error = relative_error(from_fla_state_dict(weights, CONFIG)(tokens), reference)
    assert error > 1e-2


def test_dtype_is_kept_and_weights_are_copies():
    weights = {name: t.bfloat16() for name, t in fla_weights().items()}
    model = from_fla_state_dict(weights, CONFIG)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    weights["model.norm.weight"].zero_()
    assert model.norm.weight.abs().min() > 0


def test_configuration_object():
    class Config:
        def to_dict(self):
            return CONFIG | {"allow_neg_eigval": True}

    assert from_fla_state_dict(fla_weights(), Config()).config.beta_range == 2.0


def test_checkpoint_folder_in_two_files(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"folder must hold config\.json"):
        load_fla_checkpoint(tmp_path)
    weights = {name: t.float() for name, t in fla_weights().items()}
    names = sorted(weights)
    save_file({n: weights[n] for n in names[:9]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: weights[n] for n in names[9:]}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tokens = torch.arange(10)[None]
    expected = from_fla_state_dict(weights, CONFIG)(tokens)
    assert torch.equal(load_fla_checkpoint(tmp_path)(tokens), expected)


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def sharded(tmp_path):
    """Weights in three shards with an index, as Hugging Face writes them, and the same weights in memory."""
    from safetensors.torch import save_file

    weights = {name: t.float() for name, t in fla_weights().items()}
    placed = {name: SHARDS[i % 3] for i, name in enumerate(sorted(weights))}
    for shard in SHARDS:
        save_file({n: weights[n] for n in weights if placed[n] == shard}, tmp_path / shard)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return tmp_path, weights


def loads_the(weights, folder):
    tokens = torch.arange(10)[None]
    return torch.equal(load_fla_checkpoint(folder)(tokens), from_fla_state_dict(weights, CONFIG)(tokens))


def test_the_index_says_which_files_are_read(sharded):
    """Stale files, older and newer in name, with the same tensors or of another kind, change nothing."""
    from safetensors.torch import save_file

    folder, weights = sharded
    zeros = {name: torch.zeros_like(t) for name, t in weights.items()}
    for stale in ("a.safetensors", "model.safetensors", "model-00001-of-00002.safetensors", "zz.safetensors"):
        save_file(zeros, folder / stale)
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"half a download")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert loads_the(weights, folder)


def test_numbered_shards_without_an_index_are_read_if_all_are_there(sharded):
    folder, weights = sharded
    (folder / INDEX).unlink()
    assert loads_the(weights, folder)
    (folder / SHARDS[2]).unlink()
    with pytest.raises(ValueError, match="shards 1 to 3, number 3 is missing"):
        load_fla_checkpoint(folder)


def test_pickled_weights_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(fla_weights(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no weights in"):
        load_fla_checkpoint(tmp_path)


def indexed(change):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def unindexed(extra):
    def damage(folder):
        (folder / INDEX).unlink()
        (folder / extra).write_bytes((folder / SHARDS[0]).read_bytes())

    return damage


NORM = "model.norm.weight"
DAMAGE = {
    "a shard is missing": (lambda f: (f / SHARDS[1]).unlink(), FileNotFoundError, SHARDS[1]),
    "half a shard": (lambda f: (f / SHARDS[1]).write_bytes(b"12345678{"), ValueError, f"{SHARDS[1]} cannot be read"),
    "a tensor that no shard holds": (indexed(lambda m: m.update(more=SHARDS[0])), ValueError, "must hold more, as"),
    "a tensor in no place": (
        indexed(lambda m: m.pop(NORM)),
        ValueError,
        f"holds {NORM}, which .* does not place there",
    ),
    "a tensor in another place": (
        indexed(lambda m: m.update({NORM: SHARDS[0] if m[NORM] != SHARDS[0] else SHARDS[1]})),
        ValueError,
        f"holds {NORM}, which .* does not place there",
    ),
    "a file elsewhere": (
        indexed(lambda m: m.update(a="../a.safetensors")),
        ValueError,
        "must name .* of its own folder",
    ),
    "a pickle": (indexed(lambda m: m.update(a="a.bin")), ValueError, "must name .*safetensors files"),
    "a number for a file": (indexed(lambda m: m.update(a=3)), ValueError, "must name .*safetensors files"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), ValueError, "must have a weight_map"),
    "an index that is none": (lambda f: (f / INDEX).write_text("{"), ValueError, "index.json cannot be read"),
    "a configuration that is none": (
        lambda f: (f / "config.json").write_text("[]"),
        ValueError,
        "config.json must hold",
    ),
    "no index, a second checkpoint": (unindexed("other.safetensors"), ValueError, "to say which of its files"),
    "no index, a shard of another count": (unindexed("model-00004-of-00004.safetensors"), ValueError, "to say which"),
    "no index, a shard too many": (unindexed("model-00004-of-00003.safetensors"), ValueError, "shards 1 to 3"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_told(name, sharded):
    damage, error, message = DAMAGE[name]
    damage(sharded[0])
    with pytest.raises(error, match=message):
        load_fla_checkpoint(sharded[0])


def test_a_tensor_in_two_shards_is_told(sharded):
    from safetensors.torch import load_file, save_file

    folder, _ = sharded
    (folder / INDEX).unlink()
    save_file(load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1]), folder / SHARDS[1])
    with pytest.raises(ValueError, match=r"must hold .* once: it is in model-00002-of-00003"):
        load_fla_checkpoint(folder)


@pytest.mark.parametrize("index", [0, 1, LAYERS - 1])
def test_a_missing_layer_is_told(index):
    weights = {n: t for n, t in fla_weights().items() if f"layers.{index}." not in n}
    with pytest.raises(ValueError, match=r"state_dict must hold (layers 0 to 2, layer|config.num_hidden_layers = 3)"):
        from_fla_state_dict(weights, CONFIG)


def test_every_tensor_must_be_there_in_its_shape():
    weights = fla_weights(gate=True)
    for name in weights:
        with pytest.raises(ValueError, match="state_dict must"):
            from_fla_state_dict({n: t for n, t in weights.items() if n != name}, CONFIG | {"use_gate": True})
        for wrong in (weights[name][:-1], weights[name].unsqueeze(0), weights[name].sum()):
            with pytest.raises(ValueError, match="state_dict must"):
                from_fla_state_dict(weights | {name: wrong}, CONFIG | {"use_gate": True})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_hidden_layers": 4}, "config.num_hidden_layers = 4 layers, it holds 3"),
        ({"num_hidden_layers": 2}, "config.num_hidden_layers = 2 layers, it holds 3"),
        ({"vocab_size": 41}, "config.vocab_size = 41, its weights are of 40"),
        ({"hidden_size": 25}, "config.hidden_size = 25, its weights are of 24"),
        ({"num_heads": 3}, "config.num_heads = 3, its weights are of 2"),
        ({"intermediate_size": 65}, "config.intermediate_size = 65, its weights are of 64"),
        ({"conv_size": 3}, "config.conv_size = 3, its weights are of 4"),
        ({"use_short_conv": False}, "config.use_short_conv = False, its weights are of True"),
        ({"use_gate": True}, "config.use_gate = True, its weights are of False"),
        ({"norm_eps": "small"}, "config.norm_eps must be a number, got 'small'"),
        ({"attn": {"layers": [0]}}, "config.attn must have num_heads"),
        ({"attn": {"num_heads": 2}}, "config.attn must have layers"),
        ({"attn": {"num_heads": 2, "layers": [7]}}, "config.attn.layers must be from 0 to 2, got 7"),
    ],
)
def test_a_configuration_of_other_weights_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        from_fla_state_dict(fla_weights(), CONFIG | options)


def test_fla_counts_24_layers_where_the_configuration_does_not():
    config = {name: value for name, value in CONFIG.items() if name != "num_hidden_layers"}
    with pytest.raises(ValueError, match=r"config\.num_hidden_layers = 24 layers, it holds 3"):
        from_fla_state_dict(fla_weights(), config)


@pytest.mark.parametrize("wide", ["o_norm", "norm", "conv1d"])
@pytest.mark.parametrize("options", [{}, {"attention": [1]}], ids=["pure", "with attention"])
def test_float32_norms_and_convolutions_in_a_bfloat16_model(wide, options):
    """They stay in float32, and the model runs, backwards and under autocast too."""
    weights = {n: t.float() if wide in n else t.bfloat16() for n, t in fla_weights(gate=True, **options).items()}
    config = CONFIG | {"use_gate": True} | ({"attn": ATTENTION | {"window_size": 5}} if options else {})
    model = from_fla_state_dict(weights, config)
    kept = {p.dtype for n, p in model.named_parameters() if "conv" in n or "norm" in n}
    assert torch.float32 in kept and model.head.weight.dtype == torch.bfloat16
    tokens = torch.arange(17)[None]
    logits = model(tokens)
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert logits.dtype == torch.bfloat16

    def error(state, autocast=False):
        """Of the logits of 64 sequences against the same numbers computed in float64."""
        many = torch.randint(model.config.vocab_size, (64, 17), generator=torch.Generator().manual_seed(0))
        exact = from_fla_state_dict({n: t.double() for n, t in state.items()}, config)(many)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            return relative_error(from_fla_state_dict(state, config)(many), exact)

    # With less in bfloat16 the error is that of bfloat16 throughout, or less.  Each is one draw of roundings, so that
    # their ratio scatters about 1, by some 12% over so many sequences: 2.5 leaves twice that.
    throughout = error({n: t.bfloat16() for n, t in weights.items()})
    assert error(weights) < 2.5 * throughout and error(weights, autocast=True) < 2.5 * throughout < 0.25


def test_matrices_of_two_dtypes_are_refused():
    weights = fla_weights() | {
        "model.layers.1.attn.b_proj.weight": fla_weights()["model.layers.1.attn.b_proj.weight"].float()
    }
    with pytest.raises(ValueError, match=r"matrices of one dtype, .* has torch.float64 and blocks.1.mixer.beta.weight"):
        from_fla_state_dict(weights, CONFIG)
    quantised = fla_weights() | {"model.norm.weight": torch.ones(WIDTH, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"norm\.weight has torch\.int8"):
        from_fla_state_dict(quantised, CONFIG)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_beta": False}, "config.use_beta must be True to be converted, got False"),
        ({"expand_k": 0.5}, "config.expand_k must be 1.0 to be converted, got 0.5"),
        ({"hidden_act": "powlu"}, "config.hidden_act must be swish or silu"),
        ({"qk_norm": "rms"}, "config.qk_norm must be l2 or sum"),
        ({"attnres_block_size": 1}, "config.attnres_block_size must be None"),
        ({"attn": ATTENTION | {"qkv_bias": True}}, "config.attn.qkv_bias must be False"),
    ],
)
def test_options_without_a_counterpart(options, message):
    with pytest.raises(ValueError, match=message):
        from_fla_state_dict(fla_weights(), CONFIG | options)


def test_weights_that_do_not_fit():
    weights = fla_weights()
    with pytest.raises(ValueError, match=r"has model\.layers\.0\.attn\.a_proj\.weight, which has no counterpart"):
        from_fla_state_dict(weights | {"model.layers.0.attn.a_proj.weight": torch.zeros(1)}, CONFIG)
    with pytest.raises(ValueError, match=r"has extra\.weight, which has no counterpart"):
        from_fla_state_dict(weights | {"extra.weight": torch.zeros(1)}, CONFIG)
    short = {n: t for n, t in weights.items() if n != "model.layers.2.attn.o_proj.weight"}
    with pytest.raises(ValueError, match=r"blocks.2.mixer.output.weight of shape \(24, 24\), it gives nothing"):
        from_fla_state_dict(short, CONFIG)
    wrong = weights | {"model.layers.2.mlp.up_proj.weight": torch.zeros(3, WIDTH)}
    with pytest.raises(ValueError, match=r"mlp.up.weight of shape \(64, 24\), it gives \(3, 24\)"):
        from_fla_state_dict(wrong, CONFIG)
    with pytest.raises(ValueError, match="must be of a fla DeltaNetForCausalLM"):
        from_fla_state_dict({"weight": torch.zeros(1)}, CONFIG)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: from_fla_state_dict(None, {}), "state_dict must be a dict of tensors, got NoneType"),
        (lambda: from_fla_state_dict({"a": 1.0}, {}), "state_dict must be a dict of tensors, got 'a': float"),
        (lambda: from_fla_state_dict({}, None), "config must be a configuration or its dict, got NoneType"),
        (lambda: load_fla_checkpoint(5), "folder must be a path, got int"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()
