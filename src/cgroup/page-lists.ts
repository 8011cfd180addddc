import type { ControlFile, Directory } from '../native.js';
import { PAGE } from '../units.js';

/** What processors keep is worth asking for where it may be this part of all memory. */
const WORTH = 0.005;

/**
 * Free pages that processors keep in lists of their own (proc_zoneinfo(5), `pagesets`): MemAvailable leaves them out, and so do
 * the watermarks at which tasks are stalled, though the kernel takes them back before it is out of memory (drain_all_pages() of
 * mm/page_alloc.c). A processor that frees a victim keeps what fits in its list. All lists together may hold what the low
 * watermarks are: a twentieth of 1 GiB, and next to nothing of 64 GiB.
 */
export class PageLists {
  /** Null where it is not worth asking for. Kept open, with the buffer that the kernel has made for it. */
  readonly #file: ControlFile | null;

  /**
   * @param proc the directory
   * @param memory bytes of the machine
   */
  constructor(proc: Directory, memory: number) {
    this.#file = openIfWorth(proc, memory * WORTH);
  }

  /** Bytes that are in them now; 0 where that is not worth asking for. */
  kept(): number {
    return this.#file === null ? 0 : sumOf(this.#file.readText(), /^ +count: +(\d+)$/gm);
  }

  close(): void {
    this.#file?.close();
  }
}

function openIfWorth(proc: Directory, least: number): ControlFile | null {
  let file: ControlFile | undefined;
  try {
    file = proc.openFile('zoneinfo', 'read');
    if (mostKept(file.readText()) >= least) return file;
  } catch {
    // A sandbox may hide it: then a victim's memory is back once MemAvailable says so.
  }
  file?.close();
  return null;
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
