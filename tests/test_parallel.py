"""Meshes, shardings, multi-host starts: eight devices, in one process or two, give what one gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from parallel_worker import tiny_source
from workers import flags

from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline
from jax_trustdiff.types import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_workers(num_processes: int, devices_each: int, folder: pathlib.Path) -> list[dict]:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  env = os.environ | {
    "XLA_FLAGS": flags(devices_each),
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  worker = str(ROOT / "tests" / "parallel_worker.py")
  outputs = [folder / f"{i}.json" for i in range(num_processes)]
  commands = [
    [sys.executable, worker, str(i), str(num_processes), address, str(o)] for i, o in enumerate(outputs)
  ]
  processes = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
  for process in processes:
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr[-3000:]
  return [json.loads(output.read_text()) for output in outputs]


def expected_batches() -> dict:
  source = tiny_source()
  sampler = pipeline.EpochSampler(len(source), 8, seed=1)
  batches = [source.take(sampler.indices(step)) for step in (11, 12, 13)]
  return {name: np.stack([b[name] for b in batches]).astype(int).tolist() for name in batches[0]}


@pytest.mark.parametrize("num_processes, devices_each", [(1, 8), (2, 4)])
def test_eight_devices_give_the_batches_of_one(num_processes, devices_each, tmp_path):
  results = run_workers(num_processes, devices_each, tmp_path)
  expected = expected_batches()
  rows = [row for result in results for row in result["rows"]]
  assert sorted(rows) == list(range(8))
  for i, result in enumerate(results):
    assert result["started"] == (num_processes > 1)
    assert result["processes"] == num_processes
    assert result["main"] == (i == 0)
    assert result["mesh"] == {"data": 4, "model": 2, "shard": 1}
    assert result["kernel_piece"] == [3, 3, 32, 32]
    assert result["gathered"] and result["key"]
    assert result["payload_rows"] == [3, 2]
    assert result["ResidentFeed"] == expected
    assert result["StreamingFeed"] == expected
    assert result["eval_ids"] == list(range(100))
    assert result["eval_shapes"] == [[24, 4, 4, 3]] * 5


@pytest.mark.floor
def test_mesh_of_the_devices_at_hand():
  count = jax.device_count()
  mesh = parallel.make_mesh()
  assert dict(mesh.shape) == {"data": count, "model": 1, "shard": 1}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  assert dict(parallel.make_mesh(data=1, shard=-1).shape) == {"data": 1, "model": 1, "shard": count}


def test_mesh_sizes_that_do_not_fit_are_refused():
  with pytest.raises(InputError, match=r"data=-1, model=7, shard=1 does not fit \d+ device"):
    parallel.make_mesh(model=7)
  with pytest.raises(InputError, match="at most one of them is -1"):
    parallel.make_mesh(data=-1, model=-1)
  with pytest.raises(InputError, match="positive"):
    parallel.make_mesh(data=0)
  with pytest.raises(InputError, match="multiply to"):
    parallel.make_mesh(data=jax.device_count() * 2)


def abstract_mesh(data: int, model: int, shard: int = 1) -> jax.sharding.AbstractMesh:
  return jax.sharding.AbstractMesh((data, model, shard), parallel.AXES)


def test_sharding_rules_go_by_path_in_order():
  tree = {
    "params": {"conv": {"kernel": np.zeros((3, 3, 16, 64)), "bias": np.zeros(64)}, "odd": np.zeros((333, 5))},
    "stack": np.zeros((8, 10)),
  }
  rules = [("bias$", "replicate"), ("^stack", ("shard", None)), ("params/", "fsdp")]
  specs = jax.tree.map(lambda s: s.spec, parallel.shardings(abstract_mesh(2, 4, 2), tree, rules))
  assert specs["params"]["conv"]["kernel"] == P(None, None, None, "model")
  assert specs["params"]["conv"]["bias"] == P()
  assert specs["params"]["odd"] == P()  # large enough, but 4 divides no dimension
  assert specs["stack"] == P("shard", None)
  small = parallel.shardings(
    abstract_mesh(2, 4), {"w": np.zeros((31, 32)), "v": np.zeros((32, 32))}, [("", "fsdp")]
  )
  assert small["w"].spec == P() and small["v"].spec == P(None, "model")  # 992 and 1024 elements
  assert parallel.shardings(abstract_mesh(2, 4), {"w": np.zeros((64, 64))}, [])["w"].spec == P()


@pytest.mark.parametrize(
  "rule, message",
  [
    ("fdsp", "unknown sharding rule 'fdsp' for w"),
    (("model", None, None), "more entries than w"),
    (("rows",), "no mesh axis 'rows'"),
    (("model",), "not divisible by 4"),
  ],
)
def test_wrong_sharding_rules_are_refused(rule, message):
  with pytest.raises(InputError, match=message):
    parallel.shardings(abstract_mesh(2, 4), {"w": np.zeros((6, 8))}, [("w", rule)])


def test_batch_must_divide_over_the_data_axis():
  parallel.check_batch(32, abstract_mesh(8, 1))
  with pytest.raises(InputError, match="batch size 30 is not divisible by the 8 devices of the data axis"):
    parallel.check_batch(30, abstract_mesh(8, 1))
  with pytest.raises(InputError, match="batch size 0"):
    parallel.check_batch(0, abstract_mesh(8, 1))


@pytest.mark.parametrize(
  "env, expected",
  [
    ({}, None),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, ("a:1", 2, 1)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1",)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, ()),
    ({"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
    (
      {"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
      None,
    ),
    ({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, None),  # a login or batch script, not srun
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "h0,h1"}, ()),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "h0", "MEGASCALE_NUM_SLICES": "2"}, ()),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "h0,h1"}, None),  # no TPU in this machine
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, ()),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # some pod, not an indexed job
  ],
)
def test_what_the_environment_says(env, expected):
  names = ("coordinator_address", "num_processes", "process_id")
  expected = None if expected is None else dict(zip(names, expected, strict=False))
  assert parallel.environment_start(env) == expected


def test_wrong_start_arguments_are_refused():
  with pytest.raises(InputError, match="missing: \\['num_processes', 'process_id'\\]"):
    parallel.start_distributed("10.0.0.1:1234")
  with pytest.raises(InputError, match="host:port"):
    parallel.start_distributed("10.0.0.1", 2, 0)
  with pytest.raises(InputError, match="process_id 2 is not in 0..1"):
    parallel.start_distributed("10.0.0.1:1234", 2, 2)
  with pytest.raises(InputError, match="set both or neither"):
    parallel.environment_start({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"})
  with pytest.raises(InputError, match="need JAX_COORDINATOR_ADDRESS"):
    parallel.environment_start({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})
  with pytest.raises(InputError, match="JAX_PROCESS_ID is a number; found 'x'"):
    parallel.environment_start(
      {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}
    )
