"""U-ViT and its attention against reference values, sizes, and what a network must keep."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff.interop.uvit_names import from_uvit, to_uvit
from jax_trustdiff.models.attention import attention, implementation
from jax_trustdiff.models.registry import forward_flops, num_params
from jax_trustdiff.models.uvit import UViT, _patch_product, uvit
from jax_trustdiff.types import DiffusionNetwork, InputError

SMALL = dict(image_shape=(8, 12, 3), patch_size=4, embed_dim=32, depth=2, num_heads=4)


def load(name):
  golden = dict(np.load(shared_dir("golden", "uvit", f"{name}.npz")))
  config = json.loads(str(golden["config"]))
  network = UViT(
    image_shape=(config["img_size"], config["img_size"], config["in_chans"]),
    num_classes=max(config["num_classes"], 0),
    patch_size=config["patch_size"],
    embed_dim=config["embed_dim"],
    depth=config["depth"],
    num_heads=config["num_heads"],
  )
  state_dict = {
    key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")
  }
  return golden, network, state_dict


@pytest.mark.parametrize("name, count", [("uvit_uncond", 276_100), ("uvit_cond", 276_868)])
def test_reference_outputs(name, count):
  golden, network, state_dict = load(name)
  variables = from_uvit(network, state_dict)
  assert num_params(variables) == count
  assert network == uvit("tiny", image_shape=(32, 32, 3), patch_size=4, num_classes=network.num_classes)
  labels = jax.nn.one_hot(golden["labels"], network.num_classes) if network.num_classes else None
  x, t = jnp.asarray(golden["x"].transpose(0, 2, 3, 1)), jnp.asarray(golden["timesteps"])
  found = jax.jit(network.apply)(variables, x, t, labels)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found.transpose(0, 3, 1, 2), golden["out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["uvit_uncond", "uvit_cond"])
def test_names_go_both_ways(name):
  _, network, state_dict = load(name)
  back = to_uvit(from_uvit(network, state_dict))
  assert back.keys() == state_dict.keys()
  for key, value in state_dict.items():
    np.testing.assert_array_equal(back[key], value.astype(np.float32), err_msg=key)
    assert back[key].flags.c_contiguous

  with pytest.raises(InputError, match=r"left over: more \(3,\)$"):
    from_uvit(network, state_dict | {"more": np.zeros(3)})
  for lost in ("pos_embed", "mid_block.attn.qkv.weight"):
    with pytest.raises(InputError, match=f"missing or of another shape: {lost}; left over: none"):
      from_uvit(network, {key: value for key, value in state_dict.items() if key != lost})
    # a transposed tensor is refused, also where its size is right
    other = {lost: np.ascontiguousarray(state_dict[lost].T)}
    with pytest.raises(InputError, match=f"missing or of another shape: {lost}; left over: {lost}"):
      from_uvit(network, state_dict | other)


def test_names_of_what_the_reference_values_lack():
  """The noise label's layers and the text's, and no last convolution."""
  network = UViT(**SMALL, mlp_time_embed=True, final_conv=False, context_shape=(5, 6))
  shapes = {name: value.shape for name, value in to_uvit(randomised(network)).items()}
  assert shapes["time_embed.0.weight"] == (128, 32) and shapes["time_embed.2.weight"] == (32, 128)
  assert shapes["context_embed.weight"] == (32, 6) and shapes["pos_embed"] == (1, 1 + 5 + 6, 32)
  assert not any(name.startswith(("final_layer", "label_emb")) for name in shapes)


LATENT, LARGE_LATENT, IMAGE = (32, 32, 4), (64, 64, 4), (64, 64, 3)


# The numbers are of the code released with Bao et al. 2023, counted there.
@pytest.mark.parametrize(
  "count, network",
  [
    (44_255_328, uvit("S", image_shape=(32, 32, 3))),
    (44_292_228, uvit("S", image_shape=IMAGE, patch_size=4)),
    (130_940_292, uvit("M", image_shape=IMAGE, patch_size=4, num_classes=1000)),
    (286_827_652, uvit("L", image_shape=IMAGE, patch_size=4, num_classes=1000)),
    (286_763_172, uvit("L", image_shape=LATENT, num_classes=1001)),
    (500_832_016, uvit("H", image_shape=LATENT, num_classes=1001)),
    (286_861_524, uvit("L", image_shape=LARGE_LATENT, patch_size=4, num_classes=1001)),
    (500_942_656, uvit("H", image_shape=LARGE_LATENT, patch_size=4, num_classes=1001)),
    (44_692_644, uvit("S", image_shape=LATENT, context_shape=(77, 768))),
    (58_345_636, uvit("S_deep", image_shape=LATENT, context_shape=(77, 768))),
  ],
)
def test_parameter_counts(count, network):
  assert num_params(jax.eval_shape(network.init, jax.random.key(0))) == count
  assert isinstance(network, DiffusionNetwork) and hash(network) == hash(dataclasses.replace(network))


@pytest.mark.parametrize("size, num_classes", [("S", 0), ("H", 1001)])
def test_flops_are_those_of_the_layers(size, num_classes):
  network = uvit(size, image_shape=LATENT, num_classes=num_classes)
  d, patches = network.embed_dim, 16 * 16
  n = patches + network.num_extras
  block = n * 12 * d * d + 2 * n * n * d  # qkv, proj and MLP; logits and their product with v
  merges = network.depth // 2 * n * 2 * d * d
  ends = 2 * patches * d * 2 * 2 * 4 + (32 * 32 * 9 * 4 * 4 if network.final_conv else 0)
  multiply_adds = (network.depth + 1) * block + merges + ends + num_classes * d
  assert forward_flops(network) == 2 * multiply_adds


def randomised(network, scale=0.1):
  """Variables in which every layer counts; with a larger scale conditions count more."""
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * scale, jnp.float32), shapes)


def inputs(network, batch=3):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(batch, *network.image_shape)), jnp.float32)
  return x, jnp.linspace(0.5, 900.0, batch)


@pytest.mark.parametrize("conditions", [{"num_classes": 3}, {"context_shape": (5, 6)}])
def test_variants_of_computation(conditions):
  """remat changes nothing, bfloat16 little; every parameter has a gradient; images do not see one another."""
  network = UViT(**SMALL, **conditions, mlp_time_embed=True)
  variables, (x, t) = randomised(network), inputs(network)
  labels = jax.nn.one_hot(jnp.arange(3), 3) if network.num_classes else None
  context = jax.random.normal(jax.random.key(2), (3, 5, 6)) if network.context_shape else None

  def run(network):
    def loss(params):
      out = network.apply({"params": params}, x, t, labels, context=context)
      return jnp.square(out).mean(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return out, grads

  out, grads = run(network)
  assert out.shape == x.shape
  assert all(np.abs(g).max() > 0 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
  again, remat_grads = run(dataclasses.replace(network, remat=True))
  np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), remat_grads, grads)
  low, low_grads = run(dataclasses.replace(network, dtype="bfloat16"))
  assert low.dtype == jnp.float32 and all(g.dtype == jnp.float32 for g in jax.tree.leaves(low_grads))
  assert 0 < np.abs(low - out).max() < 0.05 * np.abs(out).max()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(low_grads))
  one = slice(1, 2)
  alone = network.apply(
    variables,
    x[one],
    t[one],
    None if labels is None else labels[one],
    context=None if context is None else context[one],
  )
  np.testing.assert_allclose(alone[0], out[1], rtol=1e-4, atol=1e-5)


def test_patches_are_put_back_where_they_were_taken():
  """Blocks that add nothing, and a head that undoes the patch embedding: the image comes back, also if not square."""
  network = UViT(image_shape=(8, 12, 3), patch_size=4, embed_dim=96, depth=2, num_heads=4, final_conv=False)
  params = jax.tree.map(jnp.zeros_like, randomised(network)["params"])
  # orthonormal columns: a patch becomes (v, -v), whose mean is zero; only the patch's own scale is lost to the norm
  params["patch_embed"]["kernel"] = jnp.concatenate([jnp.eye(48), -jnp.eye(48)], 1).reshape(4, 4, 3, 96)
  params["out_block0"]["skip_linear"]["kernel"] = jnp.concatenate([jnp.eye(96), jnp.zeros((96, 96))])
  params["norm"]["scale"] = jnp.ones(96)
  params["decoder_pred"]["kernel"] = jnp.concatenate([jnp.eye(48), jnp.zeros((48, 48))])
  x, t = inputs(network)
  found = network.apply({"params": params}, x, t)
  tiles = lambda image: np.asarray(image).reshape(3, 2, 4, 3, 4, 3)  # noqa: E731
  size = np.sqrt(np.square(tiles(x)).mean((2, 4, 5), keepdims=True))
  np.testing.assert_allclose(tiles(found) * size, tiles(x), atol=1e-4)


def test_tokens_of_a_text_come_between_the_noise_label_and_the_patches():
  """The order of a text counts by its positions alone: those are rows 1 to 5."""
  network = UViT(**SMALL, context_shape=(5, 6))
  variables, (x, t) = randomised(network, scale=0.3), inputs(network)
  context = jax.random.normal(jax.random.key(2), (3, 5, 6))
  evaluate = lambda positions, context: network.apply(  # noqa: E731
    {"params": variables["params"] | {"pos_embed": positions}}, x, t, context=context
  )
  positions = variables["params"]["pos_embed"]
  moved = positions.at[:, 1:6].set(positions[:, 1:6][:, ::-1])
  out = evaluate(positions, context)
  np.testing.assert_allclose(evaluate(moved, context[:, ::-1]), out, rtol=1e-4, atol=1e-5)
  assert np.abs(evaluate(positions, context[:, ::-1]) - out).max() > 1e-3


def test_label_dropout():
  network = UViT(**SMALL, num_classes=3, label_dropout=0.25)
  variables, (x, t) = randomised(network, scale=0.3), inputs(network)
  labels = jax.nn.one_hot(jnp.arange(3), 3)
  evaluate = jax.jit(lambda labels, key: network.apply(variables, x, t, labels, None, key))
  kept, dropped = evaluate(labels, None), evaluate(None, None)
  np.testing.assert_array_equal(dropped, evaluate(jnp.zeros((3, 3)), None))
  np.testing.assert_array_equal(kept, evaluate(labels, None))
  assert np.abs(kept - dropped).max((1, 2, 3)).min() > 1e-3
  share = []
  for seed in range(100):
    found = evaluate(labels, jax.random.key(seed))
    is_kept = np.abs(found - kept).max((1, 2, 3)) < 1e-5
    assert (is_kept | (np.abs(found - dropped).max((1, 2, 3)) < 1e-5)).all()
    share.extend(is_kept)
  assert 0.65 < np.mean(share) < 0.85  # four standard deviations of 300 draws


def test_initial_values():
  params = UViT(**SMALL | {"embed_dim": 128}, num_classes=50).init(jax.random.key(0))["params"]
  assert np.std(params["in_block0"]["mlp_fc1"]["kernel"]) == pytest.approx(0.02, rel=0.05)
  assert np.std(params["pos_embed"]) == pytest.approx(0.02, rel=0.1)
  assert np.std(params["label_embed"]) == pytest.approx(1, rel=0.05)
  assert not np.any(params["in_block0"]["mlp_fc1"]["bias"])
  for leaf in params["patch_embed"].values():
    assert 0.95 / np.sqrt(48) < np.abs(leaf).max() <= 1 / np.sqrt(48)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"image_shape": (30, 32, 3)}, "divisible by patch_size 4"),
    ({"image_shape": (32, 32, 0)}, "image_shape"),
    ({"depth": 3}, "depth must be even"),
    ({"num_heads": 5}, "num_heads 5"),
    ({"embed_dim": 0}, "embed_dim"),
    ({"context_shape": (77,)}, "context_shape"),
    ({"num_classes": 2, "context_shape": (77, 8)}, "classes or a context"),
    ({"label_dropout": 1.0}, "label_dropout"),
    ({"num_classes": -1}, "num_classes"),
    ({"dtype": "float16"}, "dtype"),
  ],
)
def test_refuses(fields, message):
  with pytest.raises(InputError, match=message) as error:
    UViT(**SMALL | fields)
  assert "\n" not in str(error.value)


def test_refuses_unknown_sizes_and_conditions_it_does_not_take():
  with pytest.raises(InputError, match="tiny, S, S_deep, M, L, H; got 'XL'"):
    uvit("XL", image_shape=(32, 32, 3))
  network = UViT(**SMALL)
  variables, (x, t) = randomised(network), inputs(network)
  with pytest.raises(InputError, match="takes 0 class labels, got 4"):
    network.apply(variables, x, t, jnp.zeros((3, 4)))
  with pytest.raises(InputError, match="no augmentation labels"):
    network.apply(variables, x, t, None, jnp.zeros((3, 9)))
  with pytest.raises(InputError, match="images of shape"):
    network.apply(variables, x[:, :4], t)
  with pytest.raises(InputError, match=r"context of shape \(\), got \(5, 6\)"):
    network.apply(variables, x, t, context=jnp.zeros((3, 5, 6)))
  with pytest.raises(InputError, match=r"context of shape \(5, 6\), got \(\)"):
    UViT(**SMALL, context_shape=(5, 6)).apply(variables, x, t)


@pytest.mark.parametrize("size, stride", [(1, 1), (2, 2), (3, 1), (4, 4)])
def test_convolutions_are_products_of_patches(size, stride):
  x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
  kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 5))
  padding = "SAME" if stride == 1 else "VALID"
  numbers = ("NHWC", "HWIO", "NHWC")
  expected = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)
  found = _patch_product(x, kernel, (stride, stride), padding)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shards_through_vmap_hold_no_grouped_convolution():
  """Which would take several times as long as the convolutions one by one (`benchmark.py:mixture`)."""
  network = uvit("tiny", image_shape=(8, 8, 3), patch_size=2)
  stacked = jax.vmap(network.init)(jax.random.split(jax.random.key(0), 2))
  x, t = jnp.zeros((1, 8, 8, 3)), jnp.ones(1)
  program = str(jax.make_jaxpr(jax.vmap(lambda v: network.apply(v, x, t)))(stacked))
  assert "dot_general" in program and "conv_general_dilated" not in program


@pytest.mark.parametrize("queries, keys", [(5, 7), (300, 290)])  # the second in groups
def test_attention_is_softmax_of_products(queries, keys):
  q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 8)) for i, n in enumerate((queries, keys, keys)))
  weights = np.einsum("bnhd,bmhd->bhnm", q, k, dtype=np.float64) / np.sqrt(8)
  weights = np.exp(weights) / np.exp(weights).sum(-1, keepdims=True)
  expected = np.einsum("bhnm,bmhd->bnhd", weights, v)
  np.testing.assert_allclose(attention(q, k, v), expected, atol=1e-5)
  low = attention(*(a.astype(jnp.bfloat16) for a in (q, k, v)))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=0.05)
  # the sum of the outputs depends on a key's value by the weights that all queries give it
  gradient = jax.grad(lambda v: attention(q, k, v).sum())(v)
  np.testing.assert_allclose(gradient, np.broadcast_to(weights.sum(2).swapaxes(1, 2)[..., None], v.shape), rtol=1e-4)
  assert ("scan" in str(jax.make_jaxpr(attention)(q, k, v))) == (queries == 300)


@pytest.mark.parametrize(
  "dtype, head_dim, capability, expected",
  [
    (jnp.bfloat16, 64, "9.0", "cudnn"),
    (jnp.bfloat16, 72, "8.0", "cudnn"),
    (jnp.bfloat16, 256, "9.0", "cudnn"),
    (jnp.bfloat16, 256, "10.0", "cudnn"),
    (jnp.bfloat16, 256, "8.0", "xla"),
    (jnp.bfloat16, 20, "9.0", "xla"),
    (jnp.bfloat16, 64, "7.5", "xla"),
    (jnp.bfloat16, 64, "gfx942", "xla"),
    (jnp.bfloat16, 64, "", "xla"),
    (jnp.float32, 64, "9.0", "xla"),
  ],
)
def test_where_attention_is_fused(dtype, head_dim, capability, expected):
  assert implementation(dtype, head_dim, capability) == expected
