// Stands in for vitest where the behaviour tests are bundled for a guest: an emulated machine takes a minute to load vitest
// itself. It has what those tests use of it, and vitest's own assertions. The results are printed as JSON.
import { setTimeout as sleep } from 'node:timers/promises';
import { ASYMMETRIC_MATCHERS_OBJECT, chai, JestAsymmetricMatchers, JestChaiExpect, JestExtend } from '@vitest/expect';

type Step = () => unknown;

interface Registered {
  title: string;
  skip: boolean;
  meta: { behaviour?: { id: string } };
  run: Step;
  after: Step[];
}

interface Options {
  meta?: Registered['meta'];
}

const LIMIT_MS = 60_000;

const tests: Registered[] = [];
/** Of the suites that are being described. */
let after: Step[] = [];
let whenFailed: Step[] = [];
let whenFinished: Step[] = [];

chai.use(JestExtend);
chai.use(JestChaiExpect);
chai.use(JestAsymmetricMatchers);
export const expect = Object.assign((value: unknown, message?: string) => chai.expect(value, message), chai.expect);
Object.assign(expect, Reflect.get(globalThis, ASYMMETRIC_MATCHERS_OBJECT));

function register(skip: boolean) {
  return (title: string, options: Options | Step, run?: Step) => {
    const meta = typeof options === 'function' ? {} : (options.meta ?? {});
    tests.push({ title, skip, meta, run: run ?? (options as Step), after: [...after] });
  };
}

export const test = Object.assign(register(false), { skipIf: register });

export function describe(_: string, body: Step): void {
  const outer = after;
  after = [...outer];
  body();
  after = outer;
}
describe.skipIf = (skip: boolean) => (name: string, body: Step) => skip || describe(name, body);

export const afterEach = (step: Step) => after.push(step);
/** What is to be done after all was done after each. */
export const afterAll = (_: Step) => {};
export const onTestFailed = (step: Step) => whenFailed.push(step);
export const onTestFinished = (step: Step) => whenFinished.push(step);

async function attempt(step: Step): Promise<string | null> {
  try {
    await step();
    return null;
  } catch (error) {
    return error instanceof Error ? `${error.stack ?? error.message}` : String(error);
  }
}

/** The first failure of a test and of what comes after it, or null. */
async function failureOf({ run, after }: Registered): Promise<string | null> {
  [whenFailed, whenFinished] = [[], []];
  const late = new AbortController();
  const timeout = sleep(LIMIT_MS, undefined, { signal: late.signal }).then(
    () => Promise.reject(new Error(`not within ${LIMIT_MS} ms`)),
    () => {},
  );
  let failure = await attempt(() => Promise.race([(async () => run())(), timeout]));
  late.abort();
  if (failure !== null) for (const step of whenFailed) await attempt(step);
  for (const step of [...whenFinished, ...after]) failure = (await attempt(step)) ?? failure;
  return failure;
}

/**
 * Runs what was registered, one test after the other.
 * @param only part of the ids of the behaviours that are run
 * @param list only says what there is
 */
export async function runAll(only: RegExp, list: boolean): Promise<void> {
  const print = console.log;
  console.log = console.error; // the results alone go to where they are read
  const results: object[] = [];
  for (const test of tests) {
    const { behaviour } = test.meta;
    if (list || !only.test(behaviour?.id ?? test.title)) {
      if (list) results.push({ ...behaviour });
      continue;
    }
    const began = performance.now();
    const failure = test.skip ? null : await failureOf(test);
    const ms = Math.round(performance.now() - began);
    const status = test.skip ? 'skipped' : failure === null ? 'passed' : 'failed';
    console.error(`${status} (${ms} ms): ${behaviour?.id}: ${test.title}${failure === null ? '' : `\n${failure}`}`);
    results.push({ ...behaviour, status, ms, ...(failure === null ? {} : { failure }) });
  }
  print(JSON.stringify(results));
  process.exitCode = results.some((result) => 'failure' in result) ? 1 : 0;
}
