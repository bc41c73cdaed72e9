"""The loader and the model against an independent forward pass in numpy, and what bad folders say."""

import json
import math
import struct

import numpy as np
import pytest

from icl.hijacking.language import gpt2
from training.errors import UserError

SIZES = {"vocab_size": 23, "n_positions": 9, "n_embd": 8, "n_layer": 2, "n_head": 2}
CONFIG = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, **SIZES}


def random_tensors(prefix="transformer."):
    rng = np.random.default_rng(0)
    width = SIZES["n_embd"]
    shapes = {"wte.weight": (SIZES["vocab_size"], width), "wpe.weight": (SIZES["n_positions"], width)}
    for i in range(SIZES["n_layer"]):
        for name, (inputs, outputs) in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes |= {f"h.{i}.{name}.weight": (inputs, outputs), f"h.{i}.{name}.bias": (outputs,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (width,), f"h.{i}.{name}.bias": (width,)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {prefix + name: rng.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


def write_safetensors(path, tensors, dtype="F32"):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        raw = value.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture(name="folder")
def _folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(tmp_path / "model.safetensors", random_tensors())
    return tmp_path


def reference_logits(tensors, tokens):
    """The forward pass in float64, token by token and head by head."""
    weights = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, name):
        scaled = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    stream = [weights["wte.weight"][token] + weights["wpe.weight"][i] for i, token in enumerate(tokens)]
    width, heads = SIZES["n_embd"], SIZES["n_head"]
    size = width // heads
    for layer in range(SIZES["n_layer"]):
        block = f"h.{layer}"
        projected = [dense(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn") for x in stream]
        for i, x in enumerate(stream):
            mixed = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                keys = [p[width : 2 * width][part] for p in projected[: i + 1]]
                values = [p[2 * width :][part] for p in projected[: i + 1]]
                scores = np.array([projected[i][:width][part] @ k / math.sqrt(size) for k in keys])
                share = np.exp(scores - scores.max())
                mixed.append(sum(a * v for a, v in zip(share / share.sum(), values, strict=True)))
            stream[i] = x + dense(np.concatenate(mixed), f"{block}.attn.c_proj")
        for i, x in enumerate(stream):
            h = dense(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            gelu = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            stream[i] = x + dense(gelu, f"{block}.mlp.c_proj")
    return np.stack([norm(x, "ln_f") @ weights["wte.weight"].T for x in stream])


def test_logits_are_those_of_the_reference(folder):
    tokens = np.array([[3, 22, 0, 7, 7], [1, 2, 3, 4, 5]])
    logits = np.asarray(gpt2.load(folder)(tokens))
    for ours, row in zip(logits, tokens, strict=True):
        np.testing.assert_allclose(ours, reference_logits(random_tensors(), row), atol=1e-4, rtol=1e-4)


def test_parts_half_precision_and_mask_buffers(folder):
    """Sharded weights without a prefix, float16, and the mask buffers that old files hold."""
    (folder / "model.safetensors").unlink()
    tensors = random_tensors(prefix="") | {"h.0.attn.bias": np.ones((1, 1, 9, 9), np.float32)}
    names = sorted(tensors)
    files = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, members in files.items():
        write_safetensors(folder / file, {name: tensors[name] for name in members}, "F16")
    index = {"weight_map": {name: file for file, members in files.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = np.array([[3, 22, 0, 7, 7]])
    np.testing.assert_allclose(gpt2.load(folder)(tokens)[0], reference_logits(tensors, tokens[0]), atol=0.05, rtol=0.05)


def test_more_tokens_than_positions(folder):
    with pytest.raises(ValueError, match="10 tokens, but the model has 9 positions"):
        gpt2.load(folder)(np.zeros((1, 10), int))


def rewrite(folder, change):
    tensors = random_tensors()
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("transformer.h.1.ln_2.bias"))


def _wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({"transformer.h.0.mlp.c_fc.weight": np.zeros((8, 31), np.float32)}))


def _other_architecture(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))


def _other_activation(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"activation_function": "relu"}))


def _no_config(folder):
    (folder / "config.json").unlink()


def _damaged_config(folder):
    (folder / "config.json").write_text("{")


def _without_a_size(folder):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "n_head"}))


def _cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_weights, "holds no weights"),
        (_missing_tensor, r"lack 'h\.1\.ln_2\.bias'"),
        (_wrong_shape, r"'h\.0\.mlp\.c_fc\.weight' has the shape \(8, 31\), and config\.json asks for \(8, 32\)"),
        (_other_architecture, "architecture 'llama'"),
        (_other_activation, "'relu'; this loader reads gpt2, gelu_new"),
        (_no_config, r"config\.json is missing or no JSON"),
        (_damaged_config, r"config\.json is missing or no JSON"),
        (_without_a_size, "lacks the key 'n_head'"),
        (_cut_off, "cut off or no safetensors file"),
    ],
)
def test_a_bad_folder_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        gpt2.load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder"):
        gpt2.load(tmp_path / "absent")
