"""Laws of model folders: any config.json describes a model that predicts, or is refused in one line."""

import functools
import json
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from normfree.models.variant import Variant
from normfree.models.zoo import create_model
from normfree.prediction import predict
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained


@functools.cache
def folder():
    """Return a folder object with a small model; the object is kept, so that the folder is."""
    kept = tempfile.TemporaryDirectory()
    net = create_model("nf_resnet_nano", num_classes=2, depths=(1, 1), widths=(32, 32), strides=(1, 2))
    save_pretrained(TrainedModel(net, Preprocessing(16), ("cat", "dog")), kept.name)
    Path(kept.name, "SHA256SUMS").unlink()  # else every change of the config would be noticed as one
    return kept, json.loads(Path(kept.name, "config.json").read_text(encoding="utf-8"))


# Keys of config.json whose values are replaced; fields of `Variant` are those of "model_args".
KEYS = [("num_classes",), ("label_names",), ("problem_type",), ("pretrained_cfg",), ("normfree",),
          *(("normfree", key) for key in ("row", "in_channels", "model_args", "preprocessing")),
          *(("normfree", "model_args", name) for name in Variant.__dataclass_fields__),
          *(("normfree", "preprocessing", name) for name in Preprocessing.__dataclass_fields__)]  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([10**6, 10**12, 10**400]),
              st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)  # fmt: skip


@given(st.sampled_from(KEYS), values)
@example(("num_classes",), float("inf"))
@example(("normfree", "in_channels"), 0)
@example(("normfree", "in_channels"), -1)
@example(("normfree", "in_channels"), 10**12)
@example(("normfree", "model_args", "depths"), [10**6, 10**6])
@example(("normfree", "model_args", "depths"), [1000, 1000])
@example(("normfree", "model_args", "widths"), [10**6, 10**6])
@example(("normfree", "model_args", "strides"), [0, -1])
@example(("normfree", "model_args", "head_ratio"), [1, 0])
@example(("normfree", "model_args", "se_divisor"), 0)
@example(("normfree", "model_args", "bottleneck_ratio"), float("inf"))
@example(("normfree", "model_args", "classifier_std"), -1.0)
@example(("normfree", "preprocessing", "image_size"), 10**9)
@example(("normfree", "preprocessing", "image_size"), [1])
@example(("normfree", "preprocessing", "std"), [0.0, 0.0, 0.0])
@example(("normfree", "preprocessing", "mean"), "abc")
@example(("label_names",), {"cat": 1, "dog": 2})
def test_any_value_in_a_config_gives_a_model_that_predicts_or_a_value_error(keys, value):
    kept, config = folder()
    config = json.loads(json.dumps(config))
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path = Path(kept.name)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        model = from_pretrained(path)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    size = model.preprocessing.image_size
    if max(size if isinstance(size, tuple) else (size,)) > 100:
        return  # possible, and slow
    if model.classes:
        (found,) = predict(model, [Image.new("RGB", (9, 7), "red")], device="cpu", top=2)
        assert not found.error
        assert set(found.classes) <= set(model.classes)
        assert all(0 <= probability <= 1 for probability in found.probabilities)
