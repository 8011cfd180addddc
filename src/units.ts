import { invalidOption } from './errors.js';

/** Bytes of a page on x86-64, and on arm64 as Debian builds it. */
export const PAGE = 4096;

const UNITS: Record<string, number> = { '': 1, B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40 };

/** A size at the edge of the API: bytes, or text such as '32MiB' (B, KiB, MiB, GiB, TiB; powers of 1024). */
export type Size = number | string;

/**
 * Bytes of a size.
 * @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT if it is no size, negative, or not a whole number of bytes.
 */
export function bytesOf(size: unknown, name: string): number {
  const expected = "a size in bytes or a text such as '32MiB' (B, KiB, MiB, GiB, TiB)";
  if (typeof size === 'number') {
    if (!Number.isSafeInteger(size) || size < 0) throw invalidOption(name, expected, size);
    return size;
  }
  if (typeof size !== 'string') throw invalidOption(name, expected, size);
  const match = /^(\d+(?:\.\d+)?) ?([KMGT]iB|B|)$/.exec(size.trim());
  const bytes = match ? Number(match[1]) * (UNITS[match[2] ?? ''] ?? Number.NaN) : Number.NaN;
  if (!Number.isSafeInteger(Math.round(bytes))) throw invalidOption(name, expected, size);
  return Math.round(bytes);
}

/** Bytes for people: '31.5 MiB'. */
export function formatBytes(bytes: number): string {
  if (!Number.isFinite(bytes)) return 'no limit';
  if (Math.abs(bytes) < 1024) return `${bytes} B`;
  let value = bytes;
  let unit = '';
  for (unit of ['KiB', 'MiB', 'GiB', 'TiB']) {
    value /= 1024;
    if (Math.abs(value) < 1024) break;
  }
  return `${value.toFixed(value < 10 ? 2 : 1).replace(/\.?0+$/, '')} ${unit}`;
}

/** Microseconds for people: '730 µs', '4.2 ms', '1.53 s'. */
export function formatMicros(us: number): string {
  if (us < 1000) return `${Math.round(us)} µs`;
  if (us < 1_000_000) return `${(us / 1000).toFixed(us < 10_000 ? 2 : 1)} ms`;
  return `${(us / 1_000_000).toFixed(2)} s`;
}
