import { isVanished } from '../errors.js';
import { type Hierarchy, type Listener, type Memcg, openChild } from './cgroup.js';

interface Node {
  memcg: Memcg;
  listener: Listener;
  children: Map<string, Node>;
}

/** Told of memcgs below a scope, as they come and go. */
export interface SubtreeEvents {
  created(memcg: Memcg): void;
  removed(memcg: Memcg): void;
  /** Something changed directly below this memcg: a child was made or removed, or its attributes were written. */
  changed(memcg: Memcg): void;
}

/** Every memcg below a scope, held open and listened to, so that none is born or dies unseen. */
export class Subtree {
  readonly #hierarchy: Hierarchy;
  readonly #events: SubtreeEvents;
  readonly #root: Node;

  /** `created` is not called for what is there already: ask `all`. */
  constructor(hierarchy: Hierarchy, scope: Memcg, events: SubtreeEvents) {
    this.#hierarchy = hierarchy;
    this.#events = events;
    this.#root = this.#node(scope);
    this.#scan(this.#root, false);
  }

  /** Every memcg below the scope, parents first. */
  all(): Memcg[] {
    const found: Memcg[] = [];
    const visit = (node: Node) => {
      for (const child of node.children.values()) {
        found.push(child.memcg);
        visit(child);
      }
    };
    visit(this.#root);
    return found;
  }

  /** Scans everything anew. */
  rescan(): void {
    const visit = (node: Node) => {
      this.#scan(node, true);
      for (const child of node.children.values()) visit(child);
    };
    visit(this.#root);
  }

  #node(memcg: Memcg): Node {
    const node: Node = { memcg, listener: { close() {} }, children: new Map() };
    node.listener = this.#hierarchy.listenTree(memcg, ({ kind }) => {
      if (kind === 'overflow') this.rescan();
      else if (kind !== 'attributes') this.#scan(node, true);
      this.#events.changed(memcg);
    });
    return node;
  }

  /** Compares what is below a node with what it knows; listens to a newcomer before it looks below it. */
  #scan(node: Node, tell: boolean): void {
    let names: Set<string>;
    try {
      names = new Set(node.memcg.children());
    } catch (error) {
      if (!isVanished(error)) throw error;
      names = new Set();
    }
    for (const [name, child] of node.children) {
      if (names.has(name) && isThere(child.memcg)) continue;
      node.children.delete(name);
      this.#forget(child);
    }
    for (const name of names) {
      if (node.children.has(name)) continue;
      const memcg = openChild(node.memcg, name);
      if (memcg === null) continue;
      let child: Node;
      try {
        child = this.#node(memcg);
      } catch (error) {
        memcg.close();
        if (isVanished(error)) continue;
        throw error;
      }
      node.children.set(name, child);
      if (tell) this.#events.created(memcg);
      this.#scan(child, tell);
    }
  }

  #forget(node: Node): void {
    for (const child of node.children.values()) this.#forget(child);
    node.listener.close();
    this.#events.removed(node.memcg);
    node.memcg.close();
  }

  close(): void {
    const visit = (node: Node) => {
      for (const child of node.children.values()) visit(child);
      node.listener.close();
      if (node !== this.#root) node.memcg.close();
    };
    visit(this.#root);
    this.#root.children.clear();
  }
}

/** False if the memcg was removed; another may have its name now. */
export function isThere(memcg: Memcg): boolean {
  try {
    memcg.usage();
    return true;
  } catch (error) {
    if (isVanished(error)) return false;
    throw error;
  }
}
