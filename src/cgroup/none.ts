/** A machine without memory cgroups: there is the machine itself, and its processes. */
import { ReprieveError } from '../errors.js';
import type { Epoch } from '../guard/epoch.js';
import type { Ledger } from '../guard/ledger.js';
import type { Directory } from '../native.js';
import type { Listener, Memcg, OomListener, Waiter } from './cgroup.js';
import { RealHierarchy, type RealMemcg } from './real.js';

/** statfs(2) type of procfs. */
const PROC_SUPER_MAGIC = 0x9fa0;

export class NoHierarchy extends RealHierarchy {
  readonly kind = 'none';

  constructor(ledger?: Ledger, epoch?: Epoch) {
    super('/proc', PROC_SUPER_MAGIC, ledger, epoch);
  }

  override open(path: string): Memcg {
    throw none(`memcg:${path}`);
  }

  protected make(_directory: Directory, path: string): RealMemcg {
    throw none(`memcg:${path}`);
  }

  protected listenMemcg(memcg: Memcg): OomListener {
    throw none(`memcg:${memcg.path}`);
  }

  protected listenMemcgNear(memcg: Memcg): Listener {
    throw none(`memcg:${memcg.path}`);
  }

  listWaiters(): Waiter[] {
    return [];
  }
}

function none(scope: string): ReprieveError {
  return new ReprieveError(
    'ERR_REPRIEVE_NOT_A_MEMCG',
    `There are no memory cgroups here, so ${scope} cannot be watched; expected the scope 'system'`,
  );
}
