"""The readers of files from outside, each as a function of the folder that holds the file, and templates of folders.

They are called in processes of their own, so they import what they need when they are called.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def weights(folder: Path) -> Any:
    """Read a file of weights."""
    from normfree.weights.load import read_weights

    (path,) = folder.iterdir()
    return sorted(read_weights(path))


def torch_file(folder: Path) -> Any:
    """Read a file of torch.save."""
    from normfree.weights.torch_file import read_torch_file

    return sorted(read_torch_file(folder / "a.pth"))


def model(folder: Path) -> Any:
    """Open a model folder."""
    from normfree.pretrained import from_pretrained

    return from_pretrained(folder).classes


def hub(folder: Path) -> Any:
    """Open a model of a hub that has the files of the folder."""
    from normfree.pretrained import from_pretrained

    def download(repository: str, name: str, *, revision: str | None) -> str:
        if not (folder / name).exists():
            raise FileNotFoundError(name)
        return str(folder / name)

    sys.modules["huggingface_hub"] = SimpleNamespace(hf_hub_download=download)  # type: ignore[assignment]
    return from_pretrained("hf-hub:someone/something").classes


def program(folder: Path) -> Any:
    """Open an exported program, which `export` writes and nothing reads."""
    from normfree.pretrained import from_pretrained

    return from_pretrained(folder / "a.pt2")


def onnx(folder: Path) -> Any:
    """Open any ONNX file, and run it."""
    import torch

    from normfree.onnx_net import open_graph

    net = open_graph(folder / "a.onnx")
    return tuple(net(torch.zeros([size or 1 for size in net.input_shape])).shape)


def checkpoint(folder: Path) -> Any:
    """Read a checkpoint."""
    from normfree.training.checkpoint import read

    return read(folder / "step-00000001").step


def pointer(folder: Path) -> Any:
    """Read the pointer to the last checkpoint."""
    from normfree.training.checkpoint import pointed

    assert pointed(folder, "last") == ""
    return "nothing"


def config(folder: Path) -> Any:
    """Read the config of a run."""
    from normfree.training.config_io import load_config

    return load_config(folder / "config.toml").data


def metrics(folder: Path) -> Any:
    """Read the metrics of a run; damaged lines are left out."""
    from normfree.diagnose.metrics_file import read_metrics

    assert read_metrics(folder / "metrics.jsonl") == []
    return "nothing"


def samples(folder: Path) -> Any:
    """Read the samples of a run."""
    from normfree.data.record import read_records

    records = read_records(folder / "samples.csv")
    return "no such file" if records is None else len(records)


def environment(folder: Path) -> Any:
    """Read where a run found its data."""
    from normfree.training.run_data import DATA_AT, recorded

    assert recorded(folder, DATA_AT) == []
    return "nothing"


def table(folder: Path) -> Any:
    """Open a table of images, and every image."""
    return _opened(f"csv:{folder / 'a.csv'}")


def listed(folder: Path) -> Any:
    """Open a list of images, and every image."""
    return _opened(f"csv:{folder / 'a.txt'}")


def shards(folder: Path) -> Any:
    """Open a shard, and every image."""
    import os

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return _opened(f"shards:{folder / 'a.tar'}")


def packed(folder: Path) -> Any:
    """Open a packed file, and every image."""
    return _opened(f"packed:{folder / 'a.packed'}")


def _opened(data: str) -> int:
    """Open data for evaluation, and all images; return their number."""
    from normfree.data.sources.open import open_labeled

    source = open_labeled(data)
    for index in range(len(source)):
        source.image(index)
    return len(source)


# --- templates --------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """Write a model folder without checksums, which others could make fit."""
    from normfree.models.zoo import create_model
    from normfree.preprocessing import Preprocessing
    from normfree.pretrained import TrainedModel, save_pretrained

    net = create_model("nf_resnet_nano", num_classes=2)
    save_pretrained(TrainedModel(net, Preprocessing(32), ("cat", "dog")), folder)
    (folder / "SHA256SUMS").unlink()


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint."""
    import torch

    from normfree.training.checkpoint import save

    tensors = {name: {"w": torch.ones(3)} for name in ("model", "ema", "optim")}
    save(folder, 1, tensors=tensors, state={"step": 1}, keep=1)


def make_shard(folder: Path) -> None:
    """Write a shard of two images."""
    from reliability.payloads import Site, dot, tape

    members = [
        (f"{i}.{kind}", dot() if kind == "png" else b"%d" % i, {})
        for i in range(2)
        for kind in ("png", "cls")
    ]
    tape(*members)(Site(folder / "a.tar", folder))
