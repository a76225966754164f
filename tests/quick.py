"""How programs are compiled in tests: quickly, as most run for a moment only.

The same operations in less than half of the time of the four files that this was measured on; what
differs is how good the machine code of their loops is. JAX_DISABLE_MOST_OPTIMIZATIONS=false
compiles as users have it, and `make reference` does so, where numbers meet those of other software.
"""

ASKED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# With optimisations off, XLA's older emitters of fusions compile a third faster than its new ones.
FLAG = "--xla_cpu_use_fusion_emitters=false"


def settings(environ: dict[str, str]) -> dict[str, str]:
  """The environment variables to set, before jax is imported."""
  asked = environ.get(ASKED, "true")
  flags = environ.get("XLA_FLAGS", "")
  if asked == "true" and FLAG not in flags:
    flags = f"{flags} {FLAG}".strip()
  return {ASKED: asked, "XLA_FLAGS": flags}
