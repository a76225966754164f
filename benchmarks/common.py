"""What the benchmarks share: models, workloads, honest timing, and what a machine could do at best.

Models and workloads are those of the peers' harness, so that rows can stand side by side: all rows
full length, ids drawn from [3, V), pad 0, and an end-of-message id that nothing draws.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODELS = {  # vocabulary, width, layers, heads, key-value heads, feed-forward width, tied head
  "toy": (64, 16, 2, 2, 2, 32, False),
  "tiny": (4_096, 256, 6, 8, 8, 688, False),
  "small": (8_192, 512, 8, 8, 4, 1_376, False),
  "smollm2-135M": (49_152, 576, 30, 9, 3, 1_536, True),
  "1b": (128_256, 2_048, 16, 32, 8, 8_192, True),
}
FIRST_ID = 3  # ids below are special
NEVER = -1  # an id that is never drawn
MOST_FOREIGN = 0.06  # share of all cores that others may use in a repetition that counts
PATIENCE = float(os.environ.get("RLHF_BENCH_WAIT", "240"))  # seconds of waiting for quiet, in all
ATTENTION = ("auto", "how whole rows attend: auto, plain, blocked or fused")
TURNS = (False, "a call of the first row for each line of input; see compare.py --calls")
_waited = 0.0
_turns = False


def prepare() -> None:
  """The process as experiments have it, but with nothing compiled before; call it before jax."""
  from rlhf_jax import launch

  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  launch.prepare()


def arguments(doc: str, **more) -> argparse.Namespace:
  """The command line; `more` are options beside those that all workloads have, by default."""
  parser = argparse.ArgumentParser(
    description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )
  add = parser.add_argument
  add("--model", default="tiny", choices=MODELS, help="which sizes")
  add("--models", help="folder of checkpoints MODEL and MODEL-rm; none: random weights")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
  add("--repeats", type=int, default=3, help="undisturbed repetitions of a row")
  add("--out", help="where the JSON goes; none prints it")
  for name, (default, text) in more.items():
    kind = {"action": "store_true"} if default is False else {"type": type(default)}
    add(f"--{name}", default=default, help=text, **kind)
  global _turns
  given = parser.parse_args()
  _turns = getattr(given, "turns", False)
  return given


@dataclasses.dataclass(frozen=True)
class Networks:
  """A policy and a scalar network of the same sizes, with weights."""

  policy: object
  scalar: object
  policy_params: object
  reward_params: object


def networks_of(given: argparse.Namespace) -> Networks:
  """Those that a command line asks for, by the options that its workload has."""
  options = {"dtype": "dtype", "remat": "remat", "scan": "scan_layers", "attention": "attention"}
  asked = {name: getattr(given, option, None) for option, name in options.items()}
  compute = {name: value for name, value in asked.items() if value is not None}
  return networks(given.model, given.models, **compute)


def networks(name: str, folder: str | None, **compute) -> Networks:
  """The networks of a model, with the weights of `folder` if one is given."""
  from rlhf_jax.networks import pretrained

  found = random_networks(MODELS[name], **compute)
  if folder is None:
    return found
  config = found.policy.config
  load = lambda suffix: pretrained.load_as(config, pathlib.Path(folder) / f"{name}{suffix}")
  return dataclasses.replace(found, policy_params=load(""), reward_params=load("-rm"))


def random_networks(sizes: tuple, **compute) -> Networks:
  """Networks of these sizes, in the order of `MODELS`, with random weights."""
  import jax

  from rlhf_jax.networks import heads, hf_layout
  from rlhf_jax.networks.config import ModelConfig

  V, D, L, N, G, F, tied = sizes
  compute = dataclasses.replace(hf_layout.COMPUTE, **compute)
  config = ModelConfig(V, D, L, N, G, D // N, F, 10_000.0, 1e-5, tied, compute)
  policy, scalar = heads.Policy(config), heads.ScalarNetwork(config)
  init = lambda network, seed: jax.jit(lambda key: heads.init(network, key))(jax.random.key(seed))
  return Networks(policy, scalar, init(policy, 0), init(scalar, 1))


def devices_for(rows: int, tensor: int = 1) -> int:
  """As many of the machine's devices, or groups of `tensor` of them, as split the rows evenly."""
  import jax

  count = jax.device_count() // tensor
  if not count:
    raise SystemExit(f"--tensor={tensor} asks for more than the {jax.device_count()} devices here.")
  return next(n for n in range(count, 0, -1) if rows % n == 0)


def mesh_of(devices: int, tensor: int = 1):
  """A mesh that splits rows over so many devices, and parameters over `tensor`."""
  import jax

  axis_types = (jax.sharding.AxisType.Auto,) * 3
  names, some = ("data", "fsdp", "tensor"), jax.devices()[: devices * tensor]
  return jax.make_mesh((devices, 1, tensor), names, axis_types, devices=some)


def adamw(learning_rate: float, clip_norm: float | None = None):
  """PyTorch's AdamW at a constant rate."""
  from rlhf_jax.training.optim import OptimConfig

  return OptimConfig(
    learning_rate,
    schedule="constant",
    warmup_steps=0,
    warmup_from=1.0,
    final_fraction=1.0,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=clip_norm,
  )


# Timing.


@dataclasses.dataclass(frozen=True)
class Repetition:
  """One timed call."""

  seconds: float
  foreign: float  # share of all cores that other processes used meanwhile
  units: float | None  # of work, where the call says how much it did


def busy_seconds() -> float:
  """Core seconds that this machine has worked since it started."""
  fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
  ticks = [int(field) for field in fields]
  return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


def own_seconds() -> float:
  """Core seconds that this process has worked."""
  used = os.times()
  return used.user + used.system


def timed(function: Callable[[], float | None]) -> Repetition:
  """How long one call takes; `function` waits for its results, and may say what work it did."""
  busy, own, began = busy_seconds(), own_seconds(), time.perf_counter()
  units = function()
  seconds = time.perf_counter() - began
  foreign = (busy_seconds() - busy) - (own_seconds() - own)
  return Repetition(seconds, max(foreign, 0.0) / (seconds * os.cpu_count()), units)


def wait_for_quiet() -> None:
  """Until others use little of the machine, as long as patience lasts."""
  global _waited
  while _waited < PATIENCE and timed(lambda: time.sleep(0.4)).foreign > MOST_FOREIGN:
    time.sleep(1.0)
    _waited += 1.4


def repeat(function: Callable[[], float | None], repeats: int) -> list[Repetition]:
  """The `repeats` calls least disturbed by others, of at most twice as many and one.

  One follows the other as steps of a run do, unless it was disturbed: after a pause of a second, a
  virtual machine's host may have taken back the memory that a step needs.
  """
  if _turns:
    take_turns(function)
  done = []
  wait_for_quiet()
  while sum(r.foreign <= MOST_FOREIGN for r in done) < repeats and len(done) < 2 * repeats + 1:
    if done and done[-1].foreign > MOST_FOREIGN:
      wait_for_quiet()
    done.append(timed(function))
  return sorted(done, key=lambda r: r.foreign)[:repeats]


def take_turns(function: Callable[[], float | None]) -> NoReturn:
  """The calls that `compare.py --calls` asks for, one for each line of input, to its end."""
  print("ready", flush=True)
  for _ in sys.stdin:
    done = timed(function)
    print(json.dumps({"seconds": done.seconds, "units": done.units}), flush=True)
  sys.exit()


def measure_step(step: Callable, state, repeats: int) -> dict:
  """Timed calls of a donating `state -> (state, metrics)`; the first one, which compiles, apart."""
  import jax

  latest = {"state": state}

  def call():
    latest["state"], metrics = step(latest["state"])
    latest["metrics"] = jax.block_until_ready(metrics)

  first = timed(call)
  done = repeat(call, repeats)
  metrics = {name: float(value) for name, value in latest["metrics"].items()}
  return {"cold_seconds": first.seconds, "repetitions": done, "metrics": metrics}


def rates(repetitions: list[Repetition], units: float | None, unit: str) -> dict:
  """Units a second: median and spread, and whether others were in the way.

  `units` is the work of every call; None where each said its own.
  """
  found = [(units or r.units) / r.seconds for r in repetitions]
  foreign = max(r.foreign for r in repetitions)
  return {
    "unit": unit,
    "rate": spread(found),
    "seconds": spread([r.seconds for r in repetitions]),
    "foreign": foreign,
    "contended": foreign > MOST_FOREIGN,
  }


def spread(values: list[float]) -> dict:
  """Median, least and most."""
  return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# What the machine could do at best.


def limits() -> dict[str, float]:
  """Measured here and now: float32 matrix products (FLOP/s) and reads of memory (bytes/s)."""
  import jax
  import jax.numpy as jnp

  def best(function, *inputs) -> float:
    function = jax.jit(function)
    jax.block_until_ready(function(*inputs))
    return min(timed(lambda: jax.block_until_ready(function(*inputs))).seconds for _ in range(7))

  x = jnp.ones((2_048, 2_048))
  long = jnp.ones(1 << 26)
  return {
    "flops": max(2 * n**3 / best(jnp.dot, x[:n, :n], x[:n, :n]) for n in (1_024, 2_048)),
    "bandwidth": long.nbytes / best(jnp.sum, long),
  }


def forward_flops(config, rows: int, length: float, head_columns: float) -> float:
  """Multiply-adds of a forward pass, twice, with the head on so many columns of a row."""
  c = config
  attention = 2 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads)
  body = c.n_layers * (attention + 3 * c.d_model * c.d_ff)
  scores = 2 * c.n_layers * c.n_heads * c.head_dim * length / 2
  return 2.0 * rows * (length * (body + scores) + head_columns * c.vocab_size * c.d_model)


def report(out: str | None, found: dict) -> None:
  """Writes or prints the JSON."""
  text = json.dumps(found | {"machine": machine()}, indent=1)
  if out is None:
    print(text)
  else:
    pathlib.Path(out).write_text(text)


def machine() -> dict:
  """What this ran on."""
  import jax

  device = jax.devices()[0]
  return {
    "processor": platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "device": device.device_kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
  }


def fill(shapes):
  """Arrays for a plan's shapes, laid out as these say: ids of 1, numbers of 0.01, one key."""
  import jax
  import jax.numpy as jnp

  from rlhf_jax.parallel import mesh as mesh_lib

  def one(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return mesh_lib.put(jax.random.key(0), leaf.sharding)
    value = 1 if leaf.dtype == jnp.int32 else 0.01
    return mesh_lib.put(jnp.full(leaf.shape, value, leaf.dtype), leaf.sharding)

  return jax.block_until_ready(jax.tree.map(one, shapes))
