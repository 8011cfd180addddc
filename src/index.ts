export type { Capabilities } from './capabilities.js';
export type { Waiter } from './cgroup/cgroup.js';
export type { OomCondition } from './condition/condition.js';
export type { WatchDeadlines } from './condition/options.js';
export type { KillResult } from './condition/victims.js';
export { ERROR_CODES, type ErrorCode, ReprieveError } from './errors.js';
export type { Bound } from './guard/bound.js';
export type { GuardOptions } from './guard/options.js';
export type { GuardReplaced } from './guard/process.js';
export {
  type GuardState,
  type HandlerEvents,
  OomHandler,
  type PendingWatch,
  type WatchOptions,
} from './handler.js';
export type {
  Decision,
  KernelDecision,
  KillDecision,
  Policy,
  PolicyContext,
  WaitDecision,
} from './policy/decision.js';
export { explain, lowestPriority } from './policy/lowest-priority.js';
export type { Outcome, Report, Step, Victim } from './report/report.js';
export { renderReport } from './report/text.js';
export type { Lease, OverchargeOptions, Reserve, ReserveCounters } from './reserve/account.js';
export type { OverchargeWindow, WindowCounters, WindowRecord } from './reserve/overcharge.js';
export type { HandlerOptions } from './self/ground.js';
export type { Scheduling } from './self/hardening.js';
export type { JobMatch, JobRule, JobSettings } from './snapshot/rules.js';
export type { Job, Snapshot } from './snapshot/snapshot.js';
export type { Size } from './units.js';
export type { Watch, WatchState } from './watch.js';
