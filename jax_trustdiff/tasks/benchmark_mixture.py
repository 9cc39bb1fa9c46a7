"""One evaluation of a mixture of shards beside as many evaluations of one network, and beside one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff.cdm import shards, weights
from jax_trustdiff.cdm.mixture import Mixture, RandomShard
from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.models.registry import DIFFUSION_NETWORKS, num_params
from jax_trustdiff.tasks import benchmark_tools as tools
from jax_trustdiff.training.workdir import Workdir


def mixture(
  size: str,
  image_size: int,
  patch_size: int,
  dtype: str,
  num_shards: int,
  at_once: int,
  batch_size: int,
  rounds: int,
  calls_per_round: int,
) -> Callable[[Workdir], dict[str, float]]:
  """D of a mixture of `num_shards` U-ViTs with fixed weights, by each way of running over shards, of `batch_size` RGB images.

  The ways are vmap, vmap_of_<at_once> (`Mixture.at_once`) and map; shard_map wants a mesh. <way>/ratio is its time by that of num_shards
  calls of one compiled network, one after the other, each with the variables of a shard; random/ratio that of `RandomShard` by one call.
  max_difference is the largest one from the mean of those calls.
  """
  tools.check_counts(num_shards=num_shards, at_once=at_once, batch_size=batch_size, rounds=rounds, calls_per_round=calls_per_round)

  def measure(workdir: Workdir) -> dict[str, float]:
    network = DIFFUSION_NETWORKS["uvit"](
      size=size, image_shape=(image_size, image_size, 3), patch_size=patch_size, dtype=dtype
    )
    init = jax.jit(network.init)
    own = [init(jax.random.key(i)) for i in range(num_shards)]
    stacked = shards.stack(Denoiser(network, EDMPreconditioning(), {}), own)
    x = jax.random.normal(jax.random.key(1), (batch_size, *network.image_shape))
    sigma = jnp.linspace(0.1, 10, batch_size)
    evaluate = jax.jit(lambda denoise, x, sigma: denoise(x, sigma))
    single = [stacked.common.with_variables(variables) for variables in own]

    def one_by_one():
      return [evaluate(denoise, x, sigma) for denoise in single]

    mixtures = {
      "vmap": Mixture(stacked, weights.Equal()),
      f"vmap_of_{at_once}": Mixture(stacked, weights.Equal(), at_once=at_once),
      "map": Mixture(stacked, weights.Equal(), impl="map"),
    }
    ours = mixtures | {"random": RandomShard(stacked, jax.random.key(2), uniform=True)}
    programs = {
      name: tools.timed(lambda _, denoise=denoise: (evaluate(denoise, x, sigma),), None)
      for name, denoise in ours.items()
    }
    programs |= {
      "one_by_one": tools.timed(lambda _: (one_by_one(),), None),
      "one": tools.timed(lambda _: (evaluate(single[0], x, sigma),), None),
    }
    seconds = tools.in_turns(programs, rounds, calls_per_round)
    wanted = np.mean([np.asarray(found) for found in one_by_one()], 0)
    figures = {"network/parameters": num_params(own[0])}
    for impl in mixtures:
      figures |= tools.ratio_figures(impl, seconds[impl], seconds["one_by_one"])
      figures[f"{impl}/max_difference"] = float(np.abs(evaluate(ours[impl], x, sigma) - wanted).max())
      figures[f"{impl}/images_per_second"] = batch_size / float(np.median(seconds[impl]))
    return figures | tools.ratio_figures("random", seconds["random"], seconds["one"])

  return measure
