"""A dialogue with a policy in the terminal: what `experiments/chat.py` says and does.

`talk` reads lines and writes text; where both come from is the caller's choice, so a test or a pipe
can hold the dialogue as well as a person.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax

from rlhf_jax import config as config_lib
from rlhf_jax import standing
from rlhf_jax.experiment import ExperimentConfig
from rlhf_jax.generation.sampling import SamplingConfig, find_stops
from rlhf_jax.generation.stream import Streamer, pieces
from rlhf_jax.networks import heads, pretrained
from rlhf_jax.text import dialogue
from rlhf_jax.text.messages import Conversation, Message
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training import checkpoint, files
from rlhf_jax.types import Params, UserError

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

  params: Params
  streamer: Streamer
  tokenizer: Tokenizer
  template: dialogue.ChatTemplate
  context: (
    int  # tokens of the dialogue that are kept; of a longer one, the oldest turns are dropped
  )

  def answer(self, messages: Messages, key: jax.Array) -> Iterator[str]:
    """The reply in pieces, as they are drawn.

    Raises:
      UserError: the last message alone is longer than `context`.
    """
    whole = Conversation(messages)
    kept = dialogue.truncate(
      whole, self.context, self.template, self.tokenizer, on_too_long="error"
    )
    prompt = dialogue.encode_prompt(kept, self.template, self.tokenizer)
    decode = lambda ids: dialogue.decode_response(ids, self.template, self.tokenizer)
    return pieces(self.streamer.ids(self.params, prompt, key), decode)


def of_run(workdir: pathlib.Path, policy: str, sampling: SamplingConfig, context: int) -> Speaker:
  """A policy of a working directory, by its path in there; "newest" is the newest.

  Raises:
    UserError: `workdir` holds no run, no such policy, or one that does not fit its config.
  """
  workdir = workdir.expanduser().absolute()
  if not (workdir / "config.json").exists():
    raise UserError(f"{workdir} holds no run: there is no config.json in it.")
  config = config_lib.build(ExperimentConfig, files.read_json(workdir / "config.json"))
  path = workdir / standing.find_policy(workdir, policy)
  trained_here = config.text.tokenizer in ("village", "train")
  tokenizer = workdir / "tokenizer" if trained_here else config.text.tokenizer
  initial = lambda: heads.init(heads.Policy(config.model), jax.random.key(0))
  params, _ = checkpoint.load_params(path, jax.eval_shape(initial))
  return _speaker(config, params, tokenizer, sampling, context)


def of_pretrained(section: Any, sampling: SamplingConfig, context: int) -> Speaker:
  """The pretrained model that a config starts from.

  Raises:
    UserError: the config names none, or weights of another shape.
  """
  config = config_lib.build(ExperimentConfig, section)
  if config.pretrained is None or config.text.tokenizer in ("village", "train"):
    raise UserError(
      "this config starts from no pretrained model with a tokenizer of its own; train one first "
      "and give its --workdir."
    )
  params = pretrained.load_as(config.model, config.pretrained)
  return _speaker(config, params, config.text.tokenizer, sampling, context)


def _speaker(config, params, tokenizer, sampling, context) -> Speaker:
  template = dialogue.TEMPLATES[config.text.template]
  tokenizer = Tokenizer.load(tokenizer, eos=template.end)
  policy = heads.Policy(config.model)
  streamer = Streamer(policy, sampling, find_stops(sampling, tokenizer), tokenizer.pad_id)
  return Speaker(params, streamer, tokenizer, template, context)


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
