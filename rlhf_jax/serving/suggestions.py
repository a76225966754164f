"""What the policy would write for either side of a dialogue that a labeler demonstrates.

The assistant's side is what the policy is for. For the user's side the policy is asked to go on
with the dialogue as text: everything so far, in the chat template it was trained with, ends with
the header of a *user's* message, and what follows that header is what the model believes a user
writes there. Nothing is added, no instruction and no exchange of roles. It has no loss on users'
messages after pretraining, so these suggestions are rougher than the assistant's, which is one
reason why a labeler edits them and how much they did is recorded.

Without the template (an engine that does not tell) the same is done with a plain transcript.
"""

from collections.abc import Sequence

from rlhf_jax.serving.context import Engine, Request, complete
from rlhf_jax.text.dialogue import PLAIN, ChatTemplate
from rlhf_jax.text.messages import Conversation, Message, Role
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError

SECONDS = 60.0  # then a suggestion ends as far as it came


async def suggest(
  engine: Engine,
  messages: Sequence[Message],
  role: Role,
  template: ChatTemplate | None = None,
  tokenizer: Tokenizer | None = None,
) -> str:
  """The next message of this side, "" if the model says nothing.

  Raises:
    UserError: it is not this side's turn, or the dialogue is too long.
    Overloaded: too many are asking.
  """
  if role == "assistant":
    if not messages:
      raise UserError("the assistant answers; write what the user says first.")
    request = Request(Conversation(tuple(messages)), seconds=SECONDS)
  elif template is not None and tokenizer is not None:
    ids = user_header(messages, template, tokenizer)
    # Where the user's side has no end of its own, the other side's header is one.
    stop = () if template.suffix["user"] else (template.prefix["assistant"],)
    request = Request(ids, stop=stop, seconds=SECONDS)
  else:
    request = Request(transcript(messages), stop=(PLAIN.prefix["assistant"],), seconds=SECONDS)
  answer = engine.submit(request)
  try:
    return (await complete(answer)).replace("\0", "\ufffd").strip()  # no record may hold a NUL
  finally:
    answer.cancel()


def user_header(
  messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[int, ...]:
  """Ids of a dialogue and of the header that a user's next message would have."""
  messages = list(messages)
  if template.default_system is not None and not (messages and messages[0].role == "system"):
    messages = [Message("system", template.default_system), *messages]
  ids = tokenizer.encode_special(template.bos)
  for message in messages:
    ids = ids + tokenizer.encode_special(template.prefix[message.role])
    ids += tokenizer.encode(template.lead + message.content)
    ids += tokenizer.encode_special(template.suffix[message.role] + template.separator)
  return tuple(ids + tokenizer.encode_special(template.prefix["user"]))


def transcript(messages: Sequence[Message]) -> str:
  """The same as text that any language model can go on with."""
  said = "".join(f"{PLAIN.prefix[m.role]}{PLAIN.lead}{m.content}" for m in messages)
  return (said + PLAIN.prefix["user"]).lstrip("\n")
