"""What the trainings whose lengths are counted in images share: data, the step, the run from start to metrics.

So are those of diffusion models, of classifiers of noisy images and of watermark codecs: schedules, averages and lengths, as in
Karras et al. 2022 (arXiv:2206.00364).
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, records, sources
from jax_trustdiff.interop import edm_snapshot, export, pretrained
from jax_trustdiff.models.registry import forward_flops, num_params
from jax_trustdiff.tasks import denoisers
from jax_trustdiff.training import loop, optimizers, state
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.training.ema import half_life_decay
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, PerExample, PyTree, Variables

BatchLoss = Callable[[Variables, pipeline.Batch, jax.Array], PerExample]  # (variables, batch, key) -> [b]
# (params, collections, batch, key) -> (scalar loss, (new collections, metrics)), for a loss with a state
StatefulLoss = Callable[[PyTree, PyTree, pipeline.Batch, jax.Array], tuple[jax.Array, tuple[PyTree, dict]]]
Validate = Callable[[state.TrainState], dict[str, float]]  # metrics of the averaged parameters


@dataclasses.dataclass(frozen=True)
class Data:
  """Training images and those held out."""

  train: sources.ImageSource
  validation: sources.ImageSource


def load_data(config) -> Data:
  """The training split of config.data, cut to train.num_train images (0: all), less train.num_validation of them."""
  full = config_lib.build(sources.SOURCES, config.data, split="train")
  if config.train.num_train:
    full = records.limit(full, config.train.num_train)
  train, validation = records.split_validation(
    full, config.train.num_validation, config.train.validation_split
  )
  return Data(train, validation)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The parts of a run that `loop.fit` needs."""

  init: Callable[[jax.Array], Variables]  # fresh variables of the network, with the state of the loss
  step: state.StepFn
  optimizer: object  # optax.GradientTransformation
  feed: pipeline.ResidentFeed | pipeline.StreamingFeed
  plan: loop.Plan
  num_power_averages: int


def stateless(loss: BatchLoss) -> StatefulLoss:
  """The mean of the losses of a batch."""

  def mean(params, collections, batch, key):
    return loss({"params": params, **collections}, batch, key).mean(), (collections, {})

  return mean


def build_trainer(
  config,
  init: Callable[[jax.Array], Variables],
  loss: StatefulLoss,
  data: Data,
  mesh,
  power_stds: tuple[float, ...] = (),
) -> Trainer:
  """The training step of `loss` on `data`, from what `init` makes; InputError for anything that does not fit."""
  batch_size, accumulate = config.train.batch_size, config.train.accumulate
  parallel.check_batch(batch_size, mesh)
  if accumulate < 1 or batch_size % accumulate:
    raise InputError(f"train.accumulate={accumulate} does not divide train.batch_size={batch_size}")
  parallel.check_batch(batch_size // accumulate, mesh)
  if config.train.num_images < batch_size:
    raise InputError(
      f"train.num_images={config.train.num_images} is less than one batch of {batch_size} images"
    )
  schedule = config_lib.build(optimizers.IMAGE_SCHEDULES, config.schedule, batch_size=batch_size)
  optimizer = config_lib.build(optimizers.OPTIMIZERS, config.optimizer, schedule=schedule)
  decay = functools.partial(
    half_life_decay,
    batch_size=batch_size,
    half_life=config.ema.half_life,
    # an average that came with the parameters is not forgotten (Karras et al. 2022, released code)
    rampup_ratio=None if config.init_from else config.ema.rampup_ratio or None,
  )
  decay(jnp.array(1))  # raises for numbers that are no average

  def loss_fn(params, collections, batch, key, step):
    value, (collections, metrics) = loss(params, collections, batch, key)
    return value, (collections, metrics | {"learning_rate": schedule.learning_rate(step)})

  return Trainer(
    init=init,
    step=state.make_train_step(loss_fn, optimizer, decay, accumulate, power_stds),
    optimizer=optimizer,
    feed=pipeline.make_feed(
      data.train,
      pipeline.EpochSampler(len(data.train), batch_size, config.seed),
      mesh,
      config.train.resident,
    ),
    plan=loop.Plan(
      num_steps=num_steps_of(config),
      log_every=config.train.log_every,
      checkpoint_every=config.train.checkpoint_every,
      validate_every=config.train.validate_every,
      steps_per_dispatch=config.train.steps_per_dispatch,
      profile=loop.parse_profile(config.train.profile),
    ),
    num_power_averages=len(power_stds),
  )


def num_steps_of(config) -> int:
  """Optimizer steps that see train.num_images images, rounded up."""
  return -(-config.train.num_images // config.train.batch_size)


def train(
  config,
  network,
  trainer: Trainer,
  data: Data,
  mesh,
  workdir: Workdir,
  validate: Validate,
  private: bool = False,
  backbone: Variables | None = None,
) -> tuple[Variables, dict[str, float]]:
  """(averaged variables on the host, metrics) at the end of the training, or of what the workdir's checkpoint left of it.

  The metrics are those of `validate` at the end and, as first/..., at the first validation, with num_steps and num_params.
  private: nobody but their owner may read the checkpoints. backbone: the variables of the frozen network inside, if there is one.
  InputError, before anything is written, for an init_from or a batch that does not fit.
  """
  variables = _initial_variables(config, network) if config.init_from else None
  arguments = (trainer.init, trainer.optimizer)
  placed = (mesh, config.mesh.rules, trainer.num_power_averages)
  _check_batch(trainer, state.shapes(*arguments, *placed), data, config.train.batch_size)

  workdir.open()
  if private and parallel.is_main_process():
    (workdir / "checkpoints").mkdir(mode=0o700, exist_ok=True)
  parallel.barrier("folder of checkpoints")
  fresh = state.create_sharded(*arguments, jax.random.key(config.seed), *placed)
  if variables is not None:
    fresh = state.with_variables(fresh, variables)
  if backbone is not None:
    fresh = state.with_backbone(fresh, backbone)
  _say_size(config, network, fresh, data, trainer)
  with Checkpoints(workdir / "checkpoints") as checkpoints, contextlib.closing(trainer.feed):
    last = loop.fit(
      fresh,
      trainer.step,
      trainer.feed,
      trainer.plan,
      workdir,
      checkpoints,
      config.train.batch_size,
      validate=validate if trainer.plan.validate_every else None,
    )

  num_steps, seen = trainer.plan.num_steps, _history(workdir)
  if not seen or seen[-1]["step"] != num_steps:
    seen.append({"step": num_steps, **validate(last)})
  metrics = {"num_steps": num_steps, "num_params": num_params({"params": last.params})}
  metrics |= {name: value for name, value in seen[-1].items() if name != "step"}
  if len(seen) > 1:
    metrics |= {f"first/{name}": value for name, value in seen[0].items()}
  return parallel.gather_to_host(last.ema_variables), metrics


def _initial_variables(config, network) -> Variables:
  """The variables of config.init_from, of a network that was trained with the preconditioning of the config."""
  variables = pretrained.load_variables(config.init_from, network)[0]
  path = pathlib.Path(config.init_from)
  if path.is_dir():
    meta = export.read_description(path)
    stored = meta.get("denoiser") or meta.get("preconditioning")
  else:  # a state_dict does not say it
    stored = edm_snapshot.read_snapshot(path).denoiser_section if path.suffix == pretrained.SNAPSHOT else None
  if stored:
    theirs, ours = map(denoisers.build_preconditioning, (stored, config.diffusion.preconditioning))
    if theirs != ours:
      raise InputError(f"{path} was trained with {theirs}, and diffusion.preconditioning is {ours}")
  return variables


def held_out_keys(seed: int, ids: jax.typing.ArrayLike) -> jax.Array:
  """The key of each held-out image: the same at every validation, and none that training or samples draw from."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"held-out loss"))
  return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def held_out_means(
  judge: Callable[[pipeline.Batch], dict[str, PerExample]], data: Data, batch_size: int, mesh
) -> dict[str, float]:
  """The mean over the held-out images of each value that `judge` finds of an image; {} without such images."""
  totals = collections.defaultdict(float)
  for batch in pipeline.eval_batches(data.validation, batch_size, mesh):
    found, mask = parallel.gather_to_host((judge(batch), batch["mask"]))
    for name, values in found.items():
      totals[name] += float(np.sum(values[mask], dtype=np.float64))
  return {name: total / len(data.validation) for name, total in totals.items()}


def _history(workdir: Workdir) -> list[dict[str, float]]:
  """What was found at each validation so far: 'step' and the metrics."""
  prefix = "validation/"
  rows = [
    {"step": row["step"]} | {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
    for row in workdir.read_metrics()
  ]
  return [row for row in rows if len(row) > 1]


def _check_batch(trainer: Trainer, shapes: state.TrainState, data: Data, batch_size: int) -> None:
  """Traces one step: what does not fit raises before anything is written."""
  batch = {
    "image": jax.ShapeDtypeStruct((batch_size, *data.train.image_shape), jnp.uint8),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "id": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  jax.eval_shape(trainer.step, shapes, batch)


def _say_size(config, network, fresh: state.TrainState, data: Data, trainer: Trainer) -> None:
  count, num_steps = num_params({"params": fresh.params}), trainer.plan.num_steps
  say(
    f"{count:,} parameters, {forward_flops(network) / 2e9:.3g} GMAC an evaluation; "
    f"{len(data.train):,} training, {len(data.validation):,} held-out images; {num_steps:,} steps of "
    f"{config.train.batch_size} images on {jax.device_count()} {jax.devices()[0].platform} device(s)"
  )
