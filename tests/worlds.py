"""A world with known answers: images from a mixture of isotropic Gaussians, whose denoiser is known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
  """Equal weights, component k with mean[k] (flattened in any one order) and variance[k]; a `DenoiseFn`."""

  mean: jax.Array  # [k d]
  variance: jax.Array  # [k]

  def log_parts(self, x, sigma):
    """log of the density of each component at noise level sigma, up to a constant: [b k]."""
    flat = x.reshape(x.shape[0], -1)
    total = self.variance[None] + jnp.square(sigma)[:, None]
    distance = jnp.square(flat[:, None] - self.mean[None]).sum(-1)
    return -distance / (2 * total) - flat.shape[1] / 2 * jnp.log(total)

  def log_density(self, x, sigma):
    """log p(x; sigma), [b]."""
    constant = jnp.log(len(self.variance)) + x[0].size / 2 * jnp.log(2 * jnp.pi)
    return jax.scipy.special.logsumexp(self.log_parts(x, sigma), axis=1) - constant

  def __call__(self, x, sigma):
    weight = jax.nn.softmax(self.log_parts(x, sigma), axis=1)
    flat, noise = x.reshape(x.shape[0], 1, -1), jnp.square(sigma)[:, None, None]
    parts = (self.variance[:, None] * flat + noise * self.mean) / (self.variance[:, None] + noise)
    return jnp.einsum("bk,bkd->bd", weight, parts).reshape(x.shape)

  def sample(self, key, shape):
    """Clean images [b ...]."""
    choice, noise = jax.random.split(key)
    k = jax.random.randint(choice, shape[:1], 0, len(self.variance))
    flat = jax.random.normal(noise, (shape[0], self.mean.shape[1]))
    return (self.mean[k] + jnp.sqrt(self.variance[k])[:, None] * flat).reshape(shape)
