/** What a living handler says of itself in its state directory, for `reprieve doctor`. */
import { readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import type { SystemError } from '../errors.js';
import type { ReserveCounters } from '../reserve/account.js';
import type { WindowCounters } from '../reserve/overcharge.js';
import { handlerLives } from './instance.js';

const STATUS = 'status';

export interface HandlerStatus {
  version: 1;
  pid: number;
  /** What it watches, with that scope's part of the reserve. */
  watches: { scope: string; reserve: ReserveCounters }[];
  reserve: ReserveCounters;
  windows: WindowCounters;
}

/** Writes it into an instance's directory; a reader finds the old one or the new one. */
export function publishStatus(directory: string, status: HandlerStatus): void {
  writeFileSync(`${directory}/${STATUS}.new`, `${JSON.stringify(status)}\n`, { mode: 0o600 });
  renameSync(`${directory}/${STATUS}.new`, `${directory}/${STATUS}`);
}

/** Of all handlers that live; those that have not said anything yet are left out. */
export function readStatuses(base: string): HandlerStatus[] {
  let names: string[];
  try {
    names = readdirSync(base).filter((name) => name.startsWith('handler-'));
  } catch {
    return []; // there never was one, or it is not ours to see
  }
  return names.flatMap((name) => {
    try {
      return handlerLives(readFileSync(`${base}/${name}/owner`, 'utf8'))
        ? [JSON.parse(readFileSync(`${base}/${name}/${STATUS}`, 'utf8')) as HandlerStatus]
        : [];
    } catch (error) {
      if ((error as SystemError).code === undefined) throw error;
      return []; // it has just ended, or began a moment ago
    }
  });
}
