"""The command line: python -m jax_trustdiff.main --config=configs/at_cifar.py [--workdir=DIR] [--config.key=value ...]

Exit codes: 0 done; 1 the run failed (one line says why); 2 bad input, nothing was written;
143 or 130 stopped by SIGTERM or Ctrl-C after saving: the same command goes on from there.
"""

import errno
import pathlib
import re
import sys
from collections.abc import Iterator

from absl import flags
from ml_collections import config_flags

_USAGE = """\
usage: python -m jax_trustdiff.main --config=RECIPE[:variant,...] [--workdir=DIR] [--config.key=value ...]

  --config=configs/at_cifar.py:cpu   a recipe, looked for here and then among the installed ones, and its variants
  --config.section.key=value         overrides one key of it
  --workdir=DIR                      where the run writes and resumes (default: runs/<recipe>-<config hash>)
  --print_config                     shows every key with its value and ends
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                                     one process of a multi-host run, started by hand; on TPU pods, under SLURM
                                     and on Kubernetes the environment says it
  --help                             this text
"""


def main(argv: list[str]) -> int:
  """Runs one command line (argv[0] is the program) and returns the exit code."""
  if any(re.fullmatch(r"--?(help(short|full)?|h)", arg) for arg in argv[1:]):
    print(_USAGE, end="")
    return 0
  from jax_trustdiff.types import InputError, RunError, Stopped

  try:
    return _run(argv)
  except InputError as error:
    return _say(2, "error", error)
  except RunError as error:
    return _say(1, "error", error)
  except Stopped as stopped:
    return _say(stopped.exit_code, "stopped", stopped)
  except KeyboardInterrupt:  # outside of the training loop, which saves first
    return _say(130, "stopped", "nothing was lost: the same command goes on from the last checkpoint")
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    return _say(1, "error", f"the disk is full: {error}")


def cli() -> None:
  """The console script `jax_trustdiff`."""
  sys.exit(main(sys.argv))


def _run(argv: list[str]) -> int:
  from jax_trustdiff import config as config_lib

  options, config, recipe = _parse(argv)
  if options.print_config:
    for key, value in config_lib.flatten(config).items():
      print(f"{key} = {value!r}")
    return 0

  from jax_trustdiff import parallel, tasks
  from jax_trustdiff.tasks import seeds
  from jax_trustdiff.training.workdir import Workdir

  parallel.start_distributed(options.coordinator, options.num_processes, options.process_id)
  parallel.enable_compilation_cache()
  task = tasks.find(config.task)
  name = pathlib.Path(recipe.partition(":")[0]).stem
  folder = options.workdir or f"runs/{name}-{config_lib.config_hash(config)}"
  workdir = Workdir(folder, config, of_parts=getattr(task, "OF_PARTS", False))
  metrics = seeds.complete(task, config, workdir)
  if parallel.is_main_process():
    for key, value in metrics.items():
      print(f"{key} = {value:.4f}" if isinstance(value, float) else f"{key} = {value}")
    print(f"result: {workdir.path / 'result.json'}")
  return 0


def _parse(argv: list[str]):
  """(own flags, config with overrides, recipe string); every mistake is an InputError."""
  from jax_trustdiff import config as config_lib
  from jax_trustdiff.types import InputError

  recipe, rest = _take_recipe(argv[1:])
  if recipe is None:
    raise InputError("no recipe: give --config=configs/quickstart.py, for example, or --help")
  config = config_lib.load(recipe)
  config_lib.rename(config, dict(_names(rest)))
  for arg in rest:
    if match := re.match(r"--?(?:no)?config\.([^=]+)", arg):
      config_lib.check_key(config, match[1])

  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "where the run writes and resumes", flag_values=values)
  flags.DEFINE_bool("print_config", False, "show every key and end", flag_values=values)
  flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
  flags.DEFINE_integer("num_processes", None, "processes of the run", flag_values=values)
  flags.DEFINE_integer("process_id", None, "which of them this is", flag_values=values)
  program = [argv[0], *rest]
  config_flags.DEFINE_config_dict("config", config, lock_config=True, flag_values=values, sys_argv=program)
  try:
    left_over = values(program)[1:]
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(" ".join(str(error).split())) from None
  if left_over:
    raise InputError(f"cannot read {left_over[0]!r}: an option is --workdir=DIR or --config.key=value")
  return values, values.config, recipe


def _take_recipe(args: list[str]) -> tuple[str | None, list[str]]:
  """The value of --config (the last one given) and the arguments without it."""
  recipe, rest, waiting = None, [], False
  for arg in args:
    if waiting:
      recipe, waiting = arg, False
    elif re.fullmatch(r"--?config", arg):
      waiting = True
    elif match := re.match(r"--?config=(.*)", arg):
      recipe = match[1]
    else:
      rest.append(arg)
  return recipe, rest


def _names(args: list[str]) -> Iterator[tuple[str, str]]:
  """('data.name', 'digits') of each --config.data.name=digits or --config.data.name digits."""
  for i, arg in enumerate(args):
    if match := re.fullmatch(r"--?config\.([^=]+\.name)(?:=(.*))?", arg):
      value = match[2] if match[2] is not None else "".join(args[i + 1 : i + 2])
      yield match[1], value.strip("'\"")


def _say(code: int, what: str, message) -> int:
  sys.stdout.flush()
  print(f"{what}: {' '.join(str(message).split())}", file=sys.stderr)
  return code


if __name__ == "__main__":
  cli()
