/**
 * What passes between a condition and the policy it asks. Classes, not object literals with getters: each of those is a
 * new shape to V8, and would be compiled on the way to a kill.
 */
import { messageOf } from '../errors.js';
import type { Decision, KillDecision, PolicyContext } from '../policy/decision.js';
import type { Reserve } from '../reserve/account.js';

/** Its signal is made when the policy asks for it: a quick one does not. */
export class Context implements PolicyContext {
  readonly #ask: () => AbortSignal;

  constructor(
    readonly reserve: Reserve,
    ask: () => AbortSignal,
  ) {
    this.#ask = ask;
  }

  get signal(): AbortSignal {
    return this.#ask();
  }
}

/** What a policy answered, each field read once; its reason is read when it is put into words. */
export function readOnce(answer: Decision): Decision {
  if (typeof answer !== 'object' || answer === null) return answer;
  return new AnswerOnce(answer as KillDecision & { ms: number }) as unknown as Decision;
}

class AnswerOnce {
  readonly action: string;
  readonly victim: string;
  readonly ms: number;
  readonly #answer: Decision;

  constructor(answer: KillDecision & { ms: number }) {
    this.action = answer.action;
    this.victim = answer.victim;
    this.ms = answer.ms;
    this.#answer = answer;
  }

  get because(): string {
    return this.#answer.because;
  }
}

/** The reason that a policy gives; it may be a getter of the policy's own. */
export function reasonOf(decision: Decision): string {
  try {
    return String(decision.because ?? 'no reason was given');
  } catch (error) {
    return `the reason could not be read: ${messageOf(error)}`;
  }
}

/** The decision as plain data. */
export function withReason(decision: Decision): Decision {
  const because = reasonOf(decision);
  switch (decision.action) {
    case 'kill':
      return { action: 'kill', victim: decision.victim, because };
    case 'wait':
      return { action: 'wait', ms: decision.ms, because };
    default:
      return { action: 'kernel', because };
  }
}

export function isPromise<T>(value: T | PromiseLike<T>): value is PromiseLike<T> {
  return typeof (value as PromiseLike<T> | null)?.then === 'function';
}
