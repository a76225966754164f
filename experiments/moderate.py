"""Trains a moderator, measures it by cross-validation, and studies what people's reports do.

  python experiments/moderate.py --config=configs/moderation.py --workdir=runs/moderation
  python experiments/moderate.py --config=... --workdir=... --study=reports

The first fits a classifier for each fold and one to all texts, and leaves in workdir
`evaluation.{json,md,png}`: average precision by category with its interval and the prevalence
beside it; and the moderator, for `rlhf_jax.moderation.load`: `moderator/`, `tokenizer/` and
`thresholds.json`. The second leaves `reports.{json,md,png}`: the threshold curve before and after
50 simulated reports of false positives. A killed run goes on where it was.

On two CPU cores the default takes 1.4 minutes and gets a mean AUPRC of 0.36 (from scratch, on a
thousand texts: TF-IDF gets 0.49), configs/moderation.py:smollm2 3.4 minutes and 0.53; the study of
reports 0.7 and 3.5 minutes. docs/moderation.md has the tables.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

import matplotlib

from rlhf_jax.data import moderation as data_lib
from rlhf_jax.evaluation import plots
from rlhf_jax.moderation import bench as bench_lib
from rlhf_jax.moderation import measures, moderator, page, reports
from rlhf_jax.moderation import study as study_lib
from rlhf_jax.parallel import hosts
from rlhf_jax.training import files
from rlhf_jax.types import UserError

OPTIONS = {"study": launch.Option("evaluation", "evaluation, or reports: what reports do")}


def main(config, workdir, study="evaluation"):
  if study not in STUDIES:
    raise UserError(f"argument --study is one of {', '.join(STUDIES)}, not {study!r}.")
  STUDIES[study](bench_lib.start(config, workdir))


def evaluate(bench):
  """Cross-validation, then the moderator."""
  labels, known = data_lib.label_arrays(bench.evaluated)
  logits = study_lib.cross_validate(bench)
  result = study_lib.evaluate(bench, logits)
  curves = {
    name: measures.curve(*measures.known_only(logits[:, c], labels[:, c], known[:, c]))
    for c, name in enumerate(data_lib.CATEGORIES)
  }
  keep(bench, "evaluation", result, page.evaluation_table, page.evaluation_figure, curves)
  chosen = study_lib.choose(bench, logits, labels, known)
  moderator.save(bench.workdir, study_lib.train_moderator(bench, chosen))
  print(f"moderator: {bench.workdir}")


def report(bench):
  """The moderator before and after reports."""
  keep(bench, "reports", reports.study(bench), page.reports_table, page.reports_figure)


def keep(bench, name, result, table, figure, *more):
  """Writes a result as JSON, Markdown and PNG, and shows the table."""
  if hosts.is_first():
    files.write_json_atomic(bench.workdir / f"{name}.json", result)
    files.write_text_atomic(bench.workdir / f"{name}.md", table(result))
    with matplotlib.rc_context(plots.STYLE):
      figure(*more, result).savefig(bench.workdir / f"{name}.png", dpi=150)
  print(table(result))


STUDIES = {"evaluation": evaluate, "reports": report}

if __name__ == "__main__":
  launch.run(main, options=OPTIONS)
