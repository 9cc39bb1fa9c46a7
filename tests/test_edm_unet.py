"""The U-Nets of Karras et al. 2022 against reference values, sizes, and what a network must keep."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff.diffusion import denoisers
from jax_trustdiff.interop.edm_names import from_edm, to_edm
from jax_trustdiff.models import edm_unet
from jax_trustdiff.models.edm_unet import Layers, UNetBlock, adm, ddpmpp, ncsnpp
from jax_trustdiff.models.registry import forward_flops, num_params
from jax_trustdiff.types import DiffusionNetwork, InputError

TINY = dict(
  image_shape=(8, 8, 3), model_channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,)
)
ONE_LEVEL = TINY | dict(channel_mult=(1,), attention_resolutions=())
CIFAR, FFHQ = (32, 32, 3), (64, 64, 3)


def network_of(config):
  """The network of a reference's constructor arguments."""
  fields = dict(
    image_shape=(config["img_resolution"], config["img_resolution"], config["img_channels"]),
    num_classes=config["label_dim"],
    num_augment_labels=config["augment_dim"],
    model_channels=config["model_channels"],
    channel_mult=tuple(config["channel_mult"]),
    num_blocks=config["num_blocks"],
    attention_resolutions=tuple(config["attn_resolutions"]),
    dropout=config["dropout"],
  )
  if config["model_type"] == "DhariwalUNet":
    return adm(**fields)
  return edm_unet.SongUNet(
    **fields,
    embedding=config["embedding_type"],
    encoder=config["encoder_type"],
    decoder=config["decoder_type"],
    taps=tuple(config["resample_filter"]),
    noise_channel_mult=config["channel_mult_noise"],
  )


def load(name):
  golden = dict(np.load(shared_dir("golden", "edm_networks", f"{name}.npz")))
  network = network_of(json.loads(str(golden["config"])))
  state_dict = {
    key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")
  }
  return golden, network, state_dict


def nhwc(array):
  return jnp.asarray(array.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
  "name, count, tolerance",
  [("ddpmpp_edm_cond", 189_667, 2e-5), ("ncsnpp_ve_uncond", 190_819, 2e-4), ("adm_edm_cond", 829_059, 2e-5)],
)
def test_reference_outputs(name, count, tolerance):
  golden, network, state_dict = load(name)
  variables = from_edm(network, state_dict)
  assert num_params(variables) == count
  labels = jnp.asarray(golden["class_labels"]) if network.num_classes else None
  augment = jnp.asarray(golden["augment_labels"]) if network.num_augment_labels else None
  apply = jax.jit(network.apply)
  found = apply(variables, nhwc(golden["net_input"]), jnp.asarray(golden["noise_labels"]), labels, augment)
  np.testing.assert_allclose(found.transpose(0, 3, 1, 2), golden["F"], rtol=0, atol=tolerance)
  assert found.dtype == jnp.float32
  if labels is None:
    return
  # D = skip x + out F is linear in F: without labels the difference in D is out times that in F
  sigma = golden["sigma"][:, None, None, None]
  out = sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
  for key, given in (("D_nolabel", (None, augment)), ("D_noaugment", (labels, None))):
    other = apply(variables, nhwc(golden["net_input"]), jnp.asarray(golden["noise_labels"]), *given)
    difference = (other - found).transpose(0, 3, 1, 2) * out
    assert np.abs(golden[key] - golden["D"]).max() > 1e-2
    np.testing.assert_allclose(difference, golden[key] - golden["D"], rtol=0, atol=1e-4)


def test_reference_block_with_two_heads():
  golden = dict(np.load(shared_dir("golden", "edm_networks", "unetblock_2heads.npz")))
  block = UNetBlock(128, 2, Layers(jnp.float32, torch_default=True), adaptive_scale=True)
  params = {}
  for key, value in golden.items():
    if key.startswith("param/"):
      _, layer, leaf = *key.split("/")[:1], *key.removeprefix("param/").split(".")
      leaf = {"weight": "scale" if layer.startswith("norm") else "kernel"}.get(leaf, leaf)
      value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
      params.setdefault(layer, {})[leaf] = jnp.asarray(value, jnp.float32)
  found = jax.jit(block.apply)({"params": params}, nhwc(golden["x"]), jnp.asarray(golden["emb"]), None)
  np.testing.assert_allclose(found.transpose(0, 3, 1, 2), golden["y"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["ddpmpp_edm_cond", "ncsnpp_ve_uncond", "adm_edm_cond"])
def test_names_go_both_ways(name):
  _, network, state_dict = load(name)
  variables = from_edm(network, state_dict)
  back = to_edm(variables)
  wanted = {key: value for key, value in state_dict.items() if not key.endswith("resample_filter")}
  assert back.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(back[key], value.astype(np.float32), err_msg=key)

  with pytest.raises(InputError, match="left over: more"):
    from_edm(network, state_dict | {"model.more": np.zeros(3)})
  lost = next(key for key in wanted if key.endswith("qkv.weight"))
  with pytest.raises(InputError, match="missing or of another shape: .*qkv.weight"):
    from_edm(network, {key: value for key, value in state_dict.items() if key != lost})
  if name == "ncsnpp_ve_uncond":
    with pytest.raises(InputError, match="filter"):
      from_edm(dataclasses.replace(network, taps=(1, 1)), state_dict)


# The numbers are of the code released with Karras et al. 2022, counted there.
@pytest.mark.parametrize(
  "count, network",
  [
    pytest.param(55_733_891, ddpmpp(image_shape=CIFAR, num_augment_labels=9), marks=pytest.mark.slow),
    (55_735_299, ddpmpp(image_shape=CIFAR, num_classes=10, num_augment_labels=9)),
    pytest.param(55_732_739, ddpmpp(image_shape=CIFAR), marks=pytest.mark.slow),
    pytest.param(
      55_746_819, ddpmpp(image_shape=CIFAR, num_classes=100, num_augment_labels=9), marks=pytest.mark.slow
    ),
    pytest.param(61_804_419, ddpmpp(image_shape=CIFAR, channel_mult=(1, 2, 2, 2)), marks=pytest.mark.slow),
    pytest.param(
      61_805_571,
      ddpmpp(image_shape=FFHQ, channel_mult=(1, 2, 2, 2), num_augment_labels=9),
      marks=pytest.mark.slow,
    ),
    pytest.param(56_397_827, ncsnpp(image_shape=CIFAR, num_augment_labels=9), marks=pytest.mark.slow),
    (56_400_643, ncsnpp(image_shape=CIFAR, num_classes=10, num_augment_labels=9)),
    pytest.param(62_758_787, ncsnpp(image_shape=CIFAR, channel_mult=(1, 2, 2, 2)), marks=pytest.mark.slow),
    pytest.param(
      62_761_091,
      ncsnpp(image_shape=FFHQ, channel_mult=(1, 2, 2, 2), num_augment_labels=9),
      marks=pytest.mark.slow,
    ),
    pytest.param(295_899_267, adm(image_shape=FFHQ, num_classes=1000), marks=pytest.mark.slow),
    (295_904_454, adm(image_shape=FFHQ, num_classes=1000, out_channels=6)),
    pytest.param(
      295_286_595, adm(image_shape=FFHQ, num_classes=200, num_augment_labels=9), marks=pytest.mark.slow
    ),
    pytest.param(
      279_633_603, adm(image_shape=CIFAR, num_classes=10, num_augment_labels=9), marks=pytest.mark.slow
    ),
  ],
)
def test_parameter_counts(count, network):
  assert num_params(jax.eval_shape(network.init, jax.random.key(0))) == count
  assert isinstance(network, DiffusionNetwork)


@pytest.mark.parametrize(
  "gflop, network",
  [
    (42.38, ddpmpp(image_shape=CIFAR)),
    pytest.param(42.79, ncsnpp(image_shape=CIFAR), marks=pytest.mark.slow),
    pytest.param(59.76, adm(image_shape=CIFAR), marks=pytest.mark.slow),
    pytest.param(21.70, ddpmpp(image_shape=CIFAR, channel_mult=(1, 2, 2, 2)), marks=pytest.mark.slow),
    pytest.param(219.33, adm(image_shape=FFHQ, num_classes=1000), marks=pytest.mark.slow),
  ],
)
def test_flops(gflop, network):
  assert forward_flops(network) / 1e9 == pytest.approx(gflop, rel=0.01)


def randomised(network, seed=0):
  """Variables in which every layer counts: the initial ones leave out the residual branches."""
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.1, jnp.float32), shapes)


def inputs(network, batch=3):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(batch, *network.image_shape)), jnp.float32)
  return x, jnp.linspace(-1.0, 1.0, batch)


@pytest.mark.parametrize(
  "make, extra",
  [
    pytest.param(ddpmpp, {}, marks=pytest.mark.slow),
    pytest.param(ncsnpp, {}, marks=pytest.mark.slow),
    pytest.param(adm, {"model_channels": 32}, marks=pytest.mark.slow),
    (ncsnpp, dict(encoder="skip", decoder="skip")),
  ],
)
def test_variants_of_computation(make, extra):
  """remat changes nothing, bfloat16 little; every parameter has a gradient; images do not see one another."""
  network = make(**TINY | extra | dict(num_classes=3, num_augment_labels=2))
  variables, (x, c) = randomised(network), inputs(network)
  labels, augment = jax.nn.one_hot(jnp.arange(3), 3), jnp.ones((3, 2))

  @functools.partial(jax.jit, static_argnums=0)
  def run(network, x):
    def loss(params):
      out = network.apply(variables | {"params": params}, x, c, labels, augment)
      return jnp.square(out).mean(), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return out, grads

  out, grads = run(network, x)
  assert all(np.abs(g).max() > 0 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if network.model_channels == 32:  # one family will do
    again, remat_grads = run(dataclasses.replace(network, remat=True), x)
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), remat_grads, grads)
  low = jax.jit(dataclasses.replace(network, dtype="bfloat16").apply)(variables, x, c, labels, augment)
  assert low.dtype == jnp.float32
  assert 0 < np.abs(low - out).max() < 0.1 * np.abs(out).max()
  among_others, _ = run(network, x.at[jnp.array([0, 2])].multiply(3))
  np.testing.assert_allclose(among_others[1], out[1], rtol=1e-4, atol=1e-5)
  assert np.abs(among_others - out).max((1, 2, 3))[jnp.array([0, 2])].min() > 1e-2


def test_dropout_and_label_dropout():
  network = ddpmpp(**ONE_LEVEL, num_classes=3, dropout=0.3)
  variables, (x, c) = randomised(network), inputs(network)
  labels = jax.nn.one_hot(jnp.arange(3), 3)

  @functools.partial(jax.jit, static_argnums=0)
  def evaluate(network, key, labels=labels):
    return network.apply(variables, x, c, labels, None, key)

  one, two, again = (evaluate(network, jax.random.key(seed)) for seed in (1, 2, 1))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - two).max() > 1e-2
  np.testing.assert_array_equal(
    evaluate(network, None), evaluate(dataclasses.replace(network, dropout=0.0), jax.random.key(1))
  )
  np.testing.assert_array_equal(evaluate(network, None, None), evaluate(network, None, jnp.zeros((3, 3))))

  network = ddpmpp(**ONE_LEVEL, num_classes=3, label_dropout=0.5)
  kept, dropped = evaluate(network, None), evaluate(network, None, None)
  share = []
  for seed in range(20):
    found = evaluate(network, jax.random.key(seed))
    is_kept = np.abs(found - kept).max((1, 2, 3)) < 1e-5
    assert (is_kept | (np.abs(found - dropped).max((1, 2, 3)) < 1e-5)).all()
    share.extend(is_kept)
  assert 0.3 < np.mean(share) < 0.7


def test_initial_values():
  """Song: residual branches start at 1e-5 of Xavier's range; ADM: at zero, and elsewhere uniform in 1 / sqrt(fan_in)."""
  song = jax.jit(ddpmpp(**ONE_LEVEL).init)(jax.random.key(0))["params"]
  kernel = song["enc_8x8_block0"]["conv0"]["kernel"]
  bound = math.sqrt(6 / (9 * 16 + 9 * 16))
  assert 0.95 * bound < np.abs(kernel).max() <= bound
  assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.05)
  assert np.abs(song["enc_8x8_block0"]["conv1"]["kernel"]).max() <= 1e-5 * bound
  assert np.abs(song["dec_8x8_in0"]["qkv"]["kernel"]).max() <= math.sqrt(0.2 * 6 / (16 + 48))
  assert not any(np.any(leaf) for path, leaf in jax.tree.leaves_with_path(song) if path[-1].key == "bias")
  ours = jax.jit(adm(**ONE_LEVEL | {"model_channels": 32}, num_classes=5).init)(jax.random.key(0))["params"]
  kernel = ours["enc_8x8_block0"]["conv0"]["kernel"]
  assert 0.95 / math.sqrt(9 * 32) < np.abs(kernel).max() <= 1 / math.sqrt(9 * 32)
  assert np.any(ours["enc_8x8_block0"]["conv0"]["bias"])
  assert not np.any(ours["out_conv"]["kernel"]) and not np.any(ours["out_conv"]["bias"])
  assert np.std(ours["map_label"]["kernel"]) == pytest.approx(1, rel=0.15)
  frequencies = jax.jit(ncsnpp(**ONE_LEVEL).init)(jax.random.key(0))["constants"]["freqs"]
  assert frequencies.shape == (16,) and 8 < np.std(frequencies) < 24


@pytest.mark.parametrize(
  "make",
  [
    lambda: ddpmpp(image_shape=(30, 30, 3)),
    lambda: ddpmpp(image_shape=CIFAR, model_channels=6),
    lambda: ddpmpp(image_shape=CIFAR, embedding="sinus"),
    lambda: ddpmpp(image_shape=CIFAR, encoder="none"),
    lambda: ncsnpp(image_shape=CIFAR, taps=(1, 2, 1)),
    lambda: adm(image_shape=CIFAR, dropout=1.0),
    lambda: adm(image_shape=CIFAR, dtype="float16"),
  ],
)
def test_refuses(make):
  with pytest.raises(InputError) as error:
    make()
  assert "\n" not in str(error.value)


def test_refuses_labels_it_does_not_take():
  network = ddpmpp(**TINY)
  variables, (x, c) = randomised(network), inputs(network)
  with pytest.raises(InputError, match="takes 0 class labels, got 4"):
    network.apply(variables, x, c, jnp.zeros((3, 4)))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_is_the_strided_convolution(taps):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 8, 6, 3)), jnp.float32)
  kernel = np.outer(taps, taps)[:, :, None, None] / sum(taps) ** 2
  kernel = jnp.asarray(np.tile(kernel, (1, 1, 1, 3)), jnp.float32)
  pad = (len(taps) - 1) // 2
  numbers = ("NHWC", "HWIO", "NHWC")
  down = jax.lax.conv_general_dilated(
    x, kernel, (2, 2), [(pad, pad)] * 2, feature_group_count=3, dimension_numbers=numbers
  )
  np.testing.assert_allclose(edm_unet.downsample(x, taps), down, atol=1e-6)
  # the transposed convolution is the adjoint of the convolution; times 4 it keeps the brightness
  cotangent = jax.vjp(lambda v: edm_unet.downsample(v, taps), jnp.zeros((2, 16, 12, 3)))[1]
  np.testing.assert_allclose(edm_unet.upsample(x, taps), 4 * cotangent(x)[0], atol=1e-6)


# Whole denoisers of the code released with Karras et al. 2022, filled with the numbers of `filled`: D[2, 1, 5, :3] (NCHW).
LAYERS = ("norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj")
TOP = {
  "song": ("map_noise", "map_label", "map_augment", "map_layer0", "map_layer1"),
  "adm": ("map_noise", "map_augment", "map_layer0", "map_layer1", "map_label"),
}
PARTS = {
  "enc": ("conv", "down", "aux_skip", "aux_residual", "block0"),
  "dec": ("in0", "in1", "up", "block0", "block1", "aux_norm", "aux_conv"),
}


def filled(network, kind):
  """Normal numbers times 0.1 in the order in which the reference makes its layers; frequencies last, times 16."""

  def position(name):
    first, *rest, leaf = name.removeprefix("model.").split(".")
    if first in TOP[kind]:
      return 0, TOP[kind].index(first), 0, 0, leaf == "bias"
    if first.startswith("out"):
      return 3, first == "out_conv", 0, 0, leaf == "bias"
    size, part = rest[0].split("_", 1)
    size = int(size.split("x")[0])
    layer = LAYERS.index(rest[1]) if len(rest) > 1 else 0
    return (
      (first == "dec") + 1,
      size if first == "dec" else -size,
      PARTS[first].index(part),
      layer,
      leaf == "bias",
    )

  shapes = jax.eval_shape(network.init, jax.random.key(0))
  empty = to_edm(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes))
  draw = np.random.RandomState(0).randn
  names = sorted((name for name in empty if "freqs" not in name), key=position)
  values = {name: draw(*empty[name].shape) * 0.1 for name in names}
  values |= {name: draw(*empty[name].shape) * 16 for name in empty if "freqs" in name}
  return jax.tree.map(jnp.asarray, from_edm(network, values))


@pytest.mark.parametrize(
  "precond, make, fields, expected",
  [
    ("edm", ddpmpp, {}, (0.042622, -0.053242, 0.040131)),
    ("vp", ddpmpp, {}, (-1.853645, -5.085399, -1.427606)),
    ("edm", ncsnpp, {}, (-0.100691, -0.169318, -0.033474)),
    ("ve", ncsnpp, dict(encoder="skip", decoder="skip"), (-0.688159, -3.895931, 0.033001)),
    ("edm", adm, dict(model_channels=32), (-0.014966, -0.139302, -0.081400)),
    ("iddpm", adm, dict(model_channels=32, out_channels=6), (-1.893591, -5.023890, -1.105560)),
  ],
)
def test_reference_denoisers_of_every_preconditioning(precond, make, fields, expected):
  setting = dict(
    TINY, image_shape=(16, 16, 3), attention_resolutions=(8,), num_classes=10, num_augment_labels=9
  )
  network = make(**setting | fields)
  r = np.random.RandomState(1)
  x, sigma = r.randn(4, 3, 16, 16), np.array([0.05, 0.5, 3, 20])
  augment = r.randn(4, 9) * 0.5
  denoise = denoisers.Denoiser(
    network,
    denoisers.PRECONDITIONINGS[precond](),
    filled(network, "adm" if make is adm else "song"),
    jax.nn.one_hot(jnp.array([0, 3, 7, 9]), 10),
    jnp.asarray(augment, jnp.float32),
  )
  x = nhwc((x * sigma[:, None, None, None]).astype(np.float32))
  found = jax.jit(lambda d, x, s: d(x, s))(denoise, x, jnp.asarray(sigma, jnp.float32))
  np.testing.assert_allclose(found[2, 5, :3, 1], expected, atol=2e-5)
