"""The optimiser against torch.optim.AdamW, and its schedules against those of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rlhf_jax.training import optim  # noqa: E402

pytestmark = pytest.mark.reference

STEPS = 12


def config(**changes):
  settings = {
    "learning_rate": 0.02,
    "schedule": "constant",
    "warmup_steps": 0,
    "warmup_from": 0.0,
    "final_fraction": 1.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-5,
    "weight_decay": 0.0,
    "clip_norm": None,
  }
  return optim.OptimConfig(**(settings | changes))


@pytest.fixture
def problem():
  """A small parameter tree and STEPS gradients for it, some large and some tiny."""
  rng = np.random.default_rng(0)
  tree = lambda scale: {
    "mlp": {"kernel": rng.standard_normal((5, 3)).astype(np.float32) * scale},
    "norm": {"scale": rng.standard_normal(3).astype(np.float32) * scale},
    "score": {"bias": rng.standard_normal(1).astype(np.float32) * scale},
  }
  return tree(1.0), [tree(10.0 ** (step % 4 - 3)) for step in range(STEPS)]


def our_run(problem, settings):
  params, gradients = problem
  optimizer = optim.make(settings, STEPS)
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = jax.jit(optimizer.update)(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return {name: np.asarray(*leaf.values()) for name, leaf in params.items()}


def torch_run(problem, settings, schedule=None):
  """Weight decay on matrices only, which in PyTorch takes two parameter groups."""
  params, gradients = problem
  leaves = {name: torch.tensor(*leaf.values()) for name, leaf in params.items()}
  for leaf in leaves.values():
    leaf.requires_grad_()
  others = {"params": [leaves["norm"], leaves["score"]], "weight_decay": 0.0}
  optimizer = torch.optim.AdamW(
    [{"params": [leaves["mlp"]]}, others],
    lr=settings.learning_rate,
    betas=(settings.beta1, settings.beta2),
    eps=settings.eps,
    weight_decay=settings.weight_decay,
  )
  scheduler = schedule(optimizer) if schedule else None
  for gradient in gradients:
    for name, leaf in leaves.items():
      leaf.grad = torch.tensor(*gradient[name].values())
    if settings.clip_norm is not None:
      torch.nn.utils.clip_grad_norm_(leaves.values(), settings.clip_norm)
    optimizer.step()
    if scheduler:
      scheduler.step()
  return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


@pytest.mark.conformance("A53")
@pytest.mark.parametrize("eps", [1e-8, 1e-5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_moves_as_torchs_does(problem, eps, weight_decay, clip_norm, assert_close):
  settings = config(eps=eps, weight_decay=weight_decay, clip_norm=clip_norm)
  assert_close(our_run(problem, settings), torch_run(problem, settings), atol=1e-5)


@pytest.mark.conformance("A52")
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_transformers_schedules(name, warmup, assert_close):
  schedules = {
    "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, STEPS),
    "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, STEPS),
    "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
  }
  final = 1.0 if name == "constant" else 0.0
  settings = config(schedule=name, warmup_steps=warmup, final_fraction=final)
  optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
  scheduler, theirs = schedules[name](optimizer), []
  for _ in range(STEPS):
    theirs.append(scheduler.get_last_lr()[0])
    optimizer.step()
    scheduler.step()
  rate = optim.schedule(settings, STEPS)
  assert_close([rate(step) for step in range(STEPS)], theirs, atol=1e-8)


def test_a_cosine_to_a_tenth_is_torchs_cosine_annealing(assert_close):
  """InstructGPT's SFT and reward models (appendix C.1, C.2): cosine to 10% of the peak."""
  settings = config(schedule="cosine", final_fraction=0.1)
  optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
  scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
    optimizer, STEPS, eta_min=0.1 * settings.learning_rate
  )
  theirs = []
  for _ in range(STEPS):
    theirs.append(scheduler.get_last_lr()[0])
    optimizer.step()
    scheduler.step()
  rate = optim.schedule(settings, STEPS)
  assert_close([rate(step) for step in range(STEPS)], theirs, atol=1e-8)


@pytest.mark.conformance("A52")
def test_a_whole_run_with_warmup_and_decay_ends_where_torchs_ends(problem, assert_close):
  settings = config(schedule="linear", warmup_steps=3, final_fraction=0.0, weight_decay=0.1)
  linear = lambda o: transformers.get_linear_schedule_with_warmup(o, 3, STEPS)
  assert_close(our_run(problem, settings), torch_run(problem, settings, linear), atol=1e-5)


def test_the_moving_average_is_that_of_torchs_averaged_model(assert_close):
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((6, 4)).astype(np.float32)
  module = torch.nn.Linear(4, 1, bias=False)
  averaged = torch.optim.swa_utils.AveragedModel(
    module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.992)
  )
  ema = None
  for row in weights:
    with torch.no_grad():
      module.weight.copy_(torch.tensor(row[None]))
    averaged.update_parameters(module)
    params = {"kernel": jnp.asarray(row)}
    ema = params if ema is None else optim.ema_update(ema, params, 0.992)
  assert_close(ema["kernel"], averaged.module.weight[0].detach().numpy(), atol=1e-6)
