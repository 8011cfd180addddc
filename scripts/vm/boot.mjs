// What a guest boots from: a kernel of this machine, and an initrd with the modules that it needs for the host's root.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  closeSync,
  cpSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { cache } from '../cache.mjs';

const MODULES = ['virtio_pci', 'virtio_console', 'virtio_blk', '9pnet_virtio', '9p', 'overlay'];
const UNPACK = { '.xz': ['xz', '-dc'], '.zst': ['zstd', '-dc'], '.gz': ['gzip', '-dc'] };
const BUSYBOX = '/bin/busybox';
const sources = fileURLToPath(new URL('.', import.meta.url));

/** Debian's packages for what is missing here, as a sentence; null if virtual machines can be run. */
export function whatIsMissing() {
  const program = (name) => (process.env.PATH ?? '').split(':').some((folder) => existsSync(join(folder, name)));
  const needs = {
    'qemu-system-x86': program('qemu-system-x86_64'),
    'busybox-static': existsSync(BUSYBOX),
    cpio: program('cpio'),
    'linux-image-amd64': installedKernels().length > 0,
  };
  if (process.arch !== 'x64') return 'virtual machines are run on x86-64 only';
  const missing = Object.keys(needs).filter((name) => !needs[name]);
  return missing.length === 0 ? null : `there is no ${missing.join(', ')} (Debian packages of these names)`;
}

/** Kernels that have their modules here, the newest first. */
function installedKernels() {
  return readdirSync('/boot')
    .filter((name) => name.startsWith('vmlinuz-'))
    .map((name) => name.slice('vmlinuz-'.length))
    .filter((version) => existsSync(`/lib/modules/${version}/modules.dep`))
    .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }))
    .map((version) => `/boot/vmlinuz-${version}`);
}

/**
 * @param image a kernel; without it, the newest that is installed
 * @returns {{ kernel: string, initrd: string }}
 */
export function prepareBoot(image) {
  const kernel = image ?? installedKernels()[0];
  const modules = findModules(versionOf(kernel));

  const hash = createHash('sha256');
  const files = ['init.sh', 'run.sh', ...readdirSync(`${sources}/units`).map((name) => `units/${name}`)];
  for (const file of files) hash.update(file).update(readFileSync(join(sources, file)));
  for (const file of [BUSYBOX, ...modules]) hash.update(`${file} ${statSync(file).size} ${statSync(file).mtimeMs}\n`);
  const folder = join(cache, 'vm');
  const initrd = join(folder, `${hash.digest('hex').slice(0, 16)}.cpio`);
  if (existsSync(initrd)) return { kernel, initrd };

  const draft = `${initrd}.${process.pid}`; // another run may be doing the same
  try {
    packInitrd(draft, files, modules);
    renameSync(`${draft}/packed`, initrd);
  } finally {
    rmSync(draft, { recursive: true, force: true });
  }
  return { kernel, initrd };
}

/** The version that a kernel image says it has: Documentation/arch/x86/boot.rst, kernel_version. */
function versionOf(image) {
  const head = Buffer.alloc(0x10000);
  const descriptor = openSync(image, 'r');
  readSync(descriptor, head, 0, head.length, 0);
  closeSync(descriptor);
  if (head.toString('latin1', 0x202, 0x206) !== 'HdrS')
    throw new Error(`${image} is no kernel image (bzImage) for x86`);
  const start = 0x200 + head.readUInt16LE(0x20e);
  return /^\S*/.exec(head.toString('latin1', start, start + 128))[0];
}

/** Files of the modules and of all they depend on, in the order of loading. None for a kernel that has no folder of them. */
function findModules(version) {
  const folder = `/lib/modules/${version}`;
  if (!existsSync(`${folder}/modules.dep`)) return [];
  const nameOf = (file) => /([^/]*)\.ko/.exec(file)[1].replaceAll('-', '_');
  const lines = readFileSync(`${folder}/modules.dep`, 'utf8').trim().split('\n');
  const dependencies = new Map(
    lines.map((line) => {
      const [file, rest] = line.split(':');
      return [nameOf(file), [...rest.trim().split(' ').filter(Boolean).reverse(), file]];
    }),
  );
  const builtIn = readFileSync(`${folder}/modules.builtin`, 'utf8').split('\n').filter(Boolean).map(nameOf);
  const found = MODULES.filter((name) => !builtIn.includes(name)).flatMap((name) => {
    const files = dependencies.get(name);
    if (files === undefined) throw new Error(`the kernel ${version} has no module ${name}`);
    return files;
  });
  return [...new Set(found)].map((file) => join(folder, file));
}

function packInitrd(draft, files, modules) {
  const tree = join(draft, 'tree');
  const folders = ['bin', 'modules', 'proc', 'sys', 'dev', 'lower', 'layer', 'root', 'checkout'];
  for (const name of folders) mkdirSync(join(tree, name), { recursive: true });
  for (const file of files) cpSync(join(sources, file), join(tree, file));
  renameSync(join(tree, 'init.sh'), join(tree, 'init'));
  chmodSync(join(tree, 'init'), 0o755);
  cpSync(BUSYBOX, join(tree, 'bin/busybox'), { dereference: true });
  output('ln', ['-s', 'busybox', join(tree, 'bin/sh')]);

  // Not every kernel's insmod unpacks: they are plain in the initrd, which nobody else has to unpack then either.
  const names = modules.map((file) => {
    const name = basename(file).replace(/\.ko.*/, '.ko');
    const [program, ...words] = UNPACK[/\.ko(.*)/.exec(file)[1]] ?? ['cat'];
    writeFileSync(join(tree, 'modules', name), output(program, [...words, file]));
    return name;
  });
  writeFileSync(join(tree, 'modules/order'), names.map((name) => `${name}\n`).join(''));

  const paths = readdirSync(tree, { recursive: true }).sort();
  const words = ['--create', '--format=newc', '--owner=0:0', '--quiet'];
  writeFileSync(join(draft, 'packed'), output('cpio', words, { cwd: tree, input: paths.join('\n') }));
}

function output(program, words, options) {
  const { error, status, stdout, stderr } = spawnSync(program, words, { maxBuffer: 2 ** 28, ...options });
  if (status !== 0) throw new Error(`${program} failed: ${error?.message ?? stderr}`);
  return stdout;
}
