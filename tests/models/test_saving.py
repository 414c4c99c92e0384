"""Saved models: whatever wraps them, the model inside is saved; whatever is damaged is told, never loaded."""

import json
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dn_lib.models import CONFIG, WEIGHTS, LanguageModel, ModelConfig, generate, load_model, save_model

SMALL = {"vocab_size": 20, "width": 8, "layers": 2, "heads": 2, "hybrid": "window", "window": 4, "hidden": 8}


def small(**options):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**SMALL | options))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder, small())
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}


@pytest.fixture
def folder(saved, tmp_path):
    """A saved model of one's own to damage."""
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def rewrite(folder, change=lambda weights: None, **metadata):
    """Write the weights anew, changed, under the same metadata but for `metadata`; None takes an entry out."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = file.metadata() | metadata
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(weights)
    stored = {name: value for name, value in stored.items() if value is not None}
    save_file(weights, folder / WEIGHTS, metadata=stored or None)


# --- Wrappers ---------------------------------------------------------------------------------------------------


def compiled_block(model):
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def recomputed_block(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


WRAPPED = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "data parallel": nn.DataParallel,
    "compiled around data parallel": lambda model: compiled(nn.DataParallel(model)),
    "data parallel around compiled": lambda model: nn.DataParallel(compiled(model)),
    "a compiled block": compiled_block,
    "a block computed twice": recomputed_block,
    "all at once": lambda model: compiled(nn.DataParallel(compiled(compiled_block(model)))),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("given", [False, True], ids=["own state dict", "given state dict"])
def test_the_model_inside_is_saved(name, given, tmp_path):
    wrapped = WRAPPED[name](small())
    save_model(tmp_path, wrapped, wrapped.state_dict() if given else None)
    assert same(load_model(tmp_path), small())


def test_a_model_in_ddp_is_saved_as_the_model(tmp_path):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = compiled(nn.parallel.DistributedDataParallel(compiled_block(small())))
        save_model(tmp_path, wrapped)
        save_model(tmp_path / "given", wrapped, wrapped.state_dict())
    finally:
        torch.distributed.destroy_process_group()
    assert same(load_model(tmp_path), small()) and same(load_model(tmp_path / "given"), small())


def test_what_is_no_model_is_refused(tmp_path):
    for other in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), {"a": 1}, None):
        with pytest.raises(TypeError, match="model must be a LanguageModel"):
            save_model(tmp_path / "folder", other)
    assert not (tmp_path / "folder").exists()


def without(name):
    return lambda weights: weights.pop(name)


def with_(**tensors):
    return lambda weights: weights.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    "change, message",
    [
        (without("norm.weight"), r"missing \['norm.weight \[8\]'\], not wanted \[\]"),
        (with_(extra__weight=torch.ones(1)), r"not wanted \['extra.weight \[1\]'\]"),
        (with_(norm__weight=torch.ones(7)), r"missing \['norm.weight \[8\]'\], not wanted \['norm.weight \[7\]'\]"),
        (with_(norm__weight=torch.ones(8, dtype=torch.int64)), "norm.weight has torch.int64"),
    ],
)
def test_a_state_dict_of_another_model_is_refused_before_anything_is_written(change, message, tmp_path):
    model = small()
    weights = model.state_dict()
    change(weights)
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "folder", model, weights)
    assert not (tmp_path / "folder").exists()


def test_tensors_that_share_memory_are_saved(tmp_path):
    """As views of one flat buffer, in which some programs keep all parameters."""
    model = small()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]
    for part, parameter in zip(flat.split(sizes), model.parameters(), strict=True):
        parameter.data = part.view_as(parameter)
    save_model(tmp_path, model)
    assert same(load_model(tmp_path), small())


def test_a_loaded_model_can_be_saved_again_in_its_place(folder):
    model = load_model(folder)
    save_model(folder, model)
    assert same(load_model(folder), small()) and same(model, small())


def test_weights_that_are_not_finite_are_kept(tmp_path):
    model = small()
    with torch.no_grad():
        model.norm.weight[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    save_model(tmp_path, model)
    again = load_model(tmp_path).norm.weight
    assert again.isnan()[0] and again[1] == float("inf") and again[2].signbit()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_kept(dtype, tmp_path):
    save_model(tmp_path, small().to(dtype))
    assert same(load_model(tmp_path), small().to(dtype))


# --- Damage -----------------------------------------------------------------------------------------------------


def flips():
    """60 single bits: 40 all over both files, 20 in the header of the weights and in the configuration."""
    draw = random.Random(12)
    places = [(name, draw.random(), draw.randrange(8)) for name in [WEIGHTS] * 30 + [CONFIG] * 20]
    return places + [("header", draw.random(), draw.randrange(8)) for _ in range(10)]


@pytest.mark.parametrize("name, where, bit", flips())
def test_no_flipped_bit_is_silent(name, where, bit, folder):
    path = folder / (WEIGHTS if name == "header" else name)
    content = bytearray(path.read_bytes())
    size = 8 + struct.unpack("<Q", content[:8])[0] if name == "header" else len(content)
    content[int(where * size)] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}|{CONFIG}"):
        load_model(folder)


def test_the_flips_are_of_a_model_that_loads(folder):
    assert same(load_model(folder), small())


def test_every_bit_of_the_digests_name_counts(folder):
    """With the name damaged the file would look like one without a digest."""
    content = (folder / WEIGHTS).read_bytes()
    start = content.index(b'"sha256"') + 1
    for place in range(start, start + 6):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            (folder / WEIGHTS).write_bytes(damaged)
            with pytest.raises(ValueError, match=WEIGHTS):
                load_model(folder)


def cut(name, size):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size] if size >= 0 else content + bytes(-size))

    return damage


def text(content):
    return lambda folder: (folder / CONFIG).write_bytes(content)


def edited(**changes):
    """config.json with other values, in both places and without a digest, as if someone had written it so."""

    def damage(folder):
        values = json.loads((folder / CONFIG).read_text()) | changes
        config = json.dumps({name: value for name, value in values.items() if value != "gone"}, indent=2)
        (folder / CONFIG).write_text(config + "\n")
        rewrite(folder, config=config, sha256=None)

    return damage


def stored(change=lambda weights: None, **metadata):
    return lambda folder: rewrite(folder, change, **metadata)


def huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


DAMAGE = {
    "empty weights": (cut(WEIGHTS, 0), "model.safetensors cannot be read"),
    "half of the weights": (cut(WEIGHTS, 3000), "model.safetensors cannot be read"),
    "a byte short": (lambda f: cut(WEIGHTS, len((f / WEIGHTS).read_bytes()) - 1)(f), "model.safetensors cannot be"),
    "more behind the weights": (cut(WEIGHTS, -8), "model.safetensors cannot be read"),
    "a huge header": (huge_header, "model.safetensors cannot be read"),
    "a web page": (lambda f: (f / WEIGHTS).write_text("<html>404</html>"), "model.safetensors cannot be read"),
    "empty configuration": (text(b""), "config.json cannot be read"),
    "half a configuration": (cut(CONFIG, 100), "config.json cannot be read"),
    "not UTF-8": (text(b'{"width": "\xff"}'), "config.json cannot be read"),
    "a list": (text(b"[1, 2]"), "config.json must hold a JSON object, it holds a list"),
    "a name twice": (text(b'{"width": 8, "width": 16}'), "'width' is given twice"),
    "NaN": (text(b'{"rope_base": NaN}'), "NaN is no number of JSON"),
    "Infinity": (text(b'{"norm_eps": Infinity}'), "Infinity is no number of JSON"),
    "deep nesting": (text(b"[" * 100_000), "config.json cannot be read"),
    "a number of 10,000 digits": (text(b'{"width": ' + b"9" * 10_000 + b"}"), "config.json cannot be read"),
    "other spelling": (
        lambda f: text((f / CONFIG).read_bytes().replace(b"1e-05", b"1E-05"))(f),
        "two different models",
    ),
    "a number changed": (
        lambda f: text((f / CONFIG).read_bytes().replace(b"e-05", b"e-06"))(f),
        "two different models",
    ),
    "a digest of something else": (stored(sha256="0" * 64), "does not have the digest"),
    "a digest and no configuration": (stored(config=None), "does not have the digest"),
    "strange metadata": (stored(hello="you"), "unknown metadata 'hello'"),
    "a changed weight": (stored(with_(norm__weight=torch.zeros(8))), "does not have the digest"),
    "a missing weight": (stored(without("norm.weight"), sha256=None), r"missing \['norm.weight \[8\]'\]"),
    "an extra weight": (stored(with_(more=torch.ones(1)), sha256=None), r"not wanted \['more \[1\]'\]"),
    "another shape": (
        stored(with_(norm__weight=torch.ones(1, 8)), sha256=None),
        r"not wanted \['norm.weight \[1, 8\]'\]",
    ),
    "whole numbers": (stored(with_(norm__weight=torch.ones(8).long()), sha256=None), "norm.weight has torch.int64"),
    "an unknown field": (edited(depth=3), "config.json holds no usable configuration: .* no field 'depth'"),
    "a field of another type": (edited(width="8"), "config.json holds no usable configuration: width must be"),
    "out of range": (edited(beta_range=3.0), "config.json holds no usable configuration: beta_range must be"),
    "a pattern that is none": (edited(pattern=3), "config.json holds no usable configuration"),
    "a pattern of numbers": (edited(pattern=[1, [2]]), "config.json holds no usable configuration"),
    "no width": (edited(width="gone"), "does not fit config.json"),
    "a million million layers": (edited(layers=10**12), "2 layers, not 1000000000000"),
    "a size that no tensor has": (edited(vocab_size=10**30), "vocab_size must be at most 2147483647"),
    "sizes that no tensor has": (
        edited(vocab_size=2**31 - 1, width=2**31 - 4),
        "holds no usable configuration: config asks for tensors that cannot",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_value_error_that_names_it(name, folder):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("metadata", [{"sha256": None}, {"sha256": None, "config": None}, {"format": "pt"}])
def test_files_without_a_digest_load(metadata, folder):
    """As earlier versions wrote them, and other programs."""
    rewrite(folder, **metadata)
    assert same(load_model(folder), small())


def test_an_interrupted_save_of_another_model_is_told(folder, monkeypatch):
    """The weights are renamed first: what is then left are new weights beside the old configuration."""
    from pathlib import Path

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(folder, small(norm_eps=1e-3))
    with pytest.raises(ValueError, match="saving the second was interrupted"):
        load_model(folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


# --- Tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        (torch.tensor([[0, 20]]), ValueError, "tokens must hold tokens from 0 to 19, got 0 to 20"),
        (torch.tensor([[3, -1]]), ValueError, "tokens must hold tokens from 0 to 19, got -1 to 3"),
        (torch.tensor([[3, 2**40]]), ValueError, "tokens must hold tokens from 0 to 19"),
        (torch.tensor([[1.0]]), TypeError, "tokens must be int32 or int64, got torch.float32"),
        (torch.tensor([[True]]), TypeError, "tokens must be int32 or int64, got torch.bool"),
        (torch.tensor([[1]], dtype=torch.uint8), TypeError, "tokens must be int32 or int64, got torch.uint8"),
        (torch.tensor([1]), ValueError, r"tokens must be \[B, L\], got shape \(1,\)"),
        ([[1, 2]], ValueError, r"tokens must be \[B, L\], got list"),
    ],
)
def test_tokens_outside_the_vocabulary_are_told_in_every_call(tokens, error, message):
    model = small()
    model(torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(error, match=message):
        model(tokens)


@pytest.mark.parametrize(
    "prompt, error, message",
    [
        (torch.zeros(0, 2, dtype=torch.long), ValueError, "prompt must be"),
        (torch.tensor([[20]]), ValueError, "prompt must hold tokens from 0 to 19"),
        (torch.tensor([[1.5]]), TypeError, "prompt must be int32 or int64, got torch.float32"),
        ([[1]], TypeError, "prompt must be a tensor"),
    ],
)
def test_a_prompt_outside_the_vocabulary_is_told(prompt, error, message):
    with pytest.raises(error, match=message):
        generate(small(), prompt, 2)


def test_the_tokens_check_leaves_transforms_and_empty_calls_alone():
    model = small(hybrid="none")
    assert model(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 20)
    parameters = dict(model.named_parameters())

    def loss(values, row):
        return torch.func.functional_call(model, values, (row[None],)).square().mean()

    rows = torch.tensor([[1, 2], [3, 4]])
    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, rows)
    both = [torch.func.grad(loss)(parameters, row)["norm.weight"] for row in rows]
    # float32, sums of some 40 products: 1e-5 leaves two digits.
    assert torch.allclose(per_row["norm.weight"], torch.stack(both), atol=1e-5)
