// One episode: a service works, a job beside it leaks until their memcg is full, somebody makes it end.
import { setTimeout as sleep } from 'node:timers/promises';
import { until } from './program.mjs';

const SERVICE = ['work', '--set', '24MiB'];
const LEAK = ['leak', '--every', '1ms', '--chunk', '256KiB'];
/** How long the service works before the leak starts, and after it is gone. */
const BEFORE_MS = 80;
const AFTER_MS = 60;
const EPISODE_MS = 10_000;

/**
 * Plays one and measures it. Jobs are started from here, and wait at their gates: a fork in the contender's process, or
 * the start of a program beside it, would be measured with it.
 * @param processes how many leak
 * @param signal ends the whole benchmark
 * @returns `{ failures, ...times }`, times in microseconds, null for what was not seen
 */
export async function playEpisode({ stage, contender, processes, signal }) {
  const limit = AbortSignal.any([signal, AbortSignal.timeout(EPISODE_MS)]);
  try {
    const service = stage.start('service', SERVICE);
    const leak = stage.start('leak', [...LEAK, '--processes', String(processes)]);
    await until(limit, Promise.all([service.line(), leak.line()]));
    contender.forget();
    await until(limit, stage.observed());

    service.say('');
    await sleep(BEFORE_MS, undefined, { signal: limit });
    leak.say('');
    await until(limit, leak.closed);
    await sleep(AFTER_MS, undefined, { signal: limit });

    service.signal('SIGTERM');
    const ended = await until(limit, service.closed);
    const served = ended.code === 0 ? JSON.parse(await service.line()) : null;
    const seen = await until(limit, stage.observed());
    const told = await until(limit, contender.account());
    const faultAtUs = processes === 1 ? stage.leakTouchBeganAtUs() : null;
    return { failures: failuresOf(ended, served, seen, told), ...measure(served, seen, told, faultAtUs) };
  } catch (error) {
    signal.throwIfAborted();
    if (!limit.aborted) throw error;
    return { failures: [`not over within ${EPISODE_MS / 1000} s`] };
  } finally {
    await stage.clear();
  }
}

function failuresOf(ended, served, seen, told) {
  const failures = told.failure === null ? [] : [told.failure];
  if (ended.signal === 'SIGKILL') failures.push('wrong victim');
  else if (served === null) failures.push('service dead');
  else if (served.errors > served.refused) failures.push('service errors');
  if (seen.oomAtUs === null) failures.push('no out-of-memory signal');
  if (seen.belowAtUs === null) failures.push('memory not back');
  if (seen.goneAtUs === null) failures.push('leak not gone');
  return [...new Set(failures)];
}

function measure(served, seen, told, faultAtUs) {
  const between = (from, to) => (from === null || to === null ? null : to - from);
  // Where the service's fault came first, the leak's is not the one that woke anybody.
  const woke = faultAtUs !== null && told.wokenAtUs !== null && faultAtUs <= told.wokenAtUs;
  return {
    wakeToKill: between(told.wokenAtUs, told.killedAtUs),
    faults: told.faults,
    contextSwitches: told.contextSwitches,
    collections: told.collections,
    faultToKill: woke ? between(faultAtUs, told.killedAtUs) : null,
    oomToWake: between(seen.oomAtUs, told.wokenAtUs),
    oomToKill: between(seen.oomAtUs, told.killedAtUs),
    oomToBack: between(seen.oomAtUs, seen.belowAtUs),
    oomToGone: between(seen.oomAtUs, seen.goneAtUs),
    stall: served?.longestStallUs ?? null,
  };
}
