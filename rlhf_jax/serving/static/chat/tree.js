// A conversation as a tree of messages: which are beside each other, and which branch is shown.

export class Tree {
  constructor() {
    this.messages = new Map();
    this.chosen = new Map(); // parent's id ("" for none) -> id of the child that is shown
  }

  add(message) {
    const is_new = !this.messages.has(message.id);
    this.messages.set(message.id, { ...this.messages.get(message.id), ...message });
    if (is_new) this.chosen.set(message.parent ?? "", message.id);
    return this.messages.get(message.id);
  }

  remove(id) {
    const { parent } = this.messages.get(id);
    this.messages.delete(id);
    const left = this.children(parent);
    if (left.length) this.chosen.set(parent ?? "", left[left.length - 1].id);
    else this.chosen.delete(parent ?? "");
  }

  children(parent) {
    return [...this.messages.values()].filter((message) => message.parent === (parent ?? null));
  }

  siblings(message) {
    // Edits of a first message that have a system message each are beside each other, as these are.
    return this.children(message.parent);
  }

  // The messages from the first to the last one of the branch that is shown.
  path() {
    const found = [];
    for (let at = ""; this.chosen.has(at); at = found[found.length - 1].id) {
      const message = this.messages.get(this.chosen.get(at));
      if (!message) break;
      found.push(message);
    }
    return found;
  }

  choose(message) {
    this.chosen.set(message.parent ?? "", message.id);
  }

  // Shows the branch that this message is on.
  reveal(id) {
    for (let at = this.messages.get(id); at; at = this.messages.get(at.parent)) this.choose(at);
  }
}
