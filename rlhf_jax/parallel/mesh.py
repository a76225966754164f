"""The device mesh, from configuration, and how host batches come onto it.

Axes: `data` splits the batch and the optimiser's moments; `fsdp` splits the batch and the
parameters; `tensor` splits heads, feed-forward width and vocabulary. One CPU core, eight GPUs and a
TPU slice are the same code with other numbers.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.config import PositiveInt, Range
from rlhf_jax.types import UserError

BATCH = PartitionSpec(("data", "fsdp"))  # the leading axis of every batch


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis."""

  data: Annotated[int, Range(low=-1)]  # -1: all devices that the other axes leave
  fsdp: PositiveInt
  tensor: PositiveInt


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices, or over some that may be elsewhere (`rlhf_jax.plan`).

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  count = len(devices or jax.devices())
  inner = config.fsdp * config.tensor
  data = count // inner if config.data == -1 else config.data
  if data * inner != count:
    raise UserError(
      f"config mesh: data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor} does "
      f"not use the {count} devices exactly; use data=-1 and fsdp * tensor a divisor of {count}."
    )
  # Auto axes: the compiler places intermediate values, the tables place parameters and batches.
  axis_types = (AxisType.Auto,) * 3
  sizes, names = (data, config.fsdp, config.tensor), ("data", "fsdp", "tensor")
  return jax.make_mesh(sizes, names, axis_types, devices=devices)


@dataclasses.dataclass(frozen=True)
class Bound:
  """A function with its static settings; equal to any other of the same, as a partial is not."""

  function: Callable
  settings: tuple[Any, ...]
  named: tuple[tuple[str, Any], ...]

  @property
  def __name__(self) -> str:
    """What traces and compiled programs call it."""
    return self.function.__name__

  def __call__(self, *args, **kwargs):
    return self.function(*self.settings, *args, **dict(self.named), **kwargs)


def bind(function: Callable, *settings, **named) -> Bound:
  """As `functools.partial`, for hashable settings: `jit` compiles it once, whoever builds it again.

  So a round of the recipe runs the programs of the round before.
  """
  return Bound(function, settings, tuple(named.items()))


def jit(function: Callable, mesh: Mesh, out_shardings: Any = None, **options) -> Callable:
  """`jax.jit` for a mesh: inside, `rules.constrain` knows the axes. It has a `lower` too.

  Options are those of `jax.jit`; `compiler_options`, a dict there, are pairs.
  """
  if not isinstance(function, Bound):
    return _compiled(function, mesh, out_shardings, options)
  layouts, tree = jax.tree.flatten(out_shardings)
  return _compiled_once(function, mesh, tuple(layouts), tree, tuple(options.items()))


@functools.lru_cache(maxsize=16)  # more than a round of a run has
def _compiled_once(function, mesh, layouts, tree, options):
  return _compiled(function, mesh, jax.tree.unflatten(tree, layouts), dict(options))


def _compiled(function, mesh, out_shardings, options):
  if out_shardings is not None:
    options = options | {"out_shardings": out_shardings}
  if "compiler_options" in options:
    options = options | {"compiler_options": dict(options["compiler_options"])}
  compiled = jax.jit(function, **options)

  def on_mesh(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(*args, **kwargs):
      with jax.set_mesh(mesh), _cache(mesh):
        return method(*args, **kwargs)

    return call

  call = on_mesh(compiled)
  call.lower = on_mesh(compiled.lower)
  return call


@contextlib.contextmanager
def _cache(mesh: Mesh):
  """Where programs compiled inside may be kept in jax's compilation cache on disk.

  A CPU program that jaxlib 0.10 reads back from there no longer runs all exchanges between devices
  in one order: those inside a loop or a condition and those outside of it change places, and two
  devices may wait for each other for ever. So it was where parameters are split, and gathered
  beside a loop. Programs that split the batch and moments alone gather parameters once their
  gradients have been added up, were not seen to wait, and are kept.
  """
  splits_parameters = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
  if mesh.devices.flat[0].platform != "cpu" or not splits_parameters:
    yield
    return
  name = "jax_persistent_cache_min_compile_time_secs"
  usual = getattr(jax.config, name)
  jax.config.update(name, math.inf)
  try:
    yield
  finally:
    jax.config.update(name, usual)


def platform() -> str:
  """What a function is traced for: "cpu", "gpu" or "tpu"; in one of `jit`, what its mesh is of."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def batch_devices(mesh: Mesh) -> int:
  """Over how many devices a batch is split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, size: int, name: str) -> None:
  """Raises a UserError unless batches of `size` rows split evenly; `name` is the config key."""
  devices = batch_devices(mesh)
  if size % devices:
    near = [n for n in (size - size % devices, size + devices - size % devices) if n]
    raise UserError(
      f"config {name}: {size} rows do not split over the {devices} devices of mesh axes 'data' x "
      f"'fsdp'; use {' or '.join(map(str, near))}."
    )


def put_batch(mesh: Mesh, batch: Any, axis: int = 0) -> Any:
  """Host arrays onto the mesh, one axis (the leading one) split over the batch axes.

  Of several processes, each gives the whole batch and puts the rows of its own devices in place.
  """
  sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, *BATCH))
  return jax.tree.map(lambda x: put(x, sharding), batch)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
  """Host arrays onto every device of the mesh."""
  return jax.tree.map(lambda x: put(x, replicated(mesh)), tree)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
  """An array that every process has whole, laid out over the devices of all; or moved to there."""
  if sharding.is_fully_addressable or isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jax.device_put(x, sharding)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding))
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def to_host(tree: Any) -> Any:
  """Arrays moved out of the devices' memory; each piece goes to its own device's host."""
  return _move(tree, "pinned_host")


def to_devices(tree: Any) -> Any:
  """Arrays moved back to where they compute; those that are there stay as they are."""
  return _move(tree, jax.local_devices()[0].default_memory().kind)


def _move(tree: Any, kind: str) -> Any:
  def move(x: jax.Array) -> jax.Array:
    if x.sharding.memory_kind == kind:
      return x
    return jax.device_put(x, x.sharding.with_memory_kind(kind))

  return jax.tree.map(move, tree)


def shard_count(sharding: NamedSharding, shape: tuple[int, ...]) -> int:
  """Into how many different pieces an array of `shape` is cut."""
  piece = sharding.shard_shape(shape)
  return math.prod(full // part for full, part in zip(shape, piece) if part)
