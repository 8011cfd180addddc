import { Gauge, type Registry } from 'prom-client';
import type { OomHandler } from '../handler.js';
import type { ReserveCounters } from '../reserve/account.js';
import type { WindowCounters } from '../reserve/overcharge.js';

/** Counters of a reserve by the end of their metric's name. */
const RESERVE: Record<keyof ReserveCounters, [name: string, help: string]> = {
  bytes: ['bytes', 'Size of the reserve'],
  charged: ['charged_bytes', 'Charged to the reserve now'],
  available: ['available_bytes', 'What can still be charged to the reserve'],
  maxCharged: ['charged_max_bytes', 'The most that was ever charged to the reserve'],
  failures: ['failures', 'Charges that were refused'],
};

/**
 * Registers gauges of a handler: `reprieve_reserve_*` (label `scope`; '' is the handler's whole reserve) and
 * `reprieve_overcharge_windows` (label `result`). They are read when the registry is scraped; nothing is counted between.
 * @throws Error if the registry has metrics of these names: one registry a handler
 */
export function registerMetrics(handler: OomHandler, registry: Registry): void {
  for (const [key, [name, help]] of Object.entries(RESERVE) as [keyof ReserveCounters, [string, string]][]) {
    new Gauge({
      name: `reprieve_reserve_${name}`,
      help,
      labelNames: ['scope'],
      registers: [registry],
      collect() {
        this.reset(); // scopes come and go
        this.set({ scope: '' }, handler.reserve[key]);
        for (const { scope, reserve } of handler.watches) this.set({ scope }, reserve[key]);
      },
    });
  }
  new Gauge({
    name: 'reprieve_overcharge_windows',
    help: 'Overcharge windows so far; those that were exhausted had been opened',
    labelNames: ['result'],
    registers: [registry],
    collect() {
      for (const [result, count] of Object.entries(handler.windows) as [keyof WindowCounters, number][]) {
        this.set({ result }, count);
      }
    },
  });
}
