"""`fold` on networks of other libraries that are not installed for the default tests."""

import pytest
import torch

from normfree import fold_with_report


@pytest.mark.works("Hugging Face Transformers", "fold")
def test_bit_of_transformers_is_equal_bit_for_bit():
    transformers = pytest.importorskip("transformers")
    config = transformers.BitConfig(
        embedding_size=32, hidden_sizes=[128, 128, 256, 256], depths=[1, 1, 1, 1], num_labels=5,
        global_padding="same", out_features=None,
    )  # fmt: skip
    model = transformers.BitForImageClassification(config).eval()
    images = torch.randn(2, 3, 65, 90)
    folded, report = fold_with_report(model, images)
    count = sum(type(m).__name__ == "WeightStandardizedConv2d" for m in model.modules())
    assert list(report.folded.values()) == ["weight standardization"] * count
    assert count > 10
    assert (report.left, report.difference) == ({}, 0.0)
    assert torch.equal(folded(images).logits, model(images).logits)


@pytest.mark.works("segmentation-models-pytorch", "fold")
def test_a_unet_loses_all_batch_norms():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    folded, report = fold_with_report(model, torch.randn(2, 3, 64, 96))
    assert report.left == {}
    assert report.relative_difference < 1e-5
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.works("timm", "fold")
@pytest.mark.parametrize(
    "name", ["eca_nfnet_l0", "nf_regnet_b0", "resnetv2_50x1_bit", "vit_base_r50_s16_224", "dm_nfnet_f0"]
)
def test_networks_of_timm_are_equal_bit_for_bit(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    size = (224, 224) if name.startswith("vit") else (65, 96)
    _, report = fold_with_report(model, torch.randn(1, 3, *size))
    assert (report.left, report.difference) == ({}, 0.0)
    assert set(report.folded.values()) == {"weight standardization"}
