#include "core/pidfd.h"

#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <limits>

#include "support.h"

namespace reprieve::test {
namespace {

TEST_CASE_FIXTURE(NoLeaks, "Pidfd signals a process and sees it go") {
  Child child(sleepForever);
  auto process = Pidfd::open(child.pid());
  REQUIRE(process);
  CHECK(process->pid() == child.pid());
  CHECK((fcntl(process->descriptor(), F_GETFD) & FD_CLOEXEC) != 0);
  CHECK_FALSE(process->exited());
  CHECK(*process->signal(0));
  CHECK(*process->signal(SIGKILL));
  CHECK(waitFor([&] { return process->exited(); }));
  CHECK(child.reap() == SIGKILL);
  CHECK(process->exited());
  CHECK_FALSE(*process->signal(SIGKILL));
}

TEST_CASE_FIXTURE(NoLeaks, "Pidfd says what failed") {
  auto nobody = Pidfd::open(std::numeric_limits<pid_t>::max());
  REQUIRE_FALSE(nobody);
  CHECK(nobody.error().number == ESRCH);
  CHECK(std::string(nobody.error().syscall) == "pidfd_open");
  CHECK(nobody.error().path == "/proc/2147483647");
  auto self = Pidfd::open(getpid());
  REQUIRE(self);
  auto wrong = self->signal(1000);
  REQUIRE_FALSE(wrong);
  CHECK(wrong.error().number == EINVAL);
  CHECK(std::string(wrong.error().syscall) == "pidfd_send_signal");
}

}  // namespace
}  // namespace reprieve::test
