"""Marks the initial noise of a diffusion model's samples, and reads it back by solving the probability-flow ODE from the images up.

Yang et al. 2024, "Gaussian Shading" (arXiv:2404.04956), and Wen et al. 2023, "Tree-Ring Watermarks" (arXiv:2305.20030): the model stays as it is,
and who reads needs it. The same images without a mark are sampled beside them, from the same noise: a comparison, in which the mark is not hidden, since
it is hidden only from who does not know the noise.
"""

import hashlib
import json
import pathlib
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import image_store, records, sources
from jax_trustdiff.diffusion.guidance import Guided
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.evaluation import fid, image_attacks, report, statistics
from jax_trustdiff.tasks import codecs, denoisers, generation_metrics, reports, store_writing
from jax_trustdiff.tasks.sampling import balanced_labels, image_keys, quantise
from jax_trustdiff.training.progress import ProgressReport, say
from jax_trustdiff.training.workdir import Workdir, write_atomically
from jax_trustdiff.types import InputError, RunError, to_signed
from jax_trustdiff.watermark import detection, keys
from jax_trustdiff.watermark.initial_noise import MARKS, GaussianShading

SECRET_FILE, VERDICT, TABLE = "secret.txt", "verdict.json", "table.md"
NONE, UNMARKED = "none", "unmarked"
NUMBERS = ("bit_accuracy", "matches", "p", "log10_p", "detected_share", "median_p")


def run(config, workdir: Workdir) -> dict[str, float]:
  """Samples marked and unmarked images, attacks the marked ones, inverts all of them, and returns as <attack>/...:

  p, of all images together, and detected_share, the part of single ones at detect.false_positive_rate; of a mark of bits also bit_accuracy,
  matches and log10_p, of rings median_p of single images. 'none/...' is of the marked images as they are, 'unmarked/...' of the others. With config.reference also fid, or pixel_fid, of
  both, and fid_difference (marked less unmarked) with the ends of its 95 % bootstrap interval and its fid_difference_p
  (`statistics.paired_difference`), which is exact for bits with nonces: their signs are as random as those they take the place of.

  The marked samples are kept in workdir/images. With config.images, such a store, perhaps of images that were changed since, nothing is sampled: its
  mark is read with config.secret_file, the model and the seed it was made with.
  """
  section = config.detect
  mesh = parallel.make_local_mesh()
  model, known = denoisers.load_or_make(config)
  sampler = denoisers.build_sampler(config_lib.to_plain(config.sampler), model.preconditioning)
  attacks = _check(config, sampler, mesh)
  secret = _secret(config, workdir)
  # bound to the model: one secret may mark the samples of several, and no stream comes twice
  bound = f"{secret} {store_writing.fingerprint(type(model.network).__name__, model.variables)}"
  mark = config_lib.build(MARKS, config.mark, secret=bound, image_shape=model.network.image_shape)
  carries_bits = isinstance(mark, GaussianShading)
  bits = keys.draw(secret, [0], mark.num_bits, config.mark.name)[0] if carries_bits else None
  if carries_bits:
    detection.threshold(mark.num_bits, section.false_positive_rate)  # raises for too few
  described = {name: known[name] for name in ("model", "denoiser")}
  provenance = {
    "mark": config_lib.to_plain(config.mark),
    "secret_id": hashlib.sha256(f"id of {secret}".encode()).hexdigest()[:16],
    "nonces": config.nonces,
    "seed": config.seed,
    "model": store_writing.fingerprint(described, model.variables),
    "sampler": config_lib.to_plain(config.sampler),
    "batch_size": section.batch_size,
  }
  source = _marked_images(config, model.network.image_shape) if config.images else None
  reference = _reference(config, model.network.image_shape) if source is None else None
  extract = generation_metrics.build_extractor(config.metrics, mesh) if reference is not None else None

  workdir.open()
  _keep_secret(workdir, secret)
  ids = np.arange(section.num_images) if source is None else source.ids
  # another seed, other images: no nonce comes twice
  nonces = config.seed * 2**32 + ids if config.nonces else None
  solve = _Solver(config, model, sampler, mesh)
  if source is None:
    start = solve.noise(ids)
    images = {
      UNMARKED: solve.sample(start, ids, "unmarked sample"),
      NONE: solve.sample(_marked(mark, bits, start, nonces), ids, "marked sample"),
    }
    _write_store(workdir, model.network.num_classes, images[NONE], ids, provenance)
  else:
    _say_what_differs(config.images, provenance)
    images = {NONE: source.take(np.arange(len(source)))["image"]}
  found: dict[str, dict[str, Any]] = {}
  for name, attack in {**dict.fromkeys(images), **attacks}.items():
    changed = images[name] if attack is None else image_attacks.apply(*attack, images[NONE], config.seed)
    estimate = solve.invert(changed, ids, f"image inverted ({name})")
    found[name] = _judge(config, mark, bits, estimate, nonces)
  if parallel.is_main_process():
    write_atomically(workdir / VERDICT, json.dumps(found[NONE], indent=2) + "\n")
  metrics = {f"{name}/{key}": of[key] for name, of in found.items() for key in NUMBERS if key in of}
  if reference is not None:
    metrics |= _distances(config, images, reference, extract)
  if parallel.is_main_process():
    _report(config, workdir, images, found, metrics)
  return metrics


def _marked_images(config, image_shape: tuple[int, ...]) -> records.ImageSource:
  """The images of config.images, at most detect.num_images; InputError where the mark could not be read."""
  if not config.secret_file:
    raise InputError("images are read with the secret they were marked with: give secret_file")
  source = records.first(sources.SOURCES["image_store"](config.images), config.detect.num_images)
  if source.image_shape != tuple(image_shape):
    raise InputError(
      f"{config.images} has images of {source.image_shape}, and the model makes {tuple(image_shape)}"
    )
  return source


def _say_what_differs(path: str, provenance: dict[str, Any]) -> None:
  """A line if the store was made with another secret, model or setting than those its mark is now looked for with."""
  made = image_store.read_manifest(pathlib.Path(path))["provenance"]
  now = json.loads(json.dumps(provenance | {"batch_size": made.get("batch_size")}))
  differ = [name for name in now if made.get(name) != now[name]]
  if differ:
    say(f"{path} was made with another {', '.join(differ)}: its mark is not found with these")


def _write_store(
  workdir: Workdir, num_classes: int, images: np.ndarray, ids: np.ndarray, provenance: dict[str, Any]
) -> None:
  """The marked images with their ids, which are their nonces, in workdir/images."""
  if not parallel.is_main_process():
    return
  plan = image_store.StorePlan(
    num_images=len(images),
    images_per_shard=len(images),
    image_shape=images.shape[1:],
    num_classes=max(num_classes, 1),
    class_names=() if num_classes else (records.UNLABELLED,),
    provenance=provenance,
  )
  store = image_store.ImageStore(workdir / "images", plan, store_writing.maker())
  store.write(0, images, _labels(ids, num_classes), ids)
  store.finish()


def _check(config, sampler, mesh) -> dict[str, tuple[str, float]]:
  """{name: (kind, strength)} of config.attacks; InputError for what cannot be."""
  section = config.detect
  parallel.check_batch(section.batch_size, mesh)
  reports.check(config)
  if section.num_images < 2:
    raise InputError(f"detect.num_images must be at least 2, found {section.num_images}")
  if not 0 < section.false_positive_rate < 1:
    raise InputError(
      f"detect.false_positive_rate must lie between 0 and 1, found {section.false_positive_rate}"
    )
  if not hasattr(sampler, "invert") or getattr(sampler, "churn", 0):
    raise InputError(
      f"sampler {config.sampler.name!r} draws noise of its own or cannot be inverted: take 'edm' with churn=0"
    )
  found = {}
  for kind, strengths in config.attacks.items():
    for strength in strengths:
      image_attacks.check(kind, strength)
      found[f"{kind}_{strength:g}"] = (kind, strength)
  return found


def _secret(config, workdir: Workdir) -> str:
  """That of an earlier session of this run, of config.secret_file, or a fresh one."""
  if (workdir / SECRET_FILE).exists():
    return codecs.read_secret(str(workdir / SECRET_FILE))
  return codecs.read_secret(config.secret_file) if config.secret_file else secrets.token_hex(32)


def _keep_secret(workdir: Workdir, secret: str) -> None:
  if parallel.is_main_process():
    write_atomically(workdir / SECRET_FILE, secret + "\n", private=True)
  parallel.barrier("secret")


def _marked(mark, bits: np.ndarray | None, noise: np.ndarray, nonces: np.ndarray | None) -> np.ndarray:
  if bits is None:
    return np.asarray(mark.mark(jnp.asarray(noise)))
  return np.asarray(mark.mark(bits, jnp.asarray(noise), nonces))


def _labels(ids: np.ndarray, num_classes: int) -> np.ndarray:
  """The classes of samples: of a model without classes all are 0."""
  return balanced_labels(ids, num_classes) if num_classes else np.zeros(len(ids), np.int32)


class _Solver:
  """Noise to images and back, in batches of one shape."""

  def __init__(self, config, model, sampler, mesh):
    self._model, self._mesh, self._size, self._seed = model, mesh, config.detect.batch_size, config.seed
    self._num_classes = model.network.num_classes
    denoise = Guided(model) if self._num_classes else model
    self._denoise = parallel.replicate_to_devices(mesh, denoise)

    def labelled(denoise, batch):
      return denoise.with_labels(batch["label"]) if self._num_classes else denoise

    @jax.jit
    def sample(denoise, batch):
      found = sampler(labelled(denoise, batch), batch["x"], None)
      return quantise(found), jnp.isfinite(found).all((1, 2, 3))

    @jax.jit
    def invert(denoise, batch):
      found = sampler.invert(labelled(denoise, batch), to_signed(batch["x"]))
      found = getattr(found, "x", found)  # an adaptive sampler says more than that
      return found, jnp.isfinite(found).all((1, 2, 3))

    self._sample, self._invert = sample, invert

  def noise(self, ids: np.ndarray) -> np.ndarray:
    """Standard normal, of each id its own: that of the samples of every other task."""
    draw = jax.jit(lambda ids: initial_noise(image_keys(self._seed, ids), self._model.network.image_shape))
    return np.asarray(draw(ids.astype(np.int32)))

  def sample(self, noise: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
    """uint8 images"""
    return self._run(self._sample, noise, ids, what)

  def invert(self, images: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
    """Estimates of the noise, of unit scale."""
    return self._run(self._invert, images, ids, what)

  def _run(self, function, x: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
    labels = _labels(ids, self._num_classes)
    parts = []
    with ProgressReport(what, len(x)) as progress:
      for start in range(0, len(x), self._size):
        rows = np.minimum(np.arange(start, start + self._size), len(x) - 1)
        batch = parallel.to_global(self._mesh, {"x": x[rows], "label": labels[rows]})
        found, finite = parallel.gather_to_host(function(self._denoise, batch))
        if not finite.all():
          raise RunError(
            f"{what} {rows[~finite][0]} has values that are not finite: the sampler does not fit this model"
          )
        parts.append(found[: len(x) - start])
        progress.update(min(start + self._size, len(x)))
    return np.concatenate(parts)


def _judge(
  config, mark, bits: np.ndarray | None, estimate: np.ndarray, nonces: np.ndarray | None
) -> dict[str, Any]:
  """The verdict on images whose noise is estimated so."""
  rate, estimate = config.detect.false_positive_rate, jnp.asarray(estimate)
  if bits is not None:
    verdict = detection.judge(
      mark.read(estimate, nonces), bits[None], rate, scheme=config.mark.name, key_id=""
    )
    return verdict.to_dict() | {"key_drawn": True}
  single, together = mark.p_value(estimate), mark.p_value_together(estimate)
  return {
    "scheme": config.mark.name,
    "p": together,
    "false_positive_rate": rate,
    "decision": together <= rate,
    "detected_share": float((single <= rate).mean()),
    "median_p": float(np.median(single)),
    "num_images": len(estimate),
  }


def _reference(config, image_shape: tuple[int, ...]) -> records.ImageSource | None:
  if config.reference.name == NONE:
    return None
  source = config_lib.build(sources.SOURCES, config.reference, split="train")
  source = records.first(source, config.detect.num_reference)
  if source.image_shape != tuple(image_shape):
    raise InputError(
      f"the reference has images of {source.image_shape}, and those of the model are {image_shape}"
    )
  if len(source) < 2:
    raise InputError(f"FID needs at least 2 reference images, found {len(source)}")
  if config.metrics.fid_only or config.detect.num_resamples < 20:
    raise InputError(
      "the interval of the difference of two FIDs needs metrics.fid_only=False and detect.num_resamples of at least 20"
    )
  return source


def _distances(config, images, reference: records.ImageSource, extract) -> dict[str, float]:
  """FID of the marked and the unmarked samples, and what their difference is worth by pairs from the same noise, the reference as it is."""
  real = extract(reference, "reference image")
  features = [
    extract(records.unlabelled(images[name], name), f"feature of {name}").features for name in (NONE, UNMARKED)
  ]
  n, num_resamples = len(images[NONE]), config.detect.num_resamples
  distance = fid.FrechetDistanceTo(real.mu, real.sigma).of_rows(np.concatenate(features))
  with ProgressReport("resample", 2 * num_resamples) as progress:
    difference = statistics.paired_difference(distance, n, num_resamples, config.seed, progress.update)
  pre = generation_metrics.prefix(real.network)
  return {
    f"{NONE}/{pre}fid": distance(np.arange(n)),
    f"{UNMARKED}/{pre}fid": distance(np.arange(n, 2 * n)),
    f"{pre}fid_difference": difference.value,
    f"{pre}fid_difference_low": difference.low,
    f"{pre}fid_difference_high": difference.high,
    f"{pre}fid_difference_p": difference.p,
  }


def _report(config, workdir: Workdir, images, found, metrics) -> None:
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  has_bits = "matches" in found[NONE]
  header = [
    "attack",
    *(["bit accuracy", "bits of all together"] if has_bits else ["median p of single images"]),
  ]
  header += ["p of all together", "single images detected"]
  rows = []
  for name, of in found.items():
    share = statistics.binomial_interval(round(of["detected_share"] * of["num_images"]), of["num_images"])
    middle = (
      [f"{of['bit_accuracy']:.2%}", f"{of['matches']} of {of['num_bits']}"]
      if has_bits
      else [f"{of['median_p']:.2g}"]
    )
    shown = f"{of['detected_share']:.1%} ({share[0]:.1%} to {share[1]:.1%})"
    rows.append([name.replace("_", " "), *middle, f"{of['p']:.2g}", shown])
  (folder / TABLE).write_text(report.markdown(header, rows))
  count = min(config.report.num_images, len(images[NONE]))
  sampled = UNMARKED in images
  shown = np.concatenate([of[:count] for of in images.values()])
  report.image_grid(shown, folder / "images.png", columns=count)
  caption = "Samples from the same noise, above as it was, below with the mark" if sampled else "The first images"
  figures = [(folder / "images.png", caption)]
  if has_bits:
    values = {name.replace("_", " "): {"bit accuracy": of["bit_accuracy"]} for name, of in found.items()}
    report.bars(values, folder / "attacks.png", ylabel="bit accuracy")
    figures.append((folder / "attacks.png", "Bits read right of single images"))
  report.html_report(
    folder / "report.html",
    title=f"Marks on the initial noise: {config.mark.name.replace('_', ' ')}",
    summary=f"{len(images[NONE]):,} "
    + ("samples with a mark and as many without, from the same noise" if sampled else "images of a store")
    + "; read by solving the ODE backwards.",
    metrics=metrics,
    figures=figures,
    tables=[("After each attack, with 95 % Clopper-Pearson intervals", header, rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
