import { type ControlFile, native } from '../native.js';
import { PAGE } from '../units.js';

/** What processors keep is worth asking for where it may be this part of all memory. */
const WORTH = 0.005;

/**
 * Free pages that processors keep in lists of their own (proc_zoneinfo(5), `pagesets`): MemAvailable leaves them out, and so do
 * the watermarks at which tasks are stalled, though the kernel takes them back before it is out of memory (drain_all_pages() of
 * mm/page_alloc.c). A processor that frees a victim keeps what fits in its list. All lists together may hold what the low watermarks are: a twentieth of 1 GiB, and next to nothing of 64 GiB.
 */
export class PageLists {
  readonly #file: ControlFile;
  readonly #most: number; // 0: not worth asking for

  /** @param memory bytes of the machine. @throws the system's error */
  constructor(memory: number) {
    const directory = new (native().Directory)('/proc');
    try {
      this.#file = directory.openFile('zoneinfo', 'read');
    } finally {
      directory.close();
    }
    const most = mostKept(this.#file.readText());
    this.#most = most < memory * WORTH ? 0 : most;
  }

  /** Bytes that are in them now; 0 where that is not worth asking for. */
  kept(): number {
    return this.#most === 0 ? 0 : sumOf(this.#file.readText(), /^ +count: +(\d+)$/gm);
  }

  close(): void {
    this.#file.close();
  }
}

/** Bytes that the lists of all zones and processors may hold. Where their room grows and shrinks, its bound is `high_max`. */
export function mostKept(zoneinfo: string): number {
  return sumOf(zoneinfo, /^ +high_max: +(\d+)$/gm) || sumOf(zoneinfo, /^ +high: +(\d+)$/gm);
}

function sumOf(zoneinfo: string, field: RegExp): number {
  let pages = 0;
  for (const [, count] of zoneinfo.matchAll(field)) pages += Number(count);
  return pages * PAGE;
}
