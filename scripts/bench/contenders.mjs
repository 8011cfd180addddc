// Who handles the out-of-memory condition: reprieve, a bare listener in C++, or the kernel.
import { fileURLToPath } from 'node:url';
import { Program } from './program.mjs';

const handler = fileURLToPath(new URL('handler.mjs', import.meta.url));

/** What a contender tells of an episode. `failure` says what is wrong with it. */
const NOTHING = { wokenAtUs: null, killedAtUs: null, faults: null, failure: null };

export const CONTENDERS = {
  reprieve: {
    start: (stage) => new Program(process.execPath, [handler, stage.path]),
    read({ id, outcome, timings, victims, faults }) {
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
      return { wokenAtUs, killedAtUs, faults: faults === null ? null : faults.minor + faults.major, failure };
    },
  },
  listener: {
    start: (stage, { listener }) =>
      new Program(listener, ['--memcg', stage.memcg, '--victim', stage.jobMemcg('leak'), '--realtime']),
    read: ({ wokenAtUs, killedAtUs }) => ({ ...NOTHING, wokenAtUs, killedAtUs }),
  },
  kernel: { start: () => null },
};

/** A contender at its stage: idle until the memcg is out of memory, alive from the first episode to the last. */
export class Contender {
  #read;
  #program = null;

  constructor(name, stage) {
    this.name = name;
    this.stage = stage;
    this.#read = CONTENDERS[name].read;
  }

  async start(tools) {
    this.#program = CONTENDERS[this.name].start(this.stage, tools);
    await this.#program?.line();
  }

  /** Drops accounts of episodes before. */
  forget() {
    this.#program?.forget();
  }

  /** Its account of the episode. */
  async account() {
    return this.#program === null ? NOTHING : this.#read(JSON.parse(await this.#program.line()));
  }

  async close() {
    await this.#program?.end(this.name === 'listener' ? 'SIGTERM' : undefined);
    await this.stage.close();
  }
}
