"""rlhf_jax: the recipe that made ChatGPT, in JAX: SFT, comparisons, reward model, PPO, rounds."""

__version__ = "0.1.0"
