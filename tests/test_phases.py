"""The stages at work: what they warn of, and where the reward model's zero is."""

import dataclasses
import functools
import gc
import json
import weakref

import jax
import numpy as np
import pytest
import runs
import tiny

from rlhf_jax import experiment, feeds, iterate, phases, reward, rollout
from rlhf_jax.data.records import Demonstration
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import UserError


@pytest.mark.conformance("B32")
@pytest.mark.parametrize(
  ("kl", "stderr", "warns"),
  [
    (-0.5, 0.1, True),
    (-0.2, 0.1, False),
    (-1e-7, 0.0, False),
    (0.0, 0.0, False),
    (3.0, 0.1, False),
  ],
)
def test_a_mean_kl_clearly_below_zero_is_warned_of(monkeypatch, kl, stderr, warns):
  said = []
  monkeypatch.setattr(phases.logging, "warning", lambda text, *values: said.append(text % values))
  phases.warn_negative_kl(7, {"objective/kl": kl, "objective/kl_stderr": stderr})
  assert bool(said) == warns
  assert all("step 7" in text and "-0.500" in text for text in said)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
  """Data, tokenizer and networks of the village's tiny config, with nothing trained."""
  folder = tmp_path_factory.mktemp("run")
  config = runs.tiny(folder / "data", reward__max_heldout=50, sft__max_heldout=20)
  return experiment.start(config, folder / "run")


def judges_and_start(run):
  """A reference, a reward model and a policy, all different, on the mesh of the run."""
  judges = rollout.Judges(tiny.params(run.policy, 1), tiny.params(run.scalar, 2))
  return rules.place((judges, tiny.params(run.policy, 0)), run.mesh)


def test_what_is_offloaded_changes_no_bit_and_comes_back_from_checkpoints(tiny_run, tmp_path):
  judges, start = judges_and_start(tiny_run)

  def train(folder, offload, num_steps):
    config = tiny.changed(tiny_run.config, ppo__offload=offload, ppo__num_steps=num_steps)
    run = dataclasses.replace(tiny_run, config=config)
    return phases.train_policy(run, folder, start, judges)[0]

  plain = train(tmp_path / "plain", (), 2)
  away = train(tmp_path / "away", ("judges", "optimizers"), 2)
  assert tiny.digest(away) == tiny.digest(plain)
  # The learning rate falls to 0 at the last step, so a longer run is another one; its state is not.
  train(tmp_path / "away", ("judges", "optimizers"), 3)
  steps = (tmp_path / "away/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in steps] == [1, 2, 3]


def test_offloaded_arrays_are_in_host_memory_between_steps(tiny_run):
  config = tiny.changed(tiny_run.config, ppo__offload=("judges", "optimizers"))
  run = dataclasses.replace(tiny_run, config=config)
  judges, start = judges_and_start(run)
  _, state, _, judges = phases.begin_ppo(run, "round_1", start, judges)
  where = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
  assert where((judges, state.policy_opt, state.critic_opt)) == {"pinned_host"}
  assert "pinned_host" not in where((state.policy, state.critic))
  back = mesh_lib.to_devices((judges, state))
  assert "pinned_host" not in where(back)
  assert tiny.digest(back[1].policy_opt) == tiny.digest(state.policy_opt)


def test_a_network_may_have_rules_of_its_own(tiny_run, tmp_path):
  mesh = mesh_lib.make(mesh_lib.MeshConfig(2, 2, 2))
  split = dataclasses.replace(tiny_run, mesh=mesh)
  judges, start = judges_and_start(split)
  row = (r"^(reference|critic).*kernel$", ())
  config = tiny.changed(tiny_run.config, ppo__rules=(row,), ppo__num_steps=1)
  own = dataclasses.replace(split, config=config)
  _, state, _, kept = phases.begin_ppo(own, "round_1", start, judges)
  is_whole = lambda tree: tree["trunk"]["block_0"]["mlp"]["up"]["kernel"].is_fully_replicated
  assert is_whole(state.critic) and is_whole(kept.reference)
  assert not is_whole(state.policy) and not is_whole(kept.reward)
  moments = [m for m in jax.tree.leaves(state.critic_opt) if m.ndim > 1]
  assert sum(m.is_fully_replicated for m in moments) > len(moments) // 2
  found = phases.train_policy(own, tmp_path / "own", start, judges)
  plain = dataclasses.replace(split, config=tiny.changed(tiny_run.config, ppo__num_steps=1))
  expected = phases.train_policy(plain, tmp_path / "plain", start, judges)
  tiny.assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("row", "message"),
  [((r"^(critic", ()), "is no regular expression"), ((r"^critic", ("model",)), "axis 'model'")],
)
def test_a_rule_that_cannot_be_meant_is_an_error(tiny_run, row, message):
  with pytest.raises(UserError, match=message):
    config = tiny.changed(tiny_run.config, ppo__rules=(row,))
    run = dataclasses.replace(tiny_run, config=config)
    judges, start = judges_and_start(run)
    phases.begin_ppo(run, "round_1", start, judges)


@pytest.mark.conformance("A9")
def test_a_judge_chooses_the_sft_checkpoint_and_without_one_the_loss_does(
  tiny_run, monkeypatch, tmp_path
):
  read = lambda folder: (folder / "heldout.jsonl").read_text().splitlines()
  losses = lambda folder: [json.loads(line) for line in read(folder)]
  phases.supervise(tiny_run, tmp_path / "by_loss")
  by_loss = losses(tmp_path / "by_loss")
  assert by_loss[-1]["score"] == -by_loss[-1]["sft/heldout_loss"] > by_loss[0]["score"]
  verdicts = iter([2.0, 1.0])  # the earlier checkpoint answers better, whatever its loss
  monkeypatch.setattr(phases, "scored_by", lambda run, folder: lambda policy: next(verdicts))
  sft = dataclasses.replace(tiny_run.config.sft, judge="somewhere")
  judged = dataclasses.replace(tiny_run, config=dataclasses.replace(tiny_run.config, sft=sft))
  policy = phases.supervise(judged, tmp_path / "by_judge")
  assert [l["sft/heldout_score"] for l in losses(tmp_path / "by_judge")] == [2.0, 1.0]
  kept = tiny.checkpointer(tmp_path / "by_judge/checkpoints", keep=2)
  assert kept.best_step() == 4
  shapes = jax.tree.map(np.shape, policy)
  assert shapes == jax.tree.map(np.shape, tiny_run.initial_policy())


@pytest.mark.conformance("A9")
def test_the_judges_verdict_is_the_mean_score_of_sampled_answers(tiny_run, tmp_path):
  model, policy = tiny.params(tiny_run.scalar, 0), tiny.params(tiny_run.policy, 1)
  iterate.save(tiny_run, tmp_path / "reward_model", model)
  verdict = phases.scored_by(tiny_run, str(tmp_path / "reward_model"))(policy)
  responder, _ = phases.sampler(tiny_run, 0)
  score = jax.jit(functools.partial(reward.score_sequences, tiny_run.scalar, model))
  prompts = [p.conversation for p in tiny_run.data.prompts("heldout")][:20]
  scores = []
  for i, batch in enumerate(responder.prompt_batches(prompts)):
    key = jax.random.fold_in(tiny_run.key("sft", "judge"), i)
    done = responder.generate(policy, batch, key)
    for b in range(len(done.tokens)):
      answer = done.tokens[b][done.mask[b] > 0].tolist()
      eos = tiny_run.tokenizer.eos_id
      whole = batch.tokens[b][batch.mask[b] > 0].tolist() + answer + [eos] * (answer[-1] != eos)
      tokens, mask = tiny.right_padded([whole], 80)
      scores += score(tokens, mask).tolist()
  np.testing.assert_allclose(verdict, np.mean(scores[:20]), rtol=1e-4)
  with pytest.raises(UserError, match="no parameters to load"):
    phases.scored_by(tiny_run, str(tmp_path / "nothing"))


@pytest.mark.conformance("A20")
def test_the_zero_of_a_reward_model_is_the_mean_score_of_demonstrations(tiny_run):
  run = tiny_run
  params = tiny.params(run.scalar, 0)
  config = run.config.reward
  some = feeds.draw(run.data.records(Demonstration, "train"), 50, run.seed("reward", "centre"))
  apart = feeds.demonstration_rows(run, config.sequence_length, some, pack=False)
  score = jax.jit(lambda tokens, mask: reward.score_sequences(run.scalar, params, tokens, mask))
  scores = [float(score(row.tokens[None], (row.segments > 0)[None])[0]) for row in apart]
  assert len(scores) == 50 and np.std(scores) > 0.1
  mean = phases.demonstration_score(run, params, config)
  np.testing.assert_allclose(mean, np.mean(scores), atol=1e-4)
  again = phases.demonstration_score(run, reward.center(params, mean), config)
  assert abs(again) < 1e-3


def test_ppo_lets_go_of_what_it_started_from(tiny_run, tmp_path, monkeypatch):
  compute = dataclasses.replace(tiny_run.config.model.compute, dtype="bfloat16")
  run = dataclasses.replace(tiny_run, config=tiny.changed(tiny_run.config, model__compute=compute))
  given, alive = [], []

  def fresh(network, seed):
    params = tiny.params(network, seed)
    given.extend(weakref.ref(x) for x in jax.tree.leaves(params) if x.ndim > 1)
    return params

  def fit(stage, step, state, batches, evaluate):
    gc.collect()
    alive.extend(x().shape for x in given if x() is not None)
    return state, None

  monkeypatch.setattr(phases, "fit", fit)
  phases.train_policy(
    run,
    tmp_path,
    fresh(run.policy, 0),
    rollout.Judges(fresh(run.policy, 1), fresh(run.scalar, 2)),
  )
  assert alive == [] and len(given) > 20
