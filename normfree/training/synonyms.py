"""What other programs call the keys of a config, so that an unknown key leads to the right one.

The names are options of timm's train.py, ultralytics, Keras, fastai, torchvision's references and Lightning.
"""

from __future__ import annotations

import re

# What to use -> names, in lower case, with underscores. RUN stands for the value. A note may follow in parentheses.
_NAMES = {
    "--length 90ep": "epochs epoch num_epochs n_epochs max_epochs",
    "--length 5000st": "steps max_steps num_steps iterations iters max_iters",
    "--input.batch_size 64": "batch bs batchsize train_batch_size per_device_train_batch_size",
    "--input.micro_batch 16": "grad_accum grad_accum_steps gradient_accumulation_steps accumulate_grad_batches nbs",
    "--input.image_size 224": "imgsz img_size img size input_size resolution crop_size train_crop_size",
    "--input.eval_size 224": "val_resize_size val_crop_size test_size",
    "--input.val_fraction 0.1": "val_split validation_split val_pct valid_pct split",
    "--input.workers 4": "num_workers j dataloader_num_workers nw",
    "--input.eval_crop letterbox": "rect letterbox crop_mode",
    "--log.to profile=20": "profile profiler",
    "--optim.lr 0.05": "lr0 learning_rate base_lr max_lr blr lr_base",
    "--optim.schedule warmup_cosine:final=0.01": "lrf min_lr final_lr eta_min cos_lr sched lr_scheduler",
    "--optim.warmup 5ep": "warmup_epochs warmup_steps warmup_ratio",
    "--optim.optimizer adamw": "opt optim optimizers",
    "--optim.optimizer adamw:betas=0.9/0.999": "beta1 beta2 betas adam_beta1 opt_betas opt_eps",
    "--optim.optimizer sgd:momentum=0.9": "momentum",
    "--optim.weight_decay 0.0001": "wd decay l2",
    "--optim.body freeze": "freeze freeze_backbone freeze_layers",
    "--optim.body train:lr=0.1": "backbone_lr lr_mult body_lr discriminative_lr",
    "--optim.body train:layer_decay=0.75": "layer_decay layerwise_decay",
    "--optim.clip norm --optim.clipping 1.0": "clip_grad clip_grad_norm max_grad_norm gradient_clip_val clip_mode",
    "--optim.clip private:epsilon=8 --optim.clipping 1.0": "privacy dp differential_privacy target_epsilon",
    "--optim.clip agc:eps=0.001": "clipping_eps",
    "--optim.clip agc:unclipped=head.weight": "unclipped",
    "--optim.ema_decay 0.9999": "ema model_ema model_ema_decay",
    "--optim.class_balance 1": "class_weights class_weight cls_pw",
    "--objective bce": "loss criterion bce_loss multi_label multilabel",
    "--net.stochdepth_rate 0.1": "drop_path drop_path_rate stochastic_depth stochastic_depth_prob",
    "--net.drop_rate 0.2": "drop dropout",
    "--precision auto (bfloat16 where this device computes faster in it)": "amp half fp16 mixed_precision amp_dtype",
    "--precision bfloat16": "bf16",
    "--precision float32": "fp32",
    "--augment.flip 0.5": "fliplr hflip horizontal_flip random_flip",
    "--augment.orientation vertical_flip": "flipud vflip vertical_flip",
    "--augment.orientation quarter_turns": "degrees rotate rotation rot90",
    "--augment.randaugment 4x5": "aa auto_augment autoaugment ra_magnitude",
    "--augment.crop_min 0.08": "scale random_resized_crop",
    "--augment.label_smoothing 0.1": "smoothing label_smooth",
    "--augment.mixup 0.2": "mixup_alpha",
    "--augment.cutmix 1.0": "cutmix_alpha",
    "--data FOLDER": "dataset data_dir data_path train_dir datadir root path",
    "--model NAME": "arch m network backbone architecture",
    "--weights FOLDER": "pretrained initial_checkpoint init checkpoint finetune_from",
    "--device cuda": "gpu gpus devices cuda",
    "--compile true": "torchcompile torch_compile",
    "--log.to tensorboard": "log_wandb wandb tensorboard logger report_to",
    "--log.checkpoint_every 5ep": "save_period save_every save_steps checkpoint_freq",
    "--log.evaluate_every 1ep": "eval_every val_interval eval_steps check_val_every_n_epoch",
    "--patience 10": "early_stopping early_stop",
    "--out FOLDER": "project name output output_dir save_dir exp experiment",
    "normfree train RUN": "resume",
    "--folds 5": "kfold k_fold kfolds k_folds n_folds num_folds cv cross_validation n_splits",
}
# A value that is a number, possibly with the unit of a length.
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+|\d+(\.\d+)?e-?\d+")
_NUMBER_LAST = re.compile(r" [\d.]+(ep|st|)$")
_SWITCH = re.compile(r"|true|yes|1|auto|must|allow", re.IGNORECASE)  # a value of `resume` that names no run
_USES = {name: use for use, names in _NAMES.items() for name in names.split()}


def what_to_use(key: str, value: str = "") -> str:
    """Return what to write for a key of another program, or "" if it is none.

    Args:
        key: the key.
        value: the value that was given; a number replaces that of the example, and a folder stands for RUN.

    >>> what_to_use("drop-path"), what_to_use("epochs", "3")
    ('--net.stochdepth_rate 0.1', '--length 3ep')
    >>> what_to_use("resume", "runs/demo-1/checkpoints/last")
    'normfree train runs/demo-1'
    """
    use = _USES.get(key.rpartition(".")[2].lower().replace("-", "_"), "")
    if use.endswith(" RUN") and not _SWITCH.fullmatch(value):
        return use.replace("RUN", value.partition("/checkpoints")[0])
    example = _NUMBER_LAST.search(use)
    return f"{use[: example.start()]} {value}{example[1]}" if example and _NUMBER.fullmatch(value) else use
