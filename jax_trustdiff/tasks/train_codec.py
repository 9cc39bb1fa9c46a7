"""Trains a watermark codec, starts anew where it does not learn to be read, measures, reports and exports it.

Zhao et al. 2023 (arXiv:2303.10137, section 3.2) train one on the images that are to be marked, with fresh bits for every image
and step. Whether such a codec learns to be read at all depends on the seed; here a run that has not is set aside, and the next
seed begins.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, records
from jax_trustdiff.evaluation import image_attacks, statistics
from jax_trustdiff.interop import export
from jax_trustdiff.tasks import codecs, image_training, reports
from jax_trustdiff.training import state
from jax_trustdiff.training.progress import ProgressReport, say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import OBJECTIVE, Bits, InputError, RunError, Variables, WatermarkCodec, to_unit
from jax_trustdiff.watermark.codec import NOT_YET, BoundCodec, CodecLoss, ImageGate, psnr
from jax_trustdiff.watermark.distortions import Distortion, one_of

SEED_STEP = 1000  # from one attempt to the next
UNATTACKED = "nothing"
ASIDE = "not-learned-"  # folders of the workdir with what attempts have left


class NotLearned(Exception):
  """A codec is not read after so many steps."""


def run(config, workdir: Workdir) -> dict[str, float]:
  """Trains to the end, or goes on from the workdir's checkpoint, and returns the metrics of the averaged parameters.

  Of the held-out images as bytes: bit_accuracy and psnr (the mean over the images, in decibels), at the end and, as first/...,
  at the first validation; bit_accuracy_after_<attack> for each of eval.attacks, done by Pillow; learned_at_step and restarts.
  RunError if the codec is read at no seed.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  data = image_training.load_data(config)
  parallel.check_batch(config.eval.batch_size, mesh)
  _check(config, data)
  codec = codecs.build_codec(config.model, data.train.image_shape)
  loss, gate = make_loss(config, codec), build_gate(config)
  watch = Watch(config, codec, gate, data, mesh)

  def init(key):
    return codec.init(key) | {OBJECTIVE: {"gate": jnp.full([], NOT_YET, jnp.int32)}}

  _finish_setting_aside(workdir)
  while True:
    attempt = _num_aside(workdir)
    seeded = config_lib.from_plain(config_lib.to_plain(config) | {"seed": config.seed + SEED_STEP * attempt})
    trainer = image_training.build_trainer(seeded, init, loss, data, mesh)
    try:
      variables, metrics = image_training.train(seeded, codec, trainer, data, mesh, workdir, watch)
      break
    except NotLearned as error:
      if attempt >= config.train.max_restarts:
        raise RunError(
          f"{error} (attempt {attempt + 1}, the last): try another schedule.learning_rate, a larger model.strength, or fewer "
          "distortions"
        ) from None
      say(
        f"{error}: it is set aside in {_aside(workdir, attempt)}, and seed {seeded.seed + SEED_STEP} begins"
      )
      _set_aside(workdir, attempt)
  metrics["restarts"] = attempt
  found = measure(config, BoundCodec(codec, jax.tree.map(jnp.asarray, variables)), data, mesh)
  metrics |= {
    f"bit_accuracy_after_{name}": mean for name, (mean, *_) in found.after.items() if name != UNATTACKED
  }
  if parallel.is_main_process():
    section = codecs.model_section(config.model, codec)
    export.save_export(workdir / "export", section, variables, {"metrics": metrics})
    reports.codec_report(config, workdir, found, metrics)
  return metrics


def build_gate(config) -> ImageGate:
  """When the image begins to count."""
  return ImageGate(**config.gate)


def make_loss(config, codec: WatermarkCodec) -> image_training.StatefulLoss:
  """`CodecLoss` of a batch of bytes, with the gate's counter in the collections."""
  for kind, bounds in config.distortions.items():
    if len(bounds) not in (0, 2):
      raise InputError(f"distortions.{kind} needs two strengths, or none for never; found {bounds}")
  distortions = [Distortion(kind, *bounds) for kind, bounds in config.distortions.items() if bounds]
  distort = one_of(distortions) if distortions else None
  codec_loss = CodecLoss(codec, build_gate(config), distort, config.train.quantised)

  def loss(params, collections, batch, key):
    counter, x = collections[OBJECTIVE]["gate"], to_unit(batch["image"])
    value, (counter, metrics) = codec_loss({"params": params}, x, key, counter)
    return value, (collections | {OBJECTIVE: {"gate": counter}}, metrics)

  return loss


def bits_of(codec: WatermarkCodec, seed: int, ids: jax.typing.ArrayLike) -> Bits:
  """The string that each held-out image is marked with: the same at every look at it."""
  keys = image_training.held_out_keys(seed, ids)
  return jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (codec.num_bits,)))(keys).astype(jnp.int32)


class Watch:
  """Held-out bit accuracy and PSNR: callable as `loop.fit`'s validate(state) -> metrics of the averaged parameters.

  learned_at_step is -1 as long as the gate is shut. Says how the training does. NotLearned where, from train.learned_by steps on (of a shorter
  training at its end; 0: never), the parameters themselves are read with a bit accuracy below train.learned_above.
  """

  def __init__(self, config, codec: WatermarkCodec, gate: ImageGate, data: image_training.Data, mesh):
    self._config, self._codec, self._gate, self._data, self._mesh = config, codec, gate, data, mesh
    self._judge = jax.jit(self._judged)

  def __call__(self, train_state: state.TrainState) -> dict[str, float]:
    step, counter = int(train_state.step), int(train_state.collections[OBJECTIVE]["gate"])
    raw = self._means({"params": train_state.params})["bit_accuracy"]
    by = min(self._config.train.learned_by, image_training.num_steps_of(self._config))
    if 0 < by <= step and raw < self._config.train.learned_above:
      raise NotLearned(f"after {step:,} steps only {raw:.1%} of the bits are read right")
    found = self._means(train_state.ema_variables)
    learned_at = NOT_YET if counter == NOT_YET else step - counter
    read = "not read yet" if counter == NOT_YET else f"read since step {learned_at:,}"
    say(
      f"step {step:,}: {found['bit_accuracy']:.2%} of the bits read right ({raw:.2%} without averaging), {found['psnr']:.1f} dB, "
      f"weight of the image {float(self._gate.weight(jnp.array(counter))):.3g}, {read}"
    )
    return found | {"raw_bit_accuracy": raw, "learned_at_step": learned_at}

  def _means(self, variables: Variables) -> dict[str, float]:
    judge = functools.partial(self._judge, variables)
    return image_training.held_out_means(judge, self._data, self._config.eval.batch_size, self._mesh)

  def _judged(self, variables, batch):
    bound = BoundCodec(self._codec, variables)
    bits = bits_of(self._codec, self._config.seed, batch["id"])
    marked = to_unit(codecs.marked_bytes(bound, batch["image"], bits))
    right = (bound.decode(marked) > 0) == (bits > 0)
    return {
      "bit_accuracy": right.mean(1),
      "psnr": psnr(jnp.square(marked - to_unit(batch["image"])).mean((1, 2, 3))),
    }


@dataclasses.dataclass(frozen=True)
class Measured:
  """What became of the held-out images: after[<attack>] is the bit accuracy and the ends of its 95 % interval."""

  after: dict[str, tuple[float, float, float]]
  images: np.ndarray  # the first report.num_images, bytes
  marked: np.ndarray  # bytes
  matches: np.ndarray  # of each of these, marked and not attacked
  num_images: int  # in all


def measure(config, codec: BoundCodec, data: image_training.Data, mesh) -> Measured:
  """Marks every held-out image, writes it down as bytes, attacks it on the host, and reads it."""
  source, size = data.validation, config.eval.batch_size

  @jax.jit
  def mark(codec, batch):
    bits = bits_of(codec.network, config.seed, batch["id"])
    return {"marked": codecs.marked_bytes(codec, batch["image"], bits), "bits": bits}

  read = jax.jit(lambda codec, batch: codec.decode(to_unit(batch["image"])) > 0)
  found = pipeline.map_images(functools.partial(mark, codec), source, size, mesh)
  marked, bits = found["marked"], found["bits"] > 0

  def matching(images):
    attacked = records.unlabelled(images, "attacked images")
    return pipeline.map_images(functools.partial(read, codec), attacked, size, mesh) == bits

  clean = matching(marked)
  after = {UNATTACKED: _mean(clean)}
  attacks = [(kind, strength) for kind, strengths in config.eval.attacks.items() for strength in strengths]
  with ProgressReport("attack", len(attacks), images_per_item=len(source)) as progress:
    for i, (kind, strength) in enumerate(attacks):
      after[f"{kind}_{strength:g}"] = _mean(
        matching(image_attacks.apply(kind, strength, marked, config.seed))
      )
      progress.update(i + 1)
  shown = min(config.report.num_images, len(source))
  images = source.take(np.arange(shown))["image"]
  return Measured(after, images, marked[:shown], clean[:shown].sum(1), len(source))


def _mean(right: np.ndarray) -> tuple[float, float, float]:
  """The bit accuracy, and the ends of its interval over images: the bits of one are not independent."""
  shares = right.mean(1, dtype=np.float64)
  return float(shares.mean()), *statistics.share_interval(shares)


def _check(config, data: image_training.Data) -> None:
  reports.check(config)
  if len(data.validation) < 2:
    raise InputError(
      f"train.num_validation={len(data.validation)}: a codec is watched by held-out images, give at least 2"
    )
  if config.train.accumulate != 1:
    raise InputError(
      f"train.accumulate is {config.train.accumulate}: the gate of a codec counts steps, give 1"
    )
  if config.train.max_restarts < 0 or config.train.learned_by < 0:
    raise InputError(
      f"train.max_restarts and train.learned_by must be at least 0, found {config.train.max_restarts} and "
      f"{config.train.learned_by}"
    )
  if not 0.5 < config.train.learned_above < 1:
    raise InputError(f"train.learned_above must lie between 0.5 and 1, found {config.train.learned_above}")
  for kind, strengths in config.eval.attacks.items():
    for strength in strengths:
      image_attacks.check(kind, strength)


# ---- attempts ----


def _aside(workdir: Workdir, attempt: int):
  return workdir / f"{ASIDE}{attempt}"


def _num_aside(workdir: Workdir) -> int:
  """How many attempts are set aside, as process 0 sees it."""
  attempt = 0
  while _aside(workdir, attempt).exists():
    attempt += 1
  return int(parallel.of_main_process(np.int32(attempt)))


def _set_aside(workdir: Workdir, attempt: int) -> None:
  """Metrics and checkpoints of an attempt to a folder that appears once it has them all."""
  parallel.barrier(f"end of attempt {attempt}")
  if parallel.is_main_process():
    folder = _aside(workdir, attempt)
    partial = folder.with_name(f".{folder.name}")
    partial.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "checkpoints", "tensorboard"):
      if (workdir / name).exists():
        os.replace(workdir / name, partial / name)
    os.replace(partial, folder)
  parallel.barrier(f"set aside attempt {attempt}")


def _finish_setting_aside(workdir: Workdir) -> None:
  """What a run that was killed while it did so has left to do."""
  attempt = _num_aside(workdir)
  if parallel.of_main_process(np.bool_((workdir / f".{ASIDE}{attempt}").exists())):
    workdir.open()
    _set_aside(workdir, attempt)
