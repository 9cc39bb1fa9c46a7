"""Generation into an image store: the same bytes by every way, through every death, and one line for bad input."""

import hashlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers import answer, start

from jax_trustdiff import config as config_lib
from jax_trustdiff import main as main_lib
from jax_trustdiff.data.image_store import ImageStore, StorePlan, verify
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.tasks import denoisers, generate, sampling

pytestmark = pytest.mark.computes

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("TRUSTDIFF_KILLS", "2"))
MODEL = dict(name="ddpmpp", model_channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The export of a tiny model of 8x8 greyscale images whose random weights all count."""
  folder = tmp_path_factory.mktemp("model") / "export"
  network = denoisers.build_network(MODEL, (8, 8, 1), 10)
  leaves, tree = jax.tree.flatten(jax.jit(network.init)(jax.random.key(0)))
  rng = np.random.RandomState(0)
  noisy = [np.asarray(x) + 0.3 * rng.randn(*x.shape).astype(np.float32) for x in leaves]
  variables = jax.tree.unflatten(tree, noisy)
  section = denoisers.model_section(MODEL, network)
  names = {"class_names": list("abcdefghij")}
  denoisers.save_denoiser(folder, section, dict(name="edm", sigma_data=0.5), variables, names)
  return folder


def arguments(exported, workdir, *more):
  return [
    "--config=configs/generate_cifar.py:smoke",
    f"--config.init_from={exported}",
    f"--workdir={workdir}",
    *more,
  ]


def contents(path):
  return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def run(*args):
  return main_lib.main(["main", *args])


def test_one_class_is_shown_as_one(exported, tmp_path):
  """More classes than pictures, and all images of one that evenly spaced classes would pass by."""
  few = ("--config.generate.labels=3", "--config.report.num_images=4", "--config.generate.num_images=32")
  assert run(*arguments(exported, tmp_path / "run", *few)) == 0
  page = (tmp_path / "run/report/report.html").read_text()
  assert "The first 4 images" in page and "of each of" not in page


def test_a_class_with_fewer_images_has_a_row_all_the_same(tmp_path):
  plan = StorePlan(6, 6, (2, 2, 1), 3, (), {})
  store = ImageStore(tmp_path, plan)
  images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
  labels = np.array([0, 1, 1, 2, 0, 1], np.int32)
  store.write(0, images, labels, np.arange(6))
  shown, columns, caption = generate._shown(store, [0], np.arange(3), 9)
  assert shown[:, 0, 0, 0].tolist() == [0, 4, 255, 1, 2, 5, 3, 255, 255] and columns == 3
  assert caption == "The first images of each of 3 classes, a row for each class, up to 3"


def test_images_draw_from_keys_of_their_own():
  """A training run with the same seed splits key(seed)."""
  of_training = jax.random.key_data(jax.random.split(jax.random.key(3), 8))
  of_images = jax.random.key_data(sampling.image_keys(3, jnp.arange(8)))
  assert not (np.asarray(of_training)[:, None] == np.asarray(of_images)[None]).all(-1).any()


def test_a_run_fills_a_store_and_another_leaves_it_as_it_is(exported, tmp_path, capsys):
  assert run(*arguments(exported, tmp_path / "run")) == 0
  store = tmp_path / "run/images"
  source = SOURCES["image_store"](str(store))
  assert len(source) == 96 and source.image_shape == (8, 8, 1) and verify(store) == 96
  np.testing.assert_array_equal(source.ids, np.arange(96))
  np.testing.assert_array_equal(source.labels, np.arange(96) % 10)
  assert source.class_names == tuple("abcdefghij")
  assert len(np.unique(np.asarray(source.images).reshape(96, -1), axis=0)) == 96
  result = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
  assert (result["num_images"], result["generated"], result["nfe"], result["count/a"]) == (96, 96, 5, 10)
  assert (tmp_path / "run/report/report.html").stat().st_size > 1000
  manifest = json.loads((store / "manifest.json").read_text())
  assert list(manifest["makers"].values()) == [96]
  assert all(part in next(iter(manifest["makers"])) for part in (f"jax {jax.__version__}", "cpu"))
  about = json.loads((tmp_path / "run/store.json").read_text())
  assert about["manifest_sha256"] == hashlib.sha256((store / "manifest.json").read_bytes()).hexdigest()

  before = contents(store)
  for harm, shard in (("cut", 1), ("flip", 2)):
    file = store / f"images-0000{shard}-of-00003.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data[:-5] if harm == "cut" else data)
    thorough = f"--config.generate.verify={harm == 'flip'}"
    again = (f"--config.generate.store={store}", thorough, "--config.generate.batch_size=1")
    assert run(*arguments(exported, tmp_path / harm, *again)) == 0
    said = capsys.readouterr().err
    assert f"shard {shard} is made again" in said and "64 of 96 images are there already" in said
    assert contents(store) == before

  other = (f"--config.generate.store={store}", "--config.seed=1")
  assert run(*arguments(exported, tmp_path / "other", *other)) == 2
  assert "of another origin (provenance.seed: 0 -> 1)" in capsys.readouterr().err
  assert contents(store) == before and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
  "changes, says",
  [
    (["--config.init_from="], "init_from is empty"),
    (["--config.sampler.name=edn"], "unknown name 'edn'"),
    (["--config.generate.num_images=0"], "generate.num_images must be at least 1"),
    (["--config.generate.labels=odd"], "unknown generate.labels='odd'"),
    (["--config.generate.labels=10"], "the model's classes are 0..9"),
    (["--config.generate.labels={tmp}/none.npy"], "no such file"),
    (["--config.generate.labels={tmp}/short.npy"], "expected an integer for each of the 96 images"),
    (["--config.generate.labels={tmp}/large.npy"], "label 11; the model's classes are 0..9"),
    (["--config.generate.worker=2", "--config.generate.num_workers=2"], "workers are 0, 1, ..."),
    (["--config.generate.num_workers=2"], "several workers need one store"),
    (["--config.generate.labels=none", "--config.guidance.scale=2.0"], "needs a model with classes"),
    (["--config.generate.store={tmp}"], "is no image store"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(exported, tmp_path, capsys, changes, says):
  np.save(tmp_path / "short.npy", np.zeros(95, int))
  np.save(tmp_path / "large.npy", np.full(96, 11))
  changes = [change.format(tmp=tmp_path) for change in changes]
  assert run(*arguments(exported, tmp_path / "run", *changes)) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
  assert not (tmp_path / "run").exists()


def labels_of(exported, tmp_path, name, *more):
  assert run(*arguments(exported, tmp_path / name, *more)) == 0
  return SOURCES["image_store"](str(tmp_path / name / "images"))


@pytest.mark.slow
def test_labels_and_guidance(exported, tmp_path):
  given = np.random.RandomState(0).randint(0, 10, 96)
  np.save(tmp_path / "labels.npy", given)
  file = ["--config.generate.first_id=40", f"--config.generate.labels={tmp_path}/labels.npy"]
  source = labels_of(exported, tmp_path, "file", *file)
  np.testing.assert_array_equal(source.labels, given)
  np.testing.assert_array_equal(source.ids, 40 + np.arange(96))
  drawn = labels_of(exported, tmp_path, "random", "--config.generate.labels=random")
  assert 5 <= len(np.unique(drawn.labels)) <= 10 and np.ptp(np.bincount(drawn.labels)) > 1
  three = labels_of(exported, tmp_path, "three", "--config.generate.labels=3")
  assert set(three.labels) == {3} and three.num_classes == 10
  none = labels_of(exported, tmp_path, "none", "--config.generate.labels=none")
  assert none.class_names == ("unlabelled",) and set(none.labels) == {0}
  same = [i for i in range(96) if drawn.labels[i] == 3]
  np.testing.assert_array_equal(np.asarray(drawn.images)[same], np.asarray(three.images)[same])
  guided = labels_of(
    exported, tmp_path, "guided", "--config.generate.labels=3", "--config.guidance.scale=0.0"
  )
  difference = np.asarray(guided.images).astype(int) - np.asarray(none.images)
  assert np.abs(difference).max() <= 1  # scale 0 is the unconditional model, by another program
  assert (np.asarray(three.images) != np.asarray(none.images)).mean() > 0.1


@pytest.mark.slow
def test_an_image_is_the_same_for_every_batch_size_order_and_number_of_devices():
  one, eight = (answer(start("generate_worker.py", devices)) for devices in (1, 8))
  assert [one["devices"], eight["devices"]] == [1, 8]
  for name in ("unet", "mixture"):
    hashes = {
      (run["devices"], case): value
      for run in (one, eight)
      for case, value in run["images"].items()
      if case.startswith(name)
    }
    assert len(hashes) == 10 and len(set(hashes.values())) == 1, hashes
  assert len(set(one["images"].values())) == 2


JOB = [  # 20,000 images
  "--config.generate.num_images=20000",
  "--config.generate.images_per_shard=500",
  "--config.generate.batch_size=1000",
  "--config.generate.micro_batch=250",
  "--config.sampler.num_steps=2",
  "--config.sampler.solver=euler",
]


def process(exported, workdir, *more):
  command = [sys.executable, "-m", "jax_trustdiff.main", *arguments(exported, workdir, *JOB, *more)]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*processes):
  said = [one.communicate()[1] for one in processes]
  assert [one.returncode for one in processes] == [0] * len(processes), said
  return said


def shards(store):
  return len(list(store.glob("shard-*.json")))


@pytest.mark.slow
def test_killed_again_and_again_and_shared_out_the_store_is_the_same(exported, tmp_path):
  """kill -9 at random moments between the first and the last shard, SIGTERM once, then two workers at once."""
  finish(process(exported, tmp_path / "undisturbed"))
  expected = contents(tmp_path / "undisturbed/images")
  assert len(expected) == 40 * 4 + 2

  store, randomness, seen = tmp_path / "killed/images", random.Random(3), []
  for kill in range(KILLS + 1):
    one = process(exported, tmp_path / "killed")
    target = 39 * (kill + randomness.random()) / (KILLS + 1)
    while one.poll() is None and shards(store) < target:
      time.sleep(0.002)
    time.sleep(0.02 * randomness.random())
    assert one.poll() is None, one.communicate()[1]
    one.send_signal(signal.SIGTERM if kill == KILLS else signal.SIGKILL)
    said = one.communicate()[1]
    seen.append(shards(store))
  assert one.returncode == 143 and "the same command goes on from there" in said and "Traceback" not in said
  assert seen == sorted(seen) and seen[-1] < 40, seen
  (said,) = finish(process(exported, tmp_path / "killed"))
  assert f"{500 * seen[-1]:,} of 20,000 images are there already" in said
  assert contents(store) == expected
  source = SOURCES["image_store"](str(store))
  np.testing.assert_array_equal(source.ids, np.arange(20_000))
  assert len(np.unique(np.asarray(source.images).reshape(20_000, -1), axis=0)) == 20_000

  shared = f"--config.generate.store={tmp_path}/shared"
  number = ("--config.generate.num_workers=2", shared)
  finish(
    *(process(exported, tmp_path / f"worker{i}", f"--config.generate.worker={i}", *number) for i in (0, 1))
  )
  assert contents(tmp_path / "shared") == expected


@pytest.mark.slow
def test_two_processes_of_one_run_share_the_shards_out(exported, tmp_path):
  job = arguments(exported, tmp_path / "one")
  assert run(*job) == 0
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "jax_trustdiff.main", *arguments(exported, tmp_path / "two")]
  command += [f"--coordinator=localhost:{port}", "--num_processes=2"]
  said = finish(
    *(
      subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
      for i in (0, 1)
    )
  )
  assert contents(tmp_path / "one/images") == contents(tmp_path / "two/images")
  assert "64 images to generate" in said[0] and "32 images to generate" not in said[0]
  result = json.loads((tmp_path / "two/result.json").read_text())["metrics"]
  assert (result["num_images"], result["generated"]) == (96, 64)  # shards 0 and 2 of three


def test_smoke_is_a_network_that_was_never_trained():
  config = config_lib.load("configs/generate_cifar.py:smoke")
  assert config.init_from == "untrained"
  assert config_lib.load("configs/generate_cifar.py").init_from == ""
