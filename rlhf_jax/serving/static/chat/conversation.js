// One conversation: its tree of messages, what is on its way, and everything that is asked for in it.
// `changed()` is called whenever there is something new to show.

import { call, events, Failure } from "./api.js";
import { newPair } from "./compare.js";
import { newId } from "./dom.js";
import { sampling, systemMessage } from "./settings.js";
import { Tree } from "./tree.js";

const TRIES = 4; // to listen again to an answer whose connection broke off
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class Conversation {
  constructor(id, { changed, failed }) {
    this.id = id; // null until the first message is stored
    this.tree = new Tree();
    this.pair = null; // two answers beside each other
    this.changed = changed;
    this.failed = failed; // (failure, retry)
    this.listening = new Set();
    this.attempt = null; // the last message that was sent, to send it again under the same id
  }

  async load() {
    const { messages } = await call(`chat/conversations/${this.id}`);
    for (const message of messages) this.tree.add(message);
    const leaf = localStorage.getItem(`leaf:${this.id}`);
    if (this.tree.messages.has(leaf)) this.tree.reveal(leaf);
    this.pair = JSON.parse(localStorage.getItem(`pair:${this.id}`) ?? "null");
    for (const message of messages) if (message.running) this.listen(message.id);
    this.changed();
  }

  get running() {
    return [...this.tree.messages.values()].filter((message) => message.running);
  }

  // The message that the next one comes after; of two answers that nobody chose from, the first.
  tail() {
    if (this.pair) return [...this.pair.ids, this.pair.parent].find((id) => this.tree.messages.has(id));
    const path = this.tree.path();
    return path.length ? path[path.length - 1].id : null;
  }

  // Sends a message and returns what the filter said where it blocked it, or null.
  async send(text, parent) {
    const id = this.id ?? this.attempt?.conversation ?? newId();
    const same = this.attempt?.text === text && this.attempt.parent === parent;
    this.attempt = same ? this.attempt : { id: newId(), conversation: id, text, parent };
    const body = { ...this.attempt, sampling: sampling() };
    if (this.id === null) body.system = systemMessage();
    const told = await call("chat/messages", body);
    this.attempt = told.blocked ? this.attempt : null;
    if (told.blocked) return told.blocked;
    this.id = id;
    this.setPair(null);
    if (told.messages.length === 0) await this.load(); // an earlier attempt had come through
    for (const message of told.messages) this.tree.add(message);
    this.begin(told.answers);
    return null;
  }

  async draw(parent, count) {
    const { answers } = await call(`chat/messages/${parent}/answers`, { count, sampling: sampling() });
    if (count === 2) this.setPair(newPair(parent, answers.map((answer) => answer.id)));
    this.begin(answers);
  }

  begin(answers) {
    for (const answer of answers) {
      this.tree.add(answer);
      this.tree.choose(answer);
      this.listen(answer.id);
    }
    this.moved();
  }

  async stop() {
    await Promise.all(this.running.map(async ({ id }) => {
      try {
        this.end(id, await call(`chat/answers/${id}/stop`, {}));
      } catch (failure) {
        if (failure.status !== 404) this.failed(failure, () => this.stop());
      }
    }));
  }

  async listen(id) {
    if (this.listening.has(id)) return;
    this.listening.add(id);
    for (let tries = 0; this.tree.messages.get(id)?.running; tries++) {
      try {
        await this.follow(id, () => (tries = 0));
      } catch (failure) {
        if (failure.status === 404) {
          await this.load().catch((error) => this.failed(error, () => this.load())); // long over
          break;
        }
        if (tries >= TRIES) {
          this.failed(failure, () => this.listen(id));
          break;
        }
        await pause(250 * 2 ** tries);
      }
    }
    this.listening.delete(id);
  }

  async follow(id, heard) {
    let text = ""; // streams begin at the beginning
    for await (const [name, data] of events(`chat/answers/${id}`)) {
      heard();
      if (name === "done") {
        this.end(id, data);
      } else {
        text += data;
        if (this.tree.messages.get(id)?.running) this.patch({ id, text });
      }
    }
  }

  end(id, { message, error }) {
    const known = this.tree.messages.get(id);
    if (!known?.running) return; // told already, by the stream or by what stopped it
    if (message) this.tree.add({ ...message, running: false });
    else this.tree.remove(id);
    if (error) this.failed(new Failure(error), () => this.draw(known.parent, 1));
    this.moved();
  }

  patch(message) {
    this.tree.add(message);
    this.changed();
  }

  choose(message) {
    this.tree.choose(message);
    this.moved();
  }

  setPair(pair) {
    this.pair = pair;
    if (pair) localStorage.setItem(`pair:${this.id}`, JSON.stringify(pair));
    else localStorage.removeItem(`pair:${this.id}`);
    this.changed();
  }

  // Another branch is shown, also after a reload.
  moved() {
    const path = this.tree.path();
    if (path.length) localStorage.setItem(`leaf:${this.id}`, path[path.length - 1].id);
    this.changed();
  }
}
