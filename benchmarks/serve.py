"""Serving: many streaming clients at once against the same requests one at a time.

  python benchmarks/serve.py --model=tiny [--clients=200] [--slots=100] [--columns=8]
    [--prompt=64] [--response=64]

Every client is a connection to a server on loopback and reads its stream to the end. One at a time
is on a server of one slot, the fastest for that. The two take turns, as a machine that others share
is not always equally fast, and must give the same answers. Weights are random, and an answer ends
early where the EOS is drawn. Seconds are those that clients see: HTTP, JSON and the text of the
tokens included. "ratio" is that of the rates of a turn; "ratio_there" is to what the server of many
slots gives when it is asked one request at a time, as one answer leaves most of its work unused.
Needs the extra `test` (`make .venv/test`).
"""

import common

if __name__ == "__main__":
  common.prepare()

import asyncio
import concurrent.futures
import contextlib
import json
import multiprocessing
import pathlib
import ssl
import sys
import tempfile
import threading
import time

import httpx
import numpy as np
import tokenizers
import uvicorn

from rlhf_jax.feedback.store import Store
from rlhf_jax.serving import engine as engine_lib
from rlhf_jax.serving.app import Settings, create_app
from rlhf_jax.serving.context import Context
from rlhf_jax.serving.load import Loaded
from rlhf_jax.serving.server import SWITCH_SECONDS
from rlhf_jax.text import dialogue
from rlhf_jax.text.tokenizer import Tokenizer

SOME = 20  # requests, asked one at a time of a server of many slots


def main():
  given = common.arguments(
    __doc__,
    clients=(200, "requests, all sent at once"),
    slots=(100, "answers under way at once"),
    columns=(8, "tokens that one call draws for every slot"),
    prompt=(64, "tokens of a prompt"),
    response=(64, "tokens of an answer at most"),
  )
  networks = common.networks_of(given)
  vocabulary = networks.policy.config.vocab_size
  loaded = Loaded(
    "bench",
    pathlib.Path("bench"),
    networks.policy,
    networks.policy_params,
    words(vocabulary),
    dialogue.VILLAGE,
  )
  draw = np.random.default_rng(0)
  bodies = [
    {
      "model": "bench",
      "prompt": draw.integers(common.FIRST_ID, vocabulary, given.prompt).tolist(),
      "max_tokens": given.response,
      "seed": seed,
      "stream": True,
      "stream_options": {"include_usage": True},
    }
    for seed in range(given.clients)
  ]
  room = lambda slots: engine_lib.Room(
    slots, given.clients, given.columns, given.prompt, given.response
  )
  found = measure(loaded, room(given.slots), room(1), bodies, given.repeats)
  for name in ("at_once", "alone"):
    for row in found[name]:
      sys.stderr.write(f"{name}: {json.dumps(row)}\n")
  kind = {"kind": "serve", "peer": "rlhf_jax", "model": given.model, "dtype": given.dtype}
  sizes = {name: getattr(given, name) for name in ("clients", "slots", "columns")}
  common.report(given.out, kind | sizes | found)


def words(count: int) -> Tokenizer:
  """A vocabulary of so many words, two of them special."""
  names = ["<pad>", "<end>", "<unk>", *(f"w{i}" for i in range(common.FIRST_ID, count))]
  model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>")
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  special = [tokenizers.AddedToken(name, special=True) for name in names[:3]]
  backend.add_special_tokens(special)
  return Tokenizer(backend, eos="<end>", pad="<pad>", bos=None)


def measure(loaded: Loaded, many, single, bodies: list[dict], repeats: int) -> dict:
  """All requests at once, then one after the other on a server of one slot; `repeats` times."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
    answers = lambda *args, **how: clients.submit(answered, *args, **how).result()
    return _measure(answers, loaded, many, single, bodies, repeats)


def answered(url: str, bodies: list[dict], together: bool) -> tuple[dict, list[str]]:
  """`ask`, to its end; clients have a process of their own, as they have in life."""
  return asyncio.run(ask(url, bodies, together))


def _measure(answers, loaded, many, single, bodies, repeats):
  runs, texts, same = {}, {}, []
  with serving(loaded, many) as url, serving(loaded, single) as single_url:
    for where in (url, single_url):
      answers(where, bodies[:2], together=True)  # connections, imports
    for _ in range(repeats):
      for name, where, together in (("at_once", url, True), ("alone", single_url, False)):
        common.wait_for_quiet()
        found, texts[name] = answers(where, bodies, together=together)
        runs.setdefault(name, []).append(found)
      same.append(np.mean(np.array(texts["at_once"]) == np.array(texts["alone"])))
    alone_there, _ = answers(url, bodies[:SOME], together=False)
  rates = {name: [row["rate"] for row in rows] for name, rows in runs.items()}
  return {
    "unit": "tokens/s",
    "rate": common.spread(rates["at_once"]),
    "alone_rate": common.spread(rates["alone"]),
    "ratio": common.spread([rate / alone for rate, alone in zip(rates["at_once"], rates["alone"])]),
    "ratio_there": common.spread([rate / alone_there["rate"] for rate in rates["at_once"]]),
    "same_answers": float(min(same)),
    "alone_there": alone_there,
    **runs,
  }


async def ask(url: str, bodies: list[dict], together: bool) -> tuple[dict, list[str]]:
  """Seconds and texts of all requests: at once from as many clients, or in turn from one."""
  encryption = ssl.create_default_context()  # which loopback does not need, and clients insist on
  async with contextlib.AsyncExitStack() as opened:
    # A client's pool of connections costs the square of their number, so each has one.
    clients = [
      await opened.enter_async_context(httpx.AsyncClient(timeout=600.0, verify=encryption))
      for _ in (bodies if together else bodies[:1])
    ]
    began = time.perf_counter()
    if together:
      done = await asyncio.gather(*(one(*asked, url) for asked in zip(clients, bodies)))
    else:
      done = [await one(clients[0], body, url) for body in bodies]
    seconds = time.perf_counter() - began
  tokens = sum(item["tokens"] for item in done)
  return {
    "seconds": seconds,
    "tokens": tokens,
    "rate": tokens / seconds,
    "first_token": percentiles([item["first"] for item in done]),
    "total": percentiles([item["total"] for item in done]),
  }, [item["text"] for item in done]


async def one(client: httpx.AsyncClient, body: dict, url: str) -> dict:
  """A stream from the request to its last event."""
  began, first, text = time.perf_counter(), None, ""
  async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
    assert answer.status_code == 200, await answer.aread()
    async for line in answer.aiter_lines():
      if not line.startswith("data: {"):
        continue
      event = json.loads(line.removeprefix("data: "))
      if event["choices"]:
        first = first or time.perf_counter() - began
        text += event["choices"][0]["text"]
      else:
        tokens = event["usage"]["completion_tokens"]
  return {"first": first, "total": time.perf_counter() - began, "text": text, "tokens": tokens}


def percentiles(seconds: list[float]) -> dict[str, float]:
  """What half, 95 and 99 of a hundred clients did not have to wait longer than."""
  return {f"p{q}": float(np.percentile(seconds, q)) for q in (50, 95, 99)}


@contextlib.contextmanager
def serving(loaded: Loaded, room: engine_lib.Room):
  """A server on a free port of loopback; yields its URL."""
  sys.setswitchinterval(SWITCH_SECONDS)  # as `server.serve` does
  engine = engine_lib.start(loaded, room)
  with tempfile.TemporaryDirectory() as folder:
    with Store.open(f"{folder}/records.sqlite", create=True) as store:
      app = create_app(Context(engine, store, None, None), Settings())
      server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
      thread = threading.Thread(target=server.run, daemon=True)
      thread.start()
      while not server.started:
        time.sleep(0.01)
      yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
      server.should_exit = True
      thread.join(10.0)
  engine.stop(grace=0.0)


if __name__ == "__main__":
  main()
