"""Traces: what an operation takes without what it calls, and which steps are traced."""

import dataclasses
import types

import flax.struct
import jax
import jax.numpy as jnp
import pytest
import runs

from rlhf_jax import config as config_lib
from rlhf_jax import experiment
from rlhf_jax.training import profile
from rlhf_jax.training.profile import ProfileConfig


@flax.struct.dataclass
class State:
  step: jax.Array
  x: jax.Array


@jax.jit
def learn(state, batch):
  x = jnp.tanh(state.x @ state.x) * batch
  return State(state.step + 1, x), {"loss": jnp.sum(x)}


def event(name, start, end):
  stats = [("hlo_op", name), ("hlo_module", "jit_step")]
  return types.SimpleNamespace(start_ns=start, end_ns=end, stats=stats)


def test_an_operation_is_charged_for_itself_and_not_for_what_it_calls():
  told = types.SimpleNamespace(start_ns=0, end_ns=999, stats=[("run_id", 1)])  # no operation
  events = [
    event("while", 0, 100),
    told,
    event("body", 10, 60),
    event("dot", 20, 50),
    event("dot", 60, 90),
    event("add", 100, 130),
  ]
  expected = [("while", 20), ("body", 20), ("dot", 30), ("dot", 30), ("add", 30)]
  found = profile.own_times(events)
  assert [(name, time) for (_, name), time in found] == expected
  assert sum(time for _, time in found) == 130  # all the time there is, once


@pytest.mark.parametrize("after", [0, 1])
def test_the_chosen_steps_are_traced_and_their_operations_shown(tmp_path, capsys, after):
  config = ProfileConfig(first_step=3, num_steps=2, operations=4)
  step = profile.traced(learn, config, tmp_path, after, num_steps=6)
  state = State(jnp.int32(after), jnp.eye(64))
  for number in range(after + 1, 7):
    state, _ = step(state, jnp.float32(number))
    assert (tmp_path / "profile").exists() == (number >= 4)
  assert list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))
  found = profile.operations(tmp_path / "profile")
  dots = [one for one in found if one.program == "jit_learn" and one.calls]
  assert dots and all(one.calls % 2 == 0 for one in dots)  # two steps
  assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)
  shown = capsys.readouterr().out
  assert "jit_learn" in shown and dots[0].name in shown


def test_without_a_first_step_and_after_it_nothing_is_traced(tmp_path):
  config = ProfileConfig(first_step=None, num_steps=2, operations=4)
  assert profile.traced(learn, config, tmp_path, 0, 6) is learn
  late = profile.traced(learn, ProfileConfig(3, 2, 4), tmp_path, after=4, num_steps=6)
  late(State(jnp.int32(4), jnp.eye(4)), jnp.float32(1.0))
  assert not list(tmp_path.iterdir())


def test_what_is_traced_and_kept_may_change_within_a_workdir(tmp_path):
  built = config_lib.build(experiment.ExperimentConfig, runs.tiny(tmp_path / "data"))
  (tmp_path / "about.json").write_text("{}")
  experiment.files.write_json_atomic(tmp_path / "config.json", config_lib.to_dict(built))
  traced = dataclasses.replace(built, profile=ProfileConfig(3, 1, 5))
  assert experiment.differs(traced, tmp_path) == []
  assert experiment.differs(dataclasses.replace(built, seed=1), tmp_path) == ["seed: 0 -> 1"]
  experiment.check_workdir(traced, tmp_path)
