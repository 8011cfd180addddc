// The handler of an episode, in a process of its own: watches the memcg, obeys lines on stdin, and says in lines of JSON
// what happens. Its options are one argument of JSON. It writes without buffering: what it said before it died is there.
import { readdirSync, readlinkSync, writeSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { lowestPriority, OomHandler } from '../../dist/index.js';
import { workloadPath } from '../../dist/native.js';
import { openGround } from '../../dist/self/ground.js';

const options = JSON.parse(process.argv[2]);

function say(event, more = {}) {
  writeSync(1, `${JSON.stringify({ event, atUs: Number(process.hrtime.bigint() / 1000n), ...more })}\n`);
}

/** What its descriptors are of. */
const openFiles = () =>
  readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/self/fd/${fd}`)];
    } catch {
      return []; // the listing's own
    }
  });

/** An endless loop, as a mistake in a program makes it. */
function spin(ms = Number.POSITIVE_INFINITY) {
  const end = performance.now() + ms;
  while (performance.now() < end);
}

const COMMANDS = {
  close: () => close(),
  exit: () => process.exit(3),
  throw: () => {
    throw new Error('chaos');
  },
  spin,
  heap: () => {
    for (const kept = []; ; ) kept.push(new Array(1e5).fill(kept.length + 0.5));
  },
};
createInterface({ input: process.stdin })
  .on('line', (line) => COMMANDS[line]?.())
  .on('close', () => close());

const filesBefore = openFiles();
let closing = null;
let handler = null;
function close() {
  closing ??= (async () => {
    await handler?.close();
    const left = openFiles();
    for (const file of filesBefore) if (left.includes(file)) left.splice(left.indexOf(file), 1);
    say('closed', { left });
    process.exit(0);
  })().catch((error) => {
    say('failed', {
      message: `close: ${error.message}: ${(error.errors ?? []).map(({ message }) => message).join('; ')}`,
    });
    process.exit(4);
  });
  return closing;
}

const { deadlines, guard, stateDirectory, path, jobs, policy } = options;
const ground = await openGround({ reserve: policy?.window?.reserve ?? '1MiB', guard, stateDirectory });
handler = OomHandler.over(ground);
handler.on('report', ({ outcome, victims, rungs, steps, windows }) => {
  say('report', {
    outcome,
    rungs,
    victims: victims.map(({ name, pids }) => ({ name, pids })),
    last: steps.at(-1)?.text,
    why: steps.find(({ text }) => /handleWithin|maxVictims/.test(text))?.text,
    windows,
  });
});
handler.on('warning', (message) => say('warning', { message }));
handler.on('alarm', (message) => say('alarm', { message }));
handler.on('vanished', () => say('vanished'));
handler.on('revoked', (reason) => {
  say('revoked', { reason });
  close();
});
handler.on('guard', (told) => say('guard', { told }));
say('opened', { guard: handler.guard?.pid ?? null });

if (path === undefined) {
  // The start after one that died: opening is what puts things back.
  await close();
} else {
  await handler.watch(`memcg:${path}`, { ...deadlines, policy: decide, jobs });
  say('ready');
}

function decide(snapshot, { reserve }) {
  say('policy');
  return policy.window === null ? answer(snapshot) : answerInWindow(snapshot, reserve);
}

let forgot = false;

/** Answers as it would without, or what is drawn, with a window open or after it. */
async function answerInWindow(snapshot, reserve) {
  const { bytes, stopWithin, children, openMs, end } = policy.window;
  let window;
  try {
    window = await reserve.overcharge(bytes, { stopWithin });
  } catch ({ code, message }) {
    say('window refused', { code, message });
    return answer(snapshot);
  }
  say('window', { bytes });
  for (const words of children) {
    try {
      const child = window.spawn(workloadPath(), [...words, '--outlive-parent', '--timeout', '30s'], {
        stdio: 'ignore',
      });
      child.on('error', ({ message }) => say('refused', { message }));
    } catch ({ message }) {
      say('refused', { message });
    }
  }
  await sleep(openMs);
  say('window ends', { end, charged: window.charged });
  if (policy.hazard !== null) return answer(snapshot);
  if (end === 'close') await window.close();
  if (end === 'throw') throw new Error('chaos');
  if (end === 'never') return new Promise(() => {});
  if (end === 'wait' && !forgot) {
    forgot = true;
    return { action: 'wait', ms: 20, because: 'its window is forgotten' };
  }
  return answer(snapshot);
}

function answer(snapshot) {
  switch (policy.hazard) {
    case 'busy':
      return policy.freezes.length > 0 ? think(snapshot) : spin();
    case 'slow':
      spin(2 * deadlines.respondWithin);
      break;
    case 'throw':
      throw new Error('chaos');
    case 'reject':
      return Promise.reject(new Error('chaos'));
    case 'never':
      return new Promise(() => {});
    case 'stuck':
      // The event loop turns, but nothing comes of it: no deadline of the ladder ever fires.
      ground.hierarchy.clock.after = () => () => {};
      setInterval(() => ground.guard?.epoch.beat(), 20);
      return new Promise(() => {});
  }
  return policy.thinksMs > 0 ? think(snapshot) : lowestPriority(snapshot);
}

/** Holds others still meanwhile and lends some memory, both through the ledger as a method of the library would. */
async function think(snapshot) {
  const ledger = ground.files;
  const attempt = (run) => {
    try {
      run();
      return true;
    } catch (error) {
      say('refused', { message: error.message });
      return false;
    }
  };
  const frozen = policy.freezes.filter((name) =>
    attempt(() => ledger?.change?.('freezer', `${path}/${name}`, 'freezer.state', 'FROZEN')),
  );
  const raised =
    policy.raisesBy > 0 &&
    attempt(() => ledger?.change?.('memory', path, 'memory.limit_in_bytes', String(options.limit + policy.raisesBy)));
  const lower = () => attempt(() => ledger?.putBack?.('memory', path, 'memory.limit_in_bytes'));
  if (policy.hazard === 'busy') spin();
  await sleep(policy.thinksMs);
  for (const name of frozen) attempt(() => ledger?.putBack?.('freezer', `${path}/${name}`, 'freezer.state'));
  // What was lent may be in use: then it is lowered when the condition is over.
  if (raised && !lower()) handler.once('report', lower);
  return lowestPriority(snapshot);
}
