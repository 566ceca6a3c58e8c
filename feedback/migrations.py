"""The tables of the feedback store, and the steps that bring an older database up to date.

A step is never changed once released: a new one is added at the end of `STEPS`.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection


class Words(sa.types.TypeDecorator[str]):
    """Text from clients, upstreams and models. PostgreSQL takes no NUL: one would cost all that is written with it."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else value.replace("\0", "\ufffd")


metadata = sa.MetaData()

versions = sa.Table("winnow_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
candidate_sets = sa.Table(
    "candidate_sets",
    metadata,
    sa.Column("completion_id", sa.String(128), primary_key=True),
    sa.Column("created", sa.Double, nullable=False, index=True),
    sa.Column("route", Words, nullable=False),
    sa.Column("endpoint", Words, nullable=False),
    sa.Column("model", Words),
    sa.Column("reward_model", Words),
    sa.Column("strategy", Words, nullable=False),
    sa.Column("prompt", sa.JSON, nullable=False),
    sa.Column("winner", sa.Integer, nullable=False),
    sa.Column("accepted", sa.Boolean, nullable=False),
    sa.Column("policy", sa.JSON, nullable=False),
)
candidates = sa.Table(
    "candidates",
    metadata,
    sa.Column("completion_id", sa.ForeignKey("candidate_sets.completion_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("idx", sa.Integer, primary_key=True),
    sa.Column("message", sa.JSON, nullable=False),
    sa.Column("valid", sa.Boolean, nullable=False),
    sa.Column("failed", sa.Boolean, nullable=False),
    sa.Column("reason", Words),
    sa.Column("reward", sa.Double),
    sa.Column("raw_reward", sa.Double),
    sa.Column("percentile", sa.Double),
    sa.Column("finish_reason", Words),
    sa.Column("usage", sa.JSON(none_as_null=True)),
    sa.Column("std", sa.Double),
    sa.Column("objectives", sa.JSON(none_as_null=True)),
)
feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column(
        "completion_id",
        sa.ForeignKey("candidate_sets.completion_id", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False, unique=True),
    sa.Column("annotator", Words),
    sa.Column("rating", sa.Integer),
    sa.Column("preferred", sa.Integer),
    sa.Column("ranking", sa.JSON(none_as_null=True)),
    sa.Column("correction", Words),
    sa.Column("labels", sa.JSON(none_as_null=True)),
    sa.Column("comment", Words),
)


def _first_tables(connection: Connection) -> None:
    metadata.create_all(connection, tables=[candidate_sets, candidates, feedback])


def _scores_by_heads(connection: Connection) -> None:
    # A database that begins with this winnow has them from the first step, which makes the tables as they are now.
    there = {column["name"] for column in sa.inspect(connection).get_columns(candidates.name)}
    for column in (candidates.c.std, candidates.c.objectives):
        if column.name not in there:
            described = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {candidates.name} ADD COLUMN {described}"))


STEPS = (_first_tables, _scores_by_heads)
"""Step i brings version i to version i + 1."""

_LOCK = 0x77696E6E
"""Any number that no other program locks: processes that start at once must not migrate at once."""


class NewerSchemaError(Exception):
    """The database was written by a newer winnow than this one."""


def migrate(connection: Connection) -> None:
    """Inside the caller's transaction, which must be one that writes. Raises `NewerSchemaError`."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    versions.create(connection, checkfirst=True)
    version = connection.scalar(sa.select(versions.c.version)) or 0
    if version > len(STEPS):
        raise NewerSchemaError(
            f"the feedback database has schema {version}, this winnow knows {len(STEPS)}: use a newer winnow"
        )
    for step in STEPS[version:]:
        step(connection)
    if version < len(STEPS):
        connection.execute(versions.delete())
        connection.execute(versions.insert().values(version=len(STEPS)))
