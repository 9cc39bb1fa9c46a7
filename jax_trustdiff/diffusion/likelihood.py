"""Log-likelihood of every image under a DenoiseFn, by the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, section 4.3).

In EDM convention the ODE is dx/dsigma = (x - D(x; sigma)) / sigma, and by the instantaneous change of variables (Chen et al.
2018, arXiv:1806.07366, theorem 1; Song et al. 2021, appendix D.2), with d values in an image,

    log p(x; sigma_min) = log p(x(sigma_max); sigma_max) + integral of (d - div D(x(sigma); sigma)) / sigma dsigma

from sigma_min to sigma_max. It is the density of x as an image with noise of sigma_min.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import Bytes, DenoiseFn, InputError, PerExample, Sigma, Signed

DEQUANTISATION_KEY = 2**31 - 3  # folded into an image's key: no number of a probe
PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


class Likelihood(NamedTuple):
  """What was found for each image; NaN, but for nfe, where the solver's max_steps did not suffice."""

  log_prob: jax.Array  # [b] log-density at x, in nats, with respect to images in [-1, 1]
  bits_per_dim: jax.Array  # [b] see the function of this name
  nfe: jax.Array  # [b] evaluations of the denoiser, each with its backward passes
  z: jax.Array  # [b h w c] the noise from which the ODE comes to x, x(sigma_max) / sigma_max


@dataclasses.dataclass(frozen=True)
class ODELikelihood:
  """Called as `likelihood(denoise, x, keys)`: the `Likelihood` of every image.

  solver: its `invert` solves the ODE from its sigma_min up to its sigma_max, in an AdaptiveODESampler by steps for every image on
  its own or, `coupled`, for the batch, in an EDMSampler by steps known beforehand. Its error has a sign that all values share,
  so that log_prob is wrong by a multiple of d. Gaussian pixels with variances from 0.001 to 0.7 (and, in brackets, half of
  them constant), exact trace, float32, largest error in nats and mean evaluations:

      rtol = atol    d = 192                       d = 3072
      1e-5           0.03, 109   (0.05, 163)       1.1, 115    (4.4, 163)
      1e-6           0.004, 163  (0.05, 211)       0.07, 169   (0.2, 199)

  1e-6 is the default. In float64 its errors are 0.001 and 0.013 (0.004 and 0.2): much of the rest is rounding of float32. A
  network in bfloat16 is no smoother than its own rounding: with one, 1e-6 took four times the evaluations of 1e-5, for
  differences of 0.01 nats. Data whose noise of sigma_min is nearly all that they vary by need a finer tolerance yet.
  trace: 'hutchinson', the mean of v^T J v over num_probes draws of v, kept throughout the solve, unbiased for log_prob but for
  the solver's error (Grathwohl et al. 2019, arXiv:1810.01367, section 3.1); or 'exact', d backward passes for each evaluation,
  basis_chunk of them at once. (Backward, since not every network has forward-mode derivatives.)
  probe: 'rademacher' or 'gaussian', whose variance is larger. What is estimated is the trace less that of the denoiser of
  N(0, data_std^2), which is known, so that a good data_std also lowers the variance of the second.

  Prior: N(0, sigma_max^2 + data_std^2), where data_std is the root mean square of the data's values. The true density at
  sigma_max is that of the data with noise: against it the log-density of an image with mean m of all data is wrong by about
  |m| / sigma_max nats, at random with mean zero, and that of the second moment is right on average.
  """

  solver: AdaptiveODESampler | EDMSampler = AdaptiveODESampler(rtol=1e-6, atol=1e-6)
  trace: str = "hutchinson"
  num_probes: int = 1
  probe: str = "rademacher"
  data_std: float = 0.5
  basis_chunk: int = 16

  def __post_init__(self):
    for name, value, known in (("trace", self.trace, ("hutchinson", "exact")), ("probe", self.probe, PROBES)):
      if value not in known:
        raise InputError(f"ODELikelihood: unknown {name} {value!r}; known: {', '.join(known)}")
    if min(self.num_probes, self.basis_chunk) < 1 or self.data_std < 0:
      found = f"{self.num_probes}, {self.basis_chunk} and {self.data_std}"
      raise InputError(
        f"ODELikelihood: num_probes and basis_chunk must be at least 1 and data_std at least 0, got {found}"
      )
    if isinstance(self.solver, EDMSampler) and self.solver.churn:
      raise InputError(
        f"ODELikelihood: a sampler with churn {self.solver.churn} draws noise: it has no inverse"
      )

  def __call__(self, denoise: DenoiseFn, x: Signed, keys: Key[Array, "b"] | None = None) -> Likelihood:
    """The likelihood of images in [-1, 1]; keys: one for each image, for the probes. The same bits in
    every batch of one size, and up to rounding in one of another, unless the solver is coupled.

    InputError without keys where probes are drawn.
    """
    batch, size = x.shape[0], math.prod(x.shape[1:])
    flow = _Flow(denoise, self._probes(x, keys), x.shape[1:], self.data_std, self.basis_chunk)
    start = jnp.concatenate([x.reshape(batch, 1, 1, size), jnp.zeros((batch, 1, 1, 1), x.dtype)], -1)
    end, nfe, sigma_min, sigma_max = follow_up(self.solver, flow, start)
    z, excess = end[..., :-1].reshape(x.shape), end[:, 0, 0, -1] * (sigma_max * math.sqrt(size))
    low, high = (sigma**2 + self.data_std**2 for sigma in (sigma_min, sigma_max))
    squares = jnp.square(z).sum((1, 2, 3)) * (sigma_max**2 / high)
    # the divergence of N(0, data_std^2), in closed form, turns log(high) of the prior into log(low)
    log_prob = excess - size / 2 * math.log(2 * math.pi * low) - squares / 2
    return Likelihood(log_prob, bits_per_dim(log_prob, size), nfe, z)

  def _probes(self, x: jax.Array, keys: Any) -> jax.Array | None:
    """[n b h w c], the j-th of an image of its key folded with j; None for the exact trace."""
    return (
      None if self.trace == "exact" else draw_probes("ODELikelihood", self.probe, self.num_probes, x, keys)
    )


class Followed(NamedTuple):
  """Where the ODE led, in units of sigma_max, at what cost, and the noise levels it began and ended at."""

  end: jax.Array
  nfe: jax.Array  # [b]
  sigma_min: float
  sigma_max: float


def follow_up(solver: AdaptiveODESampler | EDMSampler, flow: DenoiseFn, start: jax.Array) -> Followed:
  """The ODE of a flow from `start` [b h w c] at the solver's sigma_min up to its sigma_max, by its `invert`."""
  found = solver.invert(flow, start)
  if not isinstance(solver, EDMSampler):
    return Followed(found.x, found.nfe, solver.sigma_min, solver.sigma_max)
  sigma_max, sigma_min = (float(sigma) for sigma in solver.sigmas[[0, -1]])
  nfe = jnp.full(len(start), solver.nfe - 1, jnp.int32)  # every step but the last, to sigma 0
  return Followed(found, nfe, sigma_min, sigma_max)


def draw_probes(what: str, probe: str, num_probes: int, x: jax.Array, keys: Any) -> Float[Array, "n b h w c"]:
  """Draws of `probe` for a trace, the j-th of an image of its key folded with j; InputError, which names `what`, without keys."""
  if keys is None:
    raise InputError(f"{what}: trace 'hutchinson' draws probes: it needs a key for each image")

  def one(number, key):
    return PROBES[probe](jax.random.fold_in(key, number), x.shape[1:], x.dtype)

  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.arange(num_probes), keys)


def bits_per_dim(log_prob: PerExample, size: int) -> PerExample:
  """-log2 of the probability of a uint8 image for each of its `size` values, from the log-density of its dequantised image.

  With `dequantise`, a level is an interval of 2/256 of [-1, 1]: -log_prob / (size log 2) + 7. The mean over u bounds the code
  length from above (Theis et al. 2016, arXiv:1511.01844).
  """
  return -log_prob / (size * math.log(2)) + 7


def dequantise(images: Bytes, keys: Key[Array, "b"]) -> Signed:
  """2 (images + u) / 256 - 1 with u uniform in [0, 1), float32: images in [-1, 1] with a density.

  keys: one for each image; they may be those of the likelihood's probes. (`to_signed` puts the levels at 2 image / 255 - 1,
  within half a level of these.)
  """

  def one(image, key):
    u = jax.random.uniform(jax.random.fold_in(key, DEQUANTISATION_KEY), image.shape, jnp.float32)
    return 2 * ((image + u) / 256) - 1

  return jax.vmap(one)(images, keys)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class _Flow:
  """The ODE of (x, log-density) as a DenoiseFn: y [b 1 1 d+1] is the flattened image and a running integral.

  A solver moves y by (y - F(y)) / sigma. The last value moves by that of the divergence less that of N(0, data_std^2), which is
  known in closed form, over sqrt(d): a small number, exact in float32, and no less accurate for each pixel than the image.
  """

  denoise: DenoiseFn
  probes: Any  # [n b h w c], or None: exact
  image_shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
  data_std: float = dataclasses.field(metadata={"static": True})
  basis_chunk: int = dataclasses.field(metadata={"static": True})

  def __call__(self, y: Float[Array, "b 1 1 n"], sigma: Sigma) -> Float[Array, "b 1 1 n"]:
    x = y[..., :-1].reshape(-1, *self.image_shape)
    size = math.prod(self.image_shape)
    slope = self.data_std**2 / (self.data_std**2 + jnp.square(sigma))  # of D of the Gaussian, for every value
    found, excess = self._with_excess(x, sigma, slope)
    last = y[:, 0, 0, -1] + excess / math.sqrt(size)
    return jnp.concatenate([found.reshape(-1, 1, 1, size), last[:, None, None, None]], -1)

  def _with_excess(self, x: jax.Array, sigma: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """D and, [b], the trace of its Jacobian less that of slope times the identity, or an estimate."""
    found, pull_back = jax.vjp(lambda x: self.denoise(x, sigma).astype(x.dtype), x)

    def along(v):
      return (v * (pull_back(v)[0] - slope[:, None, None, None] * v)).sum((1, 2, 3))

    if self.probes is not None:
      return found, jax.lax.map(along, self.probes).mean(0)

    def entry(index):
      basis = jnp.zeros(x[0].size, x.dtype).at[index].set(1).reshape(self.image_shape)
      return along(jnp.broadcast_to(basis, x.shape))

    return found, jax.lax.map(entry, jnp.arange(x[0].size), batch_size=self.basis_chunk).sum(0)


LIKELIHOODS = {"ode": ODELikelihood}
