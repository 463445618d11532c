"""The room of data: names and bytes in, batches out.

`sources` finds a data set and splits it, `images` opens one file, `audit` opens every file before training,
`augment` turns a picture into pixels and mixes batches, `loader` makes the stream of batches, `seeds` makes
every random number a function of (seed, purpose, epoch, sample).
"""
