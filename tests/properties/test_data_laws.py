"""Laws of samples and labels: permutations, samplers of several processes, splits, mixing and random keys."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from normfree.data.sampler import EvalSampler, PoissonSampler, TrainSampler, shuffled
from normfree.data.seeds import key, permutation
from normfree.data.source import ArraySource
from normfree.data.subset import hash_split, spread_indices
from normfree.data.transforms.mixing import FreshPairs, mix, smooth

counts, seeds = st.integers(1, 40), st.integers(0, 2**63 - 1)
parts = st.lists(st.one_of(st.integers(-99, 10**6), st.text(max_size=4)), max_size=4)


@given(st.integers(0, 300), parts)
def test_a_permutation_has_every_item_once_and_is_the_same_again(n, purpose):
    order = permutation(n, *purpose)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, permutation(n, *purpose))


@given(parts, parts)
@example(["ab", "c"], ["a", "bc"])
@example([1], ["1"])
@example([], [""])
@example(["a", 1], ["a", "1"])
def test_keys_of_different_parts_differ(one, other):
    assume(one != other)
    assert key(*one) != key(*other)
    assert 0 <= key(*one) < 2**63


samplings = st.fixed_dictionaries(
    {"n": counts, "batch_size": st.integers(1, 12), "repeats": st.integers(1, 3), "seed": seeds}
)


def entries(how, steps, *, rank=0, world_size=1, pairs=None):
    order = shuffled(how["n"], how["seed"])
    return list(TrainSampler(how["n"], batch_size=how["batch_size"], steps=steps, order=order, rank=rank,
                             world_size=world_size, pairs=pairs, repeats=how["repeats"]))  # fmt: skip


pairings = st.sampled_from(
    [None, FreshPairs(mixup=0.2), FreshPairs(cutmix=1.0), FreshPairs(mixup=0.2, cutmix=1.0)]
)


@given(samplings, st.integers(0, 20), st.integers(0, 8), pairings)
def test_a_run_that_continues_at_a_step_sees_the_samples_of_one_that_did_not_stop(how, stop, more, pairs):
    whole = entries(how, range(stop + more), pairs=pairs)
    assert whole == entries(how, range(stop), pairs=pairs) + entries(
        how, range(stop, stop + more), pairs=pairs
    )


@given(samplings, st.integers(1, 5), st.integers(0, 8), pairings)
def test_the_processes_of_a_run_share_the_samples_of_one_process(how, world_size, steps, pairs):
    alone = entries(how, range(steps), pairs=pairs)
    ranks = [
        entries(how, range(steps), rank=r, world_size=world_size, pairs=pairs) for r in range(world_size)
    ]
    for step, (number, epoch, samples) in enumerate(alone):
        assert all(rank[step][:2] == (number, epoch) for rank in ranks)
        assert [sample for rank in ranks for sample in rank[step][2]] == samples


@given(samplings, st.integers(1, 3))
def test_every_cycle_has_each_sample_once_for_each_repeat(how, cycles):
    n, repeats = how["n"], how["repeats"]
    steps = -(-cycles * n * repeats // how["batch_size"])
    seen = [sample for _, _, samples in entries(how, range(steps)) for sample in samples]
    for cycle in range(cycles):
        part = seen[cycle * n * repeats : (cycle + 1) * n * repeats]
        assert Counter(index for _, index in part) == Counter({index: repeats for index in range(n)})
    assert len(set(seen)) == len(seen)  # no augmentation twice


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 6))
def test_an_evaluation_scores_every_sample_once_for_any_number_of_processes(n, batch_size, world_size):
    samplers = [EvalSampler(n, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [samples for sampler in samplers for _, _, samples in sampler]
    assert [index for samples in batches for _, index in samples] == list(range(n))
    assert all(1 <= len(samples) <= batch_size for samples in batches)
    assert sum(map(len, samplers)) == len(batches)


@given(counts, st.integers(1, 8), st.integers(0, 5), st.integers(0, 5), seeds)
def test_a_private_run_that_continues_sees_the_same_samples(n, batch_size, stop, more, seed):
    def members(step):
        return np.flatnonzero(np.random.default_rng(key(seed, step)).random(n) < batch_size / n)

    def steps(wanted):
        return list(PoissonSampler(n, batch_size=batch_size, steps=wanted, members=members))

    whole = steps(range(stop + more))
    assert whole == steps(range(stop)) + steps(range(stop, stop + more))
    assert all(len(set(samples)) == len(samples) for _, _, samples in whole)


@given(pairings.filter(bool), st.integers(1, 20))
def test_the_pairs_of_a_batch_use_each_of_its_images_once(pairs, batch_size):
    found = [pairs.positions(output, batch_size) for output in range(batch_size)]
    assert sorted(position for own, other, _ in found for position in (own, other)) == list(
        range(2 * batch_size)
    )


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=60),
    st.floats(0.05, 0.4),
    st.sampled_from([0.0, 0.2]),
    seeds,
)
def test_a_split_takes_from_every_class_and_keeps_the_rest(labels, fraction, test_fraction, seed):
    counted = Counter(labels)
    assume(max(counted.values()) > 1)
    images, names = np.zeros((len(labels), 1, 1, 3), np.uint8), [f"{i}.png" for i in range(len(labels))]
    source = ArraySource(images, labels, classes=tuple("abcd"), names=names)

    def split(**more):
        found = hash_split(source, val_fraction=fraction, seed=seed, **more)
        return [[part.base(i)[1] for i in range(len(part))] for part in found if part is not None]

    train, val, *test = split(test_fraction=test_fraction)
    assert sorted([*train, *val, *(index for part in test for index in part)]) == list(range(len(labels)))
    assert split(test_fraction=test_fraction) == [train, val, *test]
    assert split()[1] == val  # the test takes nothing of it
    trained, held = Counter(labels[i] for i in train), Counter(labels[i] for i in val)
    for label, count in counted.items():
        assert trained[label] >= 1
        assert count == 1 or max(1, round(fraction * count)) >= held[label] >= 1


@given(st.integers(0, 200), st.integers(1, 50))
def test_spread_indices_are_in_order_and_no_more_than_asked_for(length, count):
    found = spread_indices(length, count)
    assert sorted(set(found)) == list(found)
    assert len(found) == min(length, count)
    assert all(0 <= index < length for index in found)


options = st.fixed_dictionaries({"mixup": st.sampled_from([0.0, 0.2, 1.0]), "cutmix": st.sampled_from([0.0, 1.0]),
                                 "label_smoothing": st.sampled_from([0.0, 0.1, 0.9])})  # fmt: skip


@given(st.integers(1, 6), st.integers(1, 5), options, st.integers(0, 999))
def test_mixed_labels_sum_to_one_and_mixed_pixels_stay_in_range(batch, classes, chosen, seed):
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(batch, 3, 4, 5, generator=generator), torch.arange(batch) % classes
    mixed, targets = mix(images, labels, num_classes=classes, generator=generator, **chosen)
    torch.testing.assert_close(targets.sum(1), torch.ones(batch))
    assert (targets >= 0).all()
    assert mixed.shape == images.shape
    assert (mixed >= images.amin(0) - 1e-6).all()
    assert (mixed <= images.amax(0) + 1e-6).all()
    # Images that are all the same stay the same.
    same, _ = mix(images[:1].expand_as(images), labels, num_classes=classes, generator=generator, **chosen)
    torch.testing.assert_close(same, images[:1].expand_as(images))


@given(st.integers(2, 9), st.floats(0, 0.99), st.integers(0, 8))
def test_smoothing_keeps_the_sum_and_the_most_probable_class(classes, share, label):
    target = torch.zeros(1, classes)
    target[0, label % classes] = 1
    smoothed = smooth(target, share)
    assert float(smoothed.sum()) == pytest.approx(1, abs=1e-5)
    assert int(smoothed.argmax()) == label % classes
    assert float(smoothed.min()) == pytest.approx(share / classes, abs=1e-6)
