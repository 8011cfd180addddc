// The handlers that take their turn. `words` start it in a cgroup of its own; `ready` is what it prints when it watches;
// `prepare` says what the machine's owner does to the jobs' cgroups and processes beforehand.
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { HIERARCHY } from './scenario.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const config = (name) => join(here, 'config', name);

/** The words of a file as of /etc/default/earlyoom, without the shell's quotes. */
function earlyoomWords() {
  const line = readFileSync(config('earlyoom'), 'utf8').match(/^EARLYOOM_ARGS="(.*)"$/m)[1];
  return [...line.matchAll(/'([^']*)'|(\S+)/g)].map(([, quoted, plain]) => quoted ?? plain);
}

const oomd = (file) => ['oomd', '--interval', '1', '--config', config(file), '--cgroup-fs', HIERARCHY];

export const HANDLERS = {
  none: { title: "the kernel's killer" },
  prepared: {
    title: 'the same, prepared (`oom_score_adj` 1000, `memory.oom.group`)',
    prepare: (stage) => {
      stage.write('leak', 'memory.oom.group', '1');
      stage.oomScoreAdj = 1000;
    },
  },
  earlyoom: {
    title: "earlyoom, Debian's default",
    needs: 'earlyoom',
    words: () => ['earlyoom', '-r', '3600'],
    ready: /^mem avail/m,
  },
  'earlyoom-set': {
    title: 'earlyoom, configured',
    needs: 'earlyoom',
    words: () => ['earlyoom', ...earlyoomWords()],
    ready: /^mem avail/m,
  },
  nohang: {
    title: 'nohang, default',
    needs: 'nohang',
    words: () => ['nohang', '--monitor', '--config', '/etc/nohang/nohang.conf'],
    ready: /Monitoring has started/,
  },
  'nohang-set': {
    title: 'nohang, configured',
    needs: 'nohang',
    words: () => ['nohang', '--monitor', '--config', config('nohang.conf')],
    ready: /Monitoring has started/,
  },
  oomd: {
    title: "oomd, Debian's default rules on /bench",
    needs: 'oomd',
    words: () => oomd('oomd-default.json'),
    ready: /oomd running/i,
  },
  'oomd-set': {
    title: 'oomd, configured',
    needs: 'oomd',
    words: () => oomd('oomd.json'),
    ready: /oomd running/i,
    prepare: (stage) => {
      stage.setAttribute('leak', 'trusted.oomd_prefer', '1');
      stage.setAttribute('service', 'trusted.oomd_avoid', '1');
    },
  },
  reprieve: {
    title: 'reprieve',
    words: () => [process.execPath, join(here, 'reprieve.mjs')],
    ready: /^watching/m,
  },
};
