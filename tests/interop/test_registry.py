"""Our variants by name in libraries that take networks of timm, and networks without batch norm in others."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained
from normfree.surgery.batchnorm import batchnorms
from normfree.surgery.convert import convert_batchnorm

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _warnings_of_others() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.works("Hugging Face Transformers", "normfree.timm")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nf_resnet_nano", {}),
        ("resnet_nano_64", {"widths": (32, 64, 96)}),
        ("nf_resnet26", {"in_channels": 1}),
        ("nf_regnet_b0", {"global_pool": "max"}),
        ("timm_test_nfnet", {}),
    ],
)
def test_transformers_opens_model_folders(name: str, fields: dict, tmp_path: Path) -> None:
    pytest.importorskip("normfree.timm")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = create_model(name, num_classes=3, **fields).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    half = (0.5,) * net.in_channels
    model = TrainedModel(net, Preprocessing(64, crop="squash", mean=half, std=half), ("a", "b", "c"))
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, net.in_channels, 64, 64)
    with torch.no_grad():
        out = theirs(images, output_hidden_states=True)
        torch.testing.assert_close(out.logits, net(images), rtol=1e-4, atol=1e-5)
        maps = net.forward_intermediates(images, intermediates_only=True)
        assert [tuple(m.shape) for m in out.hidden_states] == [tuple(m.shape) for m in maps]
        body = transformers.AutoModel.from_pretrained(tmp_path).eval()
        pooled = net.forward_head(net.forward_features(images), pre_logits=True)
        torch.testing.assert_close(body(images).pooler_output, pooled, rtol=1e-4, atol=1e-5)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}


def run_page(name: str) -> None:
    """Run the blocks of a page that need other libraries; they are marked as py instead of python."""
    blocks = re.findall(r"```py\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


@pytest.mark.works("Hugging Face Transformers", "attach_agc")
def test_the_page_for_users_of_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    run_page("huggingface.md")


def test_the_page_on_dense_prediction_runs() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    run_page("dense.md")


@pytest.mark.works("segmentation-models-pytorch", "normfree.timm")
@pytest.mark.parametrize(
    ("name", "depth", "fields"),
    [
        ("nf_resnet_nano_64", 4, {}),
        ("nf_resnet_nano", 2, {}),
        ("normfree_nf_resnet26", 5, {}),
        ("nf_regnet_b6", 5, {"drop_path_rate": 0.1}),
        ("timm_test_nfnet", 5, {}),
    ],
)
def test_segmentation_models_take_encoders_by_name(name: str, depth: int, fields: dict) -> None:
    pytest.importorskip("normfree.timm")
    smp = pytest.importorskip("segmentation_models_pytorch")
    width = (64, 48, 32, 24, 16)[5 - depth :]
    net = smp.Unet(
        f"tu-{name}",
        encoder_weights=None,
        encoder_depth=depth,
        decoder_channels=width,
        in_channels=1,
        classes=2,
        **fields,
    )
    images = torch.randn(2, 1, 64, 64)
    masks = net(images)
    assert masks.shape == (2, 2, 64, 64)
    masks.square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.works("segmentation-models-pytorch", "convert_batchnorm")
@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", "mobilenet_v2"])
def test_encoder_and_decoder_of_a_unet_lose_their_batch_norms(
    with_random_norms: Callable[..., nn.Module], encoder: str
) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = with_random_norms(smp.Unet(encoder, encoder_weights=None, classes=2), std=0.1)
    images = torch.randn(2, 3, 64, 64)
    converted, report = convert_batchnorm(net, images)
    with torch.no_grad():
        wanted = net(images)
        assert ((converted(images) - wanted).norm() / wanted.norm()).item() < 1e-5
    assert not batchnorms(converted)
    assert report.counts["scale and shift"] <= 1  # EfficientNet's last norm has no caller in an encoder
    assert any(c.layer.startswith("decoder.") for c in report.layers)
    assert not [m for m in converted.modules() if getattr(m, "inplace", False)]
    converted.train()
    for module in converted.modules():
        module.register_full_backward_hook(lambda *_: None)
    converted(images.requires_grad_()).mean().backward()


@pytest.mark.works("Opacus", "convert_batchnorm")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_opacus_computes_the_gradients_of_each_example_of_converted_networks(
    with_random_norms: Callable[..., nn.Module], name: str
) -> None:
    """In all four modes, against a loop over the examples, in float64."""
    torchvision = pytest.importorskip("torchvision")
    grad_sample = pytest.importorskip("opacus.grad_sample")
    net = with_random_norms(getattr(torchvision.models, name)(num_classes=5), std=0.1).double()
    images, targets = torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.arange(3)

    def fresh() -> nn.Module:
        converted = convert_batchnorm(net, images).model.train()
        for module in converted.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        return converted

    single = fresh()
    loop = [
        torch.cat([g.flatten() for g in torch.autograd.grad(
            nn.functional.cross_entropy(single(images[i : i + 1]), targets[i : i + 1]), list(single.parameters())
        )]) for i in range(3)
    ]  # fmt: skip
    wanted = torch.stack(loop)
    for mode in ("hooks", "functorch", "ew", "ghost"):
        if mode == "ghost":
            wrapped = grad_sample.GradSampleModuleFastGradientClipping(
                fresh(), max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
            )
        elif mode == "ew":
            wrapped = grad_sample.GradSampleModuleExpandedWeights(fresh(), loss_reduction="sum")
        else:
            wrapped = grad_sample.GradSampleModule(
                fresh(), loss_reduction="sum", force_functorch=mode == "functorch"
            )
        nn.functional.cross_entropy(wrapped(images), targets, reduction="sum").backward()
        if mode == "ghost":
            torch.testing.assert_close(wrapped.get_norm_sample(), wanted.norm(dim=1), rtol=1e-9, atol=0.0)
            continue
        got = torch.cat([p.grad_sample.flatten(1) for p in wrapped.parameters()], dim=1)
        assert ((got - wanted).norm() / wanted.norm()).item() < 1e-12, mode
