"""The loop: order of writers and hooks, lateness, resuming, and what stops it."""

import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.training import loop
from rlhf_jax.types import UserError


@flax.struct.dataclass
class State:
  step: jax.Array
  total: jax.Array


def fresh():
  return State(jnp.int32(0), jnp.float32(0))


@jax.jit
def add(state, batch):
  state = State(state.step + 1, state.total + batch)
  return state, {"total": state.total}


def ones():
  return itertools.repeat(jnp.float32(1))


def test_the_loop_runs_from_the_states_step_to_num_steps():
  half = loop.run(add, fresh(), ones(), 3)
  whole = loop.run(add, half, ones(), 7)
  assert (int(half.step), int(whole.step), float(whole.total)) == (3, 7, 7.0)


def test_a_finished_state_is_returned_without_drawing_a_batch():
  def none():
    raise AssertionError("drew a batch")
    yield

  assert float(loop.run(add, State(jnp.int32(5), jnp.float32(2)), none(), 5).total) == 2.0


def test_no_batch_is_drawn_beyond_the_last_step():
  drawn = []
  batches = (drawn.append(i) or jnp.float32(i) for i in itertools.count())
  loop.run(add, fresh(), batches, 4)
  assert drawn == [0, 1, 2, 3]


def test_batches_that_end_early_are_an_error_and_not_a_short_run():
  with pytest.raises(UserError, match="ended after step 2 of 5"):
    loop.run(add, fresh(), [jnp.float32(1)] * 2, 5)


def test_writers_get_every_step_once_in_order_as_plain_floats():
  seen = []
  loop.run(add, fresh(), ones(), 5, writers=[lambda s, m: seen.append((s, m))])
  assert seen == [(step, {"total": float(step)}) for step in range(1, 6)]
  assert all(type(metrics["total"]) is float for _, metrics in seen)


def test_the_next_step_is_dispatched_before_the_metrics_of_the_last_are_fetched():
  events = []

  def step_fn(state, batch):
    events.append(f"dispatch {int(state.step) + 1}")
    return add(state, batch)

  loop.run(step_fn, fresh(), ones(), 3, writers=[lambda s, m: events.append(f"write {s}")])
  assert events == ["dispatch 1", "dispatch 2", "write 1", "dispatch 3", "write 2", "write 3"]


def test_a_hook_fires_with_its_own_state_after_all_metrics_up_to_it_are_written():
  events = []
  loop.run(
    add,
    fresh(),
    ones(),
    5,
    writers=[lambda s, m: events.append(("write", s))],
    hooks=[loop.every(2, lambda s, state, m: events.append(("hook", s, float(state.total), m)))],
  )
  hooks = {event[1]: event for event in events if event[0] == "hook"}
  assert list(hooks) == [2, 4, 5]  # and after the last step
  for step, event in hooks.items():
    assert event == ("hook", step, float(step), {"total": float(step)})
    before = events[: events.index(event)]
    assert [e[1] for e in before if e[0] == "write"] == list(range(1, step + 1))


def test_at_end_fires_once():
  fired = []
  loop.run(add, fresh(), ones(), 4, hooks=[loop.at_end(lambda s, state, m: fired.append(s))])
  assert fired == [4]


def test_a_donated_state_can_still_be_read_by_a_hook():
  donating = jax.jit(add, donate_argnums=0)
  totals = []
  hook = loop.every(1, lambda s, state, m: totals.append(float(state.total)))
  loop.run(donating, fresh(), ones(), 3, hooks=[hook])
  assert totals == [1.0, 2.0, 3.0]


def test_a_hook_needs_a_period():
  with pytest.raises(UserError, match="every 0 steps"):
    loop.every(0, lambda s, state, m: None)


def poisoned(at, value=np.nan):
  """Endless ones, but `value` as the batch of step `at`."""
  return (jnp.float32(value if step == at else 1) for step in itertools.count(1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_metric_that_is_not_finite_stops_the_run_and_names_step_metric_and_checkpoint(
  tmp_path, value
):
  checkpoints = tiny.checkpointer(tmp_path, keep=3)
  written = []
  with pytest.raises(loop.NonFiniteError, match="step 5: metric 'total'") as caught:
    loop.run(
      add,
      fresh(),
      poisoned(5, value),
      8,
      writers=[lambda s, m: written.append(s), loop.finite_guard(checkpoints.describe_latest)],
      hooks=[loop.every(2, lambda s, state, m: checkpoints.save(s, state))],
    )
  assert f"checkpoint {tmp_path / '4'}" in str(caught.value)
  assert written == [1, 2, 3, 4, 5]  # the bad step is on record
  assert checkpoints.steps() == [2, 4]
  assert float(checkpoints.restore(fresh()).state.total) == 4.0


def test_no_checkpoint_is_written_at_the_very_step_that_turned_nan(tmp_path):
  # The hook is due at the bad step itself: its metrics are looked at before it fires.
  checkpoints = tiny.checkpointer(tmp_path, keep=3)
  with pytest.raises(loop.NonFiniteError):
    loop.run(
      add,
      fresh(),
      poisoned(4),
      8,
      writers=[loop.finite_guard(checkpoints.describe_latest)],
      hooks=[loop.every(2, lambda s, state, m: checkpoints.save(s, state))],
    )
  assert checkpoints.steps() == [2]


def test_a_state_that_went_nan_behind_finite_metrics_is_not_saved(tmp_path):
  # A finite loss with a NaN gradient: the loss shows it only at the next step.
  def silent(state, batch):
    return State(state.step + 1, state.total + batch), {"loss": jnp.float32(1)}

  checkpoints = tiny.checkpointer(tmp_path, keep=3)
  with pytest.raises(loop.NonFiniteError, match="step 4: the state: 'total' holds a NaN"):
    loop.run(
      silent,
      fresh(),
      poisoned(3),
      8,
      hooks=[loop.every(2, lambda s, state, m: checkpoints.save(s, state))],
    )
  assert checkpoints.steps() == [2]
