// What a guest boots from: a kernel of this machine, and an initrd with the modules that it needs for the host's root.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { cache } from '../cache.mjs';

const MODULES = ['virtio_pci', 'virtio_console', 'virtio_blk', '9pnet_virtio', '9p', 'overlay'];
const UNPACK = { '.xz': ['xz', '-dc'], '.zst': ['zstd', '-dc'], '.gz': ['gzip', '-dc'] };
const PACKED = [
  { magic: Buffer.from('fd377a585a00', 'hex'), program: ['xz', '--single-stream', '-dc'] },
  { magic: Buffer.from('28b52ffd', 'hex'), program: ['zstd', '-dc'] },
  { magic: Buffer.from('1f8b', 'hex'), program: ['gzip', '-dc'] },
];
/** The note of a kernel that a hypervisor may start directly: XEN_ELFNOTE_PHYS32_ENTRY, with 8 bytes of address. */
const PVH_NOTE = Buffer.from('040000000800000012000000', 'hex');
const BUSYBOX = '/bin/busybox';
const here = fileURLToPath(new URL('.', import.meta.url));

/** Debian's packages for what is missing here, as a sentence; null if virtual machines can be run. */
export function whatIsMissing({ systemd, kernel }) {
  if (process.arch !== 'x64') return 'virtual machines are run on x86-64 only';
  const program = (name) => (process.env.PATH ?? '').split(':').some((folder) => existsSync(join(folder, name)));
  const needs = {
    'qemu-system-x86': program('qemu-system-x86_64'),
    'busybox-static': existsSync(BUSYBOX),
    cpio: program('cpio'),
    'linux-image-amd64': kernel !== undefined || installedKernels().length > 0,
    systemd: !systemd || existsSync('/lib/systemd/systemd'),
  };
  const missing = Object.keys(needs).filter((name) => !needs[name]);
  return missing.length === 0 ? null : `not installed (Debian): ${missing.join(', ')}`;
}

/** Kernels that have their modules here, the newest first. */
function installedKernels() {
  return (existsSync('/boot') ? readdirSync('/boot') : [])
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
export function prepareBoot(image = installedKernels()[0]) {
  const bytes = readFileSync(image);
  if (bytes.toString('latin1', 0x202, 0x206) !== 'HdrS')
    throw new Error(`${image} is no kernel image (bzImage) for x86`);
  const modules = findModules(versionOf(bytes));
  const sources = ['init.sh', 'run.sh', ...readdirSync(join(here, 'units')).map((name) => `units/${name}`)];
  const state = (file) => `${file} ${statSync(file).size} ${statSync(file).mtimeMs}`;
  const texts = sources.flatMap((name) => [name, readFileSync(join(here, name))]);
  return {
    kernel: cached('vmlinux', [state(image)], (draft) => writeFileSync(draft, unpackKernel(bytes) ?? bytes)),
    initrd: cached('initrd', [...texts, ...[BUSYBOX, ...modules].map(state)], (draft) =>
      packInitrd(draft, sources, modules),
    ),
  };
}

/** A file of the cache, made where it is not there yet. */
function cached(name, parts, make) {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part).update('\0');
  const folder = join(cache, 'vm');
  mkdirSync(folder, { recursive: true });
  const file = join(folder, `${name}-${hash.digest('hex').slice(0, 16)}`);
  if (existsSync(file)) return file;
  const draft = `${file}.${process.pid}`; // another run may be doing the same
  try {
    make(draft);
    renameSync(draft, file);
  } finally {
    rmSync(draft, { force: true });
  }
  return file;
}

// Offsets in a kernel image: Documentation/arch/x86/boot.rst.

/** The version that an image says it has. */
function versionOf(image) {
  const start = 0x200 + image.readUInt16LE(0x20e);
  return /^\S*/.exec(image.toString('latin1', start, start + 128))[0];
}

/**
 * The kernel inside an image: an emulated processor takes longer to unpack it than to boot it.
 * @returns the ELF file; null if it is packed in a way not known here, or cannot be started without the image's own code
 */
function unpackKernel(image) {
  const start = (image[0x1f1] + 1) * 512 + image.readUInt32LE(0x248);
  const payload = image.subarray(start, start + image.readUInt32LE(0x24c));
  const unpack = PACKED.find(({ magic }) => payload.subarray(0, magic.length).equals(magic));
  if (unpack === undefined) return null;
  // The kernel's build adds the length to what its packer wrote: some packers take offence at the end of it.
  const { stdout } = spawnSync(unpack.program[0], unpack.program.slice(1), { input: payload, maxBuffer: 2 ** 30 });
  if (stdout?.length !== payload.readUInt32LE(payload.length - 4)) return null;
  return stdout.includes(PVH_NOTE) ? stdout : null;
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

function packInitrd(draft, sources, modules) {
  const tree = mkdtempSync(`${draft}-`);
  try {
    const folders = ['bin', 'modules', 'proc', 'sys', 'dev', 'lower', 'layer', 'root', 'checkout'];
    for (const name of folders) mkdirSync(join(tree, name));
    for (const name of sources) cpSync(join(here, name), join(tree, name));
    renameSync(join(tree, 'init.sh'), join(tree, 'init'));
    chmodSync(join(tree, 'init'), 0o755);
    cpSync(BUSYBOX, join(tree, 'bin/busybox'), { dereference: true });
    symlinkSync('busybox', join(tree, 'bin/sh'));

    // Not every insmod unpacks modules: they are plain in the initrd.
    const names = modules.map((file) => {
      const [, name, packing] = /([^/]*\.ko)(.*)$/.exec(file);
      writeFileSync(join(tree, 'modules', name), packing === '' ? readFileSync(file) : output(UNPACK[packing], file));
      return name;
    });
    writeFileSync(join(tree, 'modules/order'), names.map((name) => `${name}\n`).join(''));

    const paths = readdirSync(tree, { recursive: true }).sort();
    const words = ['cpio', '--create', '--format=newc', '--owner=0:0', '--quiet'];
    writeFileSync(draft, output(words, [], { cwd: tree, input: paths.join('\n') }));
  } finally {
    rmSync(tree, { recursive: true });
  }
}

function output([program, ...words], more, options) {
  const { error, status, stdout, stderr } = spawnSync(program, words.concat(more), { maxBuffer: 2 ** 28, ...options });
  if (status !== 0) throw new Error(`${program} failed: ${error?.message ?? stderr}`);
  return stdout;
}
