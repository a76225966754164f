// The routes of the server. Whatever goes wrong is a Problem with words for the person.

export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: the server was not reached
  }
}

let signedOut = () => {};
export const onSignedOut = (handler) => { signedOut = handler; };

export async function call(method, path, body, options = {}) {
  let response;
  try {
    response = await fetch(`/label/${path}`, {
      method,
      headers: { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      ...options,
    });
  } catch {
    throw new Problem(0, "The server cannot be reached. What you wrote is kept in this tab.");
  }
  if (response.ok) return options.raw ? response : response.json();
  const said = await response.json().catch(() => null);
  const problem = new Problem(response.status, said?.error?.message ?? `The server answered ${response.status}.`);
  if (problem.status === 401 && path !== "session") signedOut(problem.message);
  throw problem;
}

export const get = (path) => call("GET", path);
export const post = (path, body) => call("POST", path, body);
