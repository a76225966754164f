"""The reward model's loss and scores against TRL, and the ranking loss against a double loop."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # "experimental"
  trl_utils = pytest.importorskip("trl.experimental.utils")

from rlhf_jax import reward  # noqa: E402
from rlhf_jax.data import batches, packing  # noqa: E402
from rlhf_jax.networks import heads  # noqa: E402

pytestmark = pytest.mark.reference

PAD, EOS = 0, 2


def trl_reward_loss(model, inputs):
  """`RewardTrainer.compute_loss` itself, on a stand-in for all of the trainer that it touches."""
  trainer = types.SimpleNamespace(
    model=model,
    args=types.SimpleNamespace(center_rewards_coefficient=None),
    accelerator=types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
    _total_train_tokens=0,
    _metrics={
      "eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy")}
      | {"margin": []}
    },
  )
  loss = trl.RewardTrainer.compute_loss(trainer, model, inputs)
  return loss, trainer._metrics["eval"]["accuracy"][0]


@pytest.mark.conformance("A10")
def test_pairwise_loss_accuracy_and_gradient_are_those_of_trls_reward_trainer(
  make_llama, import_llama, stored_gradients, torch_gradients, assert_close
):
  """Through the whole network: here packed behind shared prompts, there right-padded pairs."""
  model = make_llama("SequenceClassification")
  config, params = import_llama(model)
  rng = np.random.default_rng(0)
  P = 3
  lengths = rng.integers(P + 1, 12, (6, 2))  # of prompt and [chosen, rejected]
  mask = np.arange(12)[None, None, :] < lengths[:, :, None]
  tokens = np.where(mask, rng.integers(3, 40, (6, 2, 12)), PAD)
  tokens[:, 1, :P] = tokens[:, 0, :P]
  answers = lambda i: tuple(tokens[i, k, P : lengths[i, k]] for k in range(2))
  groups = [packing.Group(tokens[i, 0, :P], answers(i), (0, 1)) for i in range(6)]
  sizes = dict(max_tokens=48, max_prompts=2, max_responses=2, pad_id=PAD)
  batch = batches.stack([packing.ranking_row(groups[i : i + 2], **sizes) for i in range(0, 6, 2)])
  network = heads.ScalarNetwork(config)
  run = jax.jit(
    jax.value_and_grad(lambda params: reward.loss(network, params, batch), has_aux=True)
  )
  (ours, scores), gradient = run(params)
  rows = lambda x: torch.tensor(np.concatenate([x[:, 0], x[:, 1]]))  # TRL: all chosen come first
  inputs = {"input_ids": rows(tokens), "attention_mask": rows(mask)}
  theirs, accuracy = trl_reward_loss(model, inputs)
  theirs.backward()
  assert_close(ours, theirs.item(), atol=1e-5)
  assert_close(stored_gradients(gradient), torch_gradients(model), atol=1e-5)
  counts = reward.count_pairs(scores, batch)
  assert counts["correct"] / counts["pairs"] == pytest.approx(accuracy)


@pytest.mark.conformance("A10", "A13", "B23")
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_k_way_loss_and_gradient_are_those_of_a_double_loop(scale, assert_close):
  """Ouyang et al. 2022, eq. 1, pair by pair in PyTorch; ties and empty slots make no pair."""
  scores = np.float32([0.3, -1.2, 0.8, 2.0, -0.4, 0.1, 99.0]) * scale
  ranks = np.array([0, 1, 1, 2, 3, 5, 0])
  valid = np.float32([1, 1, 1, 1, 1, 1, 0])
  gradient = jax.jit(jax.value_and_grad(reward.ranking_loss))
  ours, slope = gradient(jnp.asarray(scores), jnp.asarray(ranks), jnp.asarray(valid))
  r = torch.tensor(scores, requires_grad=True)
  losses = []
  for w in range(6):
    for l in range(6):
      if ranks[w] < ranks[l]:
        losses.append(-torch.nn.functional.logsigmoid(r[w] - r[l]))
  assert len(losses) == 14  # C(6, 2) less one tie
  expected = torch.stack(losses).mean()
  expected.backward()
  assert_close(ours, expected.item(), atol=1e-5, rtol=1e-6)
  assert_close(slope, r.grad.numpy(), atol=1e-5)


@pytest.mark.conformance("A15", "A16", "A17", "A18", "B8")
def test_scores_are_read_where_trls_get_reward_reads_them(make_llama, import_llama, assert_close):
  """Prompts padded on the left and with an EOS inside; responses that end early, or never."""
  model = make_llama("SequenceClassification")
  config, params = import_llama(model)
  rng = np.random.default_rng(0)
  P, prompts, responses = 7, (7, 4, 1, 6), (5, 1, 3, 4)
  mask = np.zeros((4, P + 5), bool)
  for row, (before, after) in enumerate(zip(prompts, responses)):
    mask[row, P - before : P + after] = True
  tokens = np.where(mask, rng.integers(3, 40, mask.shape), PAD)
  tokens[0, 3] = tokens[3, 4] = tokens[1, P] = tokens[2, P + 2] = EOS
  with torch.no_grad():
    _, theirs, lengths = trl_utils.get_reward(model, torch.tensor(tokens), PAD, P)
  assert lengths.tolist() == [P + n - 1 for n in responses]
  score = jax.jit(
    lambda params: reward.score_sequences(heads.ScalarNetwork(config), params, tokens, mask)
  )
  assert_close(score(params), theirs.numpy(), atol=1e-5)
