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
const meminfo: Meminfo = { total: 0, available: 0, swapTotal: 0, swapFree: 0 };
let file: ControlFile | undefined;

/** Read anew through a descriptor that stays open; the same object each time. */
export function readMeminfo(): Readonly<Meminfo> {
  if (file === undefined) {
    const directory = new (native().Directory)('/proc');
    try {
      file = directory.openFile('meminfo', 'read');
    } finally {
      directory.close();
    }
  }
  file.readFields(KEYS, fields);
  meminfo.total = fields[0] || 0;
  meminfo.available = fields[1] || 0;
  meminfo.swapTotal = fields[2] || 0;
  meminfo.swapFree = fields[3] || 0;
  return meminfo;
}
