"""Meshes, shardings, host <-> device arrays, and the start of multi-host runs: all in this one file.

Every array is global. One process with one device, one process with eight, and many processes run the same
program: `jax.jit` over a mesh with the axes

    data    rows of the batch
    model   pieces of the parameters (fully sharded data parallelism, 'fsdp')
    shard   members of a compartmentalised mixture

A process feeds only the rows its own devices hold (`process_rows`, `to_global`).
"""

import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_trustdiff.pytrees import leaf_name
from jax_trustdiff.types import InputError, PyTree

AXES = ("data", "model", "shard")
FSDP_MIN_SIZE = 1024  # leaves with fewer elements are replicated: sending them costs more than keeping them

AnyMesh = Mesh | AbstractMesh  # plans need no devices
Rule = str | tuple  # 'replicate', 'fsdp', or one axis name (or None, or a tuple of names) for each dimension


# ---- starting several processes ----


def start_distributed(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
  """Connects this process to the others of the run, if there are others; True if it did.

  Call it before anything touches a device. With arguments: 'host:port' of process 0, how many processes
  there are, and which one this is. Without: what the environment says (see `environment_start`).
  A single process is not an error; it returns False and runs alone.
  """
  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  if coordinator is not None or num_processes is not None or process_id is not None:
    missing = [name for name, value in given.items() if value is None]
    if missing:
      raise InputError(
        f"a multi-process start needs coordinator, num_processes and process_id; missing: {missing}"
      )
    arguments = _checked(coordinator, num_processes, process_id)
  else:
    arguments = environment_start(os.environ)
  if arguments is None:
    return False
  jax.distributed.initialize(**arguments)
  return True


def environment_start(env: Mapping[str, str]) -> dict | None:
  """Arguments for `jax.distributed.initialize` as the environment asks, or None for a process on its own.

  In this order:
  * JAX_COORDINATOR_ADDRESS (host:port) with JAX_NUM_PROCESSES and JAX_PROCESS_ID; JAX_NUM_PROCESSES=1 means
    alone. Without the latter two, jax asks the cluster it finds itself in.
  * SLURM: a step started by `srun` with more than one task.
  * Cloud TPU: several workers (TPU_WORKER_HOSTNAMES, TPU_PROCESS_ADDRESSES, the metadata server) or slices.
  * Kubernetes: a pod of an Indexed Job (JOB_COMPLETION_INDEX); jax asks the cluster's API, which needs the
    package `kubernetes`.
  """
  address, count, index = (
    env.get(f"JAX_{n}") for n in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
  )
  if count == "1":
    return None
  if address:
    if (count is None) != (index is None):
      raise InputError("JAX_NUM_PROCESSES and JAX_PROCESS_ID go together: set both or neither")
    if count is None:
      return {"coordinator_address": address}
    return _checked(address, _integer("JAX_NUM_PROCESSES", count), _integer("JAX_PROCESS_ID", index))
  if count or index:
    raise InputError(
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID need JAX_COORDINATOR_ADDRESS (host:port of process 0)"
    )
  if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if int(tasks) > 1:
      return {}
  if _tpu_workers(env) > 1:
    return {}
  if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
    return {}
  return None


def is_main_process() -> bool:
  """True in the one process that writes files and prints."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when every process has reached the barrier of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def of_main_process(value: PyTree) -> PyTree:
  """The number, or array, that process 0 holds, in every process; all must ask."""
  return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


def enable_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder; JAX_COMPILATION_CACHE_DIR names another, '' none."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    base = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    jax.config.update("jax_compilation_cache_dir", os.path.join(base, "jax_trustdiff", "xla"))


def quick_compilation() -> dict | None:
  """Compiler options for a program that runs once: XLA:CPU optimises less and compiles several times as fast."""
  return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None


# ---- meshes and shardings ----


def make_mesh(data: int = -1, model: int = 1, shard: int = 1) -> Mesh:
  """Mesh of all devices with the axes 'data', 'model' and 'shard'; -1 for one of them takes what remains.

  The compiler chooses intermediate shardings (AxisType.Auto). The product of the sizes is the device count.
  """
  sizes, found = [data, model, shard], jax.device_count()
  asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise InputError(f"mesh sizes are positive, and at most one of them is -1; found {asked}")
  known = math.prod(size for size in sizes if size != -1)
  if found % known or (-1 not in sizes and known != found):
    raise InputError(
      f"mesh {asked} does not fit {found} device(s): the sizes must multiply to {found} (-1: what remains)"
    )
  sizes = [found // known if size == -1 else size for size in sizes]
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_local_mesh(shard: int = 1) -> Mesh:
  """Mesh of this process's devices, `shard` of them on that axis and the rest on 'data': for work that processes share out without talking."""
  if jax.local_device_count() % shard:
    raise InputError(f"{jax.local_device_count()} devices are no multiple of {shard} on the axis 'shard'")
  sizes = (jax.local_device_count() // shard, 1, shard)
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.local_devices())


def replicated(mesh: AnyMesh) -> NamedSharding:
  """Sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh, axis: int = 0) -> NamedSharding:
  """Sharding that splits the dimension `axis` (the rows of a batch) over the data axis."""
  return NamedSharding(mesh, PartitionSpec(*([None] * axis), "data"))


def shardings(mesh: AnyMesh, tree: PyTree, rules: Sequence[tuple[str, Rule]]) -> PyTree:
  """NamedShardings in the structure of `tree` (arrays or `jax.eval_shape` results).

  rules: (regex, rule) pairs, tried in order with `re.search` on the leaf's path, e.g. 'params/conv1/kernel'.
    'replicate'         a copy on every device
    'fsdp'              the largest dimension that mesh 'model' divides is split over it; leaves with fewer
                        than 1024 elements, or with no such dimension, are replicated
    ('shard', None, ..) one entry for each leading dimension: an axis name, several names, or None
  A leaf that no pair matches is replicated.
  """
  rules = [(re.compile(pattern), rule) for pattern, rule in rules]

  def leaf_sharding(path, leaf):
    name = leaf_name(path)
    rule = next((rule for pattern, rule in rules if pattern.search(name)), "replicate")
    return NamedSharding(mesh, _partition(mesh, name, leaf.shape, rule))

  return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def check_batch(batch_size: int, mesh: AnyMesh) -> None:
  """Raises InputError unless the devices of the data axis can share `batch_size` rows evenly."""
  devices = mesh.shape["data"]
  if batch_size < 1 or batch_size % devices:
    raise InputError(f"batch size {batch_size} is not divisible by the {devices} devices of the data axis")


# ---- host <-> device ----


def process_rows(global_batch: int, mesh: Mesh) -> np.ndarray:
  """Indices [n] of the rows of a global batch that this process supplies to `to_global`, increasing.

  They are the rows its devices hold under `batch_sharding(mesh)`: all of them in a single process, and a
  block of the batch where the devices of a process are neighbours on the data axis.
  """
  check_batch(global_batch, mesh)
  held = batch_sharding(mesh).addressable_devices_indices_map((global_batch,)).values()
  rows = [np.arange(global_batch)[index[0]] for index in held]
  return np.unique(np.concatenate(rows))


def to_global(mesh: Mesh, local: PyTree, sharding: NamedSharding | None = None) -> PyTree:
  """Global arrays from the part of each that this process supplies (numpy arrays, any tree of them).

  sharding: of the global arrays, `batch_sharding(mesh)` by default; dimensions that are not split over
  processes are given whole.
  """
  sharding = batch_sharding(mesh) if sharding is None else sharding
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def replicate_to_devices(mesh: Mesh, tree: PyTree, split: str = "") -> PyTree:
  """The host arrays of `tree`, equal in every process, copied to every device of the mesh.

  split: of leaves whose path has a match of this regular expression, the first dimension is shared out over the axis 'shard'.
  """

  def place(path, x):
    of_shards = split and re.search(split, leaf_name(path))
    return copy(x, NamedSharding(mesh, PartitionSpec("shard")) if of_shards else replicated(mesh))

  def copy(x, sharding):
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(copy(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree_util.tree_map_with_path(place, tree)


def place(tree: PyTree, like: PyTree) -> PyTree:
  """The host arrays of `tree`, equal in every process, with the dtypes and shardings of the arrays of `like`."""

  def put(x, old):
    x = np.asarray(x, old.dtype)
    if x.shape != old.shape:
      raise InputError(f"an array of shape {x.shape} does not fit where one of shape {old.shape} belongs")
    return jax.make_array_from_callback(x.shape, old.sharding, lambda index: x[index])

  return jax.tree.map(put, tree, like)


def gather_to_host(tree: PyTree) -> PyTree:
  """The whole arrays of `tree` as numpy, in every process; all processes must call it together.

  Typed random keys come back as their key data (uint32).
  """

  def gather(x):
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, tree)


# ---- helpers ----


def _checked(coordinator: str, num_processes: int, process_id: int) -> dict:
  if not re.fullmatch(r".+:\d+", coordinator):
    raise InputError(
      f"the coordinator is host:port of process 0, e.g. '10.0.0.1:1234'; found {coordinator!r}"
    )
  if not 0 <= process_id < num_processes:
    raise InputError(
      f"process_id {process_id} is not in 0..{num_processes - 1} (num_processes={num_processes})"
    )
  return {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}


def _integer(name: str, text: str) -> int:
  if not re.fullmatch(r"\d+", text):
    raise InputError(f"{name} is a number; found {text!r}")
  return int(text)


def _tpu_workers(env: Mapping[str, str]) -> int:
  """How many hosts the Cloud TPU of this machine has over all its slices; 1 where there is no TPU."""
  if "TPU_ML_PLATFORM" not in env:  # jax sets it when it finds TPU chips and their library
    return 1
  slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
  hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
  if not hosts and "TPU_SKIP_MDS_QUERY" not in env:
    hosts = _metadata(env, "worker-network-endpoints")
  return slices * len((hosts or "localhost").split(","))


def _metadata(env: Mapping[str, str], key: str) -> str | None:
  """An attribute of this Google Cloud machine, or None on a machine that has no such attribute."""
  host = env.get("GCE_METADATA_IP", "metadata.google.internal")
  url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
  try:
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    return urllib.request.urlopen(request, timeout=5).read().decode()
  except (urllib.error.URLError, TimeoutError):
    return None


def _partition(mesh: AnyMesh, name: str, shape: tuple[int, ...], rule: Rule) -> PartitionSpec:
  if rule == "replicate":
    return PartitionSpec()
  if rule == "fsdp":
    pieces = mesh.shape["model"]
    fits = [i for i, size in enumerate(shape) if size % pieces == 0]
    if pieces == 1 or math.prod(shape) < FSDP_MIN_SIZE or not fits:
      return PartitionSpec()
    largest = max(fits, key=lambda i: (shape[i], i))
    return PartitionSpec(*([None] * largest), "model")
  if isinstance(rule, str) or not isinstance(rule, Sequence):
    raise InputError(
      f"unknown sharding rule {rule!r} for {name}: use 'replicate', 'fsdp' or a tuple of axis names"
    )
  if len(rule) > len(shape):
    raise InputError(
      f"sharding rule {tuple(rule)} has more entries than {name} of shape {shape} has dimensions"
    )
  for size, entry in zip(shape, rule, strict=False):
    axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    unknown = [axis for axis in axes if axis not in mesh.shape]
    if unknown:
      raise InputError(
        f"sharding rule {tuple(rule)} for {name}: no mesh axis {unknown[0]!r}, only {list(mesh.shape)}"
      )
    pieces = math.prod(mesh.shape[axis] for axis in axes)
    if size % pieces:
      raise InputError(
        f"sharding rule {tuple(rule)}: {name} of shape {shape} is not divisible by {pieces} there"
      )
  return PartitionSpec(*rule)
