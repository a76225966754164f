"""The tables as they were first."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
  _records()
  _activations()
  _comparisons()
  _demonstrations()
  _feedback()
  _harm_reports()
  _labelers()
  _messages()
  _people()
  _policies()
  _skips()
  _tasks()
  _tokens()
  _uses()
  _verdict_reports()
  _verdicts()
  _withdrawals()
  _answers()
  _candidates()
  _category_scores()
  _drafts()
  _slots()
  _tombstones()
  _turns()
  _used_records()


def _records():
  op.create_table(
    "records",
    sa.Column(
      "serial",
      sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
      autoincrement=True,
      nullable=False,
    ),
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("kind", sa.String(length=32), nullable=False),
    sa.Column("created_at", sa.String(length=27), nullable=False),
    sa.Column("author", sa.String(length=64), nullable=True),
    sa.Column("supersedes", sa.String(length=64), nullable=True),
    sa.Column("withdrawal", sa.String(length=64), nullable=True),
    sa.ForeignKeyConstraint(["supersedes"], ["records.id"], name=op.f("fk_records_supersedes")),
    sa.ForeignKeyConstraint(["withdrawal"], ["records.id"], name=op.f("fk_records_withdrawal")),
    sa.PrimaryKeyConstraint("serial", name=op.f("pk_records")),
    sa.UniqueConstraint("id", name=op.f("uq_records_id")),
    sa.UniqueConstraint("supersedes", name=op.f("uq_records_supersedes")),
  )
  op.create_index(op.f("ix_records_author"), "records", ["author"], unique=False)
  op.create_index(op.f("ix_records_kind"), "records", ["kind"], unique=False)
  op.create_index(op.f("ix_records_withdrawal"), "records", ["withdrawal"], unique=False)


def _activations():
  op.create_table(
    "activations",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("labeler", sa.String(length=64), nullable=False),
    sa.Column("active", sa.Boolean(), nullable=False),
    sa.Column("reason", sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_activations_id")),
    sa.ForeignKeyConstraint(["labeler"], ["records.id"], name=op.f("fk_activations_labeler")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_activations")),
  )
  op.create_index(op.f("ix_activations_labeler"), "activations", ["labeler"], unique=False)


def _comparisons():
  op.create_table(
    "comparisons",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("conversation", sa.JSON(), nullable=False),
    sa.Column("presented", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("seconds", sa.Float(precision=53), nullable=True),
    sa.Column("source", sa.String(length=400), nullable=False),
    sa.Column("note", sa.Text(), nullable=False),
    sa.Column("task", sa.String(length=64), nullable=True),
    sa.Column("message", sa.String(length=64), nullable=True),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_comparisons_id")),
    sa.ForeignKeyConstraint(["message"], ["records.id"], name=op.f("fk_comparisons_message")),
    sa.ForeignKeyConstraint(["task"], ["records.id"], name=op.f("fk_comparisons_task")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_comparisons")),
  )
  op.create_index(op.f("ix_comparisons_message"), "comparisons", ["message"], unique=False)
  op.create_index(op.f("ix_comparisons_task"), "comparisons", ["task"], unique=False)


def _demonstrations():
  op.create_table(
    "demonstrations",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("task", sa.String(length=64), nullable=True),
    sa.Column("seconds", sa.Float(precision=53), nullable=True),
    sa.Column("source", sa.String(length=400), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_demonstrations_id")),
    sa.ForeignKeyConstraint(["task"], ["records.id"], name=op.f("fk_demonstrations_task")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_demonstrations")),
  )
  op.create_index(op.f("ix_demonstrations_task"), "demonstrations", ["task"], unique=False)


def _feedback():
  op.create_table(
    "feedback",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("message", sa.String(length=64), nullable=False),
    sa.Column("thumb", sa.String(length=32), nullable=False),
    sa.Column("tags", sa.JSON(), nullable=False),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("ideal", sa.Text(), nullable=True),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_feedback_id")),
    sa.ForeignKeyConstraint(["message"], ["records.id"], name=op.f("fk_feedback_message")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_feedback")),
  )
  op.create_index(op.f("ix_feedback_message"), "feedback", ["message"], unique=False)


def _harm_reports():
  op.create_table(
    "harm_reports",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("message", sa.String(length=64), nullable=False),
    sa.Column("category", sa.String(length=400), nullable=True),
    sa.Column("text", sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_harm_reports_id")),
    sa.ForeignKeyConstraint(["message"], ["records.id"], name=op.f("fk_harm_reports_message")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_harm_reports")),
  )
  op.create_index(op.f("ix_harm_reports_message"), "harm_reports", ["message"], unique=False)


def _labelers():
  op.create_table(
    "labelers",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("name", sa.String(length=400), nullable=False),
    sa.Column("role", sa.String(length=32), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_labelers_id")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_labelers")),
    sa.UniqueConstraint("name", name=op.f("uq_labelers_name")),
  )


def _messages():
  op.create_table(
    "messages",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("conversation", sa.String(length=64), nullable=False),
    sa.Column("parent", sa.String(length=64), nullable=True),
    sa.Column("role", sa.String(length=32), nullable=False),
    sa.Column("content", sa.Text(), nullable=False),
    sa.Column("policy", sa.String(length=64), nullable=True),
    sa.Column("sampling", sa.JSON(), nullable=False),
    sa.Column("seed", sa.BigInteger(), nullable=True),
    sa.Column("stopped", sa.Boolean(), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_messages_id")),
    sa.ForeignKeyConstraint(["parent"], ["records.id"], name=op.f("fk_messages_parent")),
    sa.ForeignKeyConstraint(["policy"], ["records.id"], name=op.f("fk_messages_policy")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
  )
  op.create_index(op.f("ix_messages_conversation"), "messages", ["conversation"], unique=False)
  op.create_index(op.f("ix_messages_parent"), "messages", ["parent"], unique=False)
  op.create_index(op.f("ix_messages_policy"), "messages", ["policy"], unique=False)


def _people():
  op.create_table(
    "people",
    sa.Column("record", sa.String(length=64), nullable=False),
    sa.Column("person", sa.String(length=400), nullable=False),
    sa.ForeignKeyConstraint(["record"], ["records.id"], name=op.f("fk_people_record")),
    sa.PrimaryKeyConstraint("record", "person", name=op.f("pk_people")),
  )
  op.create_index(op.f("ix_people_person"), "people", ["person"], unique=False)


def _policies():
  op.create_table(
    "policies",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("name", sa.String(length=400), nullable=False),
    sa.Column("checkpoint", sa.Text(), nullable=False),
    sa.Column("lineage", sa.JSON(), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_policies_id")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_policies")),
  )


def _skips():
  op.create_table(
    "skips",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("task", sa.String(length=64), nullable=False),
    sa.Column("reason", sa.String(length=400), nullable=False),
    sa.Column("seconds", sa.Float(precision=53), nullable=True),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_skips_id")),
    sa.ForeignKeyConstraint(["task"], ["records.id"], name=op.f("fk_skips_task")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_skips")),
  )
  op.create_index(op.f("ix_skips_task"), "skips", ["task"], unique=False)


def _tasks():
  op.create_table(
    "tasks",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("work", sa.String(length=32), nullable=False),
    sa.Column("conversation", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("instructions", sa.Text(), nullable=False),
    sa.Column("overlap", sa.Integer(), nullable=False),
    sa.Column("gold", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("priority", sa.Integer(), nullable=False),
    sa.Column("message", sa.String(length=64), nullable=True),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_tasks_id")),
    sa.ForeignKeyConstraint(["message"], ["records.id"], name=op.f("fk_tasks_message")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
  )
  op.create_index(op.f("ix_tasks_message"), "tasks", ["message"], unique=False)


def _tokens():
  op.create_table(
    "tokens",
    sa.Column(
      "serial",
      sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
      autoincrement=True,
      nullable=False,
    ),
    sa.Column("labeler", sa.String(length=64), nullable=False),
    sa.Column("sha256", sa.String(length=64), nullable=False),
    sa.Column("created_at", sa.String(length=27), nullable=False),
    sa.ForeignKeyConstraint(["labeler"], ["records.id"], name=op.f("fk_tokens_labeler")),
    sa.PrimaryKeyConstraint("serial", name=op.f("pk_tokens")),
    sa.UniqueConstraint("sha256", name=op.f("uq_tokens_sha256")),
  )
  op.create_index(op.f("ix_tokens_labeler"), "tokens", ["labeler"], unique=False)


def _uses():
  op.create_table(
    "uses",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("policy", sa.String(length=64), nullable=False),
    sa.Column("stage", sa.String(length=32), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_uses_id")),
    sa.ForeignKeyConstraint(["policy"], ["records.id"], name=op.f("fk_uses_policy")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_uses")),
  )
  op.create_index(op.f("ix_uses_policy"), "uses", ["policy"], unique=False)


def _verdict_reports():
  op.create_table(
    "verdict_reports",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("verdict", sa.String(length=64), nullable=False),
    sa.Column("mistake", sa.String(length=32), nullable=False),
    sa.Column("category", sa.String(length=400), nullable=False),
    sa.Column("score", sa.Float(precision=53), nullable=True),
    sa.Column("threshold", sa.Float(precision=53), nullable=True),
    sa.Column("text", sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_verdict_reports_id")),
    sa.ForeignKeyConstraint(["verdict"], ["records.id"], name=op.f("fk_verdict_reports_verdict")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_verdict_reports")),
  )
  op.create_index(op.f("ix_verdict_reports_verdict"), "verdict_reports", ["verdict"], unique=False)


def _verdicts():
  op.create_table(
    "verdicts",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.Column("message", sa.String(length=64), nullable=True),
    sa.Column("text", sa.Text(), nullable=True),
    sa.Column("direction", sa.String(length=32), nullable=False),
    sa.Column("flagged", sa.Boolean(), nullable=False),
    sa.Column("action", sa.String(length=32), nullable=False),
    sa.Column("model", sa.String(length=400), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_verdicts_id")),
    sa.ForeignKeyConstraint(["message"], ["records.id"], name=op.f("fk_verdicts_message")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_verdicts")),
  )
  op.create_index(op.f("ix_verdicts_message"), "verdicts", ["message"], unique=False)


def _withdrawals():
  op.create_table(
    "withdrawals",
    sa.Column("id", sa.String(length=64), nullable=False),
    sa.ForeignKeyConstraint(["id"], ["records.id"], name=op.f("fk_withdrawals_id")),
    sa.PrimaryKeyConstraint("id", name=op.f("pk_withdrawals")),
  )


def _answers():
  op.create_table(
    "answers",
    sa.Column("owner", sa.String(length=64), nullable=False),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("writer", sa.String(length=400), nullable=False),
    sa.Column("rank", sa.Integer(), nullable=False),
    sa.Column("quality", sa.Integer(), nullable=True),
    sa.Column("flags", sa.JSON(), nullable=False),
    sa.Column("policy", sa.String(length=64), nullable=True),
    sa.Column("sampling", sa.JSON(), nullable=False),
    sa.Column("seed", sa.BigInteger(), nullable=True),
    sa.ForeignKeyConstraint(["owner"], ["comparisons.id"], name=op.f("fk_answers_owner")),
    sa.ForeignKeyConstraint(["policy"], ["records.id"], name=op.f("fk_answers_policy")),
    sa.PrimaryKeyConstraint("owner", "position", name=op.f("pk_answers")),
  )
  op.create_index(op.f("ix_answers_policy"), "answers", ["policy"], unique=False)


def _candidates():
  op.create_table(
    "candidates",
    sa.Column("owner", sa.String(length=64), nullable=False),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("writer", sa.String(length=400), nullable=False),
    sa.Column("policy", sa.String(length=64), nullable=True),
    sa.Column("sampling", sa.JSON(), nullable=False),
    sa.Column("seed", sa.BigInteger(), nullable=True),
    sa.ForeignKeyConstraint(["owner"], ["tasks.id"], name=op.f("fk_candidates_owner")),
    sa.ForeignKeyConstraint(["policy"], ["records.id"], name=op.f("fk_candidates_policy")),
    sa.PrimaryKeyConstraint("owner", "position", name=op.f("pk_candidates")),
  )
  op.create_index(op.f("ix_candidates_policy"), "candidates", ["policy"], unique=False)


def _category_scores():
  op.create_table(
    "category_scores",
    sa.Column("owner", sa.String(length=64), nullable=False),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("category", sa.String(length=400), nullable=False),
    sa.Column("score", sa.Float(precision=53), nullable=False),
    sa.Column("threshold", sa.Float(precision=53), nullable=False),
    sa.ForeignKeyConstraint(["owner"], ["verdicts.id"], name=op.f("fk_category_scores_owner")),
    sa.PrimaryKeyConstraint("owner", "position", name=op.f("pk_category_scores")),
  )


def _drafts():
  op.create_table(
    "drafts",
    sa.Column("task", sa.String(length=64), nullable=False),
    sa.Column("labeler", sa.String(length=64), nullable=False),
    sa.Column("content", sa.JSON(), nullable=False),
    sa.Column("saved_at", sa.String(length=27), nullable=False),
    sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_drafts_task")),
    sa.PrimaryKeyConstraint("task", "labeler", name=op.f("pk_drafts")),
  )


def _slots():
  op.create_table(
    "slots",
    sa.Column("task", sa.String(length=64), nullable=False),
    sa.Column("number", sa.Integer(), nullable=False),
    sa.Column("work", sa.String(length=32), nullable=False),
    sa.Column("labeler", sa.String(length=64), nullable=True),
    sa.Column("lease_until", sa.String(length=27), nullable=True),
    sa.Column("record", sa.String(length=64), nullable=True),
    sa.ForeignKeyConstraint(["record"], ["records.id"], name=op.f("fk_slots_record")),
    sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_slots_task")),
    sa.PrimaryKeyConstraint("task", "number", name=op.f("pk_slots")),
    sa.UniqueConstraint("task", "labeler", name=op.f("uq_slots_task_labeler")),
  )
  op.create_index(op.f("ix_slots_record"), "slots", ["record"], unique=False)
  op.create_index(
    "ix_slots_unfinished",
    "slots",
    ["work", "task"],
    unique=False,
    sqlite_where=sa.text("record IS NULL"),
    postgresql_where=sa.text("record IS NULL"),
  )
  op.create_index(
    "uq_slots_open",
    "slots",
    ["labeler", "work"],
    unique=True,
    sqlite_where=sa.text("record IS NULL"),
    postgresql_where=sa.text("record IS NULL"),
  )


def _tombstones():
  op.create_table(
    "tombstones",
    sa.Column("owner", sa.String(length=64), nullable=False),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("record", sa.String(length=64), nullable=False),
    sa.Column("of", sa.String(length=32), nullable=False),
    sa.Column("was_created_at", sa.String(length=27), nullable=False),
    sa.ForeignKeyConstraint(["owner"], ["withdrawals.id"], name=op.f("fk_tombstones_owner")),
    sa.ForeignKeyConstraint(["record"], ["records.id"], name=op.f("fk_tombstones_record")),
    sa.PrimaryKeyConstraint("owner", "position", name=op.f("pk_tombstones")),
  )
  op.create_index(op.f("ix_tombstones_record"), "tombstones", ["record"], unique=False)


def _turns():
  op.create_table(
    "turns",
    sa.Column("owner", sa.String(length=64), nullable=False),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("role", sa.String(length=32), nullable=False),
    sa.Column("content", sa.Text(), nullable=False),
    sa.Column("suggestion", sa.Text(), nullable=True),
    sa.Column("suggested_by", sa.String(length=64), nullable=True),
    sa.Column("edit_distance", sa.Integer(), nullable=True),
    sa.Column("edit_fraction", sa.Float(precision=53), nullable=True),
    sa.ForeignKeyConstraint(["owner"], ["demonstrations.id"], name=op.f("fk_turns_owner")),
    sa.ForeignKeyConstraint(["suggested_by"], ["records.id"], name=op.f("fk_turns_suggested_by")),
    sa.PrimaryKeyConstraint("owner", "position", name=op.f("pk_turns")),
  )
  op.create_index(op.f("ix_turns_suggested_by"), "turns", ["suggested_by"], unique=False)


def _used_records():
  op.create_table(
    "used_records",
    sa.Column("owner", sa.String(length=64), nullable=False),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("record", sa.String(length=64), nullable=False),
    sa.ForeignKeyConstraint(["owner"], ["uses.id"], name=op.f("fk_used_records_owner")),
    sa.ForeignKeyConstraint(["record"], ["records.id"], name=op.f("fk_used_records_record")),
    sa.PrimaryKeyConstraint("owner", "position", name=op.f("pk_used_records")),
  )
  op.create_index(op.f("ix_used_records_record"), "used_records", ["record"], unique=False)
