import { type ControlFile, native } from '../native.js';

/** The machine's memory, in bytes (proc_meminfo(5)). */
export interface Meminfo {
  total: number;
  /** What can be had without swapping: free, and what of caches the kernel can give back. */
  available: number;
  swapTotal: number;
  swapFree: number;
}

const KEYS = ['MemTotal:', 'MemAvailable:', 'SwapTotal:', 'SwapFree:'] as const;
const fields = new Float64Array(KEYS.length);

/** /proc/meminfo through a descriptor that stays open. @throws the system's error */
export class MeminfoFile {
  readonly #file: ControlFile;
  readonly #meminfo: Meminfo = { total: 0, available: 0, swapTotal: 0, swapFree: 0 };

  constructor() {
    const directory = new (native().Directory)('/proc');
    try {
      this.#file = directory.openFile('meminfo', 'read');
    } finally {
      directory.close();
    }
  }

  /** As it is now; the same object each time. */
  read(): Readonly<Meminfo> {
    this.#file.readFields(KEYS, fields);
    const meminfo = this.#meminfo;
    meminfo.total = fields[0] || 0;
    meminfo.available = fields[1] || 0;
    meminfo.swapTotal = fields[2] || 0;
    meminfo.swapFree = fields[3] || 0;
    return meminfo;
  }

  close(): void {
    this.#file.close();
  }
}

/** The same, once. */
export function readMeminfo(): Readonly<Meminfo> {
  const file = new MeminfoFile();
  try {
    return file.read();
  } finally {
    file.close();
  }
}
