"""The same network trained with several objectives on the same data, evaluated and reported side by side."""

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.tasks import classifiers, reports, train_classifier
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir


def run(config, workdir: Workdir) -> dict[str, float]:
  """One run of `train_classifier` in workdir/<name> for each of config.objectives.

  Returns their metrics as '<name>/<metric>'. A run that has finished is not run again.
  """
  metrics = {}
  for name in config.objectives:
    part = _part(config, name)
    folder = workdir.sub(name, part)
    found = folder.complete(lambda part=part, folder=folder, name=name: _train(name, part, folder))
    metrics |= {f"{name}/{key}": value for key, value in found.items()}
  if parallel.is_main_process():
    workdir.open()
    attack = classifiers.attack_name(config.eval.attack)
    reports.comparison_report(config, workdir, tuple(config.objectives), attack, metrics)
  return metrics


def _train(name: str, part, folder: Workdir) -> dict[str, float]:
  say(f"{name}: training {part.model.name} with objective {part.objective.name!r}")
  return train_classifier.run(part, folder)


def _part(config, name: str):
  """The config of one training run: the objective `name` in place of all of them."""
  plain = config_lib.to_plain(config)
  objectives = plain.pop("objectives")
  return config_lib.from_plain(plain | {"task": "train_classifier", "objective": objectives[name]})
