"""One process of the runs that test_parallel.py starts: writes what it computed as JSON.

Arguments: process id, number of processes, coordinator address, output file.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, sources


def tiny_source() -> sources.ImageSource:
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (100, 4, 4, 3)).astype(np.uint8), rng.integers(0, 10, 100)
  return sources.image_source([images], [labels], "tiny", 10)


def main(process_id: int, num_processes: int, coordinator: str) -> dict:
  started = num_processes > 1 and parallel.start_distributed(coordinator, num_processes, process_id)
  mesh = parallel.make_mesh(data=-1, model=2)
  out = {"started": started, "processes": jax.process_count(), "mesh": dict(mesh.shape)}
  out["main"] = parallel.is_main_process()
  out["rows"] = parallel.process_rows(8, mesh).tolist()

  tree = {"conv": {"kernel": np.arange(3 * 3 * 64 * 32.0).reshape(3, 3, 64, 32), "bias": np.ones(32)}}
  layout = parallel.shardings(mesh, tree, [("kernel", "fsdp"), ("bias", ("data",))])
  placed = jax.jit(lambda x: jax.tree.map(lambda a: a * 2, x), out_shardings=layout)(
    parallel.replicate_to_devices(mesh, tree)
  )
  out["kernel_piece"] = placed["conv"]["kernel"].addressable_data(0).shape
  gathered = parallel.gather_to_host(placed)
  out["gathered"] = all(np.array_equal(gathered["conv"][k], tree["conv"][k] * 2) for k in ("kernel", "bias"))
  key = jax.random.key(3)
  copied = parallel.replicate_to_devices(mesh, key)
  out["key"] = bool((parallel.gather_to_host(copied) == jax.random.key_data(key)).all())

  source = tiny_source()
  sampler = pipeline.EpochSampler(len(source), 8, seed=1)
  for feed in (pipeline.ResidentFeed(source, sampler, mesh), pipeline.StreamingFeed(source, sampler, mesh)):
    feed.start(11)
    payload, arrays = feed.next(3), feed.arrays
    batches = jax.jit(lambda a, p, feed=feed: jax.lax.map(lambda row: feed.take(a, row), p))(arrays, payload)
    host = parallel.gather_to_host(batches)
    out[type(feed).__name__] = {name: np.asarray(value, int).tolist() for name, value in host.items()}
    feed.close()
  out["payload_rows"] = payload["label"].addressable_data(0).shape
  batches = [parallel.gather_to_host(b) for b in pipeline.eval_batches(source, 24, mesh)]
  out["eval_ids"] = np.concatenate([b["id"][b["mask"]] for b in batches]).tolist()
  out["eval_shapes"] = [b["image"].shape for b in batches]
  parallel.barrier("end")
  return out


if __name__ == "__main__":
  result = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
  pathlib.Path(sys.argv[4]).write_text(json.dumps(result))
