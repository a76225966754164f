"""Alembic runs this for each command; the connection comes from `database.migrate`.

A new migration, after a change of `schema.py`, from a database that stands at the last one:

  database.new_revision(database.engine_for("old.db"), "what changed")

Read and mend what it wrote; tests/test_feedback_schema.py compares it with `schema.py`.
"""

from alembic import context

from rlhf_jax.feedback import schema

connection = context.config.attributes["connection"]
context.configure(
  connection=connection,
  target_metadata=schema.metadata,
  render_as_batch=connection.dialect.name == "sqlite",  # which alters tables by copying them
)
with context.begin_transaction():
  context.run_migrations()
