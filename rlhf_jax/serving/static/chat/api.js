// Requests, their errors in words, and server-sent events read from a fetch.

export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: the server was not reached
  }
}

async function request(path, options) {
  try {
    return await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
}

async function failureOf(response) {
  if (response.status === 503) return new Failure("Many people are asking just now. Try again in a moment.", 503);
  if (response.status === 413) return new Failure("That is too long to be sent.", 413);
  let said = null;
  try {
    said = await response.json();
  } catch {
    // not from the routes of this page
  }
  const message = said?.error?.message ?? (typeof said?.detail === "string" ? said.detail : null);
  const sentence = message ?? `The server answered ${response.status}.`;
  return new Failure(sentence[0].toUpperCase() + sentence.slice(1), response.status);
}

// JSON of a route; with a body it is a POST. A browser that has lost its cookie gets a new one.
export async function call(path, body = undefined) {
  const options =
    body === undefined
      ? {}
      : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response = await request(path, options);
  if (response.status === 401) {
    await request("chat/session", {});
    response = await request(path, options);
  }
  if (!response.ok) throw await failureOf(response);
  try {
    return await response.json();
  } catch {
    throw new Failure("The connection broke off.");
  }
}

// The events of a stream as [name, data]; throws a Failure where it breaks off.
export async function* events(path, signal) {
  const response = await request(path, { signal });
  if (!response.ok) throw await failureOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let step;
    try {
      step = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection broke off.");
    }
    if (step.done) throw new Failure("The connection broke off.");
    const blocks = (rest + step.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: ?(.*)/s)));
      if (fields.data === undefined) continue;
      yield [fields.event, JSON.parse(fields.data)];
      if (fields.event === "done") return;
    }
  }
}
