"""What other programs call the verbs, so that an unknown verb leads to the right command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from normfree.suggest import unknown

# What to use -> names, in lower case, with hyphens. The first argument stands for the first of DATA, RUN and NAME.
_VERBS = {
    "normfree train RUN": "resume continue restart go-on",
    "normfree train --data DATA": "fit learn start run training",
    "normfree train finetune --data DATA --weights RUN": "fine-tune tune transfer retrain",
    "normfree train --data DATA --folds 5": "cv kfold k-fold cross-validate cross-validation",
    "normfree train --data DATA --find-lr": "lr-find find-lr lr",
    "normfree eval RUN": "test val valid validate validation evaluate score metrics",
    "normfree predict RUN PATH...": "infer inference classify detect label",
    "normfree predict RUN PATH... --heatmap FOLDER": "heatmap cam gradcam grad-cam explain",
    "normfree predict RUN PATH... --embeddings FILE.npz": "embed embeddings features extract",
    "normfree show RUN": "info inspect describe print summary",
    "normfree list models": "models ls networks",
    "normfree list recipes": "recipes configs",
    "normfree diagnose RUN": "report analyze plot curves",
    "normfree audit DATA": "check verify clean",
    "normfree export RUN": "onnx openvino deploy save",
    "normfree export RUN --int8": "quantize int8",
    "normfree serve RUN": "app web api server gradio",
    "normfree bench NAME": "benchmark speed profile",
}
_USES = {name: use for use, names in _VERBS.items() for name in names.split()}


def unknown_verb(verb: str, rest: Sequence[str], verbs: Collection[str]) -> str:
    """Return the message for an unknown verb: the command to use, if the verb is one of another program, or a run.

    Args:
        verb: the verb.
        rest: the arguments after it.
        verbs: all verbs.

    >>> unknown_verb("resume", ["runs/demo-1"], ["train"])
    "unknown verb 'resume'. Use normfree train runs/demo-1"
    """
    from normfree.training.recipes import RECIPES  # slow to import

    use = _USES.get(verb.lower().replace("_", "-"), "")
    if (Path(verb) / "config.toml").is_file():
        use, rest = "normfree train RUN", [verb]
    elif verb in RECIPES:
        data = ["--data"] if rest and not rest[0].startswith("-") else []
        use = shlex.join(["normfree", "train", verb, *data, *rest])
    if not use:
        return unknown("verb", verb, verbs)
    if rest and not rest[0].startswith("-"):
        use = re.sub(r"\b(DATA|RUN|NAME)\b", lambda _: shlex.quote(rest[0]), use, count=1)
    return f"unknown verb {verb!r}. Use {use}"
