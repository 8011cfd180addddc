// What is played: drawn from the seed alone, so that the same seed plays the same. Only the kernel's timing differs.
import { DEADLINES } from './bounds.mjs';
import { FAULTS, HANDLER_FAULTS } from './faults.mjs';
import { Random } from './random.mjs';

const MiB = 2 ** 20;
const LIMIT = 64 * MiB;

/** Words for the workload, by kind of job. Each holds memory worth a kill before anything happens, but for the leaks. */
const LEAKS = {
  one: ['leak', '--chunk', '1MiB'],
  eight: ['leak', '--chunk', '128KiB', '--processes', '8'],
  threads: ['leak', '--chunk', '256KiB', '--threads', '4'],
};
const OTHERS = {
  service: ['work', '--set', '4MiB', '--scratch', '1MiB', '--pause', '2ms'],
  holder: ['hold', '--bytes', '6MiB'],
};
const HOLDER = { kind: 'holder', words: OTHERS.holder };
const LEAK = { kind: 'leak', words: LEAKS.one };
/** Too small to be worth a kill, and yet the first that the kernel is to take: its score is raised, and what it forks inherits that. */
const IDLE = ['fork', '--children', '4', '--bytes', '16KiB', '--every', '200ms'];
const BOMB = ['fork', '--children', '48', '--bytes', '2MiB'];
/** Of the handler where its policy opens overcharge windows: the largest that there can be. */
const RESERVE = 16 * MiB;
/** Somebody froze it before, and it is not to be thawed. Not to be killed either: nobody could wait for that. */
const FROZEN = {
  name: 'frozen',
  kind: 'frozen',
  words: ['hold', '--bytes', '64KiB'],
  priority: 100,
  protected: true,
  scoreAdj: 0,
  freezer: 'frozen',
};
/** The pids controller's bound on the bomb: some of its forks are refused. */
export const BOMB_PIDS = 40;

/**
 * The scenario of an episode.
 * @param settings `{ faults, wallClock }`: names to draw from, and whether the machine's clock may be set
 */
export function drawScenario(seed, episode, { faults, wallClock }) {
  const random = new Random(seed, episode);
  const names = faults.filter((name) => wallClock || !FAULTS[name].wallClock);
  const chosen = drawFaults(random, names);
  const scenes = new Set(chosen.map(({ name }) => FAULTS[name].scene));
  const flat = random.chance(0.2);
  const jobs = drawJobs(random, scenes.has('bomb'), flat);
  const dies = chosen.some(({ name }) => HANDLER_FAULTS.includes(name));
  const policy = drawPolicy(random, {
    jobs,
    dies,
    hazard: chosen.map(({ name }) => FAULTS[name].policy).find(Boolean),
  });
  const aimed = policy.freezes.length > 0 && random.chance(0.6);
  const scenario = {
    seed,
    episode,
    flat,
    limit: LIMIT,
    memsw: false,
    jobs,
    late: { name: 'late', priority: freePriority(random, jobs), freezer: 'late', ...random.pick([HOLDER, LEAK]) },
    policy,
    killHandler: random.chance(0.3),
    /** Before this the leak does not start: sometimes the memcg is full while the handler arms it. */
    leaksAt: random.chance(0.15) ? 'opened' : 'ready',
    scenes: [...scenes].filter(Boolean),
    faults: aimed ? chosen.map((fault) => aim(random, fault, policy)) : chosen,
  };
  // Numbers of their own: without windows a seed plays what it did before there were any.
  const windows = new Random(seed, `${episode}:window`);
  return windows.chance(0.5) ? addWindow(windows, scenario) : scenario;
}

/** The policy lends nothing by itself then: of a limit and a freezer that two change none could tell who is right. */
function addWindow(random, scenario) {
  const { flat, jobs, policy, faults } = scenario;
  const window = drawWindow(random);
  for (const job of jobs) job.freezer = random.pick([job.name, 'shared', null]);
  const removed = faults.some(({ name }) => name === 'memcg-removed'); // it could not be: what is frozen does not die
  if (!flat && !removed && random.chance(0.3)) jobs.push(FROZEN);
  return {
    ...scenario,
    memsw: random.chance(0.3),
    policy: { ...policy, freezes: [], raisesBy: 0, window },
    faults: faults.map((fault) => aimAtWindow(random, fault, window)),
  };
}

/** How large, what runs in it, for how long, and how it ends: by the policy, or by nobody. */
function drawWindow(random) {
  const bytes = Math.ceil((random.next() * RESERVE) / 4096) * 4096;
  const part = (least, most) => String(Math.round(bytes * (least + random.next() * (most - least))));
  const child = () =>
    random.pick([
      ['hold', '--bytes', part(0.1, 0.8)],
      ['hold', '--bytes', part(1.5, 3)],
      ['leak', '--chunk', '64KiB'],
      ['fork', '--children', '8', '--bytes', part(0.02, 0.3), '--every', '2ms'],
    ]);
  return {
    reserve: RESERVE,
    bytes,
    stopWithin: random.whole(1, 80),
    children: Array.from({ length: random.whole(0, 2) }, child),
    openMs: random.whole(0, DEADLINES.respondWithin * 1.5),
    end: random.pick(['close', 'kill', 'wait', 'throw', 'never']),
  };
}

/** Into the time in which it is open, or is being opened. */
function aimAtWindow(random, fault, { openMs }) {
  if (!FAULTS[fault.name].anchors?.includes('held') || random.chance(0.3)) return fault;
  return { ...fault, anchor: random.chance(0.7) ? 'window' : 'policy', delayMs: random.whole(0, openMs) };
}

/** One, or two that are not both something that the policy does. */
function drawFaults(random, names) {
  const count = names.length > 1 && random.chance(0.4) ? 2 : 1;
  const chosen = random.some(names, count);
  const hazards = chosen.filter((name) => FAULTS[name].policy);
  if (hazards.length > 1) chosen.pop();
  return chosen.map((name) => {
    const { anchors, draw } = FAULTS[name];
    const parameters = draw?.(random) ?? {};
    if (anchors === undefined) return { name, parameters };
    // Most while somebody is held, which is what matters, and lasts for milliseconds only.
    if (anchors.includes('held') && random.chance(0.6)) {
      return { name, anchor: random.pick(['held', 'policy']), delayMs: random.whole(0, 20), parameters };
    }
    return { name, anchor: random.pick(anchors), delayMs: drawDelay(random), parameters };
  });
}

/** Into the time in which something is frozen. */
function aim(random, fault, { thinksMs }) {
  if (!HANDLER_FAULTS.includes(fault.name) || fault.anchor === undefined) return fault;
  return { ...fault, anchor: 'policy', delayMs: random.whole(0, thinksMs) };
}

/** An episode is over within milliseconds once the memcg is full, and goes on for a second when something is wrong. */
function drawDelay(random) {
  const most = random.pick([0, 3, 20, 100, 400]);
  return Math.round(random.next() * most * 10) / 10;
}

function drawJobs(random, bomb, flat) {
  const count = random.whole(3, 6);
  const priorities = random.some([10, 20, 30, 40, 50, 60, 70, 80, 90], count);
  const leak = random.pick(Object.keys(LEAKS));
  const kinds = [bomb ? 'bomb' : `leak-${leak}`, 'service', 'holder'];
  while (kinds.length < count)
    kinds.push(random.pick(['service', 'holder', `leak-${random.pick(Object.keys(LEAKS))}`]));
  const jobs = kinds.map((kind, index) => ({
    name: `${kind.split('-')[0]}-${index}`,
    kind: kind.split('-')[0],
    words: kind === 'bomb' ? BOMB : (OTHERS[kind] ?? LEAKS[kind.slice('leak-'.length)]),
    priority: priorities[index],
    protected: false,
    scoreAdj: random.chance(0.2) ? 300 : 0,
    freezer: `${kind.split('-')[0]}-${index}`,
  }));
  // Often what leaks is what should die, as in life; and sometimes it is the most important of all.
  if (random.chance(0.5)) {
    const lowest = jobs.reduce((least, job) => (job.priority < least.priority ? job : least));
    [jobs[0].priority, lowest.priority] = [lowest.priority, jobs[0].priority];
  }
  if (random.chance(0.25)) jobs[2].protected = true;
  const idle = { name: 'idle', kind: 'idle', words: IDLE, priority: 0, protected: false, scoreAdj: 0, freezer: 'idle' };
  if (!flat && random.chance(0.4)) jobs.push({ ...idle, scoreAdj: random.pick([0, 300]) });
  return jobs;
}

function freePriority(random, jobs) {
  return random.pick([5, 95].filter((priority) => jobs.every((job) => job.priority !== priority)));
}

/** Slow policies leave time for faults in the middle; a freeze and a raised limit are at stake when the handler ends. */
function drawPolicy(random, { jobs, dies, hazard }) {
  const freezes = dies && random.chance(0.6);
  const others = jobs.filter(({ kind }) => kind === 'service' || kind === 'holder').map(({ name }) => name);
  return {
    hazard: hazard ?? null,
    thinksMs: freezes || random.chance(0.7) ? random.whole(5, DEADLINES.respondWithin * 0.8) : 0,
    freezes: freezes ? random.some(others, random.whole(1, 2)) : [],
    raisesBy: freezes && random.chance(0.6) ? random.whole(1, 4) * MiB : 0,
    window: null,
  };
}

/** In words, for who reads of a failure. */
export function describe({ flat, jobs, policy, killHandler, memsw, faults }) {
  const job = ({ name, words, priority, protected: isProtected, scoreAdj, freezer }) =>
    `  ${name.padEnd(12)} priority ${priority}${isProtected ? ', protected' : ''}${scoreAdj ? `, oom_score_adj ${scoreAdj}` : ''}` +
    `${freezer === name ? '' : `, ${freezer ?? 'no'} freezer cgroup`}: ${words.join(' ')}`;
  const fault = ({ name, anchor, delayMs, parameters }) =>
    `  ${name}${anchor === undefined ? '' : `: ${delayMs} ms after '${anchor}'`} ${JSON.stringify(parameters)}`;
  return [
    `${flat ? 'processes in one memcg' : 'a memcg for each job'}${killHandler ? ', the guard kills the handler' : ''}${memsw ? ', swap is limited as well' : ''}`,
    ...jobs.map(job),
    `  policy ${JSON.stringify(policy)}`,
    ...faults.map(fault),
  ].join('\n');
}
