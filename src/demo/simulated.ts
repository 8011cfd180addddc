import { SimulatedHierarchy, type SimulatedProcess, wallClock } from '../cgroup/simulated.js';
import { OomHandler } from '../handler.js';
import { simulatedGround } from '../simulation.js';
import { DEMO_JOBS, DEMO_LIMIT, type DemoJob, type Stage } from './stage.js';

const SCRATCH = 2 * 2 ** 20;
const ROUND_MS = 2;

/** The demo in process: the same code above the cgroup interface, on a simulated memcg in real time. */
export function openSimulatedStage(why: string): Stage {
  const hierarchy = new SimulatedHierarchy(wallClock);
  hierarchy.make('/demo', DEMO_LIMIT);
  const jobs = new Map<DemoJob, { process: SimulatedProcess; rounds: number }>();
  const timers: NodeJS.Timeout[] = [];
  const start = (name: DemoJob, round: (process: SimulatedProcess) => boolean) => {
    const process = hierarchy.spawn(hierarchy.make(`/demo/${name}`), name, DEMO_JOBS[name].set);
    const job = { process, rounds: 0 };
    jobs.set(name, job);
    timers.push(setInterval(() => (job.rounds += round(process) ? 1 : 0), ROUND_MS));
  };
  return {
    title: `Simulated, in process: ${why}. No cgroup is touched; the code above the cgroup interface is the same.`,
    simulated: true,
    handler: OomHandler.over(simulatedGround(hierarchy)),
    scope: 'memcg:/demo',
    async startServices() {
      for (const name of ['database', 'web'] as const) {
        start(name, (process) => {
          if (!hierarchy.grow(process, SCRATCH)) return false;
          hierarchy.shrink(process, SCRATCH);
          return true;
        });
      }
    },
    async startLeak() {
      start('batch', (process) => hierarchy.grow(process, SCRATCH));
    },
    account(name) {
      const job = jobs.get(name);
      return {
        alive: job !== undefined && !job.process.gone,
        rounds: job?.rounds ?? 0,
        longestStallUs: job?.process.longestWaitUs ?? 0,
        errors: 0,
      };
    },
    async clear() {
      for (const timer of timers) clearInterval(timer);
    },
  };
}
