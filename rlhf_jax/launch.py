"""How an experiment starts: the process set up for speed, the command line, one clear message.

  from rlhf_jax import launch

  if __name__ == "__main__":
    launch.prepare()  # before anything imports jax

  from rlhf_jax import sft

  def main(config, workdir): ...

  if __name__ == "__main__":
    launch.run(main)

This module imports nothing of jax, so that `prepare` can still choose what jax will find. A script
or notebook that never calls it works as well, on one CPU device.

What `prepare` sets, and what it was measured to give, on a CPU:
- as many devices as cores (XLA_FLAGS), so that a batch sharded over them runs a whole program on
  each core, where one device would share out every small operation;
- huge pages for malloc (GLIBC_TUNABLES, read only when a process starts, hence the one re-exec):
  large temporaries are bound by page faults;
and everywhere
- a compilation cache on disk, so that the second start compiles nothing.
"""

import dataclasses
import glob
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable

DEVICE_FLAG = "--xla_force_host_platform_device_count"
# XLA ends the process when one CPU device has waited 40 s for another; a busy machine takes longer.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
MAX_DEVICES = 8  # more slices of a batch than this leave each too small to be worth a program
PREPARED = "RLHF_JAX_PREPARED"  # set in the re-executed process
# Compiling for less than this costs about what reading the cache does.
CACHE_SECONDS = "0.2"


@dataclasses.dataclass(frozen=True)
class Option:
  """An argument of one experiment, such as --policy; a value has the type of its default."""

  default: str | int | float
  help: str


REQUEUE = 75  # exit status of a run that can go on later, sysexits.h's EX_TEMPFAIL
PROCESSES = {  # which every experiment has
  "coordinator": Option(
    "auto",
    "HOST:PORT of the first of several processes; auto asks SLURM, Open MPI or the TPU pod, none "
    "runs alone",
  ),
  "processes": Option(1, "how many processes there are, where --coordinator is an address"),
  "process": Option(0, "which of them this is, from 0"),
}


def prepare() -> None:
  """Sets this process up for a fast start; on a CPU it may re-execute it, once.

  Call it first thing in a script. The environment wins over it: JAX_PLATFORMS, XLA_FLAGS,
  GLIBC_TUNABLES and JAX_COMPILATION_CACHE_DIR are kept where they say something, and
  RLHF_JAX_DEVICES=n asks for n CPU devices (1: no split). In a notebook the process stays, and so
  does its malloc.
  """
  os.environ.update(cache_settings(os.environ))
  if PREPARED in os.environ or accelerator_in_view(os.environ):
    return
  settings = cpu_settings(os.environ, len(_cores()))
  os.environ.update(settings, **{PREPARED: "1"})
  interactive = "ipykernel" in sys.modules or hasattr(sys, "ps1") or not sys.argv[0]
  if settings and not interactive and "jax" not in sys.modules:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)


def cpu_settings(environ: dict[str, str], cores: int) -> dict[str, str]:
  """The environment variables to change for a CPU with `cores`; {} where all is as it should be."""
  settings = {}
  flags = environ.get("XLA_FLAGS", "")
  devices = environ.get("RLHF_JAX_DEVICES", "") or str(min(MAX_DEVICES, _power_of_two(cores)))
  if DEVICE_FLAG not in flags and devices != "1":
    settings["XLA_FLAGS"] = f"{flags} {DEVICE_FLAG}={devices} {PATIENCE}".strip()
  tunables = environ.get("GLIBC_TUNABLES", "")
  if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
    settings["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, HUGE_PAGES)))
  return settings


def cache_settings(environ: dict[str, str]) -> dict[str, str]:
  """The environment variables that turn jax's compilation cache on, where none says otherwise."""
  home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  wanted = {
    "JAX_COMPILATION_CACHE_DIR": os.path.join(home, "rlhf_jax", "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": CACHE_SECONDS,
  }
  return {name: value for name, value in wanted.items() if name not in environ}


def accelerator_in_view(environ: dict[str, str]) -> bool:
  """Whether jax would find a GPU or TPU: JAX_PLATFORMS decides, else device files and a plugin."""
  platforms = environ.get("JAX_PLATFORMS", "")
  if platforms:
    return platforms.split(",")[0] != "cpu"
  installed = lambda *names: any(importlib.util.find_spec(name) for name in names)
  nvidia = environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and glob.glob("/dev/nvidia[0-9]*")
  if nvidia and installed("jax_cuda12_plugin", "jax_cuda13_plugin"):
    return True
  if os.path.exists("/dev/kfd") and installed("jax_rocm7_plugin"):
    return True
  return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")) and installed("libtpu")


def run(
  main: Callable,
  argv: list[str] | None = None,
  *,
  options: dict[str, Option] | None = None,
  needs: tuple[str, ...] = ("config", "workdir"),
) -> None:
  """Reads the command line, calls `main(config, workdir)`, and ends the process on a user's error.

    python experiments/X.py --config=configs/village.py[:arg] --workdir=W [--config.a.b=value ...]

  Of a run of several processes, each calls it with the same arguments beside its own number; see
  `hosts.start`.

  `main` gets a locked ConfigDict and a `pathlib.Path` (None for one that it does not need and that
  is not given), and each of its `options` by name. A `UserError` becomes one message on stderr and
  exit status 2; any other exception is a bug and keeps its traceback.
  """
  from rlhf_jax import config as config_lib  # here, since they import jax
  from rlhf_jax.parallel import hosts
  from rlhf_jax.training import preemption
  from rlhf_jax.types import UserError

  argv = sys.argv[1:] if argv is None else argv
  options = PROCESSES | (options or {})
  if "--help" in argv or "-h" in argv:
    doc = sys.modules[main.__module__].__doc__ or ""
    sys.stdout.write(f"{doc}\n{_usage(options, needs)}\n{_describe(options)}\n")
    return
  try:
    values, rest = take_options(argv, options)
    hosts.start(values.pop("coordinator"), values.pop("processes"), values.pop("process"))
    preemption.install()
    path, workdir, overrides = parse(rest, options, needs)
    config = config_lib.load(path, overrides) if path else None
    with hosts.first_speaks():
      main(config, pathlib.Path(workdir) if workdir else None, **values)
  except UserError as error:
    hosts.leave(2, f"error: {error}")
  except preemption.Preempted as stopped:
    hosts.leave(REQUEUE, f"SIGTERM: stopped {stopped}; the same command goes on from there.")
  except KeyboardInterrupt:
    hosts.leave(130, "interrupted; the same command goes on from the last checkpoint.")
  except Exception as error:
    if not hosts.is_lost(error):
      raise
    hosts.leave(
      REQUEUE,
      f"error: another process of this run has died or cannot be reached ({str(error)[:200]}). "
      "Start all of them again: the same commands go on from the last checkpoint.",
    )


def take_options(argv: list[str], options: dict[str, Option]) -> tuple[dict, list[str]]:
  """The values of an experiment's own options, and the arguments that are none of them.

  Raises:
    UserError: an option has no value, or one of another type.
  """
  from rlhf_jax.types import UserError

  values, rest = {name: option.default for name, option in options.items()}, []
  arguments = iter(argv)
  for argument in arguments:
    name, equals, value = argument.partition("=")
    name = name.removeprefix("--") if argument.startswith("--") else ""
    if name not in options:
      rest.append(argument)
      continue
    value = value if equals else next(arguments, None)
    kind = type(options[name].default)
    try:
      values[name] = kind(value if value is not None else "")
    except ValueError as error:
      raise UserError(f"argument --{name} takes a value of type {kind.__name__}.") from error
    if values[name] == "":
      raise UserError(f"argument --{name} has no value.")
  return values, rest


def parse(
  argv: list[str],
  options: dict[str, Option] | None = None,
  needs: tuple[str, ...] = ("config", "workdir"),
) -> tuple[str | None, str | None, dict[str, str]]:
  """Parts a command line into (config path, workdir, {"ppo.kl_coef": "0.1", ...}).

  `options` are for the usage only; see `take_options`.

  Raises:
    UserError: an argument that is none of these, one without a value, or one that is missing.
  """
  from rlhf_jax.types import UserError

  given, overrides = {"--config": None, "--workdir": None}, {}
  usage = _usage(options or {}, needs)
  arguments = iter(argv)
  for argument in arguments:
    name, equals, value = argument.partition("=")
    value = value if equals else next(arguments, None)
    if name not in given and not name.startswith("--config."):
      raise UserError(f"unknown argument {argument!r}.\n{usage}")
    if value is None:
      raise UserError(f"argument {name} has no value.\n{usage}")
    if name in given:
      given[name] = value
    else:
      overrides[name.removeprefix("--config.")] = value
  for name in needs:
    if not given[f"--{name}"]:
      raise UserError(f"argument --{name} is missing.\n{usage}")
  return given["--config"], given["--workdir"], overrides


def _usage(options: dict[str, Option], needs: tuple[str, ...]) -> str:
  bracket = lambda name, text: text if name in needs else f"[{text}]"
  return " ".join(
    [
      f"usage: python {sys.argv[0]}",
      bracket("config", "--config=configs/FILE.py[:ARGUMENT]"),
      bracket("workdir", "--workdir=FOLDER"),
      "[--config.SECTION.KEY=VALUE ...]",
      *(f"[--{name}={type(option.default).__name__.upper()}]" for name, option in options.items()),
    ]
  )


def _describe(options: dict[str, Option]) -> str:
  """All arguments, one a line."""
  lines = {
    "--config": "a Python file with get_config(), and the variant it is asked for",
    "--workdir": "where the run lives; the same command goes on from what is there",
    "--config.SECTION.KEY": "replaces one value of the config, as --config.ppo.kl.coef=0.1",
  }
  for name, option in options.items():
    lines[f"--{name}"] = f"{option.help} (default: {option.default})"
  width = max(map(len, lines)) + 2
  return "\n".join(f"  {name:{width}}{text}" for name, text in lines.items())


def _cores() -> set[int]:
  """The cores this process may use, which a container or taskset may have made fewer."""
  if hasattr(os, "sched_getaffinity"):
    return os.sched_getaffinity(0)
  return set(range(os.cpu_count() or 1))


def _power_of_two(number: int) -> int:
  """The largest power of two up to `number`; batch sizes are divisible by it."""
  return 1 << (number.bit_length() - 1)
