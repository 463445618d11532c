"""`normfree convert timm:NAME` and `torchvision:NAME`: the converted state dict fits the network converted again."""

import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from normfree.cli import main
from normfree.surgery.convert import convert_batchnorm


def trained(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


def test_a_timm_network_folded(tmp_path, capsys):
    net = trained(timm.create_model("test_resnet", num_classes=3))
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    assert main(["convert", "timm:test_resnet", str(out), "--weights", str(tmp_path / "a.safetensors")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("exact: 15 folded\nlayer ")
    assert text.endswith(
        f"{out}: open it with\n"
        "  net = convert_batchnorm(timm.create_model('test_resnet', num_classes=3), how='exact').model\n"
        f"  net.load_state_dict(safetensors.torch.load_file('{out}'))\n"
    )
    again = convert_batchnorm(timm.create_model("test_resnet", num_classes=3)).model.eval()
    again.load_state_dict(load_file(out))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again(images), net(images), rtol=1e-4, atol=1e-5)
    with safe_open(out, "pt") as file:
        assert file.metadata()["source"] == "timm:test_resnet"


def test_a_torchvision_network_fitted_and_rewritten(tmp_path, capsys):
    net = trained(torchvision.models.mobilenet_v3_small(num_classes=3))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    for i in range(3):
        Image.effect_noise((300, 260), 80).convert("RGB").save(tmp_path / f"{i}.png")
    args = ["--weights", str(tmp_path / "a.pth"), "--images", str(tmp_path)]
    source, out = "torchvision:mobilenet_v3_small", tmp_path / "out.safetensors"
    assert main(["convert", source, str(out), "--how", "normalizer_free", *args]) == 0
    assert (
        "normalizer_free: 23 standardized, 11 folded; 29 kept\noutputs differ by " in capsys.readouterr().out
    )
    again = convert_batchnorm(
        torchvision.models.mobilenet_v3_small(num_classes=3), how="normalizer_free"
    ).model
    again.load_state_dict(load_file(out))
    assert main(["convert", source, str(tmp_path / "new.safetensors"), "--how", "scratch"]) == 0
    again = convert_batchnorm(torchvision.models.mobilenet_v3_small(), how="scratch").model
    again.load_state_dict(load_file(tmp_path / "new.safetensors"))
    assert "num_classes=1000" in capsys.readouterr().out


def test_invalid_arguments(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    save_file({"fc.weight": torch.zeros(3, 512)}, tmp_path / "a.safetensors")
    cases = {
        f"timm:test_resnet {tmp_path}/out": f"the target of timm:test_resnet is {tmp_path}/out. Allowed: a new file "
        "that ends in .safetensors.",
        f"timm:test_resnet {out}": "timm:test_resnet has random weights. Allowed: --how exact with trained weights. "
        "Fix: add --weights FILE, or --how scratch.",
        f"timm:test_resnet {out} --weights a --how normalizer_free": "--how normalizer_free has no images to fit "
        "weights to. Fix: add --images FOLDER; 128 images are enough.",
        f"torchvision:resnet19 {out} --how scratch": "torchvision has no network 'resnet19'. Did you mean 'resnet18'? "
        "Allowed: the names that torchvision.models.list_models(torchvision.models) returns.",
        f"a.npz {out} --weights b": "--how, --weights or --images is given for a.npz. Allowed: these options with "
        "timm:NAME and torchvision:NAME. Fix: leave them out.",
        f"torchvision:resnet18 {out} --weights {tmp_path}/a.safetensors": f"{tmp_path}/a.safetensors does not fit "
        "torchvision:resnet18 with 3 classes: Missing key(s) in state_dict: ",
        f"torchvision:densenet121 {out} --how scratch": "DenseNet.cat: cat has no rule.",
    }
    for args, message in cases.items():
        assert main(["convert", *args.split()]) == 2
        assert capsys.readouterr().err.startswith(f"normfree: {message}"), args
    assert not out.exists()
