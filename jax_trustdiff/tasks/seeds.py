"""One run, or one for each of several seeds with the mean and the interval of every metric."""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from jax_trustdiff import config as config_lib
from jax_trustdiff.evaluation import statistics
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import LEAVES, READS, State, Workdir
from jax_trustdiff.types import InputError


def complete(task: types.ModuleType, config, workdir: Workdir) -> dict[str, float]:
  """The metrics of a task for one or several seeds, by `Workdir.complete`: what the command line does."""
  states = states_of(task, config)
  return workdir.complete(lambda: run(task.run, config, workdir, states), **states)


def states_of(task: Any, config) -> dict[str, State]:
  """The `reads` and `leaves` of `Workdir.complete` that a task has: its functions of these names, of a config."""
  names = [name for name in (READS, LEAVES) if hasattr(task, name)]
  return {name: functools.partial(getattr(task, name), config) for name in names}


def run(
  task: Callable[..., dict[str, float]], config, workdir: Workdir, states: Mapping[str, State] | None = None
) -> dict[str, float]:
  """The metrics of `task(config, workdir)`; with config.seeds = '0,1,2' those of seed-0/, seed-1/, seed-2/ together.

  Then every metric is the mean over the seeds and '<metric>/interval' the half-width of its 95 % Student interval.
  Each seed is a run of its own in workdir/seed-<seed>, with its own result.json; finished ones are not run again.
  states: see `states_of`.
  """
  if config.seeds and "sweep_seeds" in config:
    raise InputError(
      "config key 'seeds' is for single runs; the seeds of a sweep's rows are config.sweep_seeds"
    )
  seeds = config_lib.parse_seeds(config.seeds, config.seed)
  if len(seeds) == 1:
    if config.seeds:
      raise InputError(
        f"config key 'seeds' names several seeds, found {config.seeds!r}; for one set config.seed"
      )
    return task(config, workdir)
  results = []
  for seed in seeds:
    part = config_lib.from_plain(config_lib.to_plain(config) | {"seed": seed, "seeds": ""})
    folder = workdir.sub(f"seed-{seed}", part)
    found = folder.complete(
      lambda seed=seed, part=part, folder=folder: _one(task, seed, part, folder), **(states or {})
    )
    results.append(found)
  workdir.open()
  metrics = {}
  shared = [name for name in results[0] if all(name in result for result in results)]
  if lost := sorted({name for result in results for name in result} - set(shared)):
    say(f"not all seeds have {', '.join(lost)}: left out")
  for name in shared:
    mean, half_width = statistics.mean_interval([float(r[name]) for r in results])
    metrics |= {name: mean, f"{name}/interval": half_width}
  return metrics


def _one(task, seed: int, part, folder: Workdir) -> dict[str, float]:
  say(f"seed {seed}")
  return task(part, folder)
