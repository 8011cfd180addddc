import type { OomHandler } from '../handler.js';
import type { JobSettings } from '../snapshot/rules.js';

/** What the demo runs: two services that must go on, and a job that leaks. */
export const DEMO_JOBS = {
  database: { priority: 90, set: 40 * 2 ** 20 },
  web: { priority: 70, set: 20 * 2 ** 20 },
  batch: { priority: 10, set: 0 },
} as const;

export type DemoJob = keyof typeof DEMO_JOBS;

export const DEMO_LIMIT = 128 * 2 ** 20;

/** Priorities of the jobs as `watch` takes them. */
export function demoSettings(): Record<string, JobSettings> {
  return Object.fromEntries(Object.entries(DEMO_JOBS).map(([name, { priority }]) => [name, { priority }]));
}

/** What a job did so far. */
export interface JobAccount {
  alive: boolean;
  /** Rounds of work that are done. */
  rounds: number;
  /** The longest that it stood still between two rounds, in microseconds. */
  longestStallUs: number;
  /** Rounds that gave a wrong result. */
  errors: number;
}

/** Where the demo plays: on real memcgs, or in the simulation. */
export interface Stage {
  /** Says in the first line what is shown. */
  title: string;
  simulated: boolean;
  handler: OomHandler;
  /** The scope to watch. */
  scope: string;
  /** Starts the services; resolves when they work. */
  startServices(): Promise<void>;
  /** Starts the job that leaks. */
  startLeak(): Promise<void>;
  account(job: DemoJob): JobAccount;
  /** Ends every job and removes what was made. */
  clear(): Promise<void>;
}
