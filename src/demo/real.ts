import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, readdirSync, readFileSync, rmdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { findMemoryV1, readCgroupMounts } from '../cgroup/mounts.js';
import { ReprieveError, type SystemError } from '../errors.js';
import { OomHandler } from '../handler.js';
import { workloadPath } from '../native.js';
import { DEMO_JOBS, DEMO_LIMIT, type DemoJob, type Stage } from './stage.js';

const PREFIX = 'reprieve-demo-';
/** Layout of the workload's page of live numbers: 64 bit little-endian words. */
const STATS_BYTES = 4096;
const STATS = { rounds: 2, longestStallUs: 3, errors: 7, refused: 9 } as const;

/** Why the demo cannot play on real memcgs here, or the stage. */
export async function openRealStage(): Promise<Stage | string> {
  const mount = findMemoryV1(readCgroupMounts());
  if (mount === undefined) return 'there is no cgroup v1 memory hierarchy here';
  if (process.geteuid?.() !== 0) return 'memcgs are made by root only';
  const name = `${PREFIX}${process.pid}`;
  const memcg = `${mount.point}/${name}`;
  const stats = `${tmpdir()}/${name}`;
  removeStale(mount.point);
  try {
    mkdirSync(stats, { mode: 0o700 });
    mkdirSync(memcg);
    writeFileSync(`${memcg}/memory.limit_in_bytes`, String(DEMO_LIMIT));
  } catch (error) {
    rmSync(stats, { recursive: true, force: true });
    return `no memcg can be made below ${mount.point} (${(error as SystemError).code})`;
  }
  const children = new Map<DemoJob, ChildProcess>();
  const clearFiles = () => {
    rmSync(stats, { recursive: true, force: true });
    removeMemcg(memcg);
  };

  let handler: OomHandler;
  try {
    handler = await OomHandler.open({ fixedHeap: true });
  } catch (error) {
    clearFiles();
    if (error instanceof ReprieveError && error.code === 'ERR_REPRIEVE_UNSUPPORTED') return error.message;
    throw error;
  }

  const start = async (job: DemoJob, options: string[]) => {
    mkdirSync(`${memcg}/${job}`);
    writeFileSync(`${stats}/${job}`, Buffer.alloc(STATS_BYTES));
    const args = [...options, '--join', `${memcg}/${job}`, '--stats', `${stats}/${job}`, '--name', job, '--gate'];
    const child = spawn(workloadPath(), args, { stdio: ['pipe', 'pipe', 'inherit'] });
    children.set(job, child);
    const failed = once(child, 'exit').then(() => {
      throw new Error(`the demo's job ${job} did not start`);
    });
    failed.catch(() => {});
    await Promise.race([once(child.stdout, 'data'), failed]);
    child.stdin.end();
  };

  return {
    title: `On real memory cgroups: ${memcg}, limit ${DEMO_LIMIT / 2 ** 20} MiB.`,
    simulated: false,
    handler,
    scope: `memcg:/${name}`,
    async startServices() {
      for (const job of ['database', 'web'] as const) await start(job, ['work', '--set', String(DEMO_JOBS[job].set)]);
      await sleep(100);
    },
    startLeak: () => start('batch', ['leak', '--chunk', '1MiB', '--every', '5ms']),
    account(job) {
      const child = children.get(job);
      const page = new BigUint64Array(readPage(`${stats}/${job}`));
      return {
        alive: child !== undefined && child.exitCode === null && child.signalCode === null,
        rounds: Number(page[STATS.rounds]),
        longestStallUs: Number(page[STATS.longestStallUs]),
        // A system call that the full memcg refused is not a wrong result: the round was done again.
        errors: Number(page[STATS.errors]) - Number(page[STATS.refused]),
      };
    },
    async clear() {
      for (const child of children.values()) {
        if (child.exitCode !== null || child.signalCode !== null) continue;
        const gone = once(child, 'exit');
        child.kill('SIGTERM');
        const stubborn = setTimeout(() => child.kill('SIGKILL'), 2_000);
        await gone;
        clearTimeout(stubborn);
      }
      clearFiles();
    },
  };
}

function readPage(path: string): ArrayBuffer {
  const bytes = readFileSync(path);
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + STATS_BYTES) as ArrayBuffer;
}

/** Removes a memcg and those directly below it; the kernel refuses what is in use. */
function removeMemcg(memcg: string): void {
  for (const entry of readdirSync(memcg, { withFileTypes: true })) {
    if (entry.isDirectory()) rmdirSync(`${memcg}/${entry.name}`);
  }
  rmdirSync(memcg);
}

/** Memcgs and files of demos that were killed: their jobs died with them. */
function removeStale(point: string): void {
  for (const name of new Set([...readdirSync(point), ...readdirSync(tmpdir())])) {
    if (!name.startsWith(PREFIX) || isAlive(Number(name.slice(PREFIX.length)))) continue;
    rmSync(`${tmpdir()}/${name}`, { recursive: true, force: true });
    try {
      removeMemcg(`${point}/${name}`);
    } catch {
      // not there, or in use after all
    }
  }
}

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}
