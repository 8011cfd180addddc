// For the guard under sanitizers: it is started without an environment and without a stderr, so what it finds goes to
// files, and their place is compiled in.
#include <sanitizer/asan_interface.h>

extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:abort_on_error=1:log_path=" REPRIEVE_SANITIZER_LOG;
}
extern "C" const char* __ubsan_default_options() {
  return "print_stacktrace=1:halt_on_error=1:log_path=" REPRIEVE_SANITIZER_LOG;
}
