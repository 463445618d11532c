"""Transforms: decoding of images, augmentation for training, crops for evaluation, normalization, and mixing."""
