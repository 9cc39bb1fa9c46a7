"""The order of examples, both feeds, evaluation batches, and memory that stays flat."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, sources
from jax_trustdiff.data.pipeline import EpochSampler, ResidentFeed, StreamingFeed, eval_batches, make_feed
from jax_trustdiff.types import InputError, RunError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def tiny_source(n: int = 23, parts: int = 1, seed: int = 0) -> sources.ImageSource:
  rng = np.random.default_rng(seed)
  images, labels = rng.integers(0, 256, (n, 4, 6, 3)).astype(np.uint8), rng.integers(0, 5, n)
  return sources.image_source(np.array_split(images, parts), np.array_split(labels, parts), "tiny", 5)


def steps_of(feed, payload) -> list[dict]:
  """The batches that the compiled step would see."""
  take = jax.jit(feed.take)
  count = jax.tree.leaves(payload)[0].shape[0]
  rows = [jax.tree.map(lambda x, i=i: x[i], payload) for i in range(count)]
  return [jax.tree.map(np.asarray, take(feed.arrays, row)) for row in rows]


def assert_batch(batch, records):
  assert batch["image"].dtype == np.uint8 and batch["label"].dtype == batch["id"].dtype == np.int32
  for name in ("image", "label", "id"):
    np.testing.assert_array_equal(batch[name], records[name])


# ---- order ----


@pytest.mark.floor
@pytest.mark.parametrize("num, batch", [(10, 4), (12, 4), (9, 22), (9, 1)])
def test_sampler_walks_one_permutation_after_another(num, batch):
  sampler = EpochSampler(num, batch, seed=3)
  assert sampler.steps_per_epoch == -(-num // batch)
  steps = 6 * sampler.steps_per_epoch
  stream = np.concatenate([sampler.indices(step) for step in range(steps)])
  assert stream.dtype == np.int64 and stream.shape == (steps * batch,)
  epochs = stream[: len(stream) // num * num].reshape(-1, num)
  assert (np.sort(epochs, axis=1) == np.arange(num)).all()  # each epoch is a permutation
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # and a fresh one


def test_sampler_depends_on_seed_and_step_alone():
  forward = [EpochSampler(50, 8, seed=1).indices(step) for step in range(40)]
  sampler = EpochSampler(50, 8, seed=1)
  for step in np.random.default_rng(0).permutation(40):
    np.testing.assert_array_equal(sampler.indices(int(step)), forward[step])
  assert not np.array_equal(EpochSampler(50, 8, seed=2).indices(0), forward[0])
  with pytest.raises(InputError, match="needs examples and a batch size; found 0 and 8"):
    EpochSampler(0, 8)
  for seed in (-1, 2**32):
    with pytest.raises(InputError, match=rf"seed must be at least 0 and below 2\*\*32; found {seed}"):
      EpochSampler(50, 8, seed=seed)


@pytest.mark.floor
def test_the_order_never_changes():
  first_two = [9, 1, 0, 8, 2, 4, 3, 5, 7, 6, 5, 1, 3, 0, 6, 9, 8, 7, 2, 4]
  assert list(EpochSampler(10, 20, seed=3).indices(0)) == first_two


def test_sampler_from_many_threads():
  expected = [EpochSampler(1000, 64, seed=1).indices(step) for step in range(100)]
  sampler, wrong = EpochSampler(1000, 64, seed=1), []

  def read(offset):
    for step in range(100):
      step = (step * 7 + offset) % 100
      if not np.array_equal(sampler.indices(step), expected[step]):
        wrong.append(step)

  threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


# ---- feeds ----


@pytest.mark.floor
@pytest.mark.parametrize("kind", [ResidentFeed, StreamingFeed])
@pytest.mark.parametrize("parts", [1, 3])
def test_feeds_give_the_sampler_s_batches(kind, parts):
  source, mesh = tiny_source(parts=parts), parallel.make_mesh()
  sampler = EpochSampler(len(source), 8, seed=5)
  feed = kind(source, sampler, mesh)
  try:
    for first, count in ((0, 2), (2, 5), (7, 1)):  # in a row
      batches = steps_of(feed, feed.next(count))
      assert len(batches) == count
      for step, batch in enumerate(batches, first):
        assert_batch(batch, source.take(sampler.indices(step)))
    feed.start(3)
    assert_batch(steps_of(feed, feed.next(1))[0], source.take(sampler.indices(3)))
  finally:
    feed.close()


@pytest.mark.parametrize("kind", [ResidentFeed, StreamingFeed])
def test_a_feed_resumes_from_its_step_alone(kind):
  source, mesh = tiny_source(), parallel.make_mesh()
  feed = kind(source, EpochSampler(len(source), 8, seed=5), mesh)
  feed.start(6)
  feed.next(3)
  following = steps_of(feed, feed.next(4))
  feed.close()
  again = kind(source, EpochSampler(len(source), 8, seed=5), mesh)
  again.start(9)
  for one, two in zip(steps_of(again, again.next(4)), following, strict=True):
    assert_batch(one, two)
  again.close()


def test_a_file_that_shrinks_stops_a_streaming_run(tmp_path):
  np.save(tmp_path / "images.npy", np.zeros((40, 8, 8, 3), np.uint8))
  np.save(tmp_path / "labels.npy", np.arange(40) % 5)
  source = sources.npy(str(tmp_path))
  feed = StreamingFeed(source, EpochSampler(40, 8), parallel.make_mesh())
  os.truncate(tmp_path / "images.npy", 300)
  with pytest.raises(RunError, match="images.npy has changed since it was opened"):
    feed.next(40)
  feed.close()


def test_payload_of_the_resident_feed_is_sharded_indices():
  source, mesh = tiny_source(), parallel.make_mesh()
  feed = ResidentFeed(source, EpochSampler(len(source), 8), mesh)
  payload = feed.next(3)
  assert payload.shape == (3, 8) and payload.dtype == np.int32
  assert payload.sharding.spec == jax.sharding.PartitionSpec(None, "data")
  assert feed.arrays["image"].dtype == np.uint8 and feed.arrays["image"].sharding.is_fully_replicated


def test_make_feed_chooses_by_size(monkeypatch):
  source, mesh = tiny_source(), parallel.make_mesh()
  sampler = EpochSampler(len(source), 8)

  def kind(**options):
    feed = make_feed(source, sampler, mesh, **options)
    feed.close()
    return type(feed)

  assert kind() is ResidentFeed
  assert kind(budget_bytes=source.nbytes) is ResidentFeed
  assert kind(budget_bytes=source.nbytes - 1) is StreamingFeed
  assert kind(resident="yes", budget_bytes=0) is ResidentFeed
  assert kind(resident="no") is StreamingFeed
  monkeypatch.setattr(pipeline, "CPU_BUDGET", 100)
  assert kind() is StreamingFeed
  with pytest.raises(InputError, match="resident='never'; expected 'auto', 'yes' or 'no'"):
    kind(resident="never")


BUDGETS = """
import sys
import numpy as np
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, sources
process = int(sys.argv[1])
parallel.start_distributed(sys.argv[2], 2, process)
source = sources.image_source([np.zeros((20, 4, 4, 3), np.uint8)], [np.arange(20) % 5], "tiny")
sampler, mesh = pipeline.EpochSampler(20, 4), parallel.make_mesh()
for budgets in ((10**6, 0), (10**6, 10**6)):
  feed = pipeline.make_feed(source, sampler, mesh, budget_bytes=budgets[process])
  print(type(feed).__name__)
  feed.close()
parallel.barrier("end")
"""


def test_processes_agree_on_the_feed():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  commands = [[sys.executable, "-c", BUDGETS, str(i), address] for i in range(2)]
  processes = [subprocess.Popen(command, env=env, **pipes) for command in commands]
  for process in processes:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    kinds = [line for line in out.splitlines() if line.endswith("Feed")]  # Gloo prints there too
    assert kinds == ["StreamingFeed", "ResidentFeed"]


def test_feeds_refuse_what_does_not_fit():
  source, mesh = tiny_source(), parallel.make_mesh()
  with pytest.raises(InputError, match="the sampler counts 22 examples and the source 23"):
    make_feed(source, EpochSampler(22, 8), mesh)
  far = dataclasses.replace(source, ids=source.ids + 2**31)
  with pytest.raises(InputError, match="does not fit the 32 bits"):
    make_feed(far, EpochSampler(23, 8), mesh)


# ---- evaluation ----


@pytest.mark.parametrize("batch_size", [8, 40, 360])
def test_map_images_finds_something_of_every_image_in_order(batch_size):
  source, seen = sources.SOURCES["digits"](split="test"), []
  found = pipeline.map_images(
    lambda batch: {"id": batch["id"], "mean": batch["image"].mean((1, 2, 3))},
    source,
    batch_size,
    parallel.make_mesh(),
    seen.append,
  )
  np.testing.assert_array_equal(found["id"], source.ids)
  np.testing.assert_allclose(found["mean"], source.images.mean((1, 2, 3)), rtol=1e-5)
  assert seen == [min(done, 360) for done in range(batch_size, 360 + batch_size, batch_size)]


@pytest.mark.floor
@pytest.mark.parametrize("batch_size", [5, 23, 40])
def test_eval_batches_cover_the_source_once(batch_size):
  source, mesh = tiny_source(), parallel.make_mesh(data=1, model=-1)
  batches = [jax.tree.map(np.asarray, batch) for batch in eval_batches(source, batch_size, mesh)]
  assert len(batches) == -(-23 // batch_size)
  assert {batch["image"].shape for batch in batches} == {(batch_size, 4, 6, 3)}
  mask = np.concatenate([batch["mask"] for batch in batches])
  assert mask.dtype == bool and mask.sum() == 23 and mask[:23].all()
  joined = {k: np.concatenate([batch[k] for batch in batches]) for k in ("image", "label", "id")}
  assert_batch({k: v[mask] for k, v in joined.items()}, source.take(range(23)))
  assert (joined["id"][~mask] == 22).all()  # filled up with the last example


# ---- memory ----

STREAM = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, sources

def anonymous():
  line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
  return int(line.split()[1]) * 1024

source = sources.npy(sys.argv[1])
mesh = parallel.make_mesh()
consume = jax.jit(lambda image: image.max())
jax.block_until_ready(consume(jax.numpy.zeros((32, *source.image_shape), "uint8")))
base = peak = anonymous()
feed = pipeline.make_feed(source, pipeline.EpochSampler(len(source), 32), mesh)
read, seen = 0, 0
while read < 2.1e9:
  payload = feed.next(2)
  for i in range(2):
    seen = max(seen, int(consume(feed.take({}, payload)["image"][i])))
  read += payload["image"].nbytes
  peak = max(peak, anonymous())
feed.close()
print(type(feed).__name__, source.nbytes, read, peak - base, seen)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_while_2_of_20_gigabytes_are_read(tmp_path):
  count, shape = 26000, (512, 512, 3)
  images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (count, *shape))
  images[::50, 0, 0, 0] = 7  # a few pages are on the disk; the rest is a hole
  images.flush()
  np.save(tmp_path / "labels.npy", np.zeros(count, np.int64))
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", STREAM, str(tmp_path)]
  out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()
  kind, (size, read, grown, seen) = out[0], map(int, out[1:])
  assert kind == "StreamingFeed" and size > 20e9 and read >= 2e9
  assert seen == 7  # the data were looked at
  assert grown < 0.7e9, f"anonymous memory grew by {grown / 1e6:.0f} MB"
  print(f"read {read / 1e9:.1f} GB, anonymous memory grew by {grown / 1e6:.0f} MB")
