"""A dialogue with a policy in the terminal: what `experiments/chat.py` says and does.

`talk` reads lines and writes text; where both come from is the caller's choice, so a test or a pipe
can hold the dialogue as well as a person.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TextIO

import jax

from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.generation.stream import Streamer, pieces
from rlhf_jax.serving.load import Loaded
from rlhf_jax.text.messages import Conversation, Message
from rlhf_jax.types import UserError

COMMANDS = """\
/new            begins a new dialogue, with the same system message
/system TEXT    begins a new dialogue under this system message; without TEXT, under none
/retry          answers the last message again
/help           shows this
/quit           ends, as Ctrl-D does; Ctrl-C stops an answer
"""

Messages = tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A policy with everything it takes to answer."""

  loaded: Loaded
  streamer: Streamer
  context: int  # tokens of the dialogue that are kept; older turns are dropped

  def answer(self, messages: Messages, key: jax.Array) -> Iterator[str]:
    """The reply in pieces, as they are drawn.

    Raises:
      UserError: the last message alone is longer than `context`.
    """
    prompt = self.loaded.prompt(Conversation(messages), self.context)
    return pieces(self.streamer.ids(self.loaded.params, prompt, key), self.loaded.reply)


def speaker_of(loaded: Loaded, sampling: SamplingConfig, context: int) -> Speaker:
  """Makes a loaded policy speak."""
  streamer = Streamer(loaded.policy, sampling, loaded.stops(sampling), loaded.tokenizer.pad_id)
  return Speaker(loaded, streamer, context)


@dataclasses.dataclass(frozen=True)
class Turn:
  """What a line of the user leads to."""

  messages: Messages
  note: str | None = None  # said by the program, not by the policy
  ends: bool = False

  @property
  def waits(self) -> bool:
    """Whether an answer of the policy is due."""
    return bool(self.messages) and self.messages[-1].role == "user"


def understand(messages: Messages, line: str) -> Turn:
  """What a line typed after `messages` means: a command, or the user's next message."""
  command, _, rest = line.strip().partition(" ")
  system = tuple(message for message in messages if message.role == "system")
  if not command.startswith("/"):
    return Turn((*messages, Message("user", line.strip())) if command else messages)
  if command == "/quit":
    return Turn(messages, ends=True)
  if command == "/new":
    return Turn(system, "A new dialogue.")
  if command == "/system":
    return Turn((Message("system", rest.strip()),) if rest.strip() else (), "A new dialogue.")
  if command == "/retry":
    if messages and messages[-1].role == "assistant":
      return Turn(messages[:-1])
    return Turn(messages, "There is no answer yet that could be tried again.")
  if command == "/help":
    return Turn(messages, COMMANDS.rstrip())
  return Turn(messages, f"There is no command {command}.\n{COMMANDS.rstrip()}")


def talk(speaker: Speaker, read: Callable[[], str], out: TextIO, key: jax.Array) -> Messages:
  """Holds a dialogue until `read` raises EOFError or the user ends it; returns its messages.

  Answer n draws with fold_in(key, n). One that is stopped by Ctrl-C stays as far as it came; a
  message that cannot be answered is taken back.
  """
  messages, answers = (), 0
  while True:
    try:
      turn = understand(messages, read())
    except EOFError:
      return messages
    except KeyboardInterrupt:
      turn = Turn(messages, "\nCtrl-D or /quit ends.")
    except UserError as error:  # what was typed is no text
      turn = Turn(messages, f"error: {error}")
    if turn.note:
      out.write(f"{turn.note}\n")
    if turn.ends:
      return messages
    before, messages = messages, turn.messages
    if turn.waits:
      reply = _answer(speaker, messages, out, jax.random.fold_in(key, answers))
      answers += 1
      messages = before if reply is None else (*messages, Message("assistant", reply))


def _answer(speaker: Speaker, messages: Messages, out: TextIO, key: jax.Array) -> str | None:
  """Shows an answer as it comes, and returns it; None where there can be none."""
  said = []
  try:
    for piece in speaker.answer(messages, key):
      said.append(piece)
      out.write(piece)
      out.flush()
  except KeyboardInterrupt:
    out.write(" [stopped]")
  except UserError as error:
    out.write(f"error: {error}\n")
    return None
  out.write("\n")
  out.flush()
  return "".join(said)
