"""The likelihood task: the numbers of every image, whatever the batch, and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.diffusion.likelihood import LIKELIHOODS, dequantise
from jax_trustdiff.diffusion.samplers import SAMPLERS
from jax_trustdiff.tasks import denoisers, evaluate_likelihood
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


def complete(path, **overrides):
  config = config_lib.load("configs/evaluate_likelihood.py:smoke", overrides)
  workdir = Workdir(path, config)
  return workdir.complete(lambda: evaluate_likelihood.run(config, workdir))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
  path = tmp_path_factory.mktemp("likelihood") / "run"
  metrics = complete(path, **{"eval.num_images": 12, "eval.batch_size": 8, "eval.repeats": 2})
  return path, metrics


def test_every_image_has_its_numbers(smoke):
  path, metrics = smoke
  found = np.load(path / "likelihoods.npz")
  test = SOURCES["digits"](split="test")
  assert found["bits_per_dim"].shape == (2, 12) and found["id"].tolist() == test.ids[:12].tolist()
  assert metrics["bits_per_dim"] == pytest.approx(found["bits_per_dim"].mean(), rel=1e-6)
  assert metrics["num_images"] == 12 and metrics["repeats"] == 2 and metrics["nfe"] > 10
  assert (found["bits_per_dim"][0] != found["bits_per_dim"][1]).all()  # repeats draw anew
  np.testing.assert_allclose(found["bits_per_dim"], 7 - found["log_prob"] / (64 * np.log(2)), rtol=1e-5)
  assert (path / "report/report.html").read_text().count("data:image/png") == 2


@pytest.mark.slow
def test_numbers_are_those_of_the_library_and_do_not_depend_on_the_batch(smoke, tmp_path):
  path, _ = smoke
  complete(tmp_path / "run", **{"eval.num_images": 12, "eval.batch_size": 4})
  first, other = (np.load(p / "likelihoods.npz")["log_prob"][0] for p in (path, tmp_path / "run"))
  np.testing.assert_allclose(other, first, atol=5e-2)  # a step of other rounding, at a tolerance of 1e-2
  config = config_lib.load("configs/evaluate_likelihood.py:smoke")
  denoise, _ = denoisers.load_or_make(config)
  solver = config_lib.build(SAMPLERS, config.solver)
  likelihood = config_lib.build(LIKELIHOODS, config.likelihood, solver=solver)
  batch = SOURCES["digits"](split="test").take(np.arange(4))
  keys = jax.random.split(jax.random.key(9), 4)
  labelled = dataclasses.replace(denoise, class_labels=jax.nn.one_hot(batch["label"], 10))
  direct = jax.jit(likelihood)(labelled, dequantise(jnp.asarray(batch["image"]), keys), keys).log_prob
  np.testing.assert_allclose(direct, first[:4], atol=12)  # other probes and other uniform noise
  assert np.corrcoef(direct, first[:4])[0, 1] > 0.5


def test_a_model_of_whole_times():
  """Refused, with the words that help; with these its network is told times in between."""
  plain = config_lib.to_plain(config_lib.load("configs/evaluate_likelihood.py:smoke"))
  plain["untrained"]["preconditioning"] = {"name": "iddpm"}
  config = config_lib.from_plain(plain)
  denoise, known = denoisers.load_or_make(config)
  assert denoise.preconditioning.whole_times and known["denoiser"] == {"name": "iddpm"}
  with pytest.raises(InputError, match="continuous_times=True"):
    evaluate_likelihood.build_likelihood(config, denoise)
  config_lib.override(config, {"continuous_times": True})
  denoise, known = denoisers.load_or_make(config)
  assert not denoise.preconditioning.whole_times
  assert known["denoiser"] == {"name": "iddpm", "whole_times": False}
  likelihood = evaluate_likelihood.build_likelihood(config, denoise)
  assert likelihood.solver.sigma_min == denoise.preconditioning.sigma_min


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"init_from": ""}, "init_from is empty"),
    ({"eval.repeats": 0}, "1 repeat"),
    ({"eval.num_images": 1}, "at least 2 images"),
    ({"untrained.num_classes": 3}, "10 classes and the model 3"),
    ({"untrained.image_shape": (12, 8, 1)}, "images are"),
    ({"solver.name": "euler_maruyama"}, "solver.name must be one of"),
    ({"likelihood.trace": "guess"}, "unknown trace"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(tmp_path / "run", **overrides)
  assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
