"""Labelers and researchers: who they are, whether they work here, and how they prove it."""

import hashlib
import secrets

import sqlalchemy as sa

from rlhf_jax.feedback import rows, schema, shapes
from rlhf_jax.feedback.records import Activation, Labeler, PersonRole
from rlhf_jax.feedback.store import Store, insert, require
from rlhf_jax.types import UserError


def add_labeler(store: Store, name: str, role: PersonRole, *, author: str) -> tuple[Labeler, str]:
  """Adds a person; returns them and their token, which cannot be shown again.

  Raises:
    UserError: the name is taken, or there is no such role.
  """
  labeler, token = Labeler(author=author, name=name, role=role), _draw()

  def work(connection: sa.Connection) -> None:
    insert(connection, labeler)
    _insert_token(connection, labeler.id, token)

  store.transact(work)
  return labeler, token


def new_token(store: Store, labeler: str) -> str:
  """A new token for a labeler; the old one is worth nothing from now on."""
  token = _draw()
  with store.writing() as connection:
    require(connection, labeler, Labeler)
    _insert_token(connection, labeler, token)
  return token


def authenticate(store: Store, token: str) -> Labeler | None:
  """The labeler whose newest token this is, if they are active; None for anything else."""
  digest, tokens = _digest(token), schema.tokens.c
  with store.reading() as connection:
    owner = connection.scalar(sa.select(tokens.labeler).where(tokens.sha256 == digest))
    newest = sa.select(tokens.sha256).where(tokens.labeler == owner).order_by(tokens.serial.desc())
    if owner is None or connection.scalar(newest.limit(1)) != digest:
      return None
    return require(connection, owner, Labeler) if is_active(connection, owner) else None


def set_active(store: Store, labeler: str, active: bool, *, author: str, reason: str = "") -> str:
  """Lets a labeler work here, or no longer; what they have said stays."""
  return store.add(Activation(author=author, labeler=labeler, active=active, reason=reason))


def is_active(connection: sa.Connection, labeler: str) -> bool:
  """Whether somebody is a labeler, and their newest activation, if any, says yes."""
  entry = rows.find(connection, labeler)
  if entry is None or entry.kind != "labeler" or entry.withdrawal is not None:
    return False
  head, table = schema.records, schema.activations
  query = (
    sa.select(table.c.active)
    .join(head, head.c.id == table.c.id)
    .where(table.c.labeler == labeler)
    .order_by(head.c.serial.desc())
    .limit(1)
  )
  return connection.scalar(query) is not False


def find(store: Store, name: str) -> Labeler:
  """The labeler with this name or id.

  Raises:
    UserError: there is none; names those that there are.
  """
  labelers = store.records(Labeler)
  for labeler in labelers:
    if name in (labeler.id, labeler.name):
      return labeler
  known = ", ".join(labeler.name for labeler in labelers) or "none"
  raise UserError(f"there is no labeler {name!r}; there are: {known}.")


def _draw() -> str:
  return secrets.token_urlsafe(32)


def _digest(token: str) -> str:
  """256 random bits need no slow hash: nobody can try them out."""
  return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _insert_token(connection: sa.Connection, labeler: str, token: str) -> None:
  row = {"labeler": labeler, "sha256": _digest(token), "created_at": shapes.now()}
  connection.execute(sa.insert(schema.tokens).values(row))
