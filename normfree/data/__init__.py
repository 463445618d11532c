"""Data: from files and data set names to batches of images.

`sources` opens data sets and splits them into training and validation, `transforms` decodes images and turns them into
tensors, `loader` makes the stream of batches, `sampler` chooses the samples of each step, and `seeds` makes every
random number a function of (seed, purpose, epoch, sample).
"""
