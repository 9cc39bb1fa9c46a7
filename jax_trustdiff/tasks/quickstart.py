"""A diffusion model and classifiers trained with several objectives, on the same data, reported on one page."""

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.tasks import classifiers, reports, train_classifier, train_diffusion
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir

GENERATOR = "diffusion"


def run(config, workdir: Workdir) -> dict[str, float]:
  """One run of `train_classifier` in workdir/<name> for each of config.objectives, and one of `train_diffusion`.

  config.diffusion is the whole config of the last, in workdir/diffusion. Returns the metrics as '<name>/<metric>'. A run
  that has finished is not run again.
  """
  metrics = {}
  parts = {name: _part(config, name) for name in config.objectives}
  parts[GENERATOR] = config_lib.from_plain(config_lib.to_plain(config.diffusion) | {"seed": config.seed})
  for name, part in parts.items():
    folder = workdir.sub(name, part)
    found = folder.complete(lambda part=part, folder=folder, name=name: _train(name, part, folder))
    metrics |= {f"{name}/{key}": value for key, value in found.items()}
  if parallel.is_main_process():
    workdir.open()
    attack = classifiers.attack_name(config.eval.attack)
    reports.quickstart_report(config, workdir, tuple(config.objectives), attack, metrics)
  return metrics


def _train(name: str, part, folder: Workdir) -> dict[str, float]:
  if name == GENERATOR:
    say(f"{name}: training {part.model.name} to generate images")
    return train_diffusion.run(part, folder)
  say(f"{name}: training {part.model.name} with objective {part.objective.name!r}")
  return train_classifier.run(part, folder)


def _part(config, name: str):
  """The config of one classifier's training: the objective `name` in place of all of them."""
  plain = config_lib.to_plain(config)
  objectives, _ = plain.pop("objectives"), plain.pop("diffusion")
  return config_lib.from_plain(plain | {"task": "train_classifier", "objective": objectives[name]})
