#pragma once

namespace reprieve::guard {

/**
 * `restore [--dry-run] <base-directory> [<instance>]`: puts back what stale instances left behind, one line a change on
 * stdout. argv[0] is "restore". 0: all is put back, or there was nothing; 1: something is pending or failed; 2: usage.
 */
int runRestore(int argc, char** argv);

}  // namespace reprieve::guard
