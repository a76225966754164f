"""Answers that come and go in slots are those that each prompt gets alone."""

import functools
import random

import jax
import numpy as np
import pytest
import tiny

from rlhf_jax.generation import slots as slots_lib
from rlhf_jax.generation import stream
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.generation.slots import Admission, SlotDecoder
from rlhf_jax.networks import heads
from rlhf_jax.parallel import rules
from rlhf_jax.types import UserError

P, R = 40, 12
STOPS = Stops((tiny.EOS, 2, 3, 4))
SETTINGS = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.0, 1.0)]  # temperature, top_p


@functools.cache
def decoder(policy=tiny.POLICY, axes=(1, 1, 1), slots=4, columns=3):
  return SlotDecoder(
    policy,
    tiny.mesh(axes),
    slots=slots,
    prompt_length=P,
    max_new_tokens=R,
    columns=columns,
    group=2,
    pad_id=tiny.PAD,
  )


@functools.cache
def streamer(temperature, top_p, policy=tiny.POLICY):
  how = tiny.changed(tiny.SAMPLING, max_new_tokens=R, temperature=temperature, top_p=top_p)
  return stream.Streamer(policy, how, STOPS, tiny.PAD)


def requests(count):
  """Prompts of 1 to P tokens with seeds and settings of their own."""
  chance = random.Random(0)
  for seed in range(count):
    prompt = tiny.random_tokens((chance.randint(1, P),), seed).tolist()
    yield Admission(-1, prompt, seed, *SETTINGS[seed % len(SETTINGS)])


def serve(decoder, variables, waiting):
  """All answers, each as (ids, log-probabilities); slots are filled as soon as they are free."""
  state, waiting, busy, answers = decoder.empty(), list(enumerate(waiting)), {}, {}
  while waiting or busy:
    free = [slot for slot in range(decoder.slots) if slot not in busy]
    come = [waiting.pop(0) for _ in range(min(len(free), len(waiting), decoder.group))]
    if come:
      admitted = [
        Admission(slot, r.prompt, r.seed, r.temperature, r.top_p)
        for slot, (_, r) in zip(free, come)
      ]
      state, first = decoder.admit(variables, state, admitted)
      for slot, (i, _), token, logprob in zip(free, come, first.tokens, first.logprobs):
        busy[slot], answers[i] = i, ([int(token)], [float(logprob)])
    else:
      state, drawn = decoder.advance(variables, state)
      tokens, logprobs = np.asarray(drawn.tokens), np.asarray(drawn.logprobs)
      for slot, i in busy.items():
        answers[i][0].extend(tokens[slot].tolist())
        answers[i][1].extend(logprobs[slot].tolist())
    for slot, i in list(busy.items()):
      ids = answers[i][0]
      ends = [n for n, token in enumerate(ids) if token in STOPS.always]
      if ends or len(ids) >= R:
        length = min([n + 1 for n in ends] + [R])
        answers[i] = tuple(part[:length] for part in answers[i])
        del busy[slot]
  return [answers[i] for i in sorted(answers)]


@pytest.mark.parametrize(
  ("axes", "scan_layers", "slots"),
  [
    ((1, 1, 1), False, 4),
    ((1, 1, 1), True, 4),
    ((2, 1, 1), False, 4),
    ((2, 1, 2), False, 4),
    ((1, 1, 1), False, 1),
    ((1, 1, 1), True, 1),
    ((1, 1, 2), False, 1),
  ],
)
def test_every_answer_is_the_one_that_its_prompt_gets_alone(axes, scan_layers, slots):
  policy = heads.Policy(tiny.changed(tiny.MODEL, compute__scan_layers=scan_layers))
  params, asked = tiny.params(policy, 0), list(requests(13))
  at = decoder(policy, axes, slots)
  answers = serve(at, at.variables(rules.place(params, at.mesh)), asked)
  for (ids, _), request in zip(answers, asked):
    alone = streamer(request.temperature, request.top_p, policy)
    assert ids == list(alone.ids(params, request.prompt, jax.random.key(request.seed)))
  assert len({len(ids) for ids, _ in answers}) > 2  # some ended early


def test_nothing_is_compiled_once_it_is_warm():
  at = decoder(slots=6, columns=2)
  variables = at.variables(tiny.params(tiny.POLICY, 0))
  at.warm_up(variables)
  compiled = []
  listen = lambda event, seconds, **_: compiled.append(event)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    serve(at, variables, requests(8))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert not [event for event in compiled if "backend_compile" in event]


def test_logprobs_are_those_of_a_fresh_forward_pass_and_0_where_greedy():
  at, params, asked = decoder(), tiny.params(tiny.POLICY, 0), list(requests(8))
  for (ids, logprobs), request in zip(serve(at, at.variables(params), asked), asked):
    if request.temperature == 0:
      assert logprobs == [0.0] * len(ids)
    elif request.top_p == 1.0:
      row = np.array([[*request.prompt, *ids]])
      logits = tiny.POLICY.apply({"params": params}, row, *heads.layout(np.ones_like(row)))[0]
      fresh = jax.nn.log_softmax(logits / request.temperature)
      columns = len(request.prompt) - 1 + np.arange(len(ids))
      np.testing.assert_allclose(logprobs, fresh[columns, ids], atol=1e-4)


@pytest.mark.parametrize("prompts", [[], [[]], [[5] * (P + 1)], [[5]] * 3])
def test_prompts_that_do_not_fit_are_refused_with_the_limits(prompts):
  at, params = decoder(), tiny.params(tiny.POLICY, 0)
  with pytest.raises(UserError, match="1 to 2 prompts at a time, of 1 to 40 tokens"):
    at.admit(params, at.empty(), [Admission(0, p, 0, 1.0, 1.0) for p in prompts])


def test_newcomers_come_in_groups_that_are_not_mostly_free():
  groups = SlotDecoder(tiny.POLICY, tiny.mesh((1, 1, 1)), 64, P, R, 3, 32, tiny.PAD)
  assert groups.counts() == [1, 8, 32]
  expected = {1: 1, 2: 1, 3: 3, 8: 8, 9: 8, 10: 8, 11: 11, 32: 32, 33: 32, 99: 32}
  assert {waiting: groups.come_next(waiting) for waiting in expected} == expected
  assert [decoder().come_next(waiting) for waiting in (1, 2, 3)] == [1, 2, 2]


def test_the_widths_are_few_and_the_last_is_the_longest_prompt():
  assert decoder().widths() == [32, 40]
  assert slots_lib.bucket(33) == 64
