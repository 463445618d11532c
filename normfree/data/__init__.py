"""The room of data: names and bytes in, batches out.

`sources` finds a data set and splits it: `folders`, `imagenet`, `shards` (with `places` and `tar_index`), `pack`,
`hugging`, `emoji`, `synthetic`, and `parts` for what they share. `images` opens one file, `jpeg` does so faster,
`audit` opens every file before training, `augment` turns a picture into pixels (`crops`) and mixes batches, `loader`
makes the stream of batches, `seeds` makes every random number a function of (seed, purpose, epoch, sample).
"""
