import { isVanished } from '../errors.js';
import { type Hierarchy, type Listener, type Memcg, openChild, type TreeChange } from './cgroup.js';

interface Node {
  memcg: Memcg;
  listener: Listener;
  children: Map<string, Node>;
}

/** Told of memcgs below a scope, as they come and go. */
export interface SubtreeEvents {
  created(memcg: Memcg): void;
  removed(memcg: Memcg): void;
  /** Something changed directly below this memcg. */
  changed(memcg: Memcg, change: TreeChange): void;
  /** A memcg could not be opened or listened to, for want of descriptors, say; `rescan` tries again. */
  failed(memcg: Memcg, error: unknown): void;
}

/** Every memcg below a scope, held open and listened to, so that none is born or dies unseen. */
export class Subtree {
  readonly #hierarchy: Hierarchy;
  readonly #events: SubtreeEvents;
  readonly #root: Node;
  #complete = true;

  /** `created` is not called for what is there already: ask `all`. @throws ReprieveError; nothing stays open then */
  constructor(hierarchy: Hierarchy, scope: Memcg, events: SubtreeEvents) {
    this.#hierarchy = hierarchy;
    this.#events = events;
    this.#root = this.#node(scope);
    try {
      this.#scan(this.#root, false);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /** False after something failed, until a `rescan` went well. */
  get complete(): boolean {
    return this.#complete;
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

  /** Scans everything anew. What fails is told. */
  rescan(): void {
    this.#complete = true;
    const visit = (node: Node) => {
      this.#try(node, () => this.#scan(node, true));
      for (const child of node.children.values()) visit(child);
    };
    visit(this.#root);
  }

  #try(node: Node, run: () => void): void {
    try {
      run();
    } catch (error) {
      if (isVanished(error)) return; // its own removal is told
      this.#complete = false;
      this.#events.failed(node.memcg, error);
    }
  }

  #node(memcg: Memcg): Node {
    const node: Node = { memcg, listener: { close() {} }, children: new Map() };
    node.listener = this.#hierarchy.listenTree(memcg, (change) => {
      this.#try(node, () => {
        if (change.kind === 'overflow') this.rescan();
        else if (change.kind !== 'attributes') this.#look(node, change.name, true);
        this.#events.changed(memcg, change);
      });
    });
    return node;
  }

  /** Compares everything below a node with what it knows. */
  #scan(node: Node, tell: boolean): void {
    const names = new Set(node.memcg.children());
    for (const name of node.children.keys()) names.add(name);
    for (const name of names) this.#look(node, name, tell);
  }

  /** Compares one name below a node with what it knows; listens to a newcomer before it looks below it. */
  #look(node: Node, name: string, tell: boolean): void {
    const known = node.children.get(name);
    if (known !== undefined) {
      if (isThere(known.memcg)) return;
      node.children.delete(name);
      this.#forget(known);
    }
    const memcg = name === '' ? null : openChild(node.memcg, name);
    if (memcg === null) return;
    let child: Node;
    try {
      child = this.#node(memcg);
    } catch (error) {
      memcg.close();
      if (isVanished(error)) return;
      throw error;
    }
    node.children.set(name, child);
    if (tell) this.#events.created(memcg);
    this.#scan(child, tell);
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
