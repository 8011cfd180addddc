// The behaviour tests as one file that needs nothing but Node and what is built: a guest loads it in a second or two.
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { rolldown } from 'rolldown';
import { root } from '../cache.mjs';

const ENTRY = '\0entry';
const tests = join(root, 'test/behaviour');
const runner = join(root, 'test/support/runner.ts');
/** As deep below the root as the sources are, so that what they find by their own place is found from here as well. */
export const suite = join(root, 'build/behaviour/suite.mjs');

const plugin = {
  name: 'behaviour',
  resolveId(id) {
    if (id === ENTRY) return id;
    // What is built for everybody is used as it is: the tests use the public API, and little else of it.
    const source = /^\.\.\/\.\.\/src\/(.*)$/.exec(id);
    return source === null ? null : { id: `../../dist/${source[1]}`, external: true };
  },
  load(id) {
    if (id !== ENTRY) return null;
    const files = readdirSync(tests).filter((name) => name.endsWith('.test.ts'));
    const lines = files.map((name) => `import ${JSON.stringify(join(tests, name))};`);
    return `${lines.join('\n')}
      import { runAll } from ${JSON.stringify(runner)};
      const [only = '', list] = process.argv.slice(2);
      await runAll(new RegExp(only), list === '--list');`;
  },
};

/** Writes `suite` anew. */
export async function bundleSuite() {
  const bundle = await rolldown({
    input: ENTRY,
    cwd: root,
    platform: 'node',
    transform: { target: 'node20' },
    resolve: { alias: { vitest: runner } },
    plugins: [plugin],
  });
  await bundle.write({ file: suite, format: 'esm' });
  await bundle.close();
}
