#pragma once

#include <poll.h>
#include <sys/types.h>

#include <csignal>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "control_file.h"
#include "directory.h"
#include "event_set.h"
#include "kept_pidfds.h"
#include "pidfd.h"
#include "result.h"
#include "shared_words.h"

namespace reprieve {

/** The processes of one victim: sent SIGKILL by pidfd, watched until they are gone. */
class Killer {
 public:
  /** What process_mrelease(2) did: how many it reaped, how many it refused. */
  struct Release {
    int reaped;
    int refused;
  };

  /**
   * `signal` is SIGKILL; 0 goes the same way without the deed (kill(2)), for a drill. With `words`, nobody is signalled
   * any more once they are revoked: ECANCELED. `kept` spares opening who is in it.
   */
  explicit Killer(std::shared_ptr<EventSet> events, int signal = SIGKILL,
                  std::shared_ptr<const SharedWords> words = nullptr, std::shared_ptr<const KeptPidfds> kept = nullptr);
  Killer(const Killer&) = delete;
  Killer& operator=(const Killer&) = delete;
  ~Killer() { close(); }

  /**
   * Sends SIGKILL to every process that `file` of the directories lists and that is not known yet; how many it were.
   * A directory that is gone counts as empty. All directories are served before an error of one is returned.
   */
  Result<int> round(std::span<const Directory* const> directories, const std::string& file);
  /** Sends SIGKILL to one process: 1, or 0 when it is gone, known already, or ourselves. */
  Result<int> signal(const Pidfd& process);
  /** How many have not exited yet. Lets go of the descriptors of those that have. */
  int alive();
  /** process_mrelease(2) on those that have not exited. */
  Release release();

  int32_t token() const { return token_; }
  const std::vector<pid_t>& pids() const { return signalled_; }
  /** Listed by the last round and not to be signalled: another pid namespace (0), EPERM, no descriptor to be had. */
  int unreachable() const { return unreachable_; }
  bool closed() const { return closed_; }
  void close();

 private:
  struct Member {
    pid_t pid;
    Fd pidfd;
    bool exited;
  };

  bool list(const Directory& directory, const std::string& file);
  Result<int> serve(const Directory& directory, const std::string& file);
  bool known(pid_t pid) const;
  int dealKept(pid_t pid);
  int deal(int pidfd) const;
  void markExited();
  void follow(const Member& member);

  std::shared_ptr<EventSet> events_;
  std::shared_ptr<const SharedWords> words_;
  std::shared_ptr<const KeptPidfds> kept_;
  int signal_;
  int32_t token_;
  int unreachable_ = 0;
  bool closed_ = false;
  std::vector<Member> members_;
  std::vector<Member> found_;
  std::vector<pid_t> listed_;
  std::vector<pid_t> signalled_;
  std::vector<pollfd> polled_;
};

}  // namespace reprieve
