"""The config: all errors at once with their exact text, the same rules for files and flags, a pinned list of keys."""

import re
import subprocess
import sys

import pytest
import torch

from normfree.training.choices import CLIPS, parse_choice
from normfree.training.config import Config, ConfigError, steps_of
from normfree.training.config_io import keys, load_config, to_toml, with_overrides
from normfree.training.memory import require_images_fit
from normfree.training.recipes import RECIPES
from normfree.training.resolve import resolve
from normfree.training.synonyms import _NAMES

KEYS = [
    *(
        "data",
        "model",
        "weights",
        "objective",
        "length",
        "patience",
        "on_divergence",
        "seed",
        "device",
        "precision",
        "parallel",
        "compile",
    ),
    *("net.activation", "net.drop_rate", "net.stochdepth_rate", "net.skip_gain", "net.alpha"),
    *("input.image_size", "input.eval_size", "input.eval_crop", "input.batch_size", "input.micro_batch"),
    *("input.workers", "input.val_fraction", "input.test_fraction", "input.bad_images"),
    *(
        "augment.crop_min",
        "augment.repeats",
        "augment.flip",
        "augment.orientation",
        "augment.randaugment",
        "augment.mixup",
        "augment.cutmix",
    ),
    "augment.mix_with",
    *(
        "augment.label_smoothing",
        "optim.optimizer",
        "optim.lr",
        "optim.weight_decay",
        "optim.body",
        "optim.clip",
    ),
    *("optim.clipping", "optim.class_balance", "optim.warmup", "optim.schedule", "optim.sam_rho"),
    *("optim.ema_decay", "log.every", "log.evaluate_every", "log.checkpoint_every", "log.to"),
]

SIZES = "1 pixel or more, 128x313 (height x width), 1x128x313 (with 1 or 3 channels), or 'auto'."


def test_the_keys_are_pinned_and_at_most_50():
    assert keys() == KEYS
    assert len(KEYS) <= 50


def test_all_errors_are_reported_at_once_with_the_allowed_values():
    flags = (
        "--lr 0.1 --optim.lrr 3 --optim.lr -1 --net.drop_rate x --compile maybe --length 90 --log.every 0 stray "
        "--input.batch_size 1.5 --optim.clip agcc --input.image_size big --zzzz 1 --model"
    )
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), flags.split())
    assert error.value.problems == (
        "unknown key 'lr'. Did you mean 'optim.lr'?",
        "unknown key 'optim.lrr'. Did you mean 'optim.lr'?",
        "unexpected argument 'stray'. Allowed: --key value, for example --optim.lr 0.05.",
        "unknown key 'zzzz'. All keys: normfree train --help",
        "--model has no value. Name of a variant, see `normfree list`.",
        "length='90'. Allowed: a number of epochs or steps, for example '90ep' or '5000st'.",
        "compile='maybe'. Allowed: true or false.",
        "net.drop_rate='x'. Allowed: a number or 'auto'.",
        f"input.image_size='big'. Allowed: {SIZES}",
        "input.batch_size='1.5'. Allowed: a whole number.",
        "optim.lr='-1'. Allowed: a number above 0, or 'auto'.",
        "optim.clip='agcc'. Allowed: agc:eps=0.001,unclipped=head.weight; norm; value; off; "
        "private:epsilon=8,delta=1e-05,accountant=rdp. Did you mean 'agc'?",
        "log.every='0'. Allowed: greater than or equal to 1.",
    )


@pytest.mark.parametrize("key", KEYS)
def test_a_key_without_its_value_names_the_value(key):
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), [f"--{key}", "--seed", "1"] if key != "seed" else ["--seed"])
    (message,) = error.value.problems
    assert re.fullmatch(rf"--{re.escape(key)} has no value\. \S.{{4,}}\.", message), message


def test_files_follow_the_same_rules(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('seed = "1"\n[optim]\nlrr = 0.1\nclipping = 0\n[nett]\nalpha = 1.0\n')
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert set(error.value.problems) == {
        f"{path}: seed='1'. Allowed: a whole number.",
        f"{path}: unknown key 'optim.lrr'. Did you mean 'optim.lr'?",
        f"{path}: optim.clipping=0. Allowed: greater than 0.",
        f"{path}: unknown key 'nett'. Did you mean 'net'?",
    }
    path.write_text("seed = ")
    with pytest.raises(ConfigError, match=r"c\.toml cannot be read as TOML: "):
        load_config(path)


@pytest.mark.parametrize("name", RECIPES)
def test_toml_round_trip(name, tmp_path):
    config = RECIPES[name]()
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "c.toml") == config


def test_flags_apply_from_left_to_right_and_keep_other_values():
    base = RECIPES["demo"]()
    flags = ["--optim.lr", "1", "--optim.lr=0.05", "--compile", "true", "--net.drop-rate", "0.3",
             "--input.image_size=auto"]  # fmt: skip
    config = with_overrides(base, flags)
    assert (config.optim.lr, config.compile, config.net.drop_rate) == (0.05, True, 0.3)
    assert config.input.image_size == "auto"
    assert config.augment == base.augment
    assert config.optim.weight_decay == base.optim.weight_decay


@pytest.mark.parametrize(("length", "steps"), [("10ep", 16), ("1.5ep", 2), ("7st", 7), ("0ep", 0)])
def test_lengths(length, steps):
    assert steps_of(length, samples=50, batch_size=32) == steps


ARGUMENTS = [["--help"], ["train", "--help"], ["list", "--help"], ["--version"], ["train", "--x", "1"]]


@pytest.mark.parametrize("args", ARGUMENTS)
def test_help_and_usage_errors_do_not_import_torch(args):
    code = (
        f"import sys; from normfree.cli import main\ntry: main({args!r})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--optim.lr inf", "optim.lr='inf'. Allowed: a number or 'auto'."),
        ("--augment.mixup nan", "augment.mixup='nan'. Allowed: a finite number."),
        ("--net.drop_rate 1", "net.drop_rate='1'. Allowed: a number from 0 to below 1, or 'auto'."),
        ("--net.stochdepth_rate -0.1", "net.stochdepth_rate='-0.1'. Allowed: a number from 0 to below 1, or 'auto'."),
        ("--input.eval_size 0", f"input.eval_size='0'. Allowed: {SIZES}"),
        ("--input.image_size=-4", f"input.image_size='-4'. Allowed: {SIZES}"),
        ("--input.image_size 2x8x8", f"input.image_size='2x8x8'. Allowed: {SIZES}"),
        ("--input.eval_size 1x8x8", "input.eval_size='1x8x8'. Allowed: a size without channels, which input.image_size "
                                    "has: 224, 128x313, or 'auto'."),
        ("--net.alpha x", "net.alpha='x'. Allowed: a number or 'auto'."),
        ("--nett.alpha 1", "unknown key 'nett.alpha'. Did you mean 'net.alpha'?"),
        ("--optm 1", "unknown key 'optm'. Did you mean 'optim.lr'?"),
        ("-x", "unexpected argument '-x'. Allowed: --key value, for example --optim.lr 0.05."),
    ],
)  # fmt: skip
def test_the_text_of_one_error(flag, problem):
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), flag.split())
    assert error.value.problems == (problem,)


def test_a_rate_in_a_file_is_checked_like_a_flag(tmp_path):
    (tmp_path / "c.toml").write_text("[net]\ndrop_rate = 1.5\n[optim]\nlr = inf\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.toml")
    assert error.value.problems == (
        f"{tmp_path}/c.toml: net.drop_rate=1.5. Allowed: a number from 0 to below 1, or 'auto'.",
        f"{tmp_path}/c.toml: optim.lr=inf. Allowed: a number or 'auto'.",
    )


@pytest.mark.parametrize(
    ("flag", "use"),
    [
        ("--epochs", "--length 1ep"), ("--batch", "--input.batch_size 1"), ("--imgsz", "--input.image_size 1"),
        ("--lr0", "--optim.lr 1"), ("--drop-path", "--net.stochdepth_rate 1"),
        ("--amp", "--precision auto (bfloat16 where this device computes faster in it)"),
        ("--bf16", "--precision bfloat16"), ("--val-split", "--input.val_fraction 1"), ("--kfold", "--folds 1"),
        ("--opt", "--optim.optimizer adamw"),
        ("--freeze", "--optim.body freeze"), ("--optim.momentum", "--optim.optimizer sgd:momentum=0.9"),
    ],
)  # fmt: skip
def test_names_of_other_programs_lead_to_the_key(flag, use):
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), [flag, "1"])
    assert error.value.problems == (f"unknown key {flag.removeprefix('--').replace('-', '_')!r}. Use {use}",)


def test_what_is_offered_for_names_of_other_programs_is_valid():
    for use, names in _NAMES.items():
        parts = use.partition(" (")[0].split()
        if (
            parts[0].startswith("--")
            and parts[-1].upper() != parts[-1]
            and "out" not in parts[0]
            and parts[0] != "--folds"
        ):
            with_overrides(Config(), parts)
        assert not set(names.split()) & {key.rpartition(".")[2] for key in KEYS}, use


def test_another_optimizer_has_its_own_learning_rate_unless_one_is_given():
    base = RECIPES["demo"]()
    optim = with_overrides(base, ["--optim.optimizer", "adamw:eps=1e-6"]).optim
    assert (optim.lr, optim.weight_decay) == ("auto", "auto")
    optim = with_overrides(base, ["--optim.optimizer", "adamw", "--optim.lr", "0.002"]).optim
    assert (optim.lr, optim.weight_decay) == (0.002, "auto")
    optim = with_overrides(base, ["--optim.optimizer", "sgd:momentum=0.8"]).optim
    assert (optim.lr, optim.weight_decay) == (base.optim.lr, base.optim.weight_decay)


def test_files_of_earlier_versions_can_be_read(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        '[optim]\nmomentum = 0.8\nclipping_eps = 0.01\nunclipped = "stem.*,head.weight"\nfinal_lr = 0.5\nlr = 0.3\n'
        '[log]\nkeep = 3\nto = "wandb"\nprofile = 4\n'
    )
    assert load_config(path).log.to == "wandb,profile=4"
    optim = load_config(path).optim
    assert optim.optimizer == "sgd:momentum=0.8"
    assert optim.clip == "agc:eps=0.01,unclipped=stem.*,head.weight"
    assert parse_choice(optim.clip, CLIPS).options == {"eps": 0.01, "unclipped": "stem.*,head.weight"}
    assert (optim.schedule, optim.lr) == ("warmup_cosine:final=0.5", 0.3)
    path.write_text(
        '[optim]\nmomentum = 0.9\nclipping_eps = 0.001\nunclipped = "head.weight"\nfinal_lr = 0.0\n[log]\nprofile = 0\n'
    )
    assert load_config(path) == Config()


@pytest.mark.parametrize("value", ["rollback:lr=1.0", "rollback:lr=0", "rollback:times=0"])
def test_a_return_to_the_last_checkpoint_lowers_the_rate(value):
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), ["--on-divergence", value])
    allowed = "lr above 0 and below 1, and times of 1 or more."
    assert error.value.problems == (f"on_divergence={value!r}. Allowed: {allowed}",)


def test_a_config_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--input.workers 100000", "input.workers='100000'. Allowed: 0 to 256 processes, or 'auto', and after "
         "them :deadline=SECONDS above 0, for example 4:deadline=600."),
        ("--input.batch_size 2000000", "input.batch_size='2000000'. Allowed: less than or equal to 1000000."),
        ("--input.image_size 9999999x9999999", f"input.image_size='9999999x9999999'. Allowed: {SIZES}"),
        ("--log.every 1000000000000", "log.every='1000000000000'. Allowed: less than or equal to 1000000000."),
        (f"--seed {2**63}", f"seed='{2**63}'. Allowed: less than {2**63}."),
        (f"--length {'9' * 400}ep", f"length='{'9' * 400}ep'. Allowed: a number of epochs or steps, for example '90ep' "
         "or '5000st'."),
    ],
)  # fmt: skip
def test_numbers_that_would_stop_the_machine_are_refused(flag, problem):
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), flag.split())
    assert error.value.problems == (problem,)


def test_a_batch_that_does_not_hold_all_copies_is_refused():
    config = with_overrides(Config(), ["--augment.repeats", "2", "--input.batch_size", "33"])
    with pytest.raises(ValueError, match=r"a divisor of the batch size\. Fix: --input\.batch_size 32\.$"):
        resolve(config)


def test_a_huge_number_of_repeats_is_refused_at_once():
    config = with_overrides(Config(), ["--augment.repeats", str(10**18)])
    with pytest.raises(ValueError, match=r"Fix: --augment\.repeats 64\.$"):
        resolve(config)


def test_images_of_one_step_that_exceed_the_memory_are_refused():
    cpu = torch.device("cpu")
    require_images_fit(64, (3, 224, 224), cpu)
    with pytest.raises(
        ValueError, match=r"^1,000,000 images of 3 x 30000 x 30000 in each step need 13,500,000\.0 GB\."
    ):
        require_images_fit(10**6, (3, 30_000, 30_000), cpu)
