// What can go wrong: each fault, when it may be injected, and how. How an episode is judged does not depend on the fault,
// but for `help`: whether somebody is left who can act.

/** Moments of an episode that a fault follows by a random delay. */
const ANY = ['spawned', 'opened', 'ready', 'leak', 'held', 'policy', 'gone'];
const WATCHING = ['ready', 'leak', 'held', 'policy', 'gone'];
/** Up to and including the end. */
const WHOLE = [...ANY, 'closing'];

/** How long somebody stands still before he may go on. */
const stopFor = (random) => ({ goesOnAfterMs: random.whole(50, 1500) });
/** A guard sometimes until it is replaced. */
const stopGuardFor = (random) => ({ goesOnAfterMs: random.chance(0.4) ? 10_000 : random.whole(50, 1500) });

/**
 * By name: `of` what it happens to, `anchors`, `draw` its parameters, and either `inject(episode, parameters)`, or `policy`:
 * what the policy does instead of answering, or `scene`: it is there from the start.
 */
export const FAULTS = {
  none: { of: 'nobody', anchors: ['ready'], inject() {} },

  'handler-kill': { of: 'handler', anchors: WHOLE, inject: ({ handler }) => handler.kill('SIGKILL') },
  'handler-stop': {
    of: 'handler',
    anchors: WHOLE,
    draw: stopFor,
    inject: (episode, { goesOnAfterMs }) => episode.stop(episode.handler, goesOnAfterMs),
  },
  'handler-term': { of: 'handler', anchors: WHOLE, inject: ({ handler }) => handler.kill('SIGTERM') },
  'handler-abort': { of: 'handler', anchors: WHOLE, inject: ({ handler }) => handler.kill('SIGABRT') },
  'handler-exit': { of: 'handler', anchors: WATCHING, inject: ({ handler }) => handler.say('exit') },
  'handler-throw': { of: 'handler', anchors: WATCHING, inject: ({ handler }) => handler.say('throw') },
  'handler-heap': { of: 'handler', anchors: WATCHING, inject: ({ handler }) => handler.say('heap') },
  'handler-spin': { of: 'handler', anchors: WATCHING, inject: ({ handler }) => handler.say('spin') },
  'handler-files': {
    of: 'surroundings',
    anchors: ANY,
    draw: (random) => ({ spare: random.whole(0, 3) }),
    inject: ({ handler }, { spare }) => handler.limitFiles(spare),
  },

  'policy-busy': { of: 'handler', policy: 'busy' },
  'policy-stuck': { of: 'handler', policy: 'stuck' },
  'policy-slow': { of: 'policy', policy: 'slow' },
  'policy-throw': { of: 'policy', policy: 'throw' },
  'policy-reject': { of: 'policy', policy: 'reject' },
  'policy-never': { of: 'policy', policy: 'never' },

  'guard-kill': { of: 'guard', anchors: WATCHING, inject: ({ handler }) => handler.killGuard('SIGKILL') },
  'guard-stop': {
    of: 'guard',
    anchors: WATCHING,
    draw: stopGuardFor,
    inject: (episode, { goesOnAfterMs }) => episode.stopGuard(goesOnAfterMs),
  },
  'both-kill': { of: 'both', anchors: WATCHING, inject: ({ handler }) => handler.killBoth() },

  'memcg-removed': {
    of: 'memcg',
    anchors: WATCHING,
    draw: (random) => ({ remade: random.chance(0.5) }),
    inject: ({ stage }, { remade }) => stage.removeMemcg(remade),
  },
  'memcg-limit': {
    of: 'surroundings',
    anchors: ANY,
    draw: (random) => ({ by: random.pick([-8, -4, 4, 8, 16]) * 2 ** 20 }),
    inject: ({ stage }, { by }) => stage.changeLimit(by),
  },
  'memcg-killer': { of: 'memcg', anchors: WATCHING, inject: ({ stage }) => stage.writeKiller() },

  'jobs-added': { of: 'surroundings', anchors: ANY, inject: ({ stage }) => stage.addJob() },
  'jobs-exit': {
    of: 'surroundings',
    anchors: ANY,
    draw: (random) => ({ which: random.next(), remade: random.chance(0.5) }),
    inject: ({ stage }, { which, remade }) => stage.endJob(which, remade),
  },
  'pids-reused': {
    of: 'surroundings',
    anchors: ['gone'],
    draw: () => ({ shortly: true }),
    inject: ({ stage }) => stage.reusePids(),
  },
  'fork-bomb': { of: 'surroundings', scene: 'bomb' },

  'state-full': {
    of: 'surroundings',
    scene: 'mount',
    anchors: ['start', ...ANY],
    inject: ({ stage }) => stage.fillState(),
  },
  'state-readonly': {
    of: 'surroundings',
    scene: 'mount',
    anchors: ['start'],
    inject: ({ stage }) => stage.lockState(),
  },

  'clock-namespace': { of: 'surroundings', scene: 'time namespace' },
  'clock-step': {
    of: 'surroundings',
    wallClock: true,
    anchors: WATCHING,
    draw: (random) => ({ seconds: random.pick([-86_400, -60, 60, 86_400]) }),
    inject: ({ observer }, { seconds }) => observer.say(`clock ${seconds}`),
  },
};

/** After these it is the guard's turn, or the process's own end. */
export const HANDLER_FAULTS = Object.keys(FAULTS).filter((name) => ['handler', 'both'].includes(FAULTS[name].of));
