"""Writes docs/conformance.md: each line of the checklist, and the tests whose markers claim it.

  python tests/conformance.py docs/conformance.md

Part A is what the papers and their released code do, part B is what went wrong in other RLHF code.
A test claims lines with `@pytest.mark.conformance("A16", "B8")`; the markers are read from the
source, so the table does not depend on what is installed.
"""

import ast
import pathlib
import sys

TESTS = pathlib.Path(__file__).parent

CLAIMS = {
  "Data and SFT": {
    "A1": "the ranked turn is written by the model and drawn uniformly; its context is the prefix",
    "A2": "every instruction record becomes a valid dialogue and comes back from it",
    "A3": "no loss on user, system and header tokens; loss on assistant tokens and their EOS",
    "A4": "padding contributes exactly zero loss",
    "A5": "pad and EOS differ; every finished example ends in an EOS that carries loss",
    "A6": "accumulated loss equals the full batch: sum over tokens / total tokens",
    "A7": "over-long prompts lose whole turns, never half of one",
    "A8": "the prompt has no trailing space; the completion owns its leading one",
    "A9": "the SFT checkpoint can be chosen by reward-model score as well as by loss",
  },
  "Reward model": {
    "A10": "K = 4 equals the hand value with 1 / C(K, 2); K = 2 equals the pairwise loss",
    "A11": "a prompt with nine answers weighs the same as one with four",
    "A12": "all pairs of a prompt are in one step, for which each answer is read once",
    "A13": "ties make no pair",
    "A14": "head weights start with std 1 / sqrt(D + 1), bias 0",
    "A15": "the score is read at the last real token, not in the last column",
    "A16": "appended padding leaves the score unchanged",
    "A17": "left padding does not move the place where the score is read",
    "A18": "left- and right-padded scores agree",
    "A19": "a constant reward model scores accuracy 0, not 1 (strict comparison)",
    "A20": "with the bias set, demonstrations score 0 on average; accuracy is unchanged",
    "A21": "one epoch with a decaying rate; the loss of a second epoch shows overfitting",
    "A22": "training and held-out sets are split by prompt, not by pair",
    "A23": "the longer-answer baseline stands beside the accuracy",
    "A24": "calibration: accuracy against score gap, beside the sigmoid",
  },
  "Rollouts": {
    "A25": "policy, reference, critic and reward model have no dropout",
    "A26": "log-probabilities are at the sampling temperature: old, new and reference",
    "A27": "log-probabilities are those of the distribution sampled from, top-k and top-p included",
    "A28": "before any update KL is 0 and the ratio is 1",
    "A29": "log-probabilities from generation equal those of a fresh forward pass",
    "A30": "left padding leaves the logits unchanged",
    "A31": "logits at t - 1 score the token at t",
    "A32": "tokens after the first stop token are padding before scoring",
    "A33": "a response without a stop token is handled by a stated rule",
    "A34": 'truncation honours "at or after position k"',
    "A35": "fixed-length sampling is masked as variable length would be",
    "A36": "each row of a batch samples with randomness of its own",
    "A37": "prompts repeat in another order when they are used up",
  },
  "Rewards, advantages, PPO": {
    "A38": "per-token rewards sum to score - kl_coef * sum of k1",
    "A39": "the score lands once, on the last token",
    "A40": "KL is zero on padding",
    "A41": "the reference gets no gradient and never changes",
    "A42": "samples of higher reward gain probability; with the sign flipped they lose it",
    "A43": "GAE equals a double loop; nothing is bootstrapped after the end",
    "A44": "returns use advantages before whitening",
    "A45": "whitening uses valid tokens only: masked mean 0, variance 1",
    "A46": "whitening has biased variance and 1e-8 inside the root",
    "A47": "reward whitening keeps the mean, and is a choice",
    "A48": "policy and value masks leave out what follows the stop token",
    "A49": "values are clipped around those of the rollout",
    "A50": "the clip lets gradient through on its open side only",
    "A51": "every inner epoch is shuffled; eight minibatches in one epoch is a configuration",
    "A52": "the rate falls to 0 linearly, or warms up for ten steps and stays; never a mixture",
    "A53": "Adam's eps is where PyTorch puts it, which differs from TensorFlow in early steps",
    "A54": "the critic starts as a copy of the reward model and shares nothing with the policy",
    "A55": "the adaptive coefficient rises above the target, by at most 20% n / horizon a step",
    "A56": "a fixed coefficient stays fixed",
    "A57": "with ptx the gradient is PPO's + ptx_coef times the language model's, in one step",
    "A58": "the averaged weights are saved and evaluated on their own",
    "A59": "k1 as a loss has mean gradient 0",
  },
  "Evaluation": {
    "A60": "best-of-n weights sum to 1; n = 1 is the mean, n = N the maximum",
    "A61": "the KL of best-of-n is exact under ties, the formula otherwise",
    "A62": "KL is in nats, from tokens sampled at the temperature, with its standard error",
    "A63": "gold and proxy are both centred on the initial policy",
    "A64": "reward, KL, length, EOS rate, entropy, clip fraction, ratio, explained variance",
    "A65": "moderation AUPRC leaves out missing labels",
    "A66": "a pairwise judge sees both orders; a length-controlled figure stands beside",
    "A67": "filter feedback holds verdict, category, score and threshold",
  },
  "Published bugs": {
    "B1": "rewards cast to integers",
    "B2": "KL not 0 at step 0, or temperatures that do not match",
    "B3": "a ratio other than 1 at rate 0 when rollout and training batches differ",
    "B4": "padding that changes logits",
    "B5": "missing positions under left padding",
    "B6": "the score placed on the first padding token",
    "B7": "pad = EOS hides the real EOS",
    "B8": "the reward model reads the wrong last token",
    "B9": "entropy and KL statistics that include padding",
    "B10": "masked values that bootstrap GAE",
    "B11": "NaN * 0 through a mask",
    "B12": "value and action off by one",
    "B13": "k1 in the loss without gradient, k3 in the loss biased",
    "B14": "a clamp on KL that kills its gradient",
    "B15": "truncated log-probabilities against the full softmax",
    "B16": "the mean of micro-batch means",
    "B17": "the SFT mask off by one",
    "B18": "packing that leaks across documents",
    "B19": "two BOS, or an extra EOS",
    "B20": "a custom stop token that the missing-EOS penalty does not know",
    "B21": "score 0.0 taken for missing",
    "B22": "a reward head of another width; a seed that does not reproduce",
    "B23": "log(1 + exp(x)) that overflows",
    "B24": "optimiser, KL controller, randomness, data position or critic lost on resume",
    "B25": "critic and policy saved at different steps",
    "B26": "an adaptive coefficient fed the wrong KL",
    "B27": "PPO epochs that miss or repeat a sample",
    "B28": "metric steps and optimiser steps that diverge under accumulation",
    "B29": "a NaN reward that silently becomes 0",
    "B30": "an empty completion",
    "B31": "eval or pickle on text of a file, a model or a person",
    "B32": "a negative mean KL that nobody is told of",
  },
}


def table(tests: pathlib.Path = TESTS) -> str:
  """The page as text."""
  proofs = {line: [] for claims in CLAIMS.values() for line in claims}
  for path in sorted(tests.rglob("test_*.py")):
    for name, line in marked(ast.parse(path.read_text(encoding="utf-8"))):
      if line not in proofs:
        raise SystemExit(f"{path}, {name}: there is no line {line!r} of the checklist.")
      proofs[line].append(f"`{path.relative_to(tests).with_suffix('')}::{name}`")
  shown = sum(bool(names) for names in proofs.values())
  page = [
    "# Conformance",
    "",
    "What the papers and their released code do (A), and published bugs of other RLHF code that",
    "are not here (B), each with the tests that prove it. `make conformance` writes this page from",
    f"the tests' markers, and a test holds it so. {shown} of {len(proofs)} lines have a test.",
  ]
  for section, claims in CLAIMS.items():
    page += ["", f"## {section}", "", "| | claim | tests |", "|---|---|---|"]
    for line, claim in claims.items():
      page.append(f"| {line} | {claim} | {'<br>'.join(dict.fromkeys(proofs[line]))} |")
  return "\n".join(page) + "\n"


def marked(module: ast.Module) -> list[tuple[str, str]]:
  """(test, line) of every conformance marker: on a test, on a parameter of it, or on the module."""
  everywhere = [
    line
    for node in module.body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "pytestmark"
    for line in _lines(node.value)
  ]
  found = []
  for node in ast.walk(module):
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
      own = [line for decorator in node.decorator_list for line in _lines(decorator)]
      found += [(node.name, line) for line in everywhere + own]
  return found


def _lines(expression: ast.expr) -> list[str]:
  """The arguments of all `pytest.mark.conformance(...)` inside an expression."""
  return [
    argument.value
    for call in ast.walk(expression)
    if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "conformance"
    for argument in call.args
  ]


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  pathlib.Path(sys.argv[1]).write_text(table(), encoding="utf-8")
