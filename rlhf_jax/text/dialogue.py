"""Dialogues as tokens: chat templates, ids, and which of the ids carry loss.

A conversation is laid out message by message, with `end` closing what the assistant says:

  [bos] prefix content suffix  separator  prefix content suffix  separator  ...

Each piece is tokenized on its own. Hence the ids of a prompt followed by the ids of a response are
the ids of the whole conversation, token for token, whatever the tokenizer merges; and only the
template can write special tokens: `<|im_start|>` typed by a user stays ordinary text.
"""

import collections.abc
import dataclasses
from typing import Literal, get_args

from rlhf_jax.text.messages import Conversation, Message, Role
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError

OnTooLong = Literal["error", "skip"]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """How a conversation is written down, as data.

  `lead` stands between a prefix and the content. It belongs to the content, so that a prompt never
  ends in a space and the completion owns the one it starts with. `separator` stands between a
  message and the next; nothing follows the last suffix of a conversation.
  """

  name: str
  bos: str
  prefix: collections.abc.Mapping[Role, str]
  suffix: collections.abc.Mapping[Role, str]
  separator: str
  lead: str
  default_system: str | None

  @property
  def end(self) -> str:
    """The special token with which the assistant ends its turn, the EOS of generation."""
    return self.suffix["assistant"]


CHATML = ChatTemplate(  # SmolLM2-Instruct's, as its GGUF metadata `tokenizer.chat_template` has it
  name="chatml",
  bos="",
  prefix={role: f"<|im_start|>{role}\n" for role in get_args(Role)},
  suffix={role: "<|im_end|>" for role in get_args(Role)},
  separator="\n",
  lead="",
  default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)

LLAMA3 = ChatTemplate(  # Llama-3-Instruct's, as its model card has it
  name="llama3",
  bos="<|begin_of_text|>",
  prefix={role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in get_args(Role)},
  suffix={role: "<|eot_id|>" for role in get_args(Role)},
  separator="",
  lead="",
  default_system=None,
)

PLAIN = ChatTemplate(  # HH-RLHF's: markers are ordinary text, which a user can type too
  name="plain",
  bos="",
  prefix={"system": "\n\nSystem:", "user": "\n\nHuman:", "assistant": "\n\nAssistant:"},
  suffix={"system": "", "user": "", "assistant": "<|endoftext|>"},
  separator="",
  lead=" ",
  default_system=None,
)

VILLAGE = ChatTemplate(
  name="village",
  bos="",
  prefix={role: f"<{role}>" for role in get_args(Role)},
  suffix={role: "<end>" for role in get_args(Role)},
  separator="",
  lead="",
  default_system=None,
)

TEMPLATES = {template.name: template for template in (CHATML, LLAMA3, PLAIN, VILLAGE)}


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Token ids, and 1 for each id that is a target of the loss."""

  ids: tuple[int, ...]
  loss_mask: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.ids)


def render(conversation: Conversation, template: ChatTemplate) -> str:
  """The conversation as text, for reading and for comparison with other implementations."""
  parts = []
  for message in _with_system(conversation, template).messages:
    prefix, suffix = template.prefix[message.role], template.suffix[message.role]
    parts.append(prefix + template.lead + message.content + suffix)
  return template.bos + template.separator.join(parts)


def render_prompt(conversation: Conversation, template: ChatTemplate) -> str:
  """The conversation up to and including the header of the reply to come."""
  return render(conversation, template) + template.separator + template.prefix["assistant"]


def encode(
  conversation: Conversation,
  template: ChatTemplate,
  tokenizer: Tokenizer,
  *,
  supervise: Literal["all", "last"],
) -> Encoded:
  """Ids of a conversation; the loss is on assistant content and the EOS that closes it.

  Args:
    conversation: must hold an assistant message, else nothing could be learnt from it.
    template: its `end` must be the tokenizer's EOS.
    tokenizer: text to ids.
    supervise: every assistant message, or only the last one.

  Raises:
    UserError: there is no assistant message, or template and tokenizer do not belong together.
  """
  conversation = _with_system(conversation, template)
  turns = conversation.assistant_turns
  if not turns:
    raise UserError(
      "a conversation without an assistant message has nothing to learn from; "
      f"it starts {conversation.messages[0].content[:80]!r}."
    )
  supervised = set(turns if supervise == "all" else turns[-1:])
  ids, mask = _bos(template, tokenizer), []
  mask += [0] * len(ids)
  separator = tokenizer.encode_special(template.separator)
  for i, message in enumerate(conversation.messages):
    header, body = _message_ids(message, template, tokenizer)
    header = header if i == 0 else separator + header
    ids += header + body
    mask += [0] * len(header) + [int(i in supervised)] * len(body)
  return Encoded(tuple(ids), tuple(mask))


def encode_prompt(
  conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[int, ...]:
  """Ids of a conversation and of the assistant's header, where generation starts.

  Raises:
    UserError: the conversation ends with the assistant's message, so no reply is due.
  """
  if conversation.last.role == "assistant":
    raise UserError("a prompt must end with the user's message; this one ends with a reply.")
  ids = _bos(template, tokenizer)
  separator = tokenizer.encode_special(template.separator)
  for message in _with_system(conversation, template).messages:
    header, body = _message_ids(message, template, tokenizer)
    ids += header + body + separator
  return tuple(ids + tokenizer.encode_special(template.prefix["assistant"]))


def encode_response(content: str, template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Ids of a finished reply, EOS included: what follows `encode_prompt` in the conversation."""
  return tuple(_message_ids(Message("assistant", content), template, tokenizer)[1])


def decode_response(
  ids: collections.abc.Iterable[int], template: ChatTemplate, tokenizer: Tokenizer
) -> str:
  """The inverse of `encode_response`: text before the first EOS, without the template's lead."""
  ids = [int(i) for i in ids]
  if tokenizer.eos_id in ids:
    ids = ids[: ids.index(tokenizer.eos_id)]
  return tokenizer.decode(ids).removeprefix(template.lead)


def parse_reply(text: str, template: ChatTemplate) -> str:
  """The reply in generated text: all before the first end mark or header of another turn.

  A model that was not trained on the template's EOS writes the next turn itself; this cuts it off.
  """
  marks = [template.end, *template.prefix.values()]
  cut = min((text.find(mark) for mark in marks if mark in text), default=len(text))
  return text[:cut].removeprefix(template.lead)


def truncate(
  conversation: Conversation,
  max_tokens: int,
  template: ChatTemplate,
  tokenizer: Tokenizer,
  *,
  on_too_long: OnTooLong,
) -> Conversation | None:
  """Drops the fewest oldest turns with which the conversation fits into `max_tokens` ids.

  The system message and everything from the last user message on are kept, and what is kept
  starts with a user message. No message is ever cut (InstructGPT and TL;DR cut whole units too).
  A conversation that ends with the user is measured as a prompt, with the assistant's header.

  Returns:
    the conversation, or None where it cannot fit and `on_too_long` is "skip".

  Raises:
    UserError: it cannot fit and `on_too_long` is "error".
  """
  sizes, fixed = _sizes(conversation, template, tokenizer)
  messages = conversation.messages
  first = 1 if messages[0].role == "system" else 0
  starts = [i for i in range(first + 1, len(messages)) if messages[i].role == "user"]
  for start in [first, *starts]:
    length = fixed + sum(sizes[:first]) + sum(sizes[start:])
    if length <= max_tokens:
      return Conversation(messages[:first] + messages[start:])
  if on_too_long == "skip":
    return None
  raise UserError(
    f"a conversation needs {length} tokens from its last user message on, but max_tokens is "
    f"{max_tokens}; raise max_tokens or set on_too_long to 'skip'. "
    f"It starts {messages[first].content[:80]!r}."
  )


def _with_system(conversation: Conversation, template: ChatTemplate) -> Conversation:
  if template.default_system is None or conversation.messages[0].role == "system":
    return conversation
  return Conversation((Message("system", template.default_system), *conversation.messages))


def _bos(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
  if template.end != tokenizer.eos:
    raise UserError(
      f"template {template.name!r} ends a reply with {template.end!r}, which is not the EOS of "
      "this tokenizer; load the tokenizer with eos= that text, or use another template."
    )
  return tokenizer.encode_special(template.bos)


def _message_ids(
  message: Message, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
  """(header, body) ids; the body is the content with its lead and suffix."""
  header = tokenizer.encode_special(template.prefix[message.role])
  content = tokenizer.encode(template.lead + message.content)
  return header, content + tokenizer.encode_special(template.suffix[message.role])


def _sizes(
  conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[list[int], int]:
  """Tokens of each message with its separator, and those that are there in any case."""
  separator = len(tokenizer.encode_special(template.separator))
  sizes = [
    sum(map(len, _message_ids(m, template, tokenizer))) + separator for m in conversation.messages
  ]
  fixed = len(_bos(template, tokenizer)) - separator
  if len(_with_system(conversation, template).messages) > len(conversation.messages):
    default = Message("system", template.default_system)
    fixed += sum(map(len, _message_ids(default, template, tokenizer))) + separator
  if conversation.last.role != "assistant":
    fixed += separator + len(tokenizer.encode_special(template.prefix["assistant"]))
  return sizes, fixed
