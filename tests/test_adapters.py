"""Adapters: bits at the start, what is trained, counts, prompts that are really there, stacks with one backbone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.cdm import weights
from jax_trustdiff.cdm.mixture import Mixture
from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.models.adapters import LoRA, Partial
from jax_trustdiff.models.edm_unet import ddpmpp
from jax_trustdiff.models.registry import num_params
from jax_trustdiff.models.uvit import SIZES, uvit
from jax_trustdiff.types import DiffusionNetwork, InputError

SHAPE = (8, 8, 1)
X, T = jnp.linspace(-1, 1, 128).reshape(2, *SHAPE), jnp.array([1.0, 500.0])


def small_uvit(**more):
  return uvit("tiny", image_shape=SHAPE, **more)


def small_unet():
  return ddpmpp(
    image_shape=SHAPE, model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,)
  )


@pytest.mark.parametrize("make", [small_uvit, small_unet])
def test_fresh_lora_leaves_every_bit(make):
  network = make()
  assert isinstance(LoRA(network), DiffusionNetwork)
  backbone = jax.jit(network.init)(jax.random.key(0))
  adapted = LoRA(network, rank=2)
  variables = adapted.on(backbone, jax.random.key(1))
  plain, found = (jax.jit(n.apply)(v, X, T) for n, v in ((network, backbone), (adapted, variables)))
  np.testing.assert_array_equal(plain, found)
  moved = jax.tree.map(lambda leaf: leaf + 0.05, variables["params"])
  changed = jax.jit(adapted.apply)(variables | {"params": moved}, X, T)
  assert jnp.abs(changed - plain).max() > 1e-3
  exported = adapted.merged(variables | {"params": moved})
  np.testing.assert_array_equal(jax.jit(network.apply)(exported, X, T), changed)
  assert num_params(variables) < num_params(backbone) / 2


def test_lora_is_the_low_rank_product_for_kernels_of_both_kinds():
  network = small_unet()
  backbone = network.init(jax.random.key(0))
  adapted = LoRA(network, rank=3, alpha=6.0)
  variables = adapted.on(backbone, jax.random.key(1))
  params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
  merged = adapted.merged(variables | {"params": params})
  flat = {
    jax.tree_util.keystr(p, simple=True, separator="/"): leaf
    for p, leaf in jax.tree_util.tree_leaves_with_path(backbone["params"])
  }
  seen = set()
  for path, adapter in params.items():
    kernel = flat[path]
    seen.add(kernel.ndim)
    new = merged["params"]
    for part in path.split("/"):
      new = new[part]
    change = np.asarray(new - kernel).reshape(-1, kernel.shape[-1])
    np.testing.assert_allclose(change, 2 * np.asarray(adapter["a"]) @ np.asarray(adapter["b"]), atol=1e-6)
    assert np.linalg.matrix_rank(change, tol=1e-4) <= 3
  assert seen == {2, 4}


def test_lora_targets_and_errors():
  network = small_uvit()
  backbone = network.init(jax.random.key(0))
  only = LoRA(network, targets="attn_qkv/kernel").on(backbone, jax.random.key(0))
  assert sorted(only["params"]) == [
    f"{b}/attn_qkv/kernel" for b in sorted(backbone["params"]) if "block" in b
  ]
  with pytest.raises(InputError, match="no kernel's path matches"):
    LoRA(network, targets="nothing").on(backbone, jax.random.key(0))
  with pytest.raises(InputError, match="rank"):
    LoRA(network, rank=0)


COUNTS = {  # deep prompts of 8 tokens, of one class; and of 256
  "S": (53_248, 1_703_936),
  "M": (104_448, None),
  "L": (172_032, None),
  "H": (267_264, 8_552_448),
}


@pytest.mark.parametrize("size", COUNTS)
def test_counts_of_deep_prompts(size):
  for length, count in zip((8, 256), COUNTS[size], strict=True):
    if count is None:
      continue
    network = uvit(size, image_shape=(32, 32, 4), prompt_length=length)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert shapes["params"]["prompts"].size == count
    plain = jax.eval_shape(uvit(size, image_shape=(32, 32, 4)).init, jax.random.key(0))
    assert num_params(shapes) == num_params(plain) + count


def test_prompts_change_images_and_are_no_outputs():
  plain, prompted = small_uvit(), small_uvit(prompt_length=3)
  variables = prompted.init(jax.random.key(0))
  rest = {name: leaf for name, leaf in variables["params"].items() if name != "prompts"}
  without = plain.apply({"params": rest}, X, T)
  found = prompted.apply(variables, X, T)
  assert found.shape == without.shape and jnp.abs(found - without).max() > 1e-3
  # as good as not there for whoever looks away: with attention that is uniform but for one token, and so on, has no closed form;
  # that they are tokens of every block shows in the gradients
  gradient = jax.grad(lambda p: prompted.apply({"params": rest | {"prompts": p}}, X, T).sum())(
    variables["params"]["prompts"]
  )
  assert gradient.shape == (1, SIZES["tiny"]["depth"] + 1, 3, 64)
  assert (jnp.abs(gradient).max((0, 2, 3)) > 0).all()


def test_an_image_has_the_prompts_of_its_class():
  network = small_uvit(num_classes=3, prompt_length=2, prompts_per_class=True)
  variables = network.init(jax.random.key(0))
  one_hot = jax.nn.one_hot(jnp.array([0, 2]), 3)
  found = network.apply(variables, X, T, one_hot)
  other = jnp.linspace(-1, 1, 64)  # a shift of all channels would not come through the normalisation
  touched = variables["params"]["prompts"].at[1].add(other)
  same = network.apply({"params": variables["params"] | {"prompts": touched}}, X, T, one_hot)
  np.testing.assert_array_equal(found, same)
  touched = variables["params"]["prompts"].at[2].add(other)
  found_other = network.apply({"params": variables["params"] | {"prompts": touched}}, X, T, one_hot)
  np.testing.assert_array_equal(found[0], found_other[0])
  assert jnp.abs(found[1] - found_other[1]).max() > 1e-4
  with pytest.raises(InputError, match="prompts_per_class needs"):
    small_uvit(prompt_length=2, prompts_per_class=True)


def test_a_part_is_trained_on_a_backbone_that_never_had_it():
  plain, prompted = small_uvit(), small_uvit(prompt_length=3)
  backbone = plain.init(jax.random.key(0))
  adapted = Partial(prompted)
  variables = adapted.on(backbone, jax.random.key(1))
  assert list(variables["params"]) == ["prompts"]
  assert variables["backbone"]["params"].keys() == backbone["params"].keys()
  gradient = jax.grad(lambda p: adapted.apply(variables | {"params": p}, X, T).sum())(variables["params"])
  assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])
  whole = adapted.merged(variables)
  np.testing.assert_array_equal(prompted.apply(whole, X, T), adapted.apply(variables, X, T))
  with pytest.raises(InputError, match="backbone lacks"):
    Partial(prompted, "norm").on(backbone, jax.random.key(1))
  with pytest.raises(InputError, match="no parameter's path"):
    Partial(plain, "nothing").on(backbone, jax.random.key(1))


@pytest.mark.parametrize("impl", ["vmap", "map"])
def test_shards_of_adapters_share_one_backbone(impl):
  network = LoRA(small_uvit(), rank=2)
  backbone = network.backbone.init(jax.random.key(0))
  own = []
  for i in range(3):
    params = network.on(backbone, jax.random.key(i))["params"]
    own.append({"params": jax.tree.map(lambda leaf, i=i: leaf + 0.02 * i, params)})
  common = Denoiser(network, EDMPreconditioning(), {"backbone": backbone})
  stacked = cdm_shards.stack(common, own)
  sigma = jnp.array([0.5, 2.0])
  found = Mixture(stacked, weights.Equal(), impl=impl)(X, sigma)
  of_each = [common.with_variables(one)(X, sigma) for one in own]
  np.testing.assert_allclose(found, sum(of_each) / 3, atol=2e-6)
  assert jnp.abs(of_each[0] - of_each[2]).max() > 1e-3
  assert sum(leaf.size for leaf in jax.tree.leaves(stacked.own)) < 0.6 * num_params(backbone)


def test_features_of_the_middle_are_those_the_network_goes_on_from():
  network = small_uvit()
  variables = network.init(jax.random.key(0))
  middle = network.middle(variables, X, T)
  assert middle.shape == (2, 1 + 16, 64)
  # what comes after the middle does not touch it, what comes before does
  changed = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"]["out_block0"])
  same = network.middle({"params": variables["params"] | {"out_block0": changed}}, X, T)
  np.testing.assert_array_equal(middle, same)
  changed = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"]["in_block0"])
  assert (
    jnp.abs(network.middle({"params": variables["params"] | {"in_block0": changed}}, X, T) - middle).max()
    > 0.01
  )
  prompted = dataclasses.replace(network, prompt_length=2)
  whole = Partial(prompted).merged(Partial(prompted).on(variables, jax.random.key(1)))
  assert prompted.middle(whole, X, T).shape == middle.shape
