"""The benchmark's arithmetic and its run, with and without the torch peer."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data.augment import AUGMENTATIONS
from jax_trustdiff.diffusion.augment import resample
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.interop import edm_names, graph_npz
from jax_trustdiff.models.registry import MODELS, bind, forward_flops, num_params
from jax_trustdiff.tasks import (
  benchmark,
  benchmark_at_step,
  benchmark_augment,
  benchmark_autoattack,
  benchmark_diffusion,
)
from jax_trustdiff.tasks import benchmark_tools as tools
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError


def measured(tmp_path, variant="smoke", **settings):
  overrides = {f"benchmark.{name}": value for name, value in settings.items()}
  config = config_lib.load(f"configs/benchmark.py:{variant}", overrides)
  workdir = Workdir(tmp_path / "run", config)
  try:
    return benchmark.run(config, workdir)
  finally:
    workdir.close()


def test_flops_of_a_step_count_attack_and_update():
  # One forward pass is 1; a PGD step is forward and input gradient; the update is forward and both gradients.
  assert benchmark_at_step.step_flops(1.0, "pgd_at", 10) == 2 * 10 + 3
  assert benchmark_at_step.step_flops(1.0, "trades", 10) == 27  # the count published for TRADES-10


def test_forward_flops_of_the_papers_network():
  network = MODELS["wide_resnet"](depth=28, width=10)
  assert forward_flops(network) / 2e9 == pytest.approx(5.25, rel=0.01)  # GMAC, Zagoruyko and Komodakis (2016)


def test_peak_is_that_of_the_whole_name(monkeypatch):
  assert tools.peak_flops() is None  # a CPU
  for kind, peak in {
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": None,
    "Tesla T4": None,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
  }.items():
    monkeypatch.setattr(jax, "devices", lambda kind=kind: [types.SimpleNamespace(device_kind=kind)])
    assert tools.peak_flops() == peak, kind


def test_mfu_is_that_of_one_device(monkeypatch):
  monkeypatch.setattr(tools, "peak_flops", lambda: 1e12)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  found = tools.figures_beside_torch("x", {"ours": np.array([0.1, 0.2, 0.9])}, 8, 1e9)
  assert found["x/images_per_second"] == pytest.approx(40)
  assert found["x/mfu"] == pytest.approx(40 * 1e9 / 1e12)
  assert "x/ratio" not in found


def test_ratio_is_the_median_of_paired_rounds():
  found = tools.ratio_figures("x", np.array([1.0, 10.0, 3.0]), np.array([2.0, 10.0, 1.0]))
  assert [found[f"x/{name}"] for name in ("ratio_low", "ratio", "ratio_high")] == [0.5, 1.0, 3.0]


def test_programs_take_turns():
  calls = []

  def program(name):
    def run(count):
      calls.append(name)
      return 6.0 * len(calls) * count

    return run

  seconds = tools.in_turns({"a": program("a"), "b": program("b"), "c": None}, 3, 5)
  assert calls == ["a", "b", "b", "a", "a", "b"]
  assert {name: list(values) for name, values in seconds.items()} == {"a": [6, 24, 30], "b": [12, 18, 36]}


def test_ratios_are_plotted_as_numbers(tmp_path, monkeypatch):
  drawn = {}
  monkeypatch.setattr(
    benchmark.report, "bars", lambda groups, path, **settings: drawn.update(settings, groups=groups)
  )
  monkeypatch.setattr(benchmark_at_step, "_our_step", lambda *_: lambda count: 1.35 * count)
  monkeypatch.setattr(tools, "peer", lambda *_: contextlib.nullcontext(lambda count: 1.0 * count))
  measured(tmp_path, cliff=0)
  assert (
    drawn["groups"] == {f"{step}2": {"ours / peer": 1.35} for step in ("pgd_at", "trades")}
    and drawn["percent"] is False
  )


@pytest.mark.parametrize("answer", ["", """read line; echo '{"ready": "x", "parameters": 1}'"""])
def test_a_dying_peer_is_a_failed_run(tmp_path, answer):
  peer = tmp_path / "python"
  peer.write_text(f"#!/bin/sh\n{answer}\nexit 3\n")
  peer.chmod(0o755)
  with pytest.raises(RunError, match="ended with code 3"), tools.peer(str(peer), {}, "torch_peer.py"):
    pass


@pytest.mark.slow
@pytest.mark.computes
def test_step_is_timed_beside_torch(tmp_path):
  found = measured(tmp_path)
  for step in ("pgd_at2", "trades2"):
    assert found[f"{step}/images_per_second"] > 0 and found[f"{step}/tflops"] > 0
    assert f"{step}/mfu" not in found  # no peak is known for a CPU
    if importlib.util.find_spec("torch"):
      low, middle, high = (found[f"{step}/{name}"] for name in ("ratio_low", "ratio", "ratio_high"))
      assert 0 < low <= middle <= high
      assert (tmp_path / "run/report/ratios.png").stat().st_size > 0
    else:
      assert f"{step}/ratio" not in found
  # Ours stays near the same gradient outside a loop; plain lax shows the cliff that the check is there for.
  assert found["input_gradient/in_loop_ratio"] < 3 and found["weight_gradient/in_loop_ratio"] < 3
  assert found["weight_gradient/in_loop_ratio_of_plain_lax"] > 3


def test_wrong_settings_are_refused(tmp_path):
  with pytest.raises(InputError, match="'trades', found 'mart'"):
    measured(tmp_path, objectives=("mart",))
  with pytest.raises(InputError, match="not a Python with torch"):
    measured(tmp_path, peer_python="/no/such/python")
  with pytest.raises(InputError, match="choose one of sampler, edm_train"):
    measured(tmp_path, "sampler,edm_train")
  with pytest.raises(InputError, match="benchmark.rounds is too small"):
    measured(tmp_path, "sampler,smoke", rounds=0)
  with pytest.raises(InputError, match="'bfloat16', found 'float16'"):
    measured(tmp_path, "edm_train,smoke", peer_dtypes=("float16",))
  with pytest.raises(InputError, match="'bfloat16', found 'float16'"):
    measured(tmp_path, "autoattack,smoke", attack_dtype="float16")
  with pytest.raises(InputError, match="is float32"):
    measured(tmp_path, "autoattack,smoke", graph="net.npz", attack_dtype="bfloat16")


# ---- diffusion ----

TINY = dict(
  image_size=16,
  model_channels=16,
  channel_mult=(1, 2),
  num_blocks=1,
  attention_resolutions=(8,),
  dtype="float32",
)


def torch_network(size, network, variables, num_augment_labels=0):
  torch_peer_unet = pytest.importorskip("jax_trustdiff.tasks.torch_peer_unet", reason="needs torch")
  net = torch_peer_unet.UNet(**size.torch_settings(num_augment_labels)["network"])
  weights = {k.removeprefix("model."): torch_tensor(v) for k, v in edm_names.to_edm(variables).items()}
  net.load_state_dict(weights)
  return net


def torch_tensor(array):
  return pytest.importorskip("torch").tensor(np.asarray(array))


def nchw(x):
  return torch_tensor(x).permute(0, 3, 1, 2)


def nhwc(x):
  return x.detach().permute(0, 2, 3, 1).numpy()


def test_torch_network_is_ours():
  """F on the same weights, every branch of which does something, with and without augmentation labels."""
  size = benchmark_diffusion.Size(**TINY, batch_size=3)
  network = size.network(9)
  variables = benchmark_diffusion._variables(network)
  net = torch_network(size, network, variables, 9)
  keys = jax.random.split(jax.random.key(1), 3)
  x, labels = jax.random.normal(keys[0], (3, 16, 16, 3)), jax.random.normal(keys[1], (3, 9))
  noise_labels = jax.random.normal(keys[2], (3,))
  lowered = jax.jit(network.apply).lower(variables, x, noise_labels, None, labels)
  apply = lowered.compile(compiler_options=parallel.quick_compilation())
  outputs = []
  for augment in (labels, None):  # labels of zero are none: their layer has no bias
    ours = apply(variables, x, noise_labels, None, 0 * labels if augment is None else labels)
    theirs = net(nchw(x), torch_tensor(noise_labels), None if augment is None else torch_tensor(augment))
    np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-5)
    outputs.append(ours)
  assert np.abs(outputs[0]).max() > 0.1 and np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_torch_augmentation_is_ours():
  torch_peer_unet = pytest.importorskip("jax_trustdiff.tasks.torch_peer_unet", reason="needs torch")
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (4, 16, 16, 3))
  inverse = jnp.eye(2, 3) + 0.3 * jax.random.normal(keys[1], (4, 2, 3))
  ours = jax.jit(resample)(x, inverse)
  theirs = nhwc(torch_peer_unet.resample(nchw(x), torch_tensor(inverse)))
  assert np.abs(ours - x).max() > 0.5
  np.testing.assert_allclose(ours, theirs, atol=2e-4)
  images, labels = torch_peer_unet.augment(nchw(x), 1.0)
  assert images.shape == (4, 3, 16, 16) and labels.shape == (4, 9)
  always = labels[:, [2, 3, 4, 5, 7, 8]]  # half of the stretches are along the axes, with a sine of 0
  assert 0 < always.abs().min() and labels.abs().max() < 10


def test_scan_by_hand_counts_and_samples_as_ours():
  """A denoiser with a known answer; both evaluate it as often, and the scan ends where the sampler does."""
  calls = []

  def denoise(x, sigma):
    jax.debug.callback(lambda: calls.append(1))
    return 0.3 + (x - 0.3) / (1 + sigma[:, None, None, None] ** 2)

  sampler = EDMSampler(num_steps=6)
  noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  found = {}
  for name, sample in (
    ("ours", sampler),
    ("scan", lambda d, x: benchmark_diffusion.heun_by_scan(d, x, sampler.sigmas)),
  ):
    calls.clear()
    found[name] = jax.jit(lambda x, sample=sample: sample(denoise, x))(noise)
    jax.effects_barrier()
    assert len(calls) == sampler.nfe == 11, name
  np.testing.assert_allclose(found["ours"], found["scan"], rtol=1e-5, atol=1e-5)
  assert 0.5 < np.std(found["scan"]) < 2


@pytest.mark.parametrize("variant", ["sampler", "sampler_gpu", "edm_train", "edm_train_gpu"])
def test_benchmark_networks(variant):
  """Their sizes, and that the peer's have as many parameters: the paper's DDPM++ where it says so."""
  section = config_lib.load(f"configs/benchmark.py:{variant}").benchmark
  names = [field.name for field in dataclasses.fields(benchmark_diffusion.Size)]
  size = benchmark_diffusion.Size(**{name: section[name] for name in names})
  found = num_params(jax.eval_shape(size.network().init, jax.random.key(0)))
  assert found == (55_732_739 if variant.endswith("_gpu") else 1_754_147)


@pytest.mark.slow
@pytest.mark.parametrize(
  "variant, labels, checked",
  [
    ("sampler,smoke", ("sampler",), ("sampler_beside_scan",)),
    ("edm_train,smoke", ("edm_train", "edm_train_augmented"), ()),
  ],
)
def test_diffusion_is_timed_beside_its_peers(tmp_path, variant, labels, checked):
  dtypes = ("float32", "bfloat16") if variant.startswith("sampler") else ("float32",)
  found = measured(tmp_path, variant, peer_dtypes=dtypes)
  assert all(math.isfinite(value) for value in found.values())
  with_torch = importlib.util.find_spec("torch") is not None
  for label in labels:
    assert found[f"{label}/images_per_second"] > 0
    assert (f"{label}/ratio" in found) == with_torch
  peers = ("", *(f"_beside_torch_{dtype}" for dtype in dtypes[1:]))
  beside = [label + peer for label in labels for peer in peers]
  for label in (*checked, *(beside if with_torch else ())):
    low, middle, high = (found[f"{label}/{name}"] for name in ("ratio_low", "ratio", "ratio_high"))
    assert 0 < low <= middle <= high
  for key in found:
    if "max_difference" in key:
      assert found[key] < (3e-2 if key.endswith("bfloat16") else 1e-4), key
  assert ("sampler/max_difference_from_torch" in found) == (with_torch and "sampler" in labels)


def test_a_mixture_is_timed_beside_calls_of_its_network(tmp_path):
  found = measured(tmp_path, "mixture,smoke")
  for impl in ("vmap", "vmap_of_2", "map", "random"):
    low, middle, high = (found[f"{impl}/{name}"] for name in ("ratio_low", "ratio", "ratio_high"))
    assert 0 < low <= middle <= high
  assert max(found[f"{impl}/max_difference"] for impl in ("vmap", "vmap_of_2", "map")) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_can_break_the_fresh_network(dtype):
  network = MODELS["wide_resnet"](depth=10, width=2, mean=(0.47,), std=(0.25,), dtype=dtype)
  fresh = jax.jit(network.init)(jax.random.key(0))
  raised = benchmark_autoattack._preferring_first_class(fresh)
  logits = bind(network, raised)(jax.random.uniform(jax.random.key(1), (8, 32, 32, 3)))
  assert (logits[:, :1] - logits[:, 1:] > benchmark_autoattack.PREFERENCE / 2).all()
  moved = [a.sum() for a in jax.tree.leaves(jax.tree.map(jnp.subtract, raised, fresh)) if a.any()]
  np.testing.assert_allclose(moved, [benchmark_autoattack.PREFERENCE])


@pytest.mark.slow
@pytest.mark.computes
@pytest.mark.parametrize("version", ["rapid", pytest.param("standard", marks=LONG)])
def test_autoattack_is_timed_beside_its_peer(tmp_path, version):
  """The same graph and images, so the same verdicts."""
  r = np.random.RandomState(0)
  nodes = [
    dict(op="Conv", inputs=["x", "k", "c"], outputs=["h"], attrs=dict(pads=[1, 1, 1, 1], strides=[2, 2])),
    dict(op="Relu", inputs=["h"], outputs=["r"], attrs={}),
    dict(op="Flatten", inputs=["r"], outputs=["f"], attrs={}),
    dict(op="Gemm", inputs=["f", "w", "b"], outputs=["y"], attrs={}),
  ]
  graph = dict(input="x", output="y", norm=dict(mean=[0.5] * 3, std=[0.25] * 3), nodes=nodes)
  arrays = dict(k=r.randn(4, 3, 3, 3), c=r.randn(4), w=r.randn(10, 1024) / 16, b=r.randn(10))
  arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
  np.savez(tmp_path / "net.npz", __graph__=np.frombuffer(json.dumps(graph).encode(), np.uint8), **arrays)
  images = r.randint(0, 256, (24, 32, 32, 3), np.uint8)
  logits = bind(*graph_npz.load_graph(tmp_path / "net.npz"))(jnp.asarray(images, jnp.float32) / 255)
  np.savez(tmp_path / "test.npz", image=images, label=np.asarray(logits.argmax(1)))
  settings = dict(graph=str(tmp_path / "net.npz"), data_path=str(tmp_path), num_images=24, radius=0.01)
  found = measured(tmp_path, "autoattack,smoke", **settings, version=version, batch_size=24)
  assert found["num_images"] == 24 and 0 < found["robust"] < 24
  if importlib.util.find_spec("torch") and importlib.util.find_spec("pyautoattack"):
    assert abs(found["torch_robust"] - found["robust"]) <= 1 and found["verdicts_that_differ"] <= 1
    assert 0 < found["autoattack/ratio_low"] <= found["autoattack/ratio_high"]
  else:
    assert "autoattack/ratio" not in found


def test_augmentations_are_timed_and_auto_augment_beside_pillow(tmp_path):
  found = measured(tmp_path, "augment,smoke", names=("cutmix", "auto_augment"))
  assert found["auto_augment/images_per_second"] > 0 and found["auto_augment/pillow_images_per_second"] > 0
  assert found["auto_augment/ratio_low"] <= found["auto_augment/ratio"] <= found["auto_augment/ratio_high"]
  assert found["cutmix/images_per_second"] > 0 and "cutmix/ratio" not in found
  with pytest.raises(InputError, match="no augmentation 'cut_mix'; known: "):
    benchmark_augment.augment(("cut_mix",), 32, 4, 1, 1)


@pytest.mark.computes
def test_pillow_augments_as_we_do():
  """The mean of each pixel over many draws; without the square that is cut out it is another."""
  number = 3000
  image = np.random.RandomState(1).randint(0, 256, (16, 16, 3), dtype=np.uint8)
  draw = jax.jit(AUGMENTATIONS["auto_augment"](length=6))
  ours = np.asarray(draw(jnp.broadcast_to(jnp.asarray(image), (number, *image.shape)), jax.random.key(0)))
  rng = np.random.default_rng(0)

  def apart(length):
    """Root mean square of the differences of means, in standard errors."""
    theirs = [benchmark_augment.pillow_auto_augment(image, rng, length) for _ in range(number)]
    pair = [np.asarray(x, np.float64) for x in (ours, theirs)]
    error = np.sqrt(sum(x.var(0) for x in pair) / number)
    return np.sqrt(np.mean(np.square((pair[0].mean(0) - pair[1].mean(0)) / error)))

  assert apart(6) < 1.4 < 2 < apart(4)
