"""Denoisers from files: EDM snapshots of every preconditioning, exports, and state_dicts to start a training from."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir
from test_edm_snapshot import dumps, module, parameter, tensor

import jax_trustdiff
from jax_trustdiff.diffusion.denoisers import PRECONDITIONINGS
from jax_trustdiff.interop import safetensors_io
from jax_trustdiff.interop.edm_names import from_edm, to_edm
from jax_trustdiff.interop.edm_snapshot import read_snapshot
from jax_trustdiff.interop.export import load_classifier, load_export, save_export
from jax_trustdiff.interop.pretrained import load_variables, save_torch
from jax_trustdiff.models.edm_unet import adm, ddpmpp
from jax_trustdiff.models.uvit import uvit
from jax_trustdiff.tasks import denoisers
from jax_trustdiff.types import InputError

IMAGE = (8, 8, 3)
NETWORK = ddpmpp(
  image_shape=IMAGE,
  num_classes=3,
  model_channels=8,
  channel_mult=(1, 2),
  num_blocks=1,
  attention_resolutions=(4,),
)
WIDE = dataclasses.replace(NETWORK, out_channels=6)  # as those of iDDPM
SECTION = dict(name="ddpmpp", model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,))
PRECONDS = {
  "EDMPrecond": dict(sigma_data=0.6),
  "VEPrecond": dict(sigma_max=50.0),
  "VPPrecond": dict(beta_d=18.0, M=500),
  "iDDPMPrecond": dict(M=100, C_2=0.01),
}
SECTIONS = {
  "EDMPrecond": dict(name="edm", sigma_data=0.6),
  "VEPrecond": dict(name="ve", sigma_max=50.0),
  "VPPrecond": dict(name="vp", beta_d=18.0, num_steps=500),
  "iDDPMPrecond": dict(name="iddpm", num_steps=100, c2=0.01),
}


@functools.cache
def randomised(network):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  return jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape) * 0.1), shapes)


def arguments_of(network, **changes):
  size, _, channels = network.image_shape
  found = dict(
    img_resolution=size,
    in_channels=channels,
    out_channels=network.out_channels or channels,
    label_dim=network.num_classes,
    augment_dim=network.num_augment_labels,
    model_channels=network.model_channels,
    channel_mult=list(network.channel_mult),
    num_blocks=network.num_blocks,
    attn_resolutions=list(network.attention_resolutions),
  )
  return found | changes


def snapshot_bytes(network, precond="EDMPrecond", *, dtype=np.float32, buffers=None, own=None, **changes):
  """An EDM snapshot of `network` with the variables of `randomised`."""
  tree = {}
  for name, value in to_edm(randomised(network)).items():
    *path, leaf = name.split(".")
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[leaf] = parameter(value.astype(dtype))

  def modules(node, name="Module", kwargs=None):
    children = {key: modules(child) for key, child in node.items() if isinstance(child, dict)}
    leaves = {key: leaf for key, leaf in node.items() if not isinstance(leaf, dict)}
    return module(name, leaves, modules=children, kwargs=kwargs)

  class_name = "DhariwalUNet" if "Dhariwal" in type(network).__name__ else "SongUNet"
  arguments = arguments_of(network, **changes)
  model = modules(tree["model"], class_name, arguments)
  own = PRECONDS.get(precond, {}) if own is None else own
  outer = {"img_resolution": 8, "img_channels": 3, "label_dim": 3, "use_fp16": True, "model_type": class_name}
  passed = {key: arguments[key] for key in ("model_channels", "channel_mult")}
  buffers = {key: tensor(value) for key, value in (buffers or {}).items()}
  ema = module(precond, buffers=buffers, modules={"model": model}, kwargs=outer | passed | own)
  return dumps({"ema": ema, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}})


def levels(num_steps=100, c1=1e-3, c2=8e-3):
  """u_0, ..., u_M of Karras et al. 2022, table 1, in float32."""
  u = [0.0]
  alpha_bar = lambda j: np.sin(0.5 * np.pi * j / num_steps / (c2 + 1)) ** 2  # noqa: E731
  for j in range(num_steps, 0, -1):
    u.insert(0, np.sqrt((u[0] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), c1) - 1))
  return np.float32(u)


def assert_equal_trees(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


# ------------------------------------------------------------------------------------------------ snapshots


@pytest.mark.floor
def test_a_genuine_snapshot_becomes_its_denoiser():
  folder = shared_dir("golden", "edm_networks")
  path = folder / "snapshot_ddpmpp_edm.pkl"
  golden = np.load(folder / "snapshot_ddpmpp_edm_expected.npz")
  nhwc = lambda name: jnp.asarray(golden[name].transpose(0, 2, 3, 1))  # noqa: E731
  denoise = jax_trustdiff.load_denoiser(path)
  assert denoise.class_labels is None and denoise.preconditioning == PRECONDITIONINGS["edm"]()
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(denoise.variables))
  labels, augment = jnp.asarray(golden["class_labels"]), jnp.asarray(golden["augment_labels"])
  sigma = golden["sigma"]

  @jax.jit
  def both(denoise):
    raw = denoise.network.apply(
      denoise.variables, nhwc("net_input"), jnp.asarray(golden["noise_labels"]), labels, augment
    )
    return raw, denoise(nhwc("x"), jnp.asarray(sigma))

  raw, clean = both(dataclasses.replace(denoise, class_labels=labels, augment_labels=augment))
  np.testing.assert_allclose(raw.transpose(0, 3, 1, 2), golden["F"], rtol=0, atol=2e-5)
  error = np.abs(clean.transpose(0, 3, 1, 2) - golden["D"]).max((1, 2, 3))
  assert (error <= 2e-5 * np.maximum(1, sigma)).all(), error

  said = denoisers.describe(path)
  assert (said["image_shape"], said["num_classes"]) == ((16, 16, 3), 10)
  assert said["class_names"] is said["sampler"] is None and said["dataset"]["use_labels"] is True
  assert said["model"]["dropout"] == 0.13 and said["denoiser"] == {"name": "edm"}


@pytest.mark.parametrize("precond, dtype", [*((p, np.float32) for p in PRECONDS), ("EDMPrecond", np.float16)])
def test_snapshots_of_every_preconditioning(tmp_path, precond, dtype):
  network, buffers = NETWORK, {}
  if precond == "iDDPMPrecond":
    network, buffers = WIDE, {"u": levels(c2=0.01)}
  path = tmp_path / "x.pkl"
  path.write_bytes(snapshot_bytes(network, precond, dtype=dtype, buffers=buffers))
  found = denoisers.load_denoiser(path)
  wanted = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), randomised(network))
  assert_equal_trees(found.variables, wanted)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found.variables))
  assert dataclasses.replace(found.network, dropout=0.0) == network
  assert denoisers.describe(path)["denoiser"] == SECTIONS[precond]
  assert found.preconditioning == denoisers.build_preconditioning(SECTIONS[precond])
  assert found.preconditioning != PRECONDITIONINGS[SECTIONS[precond]["name"]]()


def test_a_snapshot_of_adm(tmp_path):
  network = adm(
    image_shape=IMAGE, num_classes=3, model_channels=32, channel_mult=(1, 2), num_blocks=1, dropout=0.1
  )
  (tmp_path / "x.pkl").write_bytes(snapshot_bytes(network))
  snapshot = read_snapshot(tmp_path / "x.pkl")
  assert snapshot.network == network
  assert_equal_trees(snapshot.variables, randomised(network))


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(precond="ODEPrecond"), "unknown preconditioning ODEPrecond; known: EDMPrecond, "),
    (dict(own={"sigma": 1}), "EDMPrecond: unknown argument sigma; known: "),
    (dict(own={"sigma_data": "0.5"}), "sigma_data must be a number"),
    (dict(own={"sigma_data": float("nan")}), "sigma_data must be a number"),
    (dict(precond="VPPrecond", own={"M": 2**60}), "M must be a whole number from 1 to 100000"),
    (dict(buffers={"u": levels()}), r"left over: u \(101,\)"),
    (dict(precond="iDDPMPrecond", buffers={"u": levels(c2=0.02)}), "noise levels 'u' are not those"),
    (dict(precond="iDDPMPrecond", buffers={"u": levels(99, c2=0.01)}), "noise levels 'u' are not those"),
    (dict(flash=True), "SongUNet: unknown argument flash; known: "),
    (dict(img_resolution=0), "img_resolution, in_channels and out_channels must be positive"),
    (dict(model_channels=2**40), "make no network|missing or of another shape"),
    (dict(model_channels=2**70), "make no network|missing or of another shape"),
    (dict(model_channels=8.0), "make no network|missing or of another shape"),
    (dict(num_blocks=10**9), "more blocks than there are tensors"),
    (dict(num_blocks="1"), "more blocks than there are tensors, or no number"),
    (dict(channel_mult=[1] * 500), "channel_mult has 500 values, more than 32"),
    (dict(resample_filter=[1] * 9000), "resample_filter has 9000 values"),
    (dict(channel_mult=2), "or no number of blocks"),
    (dict(label_dim="a"), "make no network"),
    (dict(embedding_type="sinus"), "embedding must be one of"),
    (dict(attn_resolutions=[]), "left over: .*qkv"),
  ],
)
def test_a_snapshot_that_makes_no_denoiser_is_one_line(tmp_path, changes, message):
  path = tmp_path / "x.pkl"
  path.write_bytes(snapshot_bytes(NETWORK, **changes))
  with pytest.raises(InputError, match=message) as caught:
    denoisers.load_denoiser(path)
  assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- names


def test_doubled_names_and_stray_noise_levels_are_refused():
  state_dict = to_edm(randomised(WIDE))
  bare = {name.removeprefix("model."): value for name, value in state_dict.items()}
  assert_equal_trees(from_edm(WIDE, bare), randomised(WIDE))
  name = "map_layer0.bias"
  with pytest.raises(InputError, match=f"with and without 'model.': {name}$"):
    from_edm(WIDE, state_dict | {name: bare[name]})
  with_levels = state_dict | {"u": levels()}
  with pytest.raises(InputError, match=r"left over: u \(101,\)"):
    from_edm(WIDE, with_levels)
  assert_equal_trees(from_edm(WIDE, with_levels, iddpm_levels=True), randomised(WIDE))
  with pytest.raises(InputError, match="left over: u"):  # not a part of the raw network
    from_edm(WIDE, state_dict | {"model.u": levels()}, iddpm_levels=True)


# ------------------------------------------------------------------------------------------------- exports


@pytest.mark.floor
def test_an_export_comes_back_as_the_same_denoiser(tmp_path):
  network = denoisers.build_network(SECTION, IMAGE, 3, 0)
  assert network == NETWORK
  model = denoisers.model_section(SECTION, network)
  denoiser = dict(name="edm", sigma_data=0.4, sigma_min=0.0, sigma_max=float("inf"))
  extra = {
    "class_names": ["a", "b", "c"],
    "sampler": {"name": "edm", "num_steps": 18},
    "metrics": {"fid": 3.5},
  }
  denoisers.save_denoiser(tmp_path, model, denoiser, randomised(network), extra)
  json.loads((tmp_path / "model.json").read_text(), parse_constant=lambda name: pytest.fail(name))

  found = jax_trustdiff.load_denoiser(tmp_path)
  assert found.network == network and found.class_labels is None
  assert found.preconditioning == PRECONDITIONINGS["edm"](sigma_data=0.4)
  assert_equal_trees(found.variables, randomised(network))
  said = denoisers.describe(tmp_path)
  assert said["class_names"] == ("a", "b", "c") and said["image_shape"] == IMAGE and said["num_classes"] == 3
  assert said["sampler"] == extra["sampler"] and said["metrics"] == {"fid": 3.5}
  assert load_export(tmp_path)[0] == network
  with pytest.raises(InputError, match="holds a diffusion model .ddpmpp., no classifier"):
    load_classifier(tmp_path)


@pytest.mark.parametrize(
  "section",
  [
    dict(name="ncsnpp", model_channels=8, channel_mult=(1, 2), num_blocks=1),
    dict(name="adm", model_channels=8, channel_mult=(1, 2), num_blocks=1, out_channels=6),
    dict(name="uvit", size="tiny", patch_size=4, depth=2, embed_dim=None),
  ],
)
def test_every_network_is_built_and_exported_by_its_section(tmp_path, section):
  network = denoisers.build_network(section, IMAGE, 3)
  model = denoisers.model_section(section, network)
  denoisers.save_denoiser(tmp_path, model, {"name": "ve"}, randomised(network))
  found = denoisers.load_denoiser(tmp_path)
  assert found.network == network and found.preconditioning == PRECONDITIONINGS["ve"]()
  assert_equal_trees(found.variables, randomised(network))


def test_what_is_no_diffusion_model_is_one_line(tmp_path):
  classifier = dict(name="wide_resnet", depth=10, width=1, num_classes=2, image_shape=(8, 8, 3))
  from jax_trustdiff.models.registry import MODELS

  arguments = {key: value for key, value in classifier.items() if key != "name"}
  save_export(tmp_path / "classifier", classifier, randomised(MODELS["wide_resnet"](**arguments)))
  model = denoisers.model_section(SECTION, NETWORK)
  save_export(tmp_path / "bare", model, randomised(NETWORK))
  save_export(tmp_path / "other", model, randomised(NETWORK), {"denoiser": {"name": "edn"}})
  save_export(tmp_path / "key", model, randomised(NETWORK), {"denoiser": {"name": "edm", "sigma": 1}})
  for name, message in {
    "classifier": r"holds a classifier \(wide_resnet\), no diffusion model",
    "bare": "model.json needs 'denoiser': {'name': one of edm, ",
    "other": "unknown name 'edn' .did you mean 'edm'",
    "key": "'edm' does not take 'sigma'",
    "absent": "no export in",
    "absent.pkl": "no such file; expected an EDM snapshot",
  }.items():
    with pytest.raises(InputError, match=message) as caught:
      denoisers.load_denoiser(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
  with pytest.raises(InputError, match="'uvit' takes no augmentation labels"):
    denoisers.build_network({"name": "uvit"}, IMAGE, 0, 9)
  with pytest.raises(InputError, match="unknown name 'ddpm'"):
    denoisers.build_network({"name": "ddpm"}, IMAGE, 0)
  with pytest.raises(InputError, match="did you mean 'model_channels'"):
    denoisers.build_network({"name": "ddpmpp", "model_channel": 8}, IMAGE, 0)
  with pytest.raises(InputError, match="infinite"):
    denoisers.save_denoiser(
      tmp_path / "x", model, dict(name="ve", sigma_max=float("inf")), randomised(NETWORK)
    )
  assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------ to start a training from


@pytest.mark.parametrize(
  "network", [NETWORK, uvit("tiny", image_shape=IMAGE, num_classes=3, depth=2)], ids=["edm", "uvit"]
)
def test_a_file_for_torch_comes_back(tmp_path, network):
  save_torch(tmp_path / "x.safetensors", network, randomised(network))
  found, section = load_variables(tmp_path / "x.safetensors", network)
  assert section is None
  assert_equal_trees(found, randomised(network))
  if network is NETWORK:
    assert "model.enc.8x8_block0.conv0.weight" in safetensors_io.load_flat(tmp_path / "x.safetensors")
  else:
    assert "in_blocks.0.attn.qkv.weight" in safetensors_io.load_flat(tmp_path / "x.safetensors")


def test_variables_of_snapshots_exports_and_iddpm(tmp_path):
  path = tmp_path / "x.pkl"
  path.write_bytes(snapshot_bytes(NETWORK, dropout=0.3))
  found, section = load_variables(path, dataclasses.replace(NETWORK, dtype="bfloat16", label_dropout=0.1))
  assert_equal_trees(found, randomised(NETWORK))
  assert section["dropout"] == 0.3
  with pytest.raises(InputError, match="num_classes is 3 there, 0 here$"):
    load_variables(path, dataclasses.replace(NETWORK, num_classes=0))
  model = denoisers.model_section(SECTION, NETWORK)
  denoisers.save_denoiser(tmp_path / "export", model, {"name": "edm"}, randomised(NETWORK))
  found, section = load_variables(tmp_path / "export", NETWORK)
  assert_equal_trees(found, randomised(NETWORK))
  assert section["name"] == "ddpmpp"
  with pytest.raises(InputError, match="SongUNet there, UViT here$"):
    load_variables(tmp_path / "export", uvit("tiny", image_shape=IMAGE))

  safetensors_io.save_flat(tmp_path / "u.safetensors", to_edm(randomised(WIDE)) | {"u": levels()})
  assert_equal_trees(load_variables(tmp_path / "u.safetensors", WIDE)[0], randomised(WIDE))
  safetensors_io.save_flat(tmp_path / "u.safetensors", to_edm(randomised(NETWORK)) | {"u": levels()})
  with pytest.raises(InputError, match=r"u.safetensors: .*left over: u \(101,\)"):
    load_variables(tmp_path / "u.safetensors", NETWORK)


# ---- samplers for a denoiser ----


def test_a_sampler_visits_the_levels_that_an_iddpm_network_knows():
  """The range of the preconditioning is in single precision: no level of its table may be lost by that."""
  iddpm = denoisers.build_preconditioning({"name": "iddpm"})
  levels = iddpm.process.sigmas
  sampler = denoisers.build_sampler(
    {"name": "edm", "discretization": "iddpm", "sigma_min": 1e-4, "sigma_max": 1e6}, iddpm
  )
  np.testing.assert_allclose(sampler.sigmas[[0, -1]], levels[[-1, 0]], rtol=1e-9)
  assert np.isin(sampler.sigmas, levels).all()


@pytest.mark.parametrize(
  "name, preconditioning, message",
  [
    ("predictor_corrector", "ve", "choose sampler.process to fit"),
    ("euler_maruyama", "iddpm", "cannot round"),
    ("adaptive_ode", "iddpm", "'adaptive_ode' cannot round; .* whole_times=False"),
  ],
)
def test_a_sampler_of_other_levels_is_refused(name, preconditioning, message):
  with pytest.raises(InputError, match=message):
    denoisers.build_sampler({"name": name}, denoisers.build_preconditioning({"name": preconditioning}))


def test_a_model_of_whole_times_is_told_times_in_between_where_that_is_asked_for():
  between = denoisers.build_preconditioning({"name": "iddpm", "whole_times": False})
  sampler = denoisers.build_sampler({"name": "adaptive_ode"}, between)
  assert (sampler.sigma_min, sampler.sigma_max) == (between.process.sigmas[0], 80.0)
  assert denoisers.build_sampler({"name": "edm"}, between).round_to == ""


def test_a_sampler_that_rounds_to_other_levels_is_refused():
  section = {"name": "ancestral", "discretization": "table", "round_to": "discrete"}
  with pytest.raises(InputError, match="sampler.round_to is Discrete.*and the model knows IDDPM"):
    denoisers.build_sampler(section, denoisers.build_preconditioning({"name": "iddpm"}))
  preconditioning = denoisers.build_preconditioning({"name": "discrete", "whole_times": True})
  assert np.isin(
    denoisers.build_sampler(section, preconditioning).sigmas, preconditioning.process.sigmas
  ).all()


@pytest.mark.parametrize(
  "section, message",
  [
    ({"name": "edm", "rho": 0.0}, "rho must be positive"),
    ({"name": "edm", "discretization": "iddpm", "sigma_min": 3e4, "sigma_max": 4e4}, "no two noise levels"),
  ],
)
def test_levels_that_cannot_be_are_one_line(section, message):
  with pytest.raises(InputError, match=message):
    denoisers.build_sampler(section, denoisers.build_preconditioning({"name": "edm"}))
