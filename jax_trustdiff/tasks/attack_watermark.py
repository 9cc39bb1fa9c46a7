"""How much of a mark is left after attacks: on the weights of the model, on how it is sampled, on its images.

Zhao et al. 2023 (arXiv:2303.10137, section 4.2, tables 2 and 3, figure 5) put noise on weights and images and change the number of steps;
An et al. 2024 (WAVES, arXiv:2401.08573) distort and regenerate. After every attack there is the verdict of `detect_watermark` on all
images together, with its exact p-value, beside the bit accuracy of single ones.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, records, sources
from jax_trustdiff.data.pseudo_labels import fingerprint as of_images
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.evaluation import image_attacks, report, statistics
from jax_trustdiff.tasks import (
  codecs,
  denoisers,
  detect_watermark,
  generation_metrics,
  reports,
  store_writing,
)
from jax_trustdiff.tasks.journal import FolderJournal
from jax_trustdiff.tasks.sampling import image_keys, quantise
from jax_trustdiff.training.progress import ProgressReport, say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, to_signed, to_unit
from jax_trustdiff.watermark import detection, removal
from jax_trustdiff.watermark.codec import BoundCodec
from jax_trustdiff.watermark.keys import WatermarkKey

JOURNAL, TABLE = "journal", "table.md"
REGENERATE = 2**31 - 5  # folded into an image's key: no number of a step, and not that of any other draw
NONE = "none"
SAMPLER_ATTACKS = ("steps", "euler_steps", "churn")  # they change the sampler
OF_IMAGES = (*image_attacks.KINDS, "regenerate", "flip_bits")
OF_MODEL = (*removal.WEIGHT_ATTACKS, *SAMPLER_ATTACKS)


@dataclasses.dataclass(frozen=True)
class Attack:
  """One attack with one strength; 'none' has strength 0."""

  kind: str
  strength: float

  def __str__(self) -> str:
    return self.kind if self.kind == NONE else f"{self.kind}_{self.strength:g}"


def run(config, workdir: Workdir) -> dict[str, float]:
  """Attacks by attack, each kept once it is done, and returns for each, as <attack>_<strength>/...:

  bit_accuracy of single images; matches and p of all together; detected_share, the part of single ones that reach the threshold of
  detect.false_positive_rate; psnr to the images that were not attacked, where the attack is on images; and fid, or pixel_fid, to
  config.reference where one is given. 'none/...' is what was there before.
  """
  mesh = parallel.make_local_mesh()
  section = config.detect
  codec = codecs.load_or_make(config, config.codec, "codec")
  codebook, key = detect_watermark.load_keys(config, codec)
  if key is None:
    raise InputError("attacks are measured with one string: give key.file or key.demo")
  needed = detection.threshold(codebook.shape[1], section.false_positive_rate)
  parallel.check_batch(section.batch_size, mesh)
  reports.check(config)
  if section.num_images < 2:
    raise InputError(f"detect.num_images must be at least 2, found {section.num_images}")
  attacks = _attacks(config)
  images = _Images(config, attacks, codec, key, mesh)
  reference = _reference(config, images.number, images.shape)
  extract = generation_metrics.build_extractor(config.metrics, mesh) if reference is not None else None

  workdir.open()
  journal = _journal(workdir, codec, key, images, reference)
  statistics_of_reference = extract(reference, "reference image") if reference is not None else None
  found, shown = {}, {}
  with ProgressReport("attack", len(attacks)) as progress:
    for i, attack in enumerate(attacks):
      known = journal.get(str(attack))
      if known is None:
        known = _one(config, attack, images, codec, extract, statistics_of_reference, mesh)
        journal.put(str(attack), known)
      found[attack] = _summary(known, codebook[0], needed)
      shown[attack] = known["shown"]
      progress.update(i + 1, f"{attack}: {found[attack]['bit_accuracy']:.1%} of the bits")
  metrics = {
    f"{attack}/{name}": value
    for attack, of_attack in found.items()
    for name, value in of_attack.items()
    if name != "interval"
  }
  if parallel.is_main_process():
    _report(config, workdir, found, shown, images.number, codebook.shape[1], needed, key)
  return metrics


def _journal(
  workdir: Workdir,
  codec: BoundCodec,
  key: WatermarkKey,
  images: "_Images",
  reference: records.ImageSource | None,
) -> FolderJournal:
  """What is done is kept for these very networks, images and key; for the owner's eyes, since logits tell the key."""
  what = [codecs.fingerprint(codec), key.key_id, *images.fingerprint()]
  what += [] if reference is None else [of_images(reference)]
  folder = workdir / f"{JOURNAL}-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"
  if parallel.is_main_process():
    folder.mkdir(mode=0o700, exist_ok=True)
  parallel.barrier("folder of the journal")
  return FolderJournal(folder)


def _attacks(config) -> list[Attack]:
  """What config.attacks asks for, each checked, and first none."""
  found = [Attack(NONE, 0.0)]
  for kind, strengths in config.attacks.items():
    if kind not in (*OF_MODEL, *OF_IMAGES):
      raise InputError(f"unknown attack {kind!r}; known: {', '.join((*OF_MODEL, *OF_IMAGES))}")
    if strengths and kind in OF_MODEL and not config.init_from:
      raise InputError(f"attacks.{kind} is on a model: give init_from, or attacks.{kind}=()")
    for strength in strengths:
      _check_strength(kind, strength)
      found.append(Attack(kind, float(strength)))
  if any(attack.kind == "regenerate" for attack in found) and not (config.regenerator or config.init_from):
    raise InputError("attacks.regenerate needs a diffusion model: give regenerator, or attacks.regenerate=()")
  return found


BOUNDS = {
  "bfloat16": (1, 1),  # it has no strengths
  "weight_bits": (2, 16),
  "prune": (0, 1),
  "flip_bits": (0, 1),
  "steps": (2, math.inf),
  "euler_steps": (2, math.inf),
}


def _check_strength(kind: str, strength: float) -> None:
  if kind in image_attacks.KINDS:
    image_attacks.check(kind, strength)
    return
  low, high = BOUNDS.get(kind, (0, math.inf))
  if not low <= strength <= high or strength in (0, math.inf):
    raise InputError(
      f"strengths of attacks.{kind} lie above 0 within {low:g} to {high:g}, found {strength:g}"
    )
  if kind in ("steps", "euler_steps", "weight_bits") and strength != int(strength):
    raise InputError(f"attacks.{kind} takes whole numbers, found {strength:g}")


def _changes(attack: Attack) -> dict[str, Any]:
  """What an attack on the sampler changes in its section; nothing for other attacks."""
  return {
    "steps": {"num_steps": int(attack.strength)},
    "euler_steps": {"num_steps": int(attack.strength), "solver": "euler"},
    "churn": {"churn": attack.strength},
  }.get(attack.kind, {})


class _Images:
  """The images before any attack, and after each: samples of the model of init_from, or those of config.data."""

  def __init__(self, config, attacks: list[Attack], codec: BoundCodec, key: WatermarkKey, mesh):
    self._config, self._codec, self._mesh = config, codec, mesh
    self._model = denoisers.load_or_make(config)[0] if config.init_from else None
    self._regenerator = denoisers.load_denoiser(config.regenerator) if config.regenerator else self._model
    if self._model is None:
      self._source = detect_watermark.source_of(config, config.data, codec, key)
      shape, self.number = self._source.image_shape, len(self._source)
      if self.number < 2:
        raise InputError(f"attacks are measured on at least 2 images, found {self.number}")
    else:
      shape, self.number = self._model.network.image_shape, config.detect.num_images
      detect_watermark.check_size(config, shape, "the model's samples", codec, key)
      for attack in attacks:  # raises where one does not fit
        detect_watermark.build_sampler(config, self._model, mesh, **_changes(attack))
    self.shape = tuple(shape)
    if self._regenerator is not None and self._regenerator.network.image_shape != shape:
      raise InputError(
        f"the regenerator makes images of {self._regenerator.network.image_shape}, and these are {shape}"
      )
    for attack in attacks:
      if attack.kind in image_attacks.KINDS:
        image_attacks.check(attack.kind, attack.strength, shape)
      if attack.kind == "regenerate":
        self._backwards(attack.strength)
    self._before = None

  def fingerprint(self) -> list[str]:
    """Of the images, or of the model that makes them, and of the regenerator."""
    found = [] if self._model else [of_images(self._source)]
    for model in filter(None, (self._model, self._regenerator)):
      found.append(store_writing.fingerprint(repr(model.network), model.variables))
    return found

  def _backwards(self, sigma: float):
    """The sampler from this noise level down."""
    section = config_lib.to_plain(self._config.sampler) | {"sigma_max": sigma}
    section["num_steps"] = self._config.regenerate.num_steps
    sampler = denoisers.build_sampler(section, self._regenerator.preconditioning)
    if not hasattr(sampler, "sigmas") or not math.isclose(float(sampler.sigmas[0]), sigma, rel_tol=0.05):
      raise InputError(
        f"attacks.regenerate: sampler {self._config.sampler.name!r} of this model cannot begin at sigma {sigma:g}"
      )
    return sampler

  def before(self) -> np.ndarray:
    """bytes [n h w c], made once"""
    if self._before is None:
      if self._model is None:
        self._before = np.asarray(self._source.take(np.arange(len(self._source)))["image"])
      else:
        self._before = self._sample(self._model, {}, "sample")
    return self._before

  def after(self, attack: Attack) -> np.ndarray:
    """bytes [n h w c]"""
    kind, strength = attack.kind, attack.strength
    if kind == NONE:
      return self.before()
    if kind in removal.WEIGHT_ATTACKS:
      return self._sample(self._with_weights(attack), {}, str(attack))
    if kind in SAMPLER_ATTACKS:
      return self._sample(self._model, _changes(attack), str(attack))
    if kind == "regenerate":
      return self._regenerate(strength)
    if kind == "flip_bits":
      return self._flip_bits(strength)
    return image_attacks.apply(kind, strength, self.before(), self._config.seed)

  def _with_weights(self, attack: Attack):
    variables, apply = self._model.variables, removal.WEIGHT_ATTACKS[attack.kind]
    key = jax.random.key(self._config.seed)
    params = jax.jit(lambda params, key: apply(params, attack.strength, key))(variables["params"], key)
    return dataclasses.replace(self._model, variables=variables | {"params": params})

  def _sample(self, model, changes: dict, what: str) -> np.ndarray:
    sampler = detect_watermark.build_sampler(self._config, model, self._mesh, **changes)
    return detect_watermark.sample(self._config, model, sampler, what)

  def _map(self, function: Callable, what: str) -> np.ndarray:
    source = records.unlabelled(self.before(), "images")
    with ProgressReport(what, len(source)) as progress:
      return pipeline.map_images(
        function, source, self._config.detect.batch_size, self._mesh, progress=progress.update
      )

  def _regenerate(self, sigma: float) -> np.ndarray:
    model, sampler = self._regenerator, self._backwards(sigma)
    num_classes = model.network.num_classes
    seed = self._config.seed

    @jax.jit
    def run(model, batch):
      # not the noise that the images were made of
      keys = jax.vmap(lambda key: jax.random.fold_in(key, REGENERATE))(image_keys(seed, batch["id"]))
      denoise = model.with_labels(batch["id"] % num_classes) if num_classes else model  # as `balanced_labels`
      noise = initial_noise(keys, batch["image"].shape[1:])
      return quantise(removal.regenerate(denoise, sampler, to_signed(batch["image"]), noise, keys))

    placed = parallel.replicate_to_devices(self._mesh, model)
    return self._map(lambda batch: run(placed, batch), "image regenerated")

  def _flip_bits(self, radius: float) -> np.ndarray:
    num_steps = self._config.flip_bits.num_steps

    @jax.jit
    def run(codec, batch):
      x = removal.flip_bits(codec, to_unit(batch["image"]), radius, num_steps)
      return jnp.round(255 * x).astype(jnp.uint8)

    placed = parallel.replicate_to_devices(self._mesh, self._codec)
    return self._map(lambda batch: run(placed, batch), "image attacked through the decoder")


def _reference(config, num_images: int, shape: tuple[int, ...]) -> records.ImageSource | None:
  if config.reference.name == "none":
    return None
  source = config_lib.build(sources.SOURCES, config.reference, split="train")
  source = records.first(source, config.detect.num_reference)
  if source.image_shape != shape:
    raise InputError(f"the reference has images of {source.image_shape}, and these are {shape}")
  generation_metrics.check(config.metrics, num_images, len(source))
  return source


def _one(
  config, attack: Attack, images: _Images, codec: BoundCodec, extract, reference, mesh
) -> dict[str, np.ndarray]:
  """What the journal keeps of an attack: logits [n bits], psnr [n] where it is on images, fid, and the first images."""
  attacked = images.after(attack)
  source = records.unlabelled(attacked, "attacked images")
  found = {
    "logits": detect_watermark.logits_of(codec, source, config.detect.batch_size, mesh),
    "shown": attacked[: config.report.num_images],
  }
  if attack.kind in OF_IMAGES:
    found["psnr"] = image_attacks.psnr(images.before(), attacked)
  if extract is not None:
    measured = generation_metrics.generation_metrics(
      extract(source, ""), reference, config.metrics, config.seed
    )
    found |= {name: np.asarray(value) for name, value in measured.items() if name.endswith("fid")}
  return found


def _summary(known: dict[str, np.ndarray], key: np.ndarray, needed: int) -> dict[str, float]:
  logits, num_bits = known["logits"], len(key)
  singles = np.asarray(detection.count_matches(logits, key))
  together, shares = detection.matches_together(logits, key), singles / num_bits
  found = {
    "bit_accuracy": float(shares.mean()),
    "interval": statistics.share_interval(shares),
    "matches": together,
    "p": detection.p_value(together, num_bits),
    "detected_share": float((singles >= needed).mean()),
  }
  found |= {name: float(known[name]) for name in ("fid", "pixel_fid") if name in known}
  return found | ({"psnr": float(known["psnr"].mean())} if "psnr" in known else {})


def _report(
  config, workdir: Workdir, found, shown, num_images: int, num_bits: int, needed: int, key: WatermarkKey
) -> None:
  """table.md, a panel for every attack, the first images after each, and report.html, in workdir/report."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  more = [name for name in ("psnr", "fid", "pixel_fid") if any(name in of for of in found.values())]
  header = [
    "attack",
    "strength",
    "bit accuracy",
    "bits of all together",
    "p",
    "single images detected",
    *more,
  ]
  rows = []
  for attack, of in found.items():
    unit = image_attacks.KINDS[attack.kind].unit if attack.kind in image_attacks.KINDS else ""
    rows.append(
      [
        attack.kind.replace("_", " "),
        f"{attack.strength:g} {unit}".strip() if attack.kind != NONE else "",
        "{:.2%} ({:.2%} to {:.2%})".format(of["bit_accuracy"], *of["interval"]),
        f"{of['matches']} of {num_bits}",
        f"{of['p']:.2g}",
        f"{of['detected_share']:.1%}",
        *(f"{of[name]:.2f}" if name in of else "" for name in more),
      ]
    )
  (folder / TABLE).write_text(report.markdown(header, rows))
  before = next(iter(found.values()))
  panels: dict[str, list] = {}
  for attack, of in found.items():
    if attack.kind != NONE:
      panels.setdefault(attack.kind, []).append((attack.strength, of["bit_accuracy"], of["p"]))
  if panels:
    report.attack_panels(panels, folder / "attacks.png", before=before["bit_accuracy"])
  columns = min(config.report.num_images, *map(len, shown.values()))
  report.image_grid(
    np.concatenate([rows[:columns] for rows in shown.values()]), folder / "images.png", columns=columns
  )
  drawn = "" if key.drawn else " The key is published or chosen, so the p-values say nothing."
  figures = (
    [(folder / "attacks.png", "Bit accuracy of single images (left) and log10 p of all together (right)")]
    if panels
    else []
  )
  figures.append(
    (folder / "images.png", f"The first images after {', '.join(map(str, found))}: a row for each")
  )
  report.html_report(
    folder / "report.html",
    title="What attacks leave of a mark",
    summary=(
      f"{num_images:,} images, {num_bits} bits. A detection needs {needed} of them, which happens by chance with a probability "
      f"of at most {config.detect.false_positive_rate:g}.{drawn}"
    ),
    metrics={},
    figures=figures,
    tables=[("After each attack, with 95 % intervals over images", header, rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
  say(f"{len(found) - 1} attacks: {folder / TABLE}")
