#!/usr/bin/env node
// Runs a command in a virtual machine that has this machine's files, and a kernel and memory of its own. See docs/vm.md.
import { constants } from 'node:os';
import { parseArgs } from 'node:util';
import { bytesOf } from '../dist/units.js';
import { root } from './cache.mjs';
import { prepareBoot, whatIsMissing } from './vm/boot.mjs';
import { runMachine } from './vm/machine.mjs';

const USAGE = `Usage: node scripts/vm.mjs [options] -- COMMAND ARGUMENT…

  --memory SIZE       of the guest, what is written to its files included (2GiB)
  --cpus N            processors (2)
  --swap SIZE         a swap device of that size (0)
  --cgroup KIND       v1, v2, or none: v2 without the memory controller (v2)
  --psi on|off        pressure stall information (on)
  --systemd           with systemd as the first process; it mounts the cgroups
  --kernel IMAGE      another kernel than the newest that is installed
  --env NAME=VALUE    for the command; may be given several times
  --timeout SECONDS   after which the machine is killed (600)
  --check             only tell what is missing here, if anything is
  --help              print this

Exit code: the command's; 124 after the timeout; 125 if there was no machine, or it ended before the command did.`;
const FAILED = 125;
const TIMED_OUT = 124;

function parse(words) {
  const split = words.indexOf('--');
  const { values } = parseArgs({
    args: split === -1 ? words : words.slice(0, split),
    options: {
      memory: { type: 'string', default: '2GiB' },
      cpus: { type: 'string', default: '2' },
      swap: { type: 'string', default: '0' },
      cgroup: { type: 'string', default: 'v2' },
      psi: { type: 'string', default: 'on' },
      systemd: { type: 'boolean', default: false },
      kernel: { type: 'string' },
      env: { type: 'string', multiple: true, default: [] },
      timeout: { type: 'string', default: '600' },
      check: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  const command = split === -1 ? [] : words.slice(split + 1);
  if (values.help || values.check) return values;
  if (command.length === 0) throw expected('the command', 'a program and its arguments after --', command);
  return {
    kernel: values.kernel,
    memory: pagesOf(values.memory, '--memory', 128),
    swap: pagesOf(values.swap, '--swap', 0),
    cpus: wholeNumber(values.cpus, '--cpus', 64),
    timeout: wholeNumber(values.timeout, '--timeout', 86_400),
    cgroup: oneOf(values.cgroup, '--cgroup', ['v1', 'v2', 'none']),
    psi: oneOf(values.psi, '--psi', ['on', 'off']) === 'on',
    systemd: values.systemd,
    environment: environment(values.env),
    checkout: root,
    command,
  };
}

function expected(what, kind, got) {
  return new Error(`Expected ${what} to be ${kind}, got ${JSON.stringify(got)}`);
}

/** QEMU gives memory in MiB. */
function pagesOf(size, option, least) {
  const bytes = bytesOf(size, option);
  if (bytes % 2 ** 20 !== 0 || bytes < least * 2 ** 20) throw expected(option, `whole MiB, ${least} or more`, size);
  return bytes;
}

function wholeNumber(text, option, most) {
  const number = Number(text);
  if (!Number.isInteger(number) || number < 1 || number > most) {
    throw expected(option, `a whole number from 1 to ${most}`, text);
  }
  return number;
}

function oneOf(word, option, words) {
  if (!words.includes(word)) throw expected(option, words.join(', ').replace(/, (?!.*,)/, ' or '), word);
  return word;
}

function environment(pairs) {
  const { PATH, HOME } = process.env;
  const variables = {
    PATH: PATH ?? '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
    HOME: HOME ?? '/root',
  };
  for (const pair of pairs) {
    const match = /^([A-Za-z_]\w*)=(.*)$/s.exec(pair);
    if (match === null) throw expected('--env', 'NAME=VALUE', pair);
    variables[match[1]] = match[2];
  }
  return variables;
}

async function main() {
  const options = parse(process.argv.slice(2));
  if (options.help) {
    process.stdout.write(`${USAGE}\n`);
    return 0;
  }
  const missing = whatIsMissing(options);
  if (missing !== null) throw new Error(missing);
  if (options.check) return 0;

  const ending = new AbortController();
  let signalled = null;
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
    process.once(name, () => {
      signalled ??= name;
      ending.abort();
    });
  }
  // Nobody reads any more, as after head(1): nothing to go on for.
  for (const stream of [process.stdout, process.stderr]) stream.on('error', () => ending.abort());

  const outside = { stdout: process.stdout, stderr: process.stderr, signal: ending.signal };
  const { code, failure, timedOut, log } = await runMachine(prepareBoot(options.kernel), options, outside);
  if (failure === null) return code;
  if (signalled !== null) return 128 + constants.signals[signalled];
  process.stderr.write(`\n${log.trimEnd()}\n\nvirtual machine: ${failure}\n`);
  return timedOut ? TIMED_OUT : FAILED;
}

try {
  process.exitCode = await main();
} catch (error) {
  process.stderr.write(`virtual machine: ${error.message}\n`);
  process.exitCode = FAILED;
}
