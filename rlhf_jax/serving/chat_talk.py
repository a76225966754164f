"""What happens when a visitor sends a message or asks for another answer."""

import asyncio
import dataclasses
from typing import Any

from fastapi import HTTPException

from rlhf_jax.feedback import conversations
from rlhf_jax.feedback.records import ChatMessage, Verdict
from rlhf_jax.serving import chat_filter, chat_view, filtering
from rlhf_jax.serving.chat_answers import Answers
from rlhf_jax.serving.chat_bodies import MOST, Draw, Sampling, Send
from rlhf_jax.serving.context import Context, Request, check_text
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Talk:
  """Sending and drawing; both return what the page is told."""

  context: Context
  answers: Answers

  async def send(self, body: Send, person: str) -> dict[str, Any]:
    """Judges a message, stores it with the verdict, and begins to answer it.

    The engine is asked before anything is stored: where it has no room, the page keeps what was
    typed. A message that the filter blocks becomes none; only the verdict is stored.

    Raises:
      Overloaded: there is no room.
      UserError: it is too long, or does not go where it is to go.
      HTTPException: 404, the conversation or the message before it is not this person's.
    """
    check_text(body.text, "your message", MOST)
    before, again = await asyncio.to_thread(self._place, body, person)
    if again is not None:
      running = [d for d in self.answers.under_way(id=again.id)]
      return {"messages": [], "answers": [chat_view.of_running(d.id, again) for d in running]}
    messages = _new_messages(body, person)
    verdicts, blocked = await self._judge(messages, person)
    if blocked is not None:
      await asyncio.to_thread(self.context.store.add, blocked)
      return {"blocked": chat_view.of_verdict(blocked)}
    said = Conversation.of(*((m.role, m.content) for m in (*before, *messages)))
    (answer,) = self.answers.submit(person, [_request(said, body.sampling)])
    try:
      new = [*messages, *verdicts.values()]
      await asyncio.to_thread(self.context.store.add_all, new)
    except BaseException:
      answer.cancel()
      raise
    drawing = self.answers.begin(messages[-1], answer, _recorded(body.sampling))
    return {
      "messages": [chat_view.of_message(m, verdicts.get(m.id)) for m in messages],
      "answers": [chat_view.of_running(drawing.id, messages[-1])],
    }

  async def draw(self, id: str, body: Draw, person: str) -> dict[str, Any]:
    """Begins one more answer to a message, or two to compare.

    Raises:
      Overloaded: there is no room for all of them.
      UserError: the message is not the user's own, or two answers would be the same.
      HTTPException: 404, the message is not this person's.
    """
    store = self.context.store
    parent = await asyncio.to_thread(chat_view.own, store, id, ChatMessage, person)
    if parent.role != "user":
      raise UserError("an answer is drawn to a message of yours, this one is not.")
    if body.count == 2 and body.sampling.temperature == 0:
      raise UserError("two answers at temperature 0 are the same; raise it to compare.")
    said = await asyncio.to_thread(conversations.conversation, store, id)
    samplings = [body.sampling, _with_next_seed(body.sampling)][: body.count]
    drawn = self.answers.submit(person, [_request(said, sampling) for sampling in samplings])
    begun = [self.answers.begin(parent, a, _recorded(s)) for a, s in zip(drawn, samplings)]
    return {"answers": [chat_view.of_running(drawing.id, parent) for drawing in begun]}

  def _place(self, body: Send, person: str) -> tuple[list[ChatMessage], ChatMessage | None]:
    """The messages before a new one; and the message itself, where it is there already."""
    store = self.context.store
    chat_view.require_own_conversation(store, body.conversation, person)
    there = store.records(ChatMessage, id=body.id, author=person)
    if there and (there[0].conversation, there[0].content) == (body.conversation, body.text):
      return [], there[0]
    if body.parent is None:
      return [], None
    parent = chat_view.own(store, body.parent, ChatMessage, person)
    if parent.conversation != body.conversation:
      raise HTTPException(404, "the message that this one comes after is not in its conversation.")
    if body.system:
      raise UserError("a system message begins a conversation; this one has begun.")
    return conversations.branch(store, parent.id), None

  async def _judge(
    self, messages: list[ChatMessage], person: str
  ) -> tuple[dict[str, Verdict], Verdict | None]:
    """The verdicts to store by message; and the verdict on a text that is blocked, if one is."""
    moderator = self.context.moderator
    found = {}
    for message in messages:
      verdict = await chat_filter.judge(moderator, message.content, "input")
      if verdict is None:
        continue
      is_blocked = verdict.action == "block"
      about = {"text": message.content} if is_blocked else {"message": message.id}
      record = filtering.record(verdict, "input", person, moderator.name, **about)
      if is_blocked:
        return {}, record
      found[message.id] = record
    return found, None


def _new_messages(body: Send, person: str) -> list[ChatMessage]:
  """The system message, where there is one, and the user's."""
  place = {"author": person, "conversation": body.conversation}
  if not (body.system and body.system.strip()):
    return [ChatMessage(id=body.id, parent=body.parent, role="user", content=body.text, **place)]
  system = ChatMessage(id=f"{body.id}.system", role="system", content=body.system, **place)
  user = ChatMessage(id=body.id, parent=system.id, role="user", content=body.text, **place)
  return [system, user]


def _with_next_seed(sampling: Sampling) -> Sampling:
  """Two answers from one seed would be one answer."""
  seed = sampling.seed
  return sampling.model_copy(update={"seed": None if seed is None else (seed + 1) % 2**63})


def _request(conversation: Conversation, sampling: Sampling) -> Request:
  return Request(conversation, **sampling.model_dump())


def _recorded(sampling: Sampling) -> dict[str, Any]:
  """What a message says of its sampling; the seed has a field of its own."""
  return sampling.model_dump(exclude={"seed"})
