"""Attention by the accelerator's own kernels: cuDNN's on a GPU, splash attention on a TPU.

Both come with jax, and like `blocked.py` keep no scores of size [T, T] (Dao et al. 2022). cuDNN's
takes any mask, in bfloat16 alone. Splash attention takes segments, and leaves out the blocks of
keys after a block of queries; or a mask, and leaves out the blocks that hold none of it. Each
device attends to its own rows and heads. On a CPU, as in tests, XLA computes the function that
cuDNN's kernel does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.networks import attention
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import UserError

LANES = 128  # of a TPU's registers; splash attention takes multiples of so many columns
BLOCK = 512  # queries or keys that splash attention has at hand, at most
MOST_FILLED = 1 / 8  # of a length, for the sake of larger blocks


def attend(
  query: jax.Array, key: jax.Array, value: jax.Array, seen: attention.Seen, start: int = 0
) -> jax.Array:
  """What `attention.attend` returns for tokens that see one; query t sees no key after start + t.

  query [B, C, N, H]; key, value [B, G, T, H]. Returns [B, C, N, H], finite for padding as well.

  Raises:
    UserError: in float32 on a GPU.
  """
  platform = mesh_lib.platform()
  if platform == "tpu":
    if seen.segments is None:
      return by_masked_splash(query, key, value, seen.mask)
    return by_splash(query, key, value, seen.segments, start)
  if platform == "gpu" and query.dtype != jnp.bfloat16:
    raise UserError(
      f"config model.compute: attention 'fused' on a GPU needs dtype 'bfloat16', and it is "
      f"{query.dtype.name!r}; change it, or use attention 'plain'."
    )
  return by_cudnn(query, key, value, seen.mask, start, "cudnn" if platform == "gpu" else "xla")


def by_cudnn(query, key, value, mask, start: int, implementation: str) -> jax.Array:
  """`attend` with a mask [B, C, T], by `jax.nn.dot_product_attention`."""

  def local(mask, *by_head):
    mixed = jax.nn.dot_product_attention(
      *(x.swapaxes(1, 2) for x in by_head),
      mask=mask[:, None],
      is_causal=start == 0,  # as the mask is; so the kernel knows what to leave out
      implementation=implementation,
    )
    return mixed.swapaxes(1, 2)

  pairs = lambda length: length + length % 2
  return _each_device(local, pairs, _fill(mask, pairs, 1, 2), query, key, value)


def by_splash(query, key, value, segments, start: int, interpret: bool = False) -> jax.Array:
  """`attend` with the segments [B, T] of all columns; `interpret`: emulated, on any machine."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # experimental, so late

  def local(segments, query, key, value):
    heads, queries, keys = *query.shape[1:3], key.shape[2]
    of_row = splash.make_splash_mha_single_device(
      splash.MultiHeadMask([splash.CausalMask((queries, keys), start)] * heads),
      block_sizes=splash.BlockSizes(**_blocks(queries, keys)),
      interpret=interpret,
    )
    return jax.vmap(of_row)(query, key, value, splash.SegmentIds(*segments))

  of_queries = segments[:, start : start + query.shape[1]]
  segments = _fill(of_queries, _in_blocks, 1), _fill(segments, _in_blocks, 1)
  scaled = query * query.shape[-1] ** -0.5
  return _each_device(local, _in_blocks, segments, scaled, key, value)


def by_masked_splash(query, key, value, mask, interpret: bool = False) -> jax.Array:
  """`attend` with a mask [B, C, T], as of several answers in a row; `interpret` as above."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # experimental, so late

  def of_row(mask, query, key, value):
    of_heads = splash.make_splash_mha_single_device(
      mask[None],  # one for all heads, which therefore come one by one
      block_sizes=splash.BlockSizes(**_blocks(*mask.shape)),
      interpret=interpret,
    )
    # Where this is traced jax takes its own note that the mask is data for data as well.
    of_heads.fwd_mask_info = of_heads.fwd_mask_info._replace(is_dynamic_mask=True)
    of_head = lambda *head: of_heads(*(x[None] for x in head))[0]
    of_group = jax.vmap(of_head, (0, None, None))
    groups = query.reshape(len(key), -1, *query.shape[1:])
    return jax.vmap(of_group)(groups, key, value).reshape(query.shape)

  mask = _fill(mask, _in_blocks, 1, 2)
  # Who sees nobody, as padding does, sees the first: a sum over nothing would be divided by 0.
  nobody = ~jnp.any(mask, axis=2, keepdims=True)
  mask |= nobody & (jnp.arange(mask.shape[2]) == 0)[None, None]
  scaled = query * query.shape[-1] ** -0.5
  return _each_device(jax.vmap(of_row), _in_blocks, mask, scaled, key, value)


def _each_device(
  function: Callable, filled: Callable[[int], int], seen, query, key, value
) -> jax.Array:
  """`function(seen, query, key, value)` by head, of each device's rows and heads; by column.

  Columns are filled up for it to the length that `filled` names, as those of `seen` are.
  """
  arrays = [_fill(x, filled, 2) for x in (query.swapaxes(1, 2), key, value)]
  own = rules.own_rows_and_heads(function, *key.shape[:2])
  return own(seen, *arrays)[:, :, : query.shape[1]].swapaxes(1, 2)


def _blocks(queries: int, keys: int) -> dict[str, int]:
  """Sizes of splash attention's blocks, forwards and backwards."""
  rows, columns = _block_of(queries), _block_of(keys)
  backwards = dict(block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns)
  return dict(block_q=rows, block_kv=columns, **backwards)


def _block_of(length: int) -> int:
  """Columns of each block: the most that divide a multiple of `LANES`."""
  return max(size for size in range(LANES, BLOCK + 1, LANES) if length % size == 0)


def _in_blocks(length: int) -> int:
  """The length that splash attention fills up to: whole blocks, as large as is worth it."""
  lengths = [length + -length % block for block in (BLOCK, BLOCK // 2, LANES)]
  return next((x for x in lengths if x <= (1 + MOST_FILLED) * length), lengths[-1])


def _fill(x: jax.Array, filled: Callable[[int], int], *axes: int) -> jax.Array:
  """`x` with zeros after the end of some axes, up to the length that `filled` names."""
  rests = [(0, filled(size) - size if axis in axes else 0) for axis, size in enumerate(x.shape)]
  return jnp.pad(x, rests) if any(rest for _, rest in rests) else x
