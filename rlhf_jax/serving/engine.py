"""Who answers: a queue, a thread that owns the device, and answers that asyncio can read.

  engine = start(load.of_run(workdir, "newest"), Room(slots=16, queue=64, columns=4, ...))
  answer = engine.submit(Request(Conversation.of(("user", "Hi!"))))
  async for piece in answer: ...
  engine.stop(grace=10)

The thread goes round: answers that are over leave their slots, the longest-waiting requests take
them, one call draws `columns` tokens for all, and every answer is handed its own. It hands over
ids; they become text in the reader's thread. Readers are woken once a round.

`columns` is a trade: a call costs the same overhead for one column as for many, but a token is seen
and a newcomer read only when its call is done, and what a slot draws after its end is thrown away.
"""

import collections
import dataclasses
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.generation.slots import Admission, SlotDecoder, Variables
from rlhf_jax.parallel import rules
from rlhf_jax.serving.answers import SlotAnswer, check, wake
from rlhf_jax.serving.context import FinishReason, Overloaded, Request, Unavailable
from rlhf_jax.serving.load import Loaded
from rlhf_jax.serving.wording import Wording
from rlhf_jax.text.messages import check_text
from rlhf_jax.types import UserError

GROUP = 32  # prompts that are read at once, at most
RETRY_SECONDS = 2.0  # between attempts to get a failing device back
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Room:
  """How many are answered, and at what length."""

  slots: int  # answered at once
  queue: int  # that may wait beside them
  columns: int  # tokens of every answer that one call to the device draws
  context: int  # tokens of dialogue that the policy sees
  max_new_tokens: int  # of the longest answer

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value < 1:
        raise UserError(f"--{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class Status:
  """How an engine is doing."""

  healthy: bool
  why: str  # it is not; "" where it is
  busy: int  # slots in which somebody is answered
  slots: int
  waiting: int
  queue: int  # that may wait


def start(loaded: Loaded, room: Room) -> "SlotEngine":
  """Compiles everything, on as many devices as split the slots evenly, and starts to serve."""
  devices = next(n for n in range(jax.device_count(), 0, -1) if room.slots % n == 0)
  types, names = (jax.sharding.AxisType.Auto,) * 3, ("data", "fsdp", "tensor")
  mesh = jax.make_mesh((devices, 1, 1), names, types, devices=jax.devices()[:devices])
  decoder = SlotDecoder(
    loaded.policy,
    mesh,
    slots=room.slots,
    prompt_length=room.context,
    max_new_tokens=room.max_new_tokens,
    columns=min(room.columns, room.max_new_tokens),
    group=min(room.slots, GROUP),
    pad_id=loaded.tokenizer.pad_id,
  )
  variables = decoder.variables(rules.place(loaded.params, mesh))
  decoder.warm_up(variables)
  engine = SlotEngine(loaded, variables, decoder, room.queue)
  engine.start()
  return engine


class SlotEngine:
  """Serves the slots of one decoder; `submit` is safe from any thread."""

  def __init__(self, loaded: Loaded, variables: Variables, decoder: SlotDecoder, queue: int):
    self.model = loaded.name
    self.loaded, self.decoder, self.queue = loaded, decoder, queue
    # Told of every answer that is over, and why, before its reader is.
    self.on_end: list[Callable[[SlotAnswer, FinishReason], None]] = []
    self.failures = 0  # calls to the device that raised
    self._variables = variables
    # Stop tokens of a config are a habit of its training; whoever chats ends at EOS, as chat.py.
    self._stops = loaded.stops(SamplingConfig(1, 1.0, 0, 1.0, None, (), 1))
    self._changed = threading.Condition()  # guards what follows
    self._waiting: collections.deque[SlotAnswer] = collections.deque()
    self._busy: dict[int, SlotAnswer] = {}
    self._closing = False
    self._broken = ""  # why nothing can be answered
    self._seconds = 1.0  # that an answer has a slot for, on average of late
    self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

  def start(self) -> None:
    """Starts the thread that serves."""
    self._thread.start()

  def submit(self, request: Request) -> SlotAnswer:
    """Queues a request; see `context.Engine`."""
    check(request)
    seed = secrets.randbits(31) if request.seed is None else request.seed
    ids, wording = self._read(request)
    most = min(request.max_tokens or self.decoder.max_new_tokens, self.decoder.max_new_tokens)
    answer = SlotAnswer(request, ids, most, seed, wording, self._poke)
    with self._changed:
      if self._closing or self._broken:
        raise Unavailable(self._broken or "the server is about to end.")
      if len(self._waiting) >= self.queue:
        rounds = len(self._waiting) / self.decoder.slots
        raise Overloaded(len(self._waiting), min(60, max(1, math.ceil(rounds * self._seconds))))
      self._waiting.append(answer)
      self._changed.notify()
    return answer

  def status(self) -> Status:
    """How it is doing; never waits for the device."""
    why = self._broken or ("it is about to end." if self._closing else "")
    if not why and self._thread.ident is not None and not self._thread.is_alive():
      why = "its thread has ended."
    busy, slots = len(self._busy), self.decoder.slots
    return Status(not why, why, busy, slots, len(self._waiting), self.queue)

  def stop(self, grace: float) -> None:
    """Takes nothing new, lets answers end for `grace` seconds, then cancels what is left."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    if self._thread.ident is None:
      return
    self._thread.join(grace)
    with self._changed:
      for answer in [*self._waiting, *self._busy.values()]:
        answer.cancelled = True
      self._changed.notify()
    self._thread.join(30.0)

  def _poke(self) -> None:
    """An answer was cancelled: one that waits is ended at once even if the device is busy."""
    with self._changed:
      gone = [answer for answer in self._waiting if answer.cancelled]
      for answer in gone:
        self._waiting.remove(answer)
    self._end(dict.fromkeys(gone, "cancelled"))

  def _read(self, request: Request) -> tuple[tuple[int, ...], Wording]:
    """The ids of a prompt, and how its answer becomes text."""
    tokenizer, template = self.loaded.tokenizer, self.loaded.template
    context, asked = self.decoder.prompt_length, request.conversation
    if not isinstance(asked, str | tuple):
      ids = self.loaded.prompt(asked, context)
      return ids, Wording(tokenizer.decode, request.stop, lead=template.lead)
    if isinstance(asked, str):
      check_text(asked, "the prompt")
      asked = (*tokenizer.encode_special(template.bos), *tokenizer.encode(asked))
    if not 1 <= len(asked) <= context:
      raise UserError(
        f"a prompt has 1 to {context} tokens here, this one has {len(asked)}; bare text is never "
        "cut, so shorten it."
      )
    if not all(0 <= i < tokenizer.vocab_size for i in asked):
      raise UserError(f"ids of a prompt lie in [0, {tokenizer.vocab_size}).")
    return asked, Wording(tokenizer.decode, request.stop, before=asked)

  def _serve(self) -> None:
    """The thread: rounds until told to stop and all is done."""
    state = self._fresh_state()
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._waiting or self._busy or self._closing)
        if self._closing and not self._waiting and not self._busy:
          return
      try:
        self._sweep()
        state = self._round(state)
      except Exception as error:  # the device's, or a bug of ours: serving goes on either way
        self.failures += 1
        log.exception("a call to the device failed; the answers under way end here")
        self._end_all(running_only=True)
        state = self._fresh_state(error)

  def _fresh_state(self, error: Exception | None = None):
    """Empty slots; where the device gives none, tries again until it does or all is over."""
    while True:
      try:
        state = self.decoder.empty()
        if error is not None:  # whether it really computes again
          state, drawn = self.decoder.advance(self._variables, state)
          jax.block_until_ready(drawn)
        self._broken = ""
        return state
      except Exception as again:
        self.failures += 1
        self._broken = f"the device fails: {type(again).__name__}."
        log.exception("the device gives no fresh slots")
        self._end_all()
        error = again
        with self._changed:
          if self._changed.wait_for(lambda: self._closing, RETRY_SECONDS):
            return None

  def _round(self, state):
    """Reads newcomers, then draws the next columns of all answers.

    A call draws for free slots too, so whoever waits and fits is read first; until as many have
    come as there are slots, for those who are being answered wait meanwhile.
    """
    read = 0
    while read < self.decoder.slots and (come := self._admit_waiting()):
      read += len(come)
      prompts = [
        Admission(slot, a.prompt, a.seed % 2**32, a.temperature, a.request.top_p)
        for slot, a in come.items()
      ]
      state, drawn = self.decoder.admit(self._variables, state, prompts)
      self._hand_out(come, drawn.tokens[:, None], drawn.logprobs[:, None], range(len(come)))
    if self._busy:
      state, drawn = self.decoder.advance(self._variables, state)
      tokens, logprobs = np.asarray(drawn.tokens), np.asarray(drawn.logprobs)
      self._hand_out(dict(self._busy), tokens, logprobs, list(self._busy))
    return state

  def _admit_waiting(self) -> dict[int, SlotAnswer]:
    """Moves those who waited longest into free slots."""
    come = {}
    with self._changed:
      free = [slot for slot in range(self.decoder.slots) if slot not in self._busy]
      fit = min(len(free), len(self._waiting))
      for slot in free[: self.decoder.come_next(fit)] if fit else ():
        come[slot] = self._waiting.popleft()
        come[slot].admitted_at = time.monotonic()
      self._busy |= come
    return come

  def _hand_out(self, answers: dict[int, SlotAnswer], tokens, logprobs, rows) -> None:
    """Gives every answer the tokens of its row, up to its end."""
    over = {}
    for answer, row in zip(answers.values(), rows):
      ids, reason = [], None
      for token in tokens[row].tolist():
        ids.append(token)
        column = answer.drawn + len(ids)
        if self._stops.end(token, column - 1):
          reason = "stop"
        elif column >= answer.most:
          reason = "length"
        if reason:
          break
      answer.take(ids, logprobs[row, : len(ids)].tolist(), ended_by_token=reason == "stop")
      if reason:
        over[answer] = reason
    self._end(over)
    wake(set(answers.values()) - set(over))

  def _sweep(self) -> None:
    """Ends answers that were cancelled or whose time is up, waiting or not."""
    now, over = time.monotonic(), {}
    with self._changed:
      for answer in [*self._waiting, *self._busy.values()]:
        if answer.cancelled:
          over[answer] = answer.finish_reason or "cancelled"  # its reader may have met a stop text
        elif answer.deadline is not None and now >= answer.deadline:
          over[answer] = "deadline"
      for answer in over:
        if answer in self._waiting:
          self._waiting.remove(answer)
    self._end(over)

  def _end_all(self, running_only: bool = False) -> None:
    with self._changed:
      over = list(self._busy.values())
      if not running_only:
        over += self._waiting
        self._waiting.clear()
    self._end(dict.fromkeys(over, "error"))

  def _end(self, over: dict[SlotAnswer, FinishReason]) -> None:
    """Frees the slots of these answers and tells their readers why they are over."""
    if not over:
      return
    with self._changed:
      self._busy = {slot: a for slot, a in self._busy.items() if a not in over}
    for answer, reason in over.items():
      answer.ended_at = time.monotonic()
      if answer.admitted_at is not None:
        self._seconds += 0.1 * (answer.ended_at - answer.admitted_at - self._seconds)
      for tell in self.on_end:
        tell(answer, reason)
      answer.reason = reason
    wake(over)
