/** Every error code of reprieve and what it means. The error page of the docs is made from this table. */
export const ERROR_CODES = {
  ERR_REPRIEVE_ALREADY_WATCHED: 'The scope is watched already by a handler, of this process or another.',
  ERR_REPRIEVE_CLOSED: 'The handler, the watch or the native object was closed before.',
  ERR_REPRIEVE_CONDITION_CLOSED: 'The condition has ended; nothing can be done on it any more.',
  ERR_REPRIEVE_GUARD: 'The guard could not be started, does not answer, or cannot guard a memcg.',
  ERR_REPRIEVE_INSIDE_SCOPE:
    'The handler itself is inside the memcg that it should watch, with no way out of it, and no guard outside.',
  ERR_REPRIEVE_INVALID_ARGUMENT: 'An argument or an option has a wrong type or is out of its range.',
  ERR_REPRIEVE_INVALID_SCOPE:
    'The scope is neither "memcg:/path" nor "system", escapes the hierarchy, or names the root memcg.',
  ERR_REPRIEVE_MAX_VICTIMS: 'The condition has cost as many jobs as `maxVictims` allows.',
  ERR_REPRIEVE_NATIVE_MISSING: 'The native addon is not there or does not load.',
  ERR_REPRIEVE_NOT_A_MEMCG: 'There is no memory cgroup at that path.',
  ERR_REPRIEVE_NOT_A_VICTIM: 'The job is not in the snapshot, is protected, or was killed already.',
  ERR_REPRIEVE_PERMISSION: 'The kernel refused a control file for want of permission.',
  ERR_REPRIEVE_RESERVE_CLOSED: 'The reserve may be charged only while a condition is open.',
  ERR_REPRIEVE_RESERVE_EXHAUSTED: 'The reserve has no room for that charge.',
  ERR_REPRIEVE_RESERVE_UNAVAILABLE: 'The reserve could not be mapped, locked or made resident.',
  ERR_REPRIEVE_REVOKED: 'The guard has taken over from this handler, which was stopped or silent for too long.',
  ERR_REPRIEVE_STATE: 'What is to be changed could not be written down first, so it was not changed.',
  ERR_REPRIEVE_SYSTEM: 'A system call failed; `errno`, `syscall` and `path` say which.',
  ERR_REPRIEVE_TOO_LATE: 'The ladder has gone on to the next rung; this answer is not awaited any more.',
  ERR_REPRIEVE_UNSUPPORTED: 'This machine or kernel does not offer what was asked for.',
  ERR_REPRIEVE_VANISHED: 'The memcg was removed.',
  ERR_REPRIEVE_WINDOW_REFUSED:
    'The overcharge window was not opened: a thread did not stop, a memcg above has no room, or there is no freezer.',
} as const;

export type ErrorCode = keyof typeof ERROR_CODES;

/** What a failed system call leaves in an error. */
export interface SystemError extends Error {
  errno?: number;
  code?: string;
  syscall?: string;
  path?: string;
}

/** The one error class of the API: a stable `code`, and the system call that failed where there was one. */
export class ReprieveError extends Error {
  override readonly name = 'ReprieveError';
  readonly code: ErrorCode;
  /** Positive number of the kernel's error, where a system call failed. */
  readonly errno: number | undefined;
  readonly syscall: string | undefined;
  readonly path: string | undefined;

  constructor(code: ErrorCode, message: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.code = code;
    const system = cause as SystemError | undefined;
    this.errno = system?.errno;
    this.syscall = system?.syscall;
    this.path = system?.path;
  }
}

/** Errors of a system call by name: what it means for a memcg that was opened before. */
export function fromSystem(error: unknown, doing: string): ReprieveError {
  if (error instanceof ReprieveError) return error;
  const { code, message } = error as SystemError;
  if (code === 'ENODEV' || code === 'ESTALE') {
    return new ReprieveError('ERR_REPRIEVE_VANISHED', `${doing}: the memcg was removed (${message})`, error);
  }
  if (code === 'EACCES' || code === 'EPERM' || code === 'EROFS') {
    return new ReprieveError('ERR_REPRIEVE_PERMISSION', `${doing}: ${message}`, error);
  }
  if (code === 'ECANCELED')
    return new ReprieveError('ERR_REPRIEVE_REVOKED', `${doing}: the guard has taken over`, error);
  if (code === 'ERR_REPRIEVE_CLOSED') return new ReprieveError('ERR_REPRIEVE_CLOSED', `${doing}: ${message}`, error);
  return new ReprieveError('ERR_REPRIEVE_SYSTEM', `${doing}: ${message}`, error);
}

/** True if `error` says that the memcg is gone. */
export function isVanished(error: unknown): boolean {
  return error instanceof ReprieveError && error.code === 'ERR_REPRIEVE_VANISHED';
}

/** True if the guard has taken over, and does what is left to be done. */
export function isRevoked(error: unknown): boolean {
  return error instanceof ReprieveError && error.code === 'ERR_REPRIEVE_REVOKED';
}

/** The error for an option of the wrong shape: "Expected the `x` option to be …, got …". */
export function invalidOption(name: string, expected: string, got: unknown): ReprieveError {
  return new ReprieveError('ERR_REPRIEVE_INVALID_ARGUMENT', `Expected ${name} to be ${expected}, got ${show(got)}`);
}

/** A value as an error message shows it: short, on one line, never throwing. */
export function show(value: unknown): string {
  if (typeof value === 'function') return `a function ${value.name}`.trim();
  if (typeof value === 'bigint') return `${value}n`;
  try {
    const text = JSON.stringify(value) ?? String(value);
    return text.length > 80 ? `${text.slice(0, 77)}...` : text;
  } catch {
    return Object.prototype.toString.call(value);
  }
}

/** What an error says; anything may be thrown. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : show(error);
}
