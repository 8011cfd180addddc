// One virtual machine: starts QEMU, takes the command's output out of it, and sees to its end whatever happens.
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { accessSync, closeSync, constants, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** So much of the kernel's log is kept, to be shown if the machine fails. */
const LOG_CHARACTERS = 12_000;

/**
 * Boots a machine and runs a command in it.
 * @param {{ kernel: string, initrd: string }} boot
 * @param {{ memory: number, cpus: number, swap: number, psi: boolean, cgroup: 'v1' | 'v2' | 'none', systemd: boolean,
 *   timeout: number, checkout: string, command: string[], environment: Record<string, string> }} options memory and swap
 *   in bytes, timeout in seconds
 * @param {{ stdout: import('node:stream').Writable, stderr: import('node:stream').Writable, signal: AbortSignal }} outside
 *   where the command's output goes, and what ends the machine
 * @returns {Promise<{ code: number | null, failure: string | null, timedOut: boolean, log: string }>} the command's exit
 *   code, or why there is none, and the last of the kernel's log
 */
export async function runMachine(boot, options, { stdout, stderr, signal }) {
  const token = `reprieve-vm-${randomBytes(16).toString('hex')} `;
  const swap = options.swap > 0 ? unnamedFile(options.swap) : null;
  // If this process dies of whatever cause, QEMU does too.
  const words = ['--pdeathsig', 'KILL', 'qemu-system-x86_64', ...qemuWords(boot, options)];
  const pipes = Array(4).fill('pipe');
  const qemu = spawn('setpriv', words, { stdio: ['ignore', 'ignore', ...pipes, ...(swap === null ? [] : [swap])] });
  if (swap !== null) closeSync(swap);

  const ended = once(qemu, 'close');
  let stopped = null;
  const stop = (why) => {
    stopped ??= why;
    qemu.kill('SIGKILL');
  };
  const timer = setTimeout(stop, options.timeout * 1000, 'timeout');
  const abort = () => stop('signal');
  signal.addEventListener('abort', abort);
  try {
    const [, , complaints, log, out, err] = qemu.stdio;
    const tails = [complaints, log].map((stream) => tail(stream));
    out.on('error', () => {}); // of writing to one that is gone: its end tells more
    out.write(settings(options, token));
    const [code] = await Promise.all([copyUntil(token, out, stdout), copyUntil(token, err, stderr)]);
    if (code !== null) stop('done');
    const [status] = await ended;
    const [said, kernel] = await Promise.all(tails);
    const failure = code !== null ? null : whyEnded(stopped, options.timeout, status, said, kernel);
    return { code, failure, timedOut: stopped === 'timeout', log: kernel };
  } finally {
    stop('error');
    clearTimeout(timer);
    signal.removeEventListener('abort', abort);
  }
}

function qemuWords({ kernel, initrd }, { memory, cpus, swap, psi, cgroup, systemd }) {
  const append = ['console=ttyS0', 'quiet', 'tsc=reliable', 'panic=-1', `psi=${psi ? 1 : 0}`, 'swapaccount=1'];
  append.push('panic_print=32'); // also what was too unimportant for the console before
  if (cgroup === 'none') append.push('cgroup_disable=memory');
  if (systemd) append.push(`systemd.unified_cgroup_hierarchy=${cgroup === 'v1' ? 0 : 1}`, 'TERM=dumb');
  return [
    ...[
      '-accel',
      hasKvm() ? 'kvm' : 'tcg,thread=multi',
      '-cpu',
      hasKvm() ? 'max' : 'max,-erms',
      '-smp',
      cpus,
      '-m',
      `${memory / 2 ** 20}M`,
    ],
    ...['-nodefaults', '-no-user-config', '-no-reboot', '-display', 'none'],
    ...['-kernel', kernel, '-initrd', initrd, '-append', append.join(' ')],
    ...['-chardev', 'socket,id=log,fd=3', '-serial', 'chardev:log', '-device', 'virtio-serial-pci'],
    ...['-chardev', 'socket,id=out,fd=4', '-device', 'virtserialport,chardev=out,name=out'],
    ...['-chardev', 'socket,id=err,fd=5', '-device', 'virtserialport,chardev=err,name=err'],
    ...['-fsdev', 'local,id=root,path=/,security_model=none,readonly=on,multidevs=remap'],
    ...['-device', 'virtio-9p-pci,fsdev=root,mount_tag=root'],
    ...(swap > 0 ? ['-drive', 'if=virtio,file=/proc/self/fd/6,format=raw,cache=unsafe,discard=unmap'] : []),
  ].map(String);
}

/** Some machines have the device, and no processor that could run what is started with it: there QEMU would hang. */
function hasKvm() {
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
  } catch {
    return false;
  }
  return /^flags\s*:.*\b(vmx|svm)\b/m.test(readFileSync('/proc/cpuinfo', 'utf8'));
}

/** What init.sh and run.sh in the guest have to know, between two lines that are the same. */
function settings({ cgroup, swap, systemd, checkout, command, environment }, token) {
  const words = Object.entries(environment).map(([name, value]) => `${name}=${value}`);
  const lines = [
    `checkout=${quote(checkout)}`,
    `cgroup=${systemd ? 'systemd' : cgroup}`,
    `swap=${swap > 0 ? 'yes' : 'no'}`,
    `token=${quote(token)}`,
    // A session of its own, as a command has that a terminal or a service manager has started.
    `run_command() { cd ${quote(checkout)} && exec setsid env -i ${[...words, ...command].map(quote).join(' ')}; }`,
  ];
  return [`# ${token}`, ...lines, `# ${token}`, ''].join('\n');
}

function quote(word) {
  return `'${word.replaceAll("'", "'\\''")}'`;
}

/** A sparse file that is gone as soon as it is closed. */
function unnamedFile(bytes) {
  const folder = mkdtempSync(join(tmpdir(), 'reprieve-vm-'));
  try {
    const descriptor = openSync(join(folder, 'swap'), 'w+');
    ftruncateSync(descriptor, bytes);
    return descriptor;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/**
 * Copies what comes before the token.
 * @returns the number after the token; null if it never came
 */
async function copyUntil(token, source, sink) {
  let held = Buffer.alloc(0);
  for await (const chunk of untilReset(source)) {
    held = Buffer.concat([held, chunk]);
    const at = held.indexOf(token);
    const end = at === -1 ? -1 : held.indexOf('\n', at);
    const sure = at === -1 ? held.length - startOf(token, held) : at;
    await write(sink, held.subarray(0, sure));
    if (end !== -1) return Number(held.toString('latin1', at + token.length, end));
    held = held.subarray(sure);
  }
  await write(sink, held);
  return null;
}

/** How many bytes at the end of a text may be the start of the token. */
function startOf(token, held) {
  let length = Math.min(token.length - 1, held.length);
  while (!held.subarray(held.length - length).equals(Buffer.from(token.slice(0, length)))) length--;
  return length;
}

async function write(sink, bytes) {
  if (bytes.length > 0 && !sink.write(bytes)) await once(sink, 'drain');
}

/** A process that is killed before it has read all resets its sockets: an end like another. */
async function* untilReset(source) {
  try {
    yield* source;
  } catch (error) {
    if (error.code !== 'ECONNRESET') throw error;
  }
}

async function tail(source) {
  let text = '';
  for await (const chunk of untilReset(source)) text = (text + chunk.toString('latin1')).slice(-LOG_CHARACTERS);
  return text.replaceAll('\r', '');
}

function whyEnded(stopped, timeout, status, said, log) {
  if (stopped === 'timeout') return `it did not end within ${timeout} s and was killed`;
  if (stopped === 'signal') return 'it was killed on a signal';
  if (status !== 0) return `QEMU ended with ${status ?? 'a signal'}: ${said.trim()}`;
  const panic = /Kernel panic - not syncing: .*/.exec(log);
  return panic === null ? 'it was switched off before the command had ended' : panic[0];
}
