"""Generated images beside real ones: places, the source of both, and what batches are made of."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import LONG

from jax_trustdiff import parallel
from jax_trustdiff.data import mixing, pipeline
from jax_trustdiff.data.image_store import ImageStore, StorePlan
from jax_trustdiff.data.records import image_source
from jax_trustdiff.types import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def images(count, base, size=4):
  """Images whose every pixel tells which one it is."""
  values = (base + np.arange(count)) % 256
  return np.broadcast_to(values[:, None, None, None], (count, size, size, 3)).astype(np.uint8)


def real_source(count=20, num_classes=3):
  return image_source([images(count, 0)], [np.arange(count) % num_classes], "real", num_classes)


def write_npz(path, count, base, num_classes=3):
  np.savez(path, image=images(count, base), label=np.arange(count)[::-1] % num_classes)


def write_store(path, count, base, num_classes=3, **changes):
  settings = dict(num_images=count, images_per_shard=4, image_shape=(4, 4, 3), num_classes=num_classes)
  store = ImageStore(path, StorePlan(**settings, class_names=(), provenance={}, **changes))
  for shard in range(store.plan.num_shards):
    rows = np.array(store.plan.rows(shard))
    store.write(shard, images(count, base)[rows], rows % num_classes, rows + 1000)
  store.finish()


# ---- places ----


def test_parts_are_listed_or_matched_in_natural_order(tmp_path):
  for part, count, base in ((2, 3, 120), (10, 4, 200), (1, 2, 100)):
    write_npz(tmp_path / f"1m_part{part}.npz", count, base)
  write_store(tmp_path / "store", 6, 50)
  found = mixing.generated_source(f"{tmp_path}/store, {tmp_path}/1m_part*.npz", real_source())
  first = np.concatenate([50 + np.arange(6), 100 + np.arange(2), 120 + np.arange(3), 200 + np.arange(4)])
  np.testing.assert_array_equal(found.images[:][:, 0, 0, 0], first)
  np.testing.assert_array_equal(found.labels, [0, 1, 2, 0, 1, 2, 1, 0, 2, 1, 0, 0, 2, 1, 0])
  np.testing.assert_array_equal(found.ids, np.arange(15))


@pytest.mark.parametrize(
  "path, message",
  [
    ("", "needs a path"),
    ("{tmp}/part*.npz", "no file or folder matches"),
    ("{tmp}/none", "no such file or folder"),
    ("{tmp}/large.npz", r"images of .*large.npz are \[5, 5, 3\] and the real ones \[4, 4, 3\]"),
    ("{tmp}/classes", "num_classes=3; the store has 4 classes"),
    ("{tmp}/ok.npz,{tmp}/large.npz", r"image_shape of .*large.npz is \(5, 5, 3\)"),
    ("{tmp}/label.npz", "label 3 is out of range"),
  ],
)
def test_places_that_do_not_fit_are_refused(tmp_path, path, message):
  np.savez(tmp_path / "large.npz", image=images(2, 0, 5), label=[0, 1])
  np.savez(tmp_path / "label.npz", image=images(2, 0), label=[0, 3])
  np.savez(tmp_path / "ok.npz", image=images(2, 0), label=[0, 1])
  write_store(tmp_path / "classes", 4, 0, num_classes=4)
  with pytest.raises(InputError, match=message):
    mixing.generated_source(path.format(tmp=tmp_path), real_source())


def test_an_unfinished_store_is_refused(tmp_path):
  write_store(tmp_path / "store", 8, 0)
  (tmp_path / "store/manifest.json").unlink()
  with pytest.raises(InputError, match="is not complete"):
    mixing.generated_source(str(tmp_path / "store"), real_source())


def test_no_two_images_of_both_share_an_id(tmp_path):
  write_npz(tmp_path / "a.npz", 5, 100)
  real = real_source()
  both = mixing.together(real, mixing.generated_source(str(tmp_path / "a.npz"), real))
  batch = both.take([0, 19, 20, 24])
  np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [0, 19, 100, 104])
  np.testing.assert_array_equal(batch["id"], [0, 19, -1, -5])
  assert len(set(both.ids.tolist())) == 25 and both.class_names == real.class_names


# ---- batches ----


def sampler(num_real=40, num_generated=1000, batch_size=10, real_fraction=0.3, steps_per_epoch=5, **changes):
  return mixing.MixedSampler(num_real, num_generated, batch_size, real_fraction, steps_per_epoch, **changes)


@pytest.mark.parametrize(
  "batch_size, fraction, num_real_rows",
  [(512, 0.3, 154), (2048, 0.2, 410), (100, 0.9, 90), (10, 0, 0), (10, 1, 10)],
)
def test_a_batch_is_divided_as_the_original_divides_it(batch_size, fraction, num_real_rows):
  """int(batch (1 - fraction)) are generated: 358 and 154 of 512, in the released code of Wang et al. 2023."""
  for walk in mixing.WALKS:
    found = sampler(5000, batch_size=batch_size, real_fraction=fraction, walk=walk)
    assert found.num_real_rows == num_real_rows
    for step in range(3):
      positions = found.indices(step)
      assert positions.shape == (batch_size,) and positions.dtype == np.int64
      assert (positions < 5000).sum() == num_real_rows and positions.max() < 6000


def test_an_epoch_takes_slices_of_a_fresh_permutation():
  """5 batches of 3 real images an epoch: 15 different ones of 40, other ones in the next epoch."""
  found = sampler()
  epochs = [np.concatenate([found.indices(s) for s in range(5 * e, 5 * e + 5)]) for e in range(40)]
  real = [epoch[epoch < 40] for epoch in epochs]
  assert all(len(set(part.tolist())) == 15 for part in real)
  counts = np.bincount(np.concatenate(real), minlength=40)
  assert counts.sum() == 600 and counts.min() >= 5 and counts.max() <= 27  # 15 on average, deviation 3.1
  # across epochs images come again before all have been seen: it is no walk through all of them
  assert len(set(np.concatenate(real[:2]).tolist())) < 30


def test_where_a_permutation_ends_generated_images_fill_its_last_batch():
  """20 real images in slices of 6: 6, 6, 6, 2, and then another permutation, within the epoch."""
  found = sampler(num_real=20, real_fraction=0.6, steps_per_epoch=7)
  batches = [found.indices(step) for step in range(14)]
  assert [(batch < 20).sum() for batch in batches] == 2 * [6, 6, 6, 2, 6, 6, 6]
  assert all(len(batch) == 10 for batch in batches)
  for first in (0, 7):
    whole = np.concatenate(batches[first : first + 4])
    assert sorted(whole[whole < 20]) == list(range(20))
  orders = [[i for i in np.concatenate(batches[s : s + 3]) if i < 20] for s in (0, 4, 7, 11)]
  assert len({tuple(order) for order in orders}) == 4


def test_generated_images_are_drawn_with_replacement():
  """As the birthday problem has it: 10,000 draws of 1000 leave about 1000 exp(-10) of them out, and repeat within epochs."""
  found = sampler(real_fraction=0.0, batch_size=100, steps_per_epoch=10)
  drawn = np.concatenate([found.indices(step) for step in range(100)]) - 40
  counts = np.bincount(drawn, minlength=1000)
  chi2 = ((counts - 10) ** 2 / 10).sum()  # 999 degrees of freedom, deviation 44.7
  assert 800 < chi2 < 1200
  first = drawn[:100]
  assert len(set(first.tolist())) < 100


def test_a_batch_is_in_a_drawn_order():
  found = sampler(batch_size=100, num_real=5000, real_fraction=0.5)
  places = np.mean([np.flatnonzero(found.indices(step) < 5000).mean() for step in range(200)])
  assert abs(places - 49.5) < 1  # of rows 0 to 99; real images first would give 24.5
  orders = {tuple(found.indices(step) < 5000) for step in range(20)}
  assert len(orders) == 20


@pytest.mark.parametrize("num_generated", [70, 73])
def test_the_permutation_walk_sees_all_before_any_comes_again(num_generated):
  found = sampler(num_generated=num_generated, walk="permutation")
  drawn = np.concatenate([found.indices(step) for step in range(60)])
  real, generated = drawn[drawn < 40], drawn[drawn >= 40] - 40
  assert len(real) == 180 and len(generated) == 420
  for part, size in ((real, 40), (generated, num_generated)):
    counts = np.bincount(part, minlength=size)
    assert counts.max() - counts.min() == 1 or len(part) % size == 0 and counts.max() == counts.min()
  # batches are slices of the walk, whatever their order: the first 40 real images of 14 batches are all of them
  batches = [found.indices(step) for step in range(13)]
  seen = np.concatenate([batch[batch < 40] for batch in batches])
  assert len(set(seen.tolist())) == 39


@pytest.mark.parametrize("walk", mixing.WALKS)
def test_a_batch_is_a_function_of_seed_and_step(walk):
  one, same, other = (sampler(walk=walk, seed=seed) for seed in (3, 3, 4))
  later = [one.indices(step) for step in (17, 3, 2)]  # not in order
  np.testing.assert_array_equal(later[0], same.indices(17))
  assert not np.array_equal(np.sort(later[0]), np.sort(other.indices(17)))
  assert not np.array_equal(np.sort(later[1]), np.sort(later[2]))


def test_wrong_settings_are_refused():
  with pytest.raises(InputError, match="unknown walk 'random'"):
    sampler(walk="random")
  with pytest.raises(InputError, match=r"\[0, 1\], found 1.5"):
    sampler(real_fraction=1.5)
  with pytest.raises(InputError, match="0 generated images"):
    sampler(num_generated=0)


@pytest.mark.parametrize("feed_class", [pipeline.ResidentFeed, pipeline.StreamingFeed])
def test_feeds_give_mixed_batches_and_go_on_from_a_step(tmp_path, feed_class):
  write_npz(tmp_path / "a.npz", 30, 100)
  real = real_source()
  both = mixing.together(real, mixing.generated_source(str(tmp_path / "a.npz"), real))
  mixed = mixing.MixedSampler(20, 30, 8, 0.5, 3, "permutation")
  mesh = parallel.make_mesh()
  feed = feed_class(both, mixed, mesh)
  feed.start(5)
  payload = feed.next(1)
  batch = feed.take(
    feed.arrays, {k: v[0] for k, v in payload.items()} if isinstance(payload, dict) else payload[0]
  )
  feed.close()
  rows = both.take(mixed.indices(5))
  for name in ("image", "label", "id"):
    np.testing.assert_array_equal(batch[name], rows[name])
  assert (np.asarray(batch["id"]) < 0).sum() == 4


STREAM = """
import sys
import jax, numpy as np
from jax_trustdiff import parallel
from jax_trustdiff.data import mixing, pipeline
from jax_trustdiff.data.records import image_source

def anonymous():
  lines = open("/proc/self/status").read().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

real = image_source([np.zeros((2000, 32, 32, 3), np.uint8)], [np.arange(2000) % 10], "real", 10)
mesh = parallel.make_mesh()
base = anonymous()
both = mixing.together(real, mixing.generated_source(sys.argv[1], real))
sampler = mixing.MixedSampler(2000, len(both) - 2000, 512, 0.3, 4, sys.argv[2])
feed = pipeline.make_feed(both, sampler, mesh)
feed.start(0)
seen, sizes = 0, []
for step in range(600):
  batch = feed.take(feed.arrays, jax.tree.map(lambda x: x[0], feed.next(1)))
  seen += int((np.asarray(batch["id"]) < 0).sum())
  sizes.append(anonymous())
feed.close()
print(type(feed).__name__, both.nbytes, seen, sizes[99] - base, max(sizes) - sizes[99])
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("walk", ["permutation", pytest.param("with_replacement", marks=LONG)])
def test_memory_stays_flat_beside_150_gigabytes_of_generated_images(tmp_path, walk):
  """50 million images in files with holes: labels, ids and an order are kept, 16 bytes and more an image, and no pixels."""
  per_shard, shards = 1_000_000, 50
  files = {}
  for shard in range(shards):
    for kind, dtype, shape in (("images", "u1", (32, 32, 3)), ("labels", "<i4", ()), ("ids", "<i8", ())):
      name = f"{kind}-{shard:05d}-of-{shards:05d}.npy"
      header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (per_shard, *shape)}
      with open(tmp_path / name, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + per_shard * int(np.prod(shape)) * np.dtype(dtype).itemsize)
      files[name] = {"bytes": (tmp_path / name).stat().st_size, "sha256": ""}
  manifest = dict(format=2, num_images=shards * per_shard, num_shards=shards, num_classes=10, class_names=[])
  (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", STREAM, str(tmp_path), walk]
  out = subprocess.run(command, capture_output=True, text=True, env=env)
  assert out.returncode == 0, out.stderr
  kind, *numbers = out.stdout.split()
  size, seen, kept, grown = map(int, numbers)
  assert kind == "StreamingFeed" and size > 150e9 and seen == 600 * 358
  assert kept < 3e9 and grown < 3e8, f"kept {kept / 1e6:.0f} MB, grown by {grown / 1e6:.0f} MB"
  print(f"{walk}: {kept / 1e6:.0f} MB are kept, and memory grew by {grown / 1e6:.0f} MB in 500 batches")
