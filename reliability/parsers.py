"""Every parser of what a user gives, as a function of bytes that may raise `ValueError` only, and inputs to start from.

`reliability/corpus/` has further inputs, each of which reaches code that the ones before do not: a selection of what a
coverage-guided run has found, see `guided.py`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CORPUS = Path(__file__).with_name("corpus")
Parse = Callable[[bytes], Any]


class Parser(NamedTuple):
    """One parser.

    Attributes:
        parse: called with the input; raises `ValueError` for what it refuses.
        seeds: valid inputs.
    """

    parse: Parse
    seeds: Callable[[], list[bytes]]


@functools.cache
def _folder() -> Path:
    """Return a folder of this process for the files that parsers read."""
    _temporary.append(tempfile.TemporaryDirectory(prefix="normfree-parsers-"))
    os.environ["XDG_CACHE_HOME"] = _temporary[-1].name  # indices of shards
    return Path(_temporary[-1].name)


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def file(name: str, parse: Callable[[Path], Any]) -> Parse:
    """Return a parser of the bytes of a file that has this name."""

    def with_file(data: bytes) -> Any:
        path = _folder() / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return parse(path)

    return with_file


def text(parse: Callable[[str], Any]) -> Parse:
    """Return a parser of text."""
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


# --- parsers ----------------------------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    from normfree.files import read_json

    return read_json(path, limit=1_000_000)


def _config(path: Path) -> Any:
    from normfree.training.config_io import load_config, to_toml

    config = load_config(path)
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    return config


def _flags(line: str) -> Any:
    from normfree.training.config import Config
    from normfree.training.config_io import with_overrides

    return with_overrides(Config(), line.split(" "))


def _choice(line: str) -> Any:
    from normfree.training.choices import BODIES, CLIPS, OBJECTIVES, OPTIMIZERS, SCHEDULES, parse_choice

    kinds = {"o": OPTIMIZERS, "c": CLIPS, "s": SCHEDULES, "b": BODIES, "j": OBJECTIVES}
    return parse_choice(line[1:], kinds.get(line[:1], OPTIMIZERS))


def _spec(line: str) -> Any:
    from normfree.data.spec import parse_spec

    return parse_spec(line, allowed=("image", "label", "val"))


def _synthetic(line: str) -> Any:
    from normfree.data.sources.synthetic import options_of

    return options_of(f"synthetic:{line}")


def _braces(line: str) -> Any:
    from normfree.data.sources.storage import braces

    return len(braces(line, line))


def _augmentation(line: str) -> Any:
    from normfree.data.transforms.train import train_transform

    return train_transform(image_size=8, randaugment=line)


def _table(path: Path) -> Any:
    from normfree.data.sources.listed import read_lines

    return read_lines(path)


def _records(path: Path) -> Any:
    from normfree.data.record import read_records

    return read_records(path)


def _metrics(path: Path) -> Any:
    from normfree.diagnose.metrics_file import read_metrics

    return read_metrics(path)


def _tensors(path: Path) -> Any:
    from normfree.weights.tensor_file import read_tensors

    return sorted(read_tensors(path))


def _haiku(path: Path) -> Any:
    from normfree.weights.haiku import read_haiku

    return sorted(read_haiku(path))


def _packed(path: Path) -> Any:
    from normfree.data.sources.packed import PackedSource

    source = PackedSource(path, check=False)
    return [(source.name(i), source.label(i), source.image(i).size) for i in range(min(9, len(source)))]


def _tar(path: Path) -> Any:
    from normfree.data.sources.tar_index import index_tar

    with path.open("rb") as opened:
        return index_tar(opened, name="a.tar", size=path.stat().st_size).names


def _image(data: bytes) -> Any:
    from normfree.data.transforms.decode import load_image

    return load_image(data, max_pixels=1_000_000).size


def _manifest(path: Path) -> Any:
    from normfree.training.checkpoint import read

    return read(path.parent).step


def _model_config(path: Path) -> Any:
    from normfree.pretrained import describe

    path.with_name("model.safetensors").touch()
    return describe(path.parent)


def _checksums(path: Path) -> Any:
    from normfree.weights.checksums import verify

    path.with_name("config.json").touch()
    return verify(path.parent, "config.json")


def _labels(path: Path) -> Any:
    from normfree.data.sources.imagenet import _mapping

    return _mapping(path)


def _results(path: Path) -> Any:
    from normfree.scores import read_results, shown_top1

    results = read_results(path)
    return [shown_top1(results[kind]) for kind in ("weights", "average")], results["steps"]


def _folds(path: Path) -> Any:
    from normfree.training.folds import finished, number_of_folds

    return number_of_folds(path.parent), finished(path.parent)


def _metadata(line: str) -> Any:
    from normfree.exported_net import INPUT, OUTPUT, check_metadata
    from normfree.preprocessing import Preprocessing

    shapes: Any = {"inputs": {INPUT: (None, 3, 8, 8)}, "outputs": {OUTPUT: (None, 2)}}
    fields = check_metadata(line, Path("a.onnx"), **shapes)["preprocessing"]
    try:
        return Preprocessing.from_fields(fields)
    except TypeError as error:  # of the caller, which names the file
        raise ValueError(error) from None


def _classes(data: bytes) -> Any:
    from normfree.data.sources.webdataset import _listed

    return _listed(data[1:], json_list=data[:1] == b"j")


def _secret(path: Path) -> Any:
    from normfree.training.secret import SecretKey

    path.chmod(0o600)
    return SecretKey.read(path)


# --- valid inputs -----------------------------------------------------------------------------------------------


def _lines(*inputs: str) -> Callable[[], list[bytes]]:
    return lambda: [line.encode() for line in inputs]


def _toml_seeds() -> list[bytes]:
    from normfree.training.config import Config
    from normfree.training.config_io import to_toml

    return [
        to_toml(Config()).encode(),
        b"[optim]\nlr = 'auto'\nmomentum = 0.8\n",
        b"[input]\nimage_size = '8x9'\n",
    ]


def _made(write: Callable[[Path], Any]) -> Callable[[], list[bytes]]:
    def make() -> list[bytes]:
        path = _folder() / "seed.npz"
        write(path)
        return [path.read_bytes()]

    return make


def _write_tensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"head.bias": torch.ones(3), "w": torch.ones(2, 2, dtype=torch.bfloat16)}, path)


def _haiku_seeds() -> list[bytes]:
    from normfree.weights.haiku import write_haiku

    tree = {"NFNet/~/linear": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}}
    npz = _made(lambda path: write_haiku(path, tree))()
    return [*npz, pickle.dumps(tree, 4), pickle.dumps(tree, 2)]


def _write_packed(path: Path) -> None:
    from normfree.data.source import ArraySource
    from normfree.data.sources.packed import pack

    images = np.zeros((3, 4, 4, 3), np.uint8)
    pack(ArraySource(images, [0, 1, 0], classes=("a", "b"), names=("x", "y", "z")), path, size=4)


def _tar_seeds() -> list[bytes]:
    from reliability.hostile_readers import make_shard

    make_shard(_folder())
    return [(_folder() / "a.tar").read_bytes()]


def _image_seeds() -> list[bytes]:
    from PIL import Image

    found = []
    for kind, mode in (
        ("JPEG", "RGB"),
        ("PNG", "P"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "L"),
        ("WEBP", "RGB"),
    ):
        out = io.BytesIO()
        Image.new("RGB", (5, 4), "red").convert(mode).save(out, kind)
        found.append(out.getvalue())
    return [*found, b"P6\n2 1\n255\n" + bytes(6)]


def _model_seeds() -> list[bytes]:
    from reliability.hostile_readers import make_model

    make_model(_folder() / "made")
    theirs = {"architecture": "nfnet_l0", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    return [(_folder() / "made" / "config.json").read_bytes(), json.dumps(theirs).encode()]


_ONE = {"top1": 50.0, "top5": 100.0, "loss": 0.7, "images": 4, "per_class_top1": {"a": 0.0, "b": 100.0}}
RESULTS = {"weights": _ONE, "average": {**_ONE, "confusion": [[0, 2], [0, 2]]}, "steps": 3, "step": 3}
FOLDS = {"folds": 2, "classes": ["a", "b"], "scores": [
    {"fold": 1, "length": "1ep", "step": 3, "images": 4, "top1": 50.0, "balanced_top1": 50.0, "loss": 0.7,
     "confusion": [[0, 2], [0, 2]]}]}  # fmt: skip
METADATA = {"row": "x", "version": "1", "classes": ["cat", "dog"], "opset": 20, "folded": True,
            "preprocessing": {"image_size": 8, "crop": "squash"}}  # fmt: skip
MANIFEST = {"step": 1, "files": {"state.json": {"size": 2, "sha256": "0" * 64}}}
PARSERS: dict[str, Parser] = {
    "json": Parser(file("a.json", _json), _lines('{"a": [1, 2.5, "x", null]}')),
    "config": Parser(file("a.toml", _config), _toml_seeds),
    "flags": Parser(text(_flags), _lines("--optim.lr 0.1 --input.image_size 1x8x9", "--length=3ep --compile true")),
    "choice": Parser(text(_choice), _lines("oadamw:betas=0.9/0.99,eps=1e-8", "cagc:eps=1e-3,unclipped=head.*",
                                           "btrain:lr=0.1,freeze=stem", "jsimclr:temperature=0.2",
                                           "swarmup_cosine:final=0.1")),
    "data": Parser(text(_spec), _lines("csv:a,b.csv,image=x,label=y", "shards:a.tar,val=b.tar")),
    "synthetic": Parser(text(_synthetic), _lines("classes=3,size=8,train=6,val=3")),
    "braces": Parser(text(_braces), _lines("a-{000..012}.tar", "{a,b}-{1..3}")),
    "augmentation": Parser(text(_augmentation), _lines("4x5", "tv:2x9", "simclr:0.5", "trivial")),
    "table": Parser(file("a.csv", _table), _lines("image,label,split\na.png,x,train\nb.png,y,val\n",
                                                  "a.png;x\nb.png;y\n",
                                                  "id,x,y\na.png,0,1\nb.png,1,0\n")),
    "list": Parser(file("a.txt", _table), _lines("a.png x\nb.png y|z\n", "x/a.png\ny/b.png\n")),
    "samples": Parser(file("samples.csv", _records), _lines("part,class,name,digest\ntrain,a,b.png,00\n")),
    "metrics": Parser(file("metrics.jsonl", _metrics), _lines('{"step": 1, "loss": 2.5, "ratios": {"a": [1]}}\n')),
    "labels": Parser(file("val.csv", _labels), _lines("ImageId,PredictionString\na,n01440764 1 2\n")),
    "tensors": Parser(file("a.safetensors", _tensors), _made(_write_tensors)),
    "haiku": Parser(file("a.npz", _haiku), _haiku_seeds),
    "packed": Parser(file("a.packed", _packed), _made(_write_packed)),
    "tar": Parser(file("a.tar", _tar), _tar_seeds),
    "image": Parser(_image, _image_seeds),
    "manifest": Parser(file("step-00000001/MANIFEST.json", _manifest), lambda: [json.dumps(MANIFEST).encode()]),
    "model": Parser(file("model/config.json", _model_config), _model_seeds),
    "results": Parser(file("results.json", _results), lambda: [json.dumps(RESULTS).encode()]),
    "folds": Parser(file("folds/folds.json", _folds), lambda: [json.dumps(FOLDS).encode()]),
    "metadata": Parser(text(_metadata), lambda: [json.dumps(METADATA).encode()]),
    "classes": Parser(_classes, _lines('j["cat", "dog"]', "tcat\ndog\n")),
    "secret": Parser(file("noise.key", _secret), _lines("00" * 32)),
    "checksums": Parser(file("sums/SHA256SUMS", _checksums), lambda: [b"0" * 64 + b"  config.json\n"]),
}  # fmt: skip


def inputs(name: str) -> list[bytes]:
    """Return the valid inputs of a parser and those of its corpus."""
    return [*PARSERS[name].seeds(), *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]


def accepts(name: str, data: bytes) -> bool:
    """Return True if a parser accepts an input, False if it refuses it; other errors pass."""
    try:
        PARSERS[name].parse(data)
    except ValueError:
        return False
    return True
