"""Measures our code beside a peer doing the same work in the same run, in turns."""

from jax_trustdiff import config as config_lib
from jax_trustdiff.evaluation import report
from jax_trustdiff.tasks.benchmark_at_step import at_step
from jax_trustdiff.tasks.benchmark_augment import augment
from jax_trustdiff.tasks.benchmark_autoattack import autoattack
from jax_trustdiff.tasks.benchmark_diffusion import edm_train, sampler
from jax_trustdiff.tasks.benchmark_mixture import mixture
from jax_trustdiff.training.workdir import Workdir

BENCHMARKS = {
  "at_step": at_step,
  "augment": augment,
  "autoattack": autoattack,
  "sampler": sampler,
  "edm_train": edm_train,
  "mixture": mixture,
}


def run(config, workdir: Workdir) -> dict[str, float]:
  """The figures of the benchmark that config.benchmark names; a table on the screen, a plot in workdir/report."""
  benchmark = config_lib.build(BENCHMARKS, config.benchmark)
  workdir.open()
  metrics = benchmark(workdir)
  (workdir / "report").mkdir(exist_ok=True)
  ratios = {
    name.removesuffix("/ratio"): {"ours / peer": v} for name, v in metrics.items() if name.endswith("/ratio")
  }
  if ratios:
    report.bars(
      ratios, workdir / "report" / "ratios.png", ylabel="time of ours / time of the peer", percent=False
    )
  return metrics
