/**
 * The addon: its interface, and the only place that loads it.
 *
 * Everything that fails in the kernel throws an `Error` that carries `errno` (positive), `code`
 * (`'ENOENT'`), `syscall` and `path`, in the manner of Node's own system errors.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { ReprieveError } from './errors.js';

/** A directory held by a descriptor; everything below is opened beneath it (openat2(2)). */
export interface Directory {
  /** Inode number: a memcg that is removed and made anew has another. */
  readonly inode: number;
  /** Owner of the directory, as a user id. */
  readonly uid: number;
  /** Magic number of the file system (statfs(2)). */
  readonly fsType: number;
  readonly descriptor: number;
  /** Opens a directory below; refuses `..`, symbolic links and other file systems. */
  openBeneath(relative: string): Directory;
  /** Names of the directories directly below. */
  subdirectories(): string[];
  /** Opens a file below and keeps it open. */
  openFile(name: string, mode: 'read' | 'write' | 'readwrite'): ControlFile;
  /** Reads a file below, opened anew. */
  readFile(name: string): string;
  /** Writes a file below, opened anew, in one write(2). */
  writeFile(name: string, text: string): void;
  makeDirectory(name: string): void;
  removeDirectory(name: string): void;
  /** An extended attribute of the directory, or null when there is none. */
  getAttribute(name: string): string | null;
  /** Claims the directory (flock(2)) as long as this is open; false while another open of it has the claim. */
  claim(): boolean;
  unclaim(): void;
  close(): void;
}

/** A control file that stays open and is read anew by pread(2) at 0. */
export interface ControlFile {
  readText(): string;
  /** The whole file as one decimal number. */
  readNumber(): number;
  /** Fields of a flat keyed file ("key value" lines; "Key: value kB" gives bytes) into `out`; a missing key gives NaN. */
  readFields(keys: readonly string[], out: Float64Array): void;
  write(text: string): void;
  close(): void;
}

/** A process known by a pidfd (pidfd_open(2)). */
export interface Pidfd {
  readonly pid: number;
  /** True once the process has exited (the descriptor polls readable). */
  exited(): boolean;
  /** False when the process is gone (ESRCH). */
  signal(signal: number): boolean;
  close(): void;
}

/** What happened to one directory that is listened to (inotify(7)). */
interface DirectoryEvent {
  /** The token that `watchDirectory` gave; -1 with `overflow`. */
  token: number;
  /** Name of the entry below; empty when the directory itself is meant. */
  name: string;
  created: boolean;
  removed: boolean;
  /** Attributes, extended ones too, of the entry or of the directory itself. */
  attributes: boolean;
  /** The kernel's queue overflowed: scan everything. */
  overflow: boolean;
}

/** One epoll set, hung on the event loop by one poll handle. */
export interface EventSet {
  /**
   * Registers a new eventfd at a v1 `cgroup.event_control`: writes "<eventfd> <control fd> <argument>".
   * `file` is the control file ("memory.oom_control"), `argument` may be ''.
   */
  addCgroupEvent(directory: Directory, file: string, argument: string): number;
  /**
   * Tells when the kernel notifies `name` of a v2 cgroup: "memory.events", "memory.events.local" or "cgroup.events". What
   * was there before does not count. The removal of the cgroup is not told reliably, and at most once.
   */
  watchFile(directory: Directory, name: string): number;
  /** Listens to creation, removal and attribute changes below a directory. */
  watchDirectory(directory: Directory): number;
  /** Events of watched directories that wait to be read; never blocks. */
  readDirectoryEvents(): DirectoryEvent[];
  /** Makes the eventfd of a token ready, as the kernel does: for a drill. */
  trigger(token: number): void;
  /** Forgets a token and closes what belongs to it. Unknown tokens are ignored. */
  remove(token: number): void;
  /** Number of descriptors in the set. */
  readonly size: number;
  /** Keeps the event loop alive (default) or not. */
  ref(): void;
  unref(): void;
  close(): void;
}

/** A trigger of pressure stall information (PSI), polled by the event loop itself. */
interface PressureTrigger {
  /** Keeps the event loop alive (default, until the cgroup is removed) or not. */
  ref(): void;
  unref(): void;
  close(): void;
}

/** The processes of one victim: signalled by pidfd, watched until they are gone. */
export interface Killer {
  /** The token under which the event set tells that members exited. */
  readonly token: number;
  /**
   * One round: reads `file` ("cgroup.procs") of each directory anew, opens a pidfd for each process that is not
   * known yet, reads again and sends SIGKILL to those still listed. Who is kept is signalled without the second
   * reading. Returns how many were signalled now.
   * A directory that is gone counts as empty. Never signals the calling process.
   */
  round(directories: readonly Directory[], file: string): number;
  /** Signals one process by its pidfd (duplicated); returns 1, or 0 if it was gone or is known already. */
  signal(pidfd: Pidfd): number;
  /** Every process signalled so far. */
  readonly pids: number[];
  /** How many of them have not exited yet. */
  alive(): number;
  /** Processes listed by the last round that could not be signalled (another pid namespace, EPERM). */
  readonly unreachable: number;
  /** process_mrelease(2) on all that have not exited: [reaped, refused]. */
  release(): [number, number];
  close(): void;
}

/** Descriptors of processes that may have to be killed, opened before that is needed. */
interface KeptPidfds {
  /**
   * From now on those of these processes, by number; what is held of them stays. Whom no descriptor can be had of is left
   * out. Returns how many there are.
   */
  keep(pids: Int32Array): number;
  close(): void;
}

/** A page that a handler and its guard both have mapped (memfd_create(2)). */
export interface SharedWords {
  readonly buffer: ArrayBuffer;
  readonly descriptor: number;
  /** Nobody else will be given the descriptor; the memory stays. */
  close(): void;
}

/** One end of a SOCK_SEQPACKET pair: whole messages, with descriptors. Never blocks. */
export interface Channel {
  /** The token under which the event set tells that messages wait. */
  readonly token: number;
  /** The descriptor of the other end, for a child process. */
  readonly peer: number;
  closePeer(): void;
  /** Fails with EAGAIN while the peer does not read, with EPIPE when it is gone. */
  send(message: Uint8Array, descriptors: readonly (Directory | Pidfd)[]): void;
  /** The next message; empty when the peer is gone, null when none waits. */
  receive(): Uint8Array | null;
  close(): void;
}

/** Memory that is mapped, locked and resident from the start. */
export interface Arena {
  readonly buffer: ArrayBuffer;
  /** Bytes resident now, by mincore(2). */
  residentBytes(): number;
  /** munlock and munmap; `buffer` is detached. */
  close(): void;
}

export interface NativeBinding {
  Directory: new (path: string) => Directory;
  Pidfd: new (pid: number) => Pidfd;
  /**
   * `onReady` gets how many tokens of `ready` are valid, and the time of the wake-up (see `nowUs`). The directory
   * listener's token is 0: call `readDirectoryEvents`.
   */
  EventSet: new (
    ready: Int32Array,
    onReady: (count: number, atUs: number) => void,
  ) => EventSet;
  /**
   * `trigger` is "some|full <stall µs> <window µs>", `name` "memory" of /proc/pressure or "memory.pressure" of a v2 cgroup;
   * `onEvent` gets the time of the wake-up (see `nowUs`), at most once a window, and never again when the cgroup is removed.
   * EINVAL for a window that is not allowed: 500 ms to 10 s, without CAP_SYS_RESOURCE in steps of 2 s. EOPNOTSUPP without PSI.
   */
  PressureTrigger: new (
    directory: Directory,
    name: string,
    trigger: string,
    onEvent: (atUs: number) => void,
  ) => PressureTrigger;
  /**
   * `dry` goes the same way, but sends signal 0: for a drill. Nobody is signalled once `words` are revoked: ECANCELED.
   * `kept` spares opening who is in it.
   */
  Killer: new (
    events: EventSet,
    dry?: boolean,
    words?: SharedWords,
    kept?: KeptPidfds,
  ) => Killer;
  KeptPidfds: new () => KeptPidfds;
  SharedWords: new () => SharedWords;
  Channel: new (events: EventSet) => Channel;
  Arena: new (bytes: number) => Arena;
  /** CLOCK_MONOTONIC in microseconds. */
  nowUs(): number;
  /**
   * What held the calling thread up so far, into `out`: minor and major page faults, voluntary and involuntary context
   * switches (getrusage(2)).
   */
  readThreadUsage(out: Float64Array): void;
  /** Has malloc keep 1 MiB at hand beyond what it needs, for good; glibc only (mallopt(3)). */
  padMalloc(): void;
  /**
   * Faults in what is mapped for writing and not there yet, in bytes, malloc's heap and mappings of up to 2 MiB; EINVAL before
   * Linux 5.14 (MADV_POPULATE_WRITE).
   */
  populate(): number;
  /** Raises the calling thread: 'realtime' is SCHED_RR 1 (not inherited by children), 'nice' is nice -20. */
  raiseScheduling(to: 'realtime' | 'nice'): void;
  /** Back to what the thread had before the first raise. */
  restoreScheduling(): void;
  /** mlock2(MLOCK_ONFAULT) of the mapped files' pages (program text and data of libraries); V8's heap is left out. */
  lockText(): { bytes: number; failed: number };
  /** Undoes lockText. */
  unlockText(): void;
  /** The errno that process_mrelease(2) gives on ourselves: EINVAL where it exists, ENOSYS where not. */
  probeRelease(): number;
}

const require = createRequire(import.meta.url);
const packageRoot = fileURLToPath(new URL('..', import.meta.url));
let loaded: NativeBinding | undefined;

/** C library of the running Node, as prebuilt binaries are named after it. */
function libc(): string {
  const { header } = process.report.getReport() as { header: { glibcVersionRuntime?: string } };
  return header.glibcVersionRuntime === undefined ? 'musl' : 'glibc';
}

/**
 * Where what is compiled can be: a build of one's own, such as one with sanitizers, where the environment names its folder;
 * the package's prebuilt binaries if they fit; else a local build.
 */
function binaryPlaces(name: string): string[] {
  const own = process.env.REPRIEVE_NATIVE_DIRECTORY;
  const before = own ? [`${own}/${name}`] : [];
  return [
    ...before,
    `${packageRoot}prebuilds/${process.platform}-${process.arch}-${libc()}/${name}`,
    `${packageRoot}build/Release/${name}`,
  ];
}

/** The program that the demo's jobs run. @throws ReprieveError ERR_REPRIEVE_NATIVE_MISSING */
export function workloadPath(): string {
  return programPath('reprieve-workload', 'The workload program');
}

/** The guard's program. @throws ReprieveError ERR_REPRIEVE_NATIVE_MISSING */
export function guardPath(): string {
  return programPath('reprieve-guard', 'The guard');
}

function programPath(name: string, what: string): string {
  const places = binaryPlaces(name);
  const found = places.find((path) => existsSync(path));
  if (found !== undefined) return found;
  throw missing(
    what,
    places.map((path) => `${path}: not there`),
  );
}

function missing(what: string, tried: string[]): ReprieveError {
  return new ReprieveError(
    'ERR_REPRIEVE_NATIVE_MISSING',
    `${what} of reprieve does not load. Build it with: node ${packageRoot}scripts/install.mjs --from-source\n` +
      `Looked for:\n${tried.map((line) => `  ${line}`).join('\n')}`,
  );
}

/**
 * The addon, loaded at the first call.
 * @throws ReprieveError ERR_REPRIEVE_NATIVE_MISSING with everything that was looked for
 */
export function native(): NativeBinding {
  if (loaded !== undefined) return loaded;
  const tried: string[] = [];
  for (const path of binaryPlaces('reprieve.node')) {
    if (!existsSync(path)) {
      tried.push(`${path}: not there`);
      continue;
    }
    try {
      loaded = require(path) as NativeBinding;
      return loaded;
    } catch (error) {
      tried.push(`${path}: ${(error as Error).message}`);
    }
  }
  throw missing('The native addon', tried);
}
