"""Clean accuracy, PGD and AutoAttack of a classifier that is given, with a record of every image.

AutoAttack (Croce and Hein 2020, arXiv:2003.01690) goes on exactly where it was cut off: what every chunk of images gave is kept
in workdir/journal until the result is written.
"""

import fractions
import shutil
import zlib

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.attacks import autoattack
from jax_trustdiff.data import records, sources
from jax_trustdiff.evaluation import statistics
from jax_trustdiff.interop import robustbench
from jax_trustdiff.models.registry import bind
from jax_trustdiff.tasks import classifiers, reports
from jax_trustdiff.tasks.journal import FolderJournal
from jax_trustdiff.training.progress import ProgressReport, say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, to_unit

JOURNAL = "journal"
ADVERSARIAL = "adversarial.npz"


def run(config, workdir: Workdir) -> dict[str, float]:
  """clean_accuracy, <pgd>_accuracy, autoattack_accuracy with its interval, and what was left after every attack.

  worst_case_accuracy counts an image that PGD or AutoAttack broke as broken; radius_<r>/accuracy is that under PGD with r times
  the radius; recomputed_accuracy is that of predictions on the images of workdir/adversarial.npz. result.json also has
  'examples', a record of every image, and 'warnings'.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  source = config_lib.build(sources.SOURCES, config.data, split=config.eval.split)
  if config.eval.num_test:
    source = records.limit(source, config.eval.num_test)
  network, variables, names = classifiers.load_classifier(config, source)
  evaluator = classifiers.Evaluator(
    network, source, config.eval.attack, config.eval.batch_size, mesh, config.seed
  )
  attack = _autoattack(config, network, mesh)
  entry = _leaderboard_entry(config)
  reports.check(config)

  workdir.open()
  pgd = classifiers.attack_name(config.eval.attack)
  verdicts = evaluator(variables, f"image ({pgd})")
  metrics = {"num_images": len(source), "clean_accuracy": float(verdicts.clean.mean())}
  metrics[f"{pgd}_accuracy"] = float(verdicts.robust.mean())
  curve = _against_radius(config, evaluator, variables, verdicts)
  metrics |= {f"radius_{times:g}/accuracy": accuracy for times, accuracy in curve.items() if times}

  result = _run_autoattack(config, workdir, attack, network, variables, source)
  robust, n = int(result.robust.sum()), len(source)
  low, high = statistics.binomial_interval(robust, n)
  metrics |= {"autoattack_accuracy": robust / n, "autoattack_low": low, "autoattack_high": high}
  metrics["worst_case_accuracy"] = float((result.robust & verdicts.robust).mean())
  metrics |= {f"after_{name}_accuracy": float(flags.mean()) for name, flags in result.after.items()}
  metrics["recomputed_accuracy"] = float((result.prediction == source.labels).mean())
  if entry is not None:
    metrics |= robustbench.compare(entry, metrics["clean_accuracy"], metrics["autoattack_accuracy"])
  for name, value in (("examples", _examples(source, verdicts, pgd, result)), ("warnings", result.warnings)):
    workdir.record(name, value)
  workdir.record("standard", result.standard)
  if parallel.is_main_process():
    np.savez(workdir / ADVERSARIAL, id=source.ids, image=result.x_adv)
    reports.robustness_report(config, workdir, names, source, result, pgd, curve, entry, metrics)
    workdir.write_result(metrics)
    shutil.rmtree(workdir / JOURNAL, ignore_errors=True)
  return metrics


def _autoattack(config, network, mesh) -> autoattack.AutoAttack:
  section, other = config.attack, config.eval.attack
  if (section.norm, section.radius) != (other.norm, other.radius):
    raise InputError(
      f"attack is {section.norm} {section.radius:g} and eval.attack {other.norm} {other.radius:g}: give both one norm and radius"
    )
  attacks: str | dict = section.version
  if section.version == "custom" or section.num_steps or section.num_queries:
    base = "plus" if section.version == "custom" else section.version
    known = autoattack.attacks_of(base, section.norm, section.radius, network.num_classes)
    chosen = tuple(known) if section.version != "custom" else section.attacks
    attacks = autoattack.choose(known, chosen, section.num_steps, section.num_queries)
  elif section.attacks:
    raise InputError(f"attack.attacks is for attack.version='custom', found {section.version!r}")
  return autoattack.AutoAttack(
    section.norm,
    section.radius,
    attacks,
    chunk_size=config.eval.batch_size,
    mesh=mesh,
    fetch=parallel.gather_to_host,
    warn=lambda line: say(f"warning: {line}"),
  )


def _leaderboard_entry(config) -> dict | None:
  section = config.robustbench
  if not section.leaderboard:
    if section.entry:
      raise InputError("robustbench.entry needs robustbench.leaderboard, the JSON file of entries")
    return None
  entry = robustbench.entry(section.leaderboard, section.dataset, section.threat, section.entry)
  radius = float(fractions.Fraction(entry["eps"].replace(" ", "")))
  if section.threat.lower() != config.attack.norm or abs(radius - config.attack.radius) > 1e-6:
    raise InputError(
      f"the entry {entry['id']} is of {section.threat} {entry['eps']}, and attack of {config.attack.norm} {config.attack.radius:g}"
    )
  return entry


def _against_radius(config, evaluator, variables, verdicts) -> dict[float, float]:
  """{times the radius: accuracy under PGD}, clean and the radius itself among them."""
  curve = {0.0: float(verdicts.clean.mean()), 1.0: float(verdicts.robust.mean())}
  for times in config.eval.radii:
    if times not in curve:
      found = evaluator(variables, f"image ({times:g} times the radius)", times)
      curve[float(times)] = float(found.robust.mean())
  return dict(sorted(curve.items()))


def _run_autoattack(config, workdir, attack, network, variables, source) -> autoattack.Result:
  key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"autoattack"))
  float32 = bind(classifiers.in_float32(network), variables)
  fast = bind(network, variables) if config.eval.fast_attack else None
  journal = FolderJournal(workdir / JOURNAL)
  x = np.asarray(to_unit(np.asarray(source.images)), np.float32)
  with ProgressReport("image", len(x)) as progress:  # of the work on all of them

    def advance(seen: autoattack.Advance):
      note = f"{seen.attack}: {seen.robust} of {len(x)} not broken"
      progress.update(round(len(x) * seen.done / seen.total), note)

    return attack(
      float32, x, source.labels, key, ids=source.ids, attack_fn=fast, journal=journal, progress=advance
    )


def _examples(source, verdicts, pgd: str, result: autoattack.Result) -> dict[str, list]:
  """One list for each column, of the images in their order."""
  attacks = list(result.after)
  reasons = {autoattack.NOT_BROKEN: "", autoattack.WRONG: "clean"} | dict(enumerate(attacks))
  return {
    "id": source.ids.tolist(),
    "label": source.labels.tolist(),
    "clean": result.clean.tolist(),
    f"{pgd}_robust": verdicts.robust.tolist(),
    "robust": result.robust.tolist(),
    "broken_by": [reasons[number] for number in result.broken_by.tolist()],
    "evaluations": result.when.tolist(),
    "prediction": result.prediction.tolist(),
  }
