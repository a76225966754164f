"""Slots know their place in the queue, so that the next one is found by an index."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

UNFINISHED = sa.text("record IS NULL")
PLACES = """
  UPDATE slots SET
    behind = (SELECT -tasks.priority FROM tasks WHERE tasks.id = slots.task),
    serial = (SELECT records.serial FROM records WHERE records.id = slots.task)
"""


def upgrade():
  op.drop_index("ix_slots_unfinished", "slots")
  op.add_column("slots", sa.Column("behind", sa.Integer(), nullable=True))
  op.add_column("slots", sa.Column("serial", sa.BigInteger(), nullable=True))
  op.execute(PLACES)
  with op.batch_alter_table("slots") as slots:
    slots.alter_column("behind", existing_type=sa.Integer(), nullable=False)
    slots.alter_column("serial", existing_type=sa.BigInteger(), nullable=False)
  op.create_index(
    "ix_slots_queue",
    "slots",
    ["work", "behind", "serial", "number"],
    unique=False,
    sqlite_where=UNFINISHED,
    postgresql_where=UNFINISHED,
  )
