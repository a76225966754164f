"""Moderation: which of eight kinds of undesired content a text holds (Markov et al. 2022).

moderator = moderation.load("runs/moderation")
(verdict,) = moderator(["some text"], side="input")
verdict.action, moderation.openai_format([verdict], id="modr-1", model="rlhf_jax")
"""

from rlhf_jax.moderation.moderator import Moderator, load
from rlhf_jax.moderation.verdicts import Verdict, openai_format

__all__ = ["Moderator", "Verdict", "load", "openai_format"]
