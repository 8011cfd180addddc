// Who handles the out-of-memory condition: reprieve, a bare listener in C++, or the kernel.
import { fileURLToPath } from 'node:url';
import { Program } from './program.mjs';

const handler = fileURLToPath(new URL('handler.mjs', import.meta.url));

/** What a contender tells of an episode. `failure` says what is wrong with it. */
const NOTHING = { wokenAtUs: null, killedAtUs: null, faults: null, failure: null };

/** @param args further ones of the handler's program */
export function reprieve(args = []) {
  return {
    start: (stage) => new Program(process.execPath, [handler, stage.path, ...args]),
    read({ id, outcome, timings, victims, faults, contextSwitches, collections }) {
      const wokenAtUs = Number(id.split('-')[1]);
      const failure =
        outcome !== 'cleared'
          ? `outcome ${outcome}`
          : victims.length === 0
            ? 'nobody killed'
            : victims.some(({ name }) => name !== 'leak')
              ? 'wrong victim'
              : null;
      const killedAtUs = timings.killedUs === null ? null : wokenAtUs + Math.round(timings.killedUs);
      const faultsInAll = faults === null ? null : faults.minor + faults.major;
      return { wokenAtUs, killedAtUs, faults: faultsInAll, contextSwitches, collections, failure };
    },
  };
}

export const CONTENDERS = {
  reprieve: reprieve(),
  listener: {
    start: (stage, { listener }) =>
      new Program(listener, ['--memcg', stage.memcg, '--victim', stage.jobMemcg('leak'), '--realtime']),
    read: ({ wokenAtUs, killedAtUs }) => ({ ...NOTHING, wokenAtUs, killedAtUs }),
  },
  kernel: { start: () => null },
};

/** A contender at its stage: idle until the memcg is out of memory, alive from the first episode to the last. */
export class Contender {
  #is;
  #program = null;

  constructor(name, stage, is = CONTENDERS[name]) {
    this.name = name;
    this.stage = stage;
    this.#is = is;
  }

  async start(tools) {
    this.#program = this.#is.start(this.stage, tools);
    await this.#program?.line();
  }

  /** Drops accounts of episodes before. */
  forget() {
    this.#program?.forget();
  }

  /** Its account of the episode. */
  async account() {
    return this.#program === null ? NOTHING : this.#is.read(JSON.parse(await this.#program.line()));
  }

  async close() {
    await this.#program?.end(this.name === 'listener' ? 'SIGTERM' : undefined);
    await this.stage.close();
  }
}
