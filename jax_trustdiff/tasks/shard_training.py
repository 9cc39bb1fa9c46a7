"""Training one version of a shard: stage by stage, in a program and with random numbers of its own."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.cdm import slices
from jax_trustdiff.data import augment
from jax_trustdiff.interop import safetensors_io
from jax_trustdiff.pytrees import leaf_name, leaves_by_name, shapes_by_name
from jax_trustdiff.tasks import denoisers
from jax_trustdiff.tasks.bundles import ADAPTER, IMAGES, Bundle, build_model, environment, file_digests
from jax_trustdiff.tasks.compartments import Schedule, ShardFeed, sizes_of
from jax_trustdiff.tasks.train_diffusion import Model
from jax_trustdiff.training import loop, optimizers, state
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.training.ema import half_life_decay
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, write_atomically
from jax_trustdiff.types import BACKBONE, InputError, to_signed

LOCAL_KEYS = "threefry2x32"  # what an image's eight bytes are a key of, whatever jax's default


@dataclasses.dataclass(frozen=True)
class Training:
  """A version of a shard that is to be made: of which images, and of which stages of an earlier version.

  Two trainings of the same images from the same stage have one folder; of others, another.
  """

  bundle: Bundle
  name: str
  origin: int
  rows: np.ndarray  # positions of its images in the data set
  first_stage: int = 0  # stages before it are those of the shard's present version

  @property
  def config(self) -> Any:
    """The bundle's sections of training."""
    return self.bundle.training

  @functools.cached_property
  def schedule(self) -> Schedule:
    """Its stages and steps."""
    num_slices = self.bundle.manifest["origins"][self.origin]["shards"]["num_slices"]
    epochs = slices.epochs_of_stages(self.config.train.num_epochs, num_slices)
    sizes = sizes_of(self.bundle.data(self.origin), self.rows, num_slices)
    return Schedule(sizes, tuple(epochs), self.config.train.batch_size)

  @functools.cached_property
  def images(self) -> list[list[str]]:
    """Its images of each slice, salted and sorted."""
    data = self.bundle.data(self.origin)
    of_slice = [self.rows[data.slice[self.rows] == r] for r in range(len(self.schedule.sizes))]
    return [sorted(self.bundle.salted(data.contents[i]) for i in rows) for rows in of_slice]

  @functools.cached_property
  def folder(self) -> str:
    """Where this version goes, below the bundle."""
    present = self.bundle.manifest["shards"].get(self.name)
    number = int(present["folder"].split("-")[-2]) + 1 if present else 0
    about = [self.images, self.first_stage, present and present["parameters"], environment()]
    return f"shards/{self.name}-{number}-{manifest_lib.digest(about)[:12]}"

  @property
  def steps(self) -> int:
    """Steps that it takes, those of earlier stages not counted."""
    ends = [0, *self.schedule.ends()]
    return ends[-1] - ends[self.first_stage]

  def run(self) -> dict[str, Any]:
    """Trains the stages that are not there yet, exports, and returns what the manifest is to say of the shard.

    Killed, it goes on where it was with the same arguments. InputError for a shard without images.
    """
    if not len(self.rows):
      raise InputError(f"shard {self.name!r} has no images to be trained on")
    path = self.bundle.path / self.folder
    about = config_lib.from_plain(self.bundle.manifest["training"] | {"shard": self.name})
    workdir = Workdir(path, about)
    workdir.open()
    try:
      current, states, model = self._stages(workdir)
      self._export(path, model, current)
    finally:
      workdir.close()
    return self._entry(path, states)

  def _stages(self, workdir: Workdir) -> tuple[state.TrainState, list[str], Model]:
    (workdir / "stages").mkdir(exist_ok=True)
    self._take_over()
    parts = _Parts.of(self)
    current = parts.fresh
    states = [manifest_lib.tree_digest(_stored(current))]
    for stage, end in enumerate(self.schedule.ends()):
      if self._file(stage).is_file():
        current = _restored(self._file(stage), current)
      else:
        current = self._train(parts, current, stage, end, workdir)
        safetensors_io.save_flat(self._file(stage), _stored(current))
      shutil.rmtree(workdir / f"checkpoints-{stage}", ignore_errors=True)
      states.append(manifest_lib.tree_digest(_stored(current)))
    return current, states, parts.model

  def _file(self, stage: int) -> pathlib.Path:
    return self.bundle.path / self.folder / "stages" / f"{stage}.safetensors"

  def _take_over(self) -> None:
    """The stages of the present version that this one goes on from; InputError if they are not as the manifest has them."""
    for stage in range(self.first_stage):
      if self._file(stage).is_file():
        continue
      present = self.bundle.manifest["shards"][self.name]
      data = (self.bundle.path / present["folder"] / "stages" / f"{stage}.safetensors").read_bytes()
      if hashlib.sha256(data).hexdigest() != present["files"][f"stages/{stage}.safetensors"]:
        raise InputError(f"stage {stage} of {present['folder']} was changed: verify the bundle first")
      safetensors_io.write_atomically(self._file(stage), data)

  def _train(
    self, parts: "_Parts", current: state.TrainState, stage: int, end: int, workdir: Workdir
  ) -> state.TrainState:
    if int(current.step) == end:  # a stage without images
      return current
    train, schedule = self.config.train, self.schedule
    say(
      f"shard {self.name}, stage {stage + 1} of {len(schedule.sizes)}: {sum(schedule.sizes[: stage + 1]):,} images, "
      f"{schedule.stage_epochs[stage]} epochs"
    )
    context = f"seed {self.config.seed}|shard {self.name}"
    feed = ShardFeed(self.bundle.data(self.origin), self.rows, schedule, context, parts.mesh)
    plan = loop.Plan(end, train.log_every, train.checkpoint_every, 0, train.steps_per_dispatch)
    with Checkpoints(workdir / f"checkpoints-{stage}") as checkpoints:
      return loop.fit(current, parts.step, feed, plan, workdir, checkpoints, train.batch_size)

  def _export(self, path: pathlib.Path, model: Model, current: state.TrainState) -> None:
    variables = parallel.gather_to_host(current.ema_variables)
    if self.bundle.is_adapted:
      safetensors_io.save(path / ADAPTER, {k: v for k, v in variables.items() if k != BACKBONE})
    else:
      section = denoisers.model_section(self.config.model, model.network)
      about = {"class_names": self.bundle.manifest["origins"][self.origin]["class_names"]}
      denoisers.save_denoiser(path / "export", section, self.config.diffusion.preconditioning, variables, about)
    write_atomically(path / IMAGES, json.dumps(self.images) + "\n")

  def _entry(self, path: pathlib.Path, states: list[str]) -> dict[str, Any]:
    ends, source = [0, *self.schedule.ends()], self.bundle.data(self.origin).source
    file = path / ADAPTER if self.bundle.is_adapted else path / "export" / "model.safetensors"
    counts = np.bincount(source.labels[self.rows], minlength=source.num_classes)
    return {
      "origin": self.origin,
      "folder": self.folder,
      "num_images": len(self.rows),
      "class_counts": counts.tolist(),
      "root": manifest_lib.merkle_root(sum(self.images, [])),
      "slices": [{"num_images": len(one), "root": manifest_lib.merkle_root(one)} for one in self.images],
      "stages": [
        {
          "epochs": epochs,
          "first_step": ends[r],
          "last_step": ends[r + 1],
          "before": states[r],
          "after": states[r + 1],
        }
        for r, epochs in enumerate(self.schedule.stage_epochs)
      ],
      "parameters": manifest_lib.tree_digest(safetensors_io.load(file)),
      "environment": environment(),
      "files": file_digests(path),
    }


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What a version's stages share."""

  model: Model
  step: state.StepFn
  fresh: state.TrainState
  mesh: Any

  @classmethod
  def of(cls, training: Training) -> "_Parts":
    config, bundle = training.config, training.bundle
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
    model = bundle.model()
    step, optimizer = build_step(config, model)
    name = int.from_bytes(hashlib.sha256(training.name.encode()).digest()[:4], "big") >> 1
    key = jax.random.fold_in(jax.random.key(config.seed), name)
    fresh = state.create_sharded(model.network.init, optimizer, key, mesh, config.mesh.rules)
    if bundle.is_adapted:
      fresh = state.with_variables(fresh, jax.jit(model.network.on)(bundle.plain_backbone(), key))
    elif bundle.backbone is not None:  # every shard starts from the same network, and trains all of it
      fresh = state.with_variables(fresh, bundle.backbone)
    return cls(model, step, fresh, mesh)


def check(training: Any, image_shape: tuple[int, int, int], num_classes: int, backbone: Any) -> None:
  """InputError, before anything is written, for sections of training that do not go together; backbone: variables or None."""
  if jax.process_count() > 1:
    raise InputError("a shard is trained by one process; several share shards out by cdm.only")
  model = build_model(training, image_shape, num_classes)
  build_step(training, model)
  train = training.train
  loop.Plan(1, train.log_every, train.checkpoint_every, 0, train.steps_per_dispatch)
  parallel.check_batch(train.batch_size, parallel.make_mesh(*(training.mesh[a] for a in parallel.AXES)))
  if backbone is None:
    return
  key = jax.random.key(0)
  fresh = jax.eval_shape(model.network.init, key)
  started = jax.eval_shape(model.network.on, backbone, key) if training.adapter.name != "none" else backbone
  wanted, found = (shapes_by_name(tree) for tree in (fresh, started))
  if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
    name = wrong[0]
    raise InputError(
      f"init_from does not fit the model: {name} is {found.get(name, 'absent')}, expected {wanted.get(name, 'nothing')}"
    )


def build_step(config: Any, model: Model) -> tuple[state.StepFn, Any]:
  """(training step, optimizer): the mean loss of the images of a batch that are there, each with noise of its own key."""
  batch_size = config.train.batch_size
  schedule = config_lib.build(optimizers.IMAGE_SCHEDULES, config.schedule, batch_size=batch_size)
  optimizer = config_lib.build(optimizers.OPTIMIZERS, config.optimizer, schedule=schedule)
  flips = config_lib.build(augment.AUGMENTATIONS, config.augment)
  decay = functools.partial(
    half_life_decay,
    batch_size=batch_size,
    half_life=config.ema.half_life,
    rampup_ratio=config.ema.rampup_ratio or None,
  )
  decay(jnp.array(1))  # raises for numbers that are no average

  def loss(params, collections, batch, key, step):
    flip_key, dropout_key = jax.random.split(key)
    keys = jax.random.wrap_key_data(batch["key"], impl=LOCAL_KEYS)
    denoiser = model.denoiser({"params": params, **collections}, batch["label"], dropout_key=dropout_key)
    of_each = model.loss(denoiser, to_signed(flips(batch["image"], flip_key)), keys)
    mask = batch["mask"]
    value = jnp.where(mask, of_each, 0).sum() / mask.sum()
    return value, (collections, {"learning_rate": schedule.learning_rate(step)})

  return state.make_train_step(loss, optimizer, decay), optimizer


def _stored(train_state: state.TrainState) -> dict[str, np.ndarray]:
  """The arrays of a training state by name, the frozen backbone left out; keys as their data."""
  gathered = parallel.gather_to_host(state.without_backbone(train_state)[0])
  return {name: np.asarray(leaf, order="C") for name, leaf in leaves_by_name(gathered).items()}


def _restored(file: pathlib.Path, like: state.TrainState) -> state.TrainState:
  """The state of a file, its arrays placed as those of `like`, whose backbone it keeps."""
  flat = safetensors_io.load_flat(file)
  moving, frozen = state.without_backbone(like)

  def placed(path, leaf):
    name = leaf_name(path)
    if name not in flat:
      raise InputError(f"{file} holds no {name!r}: it is of another network or optimizer")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.device_put(
        jax.random.wrap_key_data(flat[name], impl=jax.random.key_impl(leaf)), leaf.sharding
      )
    return parallel.place(flat[name], leaf)

  return state.joined(jax.tree_util.tree_map_with_path(placed, moving), frozen)
