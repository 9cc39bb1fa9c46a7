"""The training state and the one training step that every trainer of the library uses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_trustdiff import parallel
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.training.ema import power_update
from jax_trustdiff.types import BACKBONE, OBJECTIVE, PyTree, Variables

# (params, collections, batch, key, step) -> (scalar loss, (new collections, metrics: dict of scalars))
LossFn = Callable[[PyTree, PyTree, Any, jax.Array, jax.Array], tuple[jax.Array, tuple[PyTree, dict]]]
StepFn = Callable[["TrainState", Any], tuple["TrainState", dict]]


@register_pytree
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a run needs to go on exactly where it was."""

  # Not annotated as arrays: checkpointing and eval_shape build this class of shapes too.
  step: PyTree  # [] int32, optimizer steps taken
  key: PyTree  # [] typed key of the run, never changed: the key of step s is fold_in(key, s)
  params: PyTree  # float32
  # the other collections by name: running statistics, constants, and the state of a training objective
  collections: PyTree
  ema: PyTree  # averaged parameters, float32
  power_averages: (
    PyTree  # a tuple of power-function averages, one for each std asked for (see `training.ema`)
  )
  opt_state: PyTree

  @property
  def ema_variables(self) -> Variables:
    """The averaged parameters with the network's other collections of the raw model: what is evaluated and exported."""
    collections = {name: tree for name, tree in self.collections.items() if name != OBJECTIVE}
    return {"params": self.ema, **collections}


def create(
  init: Callable[[jax.Array], Variables],
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  num_power_averages: int = 0,
) -> TrainState:
  """A fresh state: parameters from one half of `key`, the run's own key from the other."""
  init_key, run_key = jax.random.split(key)
  variables = init(init_key)
  params = variables["params"]
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    key=run_key,
    params=params,
    collections={name: value for name, value in variables.items() if name != "params"},
    ema=jax.tree.map(jnp.copy, params),
    power_averages=tuple(jax.tree.map(jnp.copy, params) for _ in range(num_power_averages)),
    opt_state=optimizer.init(params),
  )


def shapes(
  init: Callable[[jax.Array], Variables],
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  rules: tuple[tuple[str, Any], ...],
  num_power_averages: int = 0,
) -> TrainState:
  """The shapes, types and shardings of what `create` makes: a TrainState of ShapeDtypeStructs; nothing is computed.

  rules: (regex, rule) pairs of `parallel.shardings`; InputError for a rule that is unknown or does not fit the
  shape of an array it is for.
  """
  abstract = jax.eval_shape(lambda key: create(init, optimizer, key, num_power_averages), jax.random.key(0))
  shardings = parallel.shardings(mesh, abstract, rules)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def create_sharded(
  init: Callable[[jax.Array], Variables],
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  mesh: jax.sharding.Mesh,
  rules: tuple[tuple[str, Any], ...],
  num_power_averages: int = 0,
) -> TrainState:
  """`create`, with every array born in its shards; InputError as `shapes`."""
  shardings = jax.tree.map(lambda x: x.sharding, shapes(init, optimizer, mesh, rules, num_power_averages))
  born = jax.jit(lambda key: create(init, optimizer, key, num_power_averages), out_shardings=shardings)
  return born.lower(key).compile(compiler_options=parallel.quick_compilation())(key)


def with_variables(state: TrainState, variables: Variables) -> TrainState:
  """`state` with its parameters, their averages and the other collections replaced, each leaf put where it was.

  The state of an objective, which no variables hold, stays.
  """
  params = variables["params"]
  collections = {name: value for name, value in variables.items() if name != "params"}
  return dataclasses.replace(
    state,
    params=parallel.place(params, state.params),
    ema=parallel.place(params, state.ema),
    power_averages=tuple(parallel.place(params, average) for average in state.power_averages),
    collections=state.collections
    | parallel.place(collections, {k: v for k, v in state.collections.items() if k != OBJECTIVE}),
  )


def with_backbone(state: TrainState, backbone: Variables) -> TrainState:
  """`state` with these variables of its frozen network, each leaf put where it was."""
  return joined(state, {BACKBONE: parallel.place(backbone, state.collections[BACKBONE])})


def without_backbone(state: TrainState) -> tuple[TrainState, Variables]:
  """(what of `state` training changes, the collection of a frozen network, {} if there is none); `joined` undoes it."""
  kept = {name: tree for name, tree in state.collections.items() if name != BACKBONE}
  frozen = {name: tree for name, tree in state.collections.items() if name == BACKBONE}
  return dataclasses.replace(state, collections=kept), frozen


def joined(state: TrainState, collections: Variables) -> TrainState:
  """`state` with these collections beside, or in place of, its own."""
  return dataclasses.replace(state, collections=state.collections | collections)


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  decay: Callable[[jax.Array], jax.Array],
  accumulate: int = 1,
  power_stds: tuple[float, ...] = (),
) -> StepFn:
  """The step (state, batch) -> (state, metrics): loss, gradient, update, average; nothing is compiled here.

  decay(t) is the factor of the parameter average at step t = 1, 2, ... (`optimizers.ema_decay`, `ema.half_life_decay`).
  power_stds: of the state's power-function averages.
  accumulate > 1 splits the batch into that many micro-batches, one after the other: gradients and metrics are
  averaged, each micro-batch has its own key and its own batch-normalisation statistics (ghost batch
  normalisation), and running statistics move once per micro-batch.
  """
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

  def micro_step(params, collections, batch, key, step):
    (loss, (collections, metrics)), grads = value_and_grad(params, collections, batch, key, step)
    return grads, collections, {"loss": loss, **metrics}

  def accumulated(params, collections, batch, key, step):
    # Row i*accumulate + a goes to micro-batch a, so that rows sharded over devices stay where they are.
    split = jax.tree.map(
      lambda x: jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1), batch
    )

    def body(carry, item):
      total, collections = carry
      index, micro = item
      grads, collections, metrics = micro_step(
        params, collections, micro, jax.random.fold_in(key, index), step
      )
      return (jax.tree.map(jnp.add, total, grads), collections), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    (grads, collections), metrics = jax.lax.scan(body, (zeros, collections), (jnp.arange(accumulate), split))
    return jax.tree.map(lambda g: g / accumulate, grads), collections, jax.tree.map(jnp.mean, metrics)

  def train_step(state: TrainState, batch) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(state.key, state.step)
    grads_of = accumulated if accumulate > 1 else micro_step
    grads, collections, metrics = grads_of(state.params, state.collections, batch, key, state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    factor = decay(state.step + 1)
    ema = jax.tree.map(lambda e, p: (factor * e + (1 - factor) * p).astype(e.dtype), state.ema, params)
    powers = power_update(state.power_averages, params, state.step + 1, power_stds)
    metrics = {**metrics, "grad_norm": _global_norm(grads)}
    new_state = TrainState(state.step + 1, state.key, params, collections, ema, powers, opt_state)
    return new_state, metrics

  return train_step


def _global_norm(tree: PyTree) -> jax.Array:
  return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))
