"""How programs are compiled in tests: quickly, as most run for a moment only.

Less than half of the suite's time, and the same operations: what differs is how well the machine
code of their loops is. JAX_DISABLE_MOST_OPTIMIZATIONS=false compiles as users have it, and
`make reference` does so, where numbers meet those of other software.
"""

ASKED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# XLA's older emitters build fusions in a third of the time of those it has by default.
FLAG = "--xla_cpu_use_fusion_emitters=false"


def settings(environ: dict[str, str]) -> dict[str, str]:
  """The environment variables to set, before jax is imported."""
  asked = environ.get(ASKED, "true")
  flags = environ.get("XLA_FLAGS", "")
  if asked == "true" and FLAG not in flags:
    flags = f"{flags} {FLAG}".strip()
  return {ASKED: asked, "XLA_FLAGS": flags}
