"""Networks against results of DeepMind's released JAX code (tests/reference/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normfree.models.activations import GAINS
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.ops.standardize_torch import WS_EPS
from normfree.weights.names import haiku_from_state_dict, state_dict_from_haiku

REFERENCE = Path(__file__).parent.parent / "reference"
TINY = {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8, "num_classes": 10}
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2; the port is near 1e-6


def relative(got, wanted) -> float:
    a, b = np.asarray(got, np.float64).ravel(), np.asarray(wanted, np.float64).ravel()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def draw_parameters(meta: dict) -> dict:
    """Return the random parameters of a compact fixture, drawn again from names, shapes and seed."""
    first, second = np.random.RandomState(meta["seed"] + 104729), np.random.RandomState(meta["seed"] + 7919)
    tree: dict = {}
    for module in sorted(meta["shapes"]):
        for name in sorted(meta["shapes"][module]):
            shape = tuple(meta["shapes"][module][name])
            squeeze = "squeeze_excite" in module
            if name == "w" and len(shape) == 4:
                value = first.randn(*shape) / np.sqrt(np.prod(shape[:-1]))
            elif name == "w" and squeeze:
                value = first.randn(*shape)
                while (np.abs(value) > 2).any():
                    value[np.abs(value) > 2] = first.randn(int((np.abs(value) > 2).sum()))
                value /= np.sqrt(shape[0])
            else:
                value = 0.01 * first.randn(*shape) if name == "w" else np.full(shape, float(name == "gain"))
            tree.setdefault(module, {})[name] = np.asarray(value, np.float32)
    for module in sorted(tree):
        for name in sorted(tree[module]):
            value = tree[module][name]
            if name == "skip_gain":
                sign = 1.0 if second.rand() < 0.7 else -1.0
                value = np.float32(sign * (0.4 + 0.8 * second.rand()))
            elif name == "gain":
                value = 1.0 + 0.15 * second.randn(*value.shape)
            elif name in ("bias", "b"):
                value = 0.1 * second.randn(*value.shape)
            elif value.ndim == 2 and "squeeze_excite" not in module:
                value = 0.05 * second.randn(*value.shape)
            elif value.ndim == 4:
                value = (value + 0.3 * value.std() * second.randn(1, 1, 1, value.shape[-1])).astype(
                    np.float32
                )
                if module.endswith(("conv0", "initial_conv")):
                    value[..., 0] *= 1e-3  # one filter below the lower bound of the standardization
            tree[module][name] = np.asarray(value, np.float32)
    return tree


def fingerprint(key: str, array) -> np.ndarray:
    """Return the norm of a tensor and four random projections, seeded by its name."""
    flat = np.asarray(array, np.float64).ravel()
    noise = np.random.RandomState(zlib.crc32(key.encode()))
    return np.array([np.linalg.norm(flat)] + [flat @ noise.randn(flat.size) for _ in range(4)])


def run(net: Net, images: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Return outputs of every module (B H W C) and gradients (with the names of the reference) of one pass."""
    outputs: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).requires_grad_()
    net.zero_grad()
    logits = net(x)
    loss = F.cross_entropy(logits, torch.from_numpy(labels).long())
    loss.backward()
    pool = net.forward_head(net.forward_features(x), pre_logits=True)
    last = {k: v.permute(0, 2, 3, 1) if v.ndim == 4 else v for k, v in outputs.items() if v is not None}
    return {
        "taps": {k: v.detach().numpy() for k, v in last.items()},
        "grads": haiku_from_state_dict({k: p.grad for k, p in net.named_parameters()}),
        "heads": {
            "logits": logits.detach().numpy(),
            "pool": pool.detach().numpy(),
            "loss": loss.detach().numpy(),
        },
        "input": {"grad": x.grad.permute(0, 2, 3, 1).numpy()},
    }


def module_names(tree: dict) -> dict[str, str]:
    """Return our module name for every haiku module with parameters, in one translation of numbered arrays.

    Translating the whole tree for every module took most of the time of these tests.
    """
    numbers = {(m, n): float(i) for i, (m, n) in enumerate((m, n) for m in tree for n in tree[m])}
    numbered = {
        m: {n: np.full_like(a, numbers[m, n]) for n, a in arrays.items()} for m, arrays in tree.items()
    }
    keys = {float(v.flatten()[0]): k for k, v in state_dict_from_haiku(numbered).items() if v.numel()}
    names = {m: keys[number].rpartition(".")[0] for (m, _), number in numbers.items() if number in keys}
    gates = {
        m.removesuffix("/~/linear"): n for m, n in names.items() if m.endswith("squeeze_excite/~/linear")
    }
    return names | {m: n.removesuffix(".fc0") for m, n in gates.items()}


def tiny() -> tuple[dict, dict]:
    data = np.load(REFERENCE / "nfnet_tiny.npz")
    tree: dict = {}
    for key in data:
        if key.startswith("param|"):
            _, module, name = key.split("|")
            tree.setdefault(module, {})[name] = data[key]
    return data, tree


def test_tiny_net_equals_the_reference():
    """Logits, features, 58 intermediate outputs and 131 gradients at 33 px, where every SAME padding is odd."""
    data, tree = tiny()
    net = create_model("nfnet_f0", **TINY).eval()
    net.load_state_dict(state_dict_from_haiku(tree))
    got = run(net, data["input"], data["labels"])
    for name in ("logits", "pool", "loss"):
        assert relative(got["heads"][name], data[name]) < OUTPUT_TOLERANCE, name
    assert relative(got["input"]["grad"], data["grad_input"]) < GRADIENT_TOLERANCE
    taps = [k for k in data if k.startswith("tap|")]
    grads = [k for k in data if k.startswith("grad|")]
    assert (len(taps), len(grads)) == (58, 131)
    names = module_names(tree)
    for key in taps:
        output = got["taps"][names[key[4:]]]
        assert relative(output, data[key]) < OUTPUT_TOLERANCE, key
    for key in grads:
        _, module, name = key.split("|")
        assert relative(got["grads"][module][name], data[key]) < GRADIENT_TOLERANCE, key


@pytest.mark.parametrize(
    ("fixture", "name"),
    [("nfnet_f0_64", "nfnet_f0"), ("nf_resnet50_64", "nf_resnet50"), ("nf_regnet_b0_64", "nf_regnet_b0")],
)
def test_published_variants_equal_the_reference(fixture, name):
    """Logits, features, every block output and every gradient at 64 px, by fingerprint.

    The gradient of a ReLU jumps where its input crosses 0, and rounding in float32, which differs between processors,
    moves some inputs across 0. Such gradients are computed in float64, and equal the reference's to 4e-5.
    """
    data = np.load(REFERENCE / f"{fixture}.npz")
    meta = json.loads(str(data["meta"]))
    tree = draw_parameters(meta)
    random = np.random.RandomState(meta["seed"])
    images = random.randn(meta["batch"], meta["size"], meta["size"], 3).astype(np.float32)
    labels = random.randint(0, meta["classes"], size=(meta["batch"],))
    net = create_model(name).eval()
    net.load_state_dict(state_dict_from_haiku(tree))
    got = run(net, images, labels)
    for head in ("logits", "pool", "loss"):
        assert relative(got["heads"][head], data[head]) < OUTPUT_TOLERANCE, head
    exact = run(net.double(), images.astype(np.float64), labels) if net.variant.activation == "relu" else got
    by_input = fingerprint("grad_input", exact["input"]["grad"])
    assert relative(by_input, data["fp:grad_input"]) < GRADIENT_TOLERANCE
    taps = [k for k in data if k.startswith("fp:tap|")]
    grads = [k for k in data if k.startswith("fp:grad|")]
    assert len(grads) == sum(map(len, tree.values()))
    assert len(taps) >= sum(net.variant.depths) + 1
    names = module_names(tree)
    for key in taps:
        module = key.removeprefix("fp:tap|")
        output = got["taps"][names.get(module) or names[module + "/~/conv0"]]
        assert relative(fingerprint(key[3:], output), data[key]) < OUTPUT_TOLERANCE, key
    for key in grads:
        _, module, leaf = key.split("|")
        assert relative(fingerprint(key[3:], exact["grads"][module][leaf]), data[key]) < GRADIENT_TOLERANCE, (
            key
        )


def numpy_conv(x, weight, stride, groups):
    """Return the SAME convolution of B H W C by a weight H W I O, one position of the filters at a time."""
    k, size = weight.shape[0], x.shape[1]
    total = max((-(-size // stride) - 1) * stride + k - size, 0)
    low = total // 2
    x = np.pad(x, ((0, 0), (low, total - low), (low, total - low), (0, 0)))
    out, side = weight.shape[-1], (x.shape[1] - k) // stride + 1
    y = np.zeros((x.shape[0], side, side, out))
    per_in, per_out = weight.shape[2], out // groups
    for g in range(groups):
        channels, filters = slice(g * per_in, (g + 1) * per_in), slice(g * per_out, (g + 1) * per_out)
        for i in range(k):
            for j in range(k):
                window = x[:, i : i + stride * side : stride, j : j + stride * side : stride, channels]
                y[..., filters] += window[:, :side, :side] @ weight[i, j, :, filters]
    return y


def numpy_tiny(tree: dict, x: np.ndarray) -> np.ndarray:
    """Return the logits of the tiny NFNet in float64, computed as in the equations of the papers.

    γ and β multiply activations; 2, α and the skip gain multiply the branch.
    """
    p = {
        m.removeprefix("NFNet/~/"): {n: a.astype(np.float64) for n, a in arrays.items()}
        for m, arrays in tree.items()
    }

    def conv(name, x, stride=1, groups=1):
        w, gain, bias = (p[name][k] for k in ("w", "gain", "bias"))
        mean, var = w.mean((0, 1, 2)), w.var((0, 1, 2))
        fan_in = np.prod(w.shape[:3])
        return (
            numpy_conv(
                x, (w - mean) * gain / np.sqrt(np.maximum(var * fan_in, WS_EPS["floor"])), stride, groups
            )
            + bias
        )

    def act(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * GAINS["gelu"]

    def pool(x):
        count = np.pad(np.ones(x.shape[1:3]), ((0, x.shape[1] % 2), (0, x.shape[2] % 2)))
        x = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        quads = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).sum((2, 4))
        return quads / count.reshape(count.shape[0] // 2, 2, -1, 2).sum((1, 3))[None, :, :, None]

    for i, stride in enumerate((2, 1, 1, 2)):
        x = conv(f"stem_conv{i}", act(x) if i else x, stride)
    index, variance = 0, 1.0
    for stage, (depth, width) in enumerate(zip((1, 2, 2, 1), (32, 64, 96, 96), strict=True)):
        for j in range(depth):
            name = f"nf_block_{index}" if index else "nf_block"
            stride, groups = 2 if j == 0 and stage else 1, width // 16
            a = act(x) / np.sqrt(variance)
            shortcut = conv(f"{name}/~/conv_shortcut", pool(a) if stride > 1 else a) if j == 0 else x
            r = act(conv(f"{name}/~/conv0", a))
            r = act(conv(f"{name}/~/conv1", r, stride, groups))
            r = conv(f"{name}/~/conv2", act(conv(f"{name}/~/conv1b", r, 1, groups)))
            fc0, fc1 = p[f"{name}/~/squeeze_excite/~/linear"], p[f"{name}/~/squeeze_excite/~/linear_1"]
            hidden = np.maximum(r.mean((1, 2)) @ fc0["w"] + fc0["b"], 0)
            gate = 1 / (1 + np.exp(-(hidden @ fc1["w"] + fc1["b"])))
            x = shortcut + 0.2 * p[name]["skip_gain"] * 2 * gate[:, None, None, :] * r
            variance = (1.0 if j == 0 else variance) + 0.2**2
            index += 1
    features = act(conv("final_conv", x)).mean((1, 2))
    return features @ p["linear"]["w"] + p["linear"]["b"]


@pytest.mark.parametrize("size", [33, 32])
def test_tiny_net_in_float64_equals_the_equations(size):
    data, tree = tiny()
    images = data["input"][:, :size, :size].astype(np.float64)
    net = create_model("nfnet_f0", **TINY).double().eval()
    net.load_state_dict(state_dict_from_haiku(tree))
    with torch.no_grad():
        logits = net(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    assert relative(logits.numpy(), numpy_tiny(tree, images)) < 1e-9
    if size == 33:  # the logits of the reference differ from the equations by float32 rounding
        assert relative(numpy_tiny(tree, images), data["logits"]) < 2e-6
