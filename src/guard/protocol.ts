/** Messages between a handler and its guard, as in native/guard/protocol.h: little endian, whole in one datagram. */

const MAGIC = 0x31475052;
export const PROTOCOL_VERSION = 1;
const HEADER_BYTES = 48;
const ENTRY_BYTES = 96;
const ENTRY_NAME_BYTES = 56;
/** Of an entry: the handler has killed that job already. */
const KILLED = 1;
const REPLY_BYTES = 32;
const MOST_PATH_BYTES = 255;
/** Jobs of one plan, at most. */
export const MOST_PLANNED = 16;

const TYPES = {
  arm: 1,
  plan: 2,
  opened: 3,
  resolved: 4,
  heartbeat: 5,
  disarm: 6,
  bye: 7,
  parked: 8,
  leave: 9,
  tend: 10,
} as const;
const REPLIES = { 101: 'ready', 102: 'alive', 103: 'failed', 104: 'acting' } as const;

/** What every message has; what a type does not use is 0. */
interface Header {
  type: keyof typeof TYPES;
  seq: number;
  inode?: number;
  count?: number;
  respondMs?: number;
  handleMs?: number;
  original?: boolean;
}

/** A job of a plan: the guard ranks them itself when it has to, by what they use then. */
export interface PlanEntry {
  kind: 'memcg' | 'process';
  killed: boolean;
  pid: number;
  /** Inode or start time. */
  id: number;
  priority: number;
  overPriority: number | null;
  reservation: number;
  name: string;
}

export function encodeMessage(header: Header, tail: Uint8Array = new Uint8Array()): Uint8Array {
  const message = Buffer.alloc(HEADER_BYTES + tail.length);
  message.writeUInt32LE(MAGIC, 0);
  message.writeUInt16LE(PROTOCOL_VERSION, 4);
  message.writeUInt16LE(TYPES[header.type], 6);
  message.writeUInt32LE(header.seq, 8);
  message.writeUInt32LE(header.count ?? 0, 12);
  message.writeBigUInt64LE(BigInt(header.inode ?? 0), 16);
  message.writeUInt32LE(Math.ceil(header.respondMs ?? 0), 24);
  message.writeUInt32LE(Math.ceil(header.handleMs ?? 0), 28);
  message.writeUInt32LE(header.original ? 1 : 0, 32);
  message.set(tail, HEADER_BYTES);
  return message;
}

/** Only for the record: cut where it is too long. */
export function encodePath(path: string): Uint8Array {
  return Buffer.from(path).subarray(0, MOST_PATH_BYTES);
}

export function encodePlan(entries: readonly PlanEntry[]): Uint8Array {
  const tail = Buffer.alloc(entries.length * ENTRY_BYTES);
  for (const [index, entry] of entries.entries()) {
    const at = index * ENTRY_BYTES;
    tail.writeUInt16LE(entry.kind === 'memcg' ? 1 : 2, at);
    tail.writeUInt16LE(entry.killed ? KILLED : 0, at + 2);
    tail.writeUInt32LE(entry.pid, at + 4);
    tail.writeBigUInt64LE(BigInt(entry.id), at + 8);
    tail.writeDoubleLE(entry.priority, at + 16);
    tail.writeDoubleLE(entry.overPriority ?? Number.NaN, at + 24);
    tail.writeDoubleLE(entry.reservation, at + 32);
    tail.write(entry.name, at + 40, ENTRY_NAME_BYTES - 1); // cut at a whole character
  }
  return tail;
}

/** What the guard answers. */
export interface Reply {
  type: (typeof REPLIES)[keyof typeof REPLIES];
  version: number;
  seq: number;
  code: number;
  inode: number;
  errno: number;
}

/** Null for what is no reply of this protocol. */
export function decodeReply(bytes: Uint8Array): Reply | null {
  const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.length !== REPLY_BYTES || view.readUInt32LE(0) !== MAGIC) return null;
  const type = REPLIES[view.readUInt16LE(6) as keyof typeof REPLIES];
  if (type === undefined) return null;
  return {
    type,
    version: view.readUInt16LE(4),
    seq: view.readUInt32LE(8),
    code: view.readUInt32LE(12),
    inode: Number(view.readBigUInt64LE(16)),
    errno: view.readUInt32LE(24),
  };
}
