"""Where parameters live: an ordered table of (regex over paths, PartitionSpec), first match wins.

A spec names the *last* axes of an array, so one rule serves a layer and a scanned stack of layers.
The table covers whole train states: optimiser moments and EMA copies end in the same paths as the
parameters they belong to. Moments are shared out over `data` besides, so each device moves its part
of the parameters, and all parts then go to all (ZeRO stage 1, Rajbhandari et al. 2020; Xu et al.
2020). Scalars, counters and PRNG keys are replicated without a rule. A network gets rules of its
own by rows that go before (`table`), since paths begin with its name.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.types import UserError

Rules = tuple[tuple[str, P], ...]
Row = tuple[str, tuple[str | None, ...]]  # a rule as a config writes it

TRANSFORMER: Rules = (
  (r"embed/embedding$", P("tensor", "fsdp")),  # [V, D]
  (r"(query|key|value)/kernel$", P("fsdp", "tensor", None)),  # [D, N, H]
  (r"out/kernel$", P("tensor", None, "fsdp")),  # [N, H, D]
  (r"(gate|up)/kernel$", P("fsdp", "tensor")),  # [D, F]
  (r"down/kernel$", P("tensor", "fsdp")),  # [F, D]
  (r"lm_head/kernel$", P("fsdp", "tensor")),  # [D, V]
  (r"score/(kernel|bias)$", P()),
  (r"scale$", P()),
)

MOMENTS = r"(^|/)(mu|nu)/"  # in the paths of Adam's

# What networks call by name while they compute; the batch is over all that splits it.
ACTIVATIONS: Rules = (
  (r"^stream$", P(("data", "fsdp"), None, None)),  # [B, T, D]
  (r"^heads$", P(("data", "fsdp"), None, "tensor", None)),  # [B, T, N, H]
  (r"^cached$", P(("data", "fsdp"), "tensor", None, None)),  # [B, G, S, H]
  (r"^table$", P("tensor", None)),  # [V, D], the embedding where it is read
  (r"^drawn from$", P(("data", "fsdp", "tensor"), None)),  # [B, V], logits of the next token
  (r"^rows$", P(("data", "fsdp"))),  # [B, ...], whole on all devices that share parameters
)
# What of these is a parameter, which devices of one group have whole.
PARAMETERS = ("table",)

_in_one_group = contextvars.ContextVar("in one group", default=False)


@contextlib.contextmanager
def one_group(when: bool = True) -> Iterator[None]:
  """What is traced in here has rows whole, and `data` splits what `tensor` does elsewhere.

  So devices that have all parameters become a group that shares them, for a part of a program.
  """
  token = _in_one_group.set(when)
  try:
    yield
  finally:
    _in_one_group.reset(token)


def _here(spec: P) -> P:
  """The spec with the axes that it means here."""
  means = {"data": (), "fsdp": (), "tensor": ("data",)} if _in_one_group.get() else {}
  axes = _axes()
  here = lambda name: tuple(axis for axis in means.get(name, (name,)) if axis in axes)
  return P(*(sum(map(here, _names(entry)), ()) for entry in spec))


def _axes() -> Mapping[str, int]:
  """Devices along each axis that arrays are split over where this is asked: none out of `mesh.jit`.

  In a function of its own rows (`sum_over_data`) those rows are all that there are.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def table(rows: Iterable[Row]) -> Rules:
  """The rules of a config, before those that every network has.

  Raises:
    UserError: a pattern is no regular expression.
  """
  for pattern, _ in rows:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f"config rules: {pattern!r} is no regular expression: {error}.") from error
  return (*((pattern, P(*axes)) for pattern, axes in rows), *TRANSFORMER)


def path_name(path: tuple) -> str:
  """A tree path as "trunk/block_0/attn/query/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(tree: Any, mesh: Mesh, rules: Rules = TRANSFORMER) -> Any:
  """A NamedSharding for every leaf of `tree` (arrays or `jax.eval_shape` results).

  Raises:
    UserError: no rule matches a leaf, or an axis does not divide; tensor and sizes are named.
  """
  place = lambda path, leaf: NamedSharding(mesh, _spec(path_name(path), leaf.shape, mesh, rules))
  return jax.tree_util.tree_map_with_path(place, tree)


def place(tree: Any, mesh: Mesh, rules: Rules = TRANSFORMER) -> Any:
  """`tree` on the mesh, laid out by the rules."""
  return jax.tree.map(mesh_lib.put, tree, partition(tree, mesh, rules))


def abstract(tree: Any, mesh: Mesh, rules: Rules = TRANSFORMER) -> Any:
  """Shapes, dtypes and shardings of `tree`: what a checkpoint is restored onto."""
  describe = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(describe, tree, partition(tree, mesh, rules))


def compile_step(step: Callable, state: Any, mesh: Mesh, rules: Rules = TRANSFORMER) -> Callable:
  """Jits `step(state, ...) -> (state, metrics)`; the state is donated and keeps its layout."""
  out_shardings = (partition(state, mesh, rules), NamedSharding(mesh, P()))
  return mesh_lib.jit(step, mesh, donate_argnums=0, out_shardings=out_shardings)


def keep(tree: Any, rules: Rules = TRANSFORMER) -> Any:
  """Arrays as `place` lays them out, in a function of `mesh.jit`; elsewhere as they are.

  For parameters that a loop carries: the compiler might leave them as their moments lie, and gather
  them wherever they are used.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.shape:
    return tree
  return jax.lax.with_sharding_constraint(tree, partition(tree, mesh, rules))


def constrain(tree: Any, name: str, first: int = 0, rules: Rules = ACTIVATIONS) -> Any:
  """Arrays laid out by the rule for `name` in a function of `mesh.jit`; elsewhere as they are.

  The rule is for their axes from the `first` on. An axis that does not divide by all its devices,
  as a batch of one, is split over fewer or none.
  """
  if name in PARAMETERS and _in_one_group.get():
    return tree
  spec = next(spec for pattern, spec in rules if re.search(pattern, name))
  place = lambda x: _lay_out(x, P(*(None,) * (first % max(x.ndim, 1)), *spec))
  return jax.tree.map(place, tree)


def replicate(tree: Any) -> Any:
  """Arrays whole on every device, in a function of `mesh.jit`; elsewhere as they are."""
  if not jax.sharding.get_abstract_mesh().shape:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def own_rows_and_heads(function: Callable, rows: int, heads: int) -> Callable:
  """`function(mask, *arrays)` on the rows and heads of each device alone, in `mesh.jit`.

  The mask is [B, ...], the arrays and results are [B, heads, ...]. So a loop over them stays on the
  device. An axis that does not divide is whole everywhere; out of `mesh.jit` all are.
  """
  axes = _axes()
  if not axes:
    return function
  whole_spec = _here(next(spec for pattern, spec in ACTIVATIONS if re.search(pattern, "heads")))
  names = (whole_spec[0], rows), (whole_spec[2], heads)
  row, head = (name if size % _devices(name, axes) == 0 else None for name, size in names)

  def split(mask: jax.Array, *arrays: jax.Array):
    specs = (P(row), *(P(row, head) for _ in arrays))
    sharding = {"in_specs": specs, "out_specs": P(row, head), "axis_names": set(axes)}
    return jax.shard_map(function, **sharding, check_vma=False)(mask, *arrays)

  return split


def sum_over_data(function: Callable, rows: int) -> Callable:
  """`function(whole, batch) -> sums` on the rows of each part of `data` alone, in `mesh.jit`.

  The batch is [B, ...], the results are sums over rows. They are added up when all is done, not in
  the loops of `function`, as the compiler would. It does where rows do not split, and where `fsdp`
  and `tensor` both split parameters: jaxlib 0.10 cannot compile the rest of `function` then.
  """
  axes = _axes()
  splitting = [name for name, size in axes.items() if size > 1 and name != "data"]
  if axes.get("data", 1) == 1 or rows % axes["data"] or len(splitting) > 1:
    return function
  added = lambda whole, batch: jax.lax.psum(function(whole, batch), "data")
  names = set(axes).difference(splitting)
  sharding = {"in_specs": (P(), P("data")), "out_specs": P(), "axis_names": names}
  return jax.shard_map(added, **sharding, check_vma=False)


def sum_over_rows(function: Callable, rows: int) -> Callable:
  """`function(whole, *arrays) -> (sums, columns)` on the rows of each device alone, in `mesh.jit`.

  Arrays and columns are [B, ...]. Sums over rows are added up when all is done, not in the loops of
  `function`, as the compiler would. Where `tensor` splits what is whole, it is the compiler's.
  """
  axes = _axes()
  if row_shards(rows) == 1 or tensor_devices() > 1:
    return function
  row = _here(mesh_lib.BATCH)

  def added(whole, *arrays):
    sums, columns = function(whole, *arrays)
    return jax.lax.psum(sums, row[0]), columns

  def split(whole, *arrays):
    specs = (P(), *(row for _ in arrays))
    sharding = {"in_specs": specs, "out_specs": (P(), row), "axis_names": set(axes)}
    return jax.shard_map(added, **sharding, check_vma=False)(whole, *arrays)

  return split


def row_shards(rows: int) -> int:
  """Over how many devices a batch of so many rows is split, in a function of `mesh.jit`."""
  devices = _devices(_here(mesh_lib.BATCH)[0], _axes())
  return devices if rows % devices == 0 else 1


def gathers_parameters() -> bool:
  """Whether devices get parameters from each other to compute with, in a function of `mesh.jit`."""
  return _axes().get("fsdp", 1) > 1


def tensor_devices() -> int:
  """Over how many devices heads, feed-forward width and vocabulary are split, in `mesh.jit`."""
  return _devices(_here(P("tensor"))[0], _axes())


def own_part(function: Callable, axis: int, out_axis: int) -> Callable:
  """`function(array)` on each device's part alone, of an axis that `tensor` splits, in `mesh.jit`.

  The results are the parts, along `out_axis`, of one array. An axis that does not divide is whole.
  """

  def of_parts(x: jax.Array) -> jax.Array:
    devices, is_whole = tensor_devices(), _in_one_group.get()
    if not jax.sharding.get_abstract_mesh().shape or x.shape[axis] % devices:
      return function(x)
    (names,) = _here(P("tensor"))
    along = lambda i: P(*(None,) * i, names)

    def of_own(x: jax.Array) -> jax.Array:
      size = x.shape[axis] // devices
      start = jax.lax.axis_index(names) * size
      return function(jax.lax.dynamic_slice_in_dim(x, start, size, axis))

    specs = {"in_specs": P() if is_whole else along(axis), "out_specs": along(out_axis)}
    return jax.shard_map(of_own if is_whole else function, **specs, check_vma=False)(x)

  return of_parts


def _lay_out(x: jax.Array, spec: P) -> jax.Array:
  """`x` by as many of each axis's names, from the first on, as divide its size."""
  axes = _axes()
  if not axes:
    return x

  def fit(entry, size: int) -> tuple[str, ...]:
    names = _names(entry)
    counts = range(len(names), -1, -1)
    return names[: next(n for n in counts if size % _devices(names[:n], axes) == 0)]

  return jax.lax.with_sharding_constraint(x, P(*map(fit, _here(spec), x.shape)))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes that one axis of an array is split over, of an entry of a spec."""
  return (entry,) if isinstance(entry, str) else entry or ()


def _devices(entry: str | tuple[str, ...] | None, axes: Mapping[str, int]) -> int:
  """Over how many devices one axis of an array is split."""
  return math.prod(axes[name] for name in _names(entry))


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> P:
  if not shape:
    return P()
  for pattern, spec in rules:
    if re.search(pattern, name):
      full = P(*(None,) * (len(shape) - len(spec)), *spec)
      unknown = {axis for axis in spec if isinstance(axis, str)} - set(mesh.shape)
      if unknown:
        raise UserError(
          f"sharding: the rule {pattern!r} names the axis {min(unknown)!r}; the mesh has "
          f"{', '.join(map(repr, mesh.shape))}."
        )
      _check_divides(name, shape, full, mesh)
      return _share_out(full, shape, mesh) if re.search(MOMENTS, name) else full
  raise UserError(f"sharding: no rule matches {name!r} of shape {shape}; add one to the table.")


def _share_out(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec with `data` on its first axis that divides; one that splits nothing stays so."""
  if not any(_names(entry) for entry in spec):
    return spec
  for axis, (size, entry) in enumerate(zip(shape, spec)):
    names = (*_names(entry), "data")
    if size % _devices(names, mesh.shape) == 0:
      return P(*spec[:axis], names, *spec[axis + 1 :])
  return spec


def _check_divides(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
  for size, axes in zip(shape, spec):
    devices = _devices(axes, mesh.shape)
    if size % devices:
      name_of_axis = axes if isinstance(axes, str) else "x".join(axes)
      fits = [n for n in range(1, devices + 1) if size % n == 0]
      raise UserError(
        f"sharding: an axis of {size} of {name!r} (shape {shape}) does not split over the "
        f"{devices} devices of mesh axis {name_of_axis!r}; {', '.join(map(str, fits))} would do."
      )
